"""Units that are no bits: the noise that an option chooses."""

import numpy as np
from scipy import stats

from estimators import create
from minigrad import Rng, Tensor


def test_options_that_choose_another_noise():
    a = Tensor(np.zeros((20_000, 1)))
    for noise, law in (("logistic", stats.logistic), ("normal", stats.norm)):
        h = create(f"noisy-rectifier:noise={noise}").sample(a, Rng(0)).data
        positive = h[h > 0]
        assert abs(len(positive) / 20_000 - 0.5) < 0.02
        assert stats.kstest(positive, lambda x, law=law: 2 * law.cdf(x) - 1).pvalue > 1e-3
