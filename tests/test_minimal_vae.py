"""The page that a student reads first gives the numbers of the long way, for every kind of estimator."""

import subprocess
import sys
from pathlib import Path

import pytest

import minimal_vae
import train_vae
from experiments.run_folder import RunFolder
from registry import quick

SCRIPT = Path(__file__).parents[1] / "scripts" / "minimal_vae.py"


NAMES = ["reinmax", "st-decoupled", "rloo", "nvil", "gumbel-softmax", "st-slope:rate=0.05"]


@pytest.mark.parametrize("name", quick(("reinmax", "nvil", "gumbel-softmax"), [*NAMES, "vimco"]))
def test_its_losses_are_those_of_train_vae(tmp_path, monkeypatch, name):
    monkeypatch.setattr(minimal_vae, "EPOCHS", 2)
    monkeypatch.setattr(train_vae.VAE, "draw", lambda *_: None)
    found = list(minimal_vae.train(name))
    assert train_vae.main(["--estimator", name, "--epochs", "2", "--quiet", "--out", str(tmp_path / "run")]) == 0
    lines = RunFolder(tmp_path / "run").metrics()
    trained = [line.get("train_relaxed", line.get("train_bound", line["train"])) for line in lines]
    assert [loss for loss, _ in found] == pytest.approx(trained, rel=1e-5)
    assert [loss for _, loss in found] == pytest.approx([line["test"] for line in lines], rel=1e-5)


def test_it_is_a_page_without_flags_and_folders(tmp_path):
    source = SCRIPT.read_text()
    assert len(source.splitlines()) <= 69
    assert "argparse" not in source
    assert "experiments" not in source
    (tmp_path / "short").mkdir()
    short = tmp_path / "short" / "minimal_vae.py"
    assert "SEED = 20," in source
    short.write_text(source.replace("SEED = 20,", "SEED = 1,"))
    command = [sys.executable, "-W", "error", short]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=True)
    assert ran.stdout.startswith("epoch   1   train -ELBO ")
    assert ran.stdout.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["short"]
