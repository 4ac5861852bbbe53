"""Means of calls, and how far one is from what it should be (Hotelling's T²)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from scipy.stats import f as f_distribution

__all__ = ["Distance", "Means", "distance", "per_cent"]


@dataclass
class Means:
    """The means of calls, vectors (P,). Each call is one independent observation, whatever its examples share."""

    vectors: list[np.ndarray] = field(default_factory=list)

    @property
    def n(self) -> int:
        return len(self.vectors)

    @property
    def mean(self) -> np.ndarray:
        return np.mean(self.vectors, axis=0)

    @property
    def covariance(self) -> np.ndarray:
        """Of the mean, (P, P)."""
        return np.atleast_2d(np.cov(np.asarray(self.vectors).T)) / self.n


@dataclass(frozen=True)
class Distance:
    """How far a mean is from what it should be, in units of a norm.

    size, and its standard error;  most: the largest that cannot be excluded;  significant: is it more than chance?
    """

    size: float
    error: float
    most: float
    significant: bool


def distance(e: np.ndarray, covariance: np.ndarray, n: int, alpha: float, norm: float, precision: float) -> Distance:
    """Of the mean e (P,) of n errors, with the covariance (P, P) of that mean, at the error rate alpha.

    T² = eᵀ C⁻¹ e, in the r directions in which there is variance, is r (n − 1)/(n − r) times an F(r, n − r) if the true
    error is 0. Rounding, an error of all draws alike, may be `precision` in units of the norm in each direction: e
    counts from there on, and in the other directions must not be larger. All true errors with (e − b)ᵀ C⁻¹ (e − b)
    below the critical value are possible: the largest of them is at most ‖e‖ + √(critical λ), λ the largest eigenvalue
    of C.
    """
    if not (np.isfinite(e).all() and np.isfinite(covariance).all()):
        return Distance(math.inf, 0.0, math.inf, True)
    values, axes = np.linalg.eigh(covariance)
    varies = values > (0.01 * precision * norm) ** 2 / n
    r, along, size = int(varies.sum()), axes.T @ e, float(np.linalg.norm(e))
    off = float(np.linalg.norm(along[~varies])) > precision * norm
    if not r:
        return Distance(size / norm, 0.0, size / norm, off)
    critical = r * (n - 1) / (n - r) * f_distribution.isf(alpha, r, n - r)
    beyond = np.maximum(np.abs(along[varies]) - precision * norm, 0.0)  # rounding is an error of all draws alike
    t2 = float((beyond**2 / values[varies]).sum())
    error = math.sqrt(max(0.0, e @ covariance @ e)) / max(size, 1e-300)
    most = size + math.sqrt(critical * values.max())
    return Distance(size / norm, error / norm, most / norm, t2 > critical or off)


def per_cent(x: float) -> str:
    return f"{100.0 * x:.2g} %" if x < 0.995 else f"{100.0 * x:.0f} %"
