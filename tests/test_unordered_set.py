"""The unordered set: the weights of the paper, drawing without replacement, exactness for several sizes."""

import itertools

import numpy as np
import pytest
from scipy import stats

import ladder
from estimators import create
from estimators.unordered_set import set_weights, stochastic_beam_search
from minigrad import Rng, Tensor
from minigrad.fused import log_softmax


def test_the_weights_of_a_set_are_those_of_the_ratios_in_the_paper():
    """R(S, s) = P^{D∖s}(S∖s)/P(S), by summing over all orders, and both orders of weights sum to 1."""
    p = np.random.default_rng(0).dirichlet(np.ones(6))
    members = [0, 2, 5]

    def probability(chosen, without=()):
        left = 1.0 - sum(p[list(without)])
        total = 0.0
        for order in itertools.permutations(chosen):
            drawn, rest = 1.0, left
            for c in order:
                drawn, rest = drawn * p[c] / rest, rest - p[c]
            total += drawn
        return total

    first, second = set_weights(np.log(p[members])[:, None])
    for i, s in enumerate(members):
        others = [t for t in members if t != s]
        assert first[i, 0] == pytest.approx(p[s] * probability(others, [s]) / probability(members))
        for j, t in enumerate(members):
            last = [r for r in others if r != t]
            ratio = probability(last, [s, t]) / probability(others, [s]) if s != t else 1.0
            assert second[i, j, 0] == pytest.approx(p[t] * ratio)
    np.testing.assert_allclose(first.sum(axis=0), 1.0)
    np.testing.assert_allclose(second.sum(axis=1), 1.0)


def test_the_beam_search_draws_without_replacement_from_the_joint_distribution():
    rng, n = np.random.default_rng(0), 40_000
    log_p = log_softmax(rng.standard_normal((2, 3))).data
    classes, found = stochastic_beam_search(np.broadcast_to(log_p, (n, 2, 3)), rng.gumbel(size=(2, n, 3, 3)), 3)
    np.testing.assert_allclose(found, log_p[0][classes[..., 0]] + log_p[1][classes[..., 1]])
    outcomes = classes[..., 0] * 3 + classes[..., 1]
    assert all(len(set(row)) == 3 for row in outcomes[:500])
    q = np.exp(log_p[0][:, None] + log_p[1]).reshape(-1)
    assert stats.chisquare(np.bincount(outcomes[:, 0], minlength=9), n * q).pvalue > 1e-3
    pairs = np.bincount(outcomes[:, 0] * 9 + outcomes[:, 1], minlength=81).reshape(9, 9)
    expected = n * q[:, None] * q / (1 - q[:, None])
    off = ~np.eye(9, dtype=bool)
    assert stats.chisquare(pairs[off], expected[off] * pairs[off].sum() / expected[off].sum()).pvalue > 1e-3


@pytest.mark.parametrize("size", [2, 3, 4])
def test_unordered_sets_of_several_sizes_are_exact(size):
    problem = ladder.Problem("categorical", 2, 3, "cubic")
    _, g = ladder.over_sets(problem, create("unordered-set"), size)
    np.testing.assert_allclose(g, ladder.exact(problem, create("unordered-set")), atol=1e-10)


@pytest.mark.parametrize(
    ("spec", "variables", "classes"),
    [("unordered-set:samples=3", 1, 3), ("unordered-set:samples=4", 2, 2)],
)
def test_no_variance_is_left_when_every_outcome_is_summed(spec, variables, classes):
    problem = ladder.Problem("categorical", variables, classes, "cubic")
    _, g = ladder.monte_carlo(problem, create(spec), 200)
    np.testing.assert_allclose(g, np.broadcast_to(ladder.exact(problem, create(spec)), g.shape), atol=1e-10)


def test_a_set_of_many_unlikely_outcomes_is_no_set_of_masked_ones():
    """50 variables of 10 classes: every joint outcome has a probability of about e^(−115)."""
    logits = Tensor(np.zeros((500, 50, 10)), requires_grad=True)
    cost = lambda d: d[:, :, 0].sum(axis=1)
    create("unordered-set")(logits, cost, Rng(0)).sum().backward()
    slope = logits.grad.mean(axis=0)
    expected = 0.1 * (np.eye(10)[0] - 0.1)
    assert np.abs(slope.mean(axis=0) - expected).max() < 0.02
    assert slope[:, 0].mean() > 0.05
