"""ARS and ARSM: nothing without cost differences, and a reference that changes from call to call."""

import numpy as np

from estimators import create
from estimators.arsm import arsm_gradient
from minigrad import Rng, Tensor
from small_problem import one_cost


def test_arsm_and_its_relatives_are_exactly_zero_without_cost_differences():
    pi = np.random.default_rng(0).dirichlet(np.ones(4), size=(7, 3))
    np.testing.assert_allclose(arsm_gradient(pi, np.full((7, 4, 4), 2.5)), 0.0, atol=1e-14)


def test_the_reference_of_ars_changes_from_call_to_call():
    """Both variables of an example share their cost differences: divided by 1 − K π_j with the right j, they agree."""
    seen = set()
    for step in range(30):
        rng = Rng(0).at(step)
        j = int(rng.site("reference").permutation(4)[0])
        logits = Tensor(np.zeros((50, 2, 4)), requires_grad=True)
        create("ars")(logits, one_cost, rng).sum().backward()
        pi = rng.exponential(logits.shape, like=logits.data)
        pi = pi / pi.sum(axis=-1, keepdims=True)
        shared = logits.grad / (1 - 4 * pi[..., j, None])
        np.testing.assert_allclose(shared[:, 0], shared[:, 1], atol=1e-9)
        assert np.abs(shared).max() > 0.1
        seen.add(j)
    assert seen == {0, 1, 2, 3}
