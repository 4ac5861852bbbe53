"""Estimators against the exact gradient: by enumeration where the randomness is discrete, by quadrature where it is
one-dimensional, and otherwise by Monte Carlo in units of standard errors, with a fixed seed."""

from devsim import DevsimBackend, forbid
from estimators import ESTIMATORS, create, facts
from estimators.categorical import conditional_gumbel, log_probability
from estimators.exact import enumerate_codes, exact_gradient
from estimators.gapped import expected_gap, gapped_logits, gapped_straight_through
from estimators.gumbel_rao import gumbel_rao
from estimators.gumbel_softmax import gumbel_softmax, st_gumbel_softmax
from estimators.local_expectation import local_expectation_gradient
from estimators.muprop import muprop_gradient, simple_muprop_gradient
from estimators.reinmax import reinmax
from estimators.score_function import reinforce_gradient, rloo_gradient
from estimators.straight_through import straight_through
from estimators.zgr import zgr
from minigrad import Rng, Tensor, no_grad
from minigrad.backend import Backend
from minigrad.fused import log_softmax, softmax_array, softmax_vjp

import numpy as np
import pytest
from scipy import stats

L, K = 2, 4
_rng = np.random.default_rng(5)
LOGITS = _rng.standard_normal((L, K))
A = _rng.standard_normal(L * K)
M = _rng.standard_normal((L * K, L * K))

# Costs on all variables jointly: f and ∇f, for d (N, L, K)
COSTS = {
    "linear": (lambda d: flat(d) @ A, lambda d: np.broadcast_to(A, flat(d).shape)),
    "quadratic": (
        lambda d: flat(d) @ A + np.einsum("ni,ij,nj->n", flat(d), M, flat(d)),
        lambda d: A + flat(d) @ (M + M.T),
    ),
    "cubic": (lambda d: (flat(d) @ A + 0.3) ** 3, lambda d: 3 * ((flat(d) @ A + 0.3) ** 2)[:, None] * A),
}


def flat(d):
    return d.reshape(len(d), -1)


def gradient_of(cost, d):
    return COSTS[cost][1](d).reshape(d.shape)


def joint(logits):
    """All joint outcomes (N, L, K) and their probabilities (N,)."""
    codes = enumerate_codes(*logits.shape)
    return codes, np.prod((softmax_array(logits) * codes).sum(axis=-1), axis=-1)


def exact(cost, logits=LOGITS):
    codes, q = joint(logits)
    f = COSTS[cost][0](codes)
    return np.einsum("n,nlk->lk", q * f, codes - softmax_array(logits))


def rule(op, *arrays, g, **settings):
    """What an estimator's rule passes back to the logits."""
    _, backward = op.rule(*arrays, **settings)
    d = backward(g)
    d = d[0] if isinstance(d, tuple) else d
    return d() if callable(d) else d


def test_the_oracle_is_the_derivative_of_the_expectation():
    for cost in COSTS:
        numeric = np.zeros_like(LOGITS)
        for at in np.ndindex(LOGITS.shape):
            values = []
            for h in (1e-6, -1e-6):
                moved = LOGITS.copy()
                moved[at] += h
                codes, q = joint(moved)
                values.append(q @ COSTS[cost][0](codes))
            numeric[at] = (values[0] - values[1]) / 2e-6
        np.testing.assert_allclose(exact(cost), numeric, rtol=1e-7, atol=1e-8)


# ---- the exactness ladder: enumeration to 1e-12, and both answers asserted


def enumerated(gradient_at):
    """Σ_D q(D) gradient(D) over all joint outcomes; gradient_at maps (N, L, K) to (N, L, K)."""
    codes, q = joint(LOGITS)
    return np.einsum("n,nlk->lk", q, gradient_at(codes))


def mean_gradient(name, cost):
    f, logits = COSTS[cost][0], np.broadcast_to(LOGITS, (K**L, L, K))
    p = softmax_array(logits)
    if name == "exact":
        codes, _ = joint(LOGITS)
        return exact_gradient(p[:1], codes, f(codes)[None])[0][0]
    if name.startswith("reinforce"):
        return enumerated(lambda d: reinforce_gradient(p, d, f(d), baseline=0.7))
    if name == "rloo":
        codes, q = joint(LOGITS)
        total = 0.0
        for d1, q1 in zip(codes, q, strict=True):
            pair = np.stack([np.broadcast_to(d1, codes.shape), codes])
            g = rloo_gradient(p, pair, np.stack([f(pair[0]), f(pair[1])]))
            total = total + q1 * np.einsum("n,nlk->lk", q, g)
        return total
    if name in ("muprop", "muprop-simple"):
        at_p, df = f(p[:1]), gradient_of(cost, p[:1])
        if name == "muprop":
            return enumerated(lambda d: muprop_gradient(p, d, f(d), at_p, df))
        return enumerated(lambda d: simple_muprop_gradient(p, d, f(d), at_p))
    if name == "local-expectation":
        return enumerated(lambda d: local_expectation_gradient(p, local_costs(f, d)))
    op, settings = {
        "st": (straight_through, {}),
        "reinmax": (reinmax, {}),
        "zgr": (zgr, {}),
        "gst-1.0": (gapped_straight_through, {"gap": 1.0}),
        "gst": (gapped_straight_through, {"gap": 0.5}),
        "gst-p": (gapped_straight_through, {"gap": "p"}),
    }[name]
    return enumerated(lambda d: rule(op, logits, d, g=gradient_of(cost, d), **settings))


def local_costs(f, d):
    """F (N, L, K): f with each variable in turn set to each class."""
    costs = np.empty(d.shape)
    for l, k in np.ndindex(d.shape[1:]):
        moved = d.copy()
        moved[:, l] = np.eye(d.shape[2])[k]
        costs[:, l, k] = f(moved)
    return costs


EXACT_ON = {
    "all": {"linear", "quadratic", "cubic"},
    "quadratic": {"linear", "quadratic"},
    "linear": {"linear"},
    "none": set(),
}
CONTINUOUS = {"gumbel-softmax", "st-gs", "gumbel-rao"}


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("name", [n for n in ESTIMATORS if n not in CONTINUOUS])
def test_exactness_ladder(name, cost):
    error = np.abs(mean_gradient(name, cost) - exact(cost)).max()
    if cost in EXACT_ON[facts(name).exact_for]:
        assert error < 1e-12
    else:
        assert error > 1e-3


def quadrature(h, logits):
    """E h(G) over the Gumbel noise of one binary variable. Only G₁ − G₂ matters, which is logistic; its quantile u is
    split where the sample changes sides, so that Gauss-Legendre sees smooth pieces."""
    nodes, weights = np.polynomial.legendre.leggauss(300)
    split = 1.0 / (1.0 + np.exp(logits[0] - logits[1]))
    total = 0.0
    for low, high in ((0.0, split), (split, 1.0)):
        # u = low + (high−low) s²(3−2s) flattens the logarithmic ends of logit(u)
        s = (nodes + 1) / 2
        u, du = low + (high - low) * s * s * (3 - 2 * s), (high - low) * 6 * s * (1 - s) / 2
        gumbel = np.stack([np.log(u) - np.log1p(-u), np.zeros_like(u)], axis=-1)
        total = total + np.einsum("n,nk->k", weights * du, h(gumbel))
    return total


BINARY = np.array([0.4, -0.3])
BINARY_COSTS = {
    "linear": (lambda y: y @ [1.0, -0.5], lambda y: np.broadcast_to([1.0, -0.5], y.shape)),
    "quadratic": (lambda y: (y @ [1.0, -0.5]) ** 2, lambda y: 2 * (y @ [1.0, -0.5])[:, None] * [1.0, -0.5]),
    "cubic": (lambda y: (y @ [1.0, -0.5]) ** 3, lambda y: 3 * ((y @ [1.0, -0.5]) ** 2)[:, None] * [1.0, -0.5]),
}


@pytest.mark.parametrize("cost", BINARY_COSTS)
@pytest.mark.parametrize("op", [gumbel_softmax, st_gumbel_softmax], ids=["gumbel-softmax", "st-gs"])
def test_exactness_ladder_of_continuous_noise(op, cost):
    """By quadrature: both are biased for the discrete cost, and Gumbel-Softmax is exact for the relaxed one.
    Gumbel-Rao has the mean of ST Gumbel-Softmax (below), and with it the bias."""
    f, df = BINARY_COSTS[cost]
    tau = 0.8
    assert facts("gumbel-softmax").exact_for == facts("st-gs").exact_for == facts("gumbel-rao").exact_for == "none"

    def gradient(gumbel):
        logits = np.broadcast_to(BINARY, gumbel.shape)
        y, _ = op.rule(logits, gumbel, tau=tau)
        return rule(op, logits, gumbel, g=df(y), tau=tau)

    mean = quadrature(gradient, BINARY)
    discrete = softmax_vjp(softmax_array(BINARY), f(np.eye(2)))
    assert np.abs(mean - discrete).max() > 1e-3
    if op is gumbel_softmax:
        relaxed = [
            quadrature(lambda g, m=BINARY + h: f(softmax_array((m + g) / tau))[:, None] * np.ones(2), BINARY + h)[0]
            for h in (np.array([1e-5, 0]), np.array([-1e-5, 0]))
        ]
        assert mean[0] == pytest.approx((relaxed[0] - relaxed[1]) / 2e-5, abs=1e-6)


# ---- agreements, sample by sample


def samples(n=500, k=4, seed=0):
    rng = np.random.default_rng(seed)
    logits = 1.5 * rng.standard_normal((n, k))
    d = np.eye(k)[(logits + rng.gumbel(size=(n, k))).argmax(axis=-1)]
    return rng, logits, d, rng.standard_normal((n, k))


def test_reinmax_is_half_straight_through_and_half_linearised_score_function():
    _, logits, d, g = samples()
    p = softmax_array(logits)
    expected = 0.5 * softmax_vjp(p, g) + 0.5 * (g * (d - p)).sum(axis=-1, keepdims=True) * (d - p)
    np.testing.assert_allclose(rule(reinmax, logits, d, g=g), expected, atol=1e-14)


def test_reinmax_is_zgr():
    _, logits, d, g = samples()
    np.testing.assert_allclose(rule(zgr, logits, d, g=g), rule(reinmax, logits, d, g=g), atol=1e-14)


def test_muprop_has_no_variance_on_a_linear_cost_and_reinforce_has():
    f, df = COSTS["linear"]
    codes, _ = joint(LOGITS)
    p = np.broadcast_to(softmax_array(LOGITS), codes.shape)
    at_p = f(p[:1])
    spread = muprop_gradient(p, codes, f(codes), at_p, df(p[:1]).reshape(1, L, K)).std(axis=0)
    assert spread.max() < 1e-14
    assert reinforce_gradient(p, codes, f(codes)).std(axis=0).max() > 0.1


def test_local_expectation_is_the_measure_valued_derivative_and_exact_for_one_variable():
    p, F = softmax_array(THETA), (WEIGHT + 0.5) ** 3
    weak = [p[j] * (1 - p[j]) * (F[j] - np.delete(p * F, j).sum() / (1 - p[j])) for j in range(4)]
    np.testing.assert_allclose(local_expectation_gradient(p, F), weak, atol=1e-14)
    np.testing.assert_allclose(weak, true_gradient(), atol=1e-14)


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


def test_gst_keeps_consistency_and_the_gap():
    _, logits, d, _ = samples()
    for gap in (0.0, 0.8, 1.0, expected_gap(logits, d)):
        shifted = gapped_logits(logits, d, gap)
        drawn = (shifted * d).sum(axis=-1)
        best_other = np.where(d > 0, -np.inf, shifted).max(axis=-1)
        assert (drawn - best_other >= np.squeeze(gap) - 1e-12).all()
        np.testing.assert_allclose(drawn, logits.max(axis=-1))
        m1 = (logits.max(axis=-1, keepdims=True) - logits) * d  # the paper's two terms
        m2 = np.maximum(logits - logits.max(axis=-1, keepdims=True) + gap, 0.0) * (1 - d)
        np.testing.assert_allclose(shifted, logits + m1 - m2, atol=1e-12)


def test_the_gap_of_gst_p_is_the_mean_gap_that_gumbel_noise_leaves():
    logits = np.array([0.5, -0.2, 0.1, -1.0])
    q = np.sort(logits + np.random.default_rng(1).gumbel(size=(400_000, 4)), axis=-1)
    raw = logits + np.random.default_rng(1).gumbel(size=(400_000, 4))
    winner, gap = raw.argmax(axis=-1), q[:, -1] - q[:, -2]
    for i in range(4):
        seen = gap[winner == i]
        standard_error = seen.std() / np.sqrt(seen.size)
        assert abs(seen.mean() - expected_gap(logits, np.eye(4)[i])[0]) < 4.5 * standard_error + 2e-5


@pytest.mark.parametrize("op", [straight_through, reinmax, gapped_straight_through])
def test_gradients_sum_to_zero_over_the_classes(op):
    _, logits, d, g = samples()
    for tau in (1.0, 1.7):
        np.testing.assert_allclose(rule(op, logits, d, g=g, tau=tau).sum(axis=-1), 0.0, atol=1e-13)


# ---- Monte Carlo, in standard errors

N = 200_000
THETA = np.array([0.4, -0.6, 0.9, 0.1])
WEIGHT = np.array([1.0, -2.0, 0.5, 0.3])


def dcost(d):
    """∇f of f(d) = (d·w + ½)³, which differs from sample to sample."""
    return 3 * ((d @ WEIGHT + 0.5) ** 2)[:, None] * WEIGHT


def z_scores(x, mean):
    return (x.mean(axis=0) - mean) / (x.std(axis=0) / np.sqrt(len(x)) + 1e-300)


def z_between(x, y):
    return (x.mean(axis=0) - y.mean(axis=0)) / np.sqrt(x.var(axis=0) / len(x) + y.var(axis=0) / len(y))


def drawn(rng):
    logits = np.broadcast_to(THETA, (N, 4))
    gumbel = rng.gumbel(size=(N, 4))
    return logits, gumbel, np.eye(4)[(logits + gumbel).argmax(axis=-1)]


def test_gumbel_rao_has_the_mean_of_st_gumbel_softmax_and_less_variance(rng):
    logits, gumbel, d = drawn(rng)
    st_gs = rule(st_gumbel_softmax, logits, gumbel, g=dcost(d), tau=0.7)
    _, _, d2 = drawn(rng)
    rao = rule(gumbel_rao, logits, d2, rng.exponential(size=(5, N, 4)), g=dcost(d2), tau=0.7)
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


def test_conditional_gumbels_are_gumbels_given_the_outcome(rng):
    logits, gumbel, d = drawn(rng)
    for i in range(4):
        given = (logits + gumbel)[d[:, i] > 0][:20_000]
        made = conditional_gumbel(THETA, np.eye(4)[i], rng.exponential(size=(20_000, 4)))
        assert (made.argmax(axis=-1) == i).all()
        for j in range(4):
            assert stats.ks_2samp(given[:, j], made[:, j]).pvalue > 1e-3


# ---- through the adapters: one call for all of them


def call(name, n=N, seed=3, **options):
    """The gradients of n independent calls on a cubic cost, as one batch."""
    logits = Tensor(np.broadcast_to(THETA, (n, 1, 4)).copy(), requires_grad=True)
    cost = lambda d: ((d * WEIGHT).sum(axis=(1, 2)) + 0.5) ** 3.0
    value = create(name, **options)(logits, cost, Rng(seed))
    value.backward(np.ones(n))
    return value.data, logits.grad[:, 0]


def sampled(name, seen):
    """Of the points at which a cost was evaluated, the ones that are the estimator's samples: they come first, and
    what serves a control variate or a local enumeration after them."""
    return seen if name == "exact" else seen[: 2 if name == "rloo" else 1]


def true_gradient():
    return softmax_vjp(softmax_array(THETA), (WEIGHT + 0.5) ** 3)


@pytest.mark.parametrize("name", [n for n in ESTIMATORS if facts(n).exact_for == "all"])
def test_unbiased_estimators_are_unbiased_as_called(name):
    without_variance = name in ("exact", "local-expectation")  # the latter for a single variable
    value, g = call(name, n=2000 if without_variance else N)
    expected = softmax_array(THETA) @ (WEIGHT + 0.5) ** 3
    if without_variance:
        np.testing.assert_allclose(g, np.broadcast_to(true_gradient(), g.shape), atol=1e-12)
    else:
        assert np.abs(z_scores(g, true_gradient())).max() < 4.5
    if name == "exact":
        np.testing.assert_allclose(value, expected)
    else:
        assert abs(z_scores(value[:, None], expected)[0]) < 4.5


@pytest.mark.parametrize("name", [n for n in ESTIMATORS if facts(n).exact_for != "all"])
def test_biased_estimators_are_biased_as_called(name):
    _, g = call(name)
    assert np.abs(z_scores(g, true_gradient())).max() > 20


def test_reinforce_without_its_reward_would_fail_the_same_test():
    """The negative control for the two tests above: the score alone has mean zero."""
    d = Rng(3).one_hot(np.broadcast_to(THETA, (N, 4)))
    wrong = reinforce_gradient(np.broadcast_to(softmax_array(THETA), d.shape), d, np.ones(N))
    assert np.abs(z_scores(wrong, true_gradient())).max() > 20


@pytest.mark.parametrize("name", ESTIMATORS)
def test_the_forward_distribution_is_softmax(name):
    if name == "exact":
        pytest.skip("evaluates every outcome")
    seen = []

    def cost(d):
        seen.append(d.data)
        return (d * WEIGHT).sum(axis=(1, 2))

    logits = Tensor(np.broadcast_to(THETA, (20_000, 1, 4)).copy(), requires_grad=True)
    create(name)(logits, cost, Rng(8))
    for d in sampled(name, seen):
        if facts(name).support == "hard":
            assert np.array_equal(d.sum(axis=-1), np.ones((20_000, 1)))
            assert set(np.unique(d)) == {0.0, 1.0}
        else:
            np.testing.assert_allclose(d.sum(axis=-1), 1.0)
        counts = np.bincount(d[:, 0].argmax(axis=-1), minlength=4)
        assert stats.chisquare(counts, 20_000 * softmax_array(THETA)).pvalue > 1e-3
    evaluations = {"rloo": 2, "muprop": 2, "muprop-simple": 2, "local-expectation": 1 + 4}
    assert len(seen) == evaluations.get(name, 1)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_what_the_cost_depends_on_gets_its_gradient_from_the_sample_only(name):
    """∂value/∂W is ∂f/∂W at the points where the cost was evaluated, averaged: nothing leaks from the estimator."""
    w = Tensor(WEIGHT.copy(), requires_grad=True)
    points = []

    def cost(d):
        points.append(d.data)
        return ((d * w).sum(axis=(1, 2)) + 0.5) ** 2.0

    logits = Tensor(np.broadcast_to(THETA, (3, 1, 4)).copy(), requires_grad=True)
    create(name)(logits, cost, Rng(2)).sum().backward()
    points = sampled(name, points)
    weights = softmax_array(THETA) if name == "exact" else np.full(len(points), 1 / len(points))
    expected = sum(
        q * 2 * ((d @ WEIGHT + 0.5)[..., None] * d).sum(axis=(0, 1)) for q, d in zip(weights, points, strict=True)
    )
    np.testing.assert_allclose(w.grad, expected, rtol=1e-12)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_masked_classes_have_no_probability_and_no_gradient(name):
    mask = np.array([True, False, True, True, False])
    logits = np.array([0.4, 9.0, -0.6, 0.9, 3.0])
    cost = lambda d: ((d * np.array([1.0, 5.0, -2.0, 0.5, -7.0])).sum(axis=(1, 2)) + 0.5) ** 2.0

    def run(logits, mask, cost):
        x = Tensor(np.broadcast_to(logits, (500, 1, len(logits))).copy(), requires_grad=True)
        seen = []
        value = create(name)(x, lambda d: (seen.append(d.data), cost(d))[1], Rng(2), mask=mask)
        value.sum().backward()
        return value.data, x.grad[:, 0], seen

    value, g, seen = run(logits, mask, cost)
    assert np.isfinite(g).all()
    assert np.isfinite(value).all()
    assert (g[:, ~mask] == 0.0).all()
    assert np.abs(g[:, mask]).max() > 1e-3
    if name == "exact":  # the same as the problem without those classes
        _, small, _ = run(
            logits[mask], None, lambda d: ((d * np.array([1.0, -2.0, 0.5])).sum(axis=(1, 2)) + 0.5) ** 2.0
        )
        np.testing.assert_allclose(g[:, mask], small, atol=1e-12)
    else:
        assert all((d[..., ~mask] == 0.0).all() for d in sampled(name, seen))


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


@pytest.mark.parametrize("mask", [np.zeros(4, bool), np.array([[[True] * 4], [[False] * 4]]), np.ones(4)])
def test_a_bad_mask_is_refused(mask):
    logits = Tensor(np.zeros((2, 1, 4)), requires_grad=True)
    with pytest.raises((ValueError, TypeError), match="mask"):
        create("st").sample(logits, Rng(0), mask=mask)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", ESTIMATORS)
def test_extreme_logits_and_temperatures_stay_finite(name, dtype):
    rng = np.random.default_rng(3)
    for scale, tau, classes in [
        (1e4, None, 4),
        (1.0, 1e3, 4),
        (1e4, 1e3, 4),
        (1.0, 1e-3, 4),
        (1e4, 1e-3, 4),
        (1.0, None, 1),
    ]:
        if tau and ("tau" not in vars(create(name)) or (name == "reinmax" and tau < 1)):
            continue
        logits = Tensor((scale * rng.standard_normal((1, 2, classes))).astype(dtype), requires_grad=True)
        value = create(name, tau)(logits, lambda d: (d * d + d).sum(axis=(1, 2)), Rng(1))
        value.sum().backward()
        assert value.dtype == logits.grad.dtype == dtype
        assert np.isfinite(value.data).all()
        assert np.isfinite(logits.grad).all()


@pytest.mark.parametrize("name", ESTIMATORS)
def test_an_estimator_gives_the_same_bits_on_the_stand_in_device(name):
    results = []
    for backend in (Backend(), DevsimBackend()):
        start = backend.to_device(np.random.default_rng(0).standard_normal((5, 2, 3)).astype(np.float32))
        logits, weight = Tensor(start, requires_grad=True), backend.to_device(np.arange(3, dtype=np.float32))
        estimator = create(name)
        with forbid("sync", "d2h"):
            value = estimator(logits, lambda d, w=weight: ((d * w).sum(axis=(1, 2)) - 1.0) ** 2.0, Rng(4))
            value.sum().backward()
            estimator.update()
        results.append([backend.to_host(value.data), backend.to_host(logits.grad)])
    for a, b in zip(*results, strict=True):
        np.testing.assert_array_equal(a, b)


# ---- state, registry, small functions


def test_the_running_mean_uses_the_past_only_and_changes_only_in_update():
    estimator = create("reinforce-mean:decay=0.5")
    logits = Tensor(np.zeros((4, 1, 2)), requires_grad=True)
    constant = lambda c: lambda d: d.sum(axis=(1, 2)) * c
    estimator(logits, constant(8.0), Rng(0))
    assert estimator.mean == 0.0
    estimator.update()
    assert estimator.mean == 8.0
    estimator.update()  # nothing new was seen
    estimator(logits, constant(4.0), Rng(1)).sum().backward()
    d = Rng(1).one_hot(logits.data)
    np.testing.assert_allclose(logits.grad, (4.0 - 8.0) * (d - 0.5))
    estimator.update()
    assert estimator.mean == 6.0
    other = create("reinforce-mean:decay=0.5")
    other.load_state_dict(estimator.state_dict())
    assert (other.mean, other.started) == (6.0, True)
    new = create("reinforce-mean")
    new.load_state_dict(create("reinforce-mean").state_dict())  # saved before the first update
    x = Tensor(np.zeros((4, 1, 2), np.float32), requires_grad=True)
    assert new(x, constant(1.0), Rng(0)).dtype == np.float32
    with pytest.raises(ValueError, match="another estimator"):
        create("st").load_state_dict(estimator.state_dict())


def test_every_registered_estimator_states_its_facts():
    for name in ESTIMATORS:
        cls = facts(name)
        assert all((cls.title, cls.paper, cls.evaluations)), name
        assert cls.exact_for in EXACT_ON
        assert cls.support in ("hard", "soft")


@pytest.mark.parametrize(
    ("spec", "tau", "message"),
    [
        ("nonsense", None, "unknown estimator 'nonsense'; the known ones are exact, reinforce"),
        ("st", 0.0, "tau must be positive and finite, got 0"),
        ("st-gs", -1.0, "tau must be positive"),
        ("gumbel-rao", float("nan"), "tau must be positive"),
        ("gst-1.0", float("inf"), "tau must be positive"),
        ("reinmax", 0.5, "at least 1"),
        ("reinforce", 1.0, "reinforce has no option 'tau'"),
        ("rloo:samples=1", None, "at least 2"),
        ("gumbel-rao:samples=0", None, "at least 1"),
        ("gumbel-rao:draws=3", None, "no option 'draws'; its options are tau, samples"),
        ("gst:gap=-1", None, "gap must be"),
        ("gst:gap=wide", None, "gap must be"),
        ("st:tau=warm", None, "cannot take"),
        ("reinforce-mean:decay=1", None, "decay must be"),
        ("rloo:samples=inf", None, "samples must be an integer"),
        ("rloo:samples=abc", None, "samples must be an integer"),
        ("gst-1.0:gap=5", None, "gst-1.0 has no option 'gap'"),
        ("st:tau=2", 3.0, "'tau' .* given twice"),
    ],
)
def test_a_bad_estimator_is_refused_in_one_sentence(spec, tau, message):
    with pytest.raises(ValueError, match=message) as caught:
        create(spec, tau)
    assert "\n" not in str(caught.value)


def test_options_in_the_name_reach_the_estimator():
    assert create("rloo:samples=4").samples == 4
    assert create("gst:gap=0.8,tau=0.5").gap == 0.8
    assert create("gst-p", 0.5).gap == "p"


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("axes", [2, (0, 1, 2)])
def test_a_cost_that_is_not_per_example_is_refused(name, axes):
    logits = Tensor(np.zeros((3, 1, 4)), requires_grad=True)
    with pytest.raises(ValueError, match="one value per example"):
        create(name)(logits, lambda d: d.sum(axis=axes), Rng(0))


@pytest.mark.parametrize("name", ESTIMATORS)
def test_values_can_be_computed_without_a_graph(name):
    with no_grad():
        value = create(name)(Tensor(np.zeros((3, 1, 4))), lambda d: (d * WEIGHT).sum(axis=(1, 2)), Rng(0))
    assert value.shape == (3,)
    assert not value.requires_grad


def test_exact_refuses_too_many_outcomes():
    logits = Tensor(np.zeros((1, 30, 10)), requires_grad=True)
    with pytest.raises(ValueError, match=r"10\*\*30 outcomes"):
        create("exact")(logits, lambda d: d.sum(axis=(1, 2)), Rng(0))


def test_log_probability_sums_over_the_variables():
    log_p = log_softmax(LOGITS).data
    codes, q = joint(LOGITS)
    np.testing.assert_allclose(np.exp(log_probability(log_p, codes)), q)
