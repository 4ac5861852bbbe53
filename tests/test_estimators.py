"""Estimators beside each other, beside their own definitions, and through the one call that all of them share.

Whether an estimator is unbiased is the matter of `test_exactness.py`. Here: agreements sample by sample, conditional
means in closed form, negative controls, the noise they draw, what they learn, and how they behave at the edges.
"""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

import ladder
from devsim import DevsimBackend, forbid
from estimators import ESTIMATORS, bernoulli, categorical, create, facts
from estimators.antithetic import (
    antithetic_samples,
    ar_gradient,
    arm_gradient,
    arms_gradient,
    dirichlet_copula,
    disarm_gradient,
)
from estimators.arsm import arsm_gradient
from estimators.base import value_and_grad
from estimators.categorical import conditional_gumbel
from estimators.darn import darn
from estimators.double_cv import double_cv_gradient
from estimators.enumeration import Given
from estimators.gapped import expected_gap, gapped_logits, gapped_straight_through
from estimators.gumbel_rao import gumbel_rao
from estimators.gumbel_softmax import decoupled_st_gumbel_softmax, gumbel_softmax, st_gumbel_softmax
from estimators.local_expectation import local_expectation_gradient
from estimators.muprop import muprop_gradient
from estimators.rebar import Network, SoftenedCost
from estimators.reinmax import reinmax
from estimators.reinmax_variants import reinmax_cv, reinmax_rao
from estimators.rodeo import flip_weights, rodeo_gradient
from estimators.score_function import minimum_variance_gradient, reinforce_gradient, rloo_gradient
from estimators.stick_breaking import first_one, sticks, sticks_vjp
from estimators.straight_through import straight_through
from estimators.unordered_set import set_weights, stochastic_beam_search
from estimators.vimco import vimco_gradient
from estimators.zgr import zgr
from minigrad import Rng, Tensor, no_grad
from minigrad.backend import Backend
from minigrad.fused import log_softmax, softmax_array, softmax_vjp

PAIRS = [pytest.param(n, c.name, id=f"{n}-{c.name}") for n in ESTIMATORS for c in facts(n).families]


def rule(op, *arrays, g, **settings):
    """What an estimator's rule passes back to the logits."""
    _, backward = op.rule(*arrays, **settings)
    d = backward(g)
    d = d[0] if isinstance(d, tuple) else d
    return d() if callable(d) else d


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


def test_darn_is_reinmax_and_zgr_for_a_bit():
    rng = np.random.default_rng(0)
    a, g = 1.5 * rng.standard_normal((2, 500))
    b = (rng.random(500) < 0.5).astype(float)
    expected = rule(darn, a, b, g=g)
    np.testing.assert_allclose(rule(reinmax, a, b, g=g, family=bernoulli), expected, atol=1e-14)
    np.testing.assert_allclose(rule(zgr, a, b, g=g, family=bernoulli), expected, atol=1e-14)
    np.testing.assert_allclose(expected, g * (b - 0.5) * (b - bernoulli.probability(a)), atol=1e-14)


SHARED = [straight_through, reinmax, zgr, gumbel_softmax, st_gumbel_softmax]


@pytest.mark.parametrize("op", SHARED, ids=lambda op: op.op.name)
def test_a_bit_is_a_variable_of_two_classes(op):
    """Logits (0, a) and the one-hot (1 − b, b): what arrives at a is what arrives at the second logit."""
    rng = np.random.default_rng(1)
    a, g = 1.5 * rng.standard_normal((2, 300))
    settings = {"tau": 1.3} if op is not zgr else {}
    second = (rng.random(300) < 0.5).astype(float)  # the bit, or the noise's second component
    if op in (gumbel_softmax, st_gumbel_softmax):
        gumbel = rng.gumbel(size=(300, 2))
        bit_input, pair_input = gumbel[:, 1] - gumbel[:, 0], gumbel
    else:
        bit_input, pair_input = second, np.stack([1 - second, second], axis=-1)
    logits, cotangent = np.stack([0 * a, a], axis=-1), np.stack([0 * g, g], axis=-1)
    pair = rule(op, logits, pair_input, g=cotangent, **settings)
    np.testing.assert_allclose(rule(op, a, bit_input, g=g, family=bernoulli, **settings), pair[:, 1], atol=1e-14)


def test_the_two_kinds_of_variables_offer_the_same_and_agree():
    names = lambda module: {n for n in vars(module) if not n.startswith("_") and callable(getattr(module, n))}
    common = "conditional conditional_jvp conditional_vjp harden local_outcomes local_vjp log_odds noise noise_score"
    common = {
        *common.split(),
        *["outcome_probability", "outcomes", "probability", "sample", "sizes", "square", "vjp", "inner"],
    }
    assert common <= names(categorical)
    assert common <= names(bernoulli)
    rng = np.random.default_rng(2)
    a, q = rng.standard_normal((4, 3)), rng.random((4, 3))
    q[0] = [0.0, 1.0, 0.5]  # a bit whose probability has rounded to 0 or 1 has finite log-odds all the same
    two = np.stack([0 * a, a], axis=-1)
    np.testing.assert_allclose(bernoulli.probability(bernoulli.log_odds(q)), q, atol=1e-30)
    np.testing.assert_allclose(bernoulli.probability(a), categorical.probability(two)[..., 1])
    outcomes = bernoulli.outcomes((1, 3))
    as_pairs = np.stack([1 - outcomes, outcomes], axis=-1)
    np.testing.assert_allclose(
        bernoulli.outcome_probability(bernoulli.probability(a), outcomes),
        categorical.outcome_probability(categorical.probability(two), as_pairs),
    )
    z, u = 0.3 + abs(rng.standard_normal((4, 3))), rng.standard_normal((4, 3))
    d, pair_z = np.stack([0 * a, 0 * a + 1], -1), np.stack([0 * z, z], -1)
    pair = categorical.conditional_vjp(categorical.probability(two), d, pair_z, np.stack([-u, u], -1))
    np.testing.assert_allclose(bernoulli.conditional_vjp(bernoulli.probability(a), 1 + 0 * a, z, u), pair[..., 1])


def test_conditional_logistic_noise_is_finite_also_given_a_bit_of_no_probability():
    z = bernoulli.conditional_logistic(np.array([-1e4, 1e4]), np.array([1.0, 0.0]), np.array([0.3, 0.3]))
    assert np.isfinite(z).all()


def test_muprop_has_no_variance_on_a_linear_cost_and_reinforce_has():
    problem = ladder.Problem("categorical", 2, 4, "linear")
    outcomes, f = categorical.outcomes((1, 2, 4)), problem.values(categorical.outcomes((1, 2, 4)))
    p = np.broadcast_to(softmax_array(problem.logits), outcomes.shape)
    g = muprop_gradient(p, outcomes, f, problem.values(p[:1]), problem.a.reshape(1, 2, 4))
    assert g.std(axis=0).max() < 1e-14
    assert reinforce_gradient(p, outcomes, f).std(axis=0).max() > 0.1


def test_double_control_variates_have_no_variance_on_a_linear_cost_and_are_rloo_at_alpha_zero():
    rng = np.random.default_rng(0)
    a, bs = rng.standard_normal(5), (rng.random((3, 400, 5)) < 0.4).astype(float)
    p = np.broadcast_to(rng.random(5), (400, 5))
    gs = np.broadcast_to(a, bs.shape)
    linear, _ = double_cv_gradient(p, bs, bs @ a, gs, -1.0)
    np.testing.assert_allclose(linear, p * (1 - p) * a, atol=1e-13)
    cubic = (bs @ a + 0.5) ** 3
    np.testing.assert_allclose(double_cv_gradient(p, bs, cubic, gs, 0.0)[0], rloo_gradient(p, bs, cubic), atol=1e-13)


def test_rodeo_is_rloo_at_alpha_and_beta_zero_and_its_stein_operator_has_mean_zero():
    rng = np.random.default_rng(0)
    p = np.broadcast_to(rng.random(4), (100, 4))
    bs, h, flipped = (rng.random((2, 100, 4)) < p).astype(float), rng.random((2, 100)), rng.random((2, 100, 4))
    costs = rng.random((2, 100))
    g, _ = rodeo_gradient(p, bs, costs, h, flipped, 0.0, 0.0)
    np.testing.assert_allclose(g, rloo_gradient(p, bs, costs), atol=1e-14)
    outcomes = bernoulli.outcomes((1, 4))
    q, w = bernoulli.outcome_probability(p[:1], outcomes)[0], flip_weights(p[:1], outcomes)
    h = lambda b: (b @ [1.0, -2.0, 0.5, 3.0] + 0.3) ** 3
    flips = np.stack([h(np.where(np.arange(4) == i, 1 - outcomes, outcomes)) for i in range(4)], axis=1)
    assert abs(q @ (w * (flips - h(outcomes)[:, None])).sum(axis=1)) < 1e-12


def test_rodeo_is_its_formula_with_the_stein_operator_written_out():
    """The corrections have mean 0, so that no expectation tells whether they are the stated ones."""
    rng = np.random.default_rng(0)
    p, outcomes, h, f = rng.random((1, 3)), bernoulli.outcomes((1, 3)), rng.random((3, 8)), rng.random(3)
    w, drawn, alpha, beta = flip_weights(p, outcomes), [1, 6, 3], 0.7, -0.4
    flip = lambda c, i: c ^ (4 >> i)  # codes count in binary, the first bit in front

    def stein(v, c):
        return sum(w[c, i] * (v[flip(c, i)] - v[c]) for i in range(3))

    expected = 0.0
    for s, c in enumerate(drawn):
        others = np.mean([f[t] + alpha * stein(h[t], drawn[t]) for t in range(3) if t != s])
        expected += (f[s] - others) * (outcomes[c] - p[0]) + beta * stein(h[s][:, None] * (outcomes - p), c)
    flipped = np.array([[h[s, flip(c, i)] for i in range(3)] for s, c in enumerate(drawn)])
    given = outcomes[drawn][:, None], f[:, None], h[[0, 1, 2], drawn][:, None], flipped[:, None]
    np.testing.assert_allclose(rodeo_gradient(p, *given, alpha, beta)[0][0], expected / 3, atol=1e-14)


def test_the_surrogate_of_rodeo_is_a_linearised_cost_and_a_network_at_its_scale():
    problem, estimator = ladder.Problem("bernoulli", 3, 2, "cubic"), create("rodeo:hidden=3")
    ladder.run(problem, estimator, 5, Rng(0))
    for i, p in enumerate(estimator.learned.parameters.values()):
        p.data[...] = np.random.default_rng(i).standard_normal(p.shape)
    _, found = ladder.run(problem, estimator, 5, Rng(1))
    W1, b1, w2, b2, alpha, beta = (p.data for p in estimator.learned.parameters.values())
    logits = problem.rows(5).data
    bs = np.stack([Rng(1).site(s).bernoulli(logits) for s in range(2)])
    f, g = map(np.stack, zip(*(value_and_grad(problem.cost, b) for b in bs), strict=True))

    def surrogate(t, y):
        l, r = (g[t] * (y - bs[t])).sum(axis=-1), 1.0 + abs(f[t])
        return l + r * (np.tanh(np.stack([l / r, f[t] / r], axis=-1) @ W1 + b1) @ w2 + b2)[:, 0]

    h = np.stack([surrogate(1, bs[0]), surrogate(0, bs[1])])
    flips = [np.where(np.arange(3) == i, 1.0 - bs, bs) for i in range(3)]
    flipped = np.stack([[surrogate(1, b[0]), surrogate(0, b[1])] for b in flips], axis=-1)
    expected, _ = rodeo_gradient(bernoulli.probability(logits), bs, f, h, flipped, alpha, beta)
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_local_expectation_is_the_measure_valued_derivative_and_exact_for_one_variable():
    p, F = softmax_array(THETA), (WEIGHT + 0.5) ** 3
    weak = [p[j] * (1 - p[j]) * (F[j] - np.delete(p * F, j).sum() / (1 - p[j])) for j in range(4)]
    np.testing.assert_allclose(local_expectation_gradient(p, F), weak, atol=1e-14)
    np.testing.assert_allclose(weak, true_gradient(), atol=1e-14)


def test_the_best_baseline_of_bengio_2013_has_the_least_variance():
    """Eq. 10 against every other constant, by enumeration of one bit."""
    p, outcomes, f = np.array([[0.3]]), np.array([[0.0], [1.0]]), np.array([2.0, 5.0])
    q, square = np.array([0.7, 0.3]), ((outcomes - 0.3) ** 2)[:, 0]
    best = (q * square * f).sum() / (q * square).sum()
    variance = lambda b: np.average((minimum_variance_gradient(p, outcomes, f, b)[:, 0] - 0.63) ** 2, weights=q)
    assert all(variance(best) < variance(best + h) for h in (-0.1, 0.1, 1.0))
    assert variance(best) < variance(q @ f)  # the mean is not the best baseline


def test_arm_is_the_mean_of_ar_and_its_mirror_image_and_disarm_the_mean_of_arm_given_the_bits():
    rng = np.random.default_rng(0)
    a, u = rng.standard_normal((200, 3)), rng.random((200, 3))
    p = bernoulli.probability(a)
    f = lambda b: (b @ [1.0, -2.0, 0.7] + 0.4) ** 3
    below = lambda u: (u < p).astype(float)
    mirror, b = below(u), below(1 - u)
    arm = arm_gradient(u, f(b), f(mirror))
    np.testing.assert_allclose(arm, 0.5 * (ar_gradient(u, f(mirror)) + ar_gradient(1 - u, f(b))), atol=1e-13)

    # given both bits, u is uniform on one side of p and 1 − p, or on both of them
    low, high = np.minimum(p, 1 - p), np.maximum(p, 1 - p)
    middle = np.where(u < low, low / 2, np.where(u > high, (1 + high) / 2, 0.5))
    given_bits = arm_gradient(middle, f(b), f(mirror))
    np.testing.assert_allclose(disarm_gradient(a, b, mirror, f(b), f(mirror)), given_bits, atol=1e-13)
    pair = np.stack([below(u), below(1 - u)])
    arms = arms_gradient(p, pair, np.stack([f(x) for x in pair]))
    np.testing.assert_allclose(arms, given_bits, atol=1e-13)


@pytest.mark.parametrize("samples", [2, 3, 5])
def test_the_dirichlet_copula_is_uniform_and_its_pairs_have_the_stated_probability(samples):
    u = dirichlet_copula(np.random.default_rng(1).exponential(size=(samples, 100_000)))
    assert stats.kstest(u[0], "uniform").pvalue > 1e-3
    if samples == 2:
        np.testing.assert_allclose(u[0], 1 - u[1], atol=1e-12)
    for p in (0.3, 0.5, 0.8):
        bits = antithetic_samples(np.full(100_000, p), u)
        assert abs(bits.mean() - p) < 4.5 * np.sqrt(p * (1 - p) / 100_000)
        n, q = samples - 1, min(p, 1 - p)
        rare = bits if p <= 0.5 else 1 - bits
        both = max(2 * q ** (1 / n) - 1, 0) ** n
        assert abs((rare[0] * rare[1]).mean() - both) < 4.5 * np.sqrt(max(both, 1e-5) / 100_000)


def test_arsm_and_its_relatives_are_exactly_zero_without_cost_differences():
    pi = np.random.default_rng(0).dirichlet(np.ones(4), size=(7, 3))
    np.testing.assert_allclose(arsm_gradient(pi, np.full((7, 4, 4), 2.5)), 0.0, atol=1e-14)


def test_the_chain_of_sticks_is_the_softmax_and_its_derivative_goes_back_to_the_classes():
    rng = np.random.default_rng(0)
    theta = np.sort(rng.standard_normal((6, 4)), axis=-1)
    psi, e, rest = sticks(theta)
    p, alive = 1 / (1 + np.exp(-psi)), np.ones(6)
    for c in range(3):
        np.testing.assert_allclose(alive * p[:, c], softmax_array(theta)[:, c])
        alive = alive * (1 - p[:, c])
    np.testing.assert_array_equal(first_one(np.array([[0.0, 1, 1], [0, 0, 0], [1, 0, 1]])), np.eye(4)[[1, 3, 0]])
    u, v = rng.standard_normal((6, 3)), rng.standard_normal((6, 4))
    forward = (sticks(theta + 1e-6 * v)[0] - sticks(theta - 1e-6 * v)[0]) / 2e-6
    assert (sticks_vjp(e, rest, u) * v).sum() == pytest.approx((u * forward).sum(), rel=1e-6)


def test_the_weights_of_a_set_are_those_of_the_ratios_in_the_paper():
    """R(S, s) = P^{D∖s}(S∖s)/P(S), by summing over all orders, and both orders of weights sum to 1."""
    p = np.random.default_rng(0).dirichlet(np.ones(6))
    members = [0, 2, 5]

    def probability(chosen, without=()):
        left = 1.0 - sum(p[list(without)])
        total = 0.0
        for order in itertools.permutations(chosen):
            drawn, rest = 1.0, left
            for c in order:
                drawn, rest = drawn * p[c] / rest, rest - p[c]
            total += drawn
        return total

    first, second = set_weights(np.log(p[members])[:, None])
    for i, s in enumerate(members):
        others = [t for t in members if t != s]
        assert first[i, 0] == pytest.approx(p[s] * probability(others, [s]) / probability(members))
        for j, t in enumerate(members):
            last = [r for r in others if r != t]
            ratio = probability(last, [s, t]) / probability(others, [s]) if s != t else 1.0
            assert second[i, j, 0] == pytest.approx(p[t] * ratio)
    np.testing.assert_allclose(first.sum(axis=0), 1.0)
    np.testing.assert_allclose(second.sum(axis=1), 1.0)


def test_the_beam_search_draws_without_replacement_from_the_joint_distribution():
    rng, n = np.random.default_rng(0), 40_000
    log_p = log_softmax(rng.standard_normal((2, 3))).data
    classes, found = stochastic_beam_search(np.broadcast_to(log_p, (n, 2, 3)), rng.gumbel(size=(2, n, 3, 3)), 3)
    np.testing.assert_allclose(found, log_p[0][classes[..., 0]] + log_p[1][classes[..., 1]])
    outcomes = classes[..., 0] * 3 + classes[..., 1]
    assert all(len(set(row)) == 3 for row in outcomes[:500])
    q = np.exp(log_p[0][:, None] + log_p[1]).reshape(-1)
    assert stats.chisquare(np.bincount(outcomes[:, 0], minlength=9), n * q).pvalue > 1e-3
    pairs = np.bincount(outcomes[:, 0] * 9 + outcomes[:, 1], minlength=81).reshape(9, 9)
    expected = n * q[:, None] * q / (1 - q[:, None])
    off = ~np.eye(9, dtype=bool)
    assert stats.chisquare(pairs[off], expected[off] * pairs[off].sum() / expected[off].sum()).pvalue > 1e-3


@pytest.mark.parametrize(
    ("spec", "variables", "classes"),
    [("unordered-set:samples=3", 1, 3), ("unordered-set:samples=4", 2, 2), ("sum-and-sample:summed=9", 1, 4)],
)
def test_no_variance_is_left_when_every_outcome_is_summed(spec, variables, classes):
    problem = ladder.Problem("categorical", variables, classes, "cubic")
    _, g = ladder.monte_carlo(problem, create(spec), 200)
    np.testing.assert_allclose(g, np.broadcast_to(ladder.exact(problem, create(spec)), g.shape), atol=1e-10)


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


@pytest.mark.parametrize("consistent", [True, False])
@pytest.mark.parametrize("detached", [True, False])
@pytest.mark.parametrize("gap", [0.0, 1.0, "p"])
def test_each_property_of_gst_can_be_switched_off(consistent, detached, gap):
    """Consistency and the gap show in the perturbed logits, detachment in the derivative; GST without consistency is
    straight-through. The rule of each is checked against its surrogate with all other rules."""
    _, logits, d, g = samples()
    found = rule(gapped_straight_through, logits, d, g=g, gap=gap, consistent=consistent, detached=detached)
    plain = rule(straight_through, logits, d, g=g)
    gst = rule(gapped_straight_through, logits, d, g=g, gap=gap)
    assert np.allclose(found, plain) == (not consistent)
    assert np.allclose(found, gst) == (consistent and detached)
    if not detached and consistent:  # the perturbed logits follow θ: gradients still sum to 0, but differ
        np.testing.assert_allclose(found.sum(axis=-1), 0.0, atol=1e-13)
    spec = f"gst:gap={gap},consistent={int(consistent)},detached={int(detached)}"
    estimator = create(spec)
    assert (estimator.consistent, estimator.detached, estimator.gap) == (consistent, detached, gap)


NOT_PER_SAMPLE = ("spsa", "lax", "measure-valued", "finite-differences")
SUM_ZERO = [n for n in ESTIMATORS if facts(n).family is categorical and n not in NOT_PER_SAMPLE]


@pytest.mark.parametrize("name", SUM_ZERO)
def test_gradients_sum_to_zero_over_the_classes(name):
    """Moving all logits of a variable together changes nothing. (SPSA, LAX and the measure-valued derivative know that
    on average only, finite differences up to their error.)"""
    problem = ladder.Problem("categorical", 3, 4, "cubic")
    _, g = ladder.monte_carlo(problem, create(name), 200)
    np.testing.assert_allclose(g.sum(axis=-1), 0.0, atol=1e-9 * np.abs(g).max())


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


# ---- ReinMax-Rao and ReinMax-CV


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
    logits, gumbel, d = drawn(rng)
    g, e = dcost(d), rng.exponential(size=(3, N, 4))
    plain = rule(reinmax, logits, d, g=g)
    np.testing.assert_allclose(rule(reinmax_cv, logits, d, e, gumbel, g=g, scale=0.0), plain, atol=1e-12)
    corrected = rule(reinmax_cv, logits, d, e, gumbel, g=g, tau=0.7, scale=1.0)
    assert np.abs(z_between(corrected, plain)).max() > 20  # its mean given D is not that of ReinMax: a bias …
    assert (corrected.var(axis=0) > plain.var(axis=0)).all()  # … and no gain in variance


# ---- what control variates learn


@pytest.mark.parametrize("family", [categorical, bernoulli])
@pytest.mark.parametrize("variate", ["cost", "network"])
def test_the_mixed_derivative_of_a_control_variate(family, variate):
    """Σ a c(z) + ⟨v, ∇c(z)⟩ by differences with respect to every parameter, and ∇c(z) itself."""
    from estimators.learned import Learned

    rng = np.random.default_rng(0)
    z, v, a = rng.standard_normal((5, 2, 3)), rng.standard_normal((5, 2, 3)), rng.standard_normal(5)
    w = rng.standard_normal((2, 3))
    cost = lambda d: ((d * w).sum(axis=(1, 2)) + 0.4) ** 3.0
    learned = Learned(1e-3)
    initial = {"w": 0.3, "log_tau": -0.4} if variate == "cost" else Network.initial(Rng(0), 6, 7)
    if variate == "network":
        initial |= {"w2": rng.standard_normal(7), "b1": rng.standard_normal(7), "b2": 0.2}
    learned.start(lambda: initial, like=z)

    def control():
        return SoftenedCost(cost, learned, family) if variate == "cost" else Network(learned)

    def total():
        value, g = control()(z)
        return float((a * value).sum() + (v * g).sum())

    at = control()
    _, g = at(z)
    step = 1e-6 * v
    slope = (control()(z + step)[0] - control()(z - step)[0]) / 2e-6
    np.testing.assert_allclose((g * v).sum(axis=(1, 2)), slope, rtol=1e-6)
    found = at.mixed(0, a, v)
    for name, p in learned.parameters.items():
        numeric = np.empty_like(p.data)
        for i in np.ndindex(p.shape):
            before, values = p.data[i], []
            for h in (1e-6, -1e-6):
                p.data[i] = before + h
                values.append(total())
            p.data[i], numeric[i] = before, (values[0] - values[1]) / 2e-6
        np.testing.assert_allclose(np.reshape(found[name], p.shape), numeric, rtol=2e-5, atol=1e-7, err_msg=name)


LEARNERS = ["rebar", "rebar-coupled", "relax", "lax", "double-cv", "rodeo"]


@pytest.mark.parametrize(("name", "family"), [p for p in PAIRS if p.values[0] in LEARNERS])
def test_what_is_learned_descends_on_the_mean_square_of_the_estimate(name, family):
    """The gradients handed to Adam are those of mean ‖ĝ‖² over the batch, at fixed noise: every parameter, by
    differences."""
    problem = ladder.Problem(family, 3, 3 if family == "categorical" else 2, "cubic")
    estimator = create(f"{name}:lr=0.05" + (",hidden=4" if name in ("relax", "lax", "rodeo") else "")).of(family)
    for step in range(3):  # away from the zeros at the start
        ladder.run(problem, estimator, 20, Rng(4).at(step))
        estimator.update()
    if hasattr(estimator, "updates"):
        estimator.updates = 0  # so that the temperature's turn has come

    def mean_square():
        _, g = ladder.run(problem, estimator, 20, Rng(5))
        return (g * g).sum() / 20

    mean_square()
    found = {k: np.array(v) for k, v in estimator.learned._gradients.items()}
    assert found.keys() == estimator.learned.parameters.keys()
    for key, p in estimator.learned.parameters.items():
        numeric = np.empty_like(p.data)
        for i in np.ndindex(p.shape):
            before, values = p.data[i], []
            for h in (1e-5, -1e-5):
                p.data[i] = before + h
                values.append(mean_square())
            p.data[i], numeric[i] = before, (values[0] - values[1]) / 2e-5
        scale = max(np.abs(numeric).max(), 1e-3)
        np.testing.assert_allclose(found[key].reshape(p.shape) / scale, numeric / scale, atol=1e-4, err_msg=key)


@pytest.mark.parametrize("name", LEARNERS)
def test_learning_lowers_the_variance(name):
    problem = ladder.Problem("bernoulli", 3, 2, "quadratic")
    options = {"lax": "lr=0.02", "double-cv": "lr=0.02", "rodeo": "lr=0.02"}.get(name, "lr=0.02,tau=2,eta=0.2")
    estimator = create(f"{name}:{options}").of("bernoulli")
    variance = lambda: ladder.monte_carlo(problem, estimator, 20_000, seed=1)[1].var(axis=0).sum()
    before = variance()
    for step in range(150):
        ladder.run(problem, estimator, 100, Rng(2).at(step))
        estimator.update()
    assert variance() < 0.9 * before


def test_nvil_learns_what_the_cost_of_each_input_is():
    """Two kinds of inputs with very different costs: after training, the baseline tells them apart."""
    x = np.repeat(np.eye(2), 50, axis=0)
    level = x @ [10.0, -10.0]
    estimator = create("nvil:lr=0.02")
    theta = Tensor(np.zeros((100, 1, 3)), requires_grad=True)
    cost = lambda d: (d * WEIGHT[:3]).sum(axis=(1, 2)) + level

    def spread(estimator, step):
        theta.grad = None
        estimator(theta, cost, Rng(0).at(step), inputs=x).sum().backward()
        return theta.grad.var(axis=0).sum()

    for step in range(200):
        spread(estimator, step)
        estimator.update()
    assert spread(create("nvil:normalise=0"), 500) > 10 * spread(create("rloo"), 500)
    estimator.normalise = False
    assert spread(estimator, 500) < 0.05 * spread(create("nvil:normalise=0"), 500)


@pytest.mark.parametrize("family", ["categorical", "bernoulli"])
def test_rebar_with_eta_zero_is_reinforce(family):
    problem = ladder.Problem(family, 3, 2, "cubic")
    estimator = create("rebar").of(family)
    _, before = ladder.run(problem, estimator, 50, Rng(3))
    estimator.learned["w"][:] = -60.0
    _, g = ladder.run(problem, estimator, 50, Rng(3))
    d = estimator.family.harden(problem.rows(50).data + estimator.family.noise(Rng(3), problem.rows(50).data))
    p = estimator.family.probability(problem.rows(50).data)
    np.testing.assert_allclose(g, reinforce_gradient(p, d, problem.values(d)), atol=1e-12)
    assert np.abs(before - g).max() > 0.1


@pytest.mark.parametrize(
    ("name", "reference", "family"),
    [
        ("double-cv", "rloo", "bernoulli"),
        ("rodeo", "rloo", "bernoulli"),
        ("relax", "rebar", "categorical"),
        ("relax", "rebar", "bernoulli"),
        ("nvil:normalise=0", "reinforce", "categorical"),
        ("nvil", "reinforce-mean", "bernoulli"),
    ],
)
def test_what_has_learned_nothing_yet_changes_nothing(name, reference, family):
    problem = ladder.Problem(family, 3, 2, "cubic")
    found, plain = (ladder.run(problem, create(n, family=family), 20, Rng(3))[1] for n in (name, reference))
    np.testing.assert_allclose(found, plain, atol=1e-12)


def test_rebar_starts_with_the_stated_scale_and_temperature():
    estimator = create("rebar:eta=0.7,tau=0.6")
    ladder.run(ladder.Problem("categorical", 3, 2, "cubic"), estimator, 5, Rng(0))
    control = SoftenedCost(one_cost, estimator.learned, categorical)
    np.testing.assert_allclose([control.eta[0], control.tau[0]], [0.7, 0.6])


@pytest.mark.parametrize(
    ("spec", "counts"),
    [
        ("rebar:tau_every=0", [3, 3, 3]),
        ("rebar:tau_every=1", [7, 7, 7]),
        ("rebar:tau_every=2", [7, 3, 7]),
        ("rebar-coupled:tau_every=1", [4, 4, 4]),
    ],
)
def test_the_temperature_of_rebar_is_trained_as_often_as_stated(spec, counts):
    estimator, found = create(spec), []
    for step in range(3):
        seen = []
        estimator(logits_of("categorical", 3), lambda d, seen=seen: (seen.append(d), one_cost(d))[1], Rng(0).at(step))
        estimator.update()
        found.append(len(seen))
    assert found == counts
    assert (estimator.learned["log_tau"][0] == math.log(0.5)) == spec.endswith("=0")


# ---- through the call that all of them share


def one_cost(d):
    """A cubic cost for one-hots of four classes or for bits."""
    weight = WEIGHT[: d.shape[-1]]
    return ((d * weight).sum(axis=tuple(range(1, d.ndim))) + 0.5) ** 3.0


def logits_of(family, batch, dtype=np.float64):
    theta = THETA if family == "categorical" else THETA[:2]
    shape = (batch, 1, 4) if family == "categorical" else (batch, 2)
    return Tensor(np.broadcast_to(theta, shape).astype(dtype), requires_grad=True)


def true_gradient():
    return softmax_vjp(softmax_array(THETA), (WEIGHT + 0.5) ** 3)


WITHOUT_BASELINE = ("reinforce", "reinforce-mean", "reinforce-minvar", "nvil", "ar", "lax")


@pytest.mark.parametrize(("name", "family"), [p for p in PAIRS if p.values[0] not in WITHOUT_BASELINE])
def test_a_constant_cost_has_no_gradient(name, family):
    """Sample by sample: a baseline, or the difference of two costs, takes a constant away. (Added in the place of
    subtracted, it would leave every expectation as it is.)"""
    estimator, logits = create(name, family=family), logits_of(family, 50)
    for step in range(2):  # the second time with what it has learned
        logits.grad = None
        estimator(logits, lambda d: 0.0 * one_cost(d) + 7.0, Rng(0).at(step)).sum().backward()
        estimator.update()
        np.testing.assert_allclose(logits.grad, 0.0, atol=1e-12)


@pytest.mark.parametrize("baseline", [0, 1])
def test_sum_and_sample_without_its_baseline_feels_a_constant(baseline):
    logits = logits_of("categorical", 50)
    create(f"sum-and-sample:baseline={baseline}")(logits, lambda d: 0.0 * one_cost(d) + 7.0, Rng(0)).sum().backward()
    assert (np.abs(logits.grad).max() > 0.1) == (not baseline)


hard = lambda x, r: r.one_hot(x.data)
bit = lambda x, r: r.bernoulli(x.data)
gumbel = lambda x, r: r.gumbel(x.shape, like=x.data)
logistic = lambda x, r: r.logistic(x.shape, like=x.data)
three = lambda x, r: r.site("conditional").exponential((3, *x.shape), like=x.data)


@pytest.mark.parametrize(
    ("spec", "family", "expected"),
    [
        ("st:tau=2", "categorical", lambda x, r: straight_through(x, hard(x, r), tau=2.0)),
        ("st:tau=2", "bernoulli", lambda x, r: straight_through(x, bit(x, r), tau=2.0, family=bernoulli)),
        ("reinmax:tau=2", "categorical", lambda x, r: reinmax(x, hard(x, r), tau=2.0)),
        ("reinmax:tau=2", "bernoulli", lambda x, r: reinmax(x, bit(x, r), tau=2.0, family=bernoulli)),
        ("gumbel-softmax:tau=2", "categorical", lambda x, r: gumbel_softmax(x, gumbel(x, r), tau=2.0)),
        (
            "gumbel-softmax:tau=2",
            "bernoulli",
            lambda x, r: gumbel_softmax(x, logistic(x, r), tau=2.0, family=bernoulli),
        ),
        ("st-gs:tau=2", "categorical", lambda x, r: st_gumbel_softmax(x, gumbel(x, r), tau=2.0)),
        ("st-gs:tau=2", "bernoulli", lambda x, r: st_gumbel_softmax(x, logistic(x, r), tau=2.0, family=bernoulli)),
        ("gumbel-rao:tau=2,samples=3", "categorical", lambda x, r: gumbel_rao(x, hard(x, r), three(x, r), tau=2.0)),
        ("gst:tau=2,gap=0.5", "categorical", lambda x, r: gapped_straight_through(x, hard(x, r), gap=0.5, tau=2.0)),
        ("reinmax-rao:tau=2,samples=3", "categorical", lambda x, r: reinmax_rao(x, hard(x, r), three(x, r), tau=2.0)),
        (
            "reinmax-cv:tau=2,samples=3,scale=0.5",
            "categorical",
            lambda x, r: reinmax_cv(x, hard(x, r), three(x, r), gumbel(x, r), tau=2.0, scale=0.5),
        ),
        (
            "st-decoupled:tau_f=2,tau_b=0.5",
            "categorical",
            lambda x, r: straight_through(x, r.one_hot(x.data / 2.0), tau=0.5),
        ),
        (
            "st-decoupled:tau_f=2,tau_b=0.5",
            "bernoulli",
            lambda x, r: straight_through(x, r.bernoulli(x.data / 2.0), tau=0.5, family=bernoulli),
        ),
        (
            "st-gs-decoupled:tau_f=2,tau_b=0.5",
            "categorical",
            lambda x, r: decoupled_st_gumbel_softmax(x, gumbel(x, r), tau_f=2.0, tau_b=0.5),
        ),
        (
            "st-gs-decoupled:tau_f=2,tau_b=0.5",
            "bernoulli",
            lambda x, r: decoupled_st_gumbel_softmax(x, logistic(x, r), tau_f=2.0, tau_b=0.5, family=bernoulli),
        ),
    ],
)
def test_the_options_of_a_sampler_reach_its_rule(spec, family, expected):
    found = []
    for draw in (create(spec, family=family).sample, expected):
        logits = logits_of(family, 20)
        d = draw(logits, Rng(3))
        d.backward(np.sin(np.arange(d.size, dtype=float)).reshape(d.shape))
        found.append([d.data, logits.grad])
    np.testing.assert_array_equal(found[0], found[1])


@pytest.mark.parametrize("family", ["categorical", "bernoulli"])
def test_spsa_is_the_difference_of_two_costs_at_the_same_noise(family):
    estimator, logits, rng, c = create("spsa:width=0.8", family=family), logits_of(family, 40), Rng(6), 0.8
    estimator(logits, one_cost, rng).sum().backward()
    noise = estimator.family.noise(rng.site("common"), logits.data)
    signs = np.where(rng.site("signs").uniform(logits.shape, like=logits.data) < 0.5, -1.0, 1.0)
    above, below = (one_cost(estimator.family.harden(logits.data + s * signs + noise)) for s in (c, -c))
    slope = (above - below) / (2 * c)
    np.testing.assert_allclose(logits.grad, slope.reshape(-1, *[1] * (logits.ndim - 1)) * signs)


SAMPLES = {"rloo": 2, "vimco": 5, "arm": 2, "disarm": 2, "arms": 4, "disarm-sb": 2, "double-cv": 2, "rodeo": 2}


# what the facts say, in numbers: K = 4 and one variable, or two bits; with default options
COUNTS = {
    "Kᴸ": {"categorical": 4, "bernoulli": 4},
    "L·K + 1": {"categorical": 5, "bernoulli": 5},
    "L·(C + 1) + 1": {"categorical": 3},
    "K": {"categorical": 4},
    "K(K−1)/2 + 1": {"categorical": 7},
}


@pytest.mark.parametrize(("name", "family"), PAIRS)
def test_the_stated_number_of_evaluations_is_the_number_of_evaluations(name, family):
    estimator, counts = create(name).of(family), []
    logits = logits_of(family, 3)
    for step in range(11):
        counts.append(0)

        def cost(d):
            counts[-1] += 1
            return one_cost(d)

        estimator(logits, cost, Rng(0).at(step))
        estimator.update()
    stated = estimator.evaluations
    if "more every 10th call" in stated:
        base, more = int(stated[0]), int(stated.split("and ")[1][0])
        assert counts == [base + more] + 9 * [base] + [base + more]
    else:
        expected = estimator.samples if stated == "S" else COUNTS[stated][family] if stated in COUNTS else int(stated)
        assert counts == 11 * [expected]


@pytest.mark.parametrize("name", ["st-decoupled:tau_f=2.5", "st-gs-decoupled:tau_f=2.5", "st-slope:rate=1", "sts"])
def test_a_changed_forward_distribution_is_the_stated_one(name):
    estimator = create(name)
    for _ in range(2):
        estimator.update()
    n, seen = 40_000, []
    logits = Tensor(np.full((n, 1), 0.8), requires_grad=True)
    estimator.of("bernoulli")(logits, lambda d: (seen.append(d.data), d.sum(axis=1))[1], Rng(1))
    logit_scale = {"st-slope:rate=1": 3.0, "sts": 1.0}.get(name, 0.4)
    p = 1 / (1 + np.exp(-0.8 * logit_scale))
    p = np.sqrt(p) if name == "sts" else p
    assert estimator.logit_scale == pytest.approx(logit_scale)
    assert stats.binomtest(int((seen[0] > 0).sum()), n, p).pvalue > 1e-3


def test_the_minimum_variance_baseline_is_made_of_earlier_batches_as_in_equation_10():
    estimator, theta = create("reinforce-minvar:decay=0.7"), np.array([[0.3, -1.0]])
    p, above, below = 1 / (1 + np.exp(-theta)), None, None
    cost = lambda d: (d * np.array([3.0, -1.0])).sum(axis=1) + 2.0
    for step in range(3):
        logits = Tensor(np.broadcast_to(theta, (50, 2)).copy(), requires_grad=True)
        estimator.of("bernoulli")(logits, cost, Rng(0).at(step)).sum().backward()
        d = Rng(0).at(step).bernoulli(logits.data)
        f, weight = cost(Tensor(d)).data, (d - p) ** 2
        baseline = 0.0 if above is None else above / below
        np.testing.assert_allclose(logits.grad, (f[:, None] - baseline) * (d - p))
        now = (weight * f[:, None]).mean(axis=0), weight.mean(axis=0)
        above, below = now if above is None else (0.7 * above + 0.3 * now[0], 0.7 * below + 0.3 * now[1])
        estimator.update()
    assert abs(above[0] / below[0] - above[1] / below[1]) > 0.01  # one for each variable


def test_nvil_subtracts_what_it_learned_from_earlier_batches_and_fits_the_rest():
    estimator = create("nvil:decay=0.6,normalise=0,hidden=3")
    cost = lambda d: (d * WEIGHT).sum(axis=(1, 2)) + 7.0
    mean = None
    for step in range(4):
        logits = logits_of("categorical", 40)
        estimator(logits, cost, Rng(3).at(step)).sum().backward()
        d, p = Rng(3).at(step).one_hot(logits.data), softmax_array(logits.data)
        f, net = cost(Tensor(d)).data, {k: np.array(v.data) for k, v in estimator.learned.parameters.items()}
        hidden = np.tanh(logits.data.reshape(40, 4) @ net["W1"] + net["b1"])
        predicted = (hidden @ net["w2"])[:, 0] + net["b2"]
        c = 0.0 if mean is None else mean
        np.testing.assert_allclose(logits.grad, ((f - predicted - c)[:, None, None]) * (d - p))
        fit = 2 * (predicted + c - f).mean()  # ∂/∂b₂ of the mean square of f − c − C
        np.testing.assert_allclose(estimator.learned._gradients["b2"], fit)
        now = (f - predicted).mean()
        mean = now if mean is None else 0.6 * mean + 0.4 * now
        estimator.update()
        assert estimator.mean == pytest.approx(mean)
    with pytest.raises(ValueError, match="saw inputs of width 4, not 2"):
        estimator(logits, cost, Rng(0), inputs=np.zeros((40, 2)))


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


def test_more_draws_of_gumbel_rao_leave_less_variance():
    d = np.broadcast_to(np.eye(4)[1], (4000, 1, 4))
    spread = {}
    for samples in (1, 50):
        estimator = create(f"gumbel-rao:samples={samples}")
        g = ladder_gradients(estimator, d)
        spread[samples] = g.var(axis=0).sum()
    assert spread[50] < 0.05 * spread[1]


def ladder_gradients(estimator, d):
    """The gradients given one outcome, with the conditional noise as it is drawn."""
    logits = Tensor(np.broadcast_to(THETA, d.shape).copy(), requires_grad=True)
    rng = Given(samples=[d], rng=Rng(0))
    estimator(logits, lambda x: (x * WEIGHT).sum(axis=(1, 2)), rng).sum().backward()
    return logits.grad


def test_spsa_points_down_the_gradient_and_mostly_sees_no_difference():
    """Its mean with a small width, against the exact gradient; and the same noise on both sides."""
    problem = ladder.Problem("bernoulli", 3, 2, "cubic")
    estimator = create("spsa:width=0.3").of("bernoulli")
    _, g = ladder.monte_carlo(problem, estimator, 200_000)
    exact = ladder.exact(problem, estimator)
    assert np.abs(ladder.z_scores(g, exact)).max() < 12  # of a bias of O(c²)
    assert np.abs(g.mean(axis=0) - exact).max() < 0.2 * np.abs(exact).max()
    assert (g == 0).all(axis=1).mean() > 0.6


def test_options_that_choose_another_noise():
    a = Tensor(np.zeros((20_000, 1)))
    for noise, law in (("logistic", stats.logistic), ("normal", stats.norm)):
        h = create(f"noisy-rectifier:noise={noise}").sample(a, Rng(0)).data
        positive = h[h > 0]
        assert abs(len(positive) / 20_000 - 0.5) < 0.02
        assert stats.kstest(positive, lambda x, law=law: 2 * law.cdf(x) - 1).pvalue > 1e-3
    logits = np.broadcast_to(THETA, (N // 10, 4)).copy()
    g = {}
    for kind in ("forward", "fresh"):
        theta = Tensor(logits, requires_grad=True)
        create(f"reinmax-cv:gs_noise={kind}").sample(theta, Rng(0)).backward(
            np.broadcast_to(WEIGHT, logits.shape).copy()
        )
        g[kind] = theta.grad
    assert np.abs(z_between(g["forward"], g["fresh"])).max() > 10


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


def test_learning_waits_for_update_and_is_forgotten_by_a_loaded_state():
    for name in ("rebar", "nvil", "reinforce-mean", "reinforce-minvar", "double-cv"):
        estimator = create(name)
        problem = ladder.Problem(estimator.family.name, 3, 2, "cubic")
        ladder.run(problem, estimator, 20, Rng(0))
        fresh = create(name).state_dict()
        before = estimator.state_dict()
        estimator.update()
        after = estimator.state_dict()
        assert any(not np.array_equal(before[k], after[k]) for k in after), name
        estimator.update()  # nothing new was seen
        again = estimator.state_dict()
        same = [k for k in after if k != "updates"]
        assert all(np.array_equal(after[k], again[k]) for k in same), name
        ladder.run(problem, estimator, 20, Rng(1))
        estimator.load_state_dict(after)
        estimator.update()  # what was seen before the state was loaded does not count
        assert all(np.array_equal(after[k], estimator.state_dict()[k]) for k in same), name
        estimator.load_state_dict(fresh)
        _, g = ladder.run(problem, estimator, 20, Rng(2))
        np.testing.assert_array_equal(g, ladder.run(problem, create(name), 20, Rng(2))[1], err_msg=name)


@pytest.mark.parametrize("name", ["rebar", "relax", "lax"])
def test_a_masked_class_has_no_part_in_what_is_learned(name):
    """The gradients handed to Adam are those of ‖ĝ‖² of the classes that exist."""
    mask = np.array([True, False, True])
    estimator = create(f"{name}:lr=0.05" + (",hidden=4" if name != "rebar" else ""))

    def mean_square():
        logits = Tensor(np.broadcast_to([[0.3, 2.0, -0.4]], (20, 2, 3)).copy(), requires_grad=True)
        cost = lambda d: ((d * np.array([1.0, 50.0, -2.0])).sum(axis=(1, 2)) + 0.5) ** 2.0
        estimator(logits, cost, Rng(5), mask=mask).sum().backward()
        return (logits.grad**2).sum() / 20

    mean_square()
    if name != "rebar":
        estimator.learned["w2"][...] = [3.0, -2.0, 1.0, 4.0]
        estimator.learned._gradients = None  # those of the first call are kept until `update`
        mean_square()
    found = {k: np.array(v) for k, v in estimator.learned._gradients.items()}
    for key, p in estimator.learned.parameters.items():
        at = (0,) * p.ndim
        before, values = p.data[at], []
        for h in (1e-5, -1e-5):
            p.data[at] = before + h
            values.append(mean_square())
        p.data[at] = before
        numeric = (values[0] - values[1]) / 2e-5
        assert np.reshape(found[key], p.shape)[at] == pytest.approx(numeric, rel=1e-3, abs=1e-3), key


def test_a_set_of_many_unlikely_outcomes_is_no_set_of_masked_ones():
    """50 variables of 10 classes: every joint outcome has a probability of about e^(−115)."""
    logits = Tensor(np.zeros((2000, 50, 10)), requires_grad=True)
    cost = lambda d: d[:, :, 0].sum(axis=1)
    create("unordered-set")(logits, cost, Rng(0)).sum().backward()
    slope = logits.grad.mean(axis=0)
    expected = 0.1 * (np.eye(10)[0] - 0.1)
    assert np.abs(slope.mean(axis=0) - expected).max() < 0.02
    assert slope[:, 0].mean() > 0.05


@pytest.mark.parametrize("baseline", [0, 1])
def test_sum_and_sample_counts_no_class_twice_under_a_mask(baseline):
    mask, f = np.array([True, True, False, False, False]), np.array([1.0, 4.0, 9.0, 9.0, 9.0])
    logits = Tensor(np.zeros((5, 1, 5)), requires_grad=True)
    estimator = create(f"sum-and-sample:summed=3,baseline={baseline}")
    estimator(logits, lambda d: (d * f).sum(axis=(1, 2)), Rng(0), mask=mask).sum().backward()
    np.testing.assert_allclose(logits.grad[:, 0, :2], np.broadcast_to([-0.75, 0.75], (5, 2)))


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


@pytest.mark.parametrize(("name", "family"), [p for p in PAIRS if p.values[0] not in ("exact", "finite-differences")])
def test_the_forward_distribution_is_the_stated_one(name, family):
    seen, n = [], 20_000
    logits, estimator = logits_of(family, n), create(name).of(family)
    estimator(logits, lambda d: (seen.append(d.data), one_cost(d))[1], Rng(8))
    p = estimator.family.probability(estimator.logit_scale * logits.data[0])
    points = seen[: 1 if name == "unordered-set" else SAMPLES.get(name, 1)]  # a set's first member is a sample
    for d in points:
        if estimator.support == "hard":
            assert set(np.unique(d)) == {0.0, 1.0}
            if family == "categorical":
                assert np.array_equal(d.sum(axis=-1), np.ones((n, 1)))
        if family == "categorical":
            counts = np.bincount(d[:, 0].argmax(axis=-1), minlength=4)
            assert stats.chisquare(counts, n * p[0]).pvalue > 1e-3
        else:
            for i in range(2):
                on = np.sum(d[:, i] > (0.5 if name == "gumbel-softmax" else 0.0))
                probability = np.sqrt(p[i]) if name == "sts" else p[i]
                assert stats.binomtest(int(on), n, probability).pvalue > 1e-3
    if estimator.support == "hard" and name in SAMPLES and estimator.randomness == "samples":
        assert not np.array_equal(points[0], points[1])


@pytest.mark.parametrize(("name", "family"), PAIRS)
def test_what_the_cost_depends_on_gets_the_gradient_of_the_value(name, family):
    """∂value/∂W by differences, at fixed noise: nothing leaks from control variates or from the estimator's own
    learning into the parameters behind the cost."""
    w = Tensor(WEIGHT[: 4 if family == "categorical" else 2].copy(), requires_grad=True)
    cost = lambda d: ((d * w).sum(axis=tuple(range(1, d.ndim))) + 0.5) ** 2.0
    value = lambda: create(name).of(family)(logits_of(family, 3), cost, Rng(2)).sum()
    value().backward()
    for i in range(w.size):
        before, values = w.data[i], []
        for h in (1e-6, -1e-6):
            w.data[i] = before + h
            values.append(value().item())
        w.data[i] = before
        assert w.grad[i] == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-6, abs=1e-8)


@pytest.mark.parametrize("name", [n for n in ESTIMATORS if facts(n).family is categorical])
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
    if name in ("exact", "finite-differences", "local-expectation"):  # the problem without those classes
        _, small, _ = run(
            logits[mask], None, lambda d: ((d * np.array([1.0, -2.0, 0.5])).sum(axis=(1, 2)) + 0.5) ** 2.0
        )
        np.testing.assert_allclose(g[:, mask], small, atol=1e-12)
    elif name not in ("measure-valued", "sum-and-sample"):  # these evaluate all classes, whatever their weight
        assert all((d[..., ~mask] == 0.0).all() for d in seen)


@pytest.mark.parametrize("name", [n for n in ESTIMATORS if facts(n).unbiased and facts(n).family is categorical])
def test_masking_a_class_leaves_the_problem_without_it(name):
    """The mean over the classes that are left is the exact gradient of the smaller problem."""
    mask, theta = np.array([True, False, True, True]), np.array([0.4, 9.0, -0.6, 0.9])
    f = (np.array([1.0, 3.0, -2.0, 0.5]) + 0.5) ** 3.0
    x = Tensor(np.broadcast_to(theta, (20_000, 1, 4)).copy(), requires_grad=True)
    create(name)(x, lambda d: (d * f).sum(axis=(1, 2)), Rng(3), mask=mask).sum().backward()
    exact = softmax_vjp(softmax_array(theta[mask]), f[mask])
    assert np.abs(ladder.z_scores(x.grad[:, 0][:, mask], exact)).max() < 4.5


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


# ---- at the edges: finite results, in the dtype of the logits, or one clear sentence

EDGES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([np.float32, np.float64]),
        "scale": st.sampled_from([0.0, 1.0, 30.0, 1e4]),
        "tau": st.sampled_from([1e-3, 0.1, 1.0, 10.0, 1e3]),
        "batch": st.integers(1, 3),
        "variables": st.integers(1, 2),
        "classes": st.integers(1, 4),
        "masked": st.booleans(),
        "seed": st.integers(0, 2**32),
    }
)


@pytest.mark.parametrize(("name", "family"), PAIRS)
@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(edge=EDGES)
def test_results_are_finite_at_the_edges(name, family, edge):
    rng = np.random.default_rng(edge["seed"])
    categorical_code = family == "categorical"
    shape = (edge["batch"], edge["variables"], edge["classes"]) if categorical_code else (edge["batch"], 3)
    mask = None
    if categorical_code and edge["masked"]:
        mask = rng.random(shape) < 0.5
        mask[..., 0] |= ~mask.any(axis=-1)
    options = [key for key in ("tau", "tau_f", "tau_b") if key in vars(create(name))]
    tau = max(edge["tau"], getattr(create(name), "min_tau", 0.0))
    estimator = create(f"{name}:" + ",".join(f"{key}={tau}" for key in options)).of(family)
    logits = Tensor((edge["scale"] * rng.standard_normal(shape)).astype(edge["dtype"]), requires_grad=True)
    axes = tuple(range(1, len(shape)))
    for step in range(2):  # the second time with what it has learned
        logits.grad = None
        value = estimator(logits, lambda d: (d * d + d).sum(axis=axes), Rng(edge["seed"]).at(step), mask=mask)
        value.sum().backward()
        estimator.update()
        assert value.dtype == logits.grad.dtype == edge["dtype"]
        assert np.isfinite(value.data).all()
        assert np.isfinite(logits.grad).all()
        if mask is not None:
            assert (logits.grad[~mask] == 0).all()
        if shape[-1] == 1 and categorical_code and name not in ("spsa", "lax"):
            assert np.abs(logits.grad).max() < 1e-4  # one class only: nothing to choose


@pytest.mark.parametrize(("name", "family"), PAIRS)
def test_an_estimator_gives_the_same_bits_on_the_stand_in_device(name, family):
    """… and with a saved state: two steps, then a new estimator goes on with the third."""
    results = []
    for backend in (Backend(), DevsimBackend()):
        start = logits_of(family, 5, np.float32).data + np.random.default_rng(0).standard_normal(1).astype(np.float32)
        logits, weight = Tensor(backend.to_device(start), requires_grad=True), WEIGHT[: start.shape[-1]]
        weight = backend.to_device(weight.astype(np.float32))
        axes = tuple(range(1, start.ndim))
        cost = lambda d, w=weight, axes=axes: ((d * w).sum(axis=axes) - 1.0) ** 2.0
        estimator = create(name).of(family)
        for step in range(4):
            logits.grad = None
            with forbid("sync", "d2h"):
                value = estimator(logits, cost, Rng(4).at(step), inputs=logits.data)
                value.sum().backward()
                estimator.update()
            results.append([backend.to_host(value.data), backend.to_host(logits.grad)])
            if step == 1:
                state, estimator = estimator.state_dict(), create(name).of(family)
                assert all(type(v) is np.ndarray for v in state.values())
                estimator.load_state_dict(state)
        with forbid("sync", "d2h"):
            straight = create(name).of(family)
            for step in range(4):
                logits.grad = None
                straight(logits, cost, Rng(4).at(step), inputs=logits.data).sum().backward()
                straight.update()
        np.testing.assert_array_equal(backend.to_host(logits.grad), results[-1][1])  # as if never interrupted
    for a, b in zip(results[:4], results[4:], strict=True):
        np.testing.assert_array_equal(a[0], b[0])
        np.testing.assert_array_equal(a[1], b[1])


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
    new = create("reinforce-mean")
    new.load_state_dict(create("reinforce-mean").state_dict())  # saved before the first update
    x = Tensor(np.zeros((4, 1, 2), np.float32), requires_grad=True)
    assert new(x, constant(1.0), Rng(0)).dtype == np.float32


@pytest.mark.parametrize("name", [n for n in ESTIMATORS if facts(n).state or facts(n).learned])
def test_a_state_of_another_estimator_is_refused(name):
    estimator = create(name)
    problem = ladder.Problem(estimator.family.name, 3, 2, "linear")
    ladder.run(problem, estimator, 5, Rng(0))
    estimator.update()
    with pytest.raises(ValueError, match="another estimator"):
        create("st").load_state_dict(estimator.state_dict())
    if estimator.learned:  # of the same kind, but another size
        other, bigger = create(name), ladder.Problem(estimator.family.name, 3, 3, "linear")
        bigger = ladder.Problem("bernoulli", 2, 2, "linear") if estimator.family is bernoulli else bigger
        other.load_state_dict(estimator.state_dict())
        if estimator.learned.parameters.keys() & {"W1"} and name != "rodeo":
            with pytest.raises(ValueError, match="another estimator"):
                ladder.run(bigger, other, 5, Rng(0))


@pytest.mark.parametrize("spec", ["st-slope:rate=1,most=3", "st-slope:rate=1,most=3,surrogate=hard"])
def test_the_slope_grows_with_the_updates_up_to_its_most(spec):
    estimator, slopes = create(spec), []
    for _ in range(4):
        slopes.append(estimator.logit_scale)
        a = Tensor(np.array([[0.3, 0.9, -0.2]]), requires_grad=True)
        estimator(a, lambda d: (d * 2.0).sum(axis=1), Rng(0)).backward()
        s, p = slopes[-1], 1 / (1 + np.exp(-slopes[-1] * a.data))
        expected = 2 * s * p * (1 - p) if "hard" not in spec else s * (abs(s * a.data) < 1)
        np.testing.assert_allclose(a.grad, expected)
        estimator.update()
    assert slopes == [1.0, 2.0, 3.0, 3.0]


def test_every_registered_estimator_states_its_facts():
    for name in ESTIMATORS:
        estimator = facts(name)
        assert all((estimator.title, estimator.paper, estimator.evaluations, estimator.objective)), name
        assert estimator.exact_for in ("all", "quadratic", "linear", "none")
        assert estimator.support in ("hard", "soft")
        assert estimator.randomness in ("none", "sample", "samples", "set", "uniform", "noise")


@pytest.mark.parametrize(
    ("spec", "tau", "message"),
    [
        ("nonsense", None, "unknown estimator 'nonsense'; the known ones are exact, finite-differences"),
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
        ("st:tau=warm", None, "tau must be positive and finite, got warm"),
        ("reinforce-mean:decay=1", None, "decay must be"),
        ("reinforce-minvar:decay=x", None, "decay must be"),
        ("rloo:samples=inf", None, "samples must be an integer"),
        ("rloo:samples=abc", None, "samples must be an integer"),
        ("gst-1.0:gap=5", None, "gst-1.0 has no option 'gap'"),
        ("st:tau=2", 3.0, "'tau' .* given twice"),
        ("spsa:width=0", None, "width must be positive"),
        ("finite-differences:step=-1", None, "step must be positive"),
        ("nvil:hidden=0", None, "hidden must be an integer of at least 1"),
        ("nvil:decay=1", None, "decay must be"),
        ("rodeo:hidden=0", None, "hidden must be an integer of at least 1"),
        ("nvil:lr=0", None, "learning rate must be positive"),
        ("vimco:samples=1", None, "samples must be an integer of at least 2"),
        ("unordered-set:samples=9", None, "samples must be at most 8"),
        ("sum-and-sample:summed=0", None, "summed must be an integer of at least 1"),
        ("st-slope:most=0", None, "most at least 1"),
        ("st-slope:surrogate=soft", None, "surrogate must be sigmoid or hard"),
        ("st-decoupled:tau_f=0", None, "tau must be positive"),
        ("darn:expand_at=mean", None, "expand_at must be sample or half"),
        ("noisy-rectifier:noise=loud", None, "noise must be logistic or normal"),
        ("reinmax-cv:gs_noise=old", None, "gs_noise must be forward or fresh"),
        ("reinmax-cv:scale=big", None, "scale must be a finite number"),
        ("reinmax-cv:scale=inf", None, "scale must be a finite number"),
        ("rebar:eta=2", None, "eta must lie between 0 and 2"),
        ("rebar:eta=much", None, "eta must lie between 0 and 2"),
        ("rebar-coupled:coupled=0", None, "no option 'coupled'"),
        ("arms:samples=1", None, "at least 2"),
        ("st-slope:rate=-1", None, "rate must be at least 0 .* got -1 and 5.0"),
        ("st-slope:rate=inf", None, "both finite, got inf and 5.0"),
        ("st-slope:most=inf", None, "both finite, got 0.0001 and inf"),
        ("st-slope:rate=fast", None, "rate must be at least 0 .* got fast and 5.0"),
        ("rebar:lr=fast", None, "learning rate must be positive and finite, got 'fast'"),
        ("gst:consistent=False", None, "the option 'consistent' of the estimator gst must be 0 or 1, got 'False'"),
        ("gst:detached=2", None, "'detached' .* must be 0 or 1, got 2"),
        ("nvil:normalise=no", None, "'normalise' .* must be 0 or 1, got 'no'"),
        ("rebar:coupled=yes", None, "'coupled' .* must be 0 or 1, got 'yes'"),
    ],
)
def test_a_bad_estimator_is_refused_in_one_sentence(spec, tau, message):
    with pytest.raises(ValueError, match=message) as caught:
        create(spec, tau)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "family"), [(n, c) for n in ESTIMATORS for c in ("categorical", "bernoulli", "gauss") if c not in
                       {m.name for m in facts(n).families}]
)  # fmt: skip
def test_a_kind_of_variables_that_an_estimator_does_not_handle_is_refused(name, family):
    with pytest.raises(ValueError, match=f"is for .* variables, not '{family}'"):
        create(name, family=family)


def test_options_in_the_name_reach_the_estimator():
    assert create("rloo:samples=4").samples == 4
    assert create("gst:gap=0.8,tau=0.5").gap == 0.8
    assert create("gst-p", 0.5).gap == "p"
    assert create("st", family="bernoulli").family is bernoulli
    assert create("rebar-coupled").coupled
    assert create("rebar:coupled=1").coupled
    assert create("st-slope:rate=0,most=1").most == 1.0
    assert not create("gst:consistent=0").consistent


def test_options_may_be_numpy_numbers():
    for tau in (np.float32(2.0), np.int64(2)):
        assert create("st", tau).tau == 2.0
    rloo = ESTIMATORS["rloo"](samples=np.int64(3))
    assert type(rloo.samples) is int


@pytest.mark.parametrize(("name", "family"), PAIRS)
def test_logits_that_are_no_tensor_are_refused(name, family):
    with pytest.raises(TypeError, match="the logits must be a Tensor, got ndarray"):
        create(name).of(family)(logits_of(family, 3).data, one_cost, Rng(0))


@pytest.mark.parametrize(("name", "family"), PAIRS)
def test_a_batch_without_examples_teaches_nothing(name, family):
    """A baseline would be the mean of no numbers, and NaN from then on."""
    estimator = create(name, family=family)
    for step, shape in enumerate([(0, 2, 3), (2, 2, 3), (0, 2, 3), (2, 2, 3)]):
        logits = Tensor(np.zeros(shape), requires_grad=True)
        before = estimator.state_dict()
        value = estimator(logits, lambda d: (d * d + d).sum(axis=(1, 2)), Rng(0).at(step))
        value.sum().backward()
        estimator.update()
        assert value.shape == shape[:1]
        assert logits.grad.shape == shape
        assert np.isfinite(logits.grad).all()
        if not shape[0]:
            for key, array in estimator.state_dict().items():
                if key != "updates":  # a count of training steps
                    np.testing.assert_array_equal(array, before[key])


@pytest.mark.parametrize(("name", "family"), PAIRS)
def test_a_cost_that_is_not_per_example_is_refused(name, family):
    logits = logits_of(family, 3)
    for axes in ((0, *range(1, logits.ndim)), logits.ndim - 1 if family == "categorical" else 0):
        with pytest.raises(ValueError, match="one value per example"):
            create(name).of(family)(logits, lambda d, axes=axes: d.sum(axis=axes), Rng(0))


@pytest.mark.parametrize(("name", "family"), PAIRS)
def test_a_cost_that_is_no_tensor_and_logits_without_examples_are_refused(name, family):
    estimator = create(name, family=family)
    for cost, kind in ((lambda d: np.ones(len(d)), "ndarray"), (lambda d: 1.0, "float"), (lambda d: None, "NoneType")):
        with pytest.raises(TypeError, match=f"the cost must give a Tensor, but it gave {kind}"):
            estimator(logits_of(family, 3), cost, Rng(0))
    with pytest.raises(ValueError, match=r"logits need a .* axis.*, got the shape \(\)"):
        estimator(Tensor(0.0, requires_grad=True), lambda d: d * 1.0, Rng(0))


@pytest.mark.parametrize(("name", "family"), PAIRS)
def test_values_can_be_computed_without_a_graph(name, family):
    with no_grad():
        value = create(name).of(family)(Tensor(logits_of(family, 3).data), one_cost, Rng(0))
    assert value.shape == (3,)
    assert not value.requires_grad


@pytest.mark.parametrize("name", ["exact", "finite-differences"])
def test_exact_refuses_too_many_outcomes(name):
    logits = Tensor(np.zeros((1, 30, 10)), requires_grad=True)
    with pytest.raises(ValueError, match=r"10\*\*30 outcomes"):
        create(name)(logits, lambda d: d.sum(axis=(1, 2)), Rng(0))


@pytest.mark.parametrize(("name", "family"), PAIRS)
def test_no_two_draws_of_a_call_have_one_address(addresses, name, family):
    create(name, family=family)(logits_of(family, 3), one_cost, Rng(0))
    assert len(addresses) == len(set(addresses))


def test_exact_allows_as_many_outcomes_as_it_says():
    for variables, categories in ((14, 2), (7, 4), (2, 128), (1, 16384), (1000, 1)):
        create("exact").check_size(variables, categories)
    for variables, categories in ((15, 2), (1, 16385)):
        with pytest.raises(ValueError, match="at most 16384 are allowed"):
            create("exact").check_size(variables, categories)


def test_darn_expanded_at_one_half_cannot_be_sampled():
    with pytest.raises(ValueError, match="call it with the cost"):
        create("darn:expand_at=half").sample(logits_of("bernoulli", 3), Rng(0))
