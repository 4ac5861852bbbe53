"""Bias and variance of estimators: tables against plain loops, samples against sums, and the script as one meets it."""

import functools
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.text import Text

import measure_gradients
import train_vae
from estimators import ESTIMATORS, create
from estimators.enumeration import Given
from estimators.score_function import Reinforce
from measure_gradients import SmallProblem, Table, VAEProblem, enumerated, sampled
from minigrad import Rng, Tensor, checkpoint

ROOT = Path(__file__).parents[1]
FAMILIES = measure_gradients.FAMILIES
IMAGES = 4


@functools.cache
def vae(family="categorical", seed=3):
    """Four images, and weights large enough for the decoder to be far from linear in the code."""
    sizes = {"variables": 2, "categories": 3} if family == "categorical" else {"variables": 4}
    training = train_vae.Training(train_vae.Config(code=family, hidden=(8,), dtype="float64", seed=seed, **sizes))
    for p in training.model.parameters():
        p.data *= 3.0
    return VAEProblem(training, IMAGES, np.float64)


@functools.cache
def table(family="categorical", kind="vae", images=IMAGES):
    return Table(vae(family) if kind == "vae" else SmallProblem(images, FAMILIES[family], Rng(1), np.float64))


def image(i, n=1):
    return np.full(n, i)


# ---- the tables


@pytest.mark.parametrize("kind", ["vae", "small"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_exact_gradient_of_the_table_is_the_one_through_the_model(family, kind):
    t = table(family, kind)
    theta = Tensor(t.problem.logits, requires_grad=True)
    value = create("exact", family=family)(theta, lambda d: t.problem.cost(d, np.arange(IMAGES)), Rng(0))
    value.backward(np.ones(IMAGES))
    assert np.abs(theta.grad).max() > 1e-2
    np.testing.assert_allclose(t.gradient, theta.grad, rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", ["vae", "small"])
@pytest.mark.parametrize("family", FAMILIES)
def test_costs_and_slopes_of_the_table_are_those_of_the_tape(family, kind):
    t = table(family, kind)
    for i in range(IMAGES):
        z = Tensor(t.outcomes, requires_grad=True)
        f = t.problem.cost(z, image(i, len(t.outcomes)))
        f.backward(np.ones(len(t.outcomes)))
        np.testing.assert_allclose(t.costs[i], f.data, rtol=0, atol=1e-10)
        np.testing.assert_allclose(t.slopes[i], z.grad, rtol=0, atol=1e-10)
    assert t.slopes.std(axis=1).max() > 1e-2  # the cost is not linear in the code


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("points", ["outcomes", "one for each image", "all different"])
def test_the_table_s_cost_is_the_cost_wherever_it_is_taken(family, points, rng):
    t, images, repeats = table(family), np.array([2, 0]), 5
    if points == "outcomes":
        d = t.outcomes[rng.integers(len(t.outcomes), size=len(images) * repeats)]
    else:
        d = FAMILIES[family].probability(rng.standard_normal((len(images) * repeats, *t.outcomes.shape[1:])))
        if points == "one for each image":
            d = np.repeat(d[: len(images)], repeats, axis=0)
    weights, results = rng.standard_normal(len(d)), []
    for cost in (t.cost(images, repeats), lambda d: t.problem.cost(d, np.repeat(images, repeats))):
        z = Tensor(d, requires_grad=True)
        f = cost(z)
        f.backward(weights)
        results.append((f.data, z.grad))
    for a, b in zip(*results, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-10)


def test_only_points_that_are_no_outcomes_are_evaluated(monkeypatch):
    t, evaluated = table(), []
    monkeypatch.setattr(
        t.problem, "cost", lambda d, images, cost=t.problem.cost: evaluated.append(d) or cost(d, images)
    )
    for name in ("reinforce", "reinmax", "local-expectation"):
        enumerated(functools.partial(create, name), t, Rng(0))
    sampled(functools.partial(create, "rloo"), t, Rng(0), 40)
    assert not evaluated
    enumerated(functools.partial(create, "muprop"), t, Rng(0))
    assert [d.shape[0] for d in evaluated] == [1] * IMAGES
    evaluated.clear()
    sampled(functools.partial(create, "gumbel-softmax"), t, Rng(0), 60)
    assert [d.shape[0] for d in evaluated] == [3 * IMAGES] * 20


# ---- enumerated results


def by_loops(make, t):
    """Bias, deviation, mean squared error and cosine: every outcome by itself, with the model's own cost."""
    g, mean, variance = t.gradient, np.zeros_like(t.gradient), 0.0
    for i in range(IMAGES):
        estimator, found, q = make(), [], []
        theta = t.problem.logits[i : i + 1]
        p = estimator.family.probability(estimator.logit_scale * theta)
        for z in t.outcomes:
            logits = Tensor(theta, requires_grad=True)
            cost = lambda d, i=i: t.problem.cost(d, image(i))
            inputs = None if t.problem.inputs is None else t.problem.inputs[i : i + 1]
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
    if create(name).randomness in ("sample", "none") and measure_gradients.handles(name, family)
]


OPTIONS = [(spec, family) for spec in ("st-decoupled:tau_f=1.6", "reinmax:tau=2", "st:tau=0.6") for family in FAMILIES]


@pytest.mark.parametrize(
    ("name", "family"), [case for case in ENUMERATED if create(case[0]).randomness == "sample"] + OPTIONS
)
def test_an_enumerated_row_is_what_plain_loops_find(name, family):
    make, t = functools.partial(create, name, family=family), table(family)
    found, expected = enumerated(make, t, Rng(0)), by_loops(make, t)
    assert found["how"] == "enumerated"
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, rel=1e-9, abs=1e-11), key


@pytest.mark.parametrize(("name", "family"), ENUMERATED)
def test_unbiased_estimators_have_no_bias_and_the_others_have(name, family):
    estimator, found = (
        create(name, family=family),
        enumerated(functools.partial(create, name, family=family), table(family), Rng(0)),
    )
    if estimator.exact_for == "all":
        assert found["bias"] < 1e-11
        assert found["cosine"] == pytest.approx(1.0)
        assert (found["deviation"] < 1e-12) == (name == "exact")
    else:
        assert found["bias"] > (1e-7 if name == "finite-differences" else 1e-3)


def test_a_temperature_changes_bias_and_variance():
    found = [enumerated(functools.partial(create, "st", tau), table(kind="small"), Rng(0)) for tau in (0.5, 1.0, 2.0)]
    assert len({round(f["bias"], 6) for f in found}) == 3
    assert found[0]["deviation"] > found[1]["deviation"] > found[2]["deviation"]


# ---- sampled results

KEYS = ("bias", "deviation", "mse", "cosine")


@pytest.mark.parametrize("name", ["reinforce", "muprop", "st", "reinmax", "gst-1.0", "st-decoupled"])
def test_samples_agree_with_sums_within_their_intervals(name):
    make = functools.partial(create, name)
    exact, found = enumerated(make, table(), Rng(0)), sampled(make, table(), Rng(1), 2000)
    assert found["how"] == "sampled"
    assert found["samples"] == 2000
    for key in KEYS:
        low, high = found[f"{key}_interval"]
        slack = 0.5 * (high - low)  # one of so many intervals may well miss; coverage is tested below
        assert low - slack <= exact[key] <= high + slack, key
        assert low <= found[key] <= high
        assert high - low < 0.4 * max(exact["deviation"], 1.0) ** 2


@pytest.mark.parametrize("name", ["st", "reinforce"])
def test_intervals_cover_the_truth_as_often_as_they_say(name):
    t, make = table(kind="small", images=20), functools.partial(create, name)
    exact = enumerated(make, t, Rng(0))
    runs = [sampled(make, t, Rng(seed), 100) for seed in range(80)]
    for key in KEYS:
        values = np.array([r[key] for r in runs])
        low, high = np.array([r[f"{key}_interval"] for r in runs]).T
        covered = np.mean((low <= exact[key] + 1e-12) & (exact[key] - 1e-12 <= high))
        assert covered >= 0.88, key  # four standard errors below 95 % would be 0.85
        if name == "st":  # no interval is pressed against a bound: its length is that of 2 t standard deviations
            length = np.mean(high - low) / (2 * measure_gradients.T * values.std())
            assert 0.75 < length < 1.4, key
    if name == "st":
        assert np.mean([r["bias"] for r in runs]) == pytest.approx(exact["bias"], rel=0.02)


def test_the_intervals_are_those_of_a_plain_jackknife(monkeypatch):
    t, make, estimates, seen = table(kind="small"), functools.partial(create, "st"), Table.estimates, []
    monkeypatch.setattr(Table, "estimates", lambda *a: seen.append(estimates(*a)) or seen[-1])
    found, g = sampled(make, t, Rng(4), 60), t.gradient.reshape(IMAGES, -1)
    draws = np.array(seen)  # (groups, images, draws of a group, logits)

    def by_hand(draws):
        draws = np.concatenate(draws, axis=1)
        n, mean, size = draws.shape[1], draws.mean(axis=1), np.square(g).sum()
        variance = draws.var(axis=1, ddof=1).sum()
        cosine = (mean * g).sum() / np.sqrt((np.square(mean).sum() - variance / n) * size)
        mse = np.square(draws - g[:, None]).sum() / n
        return np.array([(np.square(mean - g).sum() - variance / n) / size, variance / size, mse / size, cosine])

    left_out = np.array([by_hand(np.delete(draws, j, axis=0)) for j in range(20)])
    margin = 2.093 * np.sqrt(19 / 20 * np.square(left_out - left_out.mean(axis=0)).sum(axis=0))
    value = by_hand(draws)
    for key, v, low, high in zip(KEYS, value, value - margin, value + margin, strict=True):
        power = 0.5 if key in ("bias", "deviation") else 1.0
        assert found[key] == pytest.approx(min(v, 1.0) ** power if key == "cosine" else v**power, rel=1e-9)
        expected = [max(low, 0.0) ** power, min(high, 1.0) if key == "cosine" else high**power]
        assert found[f"{key}_interval"] == pytest.approx(expected, rel=1e-4)


def test_reported_numbers_stay_where_they_can_be():
    bounds = measure_gradients.within_bounds
    assert bounds("bias2", -0.1, -0.5, 0.09) == {"bias": 0.0, "bias_interval": [0.0, pytest.approx(0.3)]}
    assert bounds("cosine", -0.5, -1.5, 0.5) == {"cosine": -0.5, "cosine_interval": [-1.0, 0.5]}
    assert bounds("cosine", 1.01, 0.9, 1.1) == {"cosine": 1.0, "cosine_interval": [0.9, 1.0]}
    assert measure_gradients.finite({"x": 1}["x"]) == 1
    assert measure_gradients.finite([np.float64(0.5), float("nan"), float("inf")]) == [0.5, None, None]


def test_a_mean_of_which_nothing_but_noise_is_known_has_no_cosine():
    g, errors = np.array([1.0, 0.0]), np.array([-10.0, 0.0])  # ten estimates whose mean is 0
    found = measure_gradients.from_sums(10, errors, 1e3, g)
    assert np.isnan(found["cosine"])
    assert found["variance"] == pytest.approx((1e3 - 10.0) / 9)


class Slanted(Reinforce):
    """REINFORCE times 1.2: a bias of 0.2 in every component."""

    randomness = "noise"

    def estimate(self, logits, cost, rng):
        value = super().estimate(logits, cost, rng)
        return value + 0.2 * (value - value.detach())


def test_a_planted_error_is_seen():
    right, exact = (
        enumerated(functools.partial(create, "reinforce"), table(), Rng(0)),
        enumerated(Slanted, table(), Rng(0)),
    )
    assert exact["bias"] == pytest.approx(0.2)
    assert exact["deviation"] == pytest.approx(1.2 * right["deviation"])
    assert exact["cosine"] == pytest.approx(1.0)
    found = sampled(lambda: Shifted(0.2), table(), Rng(2), 400)
    assert found["bias_interval"][0] > 0.15
    assert found["bias_interval"][1] < 0.25
    assert sampled(lambda: Shifted(0.0), table(), Rng(2), 400)["bias_interval"][0] == 0.0


class Shifted(create("local-expectation").__class__):
    """Local expectation gradients, which vary little, times 1 + error."""

    randomness = "noise"

    def __init__(self, error):
        self.error = error

    def gradient(self, logits, local_costs, rng):
        return (1.0 + self.error) * super().gradient(logits, local_costs, rng)


def test_the_noise_of_the_mean_is_no_bias():
    """With 40 estimates the mean of REINFORCE is far from g, by its deviation/√40, which must not be called bias."""
    make, t = functools.partial(create, "reinforce"), table()
    noise = enumerated(make, t, Rng(0))["deviation"] / np.sqrt(40)
    runs = [sampled(make, t, Rng(seed), 40) for seed in range(10)]
    assert np.mean([r["bias_interval"][0] == 0.0 for r in runs]) >= 0.8
    assert np.median([r["bias"] for r in runs]) < 0.5 * noise


def test_groups_and_calls_do_not_change_what_is_counted(monkeypatch):
    """In calls of one estimate per image, there are as many estimates, and all are different."""
    make = functools.partial(create, "st")
    monkeypatch.setattr(measure_gradients, "ROWS", 1)
    seen, estimates = [], Table.estimates
    monkeypatch.setattr(Table, "estimates", lambda *a: seen.append(estimates(*a)) or seen[-1])
    assert sampled(make, table(kind="small"), Rng(0), 41)["samples"] == 60
    assert len({x.tobytes() for x in seen}) == len(seen) == 60


@pytest.mark.parametrize("family", FAMILIES)
def test_every_estimator_of_the_objective_can_be_measured(family):
    """All of them, at float32, on two images: finite numbers, and the evaluations that it says it has."""
    training = train_vae.Training(train_vae.Config(code=family, hidden=(8,), variables=3, categories=3))
    t = Table(VAEProblem(training, 2, np.float32))
    counted = {"1": 1, "2": 2, "3": 3, "Kᴸ": 27 if family == "categorical" else 8, "S": None}
    for name in ESTIMATORS:
        estimator = create(name)
        if estimator.multi_sample or not measure_gradients.handles(name, family):
            continue
        row = measure_gradients.Row(name, None, functools.partial(create, name, family=family))
        found = measure_gradients.measure(row, t, Rng(0), 40)
        assert all(found[key] is not None for key in ("bias", "deviation", "mse")), name
        assert found["how"] == ("enumerated" if estimator.randomness in ("sample", "none") else "sampled")
        if expected := counted.get(estimator.evaluations):
            assert found["evaluations_counted"] == expected, name
        if estimator.exact_for == "all" and found["how"] == "enumerated":
            assert found["bias"] < 1e-3, name
        json.dumps(found, allow_nan=False)


# ---- the script


def run(*flags):
    return measure_gradients.main([str(f) for f in flags])


def results(folder):
    return [json.loads(text) for text in (folder / "results.jsonl").read_text().splitlines()]


def test_the_small_problem_end_to_end(tmp_path, capsys):
    out, specs = tmp_path / "run", ["reinforce", "reinmax", "st-gs", "rloo:samples=4", "st:tau=0.7", "exact"]
    assert run("--out", out, "--images", 3, "--samples", 40, "--taus", 0.5, 1.5, "--estimators", *specs) == 0
    captured = capsys.readouterr()
    found = results(out)
    assert [(r["estimator"], r["tau"], r["how"]) for r in found] == [
        ("reinforce", None, "enumerated"),
        ("reinmax", 1.5, "enumerated"),
        ("st-gs", 0.5, "sampled"),
        ("st-gs", 1.5, "sampled"),
        ("rloo:samples=4", None, "sampled"),
        ("st:tau=0.7", 0.7, "enumerated"),
        ("exact", None, "enumerated"),
    ]
    assert "reinmax is left out at tau 0.5: ReinMax needs a temperature of at least 1, got 0.5." in captured.err
    assert "exact gradient of 3 × 64 outcomes" in captured.err
    lines = captured.out.splitlines()
    assert len(lines) == 8
    assert {len(text[: text.index(r["how"])]) for text, r in zip(lines[1:], found, strict=True)} == {
        lines[0].index("how")
    }
    assert found[0]["bias"] < 1e-12
    assert found[0]["mse"] == pytest.approx(found[0]["bias"] ** 2 + found[0]["deviation"] ** 2)
    assert found[4]["evaluations_counted"] == 4
    assert found[4]["evaluations"] == "S"
    assert all(r["seconds"] > 0 for r in found[:-1])
    assert found[-1]["seconds"] is None
    assert len({r["gradient_norm"] for r in found}) == 1
    about = json.loads((out / "config.json").read_text())
    assert about["config"]["estimators"] == specs
    assert about["config"]["code"] == "categorical"
    assert {"minigrad", "numpy", "python"} < about.keys()
    assert (out / "bias_variance.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "bias_variance.pdf").read_bytes().startswith(b"%PDF")


@pytest.fixture
def no_figure(monkeypatch):
    monkeypatch.setattr(measure_gradients, "draw", lambda *_, **__: None)


@pytest.mark.usefixtures("no_figure")
def test_the_same_flags_give_the_same_numbers_and_another_seed_others(tmp_path):
    flags = [
        "--quiet",
        "--images",
        2,
        "--samples",
        40,
        "--estimators",
        "st",
        "st-gs",
        "--taus",
        1,
        "--code",
        "bernoulli",
    ]
    numbers = []
    for i, seed in enumerate((0, 0, 1)):
        assert run(*flags, "--seed", seed, "--out", tmp_path / f"{i}") == 0
        numbers.append([{k: v for k, v in r.items() if k != "seconds"} for r in results(tmp_path / f"{i}")])
    assert numbers[0] == numbers[1] != numbers[2]


@pytest.mark.usefixtures("no_figure")
def test_quiet_prints_the_table_only(tmp_path, capsys):
    assert run("--quiet", "--out", tmp_path / "run", "--images", 1, "--estimators", "reinmax", "--taus", 0.5, 1) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert len(captured.out.splitlines()) == 2


TINY = ["--quiet", "--epochs", "1", "--hidden", "8", "--lr", "0.01"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A checkpoint of each kind of code, of images that are binarised, and one that is too large."""
    folder = tmp_path_factory.mktemp("trained")
    small = ["--variables", "2", "--categories", "3"]
    for name, flags in {
        "categorical": [*small, "--pixels", "dynamic", "--seed", "5"],
        "bernoulli": ["--variables", "3", "--estimator", "disarm"],
        "large": ["--variables", "30", "--categories", "10"],
    }.items():
        assert train_vae.main([*TINY, *flags, "--out", str(folder / name)]) == 0
    return folder


@pytest.mark.usefixtures("no_figure")
@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_is_measured_on_the_test_images_of_its_run(tmp_path, trained, family):
    out = tmp_path / "run"
    flags = ["--checkpoint", trained / family, "--images", 5, "--quiet", "--estimators", "reinforce", "reinmax"]
    assert run(*flags, "--taus", 1, "--out", out) == 0
    found = results(out)
    assert json.loads((out / "config.json").read_text())["config"]["code"] == family
    assert [r["epoch"] for r in found] == [1, 1]
    assert found[0]["bias"] < 1e-11
    assert 1e-3 < found[1]["bias"] < 0.5

    about = json.loads((trained / family / "config.json").read_text())["config"] | {"hidden": (8,)}
    training = train_vae.Training(train_vae.Config(**about))
    training.restore(*measure_gradients.RunFolder(trained / family).load())
    theta = Tensor(training.model.encode(training.test[:5]).data, requires_grad=True)
    cost = lambda d: measure_gradients.bce_with_logits(training.model.decode(d), training.test[:5])
    create("exact", family=family)(theta, cost, Rng(0)).backward(np.ones(5, np.float32))
    assert found[0]["gradient_norm"] == pytest.approx(np.sqrt(np.square(theta.grad).sum()), rel=1e-4)


@pytest.mark.usefixtures("no_figure")
def test_a_fresh_vae_of_another_size(tmp_path):
    out = tmp_path / "run"
    flags = ["--problem", "vae", "--variables", 2, "--categories", 3, "--images", 2, "--dtype", "float32", "--quiet"]
    assert run(*flags, "--estimators", "muprop", "--out", out) == 0
    assert results(out)[0]["bias"] < 1e-3
    assert "epoch" not in results(out)[0]


BAD_FLAGS = [
    (["--problem", "large"], "unknown problem 'large'; the known ones are small, vae"),
    (["--estimators", "magic"], "unknown estimator 'magic'; the known ones are exact"),
    (["--estimators", "st:heat=1"], "the estimator st has no option 'heat'"),
    (["--estimators", "vimco"], "vimco estimates the gradient of −E log mean e^(−f), which is not that of E f(D)"),
    (["--estimators", "disarm"], "is for bernoulli variables, not 'categorical'"),
    (["--estimators", "gumbel-rao", "--code", "bernoulli"], "is for categorical variables, not 'bernoulli'"),
    (["--estimators"], "argument --estimators: expected at least one argument"),
    (["--estimators", "reinmax", "--taus", "0.5"], "nothing is left to measure"),
    (["--taus", "0"], "tau must be positive and finite, got 0"),
    (["--taus", "1", "-1"], "tau must be positive and finite, got -1"),
    (["--taus", "1", "nan"], "tau must be positive and finite, got nan"),
    (["--taus", "hot"], "argument --taus: invalid float value: 'hot'"),
    (["--images", "0"], "--images must be at least 1, got 0"),
    (["--samples", "1"], "--samples must be at least 40, two for each of the 20 groups of the jackknife, got 1"),
    (["--code", "trits"], "unknown code 'trits'; the known ones are categorical, bernoulli"),
    (["--dtype", "float16"], "unknown dtype 'float16'; the known ones are float32, float64"),
    (["--seed", "-1"], "seed must be an integer from 0"),
    (["--variables", "3"], "--variables is for --problem vae"),
    (["--checkpoint", "x", "--problem", "small"], "--checkpoint is for --problem vae"),
    (["--problem", "vae", "--variables", "5"], "outcomes: at most 16384 are allowed"),
    (["--problem", "vae", "--variables", "15", "--code", "bernoulli"], "outcomes: at most 16384 are allowed"),
    (["--problem", "vae", "--variables", "0"], "--variables must be at least 1, got 0"),
    (["--problem", "vae", "--variables", "1", "--images", "361"], "--images 361: there are only 360 test images"),
    (["--problem", "vae", "--variables", "1", "--categories", "1"], "the exact gradient is 0"),
    (["--checkpoint", "/nonexistent/run"], "there is no run folder /nonexistent/run"),
    (["--bias", "1"], "unrecognized arguments: --bias"),
]


@pytest.mark.parametrize(("flags", "message"), BAD_FLAGS, ids=[" ".join(f) for f, _ in BAD_FLAGS])
def test_a_bad_flag_is_one_sentence_and_exit_code_2(tmp_path, capsys, flags, message):
    assert run("--out", tmp_path / "run", *flags) == 2
    refused(capsys, message)
    assert not (tmp_path / "run").exists()


def test_a_flag_that_would_name_the_default_folder_is_checked_first(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    assert run("--problem", "x" * 300) == 2
    refused(capsys, "unknown problem 'xxx")


def test_tables_that_would_fill_the_memory_are_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(measure_gradients, "TABLE_BYTES", 1e3)
    assert run("--problem", "vae", "--variables", 2, "--categories", 3, "--images", 3, "--out", tmp_path / "run") == 2
    refused(capsys, "--images 3: the tables of 9 outcomes would exceed 1e+03 bytes, use fewer images.")
    assert not (tmp_path / "run").exists()


def refused(capsys, message):
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err.splitlines()[-1]
    assert captured.err.endswith((".\n", "help.\n"))
    assert "Traceback" not in captured.err


@pytest.mark.parametrize(
    ("spoil", "flags", "message"),
    [
        (lambda f: (f / "checkpoint.safetensors").unlink(), [], "there is no checkpoint"),
        (lambda f: (f / "checkpoint.safetensors").write_bytes(b"PK"), [], "damaged or not a checkpoint"),
        (lambda f: (f / "config.json").write_text("{"), [], "config.json is missing or damaged"),
        (lambda f: spoil_weights(f), [], "the exact gradient is not finite: the model's parameters are damaged"),
        (lambda f: None, ["--code", "categorical"], "--code is what the checkpoint says: leave it out"),
        (lambda f: None, ["--images", "361"], "there are only 360 test images"),
        (lambda f: None, ["--estimators", "disarm"], "is for bernoulli variables"),
    ],
)
def test_a_checkpoint_that_cannot_be_measured(tmp_path, capsys, trained, spoil, flags, message):
    folder = tmp_path / "checkpoint"
    shutil.copytree(trained / "categorical", folder)
    spoil(folder)
    assert run("--checkpoint", folder, "--out", tmp_path / "run", *flags) == 2
    refused(capsys, message)
    assert not (tmp_path / "run").exists()


def spoil_weights(folder):
    arrays, info = checkpoint.load(folder / "checkpoint.safetensors")
    arrays["model.decoder.layers.0.weight"][...] = np.nan
    checkpoint.save(folder / "checkpoint.safetensors", arrays, info)


def test_an_estimator_that_refuses_the_size(tmp_path, capsys, monkeypatch):
    def refuse(self, variables, categories):
        raise ValueError(f"{variables} variables of {categories} categories are too much.")

    monkeypatch.setattr(Reinforce, "check_size", refuse)
    assert run("--estimators", "reinforce", "--out", tmp_path / "run") == 2
    refused(capsys, "3 variables of 4 categories are too much.")
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_that_is_too_large_to_enumerate(tmp_path, capsys, trained):
    assert run("--checkpoint", trained / "large", "--out", tmp_path / "run") == 2
    refused(capsys, "exact enumeration of 10**30 outcomes: at most 16384 are allowed")
    assert not (tmp_path / "run").exists()


def test_a_folder_that_exists_is_left_alone(tmp_path, capsys):
    (tmp_path / "keep.txt").write_text("mine")
    assert run("--out", tmp_path) == 2
    refused(capsys, "exists already: choose another --out")
    assert [p.name for p in tmp_path.iterdir()] == ["keep.txt"]


def test_the_script_itself_exits_with_2_without_a_traceback(tmp_path):
    command = [sys.executable, str(ROOT / "scripts" / "measure_gradients.py"), "--images", "0"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "measure_gradients.py: error: --images must be at least 1, got 0.\n"


# ---- the figure


def row(estimator, bias, deviation, tau=None, interval=None):
    found = {"estimator": estimator, "tau": tau, "bias": bias, "deviation": deviation, "how": "enumerated"}
    if interval:
        found |= {"how": "sampled", "bias_interval": interval, "deviation_interval": [0.9 * deviation, 1.1 * deviation]}
    return found


@pytest.mark.parametrize(
    "rows",
    [
        [row("exact", 0.0, 0.0)],
        [row("reinforce", 1e-15, 3.0)],
        [row("st", 0.2, 1.0, 1.0)],
        [row("st", 0.2, 2.8, 1.0)],
        [row("rloo", 0.0, 2.0, interval=[0.0, 0.1]), row("st", 1e-4, 1.0, 1.0), row("st", 1e-4, 1.0, 1.0)],
        [row("rloo", None, None), row("spsa", 40.0, 1e3, interval=[30.0, 50.0])],
    ],
    ids=["nothing to show", "no bias", "one point", "one point of no range", "margin and twins", "missing numbers"],
)
def test_the_figure_of_few_or_strange_points(tmp_path, rows):
    measure_gradients.draw(tmp_path / "figure", rows, 1e-8)
    assert (tmp_path / "figure.png").stat().st_size > 5000
    assert (tmp_path / "figure.pdf").stat().st_size > 1000


def test_labels_avoid_each_other_and_the_points(tmp_path, monkeypatch):
    boxes = []
    place = measure_gradients.place_labels

    def placed(figure, axes, labels):
        place(figure, axes, labels)
        renderer = figure.canvas.get_renderer()
        texts = [t for t in axes.texts if t.get_text()]
        for text in texts:
            text.update_positions(renderer)
            boxes.append(Text.get_window_extent(text, renderer))

    monkeypatch.setattr(measure_gradients, "place_labels", placed)
    rows = [row(f"estimator-{i}", 0.1 * 1.02**i, 1.0 * 1.02**i) for i in range(6)] + [row("far", 1.0, 9.0)]
    measure_gradients.draw(tmp_path / "figure", rows, 1e-8)
    assert len(boxes) == 7
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


@pytest.mark.parametrize(("low", "high"), [(0.23, 0.8), (0.9, 1.1), (0.01, 3.0), (1e-6, 1e4)])
def test_ticks_are_round_and_few(low, high):
    labelled, all_ticks = measure_gradients.round_numbers(low, high)
    assert set(labelled) <= set(all_ticks)
    assert all(low < x < high for x in all_ticks)
    assert 1 <= len(labelled) <= 10
