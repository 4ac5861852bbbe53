"""ReinMax: straight-through, corrected to second order."""

from __future__ import annotations

from minigrad import Tensor, op

from . import categorical
from .base import TemperedSampler, check_draws
from .enumeration import Noise


def _heun_surrogate(logits, d, *, tau=1.0, family=categorical):
    q = 0.5 * (family.probability(logits / tau) + d)
    shift = family.log_odds(q) - logits  # so that softmax(θ + shift) = q at the present θ, and J(q) its slope
    return (0,), lambda logits: 2.0 * family.probability(logits + shift) - 0.5 * family.probability(logits)


@op(surrogate=_heun_surrogate)
def reinmax(logits, d, *, tau=1.0, family=categorical):
    """ReinMax (Liu, Dong, Liu, Yu & Gao 2023).   D ~ Cat(p), p = softmax(θ), drawn by the caller.

    Estimates    ∇θ E f(D) = Σᵢⱼ pⱼ (f(eᵢ) − f(eⱼ)) ∇θ pᵢ        (any baseline is free: Σᵢ ∇θ pᵢ = 0)
    Derivation   Heun's rule: f(eᵢ) − f(eⱼ) ≈ ½⟨∇f(eᵢ) + ∇f(eⱼ), eᵢ − eⱼ⟩, exact for quadratic f. Summed with the
                 sample D in the role of eⱼ, and again of eᵢ:
                 dθ = 2 J(½(p_τ + D)) g − ½ J(p) g,      g = ∇f(D),   p_τ = softmax(θ/τ),   J(q) v = q ⊙ (v − ⟨q, v⟩)
                 For a bit: J(q) v = q(1 − q) v.
                 For τ = 1 this is ½ J(p) g + ½⟨g, D − p⟩(D − p): half straight-through, half score function with the
                 linearised cost (for a bit, DARN).
    Exact when   f is quadratic in the one-hot of each variable, the others fixed (τ = 1).
    Costs        one evaluation of f and its gradient.
    Differs      from the published code in returning D only (the code also offers p) and in subtracting no mean from
                 dθ (it sums to 0 by itself, and masked classes stay at exactly 0).

    logits, d (..., K)   ->   d, with gradients towards the logits;    for bits (...)
    """
    check_draws(logits, d, family=family)

    def backward(g):
        def dlogits():
            p = family.probability(logits)
            q = p if tau == 1.0 else family.probability(logits / tau)
            return 2.0 * family.vjp(0.5 * (q + d), g) - 0.5 * family.vjp(p, g)

        return dlogits, None

    return d, backward


class ReinMax(TemperedSampler):
    """tau: at least 1, as in the published code, which refuses less, too (ValueError)."""

    title = "ReinMax"
    paper = "Liu, Dong, Liu, Yu & Gao 2023"
    exact_for = "quadratic"
    min_tau = 1.0

    def draw(self, logits: Tensor, rng: Noise) -> Tensor:
        return reinmax(logits, self.family.sample(rng, logits.data), tau=self.tau, family=self.family)
