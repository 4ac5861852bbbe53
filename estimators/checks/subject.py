"""The estimator that is judged: how it is called, and what all checks share."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from ..measure import FAMILIES
from .adapters import Adapter, ConformanceError, FromEstimator, described
from .ladder import KINDS, Rung
from .means import Distance, Means, distance

__all__ = ["FIRST", "ROWS", "ConformanceError", "Subject"]

ROWS = 2048  # examples in a call
FIRST = 32  # calls before the first look
DECISIONS = 12  # by chance, beside those on the ladder
PRECISION = 1e-5  # some compute in float32 whatever they are given


class Subject:
    """An estimator, the rungs that it is asked, and what was found so far.

    rungs: the ladder.   quadratic: the rung for all that is asked of one cost.   means, distances: by a rung's name.
    unit: the norm of each rung's exact gradient.   alpha: the error rate of one decision.   precision: below it,
    relative to the unit, a number counts as rounding.   relaxed: are the samples points between the outcomes?
    """

    def __init__(
        self, adapter: Adapter, family: str, claim: str | None, level: float, seed: int, rows: int, progress: Callable
    ) -> None:
        self.adapter, self.family, self.claim, self.n, self.progress = adapter, family, claim, rows, progress
        self.level = level
        self.module, self.bits = FAMILIES[family], family == "bernoulli"
        self.seeds = seeds(seed)
        one = [Rung(kind, 1, 3, family) for kind in ("linear", "quadratic", "cubic", "exponential")]
        several = [Rung(kind, 2, 3, family) for kind in KINDS]
        self.rungs = one + several
        self.quadratic = several[KINDS.index("quadratic")]
        self.unit = {rung.name: float(np.linalg.norm(adapter.exact(rung))) for rung in self.rungs}
        constant = several[KINDS.index("constant")]  # its gradient is 0: errors are in units of another one
        self.unit[constant.name] = self.unit[self.quadratic.name]
        self.means = {rung.name: Means() for rung in self.rungs}
        self.distances: dict[str, Distance] = {}
        self.alpha, self.precision = (1.0 - level) / (len(self.rungs) + DECISIONS), PRECISION
        self.relaxed = False
        self.compared: list[dict[str, Any]] = []

    @property
    def special(self) -> bool:
        """Is it one of ours that says that its outputs are no discrete values?"""
        return isinstance(self.adapter, FromEstimator) and self.adapter.estimator.support != "hard"

    def repeat(self, logits: np.ndarray, n: int) -> np.ndarray:
        return np.array(np.broadcast_to(logits, (n, *logits.shape)), order="C")

    def call(
        self,
        rung: Rung,
        n: int | None = None,
        logits: np.ndarray | None = None,
        seed: int | None = None,
        dtype: Any = np.float64,
    ) -> tuple[Any, np.ndarray]:
        """(samples (S, n, …) or None, gradients (n, …)) of n equal examples, or of the logits (n, …).

        ConformanceError if it returns something else.
        """
        theta = self.repeat(rung.logits, n or self.n) if logits is None else logits
        theta = np.array(theta, dtype, order="C")  # noise that is drawn like the logits follows their memory
        found = self.adapter(theta, rung, next(self.seeds) if seed is None else seed)
        return self._checked(found, theta.shape)

    def _checked(self, found: Any, shape: tuple[int, ...]) -> tuple[Any, np.ndarray]:
        name = self.adapter.title
        if not isinstance(found, tuple | list) or len(found) != 2:
            raise ConformanceError(f"{name} must return samples and gradients, but it returned {described(found)}.")
        samples, g = (None if x is None else _array(name, x) for x in found)
        if g is None or g.shape != shape or g.dtype.kind != "f":
            raise ConformanceError(f"{name} must return gradients like the logits, {shape}, got {described(g)}.")
        if samples is None:
            return None, g
        if samples.shape == shape:
            samples = samples[None]
        if samples.shape[1:] != shape or samples.dtype.kind != "f":
            raise ConformanceError(
                f"{name} must return samples like the logits, {shape}, or with one more axis in front, "
                f"got {described(samples)}."
            )
        return samples.astype(np.float64, copy=False), g

    def add(self, rung: Rung, calls: int, means: Means, n: int | None = None, **how: Any) -> None:
        """The mean gradients of so many calls more."""
        for _ in range(calls):
            means.vectors.append(self.call(rung, n, **how)[1].mean(axis=0, dtype=np.float64).ravel())

    def apart(self, a: Means, b: Means, rung: Rung, precision: float | None = None) -> Distance:
        """How far the means of two kinds of calls are from each other."""
        error, covariance = a.mean - b.mean, a.covariance + b.covariance
        n, precision = min(a.n, b.n), precision or self.precision
        return distance(error, covariance, n, self.alpha, self.unit[rung.name], precision)


def seeds(seed: int) -> Iterator[int]:
    """Seeds below 2³¹, each for one call only."""
    for block in itertools.count():
        yield from map(int, np.random.SeedSequence([seed, block]).generate_state(4096) >> 1)


def _array(name: str, x: Any) -> np.ndarray:
    try:
        return np.asarray(x)
    except Exception as error:  # of lists of lists of unequal lengths, tensors with gradients …
        why = str(error).split("\n")[0].rstrip(".")
        raise ConformanceError(f"{name} must return arrays, got {described(x)}: {why}.") from error
