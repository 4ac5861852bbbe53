"""SPSA is a difference of two costs at the same noise, and points down the gradient."""

import numpy as np
import pytest

import ladder
from estimators import create
from minigrad import Rng
from small_problem import logits_of, one_cost


@pytest.mark.parametrize("family", ["categorical", "bernoulli"])
def test_spsa_is_the_difference_of_two_costs_at_the_same_noise(family):
    estimator, logits, rng, c = create("spsa:width=0.8", family=family), logits_of(family, 40), Rng(6), 0.8
    estimator(logits, one_cost, rng).sum().backward()
    noise = estimator.family.noise(rng.site("common"), logits.data)
    signs = np.where(rng.site("signs").uniform(logits.shape, like=logits.data) < 0.5, -1.0, 1.0)
    above, below = (one_cost(estimator.family.harden(logits.data + s * signs + noise)) for s in (c, -c))
    slope = (above - below) / (2 * c)
    np.testing.assert_allclose(logits.grad, slope.reshape(-1, *[1] * (logits.ndim - 1)) * signs)


def test_spsa_points_down_the_gradient_and_mostly_sees_no_difference():
    """Its mean with a small width, against the exact gradient; and the same noise on both sides."""
    problem = ladder.Problem("bernoulli", 3, 2, "cubic")
    estimator = create("spsa:width=0.3").of("bernoulli")
    _, g = ladder.monte_carlo(problem, estimator, 200_000)
    exact = ladder.exact(problem, estimator)
    assert np.abs(ladder.z_scores(g, exact)).max() < 12  # of a bias of O(c²)
    assert np.abs(g.mean(axis=0) - exact).max() < 0.2 * np.abs(exact).max()
    assert (g == 0).all(axis=1).mean() > 0.6
