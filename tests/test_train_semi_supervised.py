"""The semi-supervised script as a user meets it: results, comparisons, resume, and every way to get it wrong."""

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import bench
import run_folder
import train_semi_supervised
import training
from devsim import DevsimBackend, forbid
from minigrad import Rng
from minigrad.backend import Backend
from models.data import load_images

import numpy as np
import pytest
from safetensors.numpy import load_file

ROOT = Path(__file__).parents[1]
TINY = ["--epochs", "2", "--hidden", "8", "--latent", "2", "--images", "300", "--labels", "20", "--quiet"]
SAMPLE = ["--method", "sample"]


def run(*flags):
    return train_semi_supervised.main([str(f) for f in (*TINY, *flags)])


def metrics(folder):
    return run_folder.RunFolder(folder).metrics()


def same(a, b):
    """Are the metrics of two runs alike, but for the time they took?"""
    timeless = lambda lines: [{k: v for k, v in m.items() if k != "ms_per_step"} for m in lines]
    return timeless(metrics(a)) == timeless(metrics(b))


def test_a_run_leaves_its_results_and_ends_with_the_promised_line(tmp_path, capsys):
    out = tmp_path / "run"
    assert train_semi_supervised.main([*TINY[:-1], "--out", str(out)]) == 0
    captured = capsys.readouterr()
    lines = metrics(out)
    assert captured.out.splitlines()[-1] == (
        f"final test accuracy {lines[1]['test_accuracy']:.4f} test -ELBO {lines[1]['test_bound']:.4f}"
    )
    assert [m["epoch"] for m in lines] == [1, 2]
    for m in lines:
        assert m["train"] == pytest.approx(m["train_labelled"] + m["train_unlabelled"])
        assert m["ms_per_step"] > 0
    assert lines[1]["test_bound"] < lines[0]["test_bound"] < 64 * math.log(2) + 5
    for picture in ("curve.png", "analogies.png"):
        assert (out / picture).read_bytes().startswith(b"\x89PNG")
    assert json.loads((out / "config.json").read_text())["config"]["labels"] == 20


def test_images_without_labels_raise_the_accuracy(tmp_path):
    """Fewer labels than by default, so that few epochs show it."""
    flags = ["--epochs", 25, "--hidden", 32, "--images", 1437, "--labels", 30, "--lr", "5e-3"]
    for out, more in (("alone", ["--labelled-only"]), ("marginal", [])):
        assert run("--out", tmp_path / out, *flags, *more) == 0
    alone, marginal = (metrics(tmp_path / out)[-1]["test_accuracy"] for out in ("alone", "marginal"))
    assert marginal > alone + 0.02


def test_labelled_only_changes_nothing_but_the_objective(tmp_path):
    """The images without labels take no part: with others in their place the run is the same."""
    runs = []
    for spoil in (False, True):
        config = train_semi_supervised.Config(hidden=(8,), latent=2, images=300, labels=20, labelled_only=True)
        trained = train_semi_supervised.Training(config)
        if spoil:
            trained.unlabelled = 1.0 - trained.unlabelled
        for index in trained.epoch_steps():
            trained.step(index)
        arrays, _ = trained.state()
        assert (arrays["losses"][:, 0] > 0).all()
        assert not arrays["losses"][:, 1].any()
        runs.append(arrays)
    for name, a in runs[0].items():
        np.testing.assert_array_equal(a, runs[1][name])


def first_losses(**changes):
    sizes = {"hidden": (8,), "latent": 2, "images": 300, "labels": 20}
    trained = train_semi_supervised.Training(train_semi_supervised.Config(**(sizes | changes)))
    trained.step(trained.epoch_steps()[0])
    return np.array([float(part) for part in trained.losses[0]])


def test_alpha_weighs_the_classification_of_the_labels():
    none, one, three = (first_losses(alpha=alpha) for alpha in (0.0, 1.0, 3.0))
    np.testing.assert_allclose(three - none, 3.0 * (one - none), rtol=1e-4, atol=1e-5)
    assert (one - none)[0] == pytest.approx(math.log(10), rel=0.2)
    assert (one - none)[1] == 0.0


def test_an_estimator_that_changes_the_distribution_changes_it_for_the_labels_too():
    plain, flat = (first_losses(method="sample", estimator=f"st-decoupled:tau_f={tau}") for tau in (1, 1000))
    assert flat[0] != plain[0]
    alpha = first_losses(method="sample", estimator="st-decoupled:tau_f=1000", alpha=0.0)
    assert flat[0] - alpha[0] == pytest.approx(math.log(10), rel=1e-3)  # q(y|x) is uniform


def test_labels_are_balanced_and_come_from_the_seed():
    labels = load_images("digits").train_labels
    known, unknown = train_semi_supervised.with_labels(labels, 103, 10, Rng(0))
    assert np.bincount(labels[known]).tolist() == [11, 11, 11, 10, 10, 10, 10, 10, 10, 10]
    np.testing.assert_array_equal(np.sort(np.concatenate([known, unknown])), np.arange(len(labels)))
    again, other = (train_semi_supervised.with_labels(labels, 103, 10, Rng(s))[0] for s in (0, 1))
    assert (again == known).all()
    assert (other != known).any()


# ---- the temperature


def test_the_temperature_falls_in_steps_down_to_the_least():
    """max(0.5, e^(−3·10⁻⁵ t)), changed every 2,000 steps, as published."""
    tau = lambda step: training.annealed(step, 1.0, 3e-5, 0.5, 2000)
    assert tau(0) == tau(1999) == 1.0
    assert tau(2000) == tau(3999) == math.exp(-0.06)
    assert tau(22_000) == math.exp(-0.66)
    assert tau(24_000) == tau(10**9) == 0.5
    assert training.annealed(10**6, 0.7, 0.0, 0.1, 1) == 0.7


@pytest.mark.parametrize("estimator", ["gumbel-softmax", "st-gs"])
def test_an_annealed_run_uses_the_temperature_of_its_step(tmp_path, monkeypatch, estimator):
    seen = []
    unlabelled = train_semi_supervised.SemiSupervisedVAE.unlabelled
    spy = lambda self, x, rng, estimator: seen.append(estimator.tau) or unlabelled(self, x, rng, estimator)
    monkeypatch.setattr(train_semi_supervised.SemiSupervisedVAE, "unlabelled", spy)
    flags = ["--estimator", estimator, "--tau", 2, "--anneal", 0.5, "--anneal-every", 2, "--tau-least", 0.6]
    assert run("--out", tmp_path / "run", *SAMPLE, *flags) == 0  # two epochs of three steps
    expected = [2.0, 2.0, 2.0 * math.exp(-1.0), 2.0 * math.exp(-1.0), 0.6, 0.6]
    assert seen == expected
    assert [m["tau"] for m in metrics(tmp_path / "run")] == [expected[2], expected[5]]


# ---- resume


@pytest.mark.parametrize(
    "flags",
    [
        [],
        [*SAMPLE, "--anneal", "0.1", "--anneal-every", "2"],
        [*SAMPLE, "--estimator", "reinforce-mean", "--pixels", "gray"],
        [*SAMPLE, "--estimator", "nvil", "--labelled-only"],
        ["--batch", "15", "--pixels", "fixed"],  # fewer images in a batch than there are labels
    ],
)
def test_resume_continues_bit_for_bit_after_ctrl_c(tmp_path, capsys, monkeypatch, flags):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert run("--out", whole, *flags) == 0
    step, count = train_semi_supervised.Training.step, iter(range(1000))

    def interrupted_step(self, index):
        step(self, index)
        if next(count) in (1, 4):
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(train_semi_supervised.Training, "step", interrupted_step)
        assert run("--out", stopped, *flags) == 130
        assert f"--resume {stopped}" in capsys.readouterr().err
        assert train_semi_supervised.main(["--resume", str(stopped), "--quiet"]) == 130
    assert train_semi_supervised.main(["--resume", str(stopped), "--quiet"]) == 0
    a, b = (load_file(folder / "checkpoint.safetensors") for folder in (whole, stopped))
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)
    assert same(whole, stopped)


def test_a_finished_run_can_be_continued_but_not_changed(tmp_path, capsys):
    assert run("--out", tmp_path / "long", "--epochs", 3) == 0
    assert run("--out", tmp_path / "short") == 0
    resume = ["--resume", str(tmp_path / "short"), "--quiet"]
    assert train_semi_supervised.main([*resume, "--epochs", "3"]) == 0
    assert same(tmp_path / "long", tmp_path / "short")
    capsys.readouterr()
    for flags, message in (
        (["--alpha", "2"], "another configuration (--alpha 1.0, not 2.0)"),
        (["--method", "sample"], "another configuration (--method marginal, not sample)"),
        (["--epochs", "2"], "--epochs must not be less"),
    ):
        assert train_semi_supervised.main([*resume, *flags]) == 2
        err = capsys.readouterr().err
        assert message in err
        assert err.count("\n") == 1


# ---- the device


@pytest.mark.parametrize("pixels", ["gray", "dynamic"])
@pytest.mark.parametrize("method", [[], ["gumbel-softmax"], ["rloo"]])
def test_the_script_s_own_step_stays_on_the_device(monkeypatch, pixels, method):
    """The stand-in device refuses any wait and any copy to the host; its losses and weights are NumPy's to the bit."""
    chosen = {"method": "sample", "estimator": method[0]} if method else {}
    results = []
    for backend in (Backend(), DevsimBackend()):
        monkeypatch.setattr(train_semi_supervised, "get_backend", lambda _, backend=backend: backend)
        sizes = {"hidden": (8,), "latent": 2, "images": 200, "labels": 20, "batch": 50}
        trained = train_semi_supervised.Training(train_semi_supervised.Config(pixels=pixels, **sizes, **chosen))
        steps = trained.epoch_steps()
        with forbid("sync", "d2h"):
            for index in steps[:3]:
                trained.step(index)
        state, _ = trained.state()
        trained.restore(state, {"epoch": 0, "step_in_epoch": 3})
        trained.step(steps[3])
        results.append(trained.state()[0] | dict(enumerate(map(np.array, trained.evaluate(Rng(0))))))
    for name in results[0]:
        np.testing.assert_array_equal(results[0][name], results[1][name], err_msg=name)


# ---- bad input: one sentence on standard error, exit code 2, no traceback, nothing lost

BAD_FLAGS = [
    (["--labels", "9"], "--labels must be at least 10, one for each class, got 9"),
    (["--labels", "0"], "--labels must be at least 1, got 0"),
    (["--labels", "301"], "--labels must be at most 300, the number of training images, got 301"),
    (["--labels", "290"], "class 0 has "),
    (["--images", "1438"], "--images must be at most 1437, got 1438"),
    (["--images", "-1"], "--images must be at least 0"),
    (["--images", "10", "--labels", "10"], "take fewer --labels"),
    (["--alpha", "-0.1"], "--alpha must be at least 0 and finite, got -0.1"),
    (["--alpha", "nan"], "--alpha must be at least 0 and finite, got nan"),
    (["--alpha", "inf"], "--alpha must be at least 0 and finite"),
    (["--method", "magic"], "unknown method 'magic'; the known ones are marginal, sample"),
    ([*SAMPLE, "--estimator", "magic"], "unknown estimator 'magic'; the known ones are exact"),
    ([*SAMPLE, "--estimator", "vimco"], "is a bound of several samples, which needs the density of each z"),
    ([*SAMPLE, "--estimator", "st-identity"], "is for bernoulli variables, not 'categorical'"),
    ([*SAMPLE, "--tau", "0"], "tau must be positive and finite, got 0"),
    ([*SAMPLE, "--estimator", "rloo", "--tau", "1"], "rloo has no option 'tau'"),
    ([*SAMPLE, "--estimator", "rloo", "--anneal", "0.1"], "rloo has no temperature: leave --anneal out"),
    (["--anneal", "-1"], "--anneal must be at least 0 and finite, got -1"),
    (["--anneal-every", "0"], "--anneal-every must be at least 1, got 0"),
    (["--tau-least", "0"], "--tau-least must be positive and finite, got 0"),
    (
        [*SAMPLE, "--anneal", "0.1", "--tau", "0.3"],
        "--tau-least must be at most the first temperature 0.3, got 0.5",
    ),
    (["--latent", "0"], "--latent must be at least 1"),
    (["--hidden", "0"], "--hidden needs widths of at least 1"),
    (["--hidden", "a,b"], "not a list of whole numbers"),
    (["--batch", "0"], "--batch must be at least 1"),
    (["--epochs", "0"], "--epochs must be at least 1"),
    (["--lr", "0"], "learning rate must be positive"),
    (["--seed", "-1"], "seed must be an integer from 0"),
    (["--optimizer", "lion"], "unknown optimizer 'lion'; the known ones are sgd, adam, radam"),
    (["--dtype", "float16"], "unknown dtype 'float16'"),
    (["--backend", "tpu"], "unknown backend 'tpu'"),
    (["--data", "cifar"], "unknown data set 'cifar'"),
    (["--pixels", "red"], "unknown pixels 'red'"),
    (["--data", "mnist", "--data-dir", "/nonexistent"], "has neither train-images-idx3-ubyte nor"),
    (["--latent", "100000000000000000000"], "does not fit into memory"),
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


def test_an_image_set_in_which_every_image_has_a_label_is_refused(tmp_path, capsys, monkeypatch):
    choose = lambda labels, *_: (np.arange(len(labels)), np.arange(0))
    monkeypatch.setattr(train_semi_supervised, "with_labels", choose)
    assert run("--out", tmp_path / "run") == 2
    assert "all 300 training images have labels: take fewer --labels." in capsys.readouterr().err


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint(tmp_path, capsys, monkeypatch):
    step, count = train_semi_supervised.Training.step, iter(range(1000))

    def spoiled_step(self, index):
        step(self, index)
        if next(count) == 3:
            self.model.decoder.of_class.data[0] = np.inf

    with monkeypatch.context() as patch:
        patch.setattr(train_semi_supervised.Training, "step", spoiled_step)
        assert run("--out", tmp_path / "run") == 2
    err = capsys.readouterr().err
    assert "at step 5 (epoch 2): training stopped, the last good checkpoint is kept" in err
    assert err.count("\n") == 1
    assert train_semi_supervised.main(["--resume", str(tmp_path / "run"), "--quiet"]) == 0


def test_the_script_itself_exits_with_2_without_a_traceback(tmp_path):
    command = [sys.executable, str(ROOT / "scripts" / "train_semi_supervised.py"), "--labels", "3"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert result.returncode == 2
    assert result.stderr.startswith("train_semi_supervised.py: error: --labels must be at least 10")
    assert result.stdout == ""


# ---- the benchmark


def test_the_benchmark_times_the_same_step_for_every_number_of_classes(monkeypatch, capsys):
    monkeypatch.setattr(bench, "CLASSES", (2, 3))
    for build, module in bench.CONTENDERS["classes"].values():
        assert module is None
        steps = build()
        assert list(steps) == [2, 3]
        for step in steps.values():
            step()
    bench.show("classes", {"marginalisation": {2: 0.02, 3: 0.04}, "one sample (st-gs)": {2: 0.01, 3: 0.01}})
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2].split()[-2:] == ["2.0", "4.0"]
