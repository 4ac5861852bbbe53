"""AR, ARM, DisARM and ARMS: each is the mean of the one before, and the copula has the stated probabilities."""

import numpy as np
import pytest
from scipy import stats

import ladder
from estimators import bernoulli, create
from estimators.antithetic import (
    antithetic_samples,
    ar_gradient,
    arm_gradient,
    arms_gradient,
    dirichlet_copula,
    disarm_gradient,
)


def test_arm_is_the_mean_of_ar_and_its_mirror_image_and_disarm_the_mean_of_arm_given_the_bits():
    rng = np.random.default_rng(0)
    a, u = rng.standard_normal((200, 3)), rng.random((200, 3))
    p = bernoulli.probability(a)
    f = lambda b: (b @ [1.0, -2.0, 0.7] + 0.4) ** 3
    below = lambda u: (u < p).astype(float)
    mirror, b = below(u), below(1 - u)
    arm = arm_gradient(u, f(b), f(mirror))
    np.testing.assert_allclose(arm, 0.5 * (ar_gradient(u, f(mirror)) + ar_gradient(1 - u, f(b))), atol=1e-13)

    # given both bits, u is uniform on one side of p and 1 − p, or on both of them
    low, high = np.minimum(p, 1 - p), np.maximum(p, 1 - p)
    middle = np.where(u < low, low / 2, np.where(u > high, (1 + high) / 2, 0.5))
    given_bits = arm_gradient(middle, f(b), f(mirror))
    np.testing.assert_allclose(disarm_gradient(a, b, mirror, f(b), f(mirror)), given_bits, atol=1e-13)
    pair = np.stack([below(u), below(1 - u)])
    arms = arms_gradient(p, pair, np.stack([f(x) for x in pair]))
    np.testing.assert_allclose(arms, given_bits, atol=1e-13)


@pytest.mark.parametrize("samples", [2, 3, 5])
def test_the_dirichlet_copula_is_uniform_and_its_pairs_have_the_stated_probability(samples):
    u = dirichlet_copula(np.random.default_rng(1).exponential(size=(samples, 100_000)))
    assert stats.kstest(u[0], "uniform").pvalue > 1e-3
    if samples == 2:
        np.testing.assert_allclose(u[0], 1 - u[1], atol=1e-12)
    for p in (0.3, 0.5, 0.8):
        bits = antithetic_samples(np.full(100_000, p), u)
        assert abs(bits.mean() - p) < 4.5 * np.sqrt(p * (1 - p) / 100_000)
        n, q = samples - 1, min(p, 1 - p)
        rare = bits if p <= 0.5 else 1 - bits
        both = max(2 * q ** (1 / n) - 1, 0) ** n
        assert abs((rare[0] * rare[1]).mean() - both) < 4.5 * np.sqrt(max(both, 1e-5) / 100_000)


def test_arms_without_its_correction_for_the_correlation_is_biased():
    problem = ladder.Problem("bernoulli", 3, 2, "cubic")
    p = 1 / (1 + np.exp(-np.broadcast_to(problem.logits, (ladder.DRAWS, 3))))
    bs = antithetic_samples(p, dirichlet_copula(np.random.default_rng(0).exponential(size=(4, ladder.DRAWS, 3))))
    f = np.stack([problem.values(b) for b in bs])
    g = (((f - f.mean(axis=0)) / 3)[..., None] * (bs - p)).sum(axis=0)
    assert np.abs(ladder.z_scores(g, ladder.exact(problem, create("arms")))).max() > 20
