"""ZGR is ReinMax, sample by sample."""

import numpy as np

from estimators.reinmax import reinmax
from estimators.zgr import zgr
from small_problem import rule, samples


def test_reinmax_is_zgr():
    _, logits, d, g = samples()
    np.testing.assert_allclose(rule(zgr, logits, d, g=g), rule(reinmax, logits, d, g=g), atol=1e-14)
