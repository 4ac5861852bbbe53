"""Straight-through: its options reach the rules, and the slope grows with the updates."""

import numpy as np
import pytest

from estimators import bernoulli, create
from estimators.straight_through import hard_sigmoid_straight_through, straight_through
from minigrad import Rng, Tensor
from small_problem import assert_draws_alike, bit, hard, rule


@pytest.mark.parametrize(
    ("spec", "family", "expected"),
    [
        ("st:tau=2", "categorical", lambda x, r: straight_through(x, hard(x, r), tau=2.0)),
        ("st:tau=2", "bernoulli", lambda x, r: straight_through(x, bit(x, r), tau=2.0, family=bernoulli)),
        (
            "st-decoupled:tau_f=2,tau_b=0.5",
            "categorical",
            lambda x, r: straight_through(x, r.one_hot(x.data / 2.0), tau=0.5),
        ),
        (
            "st-decoupled:tau_f=2,tau_b=0.5",
            "bernoulli",
            lambda x, r: straight_through(x, r.bernoulli(x.data / 2.0), tau=0.5, family=bernoulli),
        ),
    ],
)
def test_the_options_of_a_sampler_reach_its_rule(spec, family, expected):
    assert_draws_alike(create(spec, family=family).sample, expected, family)


@pytest.mark.parametrize("spec", ["st-slope:rate=1,most=3", "st-slope:rate=1,most=3,surrogate=hard"])
def test_the_slope_grows_with_the_updates_up_to_its_most(spec):
    estimator, slopes = create(spec), []
    for _ in range(4):
        slopes.append(estimator.logit_scale)
        a = Tensor(np.array([[0.3, 0.9, -0.2]]), requires_grad=True)
        estimator(a, lambda d: (d * 2.0).sum(axis=1), Rng(0)).backward()
        s, p = slopes[-1], 1 / (1 + np.exp(-slopes[-1] * a.data))
        expected = 2 * s * p * (1 - p) if "hard" not in spec else s * (abs(s * a.data) < 1)
        np.testing.assert_allclose(a.grad, expected)
        estimator.update()
    assert slopes == [1.0, 2.0, 3.0, 3.0]


def test_the_hard_sigmoid_is_exact_for_linear_costs_if_the_bits_are_drawn_from_it():
    """As in the paper; with bits drawn from σ, which is what the estimator does, the same rule is biased."""
    a, w, s = np.array([-0.4, 0.1, 0.6]), np.array([1.0, -2.0, 0.5]), 1.5
    outcomes, step = bernoulli.outcomes((1, 3)), 1e-6
    g = np.stack([rule(hard_sigmoid_straight_through, a, b, g=w, slope=s) for b in outcomes])
    for probability, exact in (
        (lambda a: np.clip(0.5 * (s * a + 1.0), 0.0, 1.0), True),
        (lambda a: bernoulli.probability(s * a), False),
    ):
        q = bernoulli.outcome_probability(probability(a)[None], outcomes)[0]
        derivative = w * (probability(a + step) - probability(a - step)) / (2.0 * step)  # of E f = ⟨w, p⟩
        assert np.allclose(q @ g, derivative, atol=1e-8) == exact
