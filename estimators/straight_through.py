"""Straight-through: draw a hard sample, and pretend on the way back that it was the probabilities.

(Hinton 2012, lecture 15b; Bengio, Léonard & Courville 2013.)
"""

from __future__ import annotations

from minigrad import Tensor, op
from minigrad.backend import array_module

from . import bernoulli, categorical
from .base import LARGEST, DecoupledSampler, Sampler, SettingError, TemperedSampler, check_draws, check_number
from .enumeration import Noise


def _softened(logits, d, *, tau=1.0, family=categorical):
    return (0,), lambda logits: family.probability(logits / tau)


@op(surrogate=_softened)
def straight_through(logits, d, *, tau=1.0, family=categorical):
    """Straight-through with the derivative of softmax.   D ~ Cat(p), p = softmax(θ), drawn by the caller.

    Estimates    ∇θ E f(D) = Σᵢ f(eᵢ) ∇θ pᵢ
    Derivation   replace f(eᵢ) by its first-order expansion at the sample, f(D) + ⟨∇f(D), eᵢ − D⟩; the constants drop
                 out because Σᵢ ∇pᵢ = 0, and Σᵢ gᵢ ∇θ pᵢ = J(p) g remains. A temperature smooths the Jacobian:
                 dθ = (1/τ) J(p_τ) g,      g = ∇f(D),   p_τ = softmax(θ/τ),   J(q) v = q ⊙ (v − ⟨q, v⟩)
                 For a bit: p_τ = σ(a/τ), J(q) v = q(1 − q) v.
    Exact when   f is linear in each variable, the others fixed (τ = 1): a product over the variables, say.
    Costs        one evaluation of f and its gradient.
    Differs      from the identity straight-through of Bengio et al. in keeping the softmax derivative; D is drawn
                 from p whatever τ is, as in the code of Fan et al. 2022.

    logits, d (..., K)   ->   d, with gradients towards the logits;    for bits (...)
    """
    check_draws(logits, d, family=family)

    def backward(g):
        return lambda: family.vjp(family.probability(logits / tau), g) / tau, None

    return d, backward


@op(surrogate=lambda logits, d: ((0,), lambda logits: logits))
def identity_straight_through(logits, d):
    """Identity straight-through (Hinton 2012; Bengio, Léonard & Courville 2013, section 4).   b ~ Bernoulli(σ(a)).

    Estimates    ∇ₐ E f(b), up to a positive factor
    Derivation   take the bit for its logit on the way back, ∂b/∂a = 1:
                 da = f'(b)
    Exact when   never: for a linear f the expectation is the gradient divided by p(1 − p). The sign is right for one
                 layer of units with a linear cost. Bengio et al. found it better than the form with p(1 − p).
    Costs        one evaluation of f and its gradient.

    logits, d (...)   ->   d, with gradients towards the logits
    """
    check_draws(logits, d, family=bernoulli)
    return d, lambda g: (g, None)


@op(surrogate=lambda logits, d, *, slope: ((0,), lambda a: array_module(a).clip(0.5 * (slope * a + 1.0), 0.0, 1.0)))
def hard_sigmoid_straight_through(logits, d, *, slope):
    """Straight-through with the hard sigmoid (Chung, Ahn & Bengio 2017, section 3).   b ~ Bernoulli(σ(s a)).

        hard sigmoid   max(0, min(1, (s a + 1)/2)), in place of σ(s a) on the way back
        da = ½ s [|s a| < 1] f'(b)

    Exact when   never, with b ~ Bernoulli(σ(s a)); with b ~ Bernoulli(the hard sigmoid), if f is linear in each bit.
    Differs      from the paper, whose unit is 1 with the hard sigmoid for its probability. Here it is σ(s a) for both
                 surrogates, so that what else depends on q(b) (a KL term, an evaluation) needs to know s alone.

    logits, d (...)   ->   d, with gradients towards the logits
    """
    check_draws(logits, d, family=bernoulli)
    return d, lambda g: ((0.5 * slope) * g * (abs(slope * logits) < 1.0), None)


class StraightThrough(TemperedSampler):
    title = "Straight-through"
    paper = "Bengio, Léonard & Courville 2013"
    exact_for = "linear"

    def draw(self, logits: Tensor, rng: Noise) -> Tensor:
        return straight_through(logits, self.family.sample(rng, logits.data), tau=self.tau, family=self.family)


class IdentityStraightThrough(Sampler):
    title = "Straight-through, identity"
    warning = "its gradient is too large by the factor 1/(p(1 − p)), at least 4, and outweighs the KL term beside it"
    paper = "Hinton 2012; Bengio, Léonard & Courville 2013"
    exact_for = "none"
    families = (bernoulli,)

    def draw(self, logits: Tensor, rng: Noise) -> Tensor:
        return identity_straight_through(logits, self.family.sample(rng, logits.data))


class DecoupledStraightThrough(DecoupledSampler):
    """D ~ Cat(softmax(θ/τ_f)) and dθ = (1/τ_b) J(softmax(θ/τ_b)) g: **the forward distribution changes**.

    It is from the second version of the paper (2026, retitled); the first (2024) has decoupled ST Gumbel-Softmax alone.
    """

    title = "Decoupled straight-through"
    paper = "Shah, Yan, Mozer & Liu 2026"

    def __init__(self, tau_f: float = 1.0, tau_b: float = 1.3) -> None:
        super().__init__(tau_f, tau_b)

    def draw(self, logits: Tensor, rng: Noise) -> Tensor:
        d = self.family.sample(rng, logits.data / self.tau_f)
        return straight_through(logits, d, tau=self.tau_b, family=self.family)


class SlopeAnnealedStraightThrough(Sampler):
    """Straight-through with a slope s that grows while one trains, so that σ(s a) comes closer to a step.

    b ~ Bernoulli(σ(s a)): **the forward distribution changes** with s, see `logit_scale`.
        surrogate="sigmoid":  da = s p(1 − p) f'(b),  p = σ(s a)        surrogate="hard": with the hard sigmoid

    s = min(most, 1 + rate · updates). Chung et al. add 0.04 an epoch up to 5; the default rate is that for epochs of
    400 updates.  rate from 0, most from 1, both to 1e6 (ValueError).
    """

    title = "Straight-through, slope-annealed"
    paper = "Chung, Ahn & Bengio 2017"
    objective = "E f(b), b ~ σ(s·a)"
    exact_for = "linear"
    families = (bernoulli,)
    state = ("updates",)

    def __init__(self, rate: float = 1e-4, most: float = 5.0, surrogate: str = "sigmoid") -> None:
        if surrogate not in ("sigmoid", "hard"):
            raise SettingError(f"surrogate must be sigmoid or hard, got {surrogate!r}.")
        self.rate, self.most = check_number("rate", rate, 0.0, LARGEST), check_number("most", most, 1.0, LARGEST)
        self.surrogate, self.updates = surrogate, 0
        if surrogate == "hard":
            self.exact_for = "none"

    @property
    def logit_scale(self) -> float:  # type: ignore[override]  # it follows from the updates: nobody sets it
        return min(self.most, 1.0 + self.rate * int(self.updates))

    def draw(self, logits: Tensor, rng: Noise) -> Tensor:
        s = self.logit_scale
        d = self.family.sample(rng, logits.data * s)
        if self.surrogate == "hard":
            return hard_sigmoid_straight_through(logits, d, slope=s)
        return straight_through(logits, d, tau=1.0 / s, family=self.family)

    def update(self) -> None:
        self.updates += 1
