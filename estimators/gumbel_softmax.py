"""Gumbel-Softmax and its straight-through form: a relaxed sample that is a differentiable function of fixed noise.

argmax(θ + G) is a draw from Cat(softmax(θ)) when G is standard Gumbel noise; replacing argmax by a softmax at
temperature τ makes the draw differentiable (Jang, Gu & Poole 2017; Maddison, Mnih & Teh 2017).
"""

from __future__ import annotations

from minigrad import op
from minigrad.fused import softmax_array, softmax_vjp
from minigrad.random import argmax_one_hot

from .base import TemperedSampler


@op
def gumbel_softmax(logits, gumbel, *, tau=1.0):
    """Gumbel-Softmax (Jang, Gu & Poole 2017; Maddison, Mnih & Teh 2017).   G iid standard Gumbel, drawn by the caller.

    Estimates    ∇θ E f(y),  y = softmax((θ + G)/τ): the cost is evaluated on a point inside the simplex
    Derivation   the reparametrisation ∇θ f(y(θ, G)) with ∂y/∂θ = (1/τ) J(y):
                 dθ = (1/τ) J(y) ∇f(y),      J(y) v = y ⊙ (v − ⟨y, v⟩)
    Exact when   never for the discrete cost; unbiased for the relaxed one. As τ → 0 the bias goes to 0 and the
                 variance to infinity.
    Costs        one evaluation of f and its gradient, at a soft sample.

    logits, gumbel (..., K)   ->   y (..., K) in the open simplex
    """
    y = softmax_array((logits + gumbel) / tau)

    def backward(g):
        return lambda: softmax_vjp(y, g) / tau, None

    return y, backward


def _relaxation(logits, gumbel, *, tau=1.0):
    return (0,), lambda logits: softmax_array((logits + gumbel) / tau)


@op(surrogate=_relaxation)
def st_gumbel_softmax(logits, gumbel, *, tau=1.0):
    """Straight-through Gumbel-Softmax (Jang, Gu & Poole 2017, section 2.2).   G iid standard Gumbel.

    Estimates    ∇θ E f(D),  D = onehot(argmax(θ + G)) ~ Cat(softmax(θ))
    Derivation   the cost sees the hard D; on the way back D is taken for y = softmax((θ + G)/τ) with the same G:
                 dθ = (1/τ) J(y) g,      g = ∇f(D)
    Exact when   never, not even for a linear f.
    Costs        one evaluation of f and its gradient.
    Differs      from y_hard − y + y in code: D itself is returned, one-hot to the last bit, and never two-hot.

    logits, gumbel (..., K)   ->   D (..., K) one-hot
    """
    z = logits + gumbel

    def backward(g):
        return lambda: softmax_vjp(softmax_array(z / tau), g) / tau, None

    return argmax_one_hot(z), backward


class GumbelSoftmax(TemperedSampler):
    title = "Gumbel-Softmax"
    paper = "Jang, Gu & Poole 2017; Maddison, Mnih & Teh 2017"
    exact_for = "none"
    support = "soft"

    def draw(self, logits, rng):
        return gumbel_softmax(logits, rng.gumbel(logits.shape, like=logits.data), tau=self.tau)


class STGumbelSoftmax(TemperedSampler):
    title = "ST Gumbel-Softmax"
    paper = "Jang, Gu & Poole 2017"
    exact_for = "none"

    def draw(self, logits, rng):
        return st_gumbel_softmax(logits, rng.gumbel(logits.shape, like=logits.data), tau=self.tau)
