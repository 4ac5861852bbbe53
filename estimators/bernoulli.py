"""Bits: b ~ Bernoulli(p), p = σ(a), and what the estimators need to know about them.

The same functions as in `categorical`, for logits a of any shape (B, ...), an independent bit in each place. A bit is
a variable of two classes with logits (0, a): every rule that both kinds share agrees with that, which a test holds.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np

from minigrad.backend import Array, array_module
from minigrad.fused import TINY
from minigrad.ops import stable_sigmoid
from minigrad.random import Shape

from .enumeration import Noise

name = "bernoulli"

probability = stable_sigmoid  # a -> p


def vjp(p: Array, g: Array) -> Array:
    """J(p) g = p (1 − p) g; the score of b is b − p."""
    return p * (1.0 - p) * g


def inner(a: Array, b: Array) -> Array:
    """The inner product within one variable, which for a bit is a product."""
    return a * b


def sizes(shape: Shape) -> tuple[int, int]:
    """(L, 2): how many bits an example has, for logits of this shape."""
    return int(np.prod(shape[1:])), 2


def sample(rng: Noise, logits: Array) -> Array:
    """b ~ Bernoulli(σ(a)), shaped like the logits."""
    return rng.bernoulli(logits)


def defined(logits: Array) -> Array:
    """Which bits have a distribution, booleans: a logit may be infinite, but not NaN."""
    return ~array_module(logits).isnan(logits)


def square(a: Array) -> Array:
    """‖a‖² of each variable."""
    return a * a


def log_odds(q: Array) -> Array:
    """Logits whose probabilities are q: log q − log(1 − q)."""
    xp = array_module(q)
    return xp.log(xp.maximum(q, TINY)) - xp.log(xp.maximum(1.0 - q, TINY))


# ---- enumeration


def outcomes(shape: Shape) -> np.ndarray:
    """Every joint outcome of one example, (2ᴸ, ...) float64, the last bit running fastest."""
    L, _ = sizes(shape)
    return np.array(list(itertools.product((0.0, 1.0), repeat=L))).reshape(-1, *shape[1:])


def outcome_probability(p: Array, outcomes: Array) -> Array:
    """q(z) = Πₗ pₗ for zₗ = 1 and 1 − pₗ for zₗ = 0.   p (B, ...), outcomes (N, ...) -> (B, N)"""
    p, outcomes = p.reshape(len(p), -1), outcomes.reshape(len(outcomes), -1)
    q = array_module(p).ones((len(p), len(outcomes)), dtype=p.dtype)
    for l in range(p.shape[1]):
        q = q * (p[:, l, None] * outcomes[:, l] + (1.0 - p[:, l, None]) * (1.0 - outcomes[:, l]))
    return q


def local_outcomes(d: Array) -> Iterator[tuple[int, Array, Array]]:
    """For each bit l: (l, the value that it does not have, D with it).   D (B, ...)

    ->   the value as booleans (B, 2), [0, 1] in this order;  a new D (B, ...)
    """
    xp, (L, _) = array_module(d), sizes(d.shape)
    for l in range(L):
        moved = d.copy()
        flat = moved.reshape(len(d), -1)
        flat[:, l] = 1.0 - flat[:, l]
        yield l, xp.stack([flat[:, l] == 0, flat[:, l] > 0], axis=-1), moved


def local_vjp(p: Array, costs: Array) -> Array:
    """The gradient of pₗ Fₗ₁ + (1 − pₗ) Fₗ₀ for each bit: p(1 − p)(F₁ − F₀).   p (B, ...), F (B, L, 2) -> (B, ...)"""
    return vjp(p, (costs[..., 1] - costs[..., 0]).reshape(p.shape))


# ---- the noise behind a sample: b = harden(a + noise)


def noise(rng: Noise, logits: Array) -> Array:
    """Standard logistic noise."""
    return rng.logistic(logits.shape, like=logits)


def noise_score(noise: Array) -> Array:
    """∂/∂a of the log density of z = a + ℓ at fixed z: with density e^(−ℓ)/(1 + e^(−ℓ))², that is 2σ(ℓ) − 1."""
    return 2.0 * stable_sigmoid(noise) - 1.0


def harden(z: Array) -> Array:
    """[z > 0]"""
    return (z > 0).astype(z.dtype)


def conditional_logistic(logits: Array, bit: Array, uniform: Array) -> Array:
    """z̃ = a + ℓ given that [a + ℓ > 0] = b   (Tucker et al. 2017, appendix C, with v uniform).

    forward:  z̃ = a + log v'/(1 − v'),    v' = 1 − p + v p  if b,    v (1 − p)  if not
    With t = (1 − v) p  if b,  v (1 − p)  if not,  v' is 1 − t if b and t if not, so the noise is ±(log(1 − t) − log t).
    """
    xp = array_module(logits)
    w = xp.where(bit > 0, 1.0 - uniform, uniform)
    t = xp.maximum(stable_sigmoid(xp.where(bit > 0, logits, -logits)) * w, TINY)
    magnitude = xp.log1p(-t) - xp.log(t)
    return logits + xp.where(bit > 0, magnitude, -magnitude)


def conditional(rng: Noise, logits: Array, bit: Array) -> Array:
    """z̃ = a + ℓ given harden(a + ℓ) = b, with noise of its own."""
    return conditional_logistic(logits, bit, rng.uniform(logits.shape, like=logits))


def conditional_vjp(p: Array, bit: Array, z: Array, u: Array) -> Array:
    """(∂z̃/∂a) u for z̃(a; b, v) at fixed v, from z̃ alone.

    Derivation   z̃ = a + log v'/(1 − v'), so ∂z̃/∂a = 1 + (∂v'/∂a)/(v'(1 − v')), and ∂p/∂a = p(1 − p).
                 b = 1:  1 − v' = p(1 − v),  ∂v'/∂a = −(1 − v')(1 − p),  ∂z̃/∂a = 1 − (1 − p)/v'     = 1 − s
                 b = 0:      v' = v(1 − p),  ∂v'/∂a = −v' p,             ∂z̃/∂a = 1 − p/(1 − v')     = 1 − s
                 and with v' = σ(z̃ − a) = (1 − p)e^z̃ / (p + (1 − p)e^z̃):
                 s = (1 − p) + p e^(−z̃)  if b,    p + (1 − p) e^z̃  if not.
    """
    xp = array_module(z)
    return xp.where(bit > 0, p, 1.0 - p) * -xp.expm1(-abs(z)) * u  # 1 − s without cancellation


conditional_jvp = conditional_vjp  # a bit's Jacobian is diagonal
