"""The chain of sticks is the softmax, and its derivative goes back to the classes."""

import numpy as np
import pytest

from estimators import create, stick_breaking
from estimators.stick_breaking import first_one, inverse, sticks, sticks_vjp
from minigrad import Rng, Tensor
from minigrad.fused import softmax_array


def test_the_chain_of_sticks_is_the_softmax_and_its_derivative_goes_back_to_the_classes():
    rng = np.random.default_rng(0)
    theta = np.sort(rng.standard_normal((6, 4)), axis=-1)
    psi, e, rest = sticks(theta)
    p, alive = 1 / (1 + np.exp(-psi)), np.ones(6)
    for c in range(3):
        np.testing.assert_allclose(alive * p[:, c], softmax_array(theta)[:, c])
        alive = alive * (1 - p[:, c])
    np.testing.assert_array_equal(first_one(np.array([[0.0, 1, 1], [0, 0, 0], [1, 0, 1]])), np.eye(4)[[1, 3, 0]])
    u, v = rng.standard_normal((6, 3)), rng.standard_normal((6, 4))
    forward = (sticks(theta + 1e-6 * v)[0] - sticks(theta - 1e-6 * v)[0]) / 2e-6
    assert (sticks_vjp(e, rest, u) * v).sum() == pytest.approx((u * forward).sum(), rel=1e-6)


def test_equal_classes_stand_in_their_own_order_and_the_inverse_leads_back(monkeypatch):
    """CuPy's order is stable; NumPy's is where it is asked to be."""
    order = np.random.default_rng(0).permuted(np.tile(np.arange(7), (2, 3, 1)), axis=-1)
    np.testing.assert_array_equal(inverse(order), order.argsort(axis=-1))
    seen = []
    monkeypatch.setattr(stick_breaking, "inverse", lambda order: seen.append(order) or inverse(order))
    logits = np.tile([0.0, 1.0], (2, 50))
    create("disarm-sb")(Tensor(logits, requires_grad=True), lambda d: d.sum(axis=-1), Rng(0))
    alternating = [*range(0, 100, 2), *range(1, 100, 2)]
    np.testing.assert_array_equal(seen[0].reshape(2, 100), [alternating, alternating])
