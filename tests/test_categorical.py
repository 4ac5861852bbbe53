"""One-hots: the law of the conditional Gumbels, what a mask leaves of the rules, and masks that are refused."""

import numpy as np
import pytest
from scipy import stats

from estimators import create
from estimators.categorical import conditional_gumbel
from estimators.gapped import gapped_straight_through
from estimators.reinmax import reinmax
from estimators.straight_through import straight_through
from minigrad import Rng, Tensor
from small_problem import THETA, drawn, rule, samples


def test_conditional_gumbels_are_gumbels_given_the_outcome(rng):
    logits, gumbel, d = drawn(rng)
    for i in range(4):
        given = (logits + gumbel)[d[:, i] > 0][:20_000]
        made = conditional_gumbel(THETA, np.eye(4)[i], rng.exponential(size=(20_000, 4)))
        assert (made.argmax(axis=-1) == i).all()
        for j in range(4):
            assert stats.ks_2samp(given[:, j], made[:, j]).pvalue > 1e-3


@pytest.mark.parametrize(
    ("op", "settings"),
    [(straight_through, {}), (reinmax, {}), (gapped_straight_through, {}), (gapped_straight_through, {"gap": "p"})],
)
def test_masking_a_class_is_leaving_it_out(op, settings):
    _, logits, d, g = samples(k=3)
    far = np.full((len(d), 1), -1e30)
    full = rule(
        op,
        np.concatenate([logits, far], 1),
        np.concatenate([d, 0 * far], 1),
        g=np.concatenate([g, far * 0 + 3], 1),
        **settings,
    )
    np.testing.assert_allclose(full[:, :3], rule(op, logits, d, g=g, **settings), atol=1e-14)
    assert (full[:, 3] == 0).all()


@pytest.mark.parametrize(
    "mask",
    [
        np.zeros(4, bool),
        np.array([[[True] * 4], [[False] * 4]]),
        np.ones(4),
        np.ones(3, bool),
        np.ones((1, 2, 1, 4), bool),
    ],
)
def test_a_bad_mask_is_refused(mask):
    logits = Tensor(np.zeros((2, 1, 4)), requires_grad=True)
    with pytest.raises((ValueError, TypeError), match="mask"):
        create("st").sample(logits, Rng(0), mask=mask)
    with pytest.raises(ValueError, match="a bit has none to spare"):
        create("st", family="bernoulli").sample(logits, Rng(0), mask=mask)
