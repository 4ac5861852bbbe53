"""MuProp has no variance on a linear cost."""

import numpy as np

import ladder
from estimators import categorical
from estimators.muprop import muprop_gradient
from estimators.score_function import reinforce_gradient
from minigrad.fused import softmax_array


def test_muprop_has_no_variance_on_a_linear_cost_and_reinforce_has():
    problem = ladder.Problem("categorical", 2, 4, "linear")
    outcomes, f = categorical.outcomes((1, 2, 4)), problem.values(categorical.outcomes((1, 2, 4)))
    p = np.broadcast_to(softmax_array(problem.logits), outcomes.shape)
    g = muprop_gradient(p, outcomes, f, problem.values(p[:1]), problem.a.reshape(1, 2, 4))
    assert g.std(axis=0).max() < 1e-14
    assert reinforce_gradient(p, outcomes, f).std(axis=0).max() > 0.1
