"""One-hot variables: D ~ Cat(p), p = softmax(θ), and what the estimators need to know about them.

`bernoulli` has the same functions for bits, so a rule that is written with them holds for both kinds. All of them work
on arrays; logits θ are (B, ..., K) with the classes in the last axis, and the axes between hold independent variables.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np

from minigrad.backend import Array, array_module
from minigrad.fused import MASKED, TINY, inner, softmax_array, softmax_vjp
from minigrad.random import Shape, argmax_one_hot

from .enumeration import Noise

__all__ = [
    "conditional",
    "conditional_gumbel",
    "conditional_jvp",
    "conditional_vjp",
    "defined",
    "harden",
    "inner",
    "local_outcomes",
    "local_vjp",
    "log_odds",
    "noise",
    "noise_score",
    "outcome_probability",
    "outcomes",
    "probability",
    "sample",
    "sizes",
    "square",
    "vjp",
]

name = "categorical"

probability = softmax_array  # θ -> p
vjp = softmax_vjp  # p, g -> J(p) g, the Jacobian of softmax (it is symmetric); the score of D is D − p


def sizes(shape: Shape) -> tuple[int, int]:
    """(L, K): how many variables an example has, and how many classes each, for logits of this shape."""
    return int(np.prod(shape[1:-1])), shape[-1]


def sample(rng: Noise, logits: Array) -> Array:
    """D ~ Cat(p), shaped like the logits."""
    return rng.one_hot(logits)


def defined(logits: Array) -> Array:
    """Which variables have a distribution, booleans: not all classes are masked, no logit is +∞.   (..., K) -> (...)"""
    largest = logits.max(axis=-1)
    return (largest > 0.5 * MASKED) & (largest < np.inf)  # not so for NaN


def square(a: Array) -> Array:
    """‖a‖² of each variable, its axis kept with length 1: (B, ..., K) -> (B, ..., 1)."""
    return inner(a, a)


def log_odds(q: Array) -> Array:
    """Logits whose probabilities are q: log q, and as good as −∞ where q is 0."""
    xp = array_module(q)
    return xp.where(q > 0, xp.log(xp.maximum(q, TINY)), MASKED)


# ---- enumeration


def outcomes(shape: Shape) -> np.ndarray:
    """Every joint outcome of one example, (Kᴸ, ..., K) float64, the last variable running fastest."""
    L, K = sizes(shape)
    index = np.array(list(itertools.product(range(K), repeat=L))).reshape(-1, L)
    return np.eye(K)[index].reshape(-1, *shape[1:])


def outcome_probability(p: Array, outcomes: Array) -> Array:
    """q(z) = Πₗ ⟨pₗ, zₗ⟩.   p (B, ..., K), outcomes (N, ..., K) -> (B, N)"""
    L, K = sizes(p.shape)
    p, outcomes = p.reshape(-1, L, K), outcomes.reshape(-1, L, K)
    q = array_module(p).ones((len(p), len(outcomes)), dtype=p.dtype)
    for l in range(L):
        q = q * (p[:, l] @ outcomes[:, l].T)
    return q


def local_outcomes(d: Array) -> Iterator[tuple[int, Array, Array]]:
    """For each variable l, K − 1 times another of the classes that it does not have: (l, which one, D with it).

    D (B, ..., K)   ->   the class as booleans (B, K), a new D (B, ..., K)
    """
    xp, (L, K) = array_module(d), sizes(d.shape)
    for l, shift in itertools.product(range(L), range(1, K)):
        moved = d.copy()
        flat = moved.reshape(-1, L, K)
        flat[:, l] = xp.roll(flat[:, l], shift, axis=-1)
        yield l, flat[:, l] > 0, moved


def local_vjp(p: Array, costs: Array) -> Array:
    """The gradient of Σₖ pₗₖ Fₗₖ for each variable l: J(pₗ) Fₗ.   p (B, ..., K), F (B, L, K) -> (B, ..., K)"""
    return vjp(p, costs.reshape(p.shape))


# ---- the noise behind a sample: D = harden(θ + noise)


def noise(rng: Noise, logits: Array) -> Array:
    """Standard Gumbel noise."""
    return rng.gumbel(logits.shape, like=logits)


def noise_score(noise: Array) -> Array:
    """∂/∂θ of the log density of z = θ + G at fixed z: with density e^(−G − e^−G), that is 1 − e^(−G)."""
    return 1.0 - array_module(noise).exp(-noise)


def harden(z: Array) -> Array:
    """onehot(argmax z)"""
    return argmax_one_hot(z)


def conditional_gumbel(logits: Array, onehot: Array, exponential: Array) -> Array:
    """Q = θ + G given that argmax(θ + G) = D   (Paulus, Maddison & Krause 2021, eq. 9).

    logits θ, onehot D (..., K);  exponential E (S, ..., K), iid Exp(1)   ->   Q (S, ..., K)

    The maximum of θ + G is Gumbel at log Σ eᶿ whoever attains it, and the others are Gumbels cut off at it. With i
    the drawn class and Z = Σ eᶿ:
        Qᵢ = −log(Eᵢ/Z)                    Qⱼ = −log(Eⱼ e^(−θⱼ) + Eᵢ/Z)
    Both are computed from logarithms, log(eᵃ + eᵇ) = max(a, b) + log(1 + e^(−|a−b|)), so that no logit overflows.
    """
    xp = array_module(logits)
    m = logits.max(axis=-1, keepdims=True)
    log_z = m + xp.log(xp.exp(logits - m).sum(axis=-1, keepdims=True))
    log_e = xp.log(exponential)
    b = (log_e * onehot).sum(axis=-1, keepdims=True) - log_z  # log(Eᵢ/Z)
    a = log_e - logits
    others = xp.maximum(a, b) + xp.log1p(xp.exp(-abs(a - b)))
    return -xp.where(onehot > 0, b, others)


def conditional(rng: Noise, logits: Array, onehot: Array) -> Array:
    """z̃ = θ + G given harden(θ + G) = D, with noise of its own."""
    return conditional_gumbel(logits, onehot, rng.exponential(logits.shape, like=logits))


def _shares(z):
    """sⱼ = e^(zⱼ − max z), which is B/(Aⱼ + B) with Aⱼ = Eⱼ e^(−θⱼ), B = Eᵢ/Z, and 1 for the drawn class."""
    return array_module(z).exp(z - z.max(axis=-1, keepdims=True))


def conditional_vjp(p: Array, onehot: Array, z: Array, u: Array) -> Array:
    """(∂z̃/∂θ)ᵀ u for z̃ = Q(θ; D, E) at fixed E, from z̃ alone.

    Derivation   Qⱼ = −log(Aⱼ + B): B shrinks with Z, ∂ log B/∂θₖ = −pₖ, and Aⱼ with θⱼ. So
                 ∂Qⱼ/∂θₖ = sⱼ pₖ + (1 − sⱼ) δⱼₖ,    sⱼ = B/(Aⱼ + B) = e^(Qⱼ − Qᵢ),    sᵢ = 1
                 dθ = p ⟨s, u⟩ + (1 − s) ⊙ u
    """
    s = _shares(z)
    return p * inner(s, u) + (1.0 - s) * u


def conditional_jvp(p: Array, onehot: Array, z: Array, v: Array) -> Array:
    """(∂z̃/∂θ) v = s ⟨p, v⟩ + (1 − s) ⊙ v, the transpose of `conditional_vjp`."""
    s = _shares(z)
    return s * inner(p, v) + (1.0 - s) * v
