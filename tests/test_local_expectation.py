"""Local expectation gradients are the measure-valued derivative, and exact for one variable."""

import numpy as np

from estimators.local_expectation import local_expectation_gradient
from minigrad.fused import softmax_array
from small_problem import THETA, WEIGHT, true_gradient


def test_local_expectation_is_the_measure_valued_derivative_and_exact_for_one_variable():
    p, F = softmax_array(THETA), (WEIGHT + 0.5) ** 3
    weak = [p[j] * (1 - p[j]) * (F[j] - np.delete(p * F, j).sum() / (1 - p[j])) for j in range(4)]
    np.testing.assert_allclose(local_expectation_gradient(p, F), weak, atol=1e-14)
    np.testing.assert_allclose(weak, true_gradient(), atol=1e-14)
