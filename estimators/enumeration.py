"""Noise that is given instead of drawn: how an expectation over an estimator's samples is taken exactly.

outcomes, q = ...                                   # all outcomes (N, ...) and their probabilities
logits = the same θ in N rows
estimator(logits, cost, Given(samples=[outcomes]))  # row n has the outcome n; weigh the gradients by q
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from minigrad import Rng
from minigrad.backend import Array, asarray_like
from minigrad.random import Shape


class Given:
    """Stands in for a `minigrad.Rng`: every draw takes the next array of its kind, whatever the address.

    samples: one-hots or bits.  uniforms: numbers in (0, 1).  What is not given is drawn by `rng`, if there is one; but
    samples are not: ValueError if more are drawn than were given.
    """

    def __init__(
        self, samples: Iterable[np.ndarray] = (), uniforms: Iterable[np.ndarray] = (), rng: Rng | None = None
    ) -> None:
        self._samples, self._uniforms, self._rng = list(samples), list(uniforms), rng

    def site(self, name: str | int) -> Given:
        return self

    @property
    def unused(self) -> int:
        """How many of the given arrays have not been drawn."""
        return len(self._samples) + len(self._uniforms)

    def one_hot(self, logits: Array) -> Array:
        if not self._samples:
            raise ValueError("more samples are drawn than were given: give one array for each draw.")
        return asarray_like(self._samples.pop(0), logits)

    bernoulli = one_hot

    def uniform(self, shape: Shape, like: Array | None = None) -> Array:
        return asarray_like(self._uniforms.pop(0), like) if self._uniforms else self._drawn("uniform")(shape, like)

    def _drawn(self, name):
        if self._rng is None:
            raise AttributeError(f"no {name} noise was given: pass an rng, too.")
        return getattr(self._rng, name)

    def __getattr__(self, name: str) -> Any:
        return self._drawn(name)


Noise = Rng | Given  # where an estimator's noise comes from
