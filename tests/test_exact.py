"""The oracles: the derivative of the expectation, the error of finite differences, and how much is enumerated."""

import numpy as np
import pytest

import ladder
from estimators import create
from minigrad import Rng, Tensor


def test_the_oracle_is_the_derivative_of_the_expectation():
    for family, K in (("categorical", 3), ("bernoulli", 2)):
        for cost in ladder.COSTS:
            problem = ladder.Problem(family, 3, K, cost)
            estimator = create("exact").of(family)
            found, numeric = ladder.exact(problem, estimator), np.zeros_like(problem.logits)
            theta = problem.logits
            for at in np.ndindex(theta.shape):
                values = []
                for h in (1e-6, -1e-6):
                    problem.logits = theta.copy()
                    problem.logits[at] += h
                    outcomes, q = ladder.all_outcomes(problem, estimator)
                    values.append(q @ problem.values(outcomes))
                numeric[at] = (values[0] - values[1]) / 2e-6
            np.testing.assert_allclose(found, numeric, rtol=1e-6, atol=1e-7)


def test_finite_differences_err_by_the_square_of_the_step():
    problem = ladder.Problem("categorical", 3, 3, "cubic")
    errors = []
    for step in (0.2, 0.1, 0.05):
        estimator = create(f"finite-differences:step={step}")
        errors.append(np.abs(ladder.run(problem, estimator, 1, Rng(0))[1][0] - ladder.exact(problem, estimator)).max())
    assert errors[0] / errors[1] == pytest.approx(4.0, rel=0.05)
    assert errors[1] / errors[2] == pytest.approx(4.0, rel=0.05)


def test_exact_allows_as_many_outcomes_as_it_says():
    for variables, categories in ((14, 2), (7, 4), (2, 128), (1, 16384), (1000, 1)):
        create("exact").check_size(variables, categories)
    for variables, categories in ((15, 2), (1, 16385)):
        with pytest.raises(ValueError, match="at most 16384 are allowed"):
            create("exact").check_size(variables, categories)


@pytest.mark.parametrize("name", ["exact", "finite-differences"])
def test_exact_refuses_too_many_outcomes(name):
    logits = Tensor(np.zeros((1, 30, 10)), requires_grad=True)
    with pytest.raises(ValueError, match=r"10\*\*30 outcomes"):
        create(name)(logits, lambda d: d.sum(axis=(1, 2)), Rng(0))
