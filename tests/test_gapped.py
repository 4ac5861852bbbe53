"""Gapped straight-through: its three properties, each of them switched off, and the mean gap of Gumbel noise."""

import numpy as np
import pytest

from estimators import create
from estimators.gapped import expected_gap, gapped_logits, gapped_straight_through
from estimators.straight_through import straight_through
from small_problem import assert_draws_alike, hard, rule, samples


def test_gst_keeps_consistency_and_the_gap():
    _, logits, d, _ = samples()
    for gap in (0.0, 0.8, 1.0, expected_gap(logits, d)):
        shifted = gapped_logits(logits, d, gap)
        drawn = (shifted * d).sum(axis=-1)
        best_other = np.where(d > 0, -np.inf, shifted).max(axis=-1)
        assert (drawn - best_other >= np.squeeze(gap) - 1e-12).all()
        np.testing.assert_allclose(drawn, logits.max(axis=-1))
        m1 = (logits.max(axis=-1, keepdims=True) - logits) * d  # the paper's two terms
        m2 = np.maximum(logits - logits.max(axis=-1, keepdims=True) + gap, 0.0) * (1 - d)
        np.testing.assert_allclose(shifted, logits + m1 - m2, atol=1e-12)


def test_the_gap_of_gst_p_is_the_mean_gap_that_gumbel_noise_leaves():
    logits = np.array([0.5, -0.2, 0.1, -1.0])
    q = np.sort(logits + np.random.default_rng(1).gumbel(size=(400_000, 4)), axis=-1)
    raw = logits + np.random.default_rng(1).gumbel(size=(400_000, 4))
    winner, gap = raw.argmax(axis=-1), q[:, -1] - q[:, -2]
    for i in range(4):
        seen = gap[winner == i]
        standard_error = seen.std() / np.sqrt(seen.size)
        assert abs(seen.mean() - expected_gap(logits, np.eye(4)[i])[0]) < 4.5 * standard_error + 2e-5


@pytest.mark.parametrize("consistent", [True, False])
@pytest.mark.parametrize("detached", [True, False])
@pytest.mark.parametrize("gap", [0.0, 1.0, "p"])
def test_each_property_of_gst_can_be_switched_off(consistent, detached, gap):
    """Consistency and the gap show in the perturbed logits, detachment in the derivative; GST without consistency is
    straight-through. The rule of each is checked against its surrogate with all other rules."""
    _, logits, d, g = samples()
    found = rule(gapped_straight_through, logits, d, g=g, gap=gap, consistent=consistent, detached=detached)
    plain = rule(straight_through, logits, d, g=g)
    gst = rule(gapped_straight_through, logits, d, g=g, gap=gap)
    assert np.allclose(found, plain) == (not consistent)
    assert np.allclose(found, gst) == (consistent and detached)
    if not detached and consistent:  # the perturbed logits follow θ: gradients still sum to 0, but differ
        np.testing.assert_allclose(found.sum(axis=-1), 0.0, atol=1e-13)
    spec = f"gst:gap={gap},consistent={int(consistent)},detached={int(detached)}"
    estimator = create(spec)
    assert (estimator.consistent, estimator.detached, estimator.gap) == (consistent, detached, gap)


@pytest.mark.parametrize(
    ("spec", "family", "expected"),
    [
        ("gst:tau=2,gap=0.5", "categorical", lambda x, r: gapped_straight_through(x, hard(x, r), gap=0.5, tau=2.0)),
    ],
)
def test_the_options_of_a_sampler_reach_its_rule(spec, family, expected):
    assert_draws_alike(create(spec, family=family).sample, expected, family)
