"""The script for spiking networks as a user meets it: results, counts, codes at test time, what may change later."""

import json

import numpy as np
import pytest

import train_spiking
from devsim import DevsimBackend
from experiments import loop, pictures
from experiments.loop import Loop
from experiments.run_folder import RunFolder
from minigrad import Rng, grad
from minigrad.backend import Backend
from models.spiking import squared_hinge

TINY = ["--epochs", "2", "--hidden", "12,8", "--steps", "3", "--batch", "100"]


def run(*flags):
    return train_spiking.main([str(f) for f in (*TINY, "--quiet", *flags)])


def training(**flags):
    sizes = {"hidden": (12, 8), "steps": 3, "batch": 100}
    return train_spiking.Spiking(train_spiking.Config(**(sizes | flags)))


@pytest.mark.parametrize(
    "flags",
    [
        (),
        ("--coding", "latency", "--reset", "zero", "--leak", "0.9", "--loss-at", "every"),
        ("--integration", "discontinuous", "--test-steps", "5"),
        ("--network", "conv", "--channels", "2"),
    ],
    ids=lambda flags: " ".join(flags) or "default",
)
@pytest.mark.daily(2)
def test_a_run_leaves_its_results_and_ends_with_the_promised_line(tmp_path, capsys, flags):
    out = tmp_path / "run"
    assert train_spiking.main([*TINY, *flags, "--out", str(out)]) == 0
    captured = capsys.readouterr()
    *epochs, last = RunFolder(out).metrics()
    assert [json.loads(line) for line in captured.out.splitlines()[:-1]] == [*epochs, last]
    assert [m["epoch"] for m in epochs] == [1, 2]
    assert epochs[1]["train_loss"] < epochs[0]["train_loss"]
    assert list(epochs[0]) == [
        "epoch", "train_loss", "train_spikes", "valid_accuracy", "test_accuracy", "additions", "images_per_second"
    ]  # fmt: skip
    steps, layers = 5 if "--test-steps" in flags else 3, 4 if "conv" in flags else 3
    assert len(last["accuracy_after"]) == steps
    assert last["test_accuracy"] == pytest.approx(last["accuracy_after"][-1], abs=1e-6)
    assert 0.0 < last["single_step_accuracy"] < 1.0
    assert len(last["spikes"]) == layers
    assert (
        last["dense_multiply_adds"] == {3: 64 * 12 + 12 * 8 + 8 * 10, 4: 34**2 * 2 + 32 * 12 + 12 * 8 + 8 * 10}[layers]
    )
    if layers == 3:
        counted = last["spikes"][0] * 12 + last["spikes"][1] * 8 + last["spikes"][2] * 10
        assert last["additions"] == pytest.approx(counted, abs=0.1)
    assert last["factor"] == pytest.approx(last["dense_multiply_adds"] / last["additions"])
    best = max(epochs, key=lambda m: m["valid_accuracy"])
    assert (last["best_epoch"], last["best_epoch_accuracy"]) == (best["epoch"], best["test_accuracy"])
    assert captured.out.splitlines()[-1] == (
        f"final test accuracy {last['test_accuracy']:.4f} additions {last['additions']:.0f} "
        f"dense multiply-adds {last['dense_multiply_adds']:.0f} factor {last['factor']:.2f}"
    )
    for name in ("curve.png", "steps.png", "spikes.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")


def test_the_picture_shows_the_spikes_that_are_counted(tmp_path, monkeypatch):
    """Of one test digit: as many dark places as spikes, and a membrane above the threshold exactly where one is."""
    seen = {}
    monkeypatch.setattr(
        train_spiking, "spike_raster", lambda path, *rest: seen.update(layers=rest[0], u=rest[1], c=rest[2])
    )
    assert run("--coding", "latency", "--out", tmp_path / "run") == 0
    layers = list(seen["layers"].values())
    assert [a.shape for a in layers] == [(3, 64), (3, 12), (3, 8)]
    assert layers[0].sum(axis=0).max() == 1.0
    np.testing.assert_array_equal(layers[1], seen["u"] > seen["c"])


def test_a_picture_of_a_network_without_hidden_layers(tmp_path):
    outputs, spikes = np.ones((4, 10)), np.zeros((4, 64))
    pictures.spike_raster(tmp_path / "x.png", {"pixels": spikes}, None, 1.0, outputs, "nothing")
    assert (tmp_path / "x.png").exists()


@pytest.mark.parametrize("loss_at", ["every", "mean"])
def test_a_step_is_the_squared_hinge_and_the_sparsity_penalty(loss_at):
    """Against the model's own outputs for the same noise; λ adds λ·Σ mean(s²) to what is minimised, not to the loss."""
    settings, rng, changes = {"dtype": "float64", "optimizer": "sgd", "momentum": 0.0, "loss_at": loss_at}, Rng(7), []
    for sparsity in (0.0, 0.5):
        run = training(sparsity=sparsity, **settings)
        index, before = run.epoch_steps()[0], run.model.state_dict()
        outputs, hidden = run.model(run.spikes(run.train[index], 3, rng.site("spikes")), rng.site("dropout"))
        penalty = (hidden[0][1] ** 2).mean() + (hidden[1][1] ** 2).mean()
        mean = outputs if loss_at == "every" else outputs.mean(axis=0)
        gradients = grad(penalty, run.model.parameters()[:4])
        expected = squared_hinge(mean, run.train_labels[index]).data.mean()
        loss, spikes = run.step(index, rng)
        assert float(loss) == pytest.approx(expected * len(index))
        assert float(spikes) == pytest.approx(sum(s.data.sum() for _, s in hidden) / len(index))
        changes.append([before[name] - p.data for name, p in run.model.named_parameters().items()])
    for without, with_it, dp in zip(*changes, gradients, strict=False):
        np.testing.assert_allclose(with_it - without, run.config.lr * 0.5 * dp, atol=1e-12)
        assert abs(dp).max() > 1e-3


def test_rate_coded_test_images_stay_random_and_latency_coded_ones_are_not():
    for coding, differs in (("rate", True), ("latency", False)):
        run = training(coding=coding)
        a, b = (run.spikes(run.test, 3, Rng(0).site(n)) for n in ("a", "b"))
        assert (a != b).any() == differs
        first = run.report(np.ones((2, 2)), 1.0)
        assert run.report(np.ones((2, 2)), 1.0) == first  # the noise is that of the epoch


def test_what_is_measured_is_that_of_all_test_images():
    run = training(coding="latency")
    whole = run.evaluate(run.test, run.test_labels, 3, Rng(0))
    outputs, hidden = run.model(run.spikes(run.test, 3, None))
    wrong = [(outputs.data[: t + 1].sum(axis=0).argmax(axis=1) != run.test_labels).mean() for t in range(3)]
    np.testing.assert_allclose(whole.accuracy_after, 1.0 - np.array(wrong))
    alone = (outputs.data.argmax(axis=2) == run.test_labels).mean()
    assert whole.single_step_accuracy == pytest.approx(alone)
    entering = [run.spikes(run.test, 3, None), *(s.data for _, s in hidden)]
    np.testing.assert_allclose(whole.spikes, [s.sum() / len(run.test) for s in entering], rtol=1e-6)
    assert whole.additions == pytest.approx(whole.spikes @ [12, 8, 10])


@pytest.mark.parametrize("flags", [{}, {"network": "conv", "channels": (2,), "integration": "discontinuous"}])
def test_the_evaluation_is_the_same_on_another_device(monkeypatch, flags):
    found = []
    for backend in (Backend(), DevsimBackend()):
        monkeypatch.setattr(loop, "get_backend", lambda _, backend=backend: backend)
        run = training(**flags)
        found.append(run.evaluate(run.test, run.test_labels, 3, Rng(0)))
    for a, b in zip(*found, strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_finished_run_can_be_measured_with_more_steps(tmp_path, monkeypatch):
    monkeypatch.setattr(train_spiking.Spiking, "draw", lambda *_: None)
    out = tmp_path / "run"
    assert run("--integration", "discontinuous", "--out", out) == 0
    before = RunFolder(out).metrics()
    assert train_spiking.main(["--resume", str(out), "--test-steps", "6", "--quiet"]) == 0
    after = RunFolder(out).metrics()
    assert after[:-1] == before[:-1]
    assert (len(before[-1]["accuracy_after"]), len(after[-1]["accuracy_after"])) == (3, 6)


def test_sparsity_makes_spikes_fewer():
    spikes = []
    for sparsity in (0.0, 1.0):
        run = training(sparsity=sparsity, integration="discontinuous")
        training_loop = Loop(run, None, quiet=True)
        for _ in range(5):
            for index in run.epoch_steps():
                training_loop.step(index)
            run.epoch, run.step_in_epoch = run.epoch + 1, 0
        spikes.append(np.mean([float(n) for _, n in training_loop.losses[-12:]]))
    assert spikes[1] < 0.7 * spikes[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "accuracy", "factor"),
    [("", 0.95, 0.5), ("--coding latency", 0.94, 1.8), ("--integration discontinuous --steps 4", 0.94, 0.5)],
)
def test_the_default_run_reaches_its_target(tmp_path, flags, accuracy, factor):
    assert train_spiking.main([*flags.split(), "--out", str(tmp_path / "run"), "--quiet"]) == 0
    last = RunFolder(tmp_path / "run").metrics()[-1]
    assert last["test_accuracy"] > accuracy
    assert last["factor"] > factor
