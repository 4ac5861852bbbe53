"""ZGR: the zero-temperature limit of Gumbel-Rao, in closed form."""

from __future__ import annotations

from minigrad import Tensor, op

from . import categorical
from .base import Sampler, check_draws
from .enumeration import Noise


def _half_and_half(logits, d, *, family=categorical):
    """½ softmax(θ) for the first half; for the second, ½ D ⟨D − p, θ⟩, whose θ-gradient along g is ½⟨g, D⟩(D − p),
    and −½ p ⟨D − p, θ⟩ to turn D into D − p. The θ inside D − p are constants."""
    score = d - family.probability(logits)
    return (0,), lambda logits: 0.5 * family.probability(logits) + 0.5 * score * family.inner(score, logits)


@op(surrogate=_half_and_half)
def zgr(logits, d, *, family=categorical):
    """ZGR (Shekhovtsov 2023).   D ~ Cat(p), p = softmax(θ), drawn by the caller.

    Estimates    ∇θ E f(D), as the limit τ → 0 of Gumbel-Rao's mean given D
    Derivation   half straight-through, half DARN: REINFORCE with the cost linearised at D and the baseline at p,
                 f(D) − f(p) ≈ ⟨g, D − p⟩:
                 dθ = ½ J(p) g + ½ (D − p) ⟨g, D − p⟩,      g = ∇f(D)
    Exact when   f is quadratic in the one-hot of each variable, the others fixed.
    Costs        one evaluation of f and its gradient; one softmax, no temperature.
    Differs      from ReinMax at τ = 1 in nothing but the order of the arithmetic: the tests hold them together.

    logits, d (..., K)   ->   d, with gradients towards the logits;    for bits (...)
    """
    check_draws(logits, d, family=family)

    def backward(g):
        def dlogits():
            p = family.probability(logits)
            score = d - p
            return 0.5 * (family.vjp(p, g) + score * family.inner(score, g))

        return dlogits, None

    return d, backward


class Zgr(Sampler):
    title = "ZGR"
    paper = "Shekhovtsov 2023"
    exact_for = "quadratic"

    def draw(self, logits: Tensor, rng: Noise) -> Tensor:
        return zgr(logits, self.family.sample(rng, logits.data), family=self.family)
