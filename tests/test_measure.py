"""Bias and variance of estimators: tables against plain loops, samples against sums, and what is refused."""

import dataclasses
import doctest
import functools
import json
import re
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from estimators import ESTIMATORS, create
from estimators import measure as library
from estimators.base import Estimator, Sampler
from estimators.enumeration import Given
from estimators.exact import exact_gradient
from estimators.measure import FAMILIES, EnumeratedCost, enumerated, measure, sampled
from estimators.score_function import Reinforce
from minigrad import Rng, Tensor
from minigrad.fused import bce_with_logits
from minigrad.ops import tanh

EXAMPLES = 4
SHAPES = {"categorical": (2, 3), "bernoulli": (4,)}


@functools.cache
def costs_by_example(family):
    """(logits, images, cost): the cross-entropy of each example's own image, far from linear in d, nor a sum."""
    rng, shape = np.random.default_rng(3), SHAPES[family]
    W1, W2 = 1.5 * rng.standard_normal((np.prod(shape), 8)), 1.5 * rng.standard_normal((8, 6))
    images = (rng.random((EXAMPLES, 6)) < 0.5).astype(float)

    def cost(d, index):
        return bce_with_logits(tanh(d.reshape(d.shape[0], -1) @ W1) @ W2, images[index])

    return rng.standard_normal((EXAMPLES, *shape)), images, cost


@functools.cache
def one_cost(family, examples=EXAMPLES):
    """(logits, cost): f(d) = 1 + ½ Σⱼ vⱼ tanh ½⟨wⱼ, d⟩ for all examples."""
    rng, shape = np.random.default_rng(1), {"categorical": (3, 4), "bernoulli": (6,)}[family]
    W, v = 0.5 * rng.standard_normal((np.prod(shape), 8)), rng.standard_normal((8, 1))

    def cost(d):
        hidden = tanh(d.reshape(d.shape[0], -1) @ W.astype(d.dtype))
        return 1.0 + 0.5 * (hidden @ v.astype(d.dtype)).reshape(-1)

    return rng.standard_normal((examples, *shape)), cost


@functools.cache
def problem(family="categorical", kind="by example", examples=EXAMPLES):
    if kind == "by example":
        logits, images, cost = costs_by_example(family)
        return EnumeratedCost(logits, cost, family, inputs=images)
    return EnumeratedCost(*one_cost(family, examples), family)


def cost_of(family, kind):
    """The cost as a function of d and of the index of each row's example."""
    if kind == "by example":
        return costs_by_example(family)[2]
    return lambda d, index: one_cost(family)[1](d)


def handles(name, family):
    return any(module.name == family for module in create(name).families)


both_kinds = pytest.mark.parametrize("kind", ["by example", "one for all"])
both_families = pytest.mark.parametrize("family", FAMILIES)


# ---- the table of all outcomes


@both_kinds
@both_families
def test_the_exact_gradient_is_the_one_through_the_cost(family, kind):
    t, cost = problem(family, kind), cost_of(family, kind)
    theta = Tensor(t.logits, requires_grad=True)
    create("exact", family=family)(theta, lambda d: cost(d, np.arange(EXAMPLES)), Rng(0)).backward(np.ones(EXAMPLES))
    assert abs(theta.grad).max() > 1e-2
    np.testing.assert_allclose(t.gradient, theta.grad, rtol=0, atol=1e-12)
    assert t.gradient_norm == pytest.approx(np.sqrt((theta.grad**2).sum()), rel=1e-12)


@both_kinds
@both_families
def test_costs_and_slopes_are_those_of_each_outcome_by_itself(family, kind):
    t, cost = problem(family, kind), cost_of(family, kind)
    for i in range(EXAMPLES):
        for n, outcome in enumerate(t.outcomes):
            z = Tensor(outcome[None], requires_grad=True)
            f = cost(z, np.array([i]))
            f.backward(np.ones(1))
            np.testing.assert_allclose(t.costs[i, n], f.data[0], rtol=0, atol=1e-12)
            np.testing.assert_allclose(t.slopes[i, n], z.grad[0], rtol=0, atol=1e-12)
    assert t.slopes.std(axis=1).max() > 1e-2  # the cost is not linear
    assert (t.costs.std(axis=0).max() > 1e-2) == (kind == "by example")


@both_families
@pytest.mark.parametrize("points", ["outcomes", "one for each image", "all different"])
def test_the_table_s_cost_is_the_cost_wherever_it_is_taken(family, points, rng):
    t, examples, repeats = problem(family), np.array([2, 0]), 5
    if points == "outcomes":
        d = t.outcomes[rng.integers(len(t.outcomes), size=len(examples) * repeats)]
    else:
        d = FAMILIES[family].probability(rng.standard_normal((len(examples) * repeats, *t.outcomes.shape[1:])))
        if points == "one for each image":
            d = np.repeat(d[: len(examples)], repeats, axis=0)
    weights, results = rng.standard_normal(len(d)), []
    itself = cost_of(family, "by example")
    for cost in (t.cost_of_rows(examples, repeats), lambda d: itself(d, np.repeat(examples, repeats))):
        z = Tensor(d, requires_grad=True)
        f = cost(z)
        f.backward(weights)
        results.append((f.data, z.grad))
    for a, b in zip(*results, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-10)


def test_only_points_that_are_no_outcomes_are_evaluated():
    evaluated, (logits, _, cost) = [], costs_by_example("categorical")
    t = EnumeratedCost(logits, lambda d, index: evaluated.append(len(d.data)) or cost(d, index))
    assert evaluated == [9] * EXAMPLES + [1]  # the last one is a row by itself
    assert t.slopes.shape == (EXAMPLES, 9, 2, 3)
    evaluated.clear()
    for name in ("reinforce", "reinmax", "local-expectation"):
        enumerated(functools.partial(create, name), t, Rng(0))
    sampled(functools.partial(create, "rloo"), t, Rng(0), 40)
    assert not evaluated
    enumerated(functools.partial(create, "muprop"), t, Rng(0))
    assert evaluated == [1] * EXAMPLES
    evaluated.clear()
    sampled(functools.partial(create, "gumbel-softmax"), t, Rng(0), 60)
    assert evaluated == [3 * EXAMPLES] * 20


def test_one_cost_for_all_examples_is_evaluated_once():
    evaluated, (logits, cost) = [], one_cost("bernoulli")
    t = EnumeratedCost(logits, lambda d: evaluated.append(len(d.data)) or cost(d), "bernoulli")
    for name in ("reinforce", "st", "darn", "disarm"):
        t.measure(name, samples=40)
    assert evaluated == [64, 1, 64]  # the costs, a row by itself, the slopes


def test_slopes_are_found_only_for_who_asks_for_them():
    """A cost without a derivative is enough for an estimator that needs its values only."""
    logits, (_, cost) = problem(kind="one for all").logits, one_cost("categorical")
    t = EnumeratedCost(logits, lambda d: Tensor(cost(d).data))
    for name in ("reinforce", "local-expectation", "exact", "rloo", "disarm-sb", "muprop-simple"):
        assert t.measure(name, samples=40).cosine > 0.5
    with pytest.raises(RuntimeError, match="the cost has no derivative with respect to d, which this estimator needs"):
        t.measure("st")


@both_families
def test_costs_and_slopes_that_are_given_are_taken(family):
    t, calls = problem(family), []
    own = lambda name, array: lambda outcomes: calls.append((name, outcomes.shape)) or array
    _, images, cost = costs_by_example(family)
    with_tables = {"costs": own("costs", t.costs), "slopes": own("slopes", t.slopes)}
    given = EnumeratedCost(t.logits, cost, family, inputs=images, **with_tables)
    assert calls == [("costs", t.outcomes.shape)]
    for name in ("reinforce", "nvil", "st", "reinmax", "muprop", "rloo", "gumbel-softmax"):
        assert given.measure(name, samples=40) == t.measure(name, samples=40)
    assert calls == [("costs", t.outcomes.shape), ("slopes", t.outcomes.shape)]


def test_a_bit_is_measured_as_a_variable_of_two_classes():
    """With the logits (0, a) one gradient becomes two of opposite sign: ‖g‖ grows by √2, and what is relative stays."""
    bits, (logits, cost) = problem("bernoulli", "one for all"), one_cost("bernoulli")
    classes = EnumeratedCost(np.stack([0.0 * logits, logits], axis=-1), lambda d: cost(d[..., 1]))
    np.testing.assert_allclose(classes.gradient[..., 1], bits.gradient, rtol=0, atol=1e-12)
    assert classes.gradient_norm == pytest.approx(np.sqrt(2.0) * bits.gradient_norm)
    for name in ("reinforce", "local-expectation"):
        a, b = (dataclasses.asdict(t.measure(name)) for t in (classes, bits))
        for key in KEYS:
            assert a[key] == pytest.approx(b[key], rel=1e-9, abs=1e-11), (name, key)


def test_the_logits_are_copied():
    logits, cost = one_cost("categorical")
    mine = logits.copy()
    t = EnumeratedCost(mine, cost)
    before = t.measure("st")
    mine += 1.0 + np.arange(4)
    assert t.measure("st") == before


# ---- enumerated results


def by_loops(make, family, kind):
    """Bias, deviation, mean squared error and cosine: every outcome by itself, with the cost itself."""
    t, cost_by_index = problem(family, kind), cost_of(family, kind)
    g, mean, variance = t.gradient, np.zeros_like(t.gradient), 0.0
    for i in range(EXAMPLES):
        estimator, found, q = make(), [], []
        theta = t.logits[i : i + 1]
        p = estimator.family.probability(estimator.logit_scale * theta)
        for z in t.outcomes:
            logits = Tensor(theta, requires_grad=True)
            cost = lambda d, i=i: cost_by_index(d, np.array([i]))
            inputs = None if t.inputs is None else t.inputs[i : i + 1]
            estimator(logits, cost, Given(samples=[z[None]], rng=Rng(0)), inputs=inputs).backward(np.ones(1))
            found.append(logits.grad[0])
            chance = np.where(z > 0, p[0], 1.0 if estimator.family.name == "categorical" else 1.0 - p[0])
            q.append(np.prod(chance))
        mean[i] = np.tensordot(q, found, axes=1)
        variance += sum(w * np.square(x - mean[i]).sum() for w, x in zip(q, found, strict=True))
    size = np.square(g).sum()
    bias2 = np.square(mean - g).sum()
    cosine = (mean * g).sum() / np.sqrt(np.square(mean).sum() * size)
    return {
        "bias": np.sqrt(bias2 / size),
        "deviation": np.sqrt(variance / size),
        "mse": (bias2 + variance) / size,
        "cosine": cosine,
    }


ENUMERATED = [
    (name, family)
    for name in ESTIMATORS
    for family in FAMILIES
    if create(name).randomness in ("sample", "none") and handles(name, family)
]


OPTIONS = [(spec, family) for spec in ("st-decoupled:tau_f=1.6", "reinmax:tau=2", "st:tau=0.6") for family in FAMILIES]


@both_kinds
@pytest.mark.parametrize(
    ("name", "family"), [case for case in ENUMERATED if create(case[0]).randomness == "sample"] + OPTIONS
)
def test_an_enumerated_row_is_what_plain_loops_find(name, family, kind):
    make = functools.partial(create, name, family=family)
    found, expected = enumerated(make, problem(family, kind), Rng(0)), by_loops(make, family, kind)
    assert found.how == "enumerated"
    for key, value in expected.items():
        assert getattr(found, key) == pytest.approx(value, rel=1e-9, abs=1e-11), key
        assert getattr(found, f"{key}_interval") is None
    assert found.gradient_norm == problem(family, kind).gradient_norm


@pytest.mark.parametrize(("name", "family"), ENUMERATED)
def test_unbiased_estimators_have_no_bias_and_the_others_have(name, family):
    estimator, found = (
        create(name, family=family),
        enumerated(functools.partial(create, name, family=family), problem(family), Rng(0)),
    )
    if estimator.exact_for == "all":
        assert found.bias < 1e-11
        assert found.cosine == pytest.approx(1.0)
        assert (found.deviation < 1e-12) == (name == "exact")
    else:
        assert found.bias > (1e-7 if name == "finite-differences" else 1e-3)


def test_a_temperature_changes_bias_and_variance():
    t = problem(kind="one for all")
    found = [enumerated(functools.partial(create, "st", tau), t, Rng(0)) for tau in (0.5, 1.0, 2.0)]
    assert len({round(f.bias, 6) for f in found}) == 3
    assert found[0].deviation > found[1].deviation > found[2].deviation


@both_families
def test_float32_gives_the_same_numbers_but_for_its_rounding(family):
    logits, cost = one_cost(family)
    single, double = EnumeratedCost(logits.astype(np.float32), cost, family), problem(family, "one for all")
    assert single.logits.dtype == single.costs.dtype == single.slopes.dtype == np.float32
    np.testing.assert_allclose(single.gradient, double.gradient, rtol=0, atol=1e-6)
    theta, costs = single.logits.astype(np.float64), single.costs.astype(np.float64)
    g, _ = exact_gradient(FAMILIES[family].probability(theta), double.outcomes, costs, FAMILIES[family])
    assert single.gradient.dtype == np.float64
    np.testing.assert_allclose(single.gradient, g, rtol=0, atol=1e-15)  # what is rounded are the logits and the costs
    for name in ("reinforce", "st", "reinmax", "muprop", "exact"):
        for key in KEYS:
            found, expected = (getattr(t.measure(name), key) for t in (single, double))
            assert found == pytest.approx(expected, rel=1e-4, abs=1e-4), (name, key)


# ---- sampled results

KEYS = ("bias", "deviation", "mse", "cosine")


@pytest.mark.parametrize("name", ["reinforce", "muprop", "st", "reinmax", "gst-1.0", "st-decoupled"])
def test_samples_agree_with_sums_within_their_intervals(name):
    make = functools.partial(create, name)
    exact, found = enumerated(make, problem(), Rng(0)), sampled(make, problem(), Rng(1), 2000)
    assert found.how == "sampled"
    assert found.samples == 2000
    for key in KEYS:
        low, high = getattr(found, f"{key}_interval")
        slack = 0.5 * (high - low)  # one of so many intervals may well miss; coverage is tested below
        assert low - slack <= getattr(exact, key) <= high + slack, key
        assert low <= getattr(found, key) <= high
        assert high - low < 0.4 * max(exact.deviation, 1.0) ** 2


@pytest.mark.parametrize("name", ["st", "reinforce"])
def test_intervals_cover_the_truth_as_often_as_they_say(name):
    t, make = problem(kind="one for all", examples=20), functools.partial(create, name)
    exact = enumerated(make, t, Rng(0))
    runs = [sampled(make, t, Rng(seed), 100) for seed in range(80)]
    for key in KEYS:
        values = np.array([getattr(r, key) for r in runs])
        low, high = np.array([getattr(r, f"{key}_interval") for r in runs]).T
        truth = getattr(exact, key)
        covered = np.mean((low <= truth + 1e-12) & (truth - 1e-12 <= high))
        assert covered >= 0.88, key  # four standard errors below 95 % would be 0.85
        if name == "st":  # no interval is pressed against a bound: its length is that of 2 t standard deviations
            length = np.mean(high - low) / (2 * stats.t.ppf(0.975, 19) * values.std())
            assert 0.75 < length < 1.4, key
    if name == "st":
        assert np.mean([r.bias for r in runs]) == pytest.approx(exact.bias, rel=0.02)


def test_the_intervals_are_those_of_a_plain_jackknife(monkeypatch):
    t, make, estimates, seen = (
        problem(kind="one for all"),
        functools.partial(create, "st"),
        EnumeratedCost.estimates,
        [],
    )
    monkeypatch.setattr(EnumeratedCost, "estimates", lambda *a: seen.append(estimates(*a)) or seen[-1])
    found, g = sampled(make, t, Rng(4), 60), t.gradient.reshape(EXAMPLES, -1)
    draws = np.array(seen)  # (groups, examples, draws of a group, logits)

    def by_hand(draws):
        draws = np.concatenate(draws, axis=1)
        n, mean, size = draws.shape[1], draws.mean(axis=1), np.square(g).sum()
        variance = draws.var(axis=1, ddof=1).sum()
        cosine = (mean * g).sum() / np.sqrt((np.square(mean).sum() - variance / n) * size)
        mse = np.square(draws - g[:, None]).sum() / n
        return np.array([(np.square(mean - g).sum() - variance / n) / size, variance / size, mse / size, cosine])

    left_out = np.array([by_hand(np.delete(draws, j, axis=0)) for j in range(20)])
    student = stats.t.ppf(0.975, 19)
    margin = student * np.sqrt(19 / 20 * np.square(left_out - left_out.mean(axis=0)).sum(axis=0))
    assert student == pytest.approx(2.093, abs=1e-4)
    value = by_hand(draws)
    for key, v, low, high in zip(KEYS, value, value - margin, value + margin, strict=True):
        power = 0.5 if key in ("bias", "deviation") else 1.0
        assert getattr(found, key) == pytest.approx(min(v, 1.0) ** power if key == "cosine" else v**power, rel=1e-9)
        expected = [max(low, 0.0) ** power, min(high, 1.0) if key == "cosine" else high**power]
        assert getattr(found, f"{key}_interval") == pytest.approx(expected, rel=1e-8)


def test_reported_numbers_stay_where_they_can_be():
    bounds = library.within_bounds
    assert bounds("bias2", -0.1, -0.5, 0.09) == {"bias": 0.0, "bias_interval": (0.0, pytest.approx(0.3))}
    assert bounds("cosine", -0.5, -1.5, 0.5) == {"cosine": -0.5, "cosine_interval": (-1.0, 0.5)}
    assert bounds("cosine", 1.01, 0.9, 1.1) == {"cosine": 1.0, "cosine_interval": (0.9, 1.0)}
    assert library.finite({"x": 1}["x"]) == 1
    assert library.finite([np.float64(0.5), float("nan"), float("inf")]) == [0.5, None, None]


def test_a_mean_of_which_nothing_but_noise_is_known_has_no_cosine():
    g, errors = np.array([1.0, 0.0]), np.array([-10.0, 0.0])  # ten estimates whose mean is 0
    found = library.from_sums(10, errors, 1e3, g)
    assert np.isnan(found["cosine"])
    assert found["variance"] == pytest.approx((1e3 - 10.0) / 9)


class Slanted(Reinforce):
    """REINFORCE times 1.2: a bias of 0.2 in every component."""

    def estimate(self, logits, cost, rng):
        value = super().estimate(logits, cost, rng)
        return value + 0.2 * (value - value.detach())


def test_a_planted_error_is_seen():
    right, exact = (
        enumerated(functools.partial(create, "reinforce"), problem(), Rng(0)),
        enumerated(Slanted, problem(), Rng(0)),
    )
    assert exact.bias == pytest.approx(0.2)
    assert exact.deviation == pytest.approx(1.2 * right.deviation)
    assert exact.cosine == pytest.approx(1.0)
    found = sampled(lambda: Shifted(0.2), problem(), Rng(2), 400)
    assert found.bias_interval[0] > 0.15
    assert found.bias_interval[1] < 0.25
    assert sampled(lambda: Shifted(0.0), problem(), Rng(2), 400).bias_interval[0] == 0.0


class Shifted(create("local-expectation").__class__):
    """Local expectation gradients, which vary little, times 1 + error."""

    randomness = "noise"

    def __init__(self, error):
        self.error = error

    def gradient(self, logits, local_costs, rng):
        return (1.0 + self.error) * super().gradient(logits, local_costs, rng)


def test_the_noise_of_the_mean_is_no_bias():
    """With 40 estimates the mean of REINFORCE is far from g, by its deviation/√40, which must not be called bias."""
    make, t = functools.partial(create, "reinforce"), problem()
    noise = enumerated(make, t, Rng(0)).deviation / np.sqrt(40)
    runs = [sampled(make, t, Rng(seed), 40) for seed in range(10)]
    assert np.mean([r.bias_interval[0] == 0.0 for r in runs]) >= 0.8
    assert np.median([r.bias for r in runs]) < 0.5 * noise


def test_groups_and_calls_do_not_change_what_is_counted(monkeypatch):
    """In calls of one estimate per image, there are as many estimates, and all are different."""
    make = functools.partial(create, "st")
    monkeypatch.setattr(library, "ROWS", 1)
    seen, estimates = [], EnumeratedCost.estimates
    monkeypatch.setattr(EnumeratedCost, "estimates", lambda *a: seen.append(estimates(*a)) or seen[-1])
    assert sampled(make, problem(kind="one for all"), Rng(0), 41).samples == 60
    assert len({x.tobytes() for x in seen}) == len(seen) == 60


# ---- what is measured


@pytest.mark.parametrize("name", ["reinmax", "rloo:samples=3", "nvil", "rebar"])
def test_a_name_a_factory_and_a_fresh_instance_are_measured_alike(name):
    (logits, images, cost), options = costs_by_example("categorical"), {"samples": 60, "rng": Rng(3)}
    by_name = measure(name, logits, cost, inputs=images, **options)
    assert measure(functools.partial(create, name), logits, cost, inputs=images, **options) == by_name
    assert measure(create(name), logits, cost, inputs=images, **options) == by_name
    assert problem().measure(name, **options) == by_name
    assert by_name.how == ("sampled" if name in ("rloo:samples=3", "rebar") else "enumerated")


@pytest.mark.parametrize(
    ("name", "family"), [(n, f) for n in ESTIMATORS for f in FAMILIES if handles(n, f) and not create(n).multi_sample]
)
def test_an_instance_is_measured_as_it_is_and_not_changed(name, family):
    """One that has learned, and one that shall learn from its latest call."""
    t, estimator, twin = problem(family), create(name, family=family), create(name, family=family)
    step = lambda n: [t.estimates(e, np.arange(EXAMPLES), 1, Rng(5).at(n)) for e in (estimator, twin)]
    update = lambda: (estimator.update(), twin.update())
    for n in range(2):
        step(n)
        update()
    first = t.measure(estimator, samples=40).as_dict()
    assert t.measure(estimator, samples=40).as_dict() == first
    step(2)
    t.measure(estimator, samples=40)
    update()
    a, b = estimator.state_dict(), twin.state_dict()
    assert a.keys() == b.keys()
    assert all(np.array_equal(a[key], b[key]) for key in a), "it learns from its own latest call alone"
    assert vars(estimator).keys() == vars(twin).keys()


def test_what_an_instance_has_learned_counts():
    logits, cost = one_cost("categorical")
    t = EnumeratedCost(logits, lambda d: cost(d) + 5.0)
    estimator = create("reinforce-mean")
    fresh = t.measure(estimator)
    t.estimates(estimator, np.arange(EXAMPLES), 50, Rng(0))
    estimator.update()
    assert t.measure(estimator).deviation < 0.5 * fresh.deviation
    assert t.measure("reinforce-mean") == fresh


def test_a_learned_baseline_looks_at_the_inputs():
    (logits, images, cost), t, estimator = costs_by_example("categorical"), problem(), create("nvil")
    for n in range(2):
        t.estimates(estimator, np.arange(EXAMPLES), 20, Rng(0).at(n))
        estimator.update()
    found = measure(estimator, logits, cost, inputs=images)
    assert found == t.measure(estimator)
    assert found != measure(estimator, logits, cost, inputs=1.0 - images)
    with pytest.raises(ValueError, match="NVIL's baseline saw inputs of width 6, not"):
        measure(estimator, logits[:, :, :2], lambda d, i: d.sum(axis=(1, 2)) * d[:, 0, 0] * (1.0 + i))


def test_the_same_noise_gives_the_same_numbers():
    (logits, cost), t = one_cost("categorical"), problem(kind="one for all")
    first = measure("rloo", logits, cost, samples=40)
    assert measure("rloo", logits, cost, samples=40, rng=Rng(0)) == first
    assert t.measure("rloo", samples=40, rng=0) == first == sampled("rloo", t, Rng(0), 40)
    assert measure("rloo", logits, cost, samples=40, rng=1).deviation != first.deviation


@pytest.mark.parametrize("shape", [(5,), (2, 3), (2, 2, 2)])
def test_bits_stand_on_any_axes(shape, rng):
    logits = rng.standard_normal((3, *shape)) if shape != (5,) else rng.standard_normal(5)
    w = rng.standard_normal(logits[0].size)
    cost = lambda b: (b.reshape(b.shape[0], -1) @ w + 0.3) ** 3.0
    found = measure("local-expectation", logits, cost, family="bernoulli")
    assert found.bias < 1e-12
    assert found.cosine == pytest.approx(1.0)


# ---- the result


def test_a_result_is_written_as_json():
    found = problem().measure("rloo", samples=40).as_dict()
    assert found == json.loads(json.dumps(found, allow_nan=False))
    names = [name for key in KEYS for name in (key, f"{key}_interval")]
    assert list(found) == ["how", "samples", *names, "gradient_norm"]
    assert [type(found[name]) for name in names] == 4 * [float, list]
    exact = problem().measure("st")
    assert list(exact.as_dict()) == ["how", *KEYS, "gradient_norm"]
    assert dataclasses.asdict(exact)["bias_interval"] is None
    assert dataclasses.replace(exact, cosine=float("nan")).as_dict()["cosine"] is None
    with pytest.raises(dataclasses.FrozenInstanceError):
        exact.bias = 0.0


class Silent(Reinforce):
    """An estimate that is 0 everywhere: its bias is 1, and it has no direction."""

    def estimate(self, logits, cost, rng):
        return super().estimate(logits, cost, rng).detach() + 0.0 * logits.sum(axis=(1, 2))


def test_an_estimate_of_zero_is_all_bias_and_has_no_direction():
    found = problem().measure(Silent)
    assert (found.bias, found.deviation, found.mse) == (1.0, 0.0, 1.0)
    assert np.isnan(found.cosine)


class Broken(create("local-expectation").__class__):
    randomness = "noise"

    def gradient(self, logits, local_costs, rng):
        return super().gradient(logits, local_costs, rng) * np.nan


def test_estimates_that_are_not_numbers_are_no_good_ones():
    """NaN is not 0, which would be the best bias there is."""
    found = problem().measure(Broken, samples=40)
    assert all(np.isnan(getattr(found, key)) for key in KEYS)
    assert all(np.isnan(getattr(found, f"{key}_interval")).all() for key in KEYS)
    assert found.as_dict()["bias_interval"] == [None, None]


class Opposite(create("exact").__class__):
    def gradient(self, logits, outcomes, costs):
        dtheta, q = super().gradient(logits, outcomes, costs)
        return -dtheta, q


def test_the_opposite_of_the_gradient_has_cosine_minus_one():
    found = problem().measure(Opposite)
    assert found.bias == pytest.approx(2.0)
    assert -1.0 <= found.cosine <= -1.0 + 1e-12


# ---- what is refused


class Noisy(Sampler):
    """Its sample comes from noise, and it does not say so."""

    title = "Noisy"

    def draw(self, logits, rng):
        return logits + self.family.harden(logits.data + self.family.noise(rng, logits.data)) - logits.data


class Twice(Estimator):
    """Two samples, and it does not say so."""

    title = "Twice"

    def estimate(self, logits, cost, rng):
        return cost(Tensor(rng.one_hot(logits.data))) + cost(Tensor(rng.one_hot(logits.data)))


L = np.random.default_rng(0).standard_normal((2, 2, 3))
W = np.random.default_rng(1).standard_normal((2, 3))


def f(d):
    return ((d * W).sum(axis=(1, 2)) + 0.3) ** 3.0


def drifting():
    calls = []
    return lambda d: calls.append(1) or f(d) + 1.0 * len(calls)


REFUSED = {
    "too many outcomes": (
        lambda: measure("st", np.zeros((1, 9, 4)), f),
        ValueError,
        r"^exact enumeration of 4\*\*9 outcomes: at most 16384 are allowed, use fewer variables.$",
    ),
    "an estimator that refuses the size": (
        lambda: measure(Small, L, f),
        ValueError,
        "^2 variables of 3 categories are too much.$",
    ),
    "a cost with an axis too many": (
        lambda: measure("st", L, lambda d: (d * W).sum(axis=2)),
        ValueError,
        r"^the cost must give one value per example, \(9,\), but it gave \(9, 2\): sum over the other axes of d.$",
    ),
    "a mean over the rows": (
        lambda: measure("st", L, lambda d: f(d).mean()),
        ValueError,
        r"^the cost must give one value per example, \(9,\), but it gave \(\): sum",
    ),
    "a cost that is no Tensor": (
        lambda: measure("st", L, lambda d: f(d).data),
        TypeError,
        "^the cost must give a Tensor, but it gave ndarray: compute it from d by ops.$",
    ),
    "a cost that depends on the other rows": (
        lambda: measure("st", L, lambda d: f(d) - f(d).mean()),
        ValueError,
        "^the cost must depend on its own row of d alone, and not on chance: the last outcome of the last example",
    ),
    "a cost that changes from call to call": (
        lambda: measure("st", L, drifting()),
        ValueError,
        "^the cost must depend on its own row of d alone, and not on chance",
    ),
    "no function": (lambda: measure("st", L, 3.0), TypeError, "^the cost must be a function of d, or of d and"),
    "a function of three": (
        lambda: measure("st", L, lambda d, i, j: f(d)),
        TypeError,
        "^the cost gets d, or d and the index of each row's example, but it needs d, i, j.$",
    ),
    "costs of another cost": (
        lambda: EnumeratedCost(L, f, costs=lambda z: np.ones((2, 9))),
        ValueError,
        "^the cost must depend on its own row of d alone, and not on chance",
    ),
    "costs of another shape": (
        lambda: EnumeratedCost(L, f, costs=lambda z: np.ones(9)),
        ValueError,
        r"^costs must give float64 \(2, 9\), but it gave float64 \(9,\).$",
    ),
    "costs of another dtype": (
        lambda: EnumeratedCost(L, f, costs=lambda z: np.ones((2, 9), np.float32)),
        ValueError,
        r"^costs must give float64 \(2, 9\), but it gave float32 \(2, 9\).$",
    ),
    "slopes of another shape": (
        lambda: EnumeratedCost(L, f, slopes=lambda z: np.ones((9, 2, 3))).measure("st"),
        ValueError,
        r"^slopes must give float64 \(2, 9, 2, 3\), but it gave float64 \(9, 2, 3\).$",
    ),
    "a name for the other family": (
        lambda: measure("disarm", L, f),
        ValueError,
        "^DisARM / U2G is for bernoulli variables, not 'categorical': choose another family or estimator.$",
    ),
    "an instance for the other family": (
        lambda: measure(create("reinmax"), L, f, family="bernoulli"),
        ValueError,
        "^ReinMax is for categorical variables, but the problem has bernoulli ones: choose one family.$",
    ),
    "a factory for the other family": (
        lambda: EnumeratedCost(L, f).measure(lambda: create("disarm")),
        ValueError,
        "^DisARM / U2G is for bernoulli variables, but the problem has categorical ones: choose one family.$",
    ),
    "an unknown family": (
        lambda: measure("st", L, f, family="trits"),
        ValueError,
        "^unknown family 'trits'; the known ones are categorical, bernoulli.$",
    ),
    "a bound of several samples": (
        lambda: measure("vimco", L, f),
        ValueError,
        r"^VIMCO estimates the gradient of −E log mean e\^\(−f\), which is not that of E f\(D\): take another",
    ),
    "an unknown name": (lambda: measure("magic", L, f), ValueError, "^unknown estimator 'magic'; the known ones are"),
    "no estimator": (lambda: measure(3, L, f), TypeError, "^expected an estimator, its name or a function that makes"),
    "a factory of nothing": (lambda: measure(dict, L, f), TypeError, "^expected an estimator, its name or a function"),
    "noise in the place of a sample": (
        lambda: measure(Noisy, L, f),
        ValueError,
        "^Noisy has the randomness 'sample', but it has not drawn its sample",
    ),
    "more samples than one": (lambda: measure(Twice, L, f), ValueError, "^more samples are drawn than were given"),
    "several samples, enumerated": (
        lambda: enumerated("rloo", EnumeratedCost(L, f)),
        ValueError,
        "^RLOO is no function of one sample: its randomness is 'samples'; use `sampled` or `measure`.$",
    ),
    "too few samples": (
        lambda: measure("st", L, f, samples=39),
        ValueError,
        "^samples must be an integer of at least 40, two for each of the 20 groups of the jackknife, got 39.$",
    ),
    "too few, sampled": (lambda: sampled("st", EnumeratedCost(L, f), 0, 1), ValueError, "^samples must be an integer"),
    "half a sample": (lambda: measure("rloo", L, f, samples=40.5), ValueError, "^samples must be an integer"),
    "a generator of NumPy": (
        lambda: measure("st", L, f, rng=np.random.default_rng(0)),
        ValueError,
        "^seed must be an integer from 0",
    ),
    "a constant cost": (
        lambda: measure("reinforce", L, lambda d: 0.0 * f(d) + 2.7),
        ValueError,
        "^the exact gradient is 0, up to rounding: nothing can be compared with it, take another cost.$",
    ),
    "one class": (
        lambda: measure("reinforce", np.zeros((1, 2, 1)), lambda d: d.sum(axis=(1, 2))),
        ValueError,
        "^the exact gradient is 0, up to rounding",
    ),
    "a cost that is not finite": (
        lambda: measure("reinforce", L, lambda d: f(d) + float("nan")),
        ValueError,
        "^the exact gradient is not finite: look for such numbers in the logits and in the costs.$",
    ),
    "logits that are not finite": (lambda: measure("st", L * np.nan, f), ValueError, "^the exact gradient is not fin"),
    "integers": (
        lambda: measure("st", np.zeros((1, 2, 3), int), f),
        TypeError,
        "^the logits must be float32 or float64",
    ),
    "a Tensor of logits": (
        lambda: measure("st", Tensor(L), f),
        TypeError,
        "^the logits must be an array, not a Tensor",
    ),
    "no axis for the examples": (
        lambda: measure("st", L[0, 0], f),
        ValueError,
        r"^the logits must be \(B, ..., K\) with at least one example and logit, got the shape \(3,\).$",
    ),
    "no examples": (lambda: measure("st", L[:0], f), ValueError, "^the logits must be .* got the shape \\(0, 2, 3\\)"),
    "no variables": (lambda: measure("st", L[:, :0], f), ValueError, "^the logits must be .* shape \\(2, 0, 3\\)"),
    "no classes": (lambda: measure("st", L[..., :0], f), ValueError, "^the logits must be .* shape \\(2, 2, 0\\)"),
    "inputs of other examples": (
        lambda: measure("nvil", L, f, inputs=np.zeros((3, 5))),
        ValueError,
        "^the inputs need a row for each of the 2 examples, got 3.$",
    ),
}


class Small(Reinforce):
    def check_size(self, variables, categories):
        raise ValueError(f"{variables} variables of {categories} categories are too much.")


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_measured_is_refused_in_one_sentence(case):
    call, error, message = REFUSED[case]
    with pytest.raises(error, match=message) as caught:
        call()
    assert str(caught.value).endswith(".")
    assert "\n" not in str(caught.value)


def test_what_is_next_to_the_refused_is_measured():
    assert measure("rloo", L, f, samples=40).samples == 40
    assert measure("st", L, lambda d, scale=2.0: scale * f(d)) == measure("st", L, lambda d: 2.0 * f(d))
    tiny = measure("reinforce", L, lambda d: 1e-9 * f(d) + 1.0)  # far above the rounding of a cost of 1
    assert tiny.bias < 1e-6
    assert measure("st", np.zeros((1, 7, 4)), lambda d: (d.sum(axis=1)[:, 0] - 1.0) ** 2.0).how == "enumerated"


# ---- the examples


def test_the_example_of_the_module_runs_and_gives_its_numbers():
    found = doctest.testmod(library)
    assert found.attempted >= 10
    assert found.failed == 0


def test_the_example_of_the_field_guide_runs_and_gives_its_numbers():
    guide = (Path(__file__).parents[1] / "estimators" / "README.md").read_text()
    chapter = re.search(r"^## Measure an estimator$(.*?)^## ", guide, re.MULTILINE | re.DOTALL).group(1)
    text = re.search(r"```pycon\n(.*?)```", chapter, re.DOTALL).group(1)
    test = doctest.DocTestParser().get_doctest(text, {}, "field guide", None, 0)
    found = doctest.DocTestRunner().run(test)
    assert found.attempted >= 5
    assert found.failed == 0
