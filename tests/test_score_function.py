"""REINFORCE: the best baseline, the baselines of earlier batches, and the running mean."""

import numpy as np

from estimators import create
from estimators.score_function import minimum_variance_gradient
from minigrad import Rng, Tensor


def test_the_best_baseline_of_bengio_2013_has_the_least_variance():
    """Eq. 10 against every other constant, by enumeration of one bit."""
    p, outcomes, f = np.array([[0.3]]), np.array([[0.0], [1.0]]), np.array([2.0, 5.0])
    q, square = np.array([0.7, 0.3]), ((outcomes - 0.3) ** 2)[:, 0]
    best = (q * square * f).sum() / (q * square).sum()
    variance = lambda b: np.average((minimum_variance_gradient(p, outcomes, f, b)[:, 0] - 0.63) ** 2, weights=q)
    assert all(variance(best) < variance(best + h) for h in (-0.1, 0.1, 1.0))
    assert variance(best) < variance(q @ f)  # the mean is not the best baseline


def test_the_minimum_variance_baseline_is_made_of_earlier_batches_as_in_equation_10():
    estimator, theta = create("reinforce-minvar:decay=0.7"), np.array([[0.3, -1.0]])
    p, above, below = 1 / (1 + np.exp(-theta)), None, None
    cost = lambda d: (d * np.array([3.0, -1.0])).sum(axis=1) + 2.0
    for step in range(3):
        logits = Tensor(np.broadcast_to(theta, (50, 2)).copy(), requires_grad=True)
        estimator.of("bernoulli")(logits, cost, Rng(0).at(step)).sum().backward()
        d = Rng(0).at(step).bernoulli(logits.data)
        f, weight = cost(Tensor(d)).data, (d - p) ** 2
        baseline = 0.0 if above is None else above / below
        np.testing.assert_allclose(logits.grad, (f[:, None] - baseline) * (d - p))
        now = (weight * f[:, None]).mean(axis=0), weight.mean(axis=0)
        above, below = now if above is None else (0.7 * above + 0.3 * now[0], 0.7 * below + 0.3 * now[1])
        estimator.update()
    assert abs(above[0] / below[0] - above[1] / below[1]) > 0.01  # one for each variable


def test_the_running_mean_uses_the_past_only_and_changes_only_in_update():
    estimator = create("reinforce-mean:decay=0.5")
    logits = Tensor(np.zeros((4, 1, 2)), requires_grad=True)
    constant = lambda c: lambda d: d.sum(axis=(1, 2)) * c
    estimator(logits, constant(8.0), Rng(0))
    assert estimator.mean == 0.0
    estimator.update()
    assert estimator.mean == 8.0
    estimator.update()  # nothing new was seen
    estimator(logits, constant(4.0), Rng(1)).sum().backward()
    d = Rng(1).one_hot(logits.data)
    np.testing.assert_allclose(logits.grad, (4.0 - 8.0) * (d - 0.5))
    estimator.update()
    assert estimator.mean == 6.0
    new = create("reinforce-mean")
    new.load_state_dict(create("reinforce-mean").state_dict())  # saved before the first update
    x = Tensor(np.zeros((4, 1, 2), np.float32), requires_grad=True)
    assert new(x, constant(1.0), Rng(0)).dtype == np.float32
