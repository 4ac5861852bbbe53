"""Gumbel-Rao: ST Gumbel-Softmax for one draw and in the mean, less variance, ReinMax as τ → 0; a wrong derivative."""

import numpy as np
import pytest

from estimators import create
from estimators.categorical import conditional_gumbel
from estimators.enumeration import Given
from estimators.gumbel_rao import gumbel_rao
from estimators.gumbel_softmax import st_gumbel_softmax
from estimators.reinmax import reinmax
from estimators.straight_through import straight_through
from ladder import z_between, z_scores
from minigrad import Rng, Tensor
from minigrad.fused import softmax_array, softmax_vjp
from small_problem import THETA, WEIGHT, N, assert_draws_alike, dcost, drawn, hard, rule, samples, three


def test_gumbel_rao_with_one_draw_is_st_gumbel_softmax_given_its_noise():
    rng, logits, _, g = samples()
    gumbel = rng.gumbel(size=logits.shape)
    q = logits + gumbel
    d = np.eye(4)[q.argmax(axis=-1)]
    top = q.max(axis=-1, keepdims=True)
    z = np.exp(logits).sum(axis=-1, keepdims=True)
    # the exponentials from which conditional_gumbel would have made this very Q
    e = np.where(d > 0, z * np.exp(-top), np.exp(logits) * (np.exp(-q) - np.exp(-top)) + d)
    np.testing.assert_allclose(conditional_gumbel(logits, d, e[None])[0], q, rtol=1e-8, atol=1e-8)
    np.testing.assert_allclose(
        rule(gumbel_rao, logits, d, e[None], g=g, tau=0.7),
        rule(st_gumbel_softmax, logits, gumbel, g=g, tau=0.7),
        rtol=1e-6,
        atol=1e-9,
    )


def test_gumbel_rao_has_the_mean_of_st_gumbel_softmax_and_less_variance(rng):
    logits, gumbel, d = drawn(rng)
    st_gs = rule(st_gumbel_softmax, logits, gumbel, g=dcost(d), tau=0.7)
    _, _, d2 = drawn(rng)
    rao = rule(gumbel_rao, logits, d2, rng.exponential(size=(2, N, 4)), g=dcost(d2), tau=0.7)
    assert np.abs(z_between(st_gs, rao)).max() < 4.5
    assert (rao.var(axis=0) < st_gs.var(axis=0)).all()


def test_gumbel_rao_with_the_total_derivative_has_another_mean(rng):
    """The negative control: differentiating the conditional Gumbels, as the paper's sentence asks, must fail."""
    logits, gumbel, d = drawn(rng)
    st_gs = rule(st_gumbel_softmax, logits, gumbel, g=dcost(d), tau=1.0)
    e = rng.exponential(size=(N, 4))
    u = softmax_vjp(softmax_array(conditional_gumbel(logits, d, e[None])[0]), dcost(d))  # the cotangent at Q
    p, z = softmax_array(logits), np.exp(logits).sum(axis=-1, keepdims=True)
    a, b = e * np.exp(-logits), (e * d).sum(axis=-1, keepdims=True) / z
    r = a / (a + b)
    u_drawn = (u * d).sum(axis=-1, keepdims=True)
    total = p * (u_drawn + ((1 - d) * u * (1 - r)).sum(axis=-1, keepdims=True)) + (1 - d) * u * r
    # first, that this is the derivative of Q: by differences, on a few samples
    for j in range(4):
        step = 1e-6 * np.eye(4)[j]
        up, down = (conditional_gumbel(logits[:5] + s, d[:5], e[None, :5])[0] for s in (step, -step))
        np.testing.assert_allclose(total[:5, j], (u[:5] * (up - down)).sum(axis=-1) / 2e-6, rtol=1e-6, atol=1e-8)
    assert np.abs(z_between(st_gs, total)).max() > 20


def test_gumbel_rao_becomes_reinmax_as_the_temperature_goes_to_zero(rng):
    """Given one outcome D, so that only the conditional noise is averaged."""
    d = np.broadcast_to(np.eye(4)[0], (N, 4))
    logits, g = np.broadcast_to(THETA, (N, 4)), np.broadcast_to([0.3, -1.0, 0.7, 0.2], (N, 4))
    rao = rule(gumbel_rao, logits, d, rng.exponential(size=(1, N, 4)), g=g, tau=0.005)
    limit = rule(reinmax, logits[:1], d[:1], g=g[:1])[0]
    scores = np.abs(z_scores(rao, limit))
    assert scores.max() < 4.5
    wrong = rule(straight_through, logits[:1], d[:1], g=g[:1])[0]
    assert np.abs(z_scores(rao, wrong)).max() > 10


def test_more_draws_of_gumbel_rao_leave_less_variance():
    d = np.broadcast_to(np.eye(4)[1], (4000, 1, 4))
    spread = {}
    for draws in (1, 50):
        estimator = create(f"gumbel-rao:samples={draws}")
        g = gradients_given(estimator, d)
        spread[draws] = g.var(axis=0).sum()
    assert spread[50] < 0.05 * spread[1]


def gradients_given(estimator, d):
    """The gradients given one outcome, with the conditional noise as it is drawn."""
    logits = Tensor(np.broadcast_to(THETA, d.shape).copy(), requires_grad=True)
    rng = Given(samples=[d], rng=Rng(0))
    estimator(logits, lambda x: (x * WEIGHT).sum(axis=(1, 2)), rng).sum().backward()
    return logits.grad


@pytest.mark.parametrize(
    ("spec", "family", "expected"),
    [
        ("gumbel-rao:tau=2,samples=3", "categorical", lambda x, r: gumbel_rao(x, hard(x, r), three(x, r), tau=2.0)),
    ],
)
def test_the_options_of_a_sampler_reach_its_rule(spec, family, expected):
    assert_draws_alike(create(spec, family=family).sample, expected, family)
