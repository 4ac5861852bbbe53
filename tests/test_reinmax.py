"""ReinMax: half straight-through and half a linearised score function, and its options reach the rule."""

import numpy as np
import pytest

from estimators import bernoulli, create
from estimators.reinmax import reinmax
from minigrad.fused import softmax_array, softmax_vjp
from small_problem import assert_draws_alike, bit, hard, rule, samples


def test_reinmax_is_half_straight_through_and_half_linearised_score_function():
    _, logits, d, g = samples()
    p = softmax_array(logits)
    expected = 0.5 * softmax_vjp(p, g) + 0.5 * (g * (d - p)).sum(axis=-1, keepdims=True) * (d - p)
    np.testing.assert_allclose(rule(reinmax, logits, d, g=g), expected, atol=1e-14)


@pytest.mark.parametrize(
    ("spec", "family", "expected"),
    [
        ("reinmax:tau=2", "categorical", lambda x, r: reinmax(x, hard(x, r), tau=2.0)),
        ("reinmax:tau=2", "bernoulli", lambda x, r: reinmax(x, bit(x, r), tau=2.0, family=bernoulli)),
    ],
)
def test_the_options_of_a_sampler_reach_its_rule(spec, family, expected):
    assert_draws_alike(create(spec, family=family).sample, expected, family)
