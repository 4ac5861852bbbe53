"""Double control variates: no variance on a linear cost, RLOO at α = 0, and a term that must not be missing."""

import numpy as np

import ladder
from estimators import double_cv
from estimators.double_cv import double_cv_gradient
from estimators.score_function import rloo_gradient


def test_double_control_variates_have_no_variance_on_a_linear_cost_and_are_rloo_at_alpha_zero():
    rng = np.random.default_rng(0)
    a, bs = rng.standard_normal(5), (rng.random((3, 400, 5)) < 0.4).astype(float)
    p = np.broadcast_to(rng.random(5), (400, 5))
    gs = np.broadcast_to(a, bs.shape)
    linear, _ = double_cv_gradient(p, bs, bs @ a, gs, -1.0)
    np.testing.assert_allclose(linear, p * (1 - p) * a, atol=1e-13)
    cubic = (bs @ a + 0.5) ** 3
    np.testing.assert_allclose(double_cv_gradient(p, bs, cubic, gs, 0.0)[0], rloo_gradient(p, bs, cubic), atol=1e-13)


def test_double_control_variates_without_the_term_given_back_are_biased(monkeypatch):
    problem = ladder.Problem("bernoulli", 3, 2, "cubic")
    estimator = ladder.made("double-cv", "bernoulli", problem)
    assert abs(estimator.learned["alpha"][0]) > 0.05
    monkeypatch.setattr(double_cv.bernoulli, "vjp", lambda p, g: 0.0 * g)
    _, g = ladder.over_draws(problem, estimator)
    assert np.abs(g - ladder.exact(problem, estimator)).max() > 1e-3
