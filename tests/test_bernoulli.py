"""Bits beside one-hots: the same functions, which agree for a variable of two classes, and finite noise."""

import numpy as np
import pytest

from estimators import bernoulli, categorical
from estimators.gumbel_softmax import gumbel_softmax, st_gumbel_softmax
from estimators.reinmax import reinmax
from estimators.straight_through import straight_through
from estimators.zgr import zgr
from small_problem import rule


def test_the_two_kinds_of_variables_offer_the_same_and_agree():
    names = lambda module: {n for n in vars(module) if not n.startswith("_") and callable(getattr(module, n))}
    common = "conditional conditional_jvp conditional_vjp harden local_outcomes local_vjp log_odds noise noise_score"
    common = {
        *common.split(),
        *["outcome_probability", "outcomes", "probability", "sample", "sizes", "square", "vjp", "inner"],
    }
    assert common <= names(categorical)
    assert common <= names(bernoulli)
    rng = np.random.default_rng(2)
    a, q = rng.standard_normal((4, 3)), rng.random((4, 3))
    q[0] = [0.0, 1.0, 0.5]  # a bit whose probability has rounded to 0 or 1 has finite log-odds all the same
    two = np.stack([0 * a, a], axis=-1)
    np.testing.assert_allclose(bernoulli.probability(bernoulli.log_odds(q)), q, atol=1e-30)
    np.testing.assert_allclose(bernoulli.probability(a), categorical.probability(two)[..., 1])
    outcomes = bernoulli.outcomes((1, 3))
    as_pairs = np.stack([1 - outcomes, outcomes], axis=-1)
    np.testing.assert_allclose(
        bernoulli.outcome_probability(bernoulli.probability(a), outcomes),
        categorical.outcome_probability(categorical.probability(two), as_pairs),
    )
    z, u = 0.3 + abs(rng.standard_normal((4, 3))), rng.standard_normal((4, 3))
    d, pair_z = np.stack([0 * a, 0 * a + 1], -1), np.stack([0 * z, z], -1)
    pair = categorical.conditional_vjp(categorical.probability(two), d, pair_z, np.stack([-u, u], -1))
    np.testing.assert_allclose(bernoulli.conditional_vjp(bernoulli.probability(a), 1 + 0 * a, z, u), pair[..., 1])


SHARED = [straight_through, reinmax, zgr, gumbel_softmax, st_gumbel_softmax]


@pytest.mark.parametrize("op", SHARED, ids=lambda op: op.op.name)
def test_a_bit_is_a_variable_of_two_classes(op):
    """Logits (0, a) and the one-hot (1 − b, b): what arrives at a is what arrives at the second logit."""
    rng = np.random.default_rng(1)
    a, g = 1.5 * rng.standard_normal((2, 300))
    settings = {"tau": 1.3} if op is not zgr else {}
    second = (rng.random(300) < 0.5).astype(float)  # the bit, or the noise's second component
    if op in (gumbel_softmax, st_gumbel_softmax):
        gumbel = rng.gumbel(size=(300, 2))
        bit_input, pair_input = gumbel[:, 1] - gumbel[:, 0], gumbel
    else:
        bit_input, pair_input = second, np.stack([1 - second, second], axis=-1)
    logits, cotangent = np.stack([0 * a, a], axis=-1), np.stack([0 * g, g], axis=-1)
    pair = rule(op, logits, pair_input, g=cotangent, **settings)
    np.testing.assert_allclose(rule(op, a, bit_input, g=g, family=bernoulli, **settings), pair[:, 1], atol=1e-14)


def test_conditional_logistic_noise_is_finite_also_given_a_bit_of_no_probability():
    z = bernoulli.conditional_logistic(np.array([-1e4, 1e4]), np.array([1.0, 0.0]), np.array([0.3, 0.3]))
    assert np.isfinite(z).all()
