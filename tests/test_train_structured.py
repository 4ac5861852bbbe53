"""The script for structured prediction as a user meets it: results, more samples later, the schedule, warnings."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import train_structured
from estimators import create
from experiments import run_folder
from experiments.loop import Loop
from minigrad import Rng
from minigrad.checkpoint import StateError

ROOT = Path(__file__).parents[1]
TINY = ["--epochs", "2", "--variables", "4", "--quiet"]
FEW = ["--samples", "5"]


def run(*flags):
    return train_structured.main([str(f) for f in (*TINY, *FEW, *flags)])


@pytest.fixture
def no_picture(monkeypatch):
    monkeypatch.setattr(train_structured.Structured, "draw", lambda *_: None)  # most of a tiny run's time


@pytest.mark.parametrize(
    "flags", [["--code", "bernoulli"], ["--code", "categorical", "--layers", "1"], ["--estimator", "none"]]
)
def test_a_run_leaves_its_results_and_ends_with_the_promised_line(tmp_path, capsys, flags):
    out = tmp_path / "run"
    assert train_structured.main([*TINY[:-1], *([] if "none" in flags else FEW), *flags, "--out", str(out)]) == 0
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


def test_a_final_likelihood_that_is_not_finite_is_not_written(tmp_path, capsys, monkeypatch):
    usual = train_structured.Structured.nll
    final = lambda self, images, samples, rng: math.nan if samples == 5 else usual(self, images, samples, rng)
    monkeypatch.setattr(train_structured.Structured, "nll", final)
    assert run("--out", tmp_path / "run") == 2
    assert "the evaluation became infinite or NaN" in capsys.readouterr().err
    assert [m["epoch"] for m in run_folder.RunFolder(tmp_path / "run").metrics()] == [1, 2]


def test_upper_and_lower_half_are_the_rows_of_the_images():
    run = train_structured.Structured(train_structured.Config(variables=3))
    images = run.images.train.reshape(-1, 8, 8)
    x, y = run.halves(run.images.train)
    np.testing.assert_array_equal(x.reshape(-1, 4, 8), images[:, :4])
    np.testing.assert_array_equal(y.reshape(-1, 4, 8), images[:, 4:])
    assert set(np.unique(images)) == {0.0, 1.0}  # binarised once, for all


def test_the_reported_nll_is_the_mean_over_all_test_images():
    run = train_structured.Structured(train_structured.Config(variables=3, dtype="float64"))
    for p in run.model.parameters():  # a network that says ½ to each of the 32 pixels
        p.data[...] = 0.0
    assert run.nll(run.test, 3, Rng(0)) == pytest.approx(32 * math.log(2.0), rel=1e-12)
    run.estimator = None
    assert run.nll(run.test, 3, Rng(0)) == pytest.approx(32 * math.log(2.0), rel=1e-12)


def test_a_finished_run_can_be_continued_and_evaluated_with_more_samples(tmp_path, capsys, no_picture):
    assert run("--out", tmp_path / "long", "--epochs", 3) == 0
    assert run("--out", tmp_path / "short") == 0
    assert train_structured.main(["--resume", str(tmp_path / "short"), "--epochs", "3", "--quiet"]) == 0
    a, b = capsys.readouterr().out.splitlines()[0::2]
    assert a == b
    assert train_structured.main(["--resume", str(tmp_path / "short"), "--samples", "50", "--quiet"]) == 0
    metrics = run_folder.RunFolder(tmp_path / "short").metrics()
    assert [m.get("samples") for m in metrics] == [None, None, None, 50]


def test_every_layer_has_an_estimator_and_a_state_of_its_own(tmp_path, no_picture):
    assert run("--out", tmp_path / "run", "--estimator", "reinforce-mean", "--layers", 3) == 0
    state = load_file(tmp_path / "run" / "checkpoint.safetensors")
    means = [float(state[f"estimator.{l}.mean"]) for l in range(3)]
    assert means[0] == means[1] == means[2] > 0.0  # one sample: every layer has seen the same cost
    found = train_structured.Structured(train_structured.Config(estimator="reinforce-mean", variables=3))
    Loop(found, None, quiet=True).step(np.arange(10))
    assert len({id(e) for e in found.estimator}) == 2


# ---- the temperature


def test_the_temperature_of_a_run_is_annealed_in_every_layer(tmp_path, no_picture):
    flags = ["--tau", "2", "--anneal", "0.05", "--anneal-every", "10", "--tau-least", "0.9", "--epochs", "3"]
    assert run("--out", tmp_path / "run", *flags) == 0
    taus = [m["tau"] for m in run_folder.RunFolder(tmp_path / "run").metrics() if "tau" in m]
    assert taus == [2.0 * math.exp(-0.5), 0.9, 0.9]  # after 15, 30 and 45 steps
    config = train_structured.Config(tau=2.0, anneal=0.05, anneal_every=1, variables=3)
    found = train_structured.Structured(config)
    for _ in range(3):
        Loop(found, None, quiet=True).step(np.arange(10))
    assert [e.tau for e in found.estimator] == [2.0 * math.exp(-0.1)] * 2


# ---- which estimators


def test_vimco_trains_one_layer(tmp_path):
    assert run("--out", tmp_path / "run", "--estimator", "vimco", "--layers", "1") == 0


def test_a_state_of_another_number_of_layers_is_refused():
    three, two = (train_structured.Estimators([create("reinforce-mean") for _ in range(n)]) for n in (3, 2))
    two.load_state_dict({name: value for name, value in three.state_dict().items() if not name.startswith("2.")})
    with pytest.raises(StateError, match="of another number of layers"):
        two.load_state_dict(three.state_dict())
    with pytest.raises(StateError, match="belongs to another estimator"):
        three.load_state_dict(two.state_dict())
