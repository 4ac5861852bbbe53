"""The script for VAEs as a user meets it: results, the papers' settings, and what the published code reached."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import train_vae
from experiments import run_folder, vae
from experiments.loop import Loop
from minigrad import Rng, grad

ROOT = Path(__file__).parents[1]
TINY = ["--epochs", "2", "--hidden", "16", "--variables", "2", "--quiet"]
FOUR = ["--categories", "4"]


def started(config):
    """The loop of a run that has not begun, without a folder."""
    return Loop(train_vae.VAE(config), None, quiet=True)


def run(*flags):
    return train_vae.main([str(f) for f in (*TINY, *flags)])


@pytest.fixture
def no_picture(monkeypatch):
    monkeypatch.setattr(train_vae.VAE, "draw", lambda *_: None)  # pictures take most of the time of a tiny run


def test_a_run_leaves_its_results_and_ends_with_the_promised_line(tmp_path, capsys):
    out = tmp_path / "run"
    assert train_vae.main([*TINY[:-1], *FOUR, "--out", str(out), "--bound-samples", "5"]) == 0
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    last = metrics[1]
    assert lines[-1] == f"final train -ELBO {last['train']:.4f} test -ELBO {last['test']:.4f}"
    assert [m["epoch"] for m in metrics] == [1, 2, 2]
    for key in ("train", "test"):
        assert last[key] == pytest.approx(last[f"{key}_reconstruction"] + last[f"{key}_kl"])
    assert last["images_per_second"] > 0
    assert metrics[2]["test_bound"] < last["test"]
    for picture in ("curve.png", "reconstructions.png", "samples.png"):
        assert (out / picture).read_bytes().startswith(b"\x89PNG")
    about = json.loads((out / "config.json").read_text())
    assert about["config"]["seed"] == 0
    assert about["backend"] == "numpy"
    assert "run folder" in captured.err


def test_soft_samples_are_evaluated_with_hard_ones(tmp_path):
    assert run("--out", tmp_path / "soft", "--estimator", "gumbel-softmax", "--tau", "2") == 0
    last = run_folder.RunFolder(tmp_path / "soft").metrics()[-1]
    assert last["train_relaxed"] != last["train"]


def test_a_model_of_binary_pixels_is_measured_on_binary_pixels(monkeypatch):
    """Training images that are binarised for every batch are binarised for −ELBO and the gradient's variance, too."""
    config = vae.Config(
        estimator="gumbel-softmax", pixels="dynamic", hidden=(4,), variables=2, gradient_draws=2, batch=1000
    )
    loop = started(config)
    run = loop.experiment
    for index in run.epoch_steps():
        loop.step(index)
    seen = []
    for name in ("evaluate", "negative_elbo"):
        method = getattr(run.model, name)
        watched = lambda x, *args, method=method: seen.append(x) or method(x, *args)
        monkeypatch.setattr(run.model, name, watched)
    run.report(loop.losses_so_far(), 1.0)
    assert sum(map(len, seen)) == len(run.train) + len(run.test)
    run.gradient_noise()
    assert all(set(np.unique(x)) == {0.0, 1.0} for x in seen)


@pytest.mark.parametrize("optimizer", ["sgd", "radam"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_other_settings_train(tmp_path, capsys, no_picture, optimizer, dtype):
    assert run("--out", tmp_path / "run", "--optimizer", optimizer, "--dtype", dtype, "--pixels", "fixed") == 0
    assert "final train -ELBO" in capsys.readouterr().out


@pytest.mark.parametrize("code", ["categorical", "bernoulli"])
def test_the_vaes_of_the_papers_train(tmp_path, capsys, no_picture, code):
    """Linear maps, a learned prior, a falling temperature, SGD with momentum; and 200-200-200 with leaky ReLUs."""
    flags = ("--code", code, "--hidden", "none", "--prior", "learned", "--optimizer", "sgd", "--pixels", "fixed")
    annealing = ("--estimator", "gumbel-softmax", "--anneal", "0.1", "--anneal-every", "3", "--tau-least", "0.4")
    assert run("--out", tmp_path / "linear", *flags, *annealing) == 0
    state = load_file(tmp_path / "linear" / "checkpoint.safetensors")
    assert state["model.prior"].any()
    assert sorted(k for k in state if k.startswith("model.encoder")) == [
        "model.encoder.layers.0.bias",
        "model.encoder.layers.0.weight",
    ]
    assert run("--out", tmp_path / "leaky", "--code", code, "--hidden", "20,20", "--slope", "0.3") == 0
    assert train_vae.main(["--resume", str(tmp_path / "linear"), "--epochs", "4", "--quiet"]) == 0
    assert capsys.readouterr().out.count("final train -ELBO") == 3


def test_the_temperature_of_a_run_is_annealed():
    loop = started(vae.Config(estimator="st-gs", tau=2.0, anneal=0.1, anneal_every=2, hidden=(4,)))
    taus = []
    for step in range(5):
        loop.step(np.arange(3) + step)
        taus.append(loop.experiment.estimator.tau)
    np.testing.assert_allclose(taus, 2.0 * np.exp([0.0, 0.0, -0.2, -0.2, -0.4]))


def test_the_variance_of_the_gradient_is_that_of_its_draws():
    config = vae.Config(gradient_draws=6, hidden=(5,), variables=2, categories=3, estimator="st-gs", dtype="float64")
    run = train_vae.VAE(config)
    found, draws = run.gradient_noise(), []
    for draw in range(6):
        terms = run.model.negative_elbo(run.train[:1000], run.estimator, Rng(0).site("gradient").at(draw))
        g = grad((terms[0] + terms[1]).mean(), run.model.encoder.parameters())
        draws.append(np.concatenate([x.reshape(-1) for x in g]))
    np.testing.assert_allclose(found["gradient_variance"], np.var(draws, axis=0, ddof=1).sum(), rtol=1e-10)
    np.testing.assert_allclose(found["gradient_norm2"], (np.mean(draws, axis=0) ** 2).sum(), rtol=1e-10)
    assert found["gradient_variance"] > 0


def test_a_run_resumed_at_its_end_measures_the_gradient_at_the_temperature_it_had_come_to():
    config = vae.Config(estimator="st-gs", anneal=0.1, anneal_every=1, gradient_draws=2, hidden=(4,), variables=2)
    loop, resumed = started(config), started(config)
    for step in range(6):
        loop.step(np.arange(3) + step)
    resumed.load_state(*loop.state())
    found = []
    for run in (loop.experiment, resumed.experiment):
        run.set_temperature()  # as the loop does at the end
        found.append(run.gradient_noise())
    assert found[0] == found[1]
    assert loop.experiment.estimator.tau == resumed.experiment.estimator.tau == pytest.approx(np.exp(-0.6))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("estimator", "tau", "train", "test"),
    [
        ("reinmax", 1.3, 138.3, 137.5),
        ("st-gs", 1.0, 138.8, 138.0),
        ("gst-1.0", 0.7, 138.1, 137.8),
        ("st", 1.3, 145.6, 144.7),
    ],
)
def test_mnist_reaches_the_published_code(tmp_path, estimator, tau, train, test):
    """Ten epochs of MNIST at 4 variables of 8 categories (about a minute and a half each), three seeds.
    The best is no more than a nat above what the original PyTorch code reached with its one seed: seeds differ by
    more than that, and some runs collapse, here as there."""
    if not os.environ.get("MINIGRAD_DATA"):
        pytest.skip("set MINIGRAD_DATA to a folder that has mnist/")
    reached = []
    for seed in (0, 1, 2):
        flags = ["--data", "mnist", "--estimator", estimator, "--tau", tau, "--variables", 4, "--categories", 8]
        out = tmp_path / f"{seed}"
        flags += ["--epochs", 10, "--lr", 5e-4, "--seed", seed, "--out", out, "--quiet"]
        assert train_vae.main([str(f) for f in flags]) == 0
        last = run_folder.RunFolder(out).metrics()[-1]
        reached.append((last["train"], last["test"]))
    best = min(reached)
    assert best[0] < train + 1.0
    assert best[1] < test + 1.0
