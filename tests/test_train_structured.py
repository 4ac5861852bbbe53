"""The script for structured prediction as a user meets it: results, resume, the schedule, every way to get it wrong."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import run_folder
import train_structured
from devsim import DevsimBackend, forbid
from minigrad import Rng
from minigrad.backend import Backend
from training import annealed

import numpy as np
import pytest
from safetensors.numpy import load_file

ROOT = Path(__file__).parents[1]
TINY = ["--epochs", "2", "--variables", "4", "--categories", "3", "--samples", "5", "--quiet"]


def run(*flags):
    return train_structured.main([str(f) for f in (*TINY, *flags)])


@pytest.mark.parametrize(
    "flags", [["--code", "bernoulli"], ["--code", "categorical", "--layers", "1"], ["--estimator", "none"]]
)
def test_a_run_leaves_its_results_and_ends_with_the_promised_line(tmp_path, capsys, flags):
    out = tmp_path / "run"
    assert train_structured.main([*TINY[:-1], *flags, "--out", str(out)]) == 0
    captured = capsys.readouterr()
    metrics = run_folder.RunFolder(out).metrics()
    assert [m["epoch"] for m in metrics] == [1, 2, 2]
    assert metrics[2]["samples"] == (1 if "none" in flags else 5)
    last = f"final train {metrics[1]['train']:.4f} test nll {metrics[2]['test_nll']:.4f}"
    assert captured.out.splitlines()[-1] == last
    assert metrics[1]["images_per_second"] > 0
    assert metrics[2]["test_nll"] == pytest.approx(metrics[1]["test"], rel=0.1)
    assert metrics[1]["train"] < metrics[0]["train"]
    for picture in ("curve.png", "completions.png"):
        assert (out / picture).read_bytes().startswith(b"\x89PNG")
    assert json.loads((out / "config.json").read_text())["config"]["seed"] == 0
    assert "run folder" in captured.err


def test_upper_and_lower_half_are_the_rows_of_the_images():
    training = train_structured.Training(train_structured.Config(variables=3))
    images = training.images.train.reshape(-1, 8, 8)
    x, y = training.halves(training.images.train)
    np.testing.assert_array_equal(x.reshape(-1, 4, 8), images[:, :4])
    np.testing.assert_array_equal(y.reshape(-1, 4, 8), images[:, 4:])
    assert set(np.unique(images)) == {0.0, 1.0}  # binarised once, for all


def test_the_reported_nll_is_the_mean_over_all_test_images():
    training = train_structured.Training(train_structured.Config(variables=3, dtype="float64"))
    for p in training.model.parameters():  # a network that says ½ to each of the 32 pixels
        p.data[...] = 0.0
    assert training.nll(training.test, 3, Rng(0)) == pytest.approx(32 * math.log(2.0), rel=1e-12)
    training.estimator = None
    assert training.nll(training.test, 3, Rng(0)) == pytest.approx(32 * math.log(2.0), rel=1e-12)


RESUMED = [
    ["--estimator", "nvil"],
    ["--estimator", "st-slope:rate=0.05", "--optimizer", "sgd"],
    ["--estimator", "gumbel-softmax", "--anneal", "0.02", "--anneal-every", "4", "--code", "categorical"],
    ["--estimator", "st", "--train-samples", "3", "--pixels", "dynamic"],
    ["--estimator", "rebar"],
]


@pytest.mark.parametrize("flags", RESUMED, ids=" ".join)
def test_resume_continues_bit_for_bit_after_ctrl_c(tmp_path, capsys, monkeypatch, flags):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert run("--out", whole, *flags) == 0
    step, count = train_structured.Training.step, iter(range(100))

    def interrupted_step(self, index):
        step(self, index)
        if next(count) in (6, 20):  # in the middle of each epoch
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(train_structured.Training, "step", interrupted_step)
        assert run("--out", stopped, *flags) == 130
        assert f"--resume {stopped}" in capsys.readouterr().err
        assert train_structured.main(["--resume", str(stopped), "--quiet"]) == 130
    assert train_structured.main(["--resume", str(stopped), "--quiet"]) == 0
    a, b = (load_file(folder / "checkpoint.safetensors") for folder in (whole, stopped))
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)
    for m, n in zip(*(run_folder.RunFolder(f).metrics() for f in (whole, stopped)), strict=True):
        assert {k: v for k, v in m.items() if k != "images_per_second"} == {
            k: v for k, v in n.items() if k != "images_per_second"
        }


def test_a_finished_run_can_be_continued_and_evaluated_with_more_samples(tmp_path, capsys):
    assert run("--out", tmp_path / "long", "--epochs", 3) == 0
    assert run("--out", tmp_path / "short") == 0
    assert train_structured.main(["--resume", str(tmp_path / "short"), "--epochs", "3", "--quiet"]) == 0
    a, b = capsys.readouterr().out.splitlines()[0::2]
    assert a == b
    assert train_structured.main(["--resume", str(tmp_path / "short"), "--samples", "50", "--quiet"]) == 0
    metrics = run_folder.RunFolder(tmp_path / "short").metrics()
    assert [m.get("samples") for m in metrics] == [None, None, None, 50]


def test_every_layer_has_an_estimator_and_a_state_of_its_own(tmp_path):
    assert run("--out", tmp_path / "run", "--estimator", "reinforce-mean", "--layers", 3) == 0
    state = load_file(tmp_path / "run" / "checkpoint.safetensors")
    means = [float(state[f"estimator.{l}.mean"]) for l in range(3)]
    assert means[0] == means[1] == means[2] > 0.0  # one sample: every layer has seen the same cost
    training = train_structured.Training(train_structured.Config(estimator="reinforce-mean", variables=3))
    training.step(np.arange(10))
    assert len({id(e) for e in training.estimator}) == 2


# ---- the temperature


def test_the_annealed_temperature_falls_in_steps_to_its_least_value():
    """τ = max(least, start · e^(−rate·t)) with t rounded down, written as a table."""
    settings = {"start": 2.0, "rate": 0.1, "least": 0.5, "every": 5}
    for step, t in ((0, 0), (4, 0), (5, 5), (9, 5), (10, 10)):
        assert annealed(step, **settings) == pytest.approx(2.0 / math.e ** (0.1 * t), rel=1e-12)
    assert annealed(13, **settings) == annealed(10, **settings) > 0.5
    assert annealed(15, **settings) == 0.5  # 2 e^−1.5 = 0.446 is below
    assert annealed(10**9, **settings) == 0.5
    assert annealed(10**9, start=0.3, rate=0.0, least=0.5, every=5) == 0.3  # fixed


def test_the_temperature_of_a_run_is_annealed_in_every_layer(tmp_path):
    flags = ["--tau", "2", "--anneal", "0.05", "--anneal-every", "10", "--tau-least", "0.9", "--epochs", "3"]
    assert run("--out", tmp_path / "run", *flags) == 0
    taus = [m["tau"] for m in run_folder.RunFolder(tmp_path / "run").metrics() if "tau" in m]
    assert taus == [2.0 * math.exp(-0.5), 0.9, 0.9]  # after 15, 30 and 45 steps
    config = train_structured.Config(tau=2.0, anneal=0.05, anneal_every=1, variables=3)
    training = train_structured.Training(config)
    for _ in range(3):
        training.step(np.arange(10))
    assert [e.tau for e in training.estimator] == [2.0 * math.exp(-0.1)] * 2


# ---- the device


@pytest.mark.parametrize(
    "settings", [{"pixels": "dynamic"}, {"estimator": "none"}, {"train_samples": 2}, {"anneal": 0.1}]
)
def test_the_script_s_own_step_stays_on_the_device(monkeypatch, settings):
    """The stand-in device refuses any wait and any copy to the host; its losses and weights are NumPy's to the bit."""
    results = []
    for backend in (Backend(), DevsimBackend()):
        monkeypatch.setattr(train_structured, "get_backend", lambda _, backend=backend: backend)
        training = train_structured.Training(train_structured.Config(variables=3, **settings))
        order = backend.to_device(Rng(0).permutation(len(training.train)))
        with forbid("sync", "d2h"):
            for step in range(3):
                training.step(order[step * 20 : step * 20 + 20])
        state, _ = training.state()
        training.restore(state, {"epoch": 0, "step_in_epoch": 3})
        training.step(order[:20])
        results.append(training.state()[0])
        assert math.isfinite(training.nll(training.test[:20], 2, Rng(0)))
    for name in results[0]:
        np.testing.assert_array_equal(results[0][name], results[1][name], err_msg=name)


# ---- bad input: one sentence on standard error, exit code 2, no traceback, nothing lost

BAD_FLAGS = [
    (["--estimator", "magic"], "unknown estimator 'magic'; the known ones are exact"),
    (["--data", "cifar"], "unknown data set 'cifar'; the known ones are digits, mnist"),
    (["--backend", "tpu"], "unknown backend 'tpu'; the known ones are auto, cupy, numpy"),
    (["--dtype", "float16"], "unknown dtype 'float16'; the known ones are float32, float64"),
    (["--optimizer", "lion"], "unknown optimizer 'lion'; the known ones are sgd, adam, radam"),
    (["--pixels", "red"], "unknown pixels 'red'; the known ones are gray, dynamic, fixed"),
    (["--code", "ternary"], "unknown code 'ternary'; the known ones are bernoulli, categorical"),
    (["--estimator", "gst-1.0"], "Gapped straight-through is for categorical variables, not 'bernoulli'"),
    (["--estimator", "darn", "--code", "categorical"], "DARN(½) is for bernoulli variables, not 'categorical'"),
    (["--tau", "0"], "tau must be positive and finite, got 0"),
    (["--tau", "nan"], "tau must be positive and finite"),
    (["--estimator", "rloo", "--tau", "1"], "rloo has no option 'tau'"),
    (["--estimator", "none", "--tau", "1"], "without an estimator has no temperature: leave out --tau"),
    (["--estimator", "none", "--anneal", "0.1"], "the estimator none has no temperature that could be annealed"),
    (["--estimator", "rebar", "--anneal", "0.1"], "the estimator rebar has no temperature that could be annealed"),
    (["--anneal", "-1"], "--anneal must be at least 0, got -1"),
    (["--anneal", "nan"], "--anneal must be at least 0, got nan"),
    (["--anneal-every", "0"], "--anneal-every must be at least 1, got 0"),
    (["--tau-least", "0"], "--tau-least must be positive, got 0"),
    (["--variables", "0"], "--variables must be at least 1, got 0"),
    (["--categories", "0"], "--categories must be at least 1"),
    (["--layers", "0"], "--layers must be at least 1"),
    (["--batch", "0"], "--batch must be at least 1"),
    (["--epochs", "-3"], "--epochs must be at least 1"),
    (["--samples", "0"], "--samples must be at least 1"),
    (["--train-samples", "0"], "--train-samples must be at least 1"),
    (["--estimator", "nvil", "--train-samples", "2"], "NVIL is no sample with a rule"),
    (["--estimator", "none", "--train-samples", "2"], "a network without an estimator has no samples"),
    (["--estimator", "vimco"], "VIMCO is a bound of several samples"),
    (["--lr", "0"], "learning rate must be positive"),
    (["--seed", "-1"], "seed must be an integer from 0"),
    (["--estimator", "exact", "--variables", "30"], "outcomes: at most 16384 are allowed"),
    (["--variables", "1000000000000"], "does not fit into memory"),
    (["--out", "x" * 300], "File name too long"),
    (["--data", "mnist", "--data-dir", "/nonexistent"], "has neither train-images-idx3-ubyte nor"),
    (["--learning-rate", "1"], "unrecognized arguments: --learning-rate"),
    (["--resume", "/nonexistent/run"], "there is no run folder /nonexistent/run"),
]


@pytest.mark.parametrize(("flags", "message"), BAD_FLAGS, ids=[" ".join(f) for f, _ in BAD_FLAGS])
def test_a_bad_flag_is_one_sentence_and_exit_code_2(tmp_path, capsys, flags, message):
    out = [] if "--resume" in flags else ["--out", tmp_path / "run"]
    assert run(*out, *flags) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.err.endswith((".\n", "help.\n"))
    assert not (tmp_path / "run").exists()


def test_vimco_trains_one_layer(tmp_path):
    assert run("--out", tmp_path / "run", "--estimator", "vimco", "--layers", "1") == 0


def test_an_estimator_that_may_not_train_the_network_says_so(tmp_path, caplog):
    assert run("--out", tmp_path / "run", "--estimator", "reinforce") == 0
    assert "reinforce may not train the network: without a baseline" in caplog.text


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("finished") / "run"
    assert run("--out", out, "--estimator", "reinforce-mean") == 0
    return out


@pytest.mark.parametrize(
    ("spoil", "flags", "message"),
    [
        (lambda f: (f / "checkpoint.safetensors").unlink(), [], "there is no checkpoint"),
        (lambda f: (f / "config.json").unlink(), [], "config.json is missing or damaged"),
        (lambda f: None, ["--estimator", "st"], "another configuration (--estimator reinforce-mean, not st)"),
        (lambda f: None, ["--epochs", "1"], "--epochs must not be less"),
        (lambda f: edit_config(f, variables=3), [], "belongs to another model"),
        (lambda f: edit_config(f, layers=3), [], "belongs to another model"),
        (lambda f: edit_config(f, estimator="nvil"), [], "belongs to another estimator"),
        (lambda f: edit_config(f, estimator="none"), [], "another configuration (estimator differ)"),
        (lambda f: edit_config(f, anneal="slow"), [], "config.json is missing or damaged (anneal is 'slow')"),
    ],
)
def test_a_resume_folder_that_does_not_fit(tmp_path, capsys, finished, spoil, flags, message):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    spoil(folder)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    assert train_structured.main(["--resume", str(folder), "--quiet", *flags]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert before == {p.name: p.read_bytes() for p in folder.iterdir()}


def edit_config(folder, **changes):
    about = json.loads((folder / "config.json").read_text())
    about["config"] |= changes
    (folder / "config.json").write_text(json.dumps(about))


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint(tmp_path, capsys, monkeypatch):
    step, count = train_structured.Training.step, iter(range(100))

    def spoiled_step(self, index):
        step(self, index)
        if next(count) == 20:
            self.model.layers[-1].weight.data[0] = np.nan

    monkeypatch.setattr(train_structured.Training, "step", spoiled_step)
    out = tmp_path / "run"
    assert run("--out", out) == 2
    err = capsys.readouterr().err
    assert "at step 22 (epoch 2)" in err
    assert err.count("\n") == 1
    monkeypatch.undo()
    assert train_structured.main(["--resume", str(out), "--quiet"]) == 0


def test_the_script_itself_exits_with_2_without_a_traceback(tmp_path):
    command = [sys.executable, str(ROOT / "scripts" / "train_structured.py"), "--estimator", "magic"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert result.returncode == 2
    assert result.stderr.startswith("train_structured.py: error: unknown estimator 'magic'")
    assert result.stdout == ""
