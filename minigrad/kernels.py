"""Sums that NumPy's `einsum` and a device's own kernel do fastest: an op calls one name for both.

NumPy's bodies are the oracles of the kernels.
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

import numpy as np

from .backend import Array, array_module

__all__ = ["inner", "total"]

# name: what CuPy's ReductionKernel is made of, the parameters and what is summed (a and b are its partial sums)
SUMS = {"inner": ("T u, T v", "u * v"), "total": ("T u", "u")}


@functools.cache
def reduction(xp: ModuleType, name: str) -> Any:
    """The kernel of that name; it is compiled at its first call."""
    parameters, summand = SUMS[name]
    return xp.ReductionKernel(parameters, "T y", summand, "a + b", "y = a", "0", name)


def inner(a: Array, b: Array) -> Array:
    """⟨a, b⟩ over the last axis:  (..., K), (..., K) -> (...). The axes before it broadcast; of one dtype."""
    xp = array_module(a)
    if xp is np:
        return np.einsum("...k,...k->...", a, b)
    return reduction(xp, "inner")(a, b, axis=-1)


def total(a: Array) -> Array:
    """Σ a over the last axis:  (..., K) -> (...)."""
    xp = array_module(a)
    if xp is np:
        return np.einsum("...k->...", a)
    return reduction(xp, "total")(a, axis=-1)
