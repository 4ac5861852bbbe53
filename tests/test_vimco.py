"""VIMCO replaces each sample by the geometric mean of the others."""

import numpy as np

from estimators.vimco import vimco_gradient


def test_vimco_replaces_each_sample_by_the_geometric_mean_of_the_others():
    rng = np.random.default_rng(0)
    costs, ds, p = rng.standard_normal((3, 5)), rng.random((3, 5, 2)), rng.random((5, 2))
    expected = np.zeros((5, 2))
    for b in range(5):
        bound = np.log(np.mean(np.exp(-costs[:, b])))
        for s in range(3):
            others = [-costs[t, b] for t in range(3) if t != s]
            without = np.log(np.mean(np.exp([*others, np.mean(others)])))
            expected[b] -= (bound - without) * (ds[s, b] - p[b])
    np.testing.assert_allclose(vimco_gradient(p, ds, costs), expected)
