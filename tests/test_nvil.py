"""NVIL: what its baseline subtracts, fits and learns of the inputs, and the factor of its normalisation."""

import numpy as np
import pytest

import ladder
from estimators import create
from minigrad import Rng, Tensor
from minigrad.fused import softmax_array
from small_problem import WEIGHT, logits_of


def test_nvil_subtracts_what_it_learned_from_earlier_batches_and_fits_the_rest():
    estimator = create("nvil:decay=0.6,normalise=0,hidden=3")
    cost = lambda d: (d * WEIGHT).sum(axis=(1, 2)) + 7.0
    mean = None
    for step in range(4):
        logits = logits_of("categorical", 40)
        estimator(logits, cost, Rng(3).at(step)).sum().backward()
        d, p = Rng(3).at(step).one_hot(logits.data), softmax_array(logits.data)
        f, net = cost(Tensor(d)).data, {k: np.array(v.data) for k, v in estimator.learned.parameters.items()}
        hidden = np.tanh(logits.data.reshape(40, 4) @ net["W1"] + net["b1"])
        predicted = (hidden @ net["w2"])[:, 0] + net["b2"]
        c = 0.0 if mean is None else mean
        np.testing.assert_allclose(logits.grad, ((f - predicted - c)[:, None, None]) * (d - p))
        fit = 2 * (predicted + c - f).mean()  # ∂/∂b₂ of the mean square of f − c − C
        np.testing.assert_allclose(estimator.learned._gradients["b2"], fit)
        now = (f - predicted).mean()
        mean = now if mean is None else 0.6 * mean + 0.4 * now
        estimator.update()
        assert estimator.mean == pytest.approx(mean)
    with pytest.raises(ValueError, match="saw inputs of width 4, not 2"):
        estimator(logits, cost, Rng(0), inputs=np.zeros((40, 2)))


def test_nvil_learns_what_the_cost_of_each_input_is():
    """Two kinds of inputs with very different costs: after training, the baseline tells them apart."""
    x = np.repeat(np.eye(2), 50, axis=0)
    level = x @ [10.0, -10.0]
    estimator = create("nvil:lr=0.02")
    theta = Tensor(np.zeros((100, 1, 3)), requires_grad=True)
    cost = lambda d: (d * WEIGHT[:3]).sum(axis=(1, 2)) + level

    def spread(estimator, step):
        theta.grad = None
        estimator(theta, cost, Rng(0).at(step), inputs=x).sum().backward()
        return theta.grad.var(axis=0).sum()

    for step in range(200):
        spread(estimator, step)
        estimator.update()
    assert spread(create("nvil:normalise=0"), 500) > 10 * spread(create("rloo"), 500)
    estimator.normalise = False
    assert spread(estimator, 500) < 0.05 * spread(create("nvil:normalise=0"), 500)


def test_nvil_normalises_by_its_deviation_and_is_exact_up_to_that_factor():
    problem = ladder.Problem("categorical", 3, 3, "cubic")
    estimator = create("nvil")
    for step in range(30):
        ladder.run(problem, estimator, 100, Rng(1).at(step))
        estimator.update()
    deviation = np.sqrt(estimator.variance)
    assert deviation > 1.1
    _, g = ladder.over_draws(problem, estimator)
    np.testing.assert_allclose(g * deviation, ladder.exact(problem, estimator), atol=1e-10)
