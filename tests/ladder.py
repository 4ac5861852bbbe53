"""The exactness ladder: the exact or estimated mean of every estimator, on the rungs of `estimators.checks.ladder`."""

import functools
import itertools

import numpy as np

from estimators import bernoulli, categorical, create
from estimators.checks.ladder import EXACT_ON, Rung  # noqa: F401 (EXACT_ON is for the tests of the ladder)
from estimators.enumeration import Given
from estimators.unordered_set import set_weights, unordered_set_gradient
from minigrad import Rng, Tensor


class Problem(Rung):
    """A rung, with the cost as a method; "bounded" is a further kind, for outputs without a bound."""

    def __init__(self, family, variables, classes, cost):
        super().__init__("linear" if cost == "bounded" else cost, variables, classes, family)
        self.bounded = cost == "bounded"

    def cost(self, d):
        return (-(self(d) ** 2.0)).exp() if self.bounded else self(d)

    def values(self, d):
        return self.cost(Tensor(d)).data

    def rows(self, n):
        return Tensor(np.broadcast_to(self.logits, (n, *self.logits.shape)).copy(), requires_grad=True)


COSTS = ("linear", "quadratic", "cubic", "exponential")
COUPLED = ("multilinear", "multiquadratic")  # linear, or quadratic, in each variable; new for several of them
SIZES = [(1, 2), (1, 3), (1, 4), (3, 2), (3, 3), (3, 4)]
DRAWS = 20_000

# the options with which a cell is decisive: several samples, but few; a bias that can be seen
OPTIONS = {
    "finite-differences": "step=0.8",
    "spsa": "width=2.5",
    "nvil": "normalise=0,lr=0.05",
    "vimco": "samples=2",
    "unordered-set": "samples=2",
    "gumbel-rao": "samples=2",
    "st-decoupled": "tau_f=1.6,tau_b=0.8",
    "st-gs-decoupled": "tau_f=1.6,tau_b=0.7",
    "reinmax-rao": "tau=3,samples=2",
    "reinmax-cv": "tau=0.5,samples=2",
    "st-slope": "rate=0.05",
    "rebar": "tau=0.7,lr=0.05",
    "rebar-coupled": "tau=0.7,lr=0.05",
    "relax": "tau=0.7,lr=0.05,hidden=8",
    "lax": "lr=0.05,hidden=8",
    "double-cv": "lr=0.1",
    "rodeo": "lr=0.1",
}


def made(name, family, problem):
    """The estimator with a past: state, networks and temperatures that are no longer what they were at the start."""
    estimator = create(f"{name}:{OPTIONS.get(name, '')}").of(family)
    if estimator.state or estimator.learned is not None:
        for step in range(4):
            run(problem, estimator, 40, Rng(9).at(step))
            estimator.update()
    return estimator


def all_outcomes(problem, estimator):
    """All joint outcomes (N, ...) and their probabilities (N,) under the estimator's forward distribution."""
    outcomes = estimator.family.outcomes((1, *problem.logits.shape))
    p = estimator.family.probability(estimator.logit_scale * problem.logits[None])
    return outcomes, estimator.family.outcome_probability(p, outcomes)[0]


def exact(problem, estimator):
    """∇θ E f(D) with D from the estimator's forward distribution."""
    return problem.exact(scale=estimator.logit_scale)


def run(problem, estimator, n, rng):
    """(values (n,), gradients (n, ...)) of n independent calls as one batch; under `no_grad`, gradients are 0."""
    logits = problem.rows(n)
    value = estimator(logits, problem.cost, rng)
    if not value.requires_grad:
        return value.data, np.zeros_like(logits.data)
    value.backward(np.ones(n))
    return value.data, logits.grad


def weighted(weight, value, g):
    """The sums of values and gradients, each times the probability of its row."""
    return weight @ value, np.tensordot(weight, g, axes=1)


# ---- the exact mean of (value, gradient)


def enumerated(problem, estimator):
    """By the randomness that the estimator says it has; None where that has no finite sum."""
    if estimator.randomness == "none":
        return tuple(x[0] for x in run(problem, estimator, 1, Rng(0)))
    if estimator.randomness in ("sample", "samples"):
        return over_draws(problem, estimator)
    if estimator.randomness == "set":
        return over_sets(problem, estimator, estimator.samples)
    if estimator.randomness == "uniform":
        return over_uniforms(problem, estimator)
    return None


class Seen:
    """Stands in for a `minigrad.Rng` and keeps the logits of every draw of one-hots and bits."""

    def __init__(self):
        self.draws = []

    def site(self, name):
        return self

    def one_hot(self, logits):
        self.draws.append((categorical, logits))
        return Rng(0).one_hot(logits)

    def bernoulli(self, logits):
        self.draws.append((bernoulli, logits))
        return Rng(0).bernoulli(logits)


def over_draws(problem, estimator):
    """Every draw of a call takes every value; where the estimator is linear in a draw, that takes its mean."""
    seen, draws = Seen(), []
    run(problem, estimator, 1, seen)
    for n, (family, logits) in enumerate(seen.draws):
        p = family.probability(logits)
        if n >= estimator.sample_count and estimator.linear_draws:
            draws.append((p, np.ones(1)))
        else:
            outcomes = family.outcomes(logits.shape)
            draws.append((outcomes, family.outcome_probability(p, outcomes)[0]))
    index = np.array(list(itertools.product(*(np.flatnonzero(q) for _, q in draws)))).T
    weight = np.prod([q[i] for (_, q), i in zip(draws, index, strict=True)], axis=0)
    given = Given(samples=[outcomes[i] for (outcomes, _), i in zip(draws, index, strict=True)])
    return weighted(weight, *run(problem, estimator, len(weight), given))


def over_sets(problem, estimator, size):
    """All sets of different outcomes, with the probability of drawing each without replacement, in any order."""
    outcomes, q = all_outcomes(problem, estimator)
    sets = np.array(list(itertools.combinations(range(len(q)), size))).T
    probability = 0.0
    for order in itertools.permutations(range(size)):
        drawn, rest = 1.0, 1.0
        for place in order:
            drawn, rest = drawn * q[sets[place]] / rest, rest - q[sets[place]]
        probability = probability + drawn
    np.testing.assert_allclose(probability.sum(), 1.0, rtol=1e-6)
    f = problem.values(outcomes)[sets]
    first, second = set_weights(np.log(q[sets]))
    p = np.broadcast_to(categorical.probability(problem.logits), (sets.shape[1], *problem.logits.shape))
    g = unordered_set_gradient(p, outcomes[sets], f, first, second)
    return weighted(probability, (first * f).sum(axis=0), g)


def over_uniforms(problem, estimator):
    """Value and gradient are linear in each uniform number between its thresholds: the middle of each interval stands
    for all of it."""
    inner = np.sort(estimator.thresholds(problem.logits), axis=-1)
    edges = np.concatenate([np.zeros_like(inner[..., :1]), inner, np.ones_like(inner[..., :1])], axis=-1)
    shape, pieces = edges.shape[:-1], edges.shape[-1] - 1
    edges = edges.reshape(-1, pieces + 1)
    choice = np.array(list(itertools.product(range(pieces), repeat=len(edges))))
    places = np.arange(len(edges))
    low, high = edges[places, choice], edges[places, choice + 1]
    middle = Given(uniforms=[(0.5 * (low + high)).reshape(-1, *shape)])
    return weighted(np.prod(high - low, axis=1), *run(problem, estimator, len(choice), middle))


# ---- Monte Carlo, in standard errors


def z_scores(x, mean):
    """How many standard errors the mean of x (n, ...) lies from `mean`; 0 where x does not vary and is right."""
    error = x.std(axis=0) / np.sqrt(len(x))
    return (x.mean(axis=0) - mean) / np.maximum(error, 1e-9)


def z_between(x, y):
    """How many standard errors the means of x (n, ...) and y (m, ...) lie apart."""
    return (x.mean(axis=0) - y.mean(axis=0)) / np.sqrt(x.var(axis=0) / len(x) + y.var(axis=0) / len(y))


def monte_carlo(problem, estimator, n, seed=0):
    """Values and gradients of n independent calls, in batches that stay in the cache."""
    address = Rng(seed).site("ladder")
    batches = [run(problem, estimator, min(2_500, n - i), address.at(i)) for i in range(0, n, 2_500)]
    return tuple(np.concatenate(x) for x in zip(*batches, strict=True))


# ---- quadrature: one variable of two classes, whose noise has one or two dimensions


class Nodes:
    """Stands in for a `minigrad.Rng` at the nodes of a quadrature: u for the noise that makes the sample, v for the
    noise that is conditioned on it, both (N,) in (0, 1), and the samples of those estimators that draw them first.

    Only differences of two Gumbels and ratios of two exponentials matter, so one number makes two.
    """

    def __init__(self, u=None, v=None, samples=None):
        self.u, self.v, self.samples, self.second, self.sites = u, v, samples, False, set()

    def site(self, name):
        at = Nodes(self.u, self.v, self.samples)
        self.sites.add(name)
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


@functools.cache
def gauss_legendre(n):
    """n nodes and weights on (0, 1)."""
    x, w = np.polynomial.legendre.leggauss(n)
    return (x + 1) / 2, w / 2


def smooth_rule(breaks=(), n=60):
    """Nodes and weights on (0, 1), Gauss-Legendre between the breaks. Where an integrand has a logarithm of u or 1 − u
    at its ends, u = low + (high − low) s³(10 − 15s + 6s²) makes it smooth."""
    s, w = gauss_legendre(n)
    t, dt = s**3 * (10 - 15 * s + 6 * s * s), 30 * (s * (1 - s)) ** 2
    edges = [0.0, *sorted(breaks), 1.0]
    nodes = np.concatenate([low + (high - low) * t for low, high in itertools.pairwise(edges)])
    weights = np.concatenate([(high - low) * dt * w for low, high in itertools.pairwise(edges)])
    return nodes, weights


def quadrature(problem, estimator):
    """The mean of (value, gradient) over one or two dimensions of noise; None if there are more.

    Over u, between the points where a bit or one of two classes changes, or over the two samples; and over v.
    """
    bit = estimator.family is bernoulli
    more = estimator.sample_count > 1 or estimator.perturbs_logits or not (bit or estimator.noise_differences)
    if problem.logits.size > 2 or len(problem.logits) > 1 or more:
        return None
    if estimator.sample_first:
        outcomes, wu = all_outcomes(problem, estimator)
        u = np.arange(len(outcomes))
    else:
        p = estimator.forward_probability(problem.logits).ravel()[0]
        u, wu = smooth_rule([p, 1 - p])
    v, wv = smooth_rule() if estimator.conditional_noise else (np.array([0.5]), np.array([1.0]))
    i, j = (x.ravel() for x in np.meshgrid(np.arange(len(u)), np.arange(len(v)), indexing="ij"))
    nodes = Nodes(v=v[j], samples=outcomes[i]) if estimator.sample_first else Nodes(u=u[i], v=v[j])
    found = weighted(wu[i] * wv[j], *run(problem, estimator, len(i), nodes))
    assert ("conditional" in nodes.sites) == estimator.conditional_noise
    return found
