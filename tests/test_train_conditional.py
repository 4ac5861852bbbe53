"""The script for conditional computation as a user meets it: results, the settings of each gate, the target."""

from pathlib import Path

import numpy as np
import pytest

import train_conditional
from experiments import run_folder
from experiments.loop import Loop
from minigrad import Rng
from models.conditional import BetaNoise
from models.data import load_images

ROOT = Path(__file__).parents[1]
TINY = ["--epochs", "2", "--experts", "20", "--gater", "8", "--batch", "100", "--quiet"]
GATES = ["noisy-rectifier:noise=normal", "sts", "st-identity", "reinforce-minvar"]
BASELINES = ["sigmoid", "sigmoid-noise", "rectifier"]


def run(*flags):
    return train_conditional.main([str(f) for f in (*TINY, *flags)])


def training(**flags):
    return train_conditional.Conditional(train_conditional.Config(experts=20, gater=8, batch=100, **flags))


@pytest.fixture(autouse=True)
def short_timing(monkeypatch):
    monkeypatch.setattr(train_conditional, "SECONDS", 0.0)


@pytest.mark.parametrize("gate", [*GATES, "sigmoid", "rectifier"])
@pytest.mark.daily(3)
def test_a_run_leaves_its_results_and_ends_with_the_promised_line(tmp_path, capsys, gate):
    out = tmp_path / "run"
    assert train_conditional.main([*TINY[:-1], "--gate", gate, "--out", str(out)]) == 0
    captured = capsys.readouterr()
    *epochs, last = run_folder.RunFolder(out).metrics()
    assert [m["epoch"] for m in epochs] == [1, 2]
    assert epochs[1]["train_loss"] < epochs[0]["train_loss"]
    time, count = last["microseconds"]["one at a time"], last["multiply_adds"]
    saved = 1.0 - (count["gater"] + count["experts"]) / count["dense"]
    assert last.get("saved") == (None if gate in BASELINES else pytest.approx(saved))
    assert ("saved" in epochs[0]) == (gate not in BASELINES)
    assert captured.out.splitlines()[-1] == (
        f"final test error {last['test_error']:.2f} % active {last['test_active']:.4f} multiply-adds "
        f"{1.0 - saved:.4f} time {time['gated'] / time['without gates']:.4f} of a network without gates"
    )
    # the sparse evaluation agrees with the dense one of the last epoch
    assert last["test_error"] == pytest.approx(epochs[1]["test_error"], abs=0.3)
    assert last["test_active"] == pytest.approx(epochs[1]["test_active"], abs=1e-4)
    count = {"gater": 64 * 8 + 8 * 20, "experts": last["test_active"] * 20 * 74, "dense": 20 * 74}
    assert last["multiply_adds"] == pytest.approx(count)
    for times in last["microseconds"].values():
        assert times.keys() == {"gated", "all experts", "without gates"}
        assert min(times.values()) > 0.0
    assert (out / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert ("sparsity" in epochs[0]) == gate.startswith("noisy-rectifier")
    if gate in BASELINES:
        assert (last["threshold"] == 0.5) if gate == "rectifier" else (last["test_active"] == 1.0)
    elif not gate.startswith("noisy-rectifier"):  # whose gates are on for fewer images without their noise
        assert 0.05 < last["test_active"] < 0.15
        assert 0.0 < last["threshold"] < 1.0


def test_the_last_sixth_of_the_training_images_is_for_validation():
    run, images = training(), load_images("digits")
    assert len(run.valid) == len(images.train) // 6 == len(run.valid_labels)
    np.testing.assert_array_equal(np.concatenate([run.train, run.valid]), images.train)
    np.testing.assert_array_equal(np.concatenate([run.train_labels, run.valid_labels]), images.train_labels)


def test_the_threshold_is_tuned_on_the_validation_images():
    run = training(target=0.3)
    a = run.model.gate_logits(run.valid).data
    assert (a > run.threshold()).mean() == pytest.approx(0.3, abs=1e-3)


def test_the_error_and_the_fraction_that_is_on_are_counted_over_all_images(monkeypatch):
    run = training()
    y, active = run.model.predictor(0.2)(run.test)
    expected = 100.0 * (y.argmax(axis=1) != run.test_labels).mean(), active.mean() / 20
    for size in (7, 1000):
        monkeypatch.setattr(train_conditional.Conditional, "EVALUATION_BATCH", size)
        assert run.evaluate(run.test, run.test_labels, 0.2) == pytest.approx(expected)


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_the_gater_has_its_share_of_the_learning_rate(momentum):
    """Two steps of the same gradients, with the rates 1 and 0.01 of --lr; the experts do not notice in the first."""
    moved = []
    for gater_lr in (1.0, 0.01):
        run = training(gate="reinforce-minvar", gater_lr=gater_lr, momentum=momentum, dtype="float64")
        before = run.model.state_dict()
        run.model.limit_columns = lambda most: None
        Loop(run, None, quiet=True).step(run.epoch_steps()[0])
        moved.append({name: p.data - before[name] for name, p in run.model.named_parameters().items()})
    for name in moved[0]:
        share = 0.01 if name.startswith("gate") else 1.0
        np.testing.assert_allclose(moved[1][name], share * moved[0][name], rtol=1e-6, atol=1e-15, err_msg=name)
    assert {name.partition(".")[0] for name in moved[0] if name.startswith("gate")} == {"gater", "gates"}


@pytest.mark.parametrize("gate", ["noisy-rectifier", "sts", "reinforce-minvar"])
def test_a_step_records_its_cost_and_the_fraction_of_gates_that_are_on(gate):
    run, seen = training(gate=gate), []
    cost = run.model.cost
    run.model.cost = lambda *arguments: seen.append(cost(*arguments)) or seen[-1]
    losses = run.step(run.epoch_steps()[0], Rng(0))
    value, _, h = seen[0]
    assert [float(x) for x in losses] == pytest.approx([value.data.sum(), np.count_nonzero(h.data) / h.size])


def test_estimators_learn_from_every_step():
    run = training(gate="reinforce-minvar")
    Loop(run, None, quiet=True).step(run.epoch_steps()[0])
    assert run.estimator.weight.shape == (20,)


def test_columns_are_limited_in_every_step():
    run = training(lr=100.0)
    run.step(run.epoch_steps()[0], Rng(0))
    for layer in (run.model.experts, run.model.gater, run.model.gates):
        assert np.sqrt((layer.weight.data**2).sum(axis=0)).max() <= 2.1 * (1.0 + 1e-6)


@pytest.mark.parametrize(
    ("gate", "unit", "sparsity", "gater_lr", "momentum", "beta"),
    [
        ("noisy-rectifier:noise=normal", "rectifier", 1e-5, 1.0, 0.0, 0.0),
        ("sts", "smooth", 0.01, 1.0, 0.5, 40.1),
        ("st-identity", "bit", 0.1, 1.0, 0.0, 0.0),
        ("reinforce-minvar", "bit", 1.0, 0.01, 0.0, 0.0),
        ("disarm", "bit", 1.0, 0.01, 0.0, 0.0),
    ],
)
def test_each_gate_has_the_settings_that_suit_it_unless_flags_say_otherwise(
    gate, unit, sparsity, gater_lr, momentum, beta
):
    mean = lambda beta: BetaNoise(0.1, beta).mean if beta else 0.0
    bias = lambda run: float(run.model.gates.bias.data[0])
    run = training(gate=gate)
    assert bias(run) == pytest.approx(mean(beta))
    assert (run.model.unit, run.weight, run.gater_lr) == (unit, sparsity, gater_lr)
    assert run.optimizer.momentum == momentum
    assert (run.controller is not None) == (unit == "rectifier")
    assert bias(training(gate=gate, beta=0.0)) == 0.0
    assert bias(training(gate=gate, beta=3.0)) == pytest.approx(mean(3.0))
    run = training(gate=gate, sparsity=0.5, gater_lr=0.0, momentum=0.9)
    assert (run.weight, run.gater_lr, run.optimizer.momentum) == (0.5, 0.0, 0.9)
    if run.controller:
        assert run.controller.weight == 0.5


def test_a_baseline_has_as_many_experts_as_a_gated_network_computes():
    sizes = [train_conditional.Conditional(train_conditional.Config(gate=g)).model for g in ("st", "sigmoid")]
    assert [m.experts.bias.size for m in sizes] == [400, 40]


@pytest.mark.parametrize(("gate", "sparsity"), [("st", 1.0), ("noisy-rectifier:noise=normal", None)])
def test_the_sparsity_cost_brings_the_gates_near_the_target(gate, sparsity):
    run = training(gate=gate, target=0.1, sparsity=sparsity)
    loop = Loop(run, None, quiet=True)
    for _ in range(40):
        loop.losses = []
        for index in run.epoch_steps():
            loop.step(index)
        run.epoch, run.step_in_epoch = run.epoch + 1, 0
    assert np.mean([float(active) for _, active in loop.losses]) == pytest.approx(0.1, abs=0.03)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("gate", "error"), [("noisy-rectifier:noise=normal", 8.0), ("sts", 7.0), ("st", 6.0), ("reinforce-minvar", 14.0)]
)
def test_the_default_run_reaches_its_target(tmp_path, gate, error):
    assert train_conditional.main(["--gate", gate, "--out", str(tmp_path / "run"), "--quiet"]) == 0
    *epochs, last = run_folder.RunFolder(tmp_path / "run").metrics()
    assert abs(epochs[-1]["active"] - 0.1) < 0.02
    assert last["test_error"] < error


def test_an_epoch_s_order_depends_on_the_seed_only():
    first, again, other = (training(seed=s).epoch_steps() for s in (0, 0, 1))
    np.testing.assert_array_equal(np.concatenate(first), np.concatenate(again))
    assert (np.concatenate(first) != np.concatenate(other)).any()
    assert sorted(np.concatenate(first)) == list(range(len(Rng(0).permutation(1198))))
