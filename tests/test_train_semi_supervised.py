"""The semi-supervised script as a user meets it: results, comparisons, the temperature, the benchmark."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

import bench
import train_semi_supervised
from experiments import run_folder
from experiments.loop import Loop
from minigrad import Rng
from models.data import load_images

ROOT = Path(__file__).parents[1]
TINY = ["--epochs", "2", "--hidden", "8", "--latent", "2", "--images", "300", "--labels", "20", "--quiet"]
SAMPLE = ["--method", "sample"]


def run(*flags):
    return train_semi_supervised.main([str(f) for f in (*TINY, *flags)])


def metrics(folder):
    return run_folder.RunFolder(folder).metrics()


@pytest.fixture
def no_picture(monkeypatch):
    monkeypatch.setattr(train_semi_supervised.SemiSupervised, "draw", lambda *_: None)  # most of a tiny run's time


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


@pytest.mark.slow
def test_images_without_labels_raise_the_accuracy(tmp_path, no_picture):
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
        trained = train_semi_supervised.SemiSupervised(config)
        if spoil:
            trained.train = 1.0 - trained.train
        loop = Loop(trained, None, quiet=True)
        for index in trained.epoch_steps():
            loop.step(index)
        arrays, _ = loop.state()
        assert (arrays["losses"][:, 0] > 0).all()
        assert not arrays["losses"][:, 1].any()
        runs.append(arrays)
    for name, a in runs[0].items():
        np.testing.assert_array_equal(a, runs[1][name])


def first_losses(**changes):
    sizes = {"hidden": (8,), "latent": 2, "images": 300, "labels": 20}
    trained = train_semi_supervised.SemiSupervised(train_semi_supervised.Config(**(sizes | changes)))
    return np.array([float(part) for part in trained.step(trained.epoch_steps()[0], Rng(0))])


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


@pytest.mark.parametrize("estimator", ["gumbel-softmax", "st-gs"])
def test_an_annealed_run_uses_the_temperature_of_its_step(tmp_path, monkeypatch, no_picture, estimator):
    seen = []
    unlabelled = train_semi_supervised.SemiSupervisedVAE.unlabelled
    spy = lambda self, x, rng, estimator: seen.append(estimator.tau) or unlabelled(self, x, rng, estimator)
    monkeypatch.setattr(train_semi_supervised.SemiSupervisedVAE, "unlabelled", spy)
    flags = ["--estimator", estimator, "--tau", 2, "--anneal", 0.5, "--anneal-every", 2, "--tau-least", 0.6]
    assert run("--out", tmp_path / "run", *SAMPLE, *flags) == 0  # two epochs of three steps
    expected = [2.0, 2.0, 2.0 * math.exp(-1.0), 2.0 * math.exp(-1.0), 0.6, 0.6]
    assert seen == expected
    assert [m["tau"] for m in metrics(tmp_path / "run")] == [expected[2], expected[5]]


# ---- bad input: one sentence on standard error, exit code 2, no traceback, nothing lost


def test_an_image_set_in_which_every_image_has_a_label_is_refused(tmp_path, capsys, monkeypatch):
    choose = lambda labels, *_: (np.arange(len(labels)), np.arange(0))
    monkeypatch.setattr(train_semi_supervised, "with_labels", choose)
    assert run("--out", tmp_path / "run") == 2
    assert "all 300 training images have labels: take fewer --labels." in capsys.readouterr().err


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
