"""Hard functions with a proxy derivative: straight-through gradients without any sampling.

A step, a sign or a quantiser is piecewise constant, so that its derivative is 0 almost everywhere. Forward it is
computed as it is; backward its rule has the derivative μ′ of another function, the **proxy** μ, chosen by name. What
comes out is called a coarse gradient: it is the gradient of no function, but often a direction of descent. `audit`
holds each rule against its μ, which is the surrogate that the op declares.

Everywhere: u = x/width for a step and a sign, whose jump is at 0 (subtract a threshold from x first).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from .backend import Array, array_module, check_integers
from .ops import check_number, stable_sigmoid
from .tensor import op


class Proxy(NamedTuple):
    """μ and μ′ on arrays; where μ has a kink, the intervals of μ′ say which slope is taken."""

    function: Callable[[Array, Any], Array]  # of u and its array module
    derivative: Callable[[Array, Any], Array]


# μ for 1[u > 0]
STEP: dict[str, Proxy] = {
    # Hinton 2012; Bengio, Léonard & Courville 2013
    "identity": Proxy(lambda u, xp: u, lambda u, xp: xp.ones_like(u)),
    # [u > 0]: Yin et al. 2019
    "relu": Proxy(lambda u, xp: xp.maximum(u, 0.0), lambda u, xp: _as(u > 0, u)),
    # [0 < u ≤ 1]: Cai et al. 2017; Yin et al. 2019
    "clipped_relu": Proxy(lambda u, xp: xp.clip(u, 0.0, 1.0), lambda u, xp: _as((u > 0) & (u <= 1), u)),
    # ½ [|u| < 1]: S. Yin et al. 2017, whose threshold is 1
    "rectangle": Proxy(lambda u, xp: 0.5 * xp.clip(u, -1.0, 1.0), lambda u, xp: 0.5 * _as(abs(u) < 1, u)),
    # max(0, 1 − |u|): Esser et al. 2016; Bellec et al. 2018
    "triangle": Proxy(lambda u, xp: _triangle(xp.clip(u, -1.0, 1.0)), lambda u, xp: xp.maximum(1.0 - abs(u), 0.0)),
    # σ(u)(1 − σ(u))
    "sigmoid": Proxy(lambda u, xp: stable_sigmoid(u), lambda u, xp: stable_sigmoid(u) * stable_sigmoid(-u)),
    # 1/(1 + (πu)²): Fang et al. 2021, with their α = 2
    "arctan": Proxy(lambda u, xp: xp.arctan(math.pi * u) / math.pi, lambda u, xp: 1.0 / (1.0 + (math.pi * u) ** 2)),
    # 1/(1 + |u|)²: SuperSpike, Zenke & Ganguli 2018
    "fast_sigmoid": Proxy(lambda u, xp: u / (1.0 + abs(u)), lambda u, xp: (1.0 + abs(u)) ** -2),
    # e^−|u|: SLAYER, Shrestha & Orchard 2018
    "exponential": Proxy(lambda u, xp: -xp.sign(u) * xp.expm1(-abs(u)), lambda u, xp: xp.exp(-abs(u))),
}

# μ for sign u, which goes from −1 to 1
SIGN: dict[str, Proxy] = {
    "identity": STEP["identity"],
    # [|u| ≤ 1]: Courbariaux et al. 2016
    "clipped": Proxy(lambda u, xp: xp.clip(u, -1.0, 1.0), lambda u, xp: _as(abs(u) <= 1, u)),
    # max(0, 2 − 2|u|): Liu et al. 2018
    "triangle": Proxy(
        lambda u, xp: 2.0 * STEP["triangle"].function(u, xp), lambda u, xp: 2.0 * STEP["triangle"].derivative(u, xp)
    ),
    # 1 − tanh² u
    "tanh": Proxy(lambda u, xp: xp.tanh(u), lambda u, xp: 1.0 - xp.tanh(u) ** 2),
    "fast_sigmoid": STEP["fast_sigmoid"],
}

# μ for the staircase of `quantised_relu`; here u = x/top, and the slopes are those of top·μ(x/top)
QUANTISED: dict[str, Proxy] = {
    "identity": STEP["identity"],
    "relu": STEP["relu"],
    "clipped_relu": STEP["clipped_relu"],
    # the slope is 1 in the middle; this scale is ours
    "sigmoid": Proxy(
        lambda u, xp: stable_sigmoid(4.0 * u - 2.0),
        lambda u, xp: 4.0 * stable_sigmoid(4.0 * u - 2.0) * stable_sigmoid(2.0 - 4.0 * u),
    ),
}


def _as(mask: Array, like: Array) -> Array:
    return mask.astype(like.dtype)


def _triangle(u: Array) -> Array:
    return u - 0.5 * u * abs(u)


def step_array(x: Array) -> Array:
    """1[x > 0] on arrays, NaN for NaN. (NumPy's heaviside takes five times as long.)"""
    return array_module(x).where(x == x, x > 0, x)


def _surrogate(known: dict[str, Proxy]) -> Callable:
    return lambda x, *, proxy, width=1.0: ((0,), lambda x: known[proxy].function(x / width, array_module(x)))


def _quantised_surrogate(x, *, bits, step, proxy):
    top = step * (2**bits - 1)
    return (0,), lambda x: top * QUANTISED[proxy].function(x / top, array_module(x))


@op(surrogate=_surrogate(STEP))
def hard_step(x, *, proxy: str, width: float = 1.0):
    """y = 1[x > 0], so 0 at 0.       dx = g μ′(x/width)/width

    proxy: a name in `STEP`.  width > 0.  ValueError for others.
    """
    xp, mu = array_module(x), _proxy(STEP, proxy, width)
    return step_array(x), lambda g: g * (mu.derivative(x / width, xp) / width)


@op(surrogate=_surrogate(SIGN))
def sign(x, *, proxy: str, width: float = 1.0):
    """y = 1 where x ≥ 0, else −1.    dx = g μ′(x/width)/width

    proxy: a name in `SIGN`.  width > 0.  ValueError for others.
    """
    xp, mu = array_module(x), _proxy(SIGN, proxy, width)
    return 2.0 * xp.heaviside(x, 1.0) - 1.0, lambda g: g * (mu.derivative(x / width, xp) / width)


@op(surrogate=_quantised_surrogate)
def quantised_relu(x, *, bits: int, step: float, proxy: str):
    """y = step·min(max(⌈x/step⌉, 0), 2ᵇ − 1): a ReLU with 2ᵇ levels (Cai et al. 2017; Yin et al. 2019).

    A level holds from behind the one before it up to itself: y = k·step for (k − 1)·step < x ≤ k·step, and the highest,
    top = (2ᵇ − 1)·step, from there on.     dx = g μ′(x/top)

    proxy: a name in `QUANTISED`: identity 1, relu [x > 0], clipped_relu [0 < x ≤ top], sigmoid.
    bits from 1 to 16, step > 0.  ValueError for others.
    """
    check_integers(bits)
    if not 1 <= bits <= 16:
        raise ValueError(f"bits must be from 1 to 16, got {bits}.")
    xp, mu = array_module(x), _proxy(QUANTISED, proxy, step)
    k = xp.ceil(x / step)
    k += x > k * step  # the quotient was rounded, perhaps across a whole number
    k -= x <= (k - 1.0) * step
    top = x.dtype.type(2**bits - 1) * step  # the highest level as x's dtype has it: on it, x/top is 1
    return xp.clip(k, 0.0, 2**bits - 1) * step, lambda g: g * mu.derivative(x / top, xp)


def _proxy(known: dict[str, Proxy], name: str, width: float) -> Proxy:
    if not (0.0 < check_number("a width or step", width) < math.inf):
        raise ValueError(f"a width or step must be positive and finite, got {width}.")
    if name not in known:
        raise ValueError(f"unknown proxy {name!r}; the known ones are {', '.join(known)}.")
    return known[name]
