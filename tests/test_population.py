"""The population problem: its closed forms against finite differences, integrals, the tape's draws, and descent."""

import itertools
import math

import numpy as np
import pytest
import scipy.integrate
import scipy.stats

from minigrad import Tensor
from minigrad.hard import hard_step
from models import population
from models.population import PROXIES, coarse_gradient, gradient_v, gradient_w, loss, spurious_minimum
from registry import quick

normal = scipy.stats.norm.pdf
PHI = scipy.stats.norm.cdf


def problem(seed, m=4, n=5):
    """(v, w, v*, w*) without any symmetry, so that no term of a formula vanishes."""
    rng = np.random.default_rng(seed)
    v, w, v_star, w_star = (rng.standard_normal(size) for size in (m, n, m, n))
    return v, w, v_star, w_star / np.linalg.norm(w_star)


def rotated(theta, norm, w_star):
    """w of this norm at the angle θ to w*."""
    across = np.eye(len(w_star))[0] - w_star[0] * w_star
    return norm * (math.cos(theta) * w_star + math.sin(theta) * across / np.linalg.norm(across))


PROBLEMS = [problem(0), problem(1, m=2, n=2), problem(2, m=1, n=3), problem(5, m=6, n=4)]
each_problem = pytest.mark.parametrize("given", PROBLEMS, ids=lambda given: f"{len(given[0])}x{len(given[1])}")


# ---- the loss


def joint_bits(theta):
    """P(s = 1), and P(s = s* = 1): a quadrant of a plane that is sheared, found by integration."""
    k = 1.0 / math.tan(theta)
    return scipy.integrate.quad(lambda x: normal(x) * PHI(k * x), 0.0, math.inf)[0]


@each_problem
def test_the_loss_is_the_sum_over_all_patterns_of_bits(given):
    """½ E (vᵀs − v*ᵀs*)², every pattern of the bits of two rows with its probability."""
    v, w, v_star, w_star = given
    both = joint_bits(float(population.angle(w, w_star)))
    row = {(1, 1): both, (1, 0): 0.5 - both, (0, 1): 0.5 - both, (0, 0): both}
    square = 0.0
    for i in range(len(v)):
        for j in range(len(v)):
            for (s, s_star), p in row.items():
                first = v[i] * s - v_star[i] * s_star
                if i == j:
                    square += p * first**2
                for (t, t_star), q in row.items():
                    square += (i != j) * p * q * first * (v[j] * t - v_star[j] * t_star)
    assert loss(*given) == pytest.approx(0.5 * square, rel=1e-9)


@each_problem
def test_the_gradients_are_those_of_the_loss(given):
    v, w, v_star, w_star = given
    h = 1e-6
    along_v = [loss(v + d, w, v_star, w_star) - loss(v - d, w, v_star, w_star) for d in h * np.eye(len(v))]
    along_w = [loss(v, w + d, v_star, w_star) - loss(v, w - d, v_star, w_star) for d in h * np.eye(len(w))]
    np.testing.assert_allclose(gradient_v(*given), np.array(along_v) / (2 * h), rtol=0, atol=1e-9)
    np.testing.assert_allclose(gradient_w(*given), np.array(along_w) / (2 * h), rtol=0, atol=1e-9)
    assert np.linalg.norm(gradient_w(*given)) > 0.01


# ---- coarse gradients

SLOPES = {
    "identity": lambda u: np.ones_like(u),
    "relu": lambda u: (u > 0).astype(float),
    "clipped_relu": lambda u: ((u > 0) & (u <= 1)).astype(float),
}


def sampled(given, proxy, draws, rng):
    """(mean, its standard error) of the gradient at w that the tape gives for each Z, with `hard_step`."""
    v, w, v_star, w_star = given
    Z = rng.standard_normal((draws, len(v), len(w)))
    weights = Tensor(np.repeat(w[None, :, None], draws, axis=0), requires_grad=True)  # its own w for each Z
    y = (hard_step(Tensor(Z) @ weights, proxy=proxy).reshape(draws, -1) * v).sum(axis=1)
    (0.5 * (y - ((Z @ w_star) > 0) @ v_star) ** 2).sum().backward()
    g = weights.grad[:, :, 0]
    return g.mean(axis=0), g.std(axis=0) / math.sqrt(draws)


@pytest.mark.parametrize("proxy", PROXIES)
@each_problem
def test_the_coarse_gradient_is_the_mean_of_the_tape_s(given, proxy):
    mean, error = sampled(given, proxy, 100_000, np.random.default_rng(5))
    assert (abs(mean - coarse_gradient(*given, proxy)) < 4.0 * error).all()
    assert np.linalg.norm(coarse_gradient(*given, proxy)) > 10.0 * np.linalg.norm(error)


@pytest.mark.parametrize("proxy", PROXIES)
@pytest.mark.parametrize("theta", [0.2, 1.3, 0.5 * math.pi, 2.9])
@pytest.mark.parametrize("norm", [0.1, 0.7, 3.0])
@pytest.mark.daily(12)
def test_the_moments_are_the_integrals_over_the_plane_of_w_and_w_star(proxy, theta, norm):
    w_star = np.array([0.6, 0.0, 0.8])
    m = population.moments(population.geometry(rotated(theta, norm, w_star), w_star), proxy)
    k, mu = 1.0 / math.tan(theta), lambda x: SLOPES[proxy](np.array(norm * x))
    edges = (-12.0, 0.0, min(1.0 / norm, 11.9), 12.0)
    integral = lambda f: sum(
        scipy.integrate.quad(lambda x: normal(x) * mu(x) * f(x), a, b, epsabs=1e-12)[0]
        for a, b in itertools.pairwise(edges)
    )
    assert m.mean.item() == pytest.approx(integral(lambda x: x), abs=1e-9)
    assert m.active.item() == pytest.approx(integral(lambda x: x * (x > 0)), abs=1e-9)
    assert m.along.item() == pytest.approx(integral(lambda x: x * PHI(k * x)), abs=1e-9)  # y > −kx, θ in (0, π)
    assert m.across.item() == pytest.approx(integral(lambda x: normal(k * x)), abs=1e-9)


@each_problem
def test_the_identity_and_the_relu_are_as_published(given):
    v, w, v_star, w_star = given
    unit, both = w / np.linalg.norm(w), v @ v_star
    root, theta = math.sqrt(2.0 * math.pi), math.acos(unit @ w_star)
    np.testing.assert_allclose(coarse_gradient(*given, "identity"), (v @ v * unit - both * w_star) / root, atol=1e-14)
    h = v @ v + v.sum() ** 2 - v.sum() * v_star.sum() + both
    middle = (unit + w_star) / np.linalg.norm(unit + w_star)
    expected = h * unit / (2.0 * root) - math.cos(0.5 * theta) * both / root * middle
    np.testing.assert_allclose(coarse_gradient(*given, "relu"), expected, atol=1e-14)


@each_problem
def test_the_clipped_relu_becomes_the_relu_for_short_weights(given):
    """With ‖w‖ → 0 nothing is cut off: c = 1/‖w‖."""
    v, w, v_star, w_star = given
    short = v, 0.1 * w / np.linalg.norm(w), v_star, w_star
    np.testing.assert_allclose(coarse_gradient(*short, "clipped_relu"), coarse_gradient(*short, "relu"), atol=1e-15)
    long = v, 2.0 * w / np.linalg.norm(w), v_star, w_star
    assert abs(coarse_gradient(*long, "clipped_relu") - coarse_gradient(*long, "relu")).max() > 0.01


@each_problem
def test_every_coarse_gradient_points_as_the_true_one_does(given):
    v, w, v_star, w_star = given
    theta, norm = float(population.angle(w, w_star)), np.linalg.norm(w)
    identity, relu, clipped = (coarse_gradient(*given, proxy) @ gradient_w(*given) for proxy in PROXIES)
    expected = math.sin(theta) * (v @ v_star) ** 2 / ((2.0 * math.pi) ** 1.5 * norm)
    assert identity == pytest.approx(expected, rel=1e-12)
    assert relu == pytest.approx(0.5 * expected, rel=1e-12)
    assert 0.0 < clipped < relu


def test_all_functions_take_problems_beside_each_other():
    _, _, v_star, w_star = problem(0)
    rng = np.random.default_rng(1)
    v, w = rng.standard_normal((2, 3, 4)), rng.standard_normal((2, 3, 5))
    functions = (loss, gradient_v, gradient_w, *(lambda *a, p=p: coarse_gradient(*a, p) for p in PROXIES))
    for function in functions:
        together = function(v, w, v_star, w_star)
        for at in np.ndindex(2, 3):
            np.testing.assert_allclose(together[at], function(v[at], w[at], v_star, w_star), rtol=1e-12, atol=1e-15)


def test_an_unknown_proxy_is_refused():
    with pytest.raises(ValueError, match="unknown proxy 'triangle'; the known ones are identity, relu, clipped_relu"):
        coarse_gradient(*problem(0), "triangle")


# ---- minima


@each_problem
def test_at_the_global_minimum_everything_vanishes(given):
    _, _, v_star, w_star = given
    for norm in (0.4, 2.0):
        at = v_star, norm * w_star, v_star, w_star
        assert abs(loss(*at)) < 1e-14
        assert abs(gradient_v(*at)).max() < 1e-7  # θ of a rounded w is about 1e-8
        for proxy in PROXIES:
            assert abs(coarse_gradient(*at, proxy)).max() < 1e-7


@pytest.mark.parametrize("m", [2, 4, 7])
def test_at_the_spurious_minimum_only_the_identity_does_not_vanish(m):
    v_star, w_star = target(m, 0.4 * (m + 1)), np.array([0.0, 1.0, 0.0])
    assert population.has_spurious_minimum(v_star)
    v, w = spurious_minimum(v_star, w_star)
    for norm in (0.5, 1.0, 3.0):
        at = v, norm * w, v_star, w_star
        assert loss(*at) == pytest.approx(0.5 * v_star.sum() ** 2 / (m + 1), rel=1e-12)
        assert abs(gradient_v(*at)).max() < 1e-14
        for proxy in ("relu", "clipped_relu"):
            assert abs(coarse_gradient(*at, proxy)).max() < 1e-14
        expected = 2.0 * (m - 1) * v_star.sum() ** 2 / (math.sqrt(2.0 * math.pi) * (m + 1) ** 2)
        np.testing.assert_allclose(coarse_gradient(*at, "identity"), expected * w, atol=1e-14)


def target(m, ratio):
    """v* of length √m with (1ᵀv*)² = ratio·‖v*‖²."""
    across = np.arange(m) ** 2.0
    across -= across.mean()
    return math.sqrt(ratio / m) + across * math.sqrt(m - ratio) / np.linalg.norm(across)


@pytest.mark.parametrize("m", [2, 4, 7])
def test_the_spurious_minimum_is_one_exactly_under_the_condition(m):
    """Around it, the loss is above; beyond the condition there is a way down, by turning w alone."""
    rng, w_star = np.random.default_rng(0), np.array([0.0, 1.0, 0.0])
    for share in (0.98, 1.02):
        v_star = target(m, share * 0.5 * (m + 1))
        assert population.has_spurious_minimum(v_star) == (share < 1.0)
        v, w = spurious_minimum(v_star, w_star)
        at, moved = loss(v, w, v_star, w_star), 1e-3 * rng.standard_normal((100, 3))
        assert (loss(v, w + moved, v_star, w_star).min() > at) == (share < 1.0)
        both = loss(v + 1e-3 * rng.standard_normal((100, m)), w + moved, v_star, w_star)
        assert (both.min() > at) or share > 1.0
    v_star = np.where(np.arange(m) == 0, 1.0, np.where(np.arange(m) == 1, -1.0, 0.0))  # 1ᵀv* = 0
    assert not population.has_spurious_minimum(v_star)
    assert loss(*spurious_minimum(v_star, w_star), v_star, w_star) == pytest.approx(0.0, abs=1e-15)


@pytest.mark.parametrize(("m", "share"), quick((4,), (pytest.param(m, s) for m in (4, 2, 8) for s in (0.95, 1.05))))
def test_descent_with_the_identity_is_caught_exactly_where_it_is_said(m, share):
    """From w = −0.03 w*, which is as spurious as −w*: the loss does not depend on the length of w."""
    k = m / (m + 1)
    v_star, w_star = target(m, share * (m + 1) / (k + 2.0 + 2.0 * math.sqrt(2.0 * k - 1.0))), np.array([0.0, 1.0])
    assert population.catches_the_identity(v_star) == (share < 1.0)
    v, w = spurious_minimum(v_star, w_star)
    *_, (v, w) = population.descend(v + 0.01, 0.03 * w + 1e-4, v_star, w_star, "identity", 0.02, 4000)
    if share < 1.0:
        assert np.linalg.norm(w) < 0.1
        assert loss(v, w, v_star, w_star) > 0.9 * 0.5 * v_star.sum() ** 2 / (m + 1)
    else:
        assert loss(v, w, v_star, w_star) < 1e-8


@pytest.mark.parametrize("proxy", ["relu", "clipped_relu"])
def test_descent_with_the_other_proxies_stays_at_the_spurious_minimum(proxy):
    v_star, w_star = target(4, 1.5), np.array([0.0, 1.0])
    v, w = spurious_minimum(v_star, w_star)
    start = v + 0.01, w + np.array([0.02, 0.01])
    *_, end = population.descend(*start, v_star, w_star, proxy, 0.1, 1500)
    np.testing.assert_allclose(end[0], v, atol=1e-3)
    assert population.angle(end[1], w_star) > math.pi - 1e-3


def test_descent_yields_every_point_and_leaves_the_start_alone():
    v, w, v_star, w_star = problem(0)
    points = list(population.descend(v, w, v_star, w_star, "relu", 0.1, 3))
    assert len(points) == 4
    for (a, b), (c, d) in itertools.pairwise(points):
        np.testing.assert_array_equal(c, a - 0.1 * gradient_v(a, b, v_star, w_star))
        np.testing.assert_array_equal(d, b - 0.1 * coarse_gradient(a, b, v_star, w_star, "relu"))
    np.testing.assert_array_equal(v, problem(0)[0])
