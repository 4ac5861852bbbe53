"""Simultaneous perturbation: two evaluations whatever the number of logits, paid for with variance."""

from __future__ import annotations

from minigrad import Tensor, no_grad
from minigrad.backend import Array, array_module

from .base import LARGEST, SMALLEST, Cost, Estimator, attach_gradient, check_number, scale_per_example
from .enumeration import Noise


def spsa_gradient(plus: Array, minus: Array, delta: Array, width: float) -> Array:
    """Simultaneous perturbation stochastic approximation (Spall 1992, eq. 2.1).

    Estimates    ∇θ E f(D) from the costs at θ + cΔ and θ − cΔ, with random signs Δ
    Derivation   f₊ − f₋ ≈ 2c ⟨Δ, ∇E⟩, and E[Δᵢ Δⱼ] = δᵢⱼ makes Δ ⟨Δ, ∇E⟩ unbiased:
                 dθ = (f₊ − f₋)/(2c) Δ                    (Spall divides by Δ; for signs that is the same)
    Exact when   never; the error is O(c²).
    Costs        two evaluations of f, without its gradient.

    plus, minus (B,), delta (B, ...)   ->   dθ (B, ...)
    """
    return scale_per_example((plus - minus) / (2.0 * width), delta)


class Spsa(Estimator):
    """width: c, from 1e-6 to 1e6. Both perturbed samples are drawn with the same noise, so that most differences are 0.

    The variance grows with the number of logits and as 1/c: for models with many logits it is far too noisy.
    """

    title = "SPSA"
    paper = "Spall 1992"
    exact_for = "none"
    evaluations = "3"
    cost_gradient = False
    randomness = "noise"
    perturbs_logits = True
    sums_to_zero = False

    def __init__(self, width: float = 0.5) -> None:
        self.width = check_number("width", width, SMALLEST, LARGEST)

    def count_evaluations(self, variables: int, categories: int, call: int = 0) -> int:
        return 3

    def estimate(self, logits: Tensor, cost: Cost, rng: Noise) -> Tensor:
        theta, family = logits.data, self.family
        noise, c = family.noise(rng.site("common"), theta), self.width
        xp = array_module(theta)
        delta = xp.where(rng.site("signs").uniform(theta.shape, like=theta) < 0.5, -1.0, 1.0).astype(theta.dtype)
        f = cost(Tensor(family.sample(rng, theta)))
        with no_grad():
            plus, minus = (cost(Tensor(family.harden(theta + s * c * delta + noise))).data for s in (1.0, -1.0))
        return attach_gradient(f, logits, spsa_gradient(plus, minus, delta, c))
