"""RODEO: RLOO without its corrections, its formula written out, its Stein operator and its surrogate."""

import numpy as np
import pytest

import ladder
from estimators import bernoulli, create
from estimators.base import value_and_grad
from estimators.rodeo import flip_weights, rodeo_gradient
from estimators.score_function import rloo_gradient
from minigrad import Rng


def test_rodeo_is_rloo_at_alpha_and_beta_zero_and_its_stein_operator_has_mean_zero():
    rng = np.random.default_rng(0)
    p = np.broadcast_to(rng.random(4), (100, 4))
    bs, h, flipped = (rng.random((2, 100, 4)) < p).astype(float), rng.random((2, 100)), rng.random((2, 100, 4))
    costs = rng.random((2, 100))
    g, _ = rodeo_gradient(p, bs, costs, h, flipped, 0.0, 0.0)
    np.testing.assert_allclose(g, rloo_gradient(p, bs, costs), atol=1e-14)
    outcomes = bernoulli.outcomes((1, 4))
    q, w = bernoulli.outcome_probability(p[:1], outcomes)[0], flip_weights(p[:1], outcomes)
    h = lambda b: (b @ [1.0, -2.0, 0.5, 3.0] + 0.3) ** 3
    flips = np.stack([h(np.where(np.arange(4) == i, 1 - outcomes, outcomes)) for i in range(4)], axis=1)
    assert abs(q @ (w * (flips - h(outcomes)[:, None])).sum(axis=1)) < 1e-12


def test_rodeo_is_its_formula_with_the_stein_operator_written_out():
    """The corrections have mean 0, so that no expectation tells whether they are the stated ones."""
    rng = np.random.default_rng(0)
    p, outcomes, h, f = rng.random((1, 3)), bernoulli.outcomes((1, 3)), rng.random((3, 8)), rng.random(3)
    w, drawn, alpha, beta = flip_weights(p, outcomes), [1, 6, 3], 0.7, -0.4
    flip = lambda c, i: c ^ (4 >> i)  # codes count in binary, the first bit in front

    def stein(v, c):
        return sum(w[c, i] * (v[flip(c, i)] - v[c]) for i in range(3))

    expected = 0.0
    for s, c in enumerate(drawn):
        others = np.mean([f[t] + alpha * stein(h[t], drawn[t]) for t in range(3) if t != s])
        expected += (f[s] - others) * (outcomes[c] - p[0]) + beta * stein(h[s][:, None] * (outcomes - p), c)
    flipped = np.array([[h[s, flip(c, i)] for i in range(3)] for s, c in enumerate(drawn)])
    given = outcomes[drawn][:, None], f[:, None], h[[0, 1, 2], drawn][:, None], flipped[:, None]
    np.testing.assert_allclose(rodeo_gradient(p, *given, alpha, beta)[0][0], expected / 3, atol=1e-14)


@pytest.mark.parametrize("S", [2, 3])
def test_the_surrogate_of_rodeo_is_a_linearised_cost_and_a_network_at_its_scale(S):
    """… at each other sample by itself, and then the mean."""
    problem, estimator = ladder.Problem("bernoulli", 3, 2, "cubic"), create(f"rodeo:samples={S},hidden=3")
    ladder.run(problem, estimator, 5, Rng(0))
    for i, p in enumerate(estimator.learned.parameters.values()):
        p.data[...] = np.random.default_rng(i).standard_normal(p.shape)
    _, found = ladder.run(problem, estimator, 5, Rng(1))
    W1, b1, w2, b2, alpha, beta = (p.data for p in estimator.learned.parameters.values())
    logits = problem.rows(5).data
    bs = np.stack([Rng(1).site(s).bernoulli(logits) for s in range(S)])
    f, g = map(np.stack, zip(*(value_and_grad(problem.cost, b) for b in bs), strict=True))

    def of_one(t, y):
        l, r = (g[t] * (y - bs[t])).sum(axis=-1), 1.0 + abs(f[t])
        return l + r * (np.tanh(np.stack([l / r, f[t] / r], axis=-1) @ W1 + b1) @ w2 + b2)[:, 0]

    surrogate = lambda b: np.stack([np.mean([of_one(t, b[s]) for t in range(S) if t != s], axis=0) for s in range(S)])
    h = surrogate(bs)
    flipped = np.stack([surrogate(np.where(np.arange(3) == i, 1.0 - bs, bs)) for i in range(3)], axis=-1)
    expected, _ = rodeo_gradient(bernoulli.probability(logits), bs, f, h, flipped, alpha, beta)
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_rodeo_with_three_samples_is_unbiased_whatever_its_network_is():
    """Over all outcomes of the three."""
    problem, estimator = ladder.Problem("bernoulli", 2, 2, "cubic"), create("rodeo:samples=3,hidden=3")
    ladder.run(problem, estimator, 5, Rng(0))
    for i, p in enumerate(estimator.learned.parameters.values()):
        p.data[...] = np.random.default_rng(i).standard_normal(p.shape)
    np.testing.assert_allclose(ladder.over_draws(problem, estimator)[1], ladder.exact(problem, estimator), atol=1e-12)
