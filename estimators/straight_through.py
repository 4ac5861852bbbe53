"""Straight-through: draw a hard sample, and pretend on the way back that it was the probabilities.

(Hinton 2012, lecture 15b; Bengio, Léonard & Courville 2013.)
"""

from __future__ import annotations

from minigrad import op
from minigrad.fused import softmax_array, softmax_vjp

from .base import TemperedSampler


def _softened(logits, onehot, *, tau=1.0):
    return (0,), lambda logits: softmax_array(logits / tau)


@op(surrogate=_softened)
def straight_through(logits, onehot, *, tau=1.0):
    """Straight-through with the derivative of softmax.   D ~ Cat(p), p = softmax(θ), drawn by the caller.

    Estimates    ∇θ E f(D) = Σᵢ f(eᵢ) ∇θ pᵢ
    Derivation   replace f(eᵢ) by its first-order expansion at the sample, f(D) + ⟨∇f(D), eᵢ − D⟩; the constants drop
                 out because Σᵢ ∇pᵢ = 0, and Σᵢ gᵢ ∇θ pᵢ = J(p) g remains. A temperature smooths the Jacobian:
                 dθ = (1/τ) J(p_τ) g,      g = ∇f(D),   p_τ = softmax(θ/τ),   J(q) v = q ⊙ (v − ⟨q, v⟩)
    Exact when   f is linear (τ = 1).
    Costs        one evaluation of f and its gradient.
    Differs      from the identity straight-through of Bengio et al. in keeping the softmax derivative; D is drawn
                 from p whatever τ is, as in the code of Fan et al. 2022.

    logits, onehot (..., K)   ->   onehot, with gradients towards the logits
    """

    def backward(g):
        return lambda: softmax_vjp(softmax_array(logits / tau), g) / tau, None

    return onehot, backward


class StraightThrough(TemperedSampler):
    title = "Straight-through"
    paper = "Bengio, Léonard & Courville 2013"
    exact_for = "linear"

    def draw(self, logits, rng):
        return straight_through(logits, rng.one_hot(logits.data), tau=self.tau)
