"""The exactness ladder: small problems, their exact gradients, and the exact or estimated mean of every estimator."""

import itertools

import numpy as np

from estimators.enumeration import Given
from estimators.exact import exact_gradient
from minigrad import Rng, Tensor


class Problem:
    """One set of logits (θ) and a cost on all variables jointly, which takes Tensors and arrays alike."""

    def __init__(self, family, variables, classes, cost):
        rng = np.random.default_rng(600 + 10 * variables + classes)
        self.family, shape = family, (variables, classes) if family == "categorical" else (variables,)
        self.logits = 0.7 * rng.standard_normal(shape)
        n = self.logits.size
        self.a, self.m = rng.standard_normal(n), 0.6 * rng.standard_normal((n, n))
        self.kind = cost

    def cost(self, d):
        x = d.reshape(d.shape[0], self.logits.size)
        linear = x @ self.a
        if self.kind == "linear":
            return linear
        if self.kind == "quadratic":
            return linear + ((x @ self.m) * x).sum(axis=1)
        if self.kind == "cubic":
            return (linear + 0.6) ** 3.0
        if self.kind == "bounded":
            return (-(linear**2.0)).exp()
        return (0.8 * (linear + ((x @ self.m) * x).sum(axis=1))).exp()

    def values(self, d):
        return self.cost(Tensor(d)).data

    def rows(self, n):
        return Tensor(np.broadcast_to(self.logits, (n, *self.logits.shape)).copy(), requires_grad=True)


COSTS = ("linear", "quadratic", "cubic", "exponential")
SIZES = [(1, 2), (1, 3), (1, 4), (3, 2), (3, 3), (3, 4)]


def all_outcomes(problem, estimator):
    """All joint outcomes (N, ...) and their probabilities (N,) under the estimator's forward distribution."""
    outcomes = estimator.family.outcomes((1, *problem.logits.shape))
    p = estimator.family.probability(estimator.logit_scale * problem.logits[None])
    return outcomes, estimator.family.outcome_probability(p, outcomes)[0]


def exact(problem, estimator):
    """∇θ E f(D) with D from the estimator's forward distribution."""
    outcomes, _ = all_outcomes(problem, estimator)
    p = estimator.family.probability(estimator.logit_scale * problem.logits[None])
    g, _ = exact_gradient(p, outcomes, problem.values(outcomes)[None], estimator.family)
    return estimator.logit_scale * g[0]


def run(problem, estimator, n, rng):
    """(values (n,), gradients (n, ...)) of n independent calls as one batch."""
    logits = problem.rows(n)
    value = estimator(logits, problem.cost, rng)
    value.backward(np.ones(n))
    return value.data, logits.grad


def over_samples(problem, estimator, samples=1):
    """The exact mean of (value, gradient) of an estimator that is a function of so many independent samples."""
    outcomes, q = all_outcomes(problem, estimator)
    index = np.array(list(itertools.product(range(len(q)), repeat=samples))).T
    value, g = run(problem, estimator, index.shape[1], Given(samples=[outcomes[i] for i in index]))
    weight = np.prod(q[index], axis=0)
    return weight @ value, np.tensordot(weight, g, axes=1)


def over_uniforms(problem, estimator, breaks):
    """The exact mean of (value, gradient) when both are linear in each uniform number between its breaks.

    breaks (..., n): where each number changes what it decides. The middle of each interval stands for all of it.
    """
    edges = np.concatenate([np.zeros_like(breaks[..., :1]), np.sort(breaks, -1), np.ones_like(breaks[..., :1])], -1)
    shape, pieces = edges.shape[:-1], edges.shape[-1] - 1
    edges = edges.reshape(-1, pieces + 1)
    choice = np.array(list(itertools.product(range(pieces), repeat=len(edges))))
    places = np.arange(len(edges))
    low, high = edges[places, choice], edges[places, choice + 1]
    weight = np.prod(high - low, axis=1)
    value, g = run(problem, estimator, len(choice), Given(uniforms=[(0.5 * (low + high)).reshape(-1, *shape)]))
    return weight @ value, np.tensordot(weight, g, axes=1)


def z_scores(x, mean):
    """How many standard errors the mean of x (n, ...) lies from `mean`; 0 where x does not vary and is right."""
    error = x.std(axis=0) / np.sqrt(len(x))
    return (x.mean(axis=0) - mean) / np.maximum(error, 1e-9)


def monte_carlo(problem, estimator, n, seed=0):
    return run(problem, estimator, n, Rng(seed).site("ladder"))


# ---- quadrature: one variable of two classes, whose noise has one or two dimensions


class Nodes:
    """Stands in for a `minigrad.Rng` at the nodes of a quadrature: u for the noise that makes the sample, v for the
    noise that is conditioned on it, both (N,) in (0, 1), and the samples of those estimators that draw them first.

    Only differences of two Gumbels and ratios of two exponentials matter, so one number makes two.
    """

    def __init__(self, u=None, v=None, samples=None):
        self.u, self.v, self.samples, self.second = u, v, samples, False

    def site(self, name):
        at = Nodes(self.u, self.v, self.samples)
        at.second = name == "conditional" or self.second
        return at

    def logistic(self, shape, like):
        return (np.log(self.u) - np.log1p(-self.u)).reshape(shape)

    def gumbel(self, shape, like):
        first = np.log(self.u) - np.log1p(-self.u)
        return np.stack([first, 0.0 * first], axis=-1).reshape(shape)

    def exponential(self, shape, like):
        w = self.v if self.second else self.u
        return np.broadcast_to(np.stack([w, 1.0 - w], axis=-1).reshape(shape[-3:]), shape)  # all draws alike

    def uniform(self, shape, like):
        return self.v.reshape(shape)

    def one_hot(self, logits):
        return self.samples

    def permutation(self, n):
        return np.arange(n)


def smooth_rule(breaks=(), n=60):
    """Nodes and weights on (0, 1), Gauss-Legendre between the breaks. Where an integrand has a logarithm of u or 1 − u
    at its ends, u = low + (high − low) s³(10 − 15s + 6s²) makes it smooth."""
    x, w = np.polynomial.legendre.leggauss(n)
    s, w = (x + 1) / 2, w / 2
    t, dt = s**3 * (10 - 15 * s + 6 * s * s), 30 * (s * (1 - s)) ** 2
    edges = [0.0, *sorted(breaks), 1.0]
    nodes = np.concatenate([low + (high - low) * t for low, high in itertools.pairwise(edges)])
    weights = np.concatenate([(high - low) * dt * w for low, high in itertools.pairwise(edges)])
    return nodes, weights


def over_noise(problem, estimator, breaks, conditional: bool, samples=False):
    """The mean of (value, gradient) by quadrature: over u, between its breaks, or over the two samples; and over v."""
    if samples:
        outcomes, wu = all_outcomes(problem, estimator)
        u = np.arange(len(outcomes))
    else:
        u, wu = smooth_rule(breaks)
    v, wv = smooth_rule() if conditional else (np.array([0.5]), np.array([1.0]))
    i, j = (x.ravel() for x in np.meshgrid(np.arange(len(u)), np.arange(len(v)), indexing="ij"))
    nodes = Nodes(v=v[j], samples=outcomes[i]) if samples else Nodes(u=u[i], v=v[j])
    value, g = run(problem, estimator, len(i), nodes)
    weight = wu[i] * wv[j]
    return weight @ value, np.tensordot(weight, g, axes=1)
