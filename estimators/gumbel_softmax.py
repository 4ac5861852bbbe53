"""Gumbel-Softmax and its straight-through form: a relaxed sample that is a differentiable function of fixed noise.

argmax(θ + G) is a draw from Cat(softmax(θ)) when G is standard Gumbel noise; replacing argmax by a softmax at
temperature τ makes the draw differentiable (Jang, Gu & Poole 2017; Maddison, Mnih & Teh 2017).
"""

from __future__ import annotations

from minigrad import Tensor, op

from . import categorical
from .base import DecoupledSampler, TemperedSampler, check_draws
from .enumeration import Noise


@op
def gumbel_softmax(logits, noise, *, tau=1.0, family=categorical):
    """Gumbel-Softmax (Jang, Gu & Poole 2017; Maddison, Mnih & Teh 2017).   G iid standard Gumbel, drawn by the caller.

    Estimates    ∇θ E f(y),  y = softmax((θ + G)/τ): the cost is evaluated on a point inside the simplex
    Derivation   the reparametrisation ∇θ f(y(θ, G)) with ∂y/∂θ = (1/τ) J(y):
                 dθ = (1/τ) J(y) ∇f(y),      J(y) v = y ⊙ (v − ⟨y, v⟩)
                 For a bit, the binary Concrete y = σ((a + ℓ)/τ) with logistic ℓ, the difference of two Gumbels.
    Exact when   never for the discrete cost; unbiased for the relaxed one. As τ → 0 the bias goes to 0 and the
                 variance to infinity.
    Costs        one evaluation of f and its gradient, at a soft sample.

    logits, noise (..., K)   ->   y (..., K) in the simplex;    for bits (...), in [0, 1]
    """
    check_draws(logits, noise, family=family)
    y = family.probability((logits + noise) / tau)

    def backward(g):
        return lambda: family.vjp(y, g) / tau, None

    return y, backward


def _relaxation(logits, noise, *, tau=1.0, family=categorical):
    return (0,), lambda logits: family.probability((logits + noise) / tau)


@op(surrogate=_relaxation)
def st_gumbel_softmax(logits, noise, *, tau=1.0, family=categorical):
    """Straight-through Gumbel-Softmax (Jang, Gu & Poole 2017, section 2.2).   G iid standard Gumbel.

    Estimates    ∇θ E f(D),  D = onehot(argmax(θ + G)) ~ Cat(softmax(θ))
    Derivation   the cost sees the hard D; on the way back D is taken for y = softmax((θ + G)/τ) with the same G:
                 dθ = (1/τ) J(y) g,      g = ∇f(D)
    Exact when   never, not even for a linear f.
    Costs        one evaluation of f and its gradient.
    Differs      from y_hard − y + y in code: D itself is returned, one-hot to the last bit, and never two-hot.

    logits, noise (..., K)   ->   D (..., K) one-hot;    for bits (...)
    """
    check_draws(logits, noise, family=family)
    z = logits + noise

    def backward(g):
        return lambda: family.vjp(family.probability(z / tau), g) / tau, None

    return family.harden(z), backward


def _decoupled_relaxation(logits, noise, *, tau_f=1.0, tau_b=1.0, family=categorical):
    return (0,), lambda logits: family.probability(logits / tau_b + noise)


@op(surrogate=_decoupled_relaxation)
def decoupled_st_gumbel_softmax(logits, noise, *, tau_f=1.0, tau_b=1.0, family=categorical):
    """Decoupled ST Gumbel-Softmax (Shah, Yan, Mozer & Liu 2024).   G iid standard Gumbel.

    Estimates    ∇θ E f(D),  D = onehot(argmax(θ/τ_f + G)) ~ Cat(softmax(θ/τ_f)): **the forward distribution changes**
    Derivation   as ST Gumbel-Softmax, but with a temperature of its own for each direction, and the noise added after
                 the division (inside, the sample would not depend on τ_f):
                 dθ = (1/τ_b) J(y) g,      y = softmax(θ/τ_b + G),   g = ∇f(D)
    Exact when   never.
    Costs        one evaluation of f and its gradient.

    logits, noise (..., K)   ->   D (..., K) one-hot;    for bits (...)
    """
    check_draws(logits, noise, family=family)

    def backward(g):
        return lambda: family.vjp(family.probability(logits / tau_b + noise), g) / tau_b, None

    return family.harden(logits / tau_f + noise), backward


class GumbelSoftmax(TemperedSampler):
    title = "Gumbel-Softmax"
    paper = "Jang, Gu & Poole 2017; Maddison, Mnih & Teh 2017"
    objective = "E f(y)"
    exact_for = "all"
    support = "soft"
    randomness = "noise"
    sample_first = False

    def draw(self, logits: Tensor, rng: Noise) -> Tensor:
        return gumbel_softmax(logits, self.family.noise(rng, logits.data), tau=self.tau, family=self.family)


class STGumbelSoftmax(TemperedSampler):
    title = "ST Gumbel-Softmax"
    paper = "Jang, Gu & Poole 2017"
    exact_for = "none"
    randomness = "noise"
    sample_first = False

    def draw(self, logits: Tensor, rng: Noise) -> Tensor:
        return st_gumbel_softmax(logits, self.family.noise(rng, logits.data), tau=self.tau, family=self.family)


class DecoupledSTGumbelSoftmax(DecoupledSampler):
    """The defaults are the paper's best for a VAE of 4 variables of 8 classes."""

    title = "Decoupled ST Gumbel-Softmax"
    paper = "Shah, Yan, Mozer & Liu 2024"
    randomness = "noise"
    sample_first = False

    def __init__(self, tau_f: float = 1.6, tau_b: float = 1.3) -> None:
        super().__init__(tau_f, tau_b)

    def draw(self, logits: Tensor, rng: Noise) -> Tensor:
        noise = self.family.noise(rng, logits.data)
        return decoupled_st_gumbel_softmax(logits, noise, tau_f=self.tau_f, tau_b=self.tau_b, family=self.family)
