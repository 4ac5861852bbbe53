"""Score functions: REINFORCE and its baselines.

∇θ E f(D) = E[f(D) ∇θ log q(D)], because ∇q = q ∇log q (Glynn 1990; Williams 1992). The cost is only evaluated, never
differentiated with respect to D. Since E[∇log q] = 0, any baseline that does not depend on D may be subtracted from
f without changing the expectation; a good one changes the variance a lot.
"""

from __future__ import annotations

import numpy as np

from minigrad import Tensor
from minigrad.backend import Array, array_module
from minigrad.fused import TINY
from minigrad.ops import stack

from .base import (
    NO_BASELINE,
    Cost,
    Estimator,
    Play,
    attach_gradient,
    check_count,
    check_decay,
    exponential_mean,
    leave_one_out_mean,
    on_device,
    scale_per_example,
)
from .enumeration import Noise


def reinforce_gradient(p: Array, d: Array, costs: Array, baseline: Array | float = 0.0) -> Array:
    """REINFORCE (Williams 1992).   D ~ Cat(p), p = softmax(θ), drawn by the caller.

    Estimates    ∇θ E f(D) = E[(f(D) − b) ∇θ log q(D)]
    Derivation   log q(D) = ⟨D, θ⟩ − log Σ eᶿ for each variable, so ∇θ log q(D) = D − p, and E[D − p] = 0
                 dθ = (f(D) − b) (D − p)
    Exact when   always, if b does not depend on this D.
    Costs        one evaluation of f.

    p, d (B, ..., K), costs (B,), baseline a number or (B,)   ->   dθ (B, ..., K);    for bits, p and d are (B, ...)
    """
    return scale_per_example(costs - baseline, d - p)


def minimum_variance_gradient(p: Array, d: Array, costs: Array, baseline: Array | float) -> Array:
    """REINFORCE with a baseline for each variable (Bengio, Léonard & Courville 2013, eq. 10; Weaver & Tao 2001).

    Estimates    ∇θ E f(D)
    Derivation   The variance of (f − b)(D − p) summed over the components of one variable has b-derivative
                 −2 E[‖D − p‖² (f − b)], which vanishes for
                 b* = E[‖D − p‖² f] / E[‖D − p‖²]
                 dθₗ = (f(D) − bₗ)(Dₗ − pₗ)
    Exact when   always, if the baselines do not depend on this D.
    Costs        one evaluation of f.

    p, d (B, ..., K), costs (B,), baseline (..., 1) or a number   ->   dθ (B, ..., K);    for bits p, d (B, ...)
    """
    per_variable = costs.reshape(costs.shape + (1,) * (d.ndim - costs.ndim))
    return (per_variable - baseline) * (d - p)


def rloo_gradient(p: Array, ds: Array, costs: Array) -> Array:
    """REINFORCE with a leave-one-out baseline (Salimans & Knowles 2014; Kool, van Hoof & Welling 2019).

    Estimates    ∇θ E f(D) from S ≥ 2 independent samples, each with the mean cost of the others as its baseline
    Derivation   (1/S) Σₛ (fₛ − (1/(S−1)) Σ_{t≠s} fₜ)(Dₛ − p),  fₛ = f(Dₛ) with the mean f̄, and
                 fₛ − (S f̄ − fₛ)/(S−1) = S/(S−1) (fₛ − f̄):
                 dθ = (1/(S−1)) Σₛ (fₛ − f̄)(Dₛ − p)
    Exact when   always: the baseline of a sample is independent of it.
    Costs        S evaluations of f.

    p (B, ..., K), ds (S, B, ..., K), costs (S, B)   ->   dθ (B, ..., K)
    """
    advantage = (costs - costs.mean(axis=0)) / (costs.shape[0] - 1)
    return scale_per_example(advantage, ds - p).sum(axis=0)


class Reinforce(Estimator):
    title = "REINFORCE"
    paper = "Williams 1992"
    warning = NO_BASELINE
    exact_for = "all"
    evaluations = "1"
    cost_gradient = False
    episodes = True
    cancels_constants = False

    def baseline(self, like: Array) -> Array | float:
        return 0.0

    def estimate(self, logits: Tensor, cost: Cost, rng: Noise) -> Tensor:
        p, d = self.family.probability(logits.data), self.family.sample(rng, logits.data)
        f = cost(Tensor(d))
        self.observe(f.data)
        g = reinforce_gradient(p, d, f.data, self.baseline(p))
        return attach_gradient(f, logits, g)

    def episode(self, play: Play, rng: Noise) -> Tensor:
        """As ever, with log q of all choices in the place of the logits:  (f − b) ∇ log q."""
        f, log_q = play(None, rng)
        self.observe(f.data)
        return attach_gradient(f, log_q, f.data - self.baseline(f.data))

    def observe(self, costs: Array) -> None:
        """Called with the costs of each batch, before the baseline is used."""


class ReinforceRunningMean(Reinforce):
    """The baseline is an exponential mean of the costs of earlier batches, m ← β m + (1−β) mean f, after m was used.

    decay: β, in [0, 1).  The first batch has no baseline; it sets the mean.
    """

    title = "REINFORCE, running mean"
    warning = ""
    paper = "Williams 1992; Mnih & Gregor 2014"
    state = ("mean", "started")

    def __init__(self, decay: float = 0.9) -> None:
        self.decay, self.mean, self.started = check_decay(decay), 0.0, False

    def baseline(self, like: Array) -> Array | float:
        return on_device(self.mean, like)

    def observe(self, costs: Array) -> None:
        self._latest = costs.mean()

    def update(self) -> None:
        if self._latest is not None:
            new = self._latest
            self.mean = exponential_mean(self.decay, self.mean, new) if self.started else new
            self.started, self._latest = True, None


class ReinforceMinimumVariance(Estimator):
    """Both expectations of the best baseline are exponential means over earlier batches, one pair for each variable.

    decay: in [0, 1); 0.9 as published.  The first batch has no baseline; it sets the means.
    """

    title = "REINFORCE, minimum-variance baselines"
    paper = "Bengio, Léonard & Courville 2013; Weaver & Tao 2001"
    exact_for = "all"
    evaluations = "1"
    cost_gradient = False
    cancels_constants = False
    state = ("weighted_cost", "weight")

    def __init__(self, decay: float = 0.9) -> None:
        self.decay = check_decay(decay)
        self.weighted_cost = self.weight = np.zeros(0)  # E[‖D − p‖² f] and E[‖D − p‖²]; empty before the first batch

    def estimate(self, logits: Tensor, cost: Cost, rng: Noise) -> Tensor:
        p, d = self.family.probability(logits.data), self.family.sample(rng, logits.data)
        f = cost(Tensor(d))
        square = self.family.square(d - p)
        self._latest = scale_per_example(f.data, square).mean(axis=0), square.mean(axis=0)
        baseline = 0.0
        if self.weight.size:
            below = array_module(p).maximum(on_device(self.weight, p), TINY)
            baseline = on_device(self.weighted_cost, p) / below
        return attach_gradient(f, logits, minimum_variance_gradient(p, d, f.data, baseline))

    def update(self) -> None:
        if self._latest is not None:
            mix = lambda old, new: exponential_mean(self.decay, old, new) if old.size else new
            self.weighted_cost, self.weight = map(mix, (self.weighted_cost, self.weight), self._latest)
            self._latest = None


class Rloo(Estimator):
    """samples: S from 2 to 10,000."""

    title = "RLOO"
    paper = "Kool, van Hoof & Welling 2019"
    exact_for = "all"
    evaluations = "S"
    cost_gradient = False
    randomness = "samples"
    episodes = True

    def __init__(self, samples: int = 2) -> None:
        self.samples = self.sample_count = check_count("samples", samples, 2)

    def estimate(self, logits: Tensor, cost: Cost, rng: Noise) -> Tensor:
        xp = array_module(logits.data)
        ds = [self.family.sample(rng.site(s), logits.data) for s in range(self.samples)]
        fs = [cost(Tensor(d)) for d in ds]
        costs = xp.stack([f.data for f in fs])
        g = rloo_gradient(self.family.probability(logits.data), xp.stack(ds), costs)
        return attach_gradient(stack(*fs).mean(axis=0), logits, g)

    def episode(self, play: Play, rng: Noise) -> Tensor:
        """S runs of the model, each one's advantage times the gradient of its own log q."""
        fs, log_qs = zip(*(play(None, rng.site(s)) for s in range(self.samples)), strict=True)
        costs = array_module(fs[0].data).stack([f.data for f in fs])
        value = stack(*fs).mean(axis=0)
        for log_q, advantage in zip(log_qs, (costs - leave_one_out_mean(costs)) / self.samples, strict=True):
            value = attach_gradient(value, log_q, advantage)
        return value
