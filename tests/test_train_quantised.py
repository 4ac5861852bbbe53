"""The script for quantised networks as a user meets it: results, the steps between levels, the schedule, the effect."""

import numpy as np
import pytest

import train_quantised
from experiments.loop import Loop
from experiments.run_folder import RunFolder
from minigrad import Rng
from minigrad.fused import softmax_array
from models.quantised import STEPS, DenseNetwork, LeNet

TINY = ["--epochs", "2", "--hidden", "8", "--quiet"]


def training(**flags):
    return train_quantised.Quantised(train_quantised.Config(**({"hidden": (8,)} | flags)))


@pytest.mark.parametrize("flags", ["--network lenet --bits 4", "--bits 0"])
def test_a_run_leaves_its_results_and_ends_with_the_promised_line(tmp_path, capsys, flags):
    out = tmp_path / "run"
    assert train_quantised.main([*TINY[:-1], *flags.split(), "--out", str(out)]) == 0
    metrics = RunFolder(out).metrics()
    assert [m["epoch"] for m in metrics] == [1, 2]
    assert metrics[1]["train_loss"] < metrics[0]["train_loss"]
    assert list(metrics[0]) == ["epoch", "train_loss", "valid_accuracy", "test_accuracy", "images_per_second"]
    last = f"validation accuracy {metrics[1]['valid_accuracy']:.4f} test accuracy {metrics[1]['test_accuracy']:.4f}"
    assert capsys.readouterr().out.splitlines()[-1] == f"final {last}"
    assert (out / "curve.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("flags", "name"), [("", "dense-2-bits-clipped_relu"), ("--bits 0", "dense-0-bits")])
def test_the_run_folder_gets_a_name(tmp_path, monkeypatch, flags, name):
    monkeypatch.chdir(tmp_path)
    assert train_quantised.main([*TINY, *flags.split(), "--seed", "3"]) == 0
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith(f"quantised-digits-{name}-s3-")


def test_the_flags_choose_the_network_and_its_activation():
    for bits, step in STEPS.items():
        activation = training(bits=bits, proxy="relu").model.activation
        assert (activation.bits, activation.settings) == (bits, {"step": step, "proxy": "relu"})
    activation = training(bits=3, alpha=0.7).model.activation
    assert (activation.bits, activation.settings["step"]) == (3, 0.7)
    assert training(bits=0).model.activation.bits == 0
    dense, lenet = training(hidden=(9, 7)).model, training(network="lenet", hidden=(9, 7)).model
    assert isinstance(dense, DenseNetwork)
    assert [layer.weight.shape for layer in dense.layers] == [(64, 9), (9, 7), (7, 10)]
    assert isinstance(lenet, LeNet)
    assert [layer.weight.shape for layer in lenet.dense.layers] == [(64, 9), (9, 7), (7, 10)]
    assert lenet.dense.activation is lenet.activation


def test_a_step_returns_the_summed_cost_and_follows_the_mean_s_gradient():
    run = training(dtype="float64", optimizer="sgd", momentum=0.0, schedule="constant", lr=0.5)
    index = np.arange(6)
    x, labels = run.train[index], run.train_labels[index]
    p = softmax_array(run.model.evaluate(x))
    before = run.model.layers[-1].bias.data.copy()
    (cost,) = run.step(index, Rng(0))
    assert cost == pytest.approx(-np.log(p[np.arange(6), labels]).sum())
    expected = (p - np.eye(10)[labels]).mean(axis=0)
    np.testing.assert_allclose(run.model.layers[-1].bias.data, before - 0.5 * expected, atol=1e-12)


def test_accuracies_are_counted_over_all_images_of_their_part(monkeypatch):
    run = training()
    for size in (7, 1000):
        monkeypatch.setattr(train_quantised.Quantised, "EVALUATION_BATCH", size)
        line = run.report(np.array([[3.0], [4.0]]), 1.0)
        for part in ("valid", "test"):
            right = run.model.evaluate(getattr(run, part)).argmax(axis=1) == getattr(run, f"{part}_labels")
            assert line[f"{part}_accuracy"] == pytest.approx(right.mean())
        assert line["train_loss"] == pytest.approx(7.0 / len(run.train))


def test_the_learning_rate_falls_along_a_cosine_unless_a_flag_says_otherwise():
    run = training(epochs=1)
    assert run.config.lr_at(0, 100) == 2e-3
    assert run.config.lr_at(50, 100) == pytest.approx(1e-3, rel=0.01)
    assert run.config.lr_at(99, 100) < 2e-5
    loop, rates = Loop(run, None, quiet=True), []
    for index in run.epoch_steps():
        loop.step(index)
        rates.append(run.optimizer.lr)
    np.testing.assert_allclose(rates, [run.config.lr_at(n, len(rates)) for n in range(len(rates))])


def test_with_one_bit_the_relu_proxy_fails_and_the_others_do_not(tmp_path):
    """Its slope is 1 at whatever is above 0, however far: nothing holds the values back, as the clip does."""
    found = {}
    for proxy in ("relu", "clipped_relu", "identity"):
        out = tmp_path / proxy
        flags = ["--bits", "1", "--proxy", proxy, "--epochs", "10", "--quiet", "--out", str(out)]
        assert train_quantised.main(flags) == 0
        found[proxy] = RunFolder(out).metrics()[-1]["valid_accuracy"]
    assert found["relu"] < 0.4
    assert min(found["clipped_relu"], found["identity"]) > 0.6


# ---- the schedule, which other commands share


@pytest.mark.parametrize(("schedule", "middle"), [("constant", 0.5), ("cosine", 0.2525), ("exponential", 0.05)])
def test_the_learning_rate_goes_from_the_first_to_the_last(schedule, middle):
    config = train_quantised.Config(schedule=schedule, lr=0.5, lr_last=0.005)
    rates = np.array([config.lr_at(step, 1000) for step in range(1000)])
    assert rates[0] == 0.5
    assert rates[500] == pytest.approx(middle)
    assert rates[999] == pytest.approx(0.5 if schedule == "constant" else 0.005, rel=0.01)
    assert np.all(np.diff(rates) <= 0.0)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--schedule linear", "unknown schedule 'linear'"),
        ("--schedule exponential --lr-last 0", "--lr-last must be above 0 and at most --lr 0.002, got 0.0"),
        ("--schedule cosine --lr-last nan", "--lr-last must be above 0"),
        ("--lr-last 0.1", "at most --lr 0.002, got 0.1"),
        ("--schedule constant --lr-last 1e-4", "the learning rate is constant: leave --lr-last out"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused(capsys, flags, words):
    assert train_quantised.main([*TINY, *flags.split()]) == 2
    assert words in capsys.readouterr().err


def test_a_run_whose_learning_rate_falls_over_all_epochs_keeps_their_number(tmp_path, capsys):
    """With another number it would go on at another rate: not as if it had never stopped."""
    falling, constant = tmp_path / "falling", tmp_path / "constant"
    assert train_quantised.main([*TINY, "--out", str(falling)]) == 0
    assert train_quantised.main([*TINY, "--schedule", "constant", "--out", str(constant)]) == 0
    before = (falling / "config.json").read_bytes()
    assert train_quantised.main(["--resume", str(falling), "--epochs", "3", "--quiet"]) == 2
    assert "was begun for 2 epochs, over which its learning rate falls: leave --epochs out" in capsys.readouterr().err
    assert (falling / "config.json").read_bytes() == before
    assert train_quantised.main(["--resume", str(constant), "--epochs", "3", "--quiet"]) == 0
    assert len(RunFolder(constant).metrics()) == 3
