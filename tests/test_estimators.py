"""What all estimators share: the one call, what its facts say, masks, edges, devices, state, and the registry."""

import copy
import itertools
import pickle

import numpy as np
import pytest
from scipy import stats

import ladder
from devsim import DevsimBackend, forbid
from estimators import ESTIMATORS, bernoulli, categorical, create, facts
from estimators.base import LARGEST, SMALLEST, Sampler
from minigrad import Rng, Tensor, no_grad, op
from minigrad.backend import Backend
from minigrad.fused import softmax_array, softmax_vjp
from registry import PAIRS, pairs, with_options
from small_problem import WEIGHT, logits_of, one_cost

CATEGORICAL = [name for name in ESTIMATORS if facts(name).family is categorical]
STATEFUL = [name for name in ESTIMATORS if facts(name).state or facts(name).learned]


# ---- the facts


def test_every_registered_estimator_states_its_facts():
    for name in ESTIMATORS:
        estimator = facts(name)
        assert all((estimator.title, estimator.paper, estimator.evaluations, estimator.objective)), name
        assert estimator.exact_for in ("all", "quadratic", "linear", "none")
        assert estimator.support in ("hard", "soft")
        assert estimator.randomness in ("none", "sample", "samples", "set", "uniform", "noise")
        assert (estimator.randomness == "none") == (estimator.sample_count == 0)
        assert estimator.learned_objective in (("variance", "squared error") if estimator.learned else ("",))


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
    sizes = estimator.family.sizes(logits.shape)
    assert counts == [estimator.count_evaluations(*sizes, call) for call in range(11)]


IN_WORDS = {  # for L variables of K categories
    "S": lambda e, L, K: e.samples,
    "K": lambda e, L, K: K,
    "Kᴸ": lambda e, L, K: K**L,
    "L·(K − 1) + 1": lambda e, L, K: L * (K - 1) + 1,
    "L·(C + 1) + 1": lambda e, L, K: L * (e.summed + 1) + 1,
    "K(K−1)/2 + 1": lambda e, L, K: K * (K - 1) / 2 + 1,
}


def test_the_number_of_evaluations_in_words_is_the_number():
    for name in ESTIMATORS:
        estimator = facts(name)
        L, K = (2, 2) if estimator.family is bernoulli else (2, 3)
        first, second = (estimator.count_evaluations(L, K, call) for call in (0, 1))
        if estimator.evaluations in IN_WORDS:
            assert first == second == IN_WORDS[estimator.evaluations](estimator, L, K), name
        elif first == second:
            assert estimator.evaluations == f"{first}", name
        else:
            every = f"{second}, and {first - second} more every {estimator.tau_every}th call"
            assert estimator.evaluations == every, name


@pytest.mark.parametrize(("name", "family"), PAIRS)
def test_the_stated_randomness_is_what_is_drawn(name, family):
    """One-hots or bits alone, so many as stated, or noise, which `ladder.Seen` does not have."""
    estimator, seen = create(name, family=family), ladder.Seen()
    estimator(logits_of(family, 3), one_cost, Rng(0))  # networks have their weights after the first call
    if estimator.randomness in ("set", "uniform", "noise"):
        with pytest.raises(AttributeError, match="'Seen' object has no attribute"):
            estimator(logits_of(family, 3), one_cost, seen)
        return
    estimator(logits_of(family, 3), one_cost, seen)
    if estimator.randomness == "samples":
        assert len(seen.draws) > 1 or estimator.linear_draws  # of a bit's other value nothing is left to chance
    else:
        assert len(seen.draws) == {"none": 0, "sample": 1}[estimator.randomness]


class Planted:
    """Stands in for a `minigrad.Rng` that draws the second class, or ones, whatever the logits; noise is noise."""

    def __init__(self, rng):
        self.rng = rng

    def site(self, name):
        return Planted(self.rng.site(name))

    def one_hot(self, logits):
        return np.broadcast_to(np.eye(logits.shape[-1])[1], logits.shape).copy()

    def bernoulli(self, logits):
        return np.ones_like(logits)

    def __getattr__(self, name):
        return getattr(self.rng, name)


@pytest.mark.parametrize(("name", "family"), pairs(lambda e: e.sample_count > 0))
def test_a_sample_comes_first_or_is_made_of_noise_as_stated(name, family):
    estimator, seen, rng = create(name, family=family), [], Planted(Rng(0))
    estimator(logits_of(family, 50), lambda d: (seen.append(d.data), one_cost(d))[1], rng)
    plant = rng.bernoulli if family == "bernoulli" else rng.one_hot
    for d in seen[: estimator.sample_count]:
        assert np.array_equal(d, plant(d)) == estimator.sample_first


@pytest.mark.parametrize(("name", "family"), PAIRS)
def test_a_constant_cost_has_no_gradient(name, family):
    """Sample by sample: a baseline, or the difference of two costs, takes a constant away. (Added in the place of
    subtracted, it would leave every expectation as it is.) Without one, the constant is noise."""
    estimator, logits = create(name, family=family), logits_of(family, 50)
    for step in range(2 if estimator.cancels_constants else 1):  # the second time with what it has learned
        logits.grad = None
        estimator(logits, lambda d: 0.0 * one_cost(d) + 7.0, Rng(0).at(step)).sum().backward()
        estimator.update()
        if estimator.cancels_constants:
            np.testing.assert_allclose(logits.grad, 0.0, atol=1e-12)
        else:
            assert np.abs(logits.grad).max() > 1.0


@pytest.mark.parametrize("name", CATEGORICAL)
def test_gradients_sum_to_zero_over_the_classes(name):
    """Moving all logits of a variable together changes nothing. (SPSA, LAX and the measure-valued derivative know that
    on average only, finite differences up to their error.)"""
    problem = ladder.Problem("categorical", 3, 4, "cubic")
    _, g = ladder.monte_carlo(problem, create(name), 200)
    total = np.abs(g.sum(axis=-1)).max() / np.abs(g).max()
    assert total < 1e-9 if facts(name).sums_to_zero else total > 1e-6


@pytest.mark.parametrize(
    ("spec", "logit_scale", "power"),
    [
        pytest.param("st-decoupled:tau_f=2.5", 0.4, 1.0, id="st-decoupled:tau_f=2.5"),
        pytest.param("st-gs-decoupled:tau_f=2.5", 0.4, 1.0, id="st-gs-decoupled:tau_f=2.5"),
        pytest.param("st-slope:rate=1", 3.0, 1.0, id="st-slope:rate=1"),
        pytest.param("sts", 1.0, 0.5, id="sts"),
    ],
)
def test_a_changed_forward_distribution_is_the_stated_one(spec, logit_scale, power):
    estimator = create(spec, family="bernoulli")
    for _ in range(2):
        estimator.update()
    n, seen = 40_000, []
    logits = Tensor(np.full((n, 1), 0.8), requires_grad=True)
    estimator(logits, lambda d: (seen.append(d.data), d.sum(axis=1))[1], Rng(1))
    p = (1 / (1 + np.exp(-0.8 * logit_scale))) ** power
    assert estimator.logit_scale == pytest.approx(logit_scale)
    np.testing.assert_allclose(estimator.forward_probability(logits.data), p)
    assert stats.binomtest(int((seen[0] > 0).sum()), n, p).pvalue > 1e-3


class Enough(Exception):
    """The cost has been evaluated at all samples, and what comes after them is not needed."""


@pytest.mark.parametrize(("name", "family"), pairs(lambda e: e.sample_count > 0))
def test_the_forward_distribution_is_the_stated_one(name, family):
    points, n = [], 20_000
    logits, estimator = logits_of(family, n), create(name).of(family)

    def cost(d):
        points.append(d.data)
        if len(points) == estimator.sample_count:
            raise Enough
        return one_cost(d)

    with pytest.raises(Enough):
        estimator(logits, cost, Rng(8))
    p = estimator.forward_probability(logits.data[0])
    for d in points:
        if estimator.support == "hard":
            assert set(np.unique(d)) == {0.0, 1.0}
            if family == "categorical":
                assert np.array_equal(d.sum(axis=-1), np.ones((n, 1)))
        assert (d.min() >= 0.0 and d.max() <= 1.0) == estimator.bounded
        if family == "categorical":
            counts = np.bincount(d[:, 0].argmax(axis=-1), minlength=4)
            assert stats.chisquare(counts, n * p[0]).pvalue > 1e-3
        else:
            for i in range(2):
                on = np.sum(d[:, i] > estimator.threshold)
                assert stats.binomtest(int(on), n, p[i]).pvalue > 1e-3
    if estimator.support == "hard" and estimator.sample_count > 1 and estimator.randomness == "samples":
        assert not np.array_equal(points[0], points[1])


# ---- weights behind the cost, masks


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


@pytest.mark.parametrize("name", CATEGORICAL)
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
    everything = facts(name).enumerates_classes or facts(name).randomness == "set"  # a set of all three classes
    assert (g.std(axis=0).max() < 1e-12) == everything
    if everything:  # the problem without those classes
        _, small, _ = run(
            logits[mask], None, lambda d: ((d * np.array([1.0, -2.0, 0.5])).sum(axis=(1, 2)) + 0.5) ** 2.0
        )
        np.testing.assert_allclose(g[:, mask], small, atol=1e-12)
    if not facts(name).evaluates_masked:
        assert all((d[..., ~mask] == 0.0).all() for d in seen)


@pytest.mark.parametrize("name", [n for n in CATEGORICAL if facts(n).unbiased])
def test_masking_a_class_leaves_the_problem_without_it(name):
    """The mean over the classes that are left is the exact gradient of the smaller problem."""
    mask, theta = np.array([True, False, True, True]), np.array([0.4, 9.0, -0.6, 0.9])
    f = (np.array([1.0, 3.0, -2.0, 0.5]) + 0.5) ** 3.0
    x = Tensor(np.broadcast_to(theta, (20_000, 1, 4)).copy(), requires_grad=True)
    create(name)(x, lambda d: (d * f).sum(axis=(1, 2)), Rng(3), mask=mask).sum().backward()
    exact = softmax_vjp(softmax_array(theta[mask]), f[mask])
    assert np.abs(ladder.z_scores(x.grad[:, 0][:, mask], exact)).max() < 4.5


# ---- at the edges: finite results, in the dtype of the logits, or one clear sentence


def edges():
    """25 settings in which each value of one meets each value of every other: the columns b and a + kb modulo 5 of an
    orthogonal array, with two values more in some of them."""
    tau, scale = (SMALLEST, 0.1, 1.0, 10.0, LARGEST), (0.0, 1.0, 30.0, 1e4, 1.0)
    for a, b in itertools.product(range(5), repeat=2):
        column = [(a + k * b) % 5 for k in range(5)]
        yield {
            "tau": tau[column[0]],
            "scale": scale[column[1]],
            "classes": (1, 2, 3, 4, 2)[column[2]],
            "batch": (1, 2, 3, 1, 2)[column[3]],
            "dtype": (np.float32, np.float64)[column[4] % 2],
            "variables": 1 + column[4] // 2 % 2,
            "masked": b % 2 == 1,
            "seed": 5 * a + b,
        }


@pytest.mark.parametrize(("name", "family"), PAIRS)
def test_results_are_finite_at_the_edges(name, family):
    for edge in edges():
        results_are_finite_at_the_edge(name, family, **edge)


def results_are_finite_at_the_edge(name, family, tau, scale, classes, batch, dtype, variables, masked, seed):
    rng, mask = np.random.default_rng(seed), None
    shape = (batch, variables, classes) if family == "categorical" else (batch, 3)
    if masked and family == "categorical":
        mask = rng.random(shape) < 0.5
        mask[..., 0] |= ~mask.any(axis=-1)
    tau = max(tau, getattr(facts(name), "min_tau", 0.0))
    estimator = create(with_options(name, tau=tau, tau_f=tau, tau_b=tau), family=family)
    logits = Tensor((scale * rng.standard_normal(shape)).astype(dtype), requires_grad=True)
    axes = tuple(range(1, len(shape)))
    for step in range(2):  # the second time with what it has learned
        logits.grad = None
        value = estimator(logits, lambda d: (d * d + d).sum(axis=axes), Rng(seed).at(step), mask=mask)
        value.sum().backward()
        estimator.update()
        assert value.dtype == logits.grad.dtype == dtype
        assert np.isfinite(value.data).all()
        assert np.isfinite(logits.grad).all()
        if mask is not None:
            assert (logits.grad[~mask] == 0).all()
        if shape[-1] == 1 and (estimator.sums_to_zero or estimator.noise_differences):
            assert np.abs(logits.grad).max() < 1e-4  # one class only: nothing to choose


@pytest.mark.parametrize("option", ["step", "width", "most", "rate", "gap", "scale", "eta", "lr"])
@pytest.mark.parametrize("end", ["smallest", "largest"])
def test_results_are_finite_at_the_ends_of_the_range_of_every_other_option(option, end):
    """… in float32: whatever number is accepted can be divided by and multiplied with."""
    names = [n for n in ESTIMATORS if f"{option}=" in with_options(n, **{option: 0})]
    assert names
    for name in names:
        value = {"smallest": SMALLEST, "largest": LARGEST}[end]
        if option in ("most", "eta", "lr"):
            value = {"most": max(value, 1.0), "eta": min(value, 2.0 - SMALLEST), "lr": min(value, 1.0)}[option]
        estimator = create(f"{name}:{option}={value!r}")
        logits = logits_of(estimator.family.name, 3, np.float32)
        for step in range(2):
            logits.grad = None
            axes = tuple(range(1, logits.ndim))
            found = estimator(logits, lambda d, axes=axes: (d * d + d).sum(axis=axes), Rng(0).at(step))
            found.sum().backward()
            estimator.update()
            assert np.isfinite(found.data).all()
            assert np.isfinite(logits.grad).all()


@pytest.mark.parametrize(("name", "family"), PAIRS)
def test_logits_without_a_distribution_give_nan(name, family):
    """The value and all gradients of the example that has one; no other example notices."""
    for make in (Backend, DevsimBackend):
        for bad_logit in (np.nan, np.inf) if family == "categorical" else (np.nan,):
            a_logit_without_a_distribution_gives_nan(name, family, bad_logit, make)


def a_logit_without_a_distribution_gives_nan(name, family, bad_logit, make):
    estimator, backend = create(name, family=family), make()
    start = logits_of(family, 3).data.copy()
    start[1].reshape(-1)[-1] = bad_logit
    weight = Tensor(backend.to_device(WEIGHT[: start.shape[-1]].copy()), requires_grad=True)
    logits = Tensor(backend.to_device(start), requires_grad=True)
    with np.errstate(invalid="raise" if np.isnan(bad_logit) else "ignore"):  # inf − inf has a warning of its own
        value = estimator(logits, lambda d: ((d * weight).sum(axis=tuple(range(1, d.ndim))) + 0.5) ** 3.0, Rng(0))
        value.backward(backend.to_device(np.ones(3)))
        d = estimator.sample(logits, Rng(0)).data if isinstance(estimator, Sampler) else value.data
    bad = np.array([False, True, False])
    np.testing.assert_array_equal(np.isnan(backend.to_host(value.data)), bad)
    assert np.isnan(backend.to_host(logits.grad)[bad]).all()
    assert np.isfinite(backend.to_host(logits.grad)[~bad]).all()
    assert np.isnan(backend.to_host(weight.grad)).all()
    assert np.isnan(backend.to_host(d)[bad]).all()
    assert np.isfinite(backend.to_host(d)[~bad]).all()


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
def test_values_can_be_computed_without_a_graph(name, family):
    with no_grad():
        value = create(name).of(family)(Tensor(logits_of(family, 3).data), one_cost, Rng(0))
    assert value.shape == (3,)
    assert not value.requires_grad


@pytest.mark.parametrize(("name", "family"), PAIRS)
def test_no_two_draws_of_a_call_have_one_address(addresses, name, family):
    create(name, family=family)(logits_of(family, 3), one_cost, Rng(0))
    assert len(addresses) == len(set(addresses))


# ---- what is refused


@pytest.mark.parametrize(("name", "family"), PAIRS)
def test_logits_that_are_no_tensor_are_refused(name, family):
    with pytest.raises(TypeError, match="the logits must be a Tensor, got ndarray"):
        create(name).of(family)(logits_of(family, 3).data, one_cost, Rng(0))


@pytest.mark.parametrize(("name", "family"), PAIRS)
def test_a_cost_that_is_not_per_example_is_refused(name, family):
    logits = logits_of(family, 3)
    for axes in ((0, *range(1, logits.ndim)), logits.ndim - 1 if family == "categorical" else 0):
        with pytest.raises(ValueError, match="one value per example"):
            create(name).of(family)(logits, lambda d, axes=axes: d.sum(axis=axes), Rng(0))


@pytest.mark.parametrize(("name", "family"), PAIRS)
def test_a_cost_that_does_not_depend_on_the_sample_has_no_gradient(name, family):
    """A constant, and parameters of its own, which do get theirs. Only a single sample with a rule has then no way to
    the logits at all."""
    bias = Tensor(np.array([1.0, 2.0, 3.0]), requires_grad=True)
    for cost in (lambda d: Tensor(np.array([1.0, 2.0, 3.0])), lambda d: bias * 1.0):
        estimator, logits = create(name, family=family), logits_of(family, 3)
        value = estimator(logits, cost, Rng(0))
        np.testing.assert_allclose(value.data, [1.0, 2.0, 3.0])
        assert value.requires_grad or estimator.single_sample
        if value.requires_grad:
            value.sum().backward()
        if logits.grad is not None and estimator.cancels_constants:
            np.testing.assert_allclose(logits.grad, 0.0, atol=1e-12)
    np.testing.assert_allclose(bias.grad, 1.0)


@op
def rounded(x):
    """A rule without a derivative."""
    return np.rint(x), None


@pytest.mark.parametrize(("name", "family"), PAIRS)
def test_a_cost_without_a_derivative_is_enough_where_none_is_asked_for(name, family):
    """… and where one is, the error names the op."""
    estimator, logits = create(name, family=family), logits_of(family, 3)
    if estimator.cost_gradient:
        with pytest.raises(RuntimeError, match="rounded has no derivative"):
            estimator(logits, lambda d: one_cost(rounded(d)), Rng(0)).sum().backward()
    else:
        estimator(logits, lambda d: one_cost(rounded(d.detach())), Rng(0)).sum().backward()
        assert np.isfinite(logits.grad).all()


def test_a_cost_of_another_dtype_is_refused():
    message = "the cost must give float32, as the logits are, but it gave float64: convert what is in it"
    for name, family in (p.values for p in PAIRS):
        with pytest.raises(TypeError, match=message):
            create(name, family=family)(logits_of(family, 3, np.float32), lambda d: Tensor(np.ones(3)), Rng(0))


def test_inputs_of_other_examples_are_refused():
    call = lambda inputs: create("nvil")(logits_of("categorical", 3), one_cost, Rng(0), inputs=inputs)
    with pytest.raises(ValueError, match="the inputs need a row for each of the 3 examples, got 4"):
        call(np.zeros((4, 2)))
    with pytest.raises(TypeError, match="the inputs must be an array, not a Tensor: pass its"):
        call(Tensor(np.zeros((3, 2))))
    for wrong in (3, [[1.0]] * 3, np.array(3.0), "abc"):
        with pytest.raises(TypeError, match=r"the inputs must be an array \(B, ...\), got"):
            call(wrong)


def test_noise_that_is_no_rng_is_refused():
    for noise in (0, None, np.random.default_rng(0)):
        for estimator in map(create, ESTIMATORS):
            message = rf"the noise must come from a minigrad.Rng, got {type(noise).__name__}: "
            with pytest.raises(TypeError, match=message):
                estimator(logits_of(estimator.family.name, 3), one_cost, noise)
            if isinstance(estimator, Sampler):
                with pytest.raises(TypeError, match=message):
                    estimator.sample(logits_of(estimator.family.name, 3), noise)


@pytest.mark.parametrize("logits", [np.zeros((2, 3), int), np.zeros((2, 3), np.float16), np.zeros((2, 3), bool)])
def test_logits_of_another_dtype_are_no_tensor(logits):
    with pytest.raises(TypeError, match="a Tensor holds float32 or float64, got"):
        Tensor(logits)


def test_logits_without_an_axis_for_the_examples_are_refused():
    for name in CATEGORICAL:
        with pytest.raises(ValueError, match=r"logits need a first axis, for the examples, got the shape \(4,\)"):
            create(name)(Tensor(np.zeros(4), requires_grad=True), lambda d: d * 1.0, Rng(0))


@pytest.mark.parametrize(("name", "family"), PAIRS)
def test_a_cost_that_is_no_tensor_and_logits_without_examples_are_refused(name, family):
    estimator = create(name, family=family)
    for cost, kind in ((lambda d: np.ones(len(d)), "ndarray"), (lambda d: 1.0, "float"), (lambda d: None, "NoneType")):
        with pytest.raises(TypeError, match=f"the cost must give a Tensor, but it gave {kind}"):
            estimator(logits_of(family, 3), cost, Rng(0))
    with pytest.raises(ValueError, match=r"logits need a .* axis.*, got the shape \(\)"):
        estimator(Tensor(0.0, requires_grad=True), lambda d: d * 1.0, Rng(0))


# ---- state


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda e: pickle.loads(pickle.dumps(e)), "copy": copy.copy}


@pytest.mark.parametrize(("name", "family"), PAIRS)
def test_a_copy_goes_on_as_the_estimator_does(name, family):
    """… before the first call, between a call and its update, and after it. The copy goes first: but for a shallow one,
    which shares what is learned, it leaves the estimator as it was."""

    def step(estimator, n):
        logits = logits_of(family, 5)
        value = estimator(logits, one_cost, Rng(4).at(n))
        value.sum().backward()
        return value.data, logits.grad

    for how, (calls, updates) in itertools.product(COPIES, ((0, 0), (2, 1), (2, 2))):
        estimator = create(name, family=family)
        for n in range(calls):
            step(estimator, n)
            if n < updates:
                estimator.update()
        found = []
        for e in (COPIES[how](estimator), estimator):
            if how != "copy" and updates < calls:
                e.update()
            found += step(e, calls)
            if how != "copy":
                e.update()
                found += step(e, calls + 1)
        for a, b in zip(found[: len(found) // 2], found[len(found) // 2 :], strict=True):
            np.testing.assert_array_equal(a, b)


def test_learning_waits_for_update_and_is_forgotten_by_a_loaded_state():
    for name in STATEFUL:
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


@pytest.mark.parametrize("name", STATEFUL)
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
        fresh, shapes = create(name), lambda e: [p.shape for p in e.learned.parameters.values()]
        ladder.run(bigger, fresh, 5, Rng(0))
        if shapes(fresh) != shapes(estimator):
            with pytest.raises(ValueError, match="another estimator"):
                ladder.run(bigger, other, 5, Rng(0))


# ---- the registry


def test_options_in_the_name_reach_the_estimator():
    assert create("rloo:samples=4").samples == 4
    assert create("gst:gap=0.8,tau=0.5").gap == 0.8
    assert create("gst-p", 0.5).gap == "p"
    assert create("st", family="bernoulli").family is bernoulli
    assert create("rebar-coupled").coupled
    assert create("rebar:coupled=1").coupled
    assert create("st-slope:rate=0,most=1").most == 1.0
    assert not create("gst:consistent=0").consistent


def test_only_a_name_makes_an_estimator():
    for spec in (None, 3, create("st")):
        with pytest.raises(TypeError, match="an estimator is created by its name, like 'reinmax' or"):
            create(spec)


def test_a_temperature_that_is_set_later_is_checked_too():
    estimator = create("st-gs")
    estimator.tau = np.float32(0.5)
    assert type(estimator.tau) is float
    for tau in (0.0, 1e-39, float("nan")):
        with pytest.raises(ValueError, match="the temperature tau must be a number from 1e-06 to"):
            estimator.tau = tau
    assert estimator.tau == 0.5


def test_options_may_be_numpy_numbers():
    for tau in (np.float32(2.0), np.int64(2)):
        assert create("st", tau).tau == 2.0
    rloo = ESTIMATORS["rloo"](samples=np.int64(3))
    assert type(rloo.samples) is int


@pytest.mark.parametrize(
    ("spec", "tau", "message"),
    [
        ("nonsense", None, "unknown estimator 'nonsense'; the known ones are exact, finite-differences"),
        ("st", 0.0, "the temperature tau must be a number from 1e-06 to 1e.06, got 0.0"),
        ("st-gs", -1.0, "tau must be a number from"),
        ("gumbel-rao", float("nan"), "tau must be a number from"),
        ("gst-1.0", float("inf"), "tau must be a number from"),
        ("reinmax", 0.5, "at least 1"),
        ("reinforce", 1.0, "reinforce has no option 'tau'"),
        ("rloo:samples=1", None, "at least 2"),
        ("gumbel-rao:samples=0", None, "at least 1"),
        ("gumbel-rao:draws=3", None, "no option 'draws'; its options are tau, samples"),
        ("gst:gap=-1", None, "gap, unless it is .p., must be a number"),
        ("gst:gap=wide", None, "gap, unless it is .p., must be a number"),
        ("st:tau=warm", None, "tau must be a number from .* got 'warm'"),
        ("reinforce-mean:decay=1", None, "decay must be"),
        ("reinforce-minvar:decay=x", None, "decay must be"),
        ("rloo:samples=inf", None, "samples must be an integer"),
        ("rloo:samples=abc", None, "samples must be an integer"),
        ("gst-1.0:gap=5", None, "gst-1.0 has no option 'gap'"),
        ("st:tau=2", 3.0, "'tau' .* given twice"),
        ("spsa:width=0", None, "width must be a number from"),
        ("finite-differences:step=-1", None, "step must be a number from"),
        ("nvil:hidden=0", None, "hidden must be an integer of at least 1"),
        ("nvil:decay=1", None, "decay must be"),
        ("rodeo:hidden=0", None, "hidden must be an integer of at least 1"),
        ("nvil:lr=0", None, "learning rate lr must be a number from"),
        ("vimco:samples=1", None, "samples must be an integer of at least 2"),
        ("unordered-set:samples=9", None, "samples must be an integer of at least 2 and at most 8, got 9"),
        ("sum-and-sample:summed=0", None, "summed must be an integer of at least 1"),
        ("st-slope:most=0", None, "most must be a number from 1 to"),
        ("st-slope:surrogate=soft", None, "surrogate must be sigmoid or hard"),
        ("st-decoupled:tau_f=0", None, "the temperature tau_f must be a number from"),
        ("darn:expand_at=mean", None, "expand_at must be sample or half"),
        ("noisy-rectifier:noise=loud", None, "noise must be logistic or normal"),
        ("reinmax-cv:gs_noise=old", None, "gs_noise must be forward or fresh"),
        ("reinmax-cv:scale=big", None, "scale must be a number from -1e.06 to"),
        ("reinmax-cv:scale=inf", None, "scale must be a number from -1e.06 to"),
        ("rebar:eta=2", None, "eta must be a number from 1e-06 to 2"),
        ("rebar:eta=much", None, "eta must be a number from 1e-06 to 2"),
        ("rebar-coupled:coupled=0", None, "no option 'coupled'"),
        ("arms:samples=1", None, "at least 2"),
        ("st-slope:rate=-1", None, "rate must be a number from 0 to 1e.06, got -1"),
        ("st-slope:rate=inf", None, "rate must be a number .* got inf"),
        ("st-slope:most=inf", None, "most must be a number .* got inf"),
        ("st-slope:rate=fast", None, "rate must be a number .* got 'fast'"),
        ("rebar:lr=fast", None, "learning rate lr must be a number .* got 'fast'"),
        ("gst:consistent=False", None, "the option 'consistent' of the estimator gst must be 0 or 1, got 'False'"),
        ("gst:detached=2", None, "'detached' .* must be 0 or 1, got 2"),
        ("nvil:normalise=no", None, "'normalise' .* must be 0 or 1, got 'no'"),
        ("rebar:coupled=yes", None, "'coupled' .* must be 0 or 1, got 'yes'"),
        ("", None, "unknown estimator ''; the known ones are exact, "),
        ("renmax", None, "unknown estimator 'renmax', did you mean 'reinmax'. the known ones are exact, "),
        ("Gumbel_Softmax:tau=2", None, "unknown estimator 'Gumbel_Softmax', did you mean 'gumbel-softmax'."),
        ("st:tau=", None, "'tau=' is no option of the estimator st: write option=value"),
        ("rebar:coupled", None, "'coupled' is no option of the estimator rebar: write option=value"),
        ("rloo:=3", None, "'=3' is no option of the estimator rloo: write option=value"),
        ("rloo:samples=999999999", None, "samples must be an integer of at least 2 and at most 10000, got 999999999"),
        ("gumbel-rao:samples=10001", None, "samples .* at most 10000"),
        ("relax:hidden=999999999", None, "hidden .* at most 10000"),
        ("rebar:lr=1e300", None, "learning rate lr must be a number from 1e-12 to 1, got 1e.300"),
        ("spsa:width=1e-40", None, "width must be a number from"),
        ("gst:gap=1e39", None, "gap, unless it is 'p', must be a number from 0 to"),
        ("st", 10**400, "tau must be a number from"),
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


def test_a_family_and_its_former_name_must_agree():
    assert create("st", code="bernoulli", family="bernoulli").family is bernoulli
    with pytest.raises(ValueError, match="family is 'categorical' and code, its former name, 'bernoulli'"):
        create("st", code="bernoulli", family="categorical")
