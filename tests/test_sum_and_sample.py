"""Sum and sample: no variance when every class is summed, no class twice under a mask, with and without baseline."""

import numpy as np
import pytest

import ladder
from estimators import create
from minigrad import Rng, Tensor
from small_problem import logits_of, one_cost


@pytest.mark.parametrize(
    ("spec", "variables", "classes"),
    [("sum-and-sample:summed=9", 1, 4)],
)
def test_no_variance_is_left_when_every_outcome_is_summed(spec, variables, classes):
    problem = ladder.Problem("categorical", variables, classes, "cubic")
    _, g = ladder.monte_carlo(problem, create(spec), 200)
    np.testing.assert_allclose(g, np.broadcast_to(ladder.exact(problem, create(spec)), g.shape), atol=1e-10)


@pytest.mark.parametrize("baseline", [0, 1])
def test_sum_and_sample_without_its_baseline_feels_a_constant(baseline):
    logits = logits_of("categorical", 50)
    create(f"sum-and-sample:baseline={baseline}")(logits, lambda d: 0.0 * one_cost(d) + 7.0, Rng(0)).sum().backward()
    assert (np.abs(logits.grad).max() > 0.1) == (not baseline)


@pytest.mark.parametrize("baseline", [0, 1])
def test_sum_and_sample_counts_no_class_twice_under_a_mask(baseline):
    mask, f = np.array([True, True, False, False, False]), np.array([1.0, 4.0, 9.0, 9.0, 9.0])
    logits = Tensor(np.zeros((5, 1, 5)), requires_grad=True)
    estimator = create(f"sum-and-sample:summed=3,baseline={baseline}")
    estimator(logits, lambda d: (d * f).sum(axis=(1, 2)), Rng(0), mask=mask).sum().backward()
    np.testing.assert_allclose(logits.grad[:, 0, :2], np.broadcast_to([-0.75, 0.75], (5, 2)))
