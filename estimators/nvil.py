"""NVIL: REINFORCE with a baseline that a small network predicts from the input, and a normalised signal."""

from __future__ import annotations

import numpy as np

from minigrad import Tensor, enable_grad, grad
from minigrad.backend import Array, array_module
from minigrad.fused import MASKED, linear
from minigrad.nn import xavier_uniform
from minigrad.ops import tanh

from .base import (
    Cost,
    Estimator,
    attach_gradient,
    check_count,
    check_decay,
    exponential_mean,
    on_device,
    scale_per_example,
)
from .enumeration import Noise
from .learned import Learned


def nvil_gradient(p: Array, d: Array, costs: Array, baseline: Array, scale: Array | float = 1.0) -> Array:
    """NVIL, neural variational inference and learning (Mnih & Gregor 2014, eqs. 7 to 9 and algorithm 1).

    Estimates    ∇θ E f(D), up to the factor 1/max(1, σ), which is the same for the whole batch
    Derivation   C_ψ(x) and c depend on the input and on the past, not on D, so they may be subtracted:
                 dθ = (f(D) − C_ψ(x) − c)/max(1, σ) · (D − p)
    Exact when   always, up to that factor.
    Costs        one evaluation of f, and a small network.

    p, d (B, ..., K), costs and baseline C_ψ(x) + c (B,), scale max(1, σ)   ->   dθ (B, ..., K)
    """
    return scale_per_example((costs - baseline) / scale, d - p)


class Nvil(Estimator):
    """C_ψ(x) = w₂ᵀ tanh(W₁ᵀ x + b₁) + b₂ sees `inputs` (the model passes x) or, without them, the logits.

    It learns to predict f − c in the mean square by an Adam of its own; c and σ² are exponential means of the mean and
    the variance of f − C_ψ(x). Here they change after they were used, so that no sample enters its own baseline; in
    the paper's algorithm they change before.

    decay: of the means, in [0, 1).  hidden: units.  lr: of the baseline's Adam.  normalise: divide by max(1, σ)?
    ValueError for inputs of another width than the first ones.
    """

    title = "NVIL"
    paper = "Mnih & Gregor 2014"
    objective = "E f(D)/max(1, σ)"
    exact_for = "all"
    evaluations = "1"
    cost_gradient = False
    cancels_constants = False
    state = ("mean", "variance", "started")
    learned_objective = "squared error"
    learned: Learned

    def __init__(self, decay: float = 0.9, hidden: int = 100, lr: float = 1e-2, normalise: bool = True) -> None:
        self.decay, self.hidden, self.normalise = check_decay(decay), check_count("hidden", hidden, 1), normalise
        if not normalise:
            self.objective = "E f(D)"
        self.learned = Learned(lr)
        self.mean = self.variance = 0.0
        self.started = False

    def estimate(self, logits: Tensor, cost: Cost, rng: Noise) -> Tensor:
        xp, p, d = array_module(logits.data), self.family.probability(logits.data), self.family.sample(rng, logits.data)
        f = cost(Tensor(d))
        x = xp.where(logits.data > 0.5 * MASKED, logits.data, 0.0) if self.inputs is None else self.inputs
        x = x.reshape(len(x), -1)
        if self.learned.parameters and self.learned["W1"].shape[0] != x.shape[1]:
            width = self.learned["W1"].shape[0]
            raise ValueError(
                f"NVIL's baseline saw inputs of width {width}, not {x.shape[1]}: create another NVIL for these."
            )
        self.learned.start(lambda: self.initial(rng.site("baseline"), x.shape[1]), like=p)
        mean, variance = on_device(self.mean, p), on_device(self.variance, p)
        with enable_grad():  # the baseline has a graph of its own, and its own objective
            weights = list(self.learned.parameters.values())
            W1, b1, w2, b2 = weights
            predicted = linear(tanh(linear(Tensor(x), W1, b1)), w2, b2).reshape(-1)
            error = predicted + (mean - f.data)
            gradients = grad((error * error).mean(), weights)
        self.learned.learn(dict(zip(self.learned.parameters, gradients, strict=True)))
        residual = f.data - predicted.data
        self._latest = residual.mean(), residual.var()
        deviation = xp.maximum(xp.sqrt(variance), 1.0) if self.normalise else 1.0
        return attach_gradient(f, logits, nvil_gradient(p, d, f.data, predicted.data + mean, deviation))

    def initial(self, rng: Noise, inputs: int) -> dict[str, np.ndarray]:
        W1 = xavier_uniform(rng, (inputs, self.hidden))
        return {"W1": W1, "b1": np.zeros(self.hidden), "w2": np.zeros((self.hidden, 1)), "b2": np.zeros(1)}

    def update(self) -> None:
        super().update()
        if self._latest is not None:
            mix = lambda old, new: exponential_mean(self.decay, old, new) if self.started else new
            self.mean, self.variance = map(mix, (self.mean, self.variance), self._latest)
            self.started, self._latest = True, None
