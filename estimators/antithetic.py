"""Antithetic estimators for bits: two samples from one uniform number u and its mirror image 1 − u, or more.

A bit is 1 when its u is small, so u and 1 − u give opposite bits as often as they can: b = [u > 1 − p], b̃ = [u < p].
The difference of the two costs then carries most of the signal, and what the noise still knows beyond the two bits can
be averaged out: AR, ARM, DisARM are the three stages of that. ARMS does it with S dependent samples.
"""

from __future__ import annotations

from minigrad import Tensor
from minigrad.backend import Array, array_module
from minigrad.fused import TINY
from minigrad.ops import stable_sigmoid, stack

from . import bernoulli
from .base import NO_BASELINE, Cost, Estimator, attach_gradient, check_count, scale_per_example
from .enumeration import Noise


def ar_gradient(u: Array, costs: Array) -> Array:
    """AR, augment and REINFORCE (Yin & Zhou 2019, eq. 5).   u uniform, costs = f([u < p]).

    Estimates    ∇ₐ E f(b),   p = σ(a)
    Derivation   b = [ε₁ e^−a < ε₂] with two exponentials; REINFORCE for ε₁ with rate e^a, then u = ε₁/(ε₁ + ε₂):
                 da = f([u < p]) (1 − 2u)
                 Directly: E[f (1 − 2u)] = f(1) ∫₀ᵖ(1 − 2u)du + f(0) ∫ₚ¹(1 − 2u)du = p(1 − p)(f(1) − f(0)).
    Exact when   always.
    Costs        one evaluation of f.

    u (B, ...), costs (B,)   ->   da (B, ...)
    """
    return scale_per_example(costs, 1.0 - 2.0 * u)


def arm_gradient(u: Array, costs: Array, mirror_costs: Array) -> Array:
    """ARM, augment, REINFORCE and merge (Yin & Zhou 2019, eq. 7).   costs = f([u > 1 − p]), mirror_costs = f([u < p]).

    Estimates    ∇ₐ E f(b)
    Derivation   the mean of AR at u and at 1 − u, which are equally likely:
                 ½ [f([u < p])(1 − 2u) + f([1 − u < p])(2u − 1)], and [1 − u < p] = [u > 1 − p]:
                 da = (f([u > 1 − p]) − f([u < p])) (u − ½)
    Exact when   always.
    Costs        two evaluations of f.

    u (B, ...), costs, mirror_costs (B,)   ->   da (B, ...)
    """
    return scale_per_example(costs - mirror_costs, u - 0.5)


def disarm_gradient(logits: Array, b: Array, mirror: Array, costs: Array, mirror_costs: Array) -> Array:
    """DisARM (Dong, Mnih & Tucker 2020, eq. 6), found at the same time as U2G (Yin, Ho, Yan, Qian & Zhou 2020).

    Estimates    ∇ₐ E f(b)   from b = [u > 1 − p] and its mirror image b̃ = [u < p]
    Derivation   ARM depends on u beyond the two bits. Given b = b̃, u is symmetric about ½ and E[u − ½] = 0; given
                 b ≠ b̃, u is uniform on (max(p, 1 − p), 1) or on its mirror image, so E|u − ½| = ½ max(p, 1 − p):
                 da = ½ (f(b) − f(b̃)) (−1)^b̃ [b ≠ b̃] σ(|a|)
    Exact when   always.
    Costs        two evaluations of f.

    logits a, b, mirror (B, ...), costs, mirror_costs (B,)   ->   da (B, ...)
    """
    return scale_per_example(0.5 * (costs - mirror_costs), (b - mirror) * stable_sigmoid(abs(logits)))


def dirichlet_copula(exponential: Array) -> Array:
    """S negatively dependent uniforms for each place: u = (1 − d)^(S−1) with d = E/ΣE uniform on the simplex.

    exponential (S, ...) iid Exp(1)   ->   u (S, ...), each uniform on (0, 1);  for S = 2, u₂ = 1 − u₁
    """
    d = exponential / exponential.sum(axis=0)
    return (1.0 - d) ** (len(d) - 1)


def arms_gradient(p: Array, bs: Array, costs: Array) -> Array:
    """ARMS, antithetic REINFORCE with multiple samples (Dimitriev & Zhou 2021, theorem 1 and eq. 9).

    Estimates    ∇ₐ E f(b)  from S ≥ 2 dependent samples
    Derivation   RLOO's sum (1/(S−1)) Σₛ (fₛ − f̄)(bₛ − p), f̄ the mean of fₛ = f(bₛ), has the right mean if the samples
                 are independent. Two with the correlation ρ = (P(both 1) − p²)/(p(1 − p)) shrink it by 1 − ρ, one and
                 the same factor for every pair:
                 da = (1/(S−1)) Σₛ (fₛ − f̄)(bₛ − p) / (1 − ρ)
                 The Dirichlet copula has P(uᵢ < x, uⱼ < x) = max(2x^(1/(S−1)) − 1, 0)^(S−1). It is used for the rarer
                 value, q = min(p, 1 − p), and 1 − ρ = (q − P(both))/(p(1 − p)) = (1 − P(both)/q)/(1 − q), where
                 P(both)/q = max(2 − q^(−1/(S−1)), 0)^(S−1).
    Exact when   always. For S = 2 it is DisARM.
    Costs        S evaluations of f.
    Differs      from the code of Shi et al. (2022), which adds 10⁻⁶ to q − P(both) and so has a slight bias.

    p (B, ...), bs (S, B, ...) from `antithetic_samples`, costs (S, B)   ->   da (B, ...)
    """
    xp, n = array_module(p), len(bs) - 1
    q = xp.maximum(xp.minimum(p, 1.0 - p), TINY)
    both = xp.maximum(2.0 - q ** (-1.0 / n), 0.0) ** n
    shrinkage = (1.0 - both) / (1.0 - q)
    return scale_per_example((costs - costs.mean(axis=0)) / n, bs - p).sum(axis=0) / shrinkage


def antithetic_samples(p: Array, u: Array) -> Array:
    """Bits from the copula: [u < p] where p < ½, else [1 − u < p], so that the rarer value has the small u's."""
    xp = array_module(p)
    return (xp.where(p < 0.5, u, 1.0 - u) < p).astype(p.dtype)


class _Antithetic(Estimator):
    exact_for = "all"
    cost_gradient = False
    families = (bernoulli,)
    randomness = "uniform"
    sample_first = False

    def thresholds(self, logits: Array) -> Array:
        p = self.family.probability(logits)
        return array_module(p).stack([p, 1.0 - p], axis=-1)


class AR(_Antithetic):
    title = "AR, augment and REINFORCE"
    warning = NO_BASELINE
    paper = "Yin & Zhou 2019"
    evaluations = "1"
    cancels_constants = False

    def estimate(self, logits: Tensor, cost: Cost, rng: Noise) -> Tensor:
        u = rng.uniform(logits.shape, like=logits.data)
        f = cost(Tensor((u < self.family.probability(logits.data)).astype(u.dtype)))
        return attach_gradient(f, logits, ar_gradient(u, f.data))


class ARM(_Antithetic):
    title = "ARM, augment, REINFORCE and merge"
    paper = "Yin & Zhou 2019"
    evaluations = "2"
    sample_count = 2

    def estimate(self, logits: Tensor, cost: Cost, rng: Noise) -> Tensor:
        u = rng.uniform(logits.shape, like=logits.data)
        p, q = self.family.probability(logits.data), self.family.probability(-logits.data)  # 1 − p without cancellation
        b, mirror = (u > q).astype(u.dtype), (u < p).astype(u.dtype)
        f, f_mirror = cost(Tensor(b)), cost(Tensor(mirror))
        return attach_gradient(0.5 * (f + f_mirror), logits, self.gradient(logits.data, u, b, mirror, f, f_mirror))

    def gradient(self, logits: Array, u: Array, b: Array, mirror: Array, f: Tensor, f_mirror: Tensor) -> Array:
        return arm_gradient(u, f.data, f_mirror.data)


class DisARM(ARM):
    title = "DisARM / U2G"
    paper = "Dong, Mnih & Tucker 2020; Yin, Ho, Yan, Qian & Zhou 2020"

    def gradient(self, logits: Array, u: Array, b: Array, mirror: Array, f: Tensor, f_mirror: Tensor) -> Array:
        return disarm_gradient(logits, b, mirror, f.data, f_mirror.data)


class ARMS(_Antithetic):
    """samples: S from 2 to 10,000."""

    title = "ARMS, antithetic REINFORCE with multiple samples"
    paper = "Dimitriev & Zhou 2021"
    evaluations = "S"
    randomness = "noise"

    def __init__(self, samples: int = 4) -> None:
        self.samples = self.sample_count = check_count("samples", samples, 2)

    def estimate(self, logits: Tensor, cost: Cost, rng: Noise) -> Tensor:
        xp, p = array_module(logits.data), self.family.probability(logits.data)
        u = dirichlet_copula(rng.exponential((self.samples, *logits.shape), like=logits.data))
        bs = antithetic_samples(p, u)
        fs = [cost(Tensor(b)) for b in bs]
        g = arms_gradient(p, bs, xp.stack([f.data for f in fs]))
        return attach_gradient(stack(*fs).mean(axis=0), logits, g)
