"""DARN: REINFORCE whose baseline is the cost, linearised at the sample, halfway between the two values of a bit."""

from __future__ import annotations

import numpy as np

from minigrad import Tensor, op
from minigrad.backend import Array, array_module
from minigrad.ops import stable_sigmoid

from . import bernoulli
from .base import Cost, Sampler, SettingError, attach_gradient, check_draws, value_and_grad
from .enumeration import Noise


def _log_density_slope(logits, b):
    """½ |b − p| integrated: for b = 1, ½(1 − p) is the slope of ½ log σ(a); for b = 0, ½ p that of −½ log σ(−a)."""
    sign = 2.0 * b - 1.0
    xp = array_module(logits)
    return (0,), lambda a: -0.5 * sign * xp.log1p(xp.exp(-sign * a))


@op(surrogate=_log_density_slope)
def darn(logits, b):
    """DARN(½) (Gregor, Danihelka, Mnih, Blundell & Wierstra 2014).   b ~ Bernoulli(p), p = σ(a), drawn by the caller.

    Estimates    ∇ₐ E f(b)
    Derivation   REINFORCE with the baseline f(½), expanded to first order at the sample,  f(½) ≈ f(b) + f'(b)(½ − b):
                 da = f'(b)(b − ½)(b − p) = ½ f'(b) |b − p|
                 and |b − p| = 1 − p_b, one minus the probability of the value drawn.
    Exact when   f is quadratic in each bit, the others fixed: then the error of the expansion is the same for b = 0
                 and 1. It is ReinMax (τ = 1) and ZGR for a variable of two classes.
    Costs        one evaluation of f and its gradient.

    logits, b (...)   ->   b, with gradients towards the logits
    """
    check_draws(logits, b, family=bernoulli)
    return b, lambda g: (0.5 * g * abs(b - stable_sigmoid(logits)), None)


def darn_half_gradient(p: Array, b: Array, half_g: Array) -> Array:
    """DARN expanded at ½ instead of the sample, as Jang, Gu & Poole (2017, section 3.2) place it.

    Derivation   f(b) − f(½) ≈ f'(½)(b − ½), so
                 da = f'(½)(b − ½)(b − p) = ½ f'(½) |b − p|,    whose mean is p(1 − p) f'(½)
    Exact when   f is a sum of quadratic functions of one bit each ("separable"): with products of two bits f'(½)
                 stands for the other bits at ½, not for their means.
    Costs        two evaluations of f and its gradient at ½.
    Differs      from the formula as printed, a baseline f(½) + f'(½)(b − ½) whose mean is not added back: what that
                 leaves has expectation 0 for every such quadratic, and no use.

    p, b, half_g = f'(½) (B, ...)   ->   da (B, ...)
    """
    return 0.5 * half_g * abs(b - p)


class Darn(Sampler):
    """expand_at: "sample" or "half" (else ValueError). At "half" it cannot be sampled step by step (ValueError)."""

    title = "DARN(½)"
    paper = "Gregor, Danihelka, Mnih, Blundell & Wierstra 2014"
    exact_for = "quadratic"
    families = (bernoulli,)

    def __init__(self, expand_at: str = "sample") -> None:
        if expand_at not in ("sample", "half"):
            raise SettingError(f"expand_at must be sample or half, got {expand_at!r}.")
        self.expand_at = expand_at
        if expand_at == "half":
            self.exact_for, self.evaluations, self.single_sample = "separable", "2", False

    def count_evaluations(self, variables: int, categories: int, call: int = 0) -> int:
        return 1 if self.expand_at == "sample" else 2

    def sample(self, logits: Tensor, rng: Noise, mask: np.ndarray | None = None) -> Tensor:
        if self.expand_at == "half":
            raise ValueError(
                "DARN expanded at ½ evaluates the cost there and cannot be sampled: call it with the cost."
            )
        return super().sample(logits, rng, mask)

    def draw(self, logits: Tensor, rng: Noise) -> Tensor:
        return darn(logits, self.family.sample(rng, logits.data))

    def estimate(self, logits: Tensor, cost: Cost, rng: Noise) -> Tensor:
        if self.expand_at == "sample":
            return super().estimate(logits, cost, rng)
        p, b = self.family.probability(logits.data), self.family.sample(rng, logits.data)
        f = cost(Tensor(b))
        _, half_g = value_and_grad(cost, array_module(p).full(p.shape, 0.5, dtype=p.dtype))
        return attach_gradient(f, logits, darn_half_gradient(p, b, half_g))
