"""DARN: ReinMax and ZGR for a bit, and what it is when expanded at one half."""

import numpy as np
import pytest

import ladder
from estimators import bernoulli, create
from estimators.darn import darn
from estimators.reinmax import reinmax
from estimators.zgr import zgr
from minigrad import Rng
from small_problem import logits_of, rule


def test_darn_is_reinmax_and_zgr_for_a_bit():
    rng = np.random.default_rng(0)
    a, g = 1.5 * rng.standard_normal((2, 500))
    b = (rng.random(500) < 0.5).astype(float)
    expected = rule(darn, a, b, g=g)
    np.testing.assert_allclose(rule(reinmax, a, b, g=g, family=bernoulli), expected, atol=1e-14)
    np.testing.assert_allclose(rule(zgr, a, b, g=g, family=bernoulli), expected, atol=1e-14)
    np.testing.assert_allclose(expected, g * (b - 0.5) * (b - bernoulli.probability(a)), atol=1e-14)


def test_the_published_formula_of_darn_at_one_half_has_mean_zero_on_quadratic_costs():
    """Jang et al. 2017, section 3.2, as printed: a baseline f(½) + f'(½)(b − ½) whose mean is not given back. It leaves
    nothing; what it must mean is exact for costs without products of two bits."""
    problem = ladder.Problem("bernoulli", 3, 2, "quadratic")
    problem.m = np.diag(np.diag(problem.m))
    estimator = create("darn:expand_at=half")
    outcomes, q = ladder.all_outcomes(problem, estimator)
    p = estimator.family.probability(problem.logits)
    half = np.full((1, 3), 0.5)
    df = problem.a + 2 * np.diag(problem.m) * 0.5
    residual = problem.values(outcomes) - problem.values(half) - (outcomes - 0.5) @ df
    np.testing.assert_allclose(np.tensordot(q * residual, outcomes - p, axes=1), 0.0, atol=1e-12)
    exact = ladder.exact(problem, estimator)
    np.testing.assert_allclose(ladder.over_draws(problem, estimator)[1], exact, atol=1e-12)
    assert np.abs(exact).max() > 0.1
    coupled = ladder.Problem("bernoulli", 3, 2, "quadratic")
    assert np.abs(ladder.over_draws(coupled, estimator)[1] - ladder.exact(coupled, estimator)).max() > 1e-2


def test_darn_expanded_at_one_half_cannot_be_sampled():
    with pytest.raises(ValueError, match="call it with the cost"):
        create("darn:expand_at=half").sample(logits_of("bernoulli", 3), Rng(0))
