"""ReinMax-Rao and ReinMax-CV: conditional means, variance, masks, and options that reach the rules."""

import numpy as np
import pytest

from estimators import create
from estimators.reinmax import reinmax
from estimators.reinmax_variants import reinmax_cv, reinmax_rao
from ladder import z_between
from minigrad import Rng, Tensor
from minigrad.fused import softmax_array, softmax_vjp
from small_problem import THETA, WEIGHT, N, assert_draws_alike, dcost, drawn, gumbel, hard, rule, three


def test_reinmax_rao_is_gumbel_rao_at_the_middle_point(rng):
    """Given D: the mean of 2 (1/τ) J(softmax(Q/τ)) g over Q ~ θ_D + G | argmax = D, by rejection, minus ½ J(p) g."""
    logits, d, g, tau = THETA, np.eye(4)[2], np.array([0.3, -1.0, 0.7, 0.2]), 0.7
    p = softmax_array(logits)
    middle = np.log(0.5 * (p + d))
    q = middle + rng.gumbel(size=(N, 4))
    q = q[q.argmax(axis=-1) == 2]
    drawn = 2.0 / tau * softmax_vjp(softmax_array(q / tau), g) - 0.5 * softmax_vjp(p, g)
    made = rule(reinmax_rao, np.tile(logits, (N, 1)), np.tile(d, (N, 1)), rng.exponential(size=(1, N, 4)),
                g=np.tile(g, (N, 1)), tau=tau)  # fmt: skip
    assert np.abs(z_between(made, drawn)).max() < 4.5


def test_reinmax_cv_is_reinmax_without_its_scale_and_raises_the_variance_with_it(rng):
    logits, gumbel, d = (x[: N // 4] for x in drawn(rng))
    g, e = dcost(d), rng.exponential(size=(3, N // 4, 4))
    plain = rule(reinmax, logits, d, g=g)
    np.testing.assert_allclose(rule(reinmax_cv, logits, d, e, gumbel, g=g, scale=0.0), plain, atol=1e-12)
    corrected = rule(reinmax_cv, logits, d, e, gumbel, g=g, tau=0.7, scale=1.0)
    assert np.abs(z_between(corrected, plain)).max() > 20  # its mean given D is not that of ReinMax: a bias …
    assert (corrected.var(axis=0) > plain.var(axis=0)).all()  # … and no gain in variance


def test_a_masked_class_has_no_part_in_reinmax_rao_at_high_temperatures():
    mask = np.array([True, True, True, False])
    spread = []
    for theta, m in ((np.array([0.4, -0.6, 0.9, 3.0]), mask), (np.array([0.4, -0.6, 0.9]), None)):
        logits = Tensor(np.broadcast_to(theta, (20_000, 1, len(theta))).copy(), requires_grad=True)
        cost = lambda d: ((d[..., :3] * WEIGHT[:3]).sum(axis=(1, 2)) + 0.5) ** 3.0
        create("reinmax-rao:tau=100")(logits, cost, Rng(2), mask=m).sum().backward()
        spread.append(logits.grad[:, 0, :3])
    assert np.abs(z_between(*spread)).max() < 4.5
    np.testing.assert_allclose(spread[0].sum(axis=-1), 0.0, atol=1e-10)


def test_options_that_choose_another_noise():
    logits = np.broadcast_to(THETA, (N // 10, 4)).copy()
    g = {}
    for kind in ("forward", "fresh"):
        theta = Tensor(logits, requires_grad=True)
        create(f"reinmax-cv:gs_noise={kind}").sample(theta, Rng(0)).backward(
            np.broadcast_to(WEIGHT, logits.shape).copy()
        )
        g[kind] = theta.grad
    assert np.abs(z_between(g["forward"], g["fresh"])).max() > 10


@pytest.mark.parametrize(
    ("spec", "family", "expected"),
    [
        ("reinmax-rao:tau=2,samples=3", "categorical", lambda x, r: reinmax_rao(x, hard(x, r), three(x, r), tau=2.0)),
        (
            "reinmax-cv:tau=2,samples=3,scale=0.5",
            "categorical",
            lambda x, r: reinmax_cv(x, hard(x, r), three(x, r), gumbel(x, r), tau=2.0, scale=0.5),
        ),
    ],
)
def test_the_options_of_a_sampler_reach_its_rule(spec, family, expected):
    assert_draws_alike(create(spec, family=family).sample, expected, family)
