"""Points of several classes, each in a subspace of its own: data like those of Long, Yin & Xin (2020).

A class has a basis of D vectors, and the bases of all classes together are linearly independent. A point is a random
combination of its class's basis, divided by its norm. In two-sided data the coefficients are normal, so that −x is as
likely as x; in one-sided data they are their absolute values. (Which distribution the authors have is not known to us.)
"""

from __future__ import annotations

import numpy as np

from minigrad import Rng

SIDES = ("one", "two")


def generate(classes: int, dimensions: int, points: int, sided: str, rng: Rng) -> tuple[np.ndarray, np.ndarray]:
    """(x (classes·points, inputs) float64 of norm 1, labels (classes·points,) int64), inputs = classes·dimensions.

    classes, dimensions, points (of a class): all ≥ 1.   sided: "one" or "two", ValueError for others.
    The bases are the rows of a matrix of standard normal numbers: independent with probability 1, and not orthogonal.
    """
    if sided not in SIDES:
        raise ValueError(f"data are one- or two-sided, got {sided!r}.")
    like = np.empty(0, np.float64)
    bases = rng.site("bases").normal((classes, dimensions, classes * dimensions), like=like)
    coefficients = rng.site("coefficients").normal((classes, points, dimensions), like=like)
    x = ((abs(coefficients) if sided == "one" else coefficients) @ bases).reshape(classes * points, -1)
    return x / np.linalg.norm(x, axis=1, keepdims=True), np.repeat(np.arange(classes), points)
