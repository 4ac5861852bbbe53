"""What changes nothing about the problem changes nothing about an estimate: a constant added to the logits of a
variable, and other names for its classes. For a bit, the names 0 and 1 are exchanged."""

import numpy as np
import pytest

from estimators import create
from minigrad import Rng, Tensor
from registry import pairs

B, L, K = 6, 2, 5  # all different: an axis of length K is one of classes
ORDER = np.array([3, 0, 4, 1, 2])
WEIGHT = np.array([[1.0, -2.0, 0.5, 0.3, 1.5], [0.7, 0.2, -1.0, 1.1, -0.4]])


class Renamed:
    """Stands in for a `minigrad.Rng`: its noise, for classes or bits that have other names."""

    def __init__(self, rng, family):
        self.rng, self.family = rng, family

    def site(self, name):
        return Renamed(self.rng.site(name), self.family)

    def renamed(self, noise):
        for axis in range(noise.ndim):
            if noise.shape[axis] == K:
                noise = noise.take(ORDER, axis=axis)
        return noise

    def gumbel(self, shape, like):
        return self.renamed(self.rng.gumbel(shape, like=like))

    def exponential(self, shape, like):
        return self.renamed(self.rng.exponential(shape, like=like))

    def uniform(self, shape, like):
        u = self.rng.uniform(shape, like=like)
        return 1.0 - u if self.family == "bernoulli" else self.renamed(u)

    def logistic(self, shape, like):
        return -self.rng.logistic(shape, like=like)

    def one_hot(self, logits):
        z = logits + self.gumbel(logits.shape, like=logits)
        return np.eye(logits.shape[-1], dtype=logits.dtype)[z.argmax(axis=-1)]

    def bernoulli(self, logits):
        return (logits + self.logistic(logits.shape, like=logits) > 0).astype(logits.dtype)

    def permutation(self, n):
        return np.argsort(ORDER)[self.rng.permutation(n)]


def theta(family, dtype=np.float64):
    """Multiples of 2⁻¹⁰, so that a float32 holds them and 300 more without rounding."""
    shape = (B, L, K) if family == "categorical" else (B, L)
    return (np.round(np.random.default_rng(3).standard_normal(shape) * 1024) / 1024).astype(dtype)


def cost(d):
    w = WEIGHT if d.ndim == 3 else WEIGHT[:, 0]
    return ((d * w.astype(d.dtype)).sum(axis=tuple(range(1, d.ndim))) + 0.5) ** 3.0


def estimates(name, family, logits, cost, rng, steps):
    """(value, gradient) of each of some training steps."""
    estimator, found = create(name, family=family), []
    for step in range(steps):
        x = Tensor(logits, requires_grad=True)
        value = estimator(x, cost, rng(Rng(1).at(step)))
        value.sum().backward()
        estimator.update()
        found += [value.data, x.grad]
    return found


def steps_of(name):
    """Two, so that what was learned counts, unless a network sees the logits: then one, whose network is still 0."""
    return 1 if name in ("nvil", "relax", "lax") else 2


@pytest.mark.parametrize(("name", "family"), pairs(lambda e: e.family.name == "categorical"))
def test_a_constant_in_the_logits_changes_nothing(name, family):
    for dtype, tolerance in ((np.float64, 1e-9), (np.float32, 2e-3)):
        logits, plain = theta(family, dtype), lambda rng: rng
        expected = estimates(name, family, logits, cost, plain, steps_of(name))
        for constant in (60.0, 300.0, -300.0):
            found = estimates(name, family, logits + dtype(constant), cost, plain, steps_of(name))
            for a, b in zip(found, expected, strict=True):
                np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max())


@pytest.mark.parametrize(("name", "family"), pairs(lambda e: e.threshold > 0))
def test_the_names_of_the_classes_do_not_matter(name, family):
    """(Units whose outputs are 0 or something between have no such names.)"""
    logits, plain = theta(family), lambda rng: rng
    expected = estimates(name, family, logits, cost, plain, steps_of(name))
    if family == "categorical":
        other, sign, back = logits[..., ORDER], 1.0, lambda d: d[..., np.argsort(ORDER)]
    else:
        other, sign, back = -logits, -1.0, lambda d: 1.0 - d
    found = estimates(name, family, other, lambda d: cost(back(d)), lambda rng: Renamed(rng, family), steps_of(name))
    for n, (a, b) in enumerate(zip(found, expected, strict=True)):
        if n % 2:
            b = b[..., ORDER] if family == "categorical" else sign * b
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-9 * np.abs(b).max())
