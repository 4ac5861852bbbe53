"""The command that measures estimators: its problems and their tables, its table and figure, and how it refuses.

What it measures with is tested in `test_measure.py`.
"""

import dataclasses
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
from estimators.base import SettingError
from estimators.measure import EnumeratedCost
from estimators.score_function import Reinforce
from experiments import vae as vae_flags
from experiments.loop import Loop
from measure_gradients import SmallProblem, VAEProblem
from minigrad import Rng, Tensor, checkpoint

ROOT = Path(__file__).parents[1]
FAMILIES = measure_gradients.FAMILIES
IMAGES = 4


@functools.cache
def vae(family="categorical", seed=3):
    """Four images, and weights large enough for the decoder to be far from linear in the code."""
    sizes = {"variables": 2, "categories": 3} if family == "categorical" else {"variables": 4}
    training = vae_flags.VAEExperiment(vae_flags.Config(code=family, hidden=(8,), dtype="float64", seed=seed, **sizes))
    for p in training.model.parameters():
        p.data *= 3.0
    return VAEProblem(training, IMAGES, np.float64)


@functools.cache
def problem(family="categorical", kind="vae", images=IMAGES):
    return vae(family) if kind == "vae" else SmallProblem(images, FAMILIES[family], Rng(1), np.float64)


@functools.cache
def table(family="categorical", kind="vae", images=IMAGES):
    return measure_gradients.enumerate_outcomes(problem(family, kind, images))


def image(i, n=1):
    return np.full(n, i)


# ---- the tables


@pytest.mark.parametrize("kind", ["vae", "small"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_exact_gradient_of_the_table_is_the_one_through_the_model(family, kind):
    t, p = table(family, kind), problem(family, kind)
    theta = Tensor(p.logits, requires_grad=True)
    value = create("exact", family=family)(theta, lambda d: p.cost(d, np.arange(IMAGES)), Rng(0))
    value.backward(np.ones(IMAGES))
    assert np.abs(theta.grad).max() > 1e-2
    np.testing.assert_allclose(t.gradient, theta.grad, rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", ["vae", "small"])
@pytest.mark.parametrize("family", FAMILIES)
def test_costs_and_slopes_of_the_table_are_those_of_the_tape(family, kind):
    t, p = table(family, kind), problem(family, kind)
    for i in range(IMAGES):
        z = Tensor(t.outcomes, requires_grad=True)
        f = p.cost(z, image(i, len(t.outcomes)))
        f.backward(np.ones(len(t.outcomes)))
        np.testing.assert_allclose(t.costs[i], f.data, rtol=0, atol=1e-10)
        np.testing.assert_allclose(t.slopes[i], z.grad, rtol=0, atol=1e-10)
    assert t.slopes.std(axis=1).max() > 1e-2  # the cost is not linear in the code


@pytest.mark.parametrize("kind", ["vae", "small"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_problem_s_own_tables_change_no_number(family, kind):
    p, own = problem(family, kind), table(family, kind)
    plain = EnumeratedCost(p.logits, p.cost, family, inputs=p.inputs)
    learned = create("nvil", family=family)  # it has seen the inputs, where there are any
    own.estimates(learned, np.arange(IMAGES), 10, Rng(0))
    learned.update()
    for estimator in ("reinforce", learned, "muprop", "st", "reinmax", "gumbel-softmax"):
        a, b = (dataclasses.asdict(t.measure(estimator, samples=40)) for t in (own, plain))
        for key in ("bias", "deviation", "mse", "cosine", "gradient_norm"):
            assert a[key] == pytest.approx(b[key], rel=1e-9, abs=1e-11), (estimator, key)


# ---- a row of the table


@pytest.mark.parametrize("family", FAMILIES)
def test_every_estimator_of_the_objective_can_be_measured(family):
    """All of them, at float32, on two images: finite numbers, and the evaluations that it says it has."""
    training = vae_flags.VAEExperiment(vae_flags.Config(code=family, hidden=(8,), variables=3, categories=3))
    p = VAEProblem(training, 2, np.float32)
    t = measure_gradients.enumerate_outcomes(p)
    variables, categories = 3, 3 if family == "categorical" else 2
    for name in ESTIMATORS:
        estimator = create(name)
        if estimator.multi_sample or not measure_gradients.handles(name, family):
            continue
        row = measure_gradients.Row(name, None, functools.partial(create, name, family=family))
        found = measure_gradients.measure_row(row, p, t, Rng(0), 40)
        assert all(found[key] is not None for key in ("bias", "deviation", "mse")), name
        assert found["how"] == ("enumerated" if estimator.randomness in ("sample", "none") else "sampled")
        counts = {create(name, family=family).count_evaluations(variables, categories, call) for call in range(1, 11)}
        assert min(counts) <= found["evaluations_counted"] <= max(counts), name
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
    numbers, call = ["bias", "deviation", "mse", "cosine"], ["evaluations", "evaluations_counted", "seconds"]
    assert list(found[0]) == ["estimator", "tau", "how", *numbers, *call, "gradient_norm"]
    with_intervals = [name for key in numbers for name in (key, f"{key}_interval")]
    assert list(found[2]) == ["estimator", "tau", "how", "samples", *with_intervals, *call, "gradient_norm"]
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
    training = vae_flags.VAEExperiment(vae_flags.Config(**about))
    Loop(training, None, quiet=True).load_state(*measure_gradients.RunFolder(trained / family).load())
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
    (["--taus", "0"], "tau must be a number from 1e-06 to 1e+06, got 0"),
    (["--taus", "1", "-1"], "tau must be a number from 1e-06 to 1e+06, got -1"),
    (["--taus", "1", "nan"], "tau must be a number from 1e-06 to 1e+06, got nan"),
    (["--taus", "hot"], "argument --taus: invalid float value: 'hot'"),
    (["--images", "0"], "--images must be at least 1, got 0"),
    (["--samples", "1"], "--samples must be at least 40, two for each of the 20 groups of the jackknife, got 1"),
    (["--code", "trits"], "unknown code 'trits'; the known ones are categorical, bernoulli"),
    (["--dtype", "float16"], "unknown dtype 'float16'; the known ones are float32, float64"),
    (["--seed", "-1"], "seed must be an integer from 0"),
    (["--variables", "3"], "the small problem has sizes of its own and no data: leave --variables out"),
    (
        ["--checkpoint", "x", "--problem", "small"],
        "the small problem has sizes of its own and no data: leave --checkpoint out",
    ),
    (["--problem", "vae", "--variables", "5"], "outcomes: at most 16384 are allowed"),
    (["--problem", "vae", "--variables", "15", "--code", "bernoulli"], "outcomes: at most 16384 are allowed"),
    (["--problem", "vae", "--variables", "0"], "--variables must be at least 1, got 0"),
    (["--problem", "vae", "--variables", "1", "--images", "361"], "--images 361: there are only 360 test images"),
    (["--problem", "vae", "--variables", "1", "--categories", "1"], "the exact gradient is 0"),
    (["--checkpoint", "/nonexistent/run"], "there is no run folder /nonexistent/run"),
    (["--bias", "1"], "unrecognized arguments: --bias"),
    (["--problem", "vae", "--data-dir", "/"], "a fresh VAE has the embedded digits: leave --data-dir out"),
    (["--problem", "vae", "--code", "bernoulli", "--categories", "3"], "bits have no categories: leave --categories"),
    (["--estimators", "st", "st"], "--estimators has st twice"),
    (["--taus", "1", "1.0"], "--taus has 1.0 twice"),
    (["--estimators", "reinforce", "--samples", "40"], "all these estimators are enumerated: leave --samples out"),
    (["--estimators", "reinforce", "--taus", "1"], "takes a temperature from --taus: leave --taus out"),
    (["--estimators", "rloo:samples=99999999"], "samples must be an integer of at least 2 and at most 10000"),
    (["--samples", "10000000"], "--samples must be at most 1,000,000, got 10000000"),
    (["--images", "9" * 5000], "is not a whole number of at most 30 digits"),
    (["--images", "100000000000"], "this does not fit into memory"),
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
        (
            lambda f: without_bias(f),
            [],
            "safetensors cannot be used: the saved state lacks decoder.layers.1.bias",
        ),
        (lambda f: (f / "checkpoint.safetensors").write_bytes(b"PK"), [], "damaged or not a checkpoint"),
        (lambda f: (f / "config.json").write_text("{"), [], "config.json is missing or damaged"),
        (lambda f: spoil_weights(f), [], "the exact gradient is not finite: the model's parameters are damaged"),
        (lambda f: None, ["--code", "categorical"], "the checkpoint says what its model is like: leave --code out"),
        (lambda f: None, ["--data-dir", "/"], "the digits are embedded: leave --data-dir out"),
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


def without_bias(folder):
    arrays, info = checkpoint.load(folder / "checkpoint.safetensors")
    del arrays["model.decoder.layers.1.bias"]
    checkpoint.save(folder / "checkpoint.safetensors", arrays, info)


def spoil_weights(folder):
    arrays, info = checkpoint.load(folder / "checkpoint.safetensors")
    arrays["model.decoder.layers.0.weight"][...] = np.nan
    checkpoint.save(folder / "checkpoint.safetensors", arrays, info)


def test_an_estimator_that_refuses_the_size(tmp_path, capsys, monkeypatch):
    def refuse(self, variables, categories):
        raise SettingError(f"{variables} variables of {categories} categories are too much.")

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
@pytest.mark.daily(3)
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
