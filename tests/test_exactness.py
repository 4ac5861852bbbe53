"""The exactness ladder: every registered estimator, both kinds of variables, one and three of them, K = 2, 3, 4, and a
linear, a quadratic, a cubic and an exponential cost; for three variables also a product of affine functions of one
variable each, and of quadratic ones. Every cell asserts "exact" or "biased", as `exact_for` claims:

    by enumeration, to 1e-10,     where the estimator is a function of discrete samples, or linear in uniform numbers
                                  between the places where they decide something;
    by quadrature, to 1e-7,       where one variable of two classes has continuous noise of one or two dimensions;
    by Monte Carlo,               in standard errors with a fixed seed, otherwise.
"""

import numpy as np
import pytest

import ladder
from estimators import ESTIMATORS, create, facts
from minigrad import no_grad
from registry import PAIRS


def objective(estimator, problem):
    """The gradient of what the estimator claims to estimate, and its value."""
    outcomes, q = ladder.all_outcomes(problem, estimator)
    if estimator.multi_sample:  # −E log mean e^(−f) over pairs, by the score of both
        f = problem.values(outcomes)
        bound = -np.log(0.5 * (np.exp(-f[:, None]) + np.exp(-f)))
        score = outcomes - estimator.family.probability(problem.logits)
        weight = q[:, None] * q * bound
        return weight.sum(), np.tensordot(weight.sum(axis=1) + weight.sum(axis=0), score, axes=1)
    return q @ problem.values(outcomes), ladder.exact(problem, estimator)


def cells(*support):
    """Of the estimators whose samples are "hard", "soft" or both."""
    return [
        pytest.param(*p.values, L, K, cost, id=f"{p.id}-{L}x{K}-{cost}", marks=marks_of(p.values[0], L, K, cost))
        for p in PAIRS
        if facts(p.values[0]).support in support
        for L, K in ladder.SIZES
        if p.values[1] == "categorical" or K == 2
        for cost in ladder.COSTS + (ladder.COUPLED if L > 1 else ())
    ]


def marks_of(name, L, K, cost):
    """What is exact for every cost need not show it daily for six of them, nor any for 3 × 4 logits."""
    often_enough = cost in ladder.COUPLED and facts(name).exact_for == "all"
    return pytest.mark.slow if often_enough or L * K > 9 else ()


@pytest.mark.parametrize(("name", "family", "L", "K", "cost"), cells("hard"))
@pytest.mark.daily(600)
def test_exactness_ladder(name, family, L, K, cost):
    problem = ladder.Problem(family, L, K, cost)
    estimator = ladder.made(name, family, problem)
    claimed_value, claimed = objective(estimator, problem)
    exact = cost in ladder.EXACT_ON[estimator.exact_for]
    found = ladder.enumerated(problem, estimator)
    if found is not None:
        value, g = found
        assert value == pytest.approx(claimed_value, abs=1e-10)
        error = np.abs(g - claimed).max() / np.abs(claimed).max()
        assert error < 1e-10 if exact else error > 5e-3
    elif (found := ladder.quadrature(problem, estimator)) is not None:
        value, g = found
        assert value == pytest.approx(claimed_value, abs=1e-7)
        error = np.abs(g - claimed).max() / np.abs(claimed).max()
        assert error < 1e-7 if exact else error > 5e-3
    else:
        value, g = ladder.monte_carlo(problem, estimator, ladder.DRAWS)
        assert abs(ladder.z_scores(value, claimed_value)) < 4.5
        z = np.abs(ladder.z_scores(g, claimed)).max()
        assert z < 4.5 if exact else z > 6.0


def mean(problem, estimator, draws):
    """The mean of (value, gradient) in the best way that there is; Monte Carlo always with the same noise."""
    found = ladder.enumerated(problem, estimator)
    found = ladder.quadrature(problem, estimator) if found is None else found
    return found or tuple(x.mean(axis=0) for x in ladder.monte_carlo(problem, estimator, draws))


@pytest.mark.parametrize(("name", "family", "L", "K", "cost"), cells("soft"))
def test_exactness_ladder_of_relaxed_objectives(name, family, L, K, cost):
    """Units that put out something between the discrete values estimate the gradient of their own E f(h): differences
    of its mean, with common noise, decide; and it is never the gradient of E f(D).

    Where the output is not bounded, the exponential cost has no mean: it gets a bounded one."""
    unbounded = cost == "exponential" and not facts(name).bounded
    problem = ladder.Problem(family, L, K, "bounded" if unbounded else cost)
    estimator = ladder.made(name, family, problem)
    _, g = mean(problem, estimator, 2_000)  # the noise is common, so that few draws are as good as many …
    own, theta = np.empty_like(g), problem.logits
    for at in np.ndindex(theta.shape):
        values = []
        for h in (1e-5, -1e-5):
            problem.logits = theta.copy()
            problem.logits[at] += h
            with no_grad():
                values.append(mean(problem, estimator, 2_000)[0])
        own[at] = (values[0] - values[1]) / 2e-5
    problem.logits = theta
    scale = np.abs(own).max()
    if cost in ladder.EXACT_ON[estimator.exact_for]:
        assert np.abs(g - own).max() < 2e-3 * scale
    else:
        assert np.abs(g - own).max() > 2e-2 * scale
    _, g = mean(problem, estimator, ladder.DRAWS)  # … but for this
    assert np.abs(g - ladder.exact(problem, estimator)).max() > 2e-2 * np.abs(g).max()


@pytest.mark.parametrize("cost", [*ladder.COSTS, *ladder.COUPLED, "separable"])
@pytest.mark.parametrize(
    ("spec", "family", "exact_for"),
    [
        pytest.param("st:tau=2", "categorical", "none", id="st:tau=2-categorical"),
        pytest.param("reinmax:tau=2", "categorical", "none", id="reinmax:tau=2-categorical"),
        pytest.param(
            "st-slope:rate=1,surrogate=hard", "bernoulli", "none", id="st-slope:rate=1,surrogate=hard-bernoulli"
        ),
        pytest.param("darn:expand_at=half", "bernoulli", "separable", id="darn:expand_at=half-bernoulli"),
        pytest.param("gst:gap=0", "categorical", "none", id="gst:gap=0-categorical"),
        pytest.param("gst:detached=0", "categorical", "none", id="gst:detached=0-categorical"),
    ],
)
def test_options_that_cost_an_estimator_its_exactness(spec, family, exact_for, cost):
    """Another temperature, another surrogate, another expansion point. (Without temperature, these are exact for
    linear or quadratic costs; DARN at ½ still is for sums of quadratic functions of one bit.)"""
    problem, estimator = ladder.Problem(family, 3, 3 if family == "categorical" else 2, cost), create(spec)
    estimator.update()  # a slope grows
    _, g = ladder.over_draws(problem, estimator)
    claimed = ladder.exact(problem, estimator)
    error = np.abs(g - claimed).max() / np.abs(claimed).max()
    assert error < 1e-10 if cost in ladder.EXACT_ON[exact_for] else error > 5e-3
    assert estimator.exact_for == exact_for


def test_every_cell_is_there():
    assert {c.values[0] for c in cells("hard", "soft")} == set(ESTIMATORS)
    seen = {(c.values[1], *c.values[2:4]) for c in cells("hard", "soft")}
    assert seen == {("categorical", L, K) for L, K in ladder.SIZES} | {("bernoulli", 1, 2), ("bernoulli", 3, 2)}


@pytest.mark.parametrize(
    "spec",
    [
        "unordered-set:samples=3",
        "sum-and-sample:summed=2",
        "sum-and-sample:baseline=0",
        "measure-valued",
        "arms:samples=3",
        "disarm-sb",
        "rloo:samples=4",
        "rodeo:samples=3",
        "relax:coupled=1",
    ],
)
def test_other_options_and_what_was_enumerated_by_its_rule_are_unbiased_as_called(spec):
    estimator = create(spec)
    family = estimator.family.name
    problem = ladder.Problem(family, 3, 4 if family == "categorical" else 2, "cubic")
    value, g = ladder.monte_carlo(problem, estimator, 2 * ladder.DRAWS)
    outcomes, q = ladder.all_outcomes(problem, estimator)
    assert abs(ladder.z_scores(value, q @ problem.values(outcomes))) < 4.5
    assert np.abs(ladder.z_scores(g, ladder.exact(problem, estimator))).max() < 4.5
