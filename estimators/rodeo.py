"""RODEO: RLOO with control variates from discrete Stein operators and a surrogate built from the other samples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from minigrad import Tensor, enable_grad, grad
from minigrad.backend import Array, array_module
from minigrad.fused import linear
from minigrad.nn import xavier_uniform
from minigrad.ops import stack, tanh

from . import bernoulli
from .base import (
    Cost,
    Estimator,
    attach_gradient,
    check_count,
    cost_and_gradient,
    leave_one_out_mean,
    scale_per_example,
)
from .enumeration import Noise
from .learned import Learned, squared_norm_gradient


def flip_weights(p: Array, bs: Array) -> Array:
    """wᵢ = (1/n)(1 − q(bᵢ)), one over n times the probability of the value that bit i does not have.

    They define the discrete Stein operator of Gibbs sampling (Shi et al. 2022, eq. 10), which has mean 0 under q:
        (A h)(b) = Σᵢ wᵢ (h(b with bit i flipped) − h(b)),      E_q (A h)(b) = 0
    """
    n = int(np.prod(p.shape[1:]))
    return (bs + p - 2.0 * bs * p) / n


def rodeo_gradient(
    p: Array, bs: Array, costs: Array, h: Array, h_flipped: Array, alpha: Array, beta: Array
) -> tuple[Array, Callable[[Array], tuple[Array, ...]]]:
    """RODEO (Shi, Zhou, Hwang, Titsias & Mackey 2022, eq. 13).   b₁ … b_S independent.

    Estimates    ∇ₐ E f(b)
    Derivation   hₛ is a surrogate of f that is made from the other samples only. By the Stein identity
                 (A hₛ)(bₛ) has mean 0 given them, and so has A(hₛ · (b − p))(bₛ), a vector. The first improves the
                 baseline that RLOO makes of the costs, the second corrects the whole estimate:
                 da = (1/S) Σₛ [ (fₛ − (1/(S−1)) Σ_{t≠s}(fₜ + α (A hₜ)(bₜ)))(bₛ − p) + β A(hₛ · (b − p))(bₛ) ]
                 Flipping bit i changes b − p in place i alone, by 1 − 2bᵢ, so
                 A(h · (b − p))(b) = (A h)(b) (b − p) + w ⊙ h_flipped ⊙ (1 − 2b)
    Exact when   always; α = β = 0 is RLOO.
    Costs        S evaluations of f and their gradients, and a small network on n numbers.
    Differs      from the authors' code, whose network has two outputs, one surrogate for each correction; here one
                 serves both.

    p (B, n), bs (S, B, n), costs and h = hₛ(bₛ) (S, B), h_flipped (S, B, n)
    ->   da (B, n), and a function  u -> the derivatives of ⟨u, da⟩ with respect to h, h_flipped, α, β
    """
    S, score, w, turn = len(bs), bs - p, flip_weights(p, bs), 1.0 - 2.0 * bs
    stein = (w * (h_flipped - h[..., None])).sum(axis=-1)
    others = scale_per_example(leave_one_out_mean(stein), score)
    vector = scale_per_example(stein, score) + w * h_flipped * turn
    rloo = scale_per_example(costs - leave_one_out_mean(costs), score)
    g = (rloo - alpha * others + beta * vector).mean(axis=0)

    def backward(u):
        along = (u * score).sum(axis=-1)  # ⟨u, bₛ − p⟩, (S, B)
        d_stein = (beta * along - alpha * leave_one_out_mean(along)) / S
        d_flipped = w * d_stein[..., None] + (beta / S) * u * w * turn
        return -(w.sum(axis=-1)) * d_stein, d_flipped, -(u * others).sum() / S, (u * vector).sum() / S

    return g, backward


class Rodeo(Estimator):
    """The surrogate is hₛ(y) = (1/(S−1)) Σ_{t≠s} (l + r net(l/r, fₜ/r)) with l = ⟨∇f(bₜ), y − bₜ⟩ over all bits and
    r = 1 + |fₜ|: as published, the net sees each other sample by itself. It has one hidden layer. Its last layer
    starts at 0, so that h starts as the mean of the linearised costs less their values.

    samples: S from 2 to 10,000.  hidden: units of the net.  lr: of the Adam that trains it with α and β, from 0, on the
    variance.
    """

    title = "RODEO"
    paper = "Shi, Zhou, Hwang, Titsias & Mackey 2022"
    exact_for = "all"
    evaluations = "S"
    randomness = "samples"
    families = (bernoulli,)
    learned_objective = "variance"
    learned: Learned

    def __init__(self, samples: int = 2, hidden: int = 10, lr: float = 1e-2) -> None:
        self.samples = self.sample_count = check_count("samples", samples, 2)
        self.hidden, self.learned = check_count("hidden", hidden, 1), Learned(lr)

    def initial(self, rng: Noise) -> dict[str, Any]:
        net = {"W1": xavier_uniform(rng, (2, self.hidden)), "b1": np.zeros(self.hidden)}
        net |= {"w2": np.zeros((self.hidden, 1)), "b2": np.zeros(1)}
        return net | {"alpha": 0.0, "beta": 0.0}

    def estimate(self, logits: Tensor, cost: Cost, rng: Noise) -> Tensor:
        xp, p, S = array_module(logits.data), self.family.probability(logits.data), self.samples
        self.learned.start(lambda: self.initial(rng.site("weights")), like=p)
        bs = [self.family.sample(rng.site(s), logits.data) for s in range(S)]
        fs, gs = zip(*(cost_and_gradient(cost, b) for b in bs), strict=True)
        value = stack(*fs).mean(axis=0)

        bs, gs = (xp.stack(x).reshape(S, len(p), -1) for x in (bs, gs))
        costs, p = xp.stack([f.data for f in fs]), p.reshape(len(p), -1)
        others = lambda x: xp.stack([xp.roll(x, -i, axis=0) for i in range(1, S)])  # xₜ, t ≠ s: (S−1, S, ...)
        at = (others(gs) * (bs - others(bs))).sum(axis=-1)  # l at bₛ …
        flipped = at[..., None] + others(gs) * (1.0 - 2.0 * bs)  # … and with each bit flipped
        linear_part = xp.concatenate([at[..., None], flipped], axis=-1)
        level = xp.broadcast_to(others(costs)[..., None], linear_part.shape)
        with enable_grad():
            W1, b1, w2, b2 = (self.learned.parameters[name] for name in ("W1", "b1", "w2", "b2"))
            scale = 1.0 / (1.0 + abs(level))  # the net sees numbers of the size of 1
            x = Tensor(xp.stack([linear_part * scale, level * scale], axis=-1))
            net = linear(tanh(linear(x, W1, b1)), w2, b2).reshape(linear_part.shape) / scale
        h = (linear_part + net.data).mean(axis=0)
        alpha, beta = self.learned["alpha"], self.learned["beta"]
        g, backward = rodeo_gradient(p, bs, costs, h[..., 0], h[..., 1:], alpha, beta)

        d_h, d_flipped, d_alpha, d_beta = backward(squared_norm_gradient(g))
        gradients = {"alpha": d_alpha, "beta": d_beta}
        d_net = xp.concatenate([d_h[..., None], d_flipped], axis=-1) / (S - 1)
        from_net = grad(net, [W1, b1, w2, b2], xp.broadcast_to(d_net, net.shape))
        self.learned.learn(gradients | dict(zip(("W1", "b1", "w2", "b2"), from_net, strict=True)))
        return attach_gradient(value, logits, g.reshape(logits.shape))
