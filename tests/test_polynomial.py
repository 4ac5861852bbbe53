"""Polynomial programming: its closed forms against enumeration, runs that end where they say, and bad input."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import polynomial
from devsim import DevsimBackend, forbid
from estimators import ESTIMATORS, create, facts
from estimators.enumeration import Given
from experiments.run_folder import RunFolder
from minigrad import Tensor
from minigrad.backend import Backend
from registry import quick

ROOT = Path(__file__).parents[1]
POWERS = (1.5, 2.0, 3.0)
TARGETS = (0.2, 0.45, 0.7)
Q = np.array([0.01, 0.2, 0.45, 0.5, 0.9])  # P(z = 1)


def run(*flags):
    return polynomial.main(["--quiet", *map(str, flags)])


def slopes(t, p):
    """f'(0), f'(1)"""
    return -p * t ** (p - 1.0), p * (1.0 - t) ** (p - 1.0)


# ---- the closed forms against the estimators' own code, with both outcomes weighed by their probabilities


def mean_gradient(name, q, t, p, family="categorical", **options):
    """The mean of the estimator's gradient in the bit's logit, by enumeration of z = 0 and 1."""
    estimator, a = create(name, family=family, **options), float(np.log(q / (1.0 - q)))
    z = np.array([[0.0], [1.0]])
    theta, outcomes = (
        (np.array([a]), z) if family == "bernoulli" else (np.array([[a, 0.0]]), np.stack([z, 1.0 - z], -1))
    )
    logits = Tensor(np.broadcast_to(theta, (2, *theta.shape)).copy(), requires_grad=True)
    value = estimator(logits, lambda d: polynomial.cost(d, t, p), Given(samples=[outcomes]))
    value.backward(np.array([1.0 - q, q]))
    g = logits.grad.sum(axis=0)
    if family == "categorical":
        assert g[0, 0] == pytest.approx(-g[0, 1], abs=1e-14)
    return g.flat[0]


@pytest.mark.parametrize("t", TARGETS)
@pytest.mark.parametrize("p", POWERS)
@pytest.mark.parametrize("family", ["categorical", "bernoulli"])
def test_the_exact_gradient_is_the_slope_of_the_expected_loss_and_never_changes_sign(p, t, family):
    slope = polynomial.expected_loss(1.0, t, p) - polynomial.expected_loss(0.0, t, p)  # it is linear in q
    gradients = [mean_gradient("exact", q, t, p, family) for q in Q]
    np.testing.assert_allclose(gradients, Q * (1.0 - Q) * slope, rtol=0, atol=1e-12)
    assert (np.sign(gradients) == np.sign(0.5 - t)).all()
    ends = [float(polynomial.cost(np.array([[z]]), t, p)[0]) for z in (0.0, 1.0)]
    assert polynomial.optimum(t, p) == pytest.approx(min(ends), abs=1e-15)
    assert polynomial.levels(t, p)["start"] == pytest.approx(0.5 * sum(ends), abs=1e-15)


@pytest.mark.parametrize("t", TARGETS)
@pytest.mark.parametrize("p", POWERS)
@pytest.mark.parametrize("family", ["categorical", "bernoulli"])
def test_the_mean_gradient_of_straight_through(p, t, family):
    low, high = slopes(t, p)
    gradients = [mean_gradient("st", q, t, p, family) for q in Q]
    np.testing.assert_allclose(gradients, Q * (1.0 - Q) * (Q * high + (1.0 - Q) * low), rtol=0, atol=1e-12)


@pytest.mark.parametrize("t", TARGETS)
@pytest.mark.parametrize("p", POWERS)
@pytest.mark.parametrize(
    ("name", "family", "options"),
    [
        ("st", "categorical", {}),
        ("st", "bernoulli", {}),
        ("st", "categorical", {"tau": 0.5}),
        ("st", "bernoulli", {"tau": 3.0}),
        ("st-identity", "bernoulli", {}),
    ],
)
def test_straight_through_descends_to_its_fixed_point_from_either_side(p, t, name, family, options):
    fixed = polynomial.straight_through_fixed_point(t, p)
    assert abs(mean_gradient(name, fixed, t, p, family, **options)) < 1e-12
    for q in Q:
        assert np.sign(mean_gradient(name, q, t, p, family, **options)) == np.sign(np.round(q - fixed, 12))
    u, v = t ** (p - 1.0), (1.0 - t) ** (p - 1.0)
    assert fixed == pytest.approx(u / (u + v), abs=1e-14)
    level = polynomial.levels(t, p)["straight-through's fixed point"]
    assert level == pytest.approx(u * v / (u + v), abs=1e-14)
    assert level > polynomial.optimum(t, p) + 0.01


@pytest.mark.parametrize("t", TARGETS)
@pytest.mark.parametrize("p", POWERS)
@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("reinmax", "categorical"),
        ("reinmax", "bernoulli"),
        ("zgr", "categorical"),
        ("zgr", "bernoulli"),
        ("darn", "bernoulli"),
    ],
)
def test_reinmax_is_the_exact_gradient_times_one_factor(p, t, name, family):
    factor = polynomial.reinmax_factor(t, p)
    for q in Q:
        exact = mean_gradient("exact", q, t, p, family)
        assert mean_gradient(name, q, t, p, family) == pytest.approx(factor * exact, rel=0, abs=1e-12)
    assert factor > 0.0
    low, high = slopes(t, p)
    f0, f1 = polynomial.expected_loss(0.0, t, p), polynomial.expected_loss(1.0, t, p)
    assert factor == pytest.approx(0.5 * (low + high) / (f1 - f0), rel=1e-12)
    if p == 2.0:
        assert factor == pytest.approx(1.0, abs=1e-14)


def test_the_closed_forms_at_the_edges():
    for p in POWERS:
        assert polynomial.reinmax_factor(0.5, p) == pytest.approx(p - 1.0, abs=1e-15)
        assert polynomial.reinmax_factor(0.5 - 1e-6, p) == pytest.approx(p - 1.0, abs=1e-9)
    assert polynomial.reinmax_factor(0.45, 1.0) == 0.0
    assert polynomial.straight_through_fixed_point(0.45, 1.0) == 0.5
    for t in (1e-300, 0.45, 1.0 - 1e-16):
        assert all(np.isfinite(list(polynomial.levels(t, 1e6).values())))
        assert np.isfinite(polynomial.reinmax_factor(t, 1e6))


def test_the_table_in_the_docstring_is_what_the_closed_forms_give():
    rows = [re.split(r"  +", line.strip()) for line in polynomial.__doc__.split("t = 0.45")[1].splitlines()]
    shown = {row[0]: [float(x) for x in row[1:]] for row in rows[1:6]}
    expected = {name: [] for name in shown}
    for p in POWERS:
        known = polynomial.levels(0.45, p)
        expected["start"].append(known["start"])
        expected["straight-through, q*"].append(polynomial.straight_through_fixed_point(0.45, p))
        expected["straight-through, loss"].append(known["straight-through's fixed point"])
        expected["minimum"].append(known["minimum"])
        expected["ReinMax, c"].append(polynomial.reinmax_factor(0.45, p))
    assert len(shown) == 5
    for name, values in shown.items():
        assert values == pytest.approx(expected[name], rel=0, abs=5.1e-6), name  # half of the last digit


# ---- runs

SHORT = ["--batch", 32, "--epochs", 4, "--steps", 100, "--lr", 0.05]
TINY = ["--variables", 3, "--batch", 2, "--epochs", 2, "--steps", 2]


@pytest.fixture
def no_picture(monkeypatch):
    monkeypatch.setattr(polynomial, "draw", lambda *_: None)  # it takes longer than all the rest of a tiny run


@pytest.mark.parametrize("p", quick((1.5,), POWERS))
def test_straight_through_stays_at_its_fixed_point_and_reinmax_goes_on_to_the_minimum(tmp_path, no_picture, p):
    """The fixed point is at least 0.0026 from the start and 0.03 from the minimum."""
    known, last = polynomial.levels(0.45, p), {}
    left = lambda loss: (loss - known["minimum"]) / (known["start"] - known["minimum"])  # of the way to go
    for name in ("st", "reinmax"):
        assert run("--estimator", name, "--power", p, *SHORT, "--out", tmp_path / name) == 0
        last[name] = RunFolder(tmp_path / name).metrics()[-1]
        assert left(last[name]["exact_loss"]) < 0.01
    assert last["st"]["loss"] == pytest.approx(known["straight-through's fixed point"], abs=2e-4)
    assert last["st"]["probability"] == pytest.approx(polynomial.straight_through_fixed_point(0.45, p), abs=2e-3)
    assert left(last["st"]["loss"]) > 0.7
    assert left(last["reinmax"]["loss"]) < 0.1


@pytest.mark.parametrize("name", [name for name in ESTIMATORS if not facts(name).multi_sample])
def test_every_estimator_runs(tmp_path, capsys, no_picture, name):
    assert run("--estimator", name, *TINY, "--out", tmp_path / "run") == 0
    first, last = RunFolder(tmp_path / "run").metrics()
    assert np.isfinite([*first.values(), *last.values()]).all()
    assert last["probability"] != first["probability"]  # it moves
    assert re.fullmatch(r"final loss \d\.\d{6} exact \d\.\d{6}\n", capsys.readouterr().out)


def test_a_run_leaves_its_results_and_ends_with_the_promised_line(tmp_path, capsys):
    out = tmp_path / "run"
    assert polynomial.main([*map(str, TINY), "--estimator", "rloo:samples=3", "--out", str(out)]) == 0
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [json.loads(line) for line in lines[:-1]] == metrics
    assert [m["epoch"] for m in metrics] == [1, 2]
    assert list(metrics[0]) == ["epoch", "loss", "sampled_loss", "exact_loss", "probability"]
    assert lines[-1] == f"final loss {metrics[1]['loss']:.6f} exact {metrics[1]['exact_loss']:.6f}"
    assert (out / "curve.png").read_bytes().startswith(b"\x89PNG")
    about = json.loads((out / "config.json").read_text())
    assert about["config"]["estimator"] == "rloo:samples=3"
    assert about["config"]["power"] == 2.0
    assert about["backend"] == "numpy"
    assert "run folder" in captured.err
    assert "straight-through's fixed point 0.247500" in captured.err


def test_the_run_folder_gets_a_name(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(*TINY, "--estimator", "gst:gap=0.8", "--power", 1.5, "--seed", 7) == 0
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith("polynomial-gst-gap=0.8-p1.5-s7-")


def trajectory(*flags):
    config = polynomial.Config(**dict(zip(flags[::2], flags[1::2], strict=True)))
    race = polynomial.Race(config)
    return [np.asarray(race.backend.to_host(race.step(n))) for n in range(5)], race


def test_both_start_from_the_same_small_uniform_numbers_and_the_estimator_is_told_of_each_step():
    race = polynomial.Race(polynomial.Config(estimator="st-slope", variables=1000, batch=2))
    start = race.estimated.theta.data.copy()
    assert 0.0099 < start.max() < 0.01
    assert -0.01 < start.min() < -0.0099
    assert start.std() == pytest.approx(0.01 / np.sqrt(3.0), rel=0.05)
    np.testing.assert_array_equal(race.exact.theta.data, start)
    for n in range(3):
        race.step(n)
    assert race.estimated.estimator.updates == 3
    assert (race.estimated.theta.data != start).all()


def test_a_run_is_a_function_of_its_seed(tmp_path, no_picture):
    folders = {}
    for at, seed in (("a", 3), ("b", 3), ("c", 4)):
        assert run("--estimator", "reinforce-mean", *TINY, "--seed", seed, "--out", tmp_path / at) == 0
        folders[at] = (tmp_path / at / "metrics.jsonl").read_text()
    assert folders["a"] == folders["b"]
    assert folders["a"] != folders["c"]


def test_the_exact_trajectory_is_the_same_beside_every_estimator():
    settings = ("variables", 5, "batch", 2, "lr", 0.1, "dtype", "float64")
    exact = {}
    for name in ("reinforce", "st-identity", "exact"):  # categorical, bits, and the same gradient on two rows
        values, race = trajectory("estimator", name, *settings)
        exact[name] = [v[2] for v in values]
        if name == "exact":
            np.testing.assert_allclose([v[1] for v in values], exact[name], rtol=1e-12)
            np.testing.assert_allclose(race.estimated.theta.data, race.exact.theta.data, rtol=1e-9)
    assert exact["reinforce"] == exact["st-identity"] == exact["exact"]
    assert exact["exact"][-1] < exact["exact"][0] - 0.1


@pytest.mark.parametrize("name", ["reinforce", "st-identity"])
def test_the_expected_loss_is_the_mean_of_the_sampled_one(tmp_path, no_picture, name):
    """One spread of the mean is at most |f(1) − f(0)| / 2√n; the sampled loss lies within four of them."""
    sizes = {"--variables": 20, "--batch": 50, "--epochs": 1, "--steps": 50}
    flags = [x for pair in sizes.items() for x in pair]
    assert run("--estimator", name, "--target", 0.2, "--lr", 0.01, *flags, "--out", tmp_path / "run") == 0
    (line,) = RunFolder(tmp_path / "run").metrics()
    spread = (0.8**2 - 0.2**2) / 2.0 / np.sqrt(50_000)
    assert abs(line["sampled_loss"] - line["loss"]) < 4.0 * spread
    assert line["loss"] == pytest.approx(polynomial.expected_loss(line["probability"], 0.2, 2.0), abs=1e-12)


def test_a_changed_forward_distribution_is_evaluated_as_it_is_drawn():
    _, race = trajectory("estimator", "st-decoupled:tau_f=0.25", "variables", 4, "lr", 0.3)
    theta = race.estimated.theta.data.astype(np.float64)
    q = 1.0 / (1.0 + np.exp(-4.0 * (theta[:, 0] - theta[:, 1])))
    assert race.estimated.probability() == pytest.approx(q.mean(), rel=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", ["reinmax", "darn", "reinforce-mean"])
def test_a_step_stays_on_the_device(monkeypatch, name, dtype):
    """The stand-in device refuses any wait and any copy to the host; its losses are NumPy's to the bit."""
    results = []
    for backend in (Backend(), DevsimBackend()):
        monkeypatch.setattr(polynomial, "get_backend", lambda _, backend=backend: backend)
        race = polynomial.Race(polynomial.Config(estimator=name, variables=3, batch=2, dtype=dtype))
        with forbid("sync", "d2h"):
            values = [race.step(n) for n in range(3)]
        results.append(np.stack([backend.to_host(v) for v in values]))
    np.testing.assert_array_equal(*results)
    assert results[0].dtype == dtype


# ---- bad input: one sentence on standard error, exit code 2, nothing created

BAD_FLAGS = [
    (["--estimator", "magic"], "unknown estimator 'magic'; the known ones are exact"),
    (["--estimator", "rloo:samples=1"], "samples must be an integer of at least 2"),
    (["--estimator", "rloo", "--tau", "1"], "rloo has no option 'tau'"),
    (["--tau", "0"], "tau must be a number from 1e-06 to 1e+06, got 0"),
    (["--tau", "nan"], "tau must be a number from 1e-06 to 1e+06, got nan"),
    (["--tau", "hot"], "argument --tau: invalid float value: 'hot'"),
    (["--power", "0.5"], "--power must be at least 1 and finite, got 0.5"),
    (["--power", "inf"], "--power must be at least 1 and finite"),
    (["--power", "nan"], "--power must be at least 1 and finite"),
    (["--target", "0"], "--target must lie between 0 and 1, got 0"),
    (["--target", "1"], "--target must lie between 0 and 1"),
    (["--target", "nan"], "--target must lie between 0 and 1"),
    (["--variables", "0"], "--variables must be at least 1, got 0"),
    (["--batch", "0"], "--batch must be at least 1"),
    (["--epochs", "-3"], "--epochs must be at least 1"),
    (["--steps", "0"], "--steps must be at least 1"),
    (["--steps", "many"], "argument --steps: 'many' is not a whole number"),
    (["--variables", "1000000000000"], "--batch times --variables must be at most 100,000,000"),
    (["--batch", "100000000000000000000"], "--batch times --variables must be at most 100,000,000"),
    (["--lr", "0"], "--lr, the learning rate, must be positive"),
    (["--lr", "nan"], "--lr, the learning rate, must be positive"),
    (["--seed", "-1"], "seed must be an integer from 0"),
    (["--backend", "tpu"], "unknown backend 'tpu'; the known ones are auto, cupy, numpy"),
    (["--dtype", "float16"], "unknown dtype 'float16'; the known ones are float32, float64"),
    (["--out", "x" * 300], "File name too long"),
    (["--estimator", "vimco"], "vimco lowers −E log mean e^(−f), which is not E f(z): choose another"),
    (["--estimator", "rloo:samples=999999999"], "samples must be an integer of at least 2 and at most 10000"),
    (["--out", ""], "out is empty: give it a value"),
    (["--resume", "run"], "unrecognized arguments: --resume run"),
]


@pytest.mark.parametrize(("flags", "message"), BAD_FLAGS, ids=[" ".join(f) for f, _ in BAD_FLAGS])
def test_a_bad_flag_is_one_sentence_and_exit_code_2(tmp_path, capsys, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    assert run(*TINY, "--out", "run", *flags) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.err.endswith((".\n", "help.\n"))
    assert list(tmp_path.iterdir()) == []


def test_an_output_folder_that_exists_is_left_alone(tmp_path, capsys):
    (tmp_path / "keep.txt").write_text("mine")
    assert run(*TINY, "--out", tmp_path) == 2
    assert "exists already" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["keep.txt"]


def test_a_default_folder_whose_name_is_too_long_is_a_sentence(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    assert run(*TINY, "--estimator", f"reinmax:tau=1.{'0' * 300}") == 2
    captured = capsys.readouterr()
    assert "File name too long" in captured.err
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize("flags", [["--lr", "1e38"], ["--estimator", "noisy-rectifier", "--power", "1000"]])
def test_a_loss_that_is_not_finite_is_one_sentence_and_exit_code_2(tmp_path, capsys, flags):
    assert run(*TINY, "--variables", 200, "--epochs", 20, *flags, "--out", tmp_path / "run") == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert re.search(r"the loss became (nan|inf) at step \d+ of epoch \d+: the run is stopped; try", captured.err)
    assert captured.err.count("\n") == 1


def test_the_script_itself_exits_with_2_without_a_traceback(tmp_path):
    command = [sys.executable, str(ROOT / "scripts" / "polynomial.py"), "--power", "0"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert result.returncode == 2
    assert result.stderr.startswith("polynomial.py: error: --power must be at least 1")
    assert result.stdout == ""
