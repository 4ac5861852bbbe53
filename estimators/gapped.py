"""Gapped straight-through: replace the Gumbel noise by the smallest deterministic shift that does its job."""

from __future__ import annotations

from minigrad import Tensor, op
from minigrad.backend import Array, array_module
from minigrad.fused import inner, softmax_array, softmax_vjp
from minigrad.random import argmax_one_hot

from . import categorical
from .base import LARGEST, TemperedSampler, check_draws, check_number
from .enumeration import Noise


def gapped_logits(logits: Array, onehot: Array, gap: Array | float) -> Array:
    """θ' = θ + m₁ − m₂, in which the drawn class i leads every other one by at least the gap (Fan et al. 2022, eq. 10).

        m₁ = (max θ − θᵢ) D                       lifts the drawn class to the maximum
        m₂ = max(θ − max θ + gap, 0) (1 − D)      pushes every other class below it by the gap

    gap: a number ≥ 0 or an array (..., 1).  logits, onehot (..., K) -> (..., K)
    """
    xp = array_module(logits)
    m = logits.max(axis=-1, keepdims=True)
    return xp.where(onehot > 0, m, xp.minimum(logits, m - gap))


def expected_gap(logits: Array, onehot: Array) -> Array:
    """E[max − second max of θ + G | argmax(θ + G) = D] = −log(1 − pᵢ)/pᵢ, i the drawn class.   (..., K) -> (..., 1)

    Derivation: the maximum and the second maximum of θ + G given argmax = i are −log(Eᵢ/Z) and
    −log(E/(Z−eᶿⁱ) + Eᵢ/Z) with two independent exponentials, so the gap is log(1 + (E/Eᵢ)/(1−pᵢ)), whose mean over
    the ratio's density 1/(1+r)² is the integral ∫ dr / ((1 + r)(1 − p + r)) = −log(1 − p)/p.
    The published code replaces pᵢ by pᵢ(1 − 10⁻⁵), which keeps it finite when pᵢ rounds to 1; so does this.
    """
    p = inner(softmax_array(logits), onehot) * (1.0 - 1e-5)
    p = array_module(p).maximum(p, 1e-12)  # as p → 0 the gap goes to 1
    return -array_module(p).log1p(-p) / p


def _gap(logits, onehot, gap):
    return expected_gap(logits, onehot) if gap == "p" else gap


def _gapped_surrogate(logits, onehot, *, gap=1.0, tau=1.0, consistent=True, detached=True):
    gap = _gap(logits, onehot, gap)  # a constant, whatever else is not
    if consistent and not detached:
        return (0,), lambda logits: softmax_array(gapped_logits(logits, onehot, gap) / tau)
    shift = gapped_logits(logits, onehot, gap) - logits if consistent else 0.0
    return (0,), lambda logits: softmax_array((logits + shift) / tau)


@op(surrogate=_gapped_surrogate)
def gapped_straight_through(logits, onehot, *, gap=1.0, tau=1.0, consistent=True, detached=True):
    """Gapped straight-through (Fan, Chi, Rudnicky & Ramadge 2022).   D ~ Cat(softmax(θ)), drawn by the caller.

    Estimates    ∇θ E f(D), with ST Gumbel-Softmax's properties but no noise beyond D
    Derivation   three properties of θ + G given D are kept, its randomness is not: the drawn class has the largest
                 perturbed logit (consistency), it leads by a margin (strict gap), and the perturbation is not
                 differentiated (zero gradient):
                 dθ = (1/τ) J(softmax(θ'/τ)) g,      θ' = θ + const(m₁ − m₂), see `gapped_logits`,   g = ∇f(D)
    Exact when   never in general.
    Costs        one evaluation of f and its gradient.
    Differs      from the published code in subtracting no mean from θ' (softmax does not see it, masked classes do).

    Ablation     consistent=False leaves m₁ and m₂ out (which is straight-through); gap=0 keeps the drawn class on top,
                 but not strictly; detached=False differentiates m₁ and m₂, too: where θ' is max θ or max θ − gap, its
                 derivative belongs to the class that has the maximum.

    gap: a number ≥ 0 (GST-1.0: 1), or "p" for the mean gap that Gumbel noise would leave, `expected_gap` (GST-p).
    logits, onehot (..., K)   ->   onehot, with gradients towards the logits
    """
    check_draws(logits, onehot)

    def backward(g):
        def dlogits():
            shifted = gapped_logits(logits, onehot, _gap(logits, onehot, gap)) if consistent else logits
            u = softmax_vjp(softmax_array(shifted / tau), g) / tau
            if detached or not consistent:
                return u
            itself = (shifted == logits) * (1.0 - onehot)
            return itself * u + argmax_one_hot(logits) * ((1.0 - itself) * u).sum(axis=-1, keepdims=True)

        return dlogits, None

    return onehot, backward


class GappedStraightThrough(TemperedSampler):
    """gap: a number from 0 to 1e6, or "p" (else ValueError).

    For the ablation of its three properties: consistent=0 leaves θ as it is (which is straight-through), gap=0 keeps
    the consistency only, detached=0 differentiates the perturbation (but not the gap of "p").
    """

    title = "Gapped straight-through"
    paper = "Fan, Chi, Rudnicky & Ramadge 2022"
    exact_for = "none"
    families = (categorical,)

    def __init__(
        self, tau: float = 1.0, gap: float | str = 1.0, consistent: bool = True, detached: bool = True
    ) -> None:
        super().__init__(tau)
        self.gap: float | str = "p" if gap == "p" else check_number("gap, unless it is 'p',", gap, 0.0, LARGEST)
        self.consistent, self.detached = bool(consistent), bool(detached)

    def draw(self, logits: Tensor, rng: Noise) -> Tensor:
        switches = {"consistent": self.consistent, "detached": self.detached}
        return gapped_straight_through(logits, rng.one_hot(logits.data), gap=self.gap, tau=self.tau, **switches)
