"""The training script as a user meets it: results, resume, Ctrl-C, and every way to get it wrong."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import run_folder
import train_vae
from devsim import DevsimBackend, forbid
from minigrad import Rng, grad
from minigrad.backend import Backend
from training import annealed

import numpy as np
import pytest
from safetensors.numpy import load_file

ROOT = Path(__file__).parents[1]
TINY = ["--epochs", "2", "--hidden", "16", "--variables", "2", "--categories", "4", "--quiet"]


def run(*flags):
    return train_vae.main([str(f) for f in (*TINY, *flags)])


def test_a_run_leaves_its_results_and_ends_with_the_promised_line(tmp_path, capsys):
    out = tmp_path / "run"
    assert train_vae.main([*TINY[:-1], "--out", str(out), "--bound-samples", "5"]) == 0
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


@pytest.mark.parametrize("estimator", ["reinmax", "reinforce-mean", "gumbel-softmax", "rebar:tau_every=3", "nvil"])
@pytest.mark.parametrize("pixels", ["gray", "dynamic"])
def test_resume_continues_bit_for_bit_after_ctrl_c(tmp_path, capsys, monkeypatch, estimator, pixels):
    flags = ["--estimator", estimator, "--pixels", pixels]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert run("--out", whole, *flags) == 0

    step, count = train_vae.Training.step, iter(range(100))

    def interrupted_step(self, index):
        step(self, index)
        if next(count) in (6, 20):  # in the middle of each epoch
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(train_vae.Training, "step", interrupted_step)
        assert run("--out", stopped, *flags) == 130
        assert f"--resume {stopped}" in capsys.readouterr().err
        assert train_vae.main(["--resume", str(stopped), "--quiet"]) == 130
    assert train_vae.main(["--resume", str(stopped), "--quiet"]) == 0

    a, b = (load_file(folder / "checkpoint.safetensors") for folder in (whole, stopped))
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)
    for m, n in zip(*(run_folder.RunFolder(f).metrics() for f in (whole, stopped)), strict=True):
        assert {k: v for k, v in m.items() if k != "images_per_second"} == {
            k: v for k, v in n.items() if k != "images_per_second"
        }


def test_a_finished_run_can_be_continued_to_more_epochs(tmp_path, capsys):
    assert run("--out", tmp_path / "long", "--epochs", 3) == 0
    assert run("--out", tmp_path / "short") == 0
    with open(tmp_path / "short" / "metrics.jsonl", "a") as file:
        file.write('{"epoch": 3, "train": 1e9')  # as if the program had been killed while it wrote
    assert train_vae.main(["--resume", str(tmp_path / "short"), "--epochs", "3", "--quiet"]) == 0
    a, b = capsys.readouterr().out.splitlines()[0::2]
    assert a == b
    assert len(run_folder.RunFolder(tmp_path / "short").metrics()) == 3
    assert train_vae.main(["--resume", str(tmp_path / "short"), "--quiet"]) == 0  # the folder knows its epochs


def test_soft_samples_are_evaluated_with_hard_ones(tmp_path):
    assert run("--out", tmp_path / "soft", "--estimator", "gumbel-softmax", "--tau", "2") == 0
    last = run_folder.RunFolder(tmp_path / "soft").metrics()[-1]
    assert last["train_relaxed"] != last["train"]


@pytest.mark.parametrize("optimizer", ["sgd", "radam"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_other_settings_train(tmp_path, capsys, optimizer, dtype):
    assert run("--out", tmp_path / "run", "--optimizer", optimizer, "--dtype", dtype, "--pixels", "fixed") == 0
    assert "final train -ELBO" in capsys.readouterr().out


@pytest.mark.parametrize("code", ["categorical", "bernoulli"])
def test_the_vaes_of_the_papers_train(tmp_path, capsys, code):
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


def test_the_temperature_falls_in_steps_to_its_least_value():
    assert [annealed(step, 2.0, 0.1, 0.5, 10) for step in (0, 9, 10, 19)] == [
        2.0,
        2.0,
        2.0 * np.exp(-1),
        2.0 * np.exp(-1),
    ]
    assert annealed(1000, 2.0, 0.1, 0.5, 10) == 0.5
    training = train_vae.Training(train_vae.Config(estimator="st-gs", tau=2.0, anneal=0.1, anneal_every=2, hidden=(4,)))
    taus = []
    for step in range(5):
        training.step(np.arange(3) + step)
        taus.append(training.estimator.tau)
    np.testing.assert_allclose(taus, 2.0 * np.exp([0.0, 0.0, -0.2, -0.2, -0.4]))


def test_the_variance_of_the_gradient_is_that_of_its_draws():
    config = train_vae.Config(
        gradient_draws=6, hidden=(5,), variables=2, categories=3, estimator="st-gs", dtype="float64"
    )
    training = train_vae.Training(config)
    found, draws = training.gradient_noise(), []
    for draw in range(6):
        terms = training.model.negative_elbo(
            training.train[:1000], training.estimator, Rng(0).site("gradient").at(draw)
        )
        g = grad((terms[0] + terms[1]).mean(), training.model.encoder.parameters())
        draws.append(np.concatenate([x.reshape(-1) for x in g]))
    np.testing.assert_allclose(found["gradient_variance"], np.var(draws, axis=0, ddof=1).sum(), rtol=1e-10)
    np.testing.assert_allclose(found["gradient_norm2"], (np.mean(draws, axis=0) ** 2).sum(), rtol=1e-10)
    assert found["gradient_variance"] > 0


@pytest.mark.parametrize("pixels", ["gray", "dynamic", "fixed"])
@pytest.mark.parametrize("optimizer", ["adam", "radam", "sgd"])
def test_the_script_s_own_step_stays_on_the_device(monkeypatch, pixels, optimizer):
    """The stand-in device refuses any wait and any copy to the host; its losses and weights are NumPy's to the bit."""
    results = []
    for backend in (Backend(), DevsimBackend()):
        monkeypatch.setattr(train_vae, "get_backend", lambda _, backend=backend: backend)
        config = train_vae.Config(pixels=pixels, optimizer=optimizer, hidden=(16,), variables=2, categories=3, lr=1e-2)
        training = train_vae.Training(config)
        order = backend.to_device(Rng(0).permutation(len(training.train)))
        with forbid("sync", "d2h"):
            for step in range(7):  # with RAdam, before and after its rectification begins
                training.step(order[step * 20 : step * 20 + 20])
        state, _ = training.state()
        training.restore(state, {"epoch": 0, "step_in_epoch": 7})
        training.step(order[:20])
        results.append(training.state()[0])
    for name in results[0]:
        np.testing.assert_array_equal(results[0][name], results[1][name], err_msg=name)


# ---- bad input: one sentence on standard error, exit code 2, no traceback, nothing lost

BAD_FLAGS = [
    (["--prior", "flat"], "unknown prior 'flat'; the known ones are uniform, learned"),
    (["--slope", "1"], "--slope must be at least 0 and below 1, got 1.0"),
    (["--anneal", "-1"], "--anneal must be at least 0, got -1.0"),
    (["--anneal", "1e-3", "--anneal-every", "0"], "--anneal-every must be at least 1, got 0"),
    (["--anneal", "1e-3", "--tau-least", "0"], "tau must be positive and finite, got 0"),
    (["--anneal", "1e-3", "--estimator", "rloo"], "rloo has no temperature: leave --anneal out"),
    (["--anneal", "1e-3", "--estimator", "rebar"], "rebar learns its temperature: leave --anneal out"),
    (["--gradient-draws", "-1"], "--gradient-draws must be at least 0, got -1"),
    (["--estimator", "magic"], "unknown estimator 'magic'; the known ones are exact"),
    (["--data", "cifar"], "unknown data set 'cifar'; the known ones are digits, mnist"),
    (["--backend", "tpu"], "unknown backend 'tpu'; the known ones are auto, cupy, numpy"),
    (["--dtype", "float16"], "unknown dtype 'float16'; the known ones are float32, float64"),
    (["--optimizer", "lion"], "unknown optimizer 'lion'; the known ones are sgd, adam, radam"),
    (["--pixels", "red"], "unknown pixels 'red'; the known ones are gray, dynamic, fixed"),
    (["--tau", "0"], "tau must be positive and finite, got 0"),
    (["--tau", "-1"], "tau must be positive and finite"),
    (["--tau", "inf"], "tau must be positive and finite"),
    (["--tau", "nan"], "tau must be positive and finite"),
    (["--tau", "hot"], "argument --tau: invalid float value: 'hot'"),
    (["--estimator", "rloo", "--tau", "1"], "rloo has no option 'tau'"),
    (["--variables", "0"], "--variables must be at least 1, got 0"),
    (["--categories", "0"], "--categories must be at least 1"),
    (["--batch", "0"], "--batch must be at least 1"),
    (["--epochs", "-3"], "--epochs must be at least 1"),
    (["--hidden", "0"], "--hidden needs widths of at least 1"),
    (["--hidden", "a,b"], "not a list of whole numbers"),
    (["--lr", "0"], "learning rate must be positive"),
    (["--seed", "-1"], "seed must be an integer from 0"),
    (["--estimator", "exact", "--variables", "30"], "outcomes: at most 16384 are allowed"),
    (["--variables", "1000000000000"], "does not fit into memory"),
    (["--hidden", "100000000000000000000"], "does not fit into memory"),
    (["--out", "x" * 300], "File name too long"),
    (["--resume", "x" * 300], "File name too long"),
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


def test_an_output_folder_that_exists_or_cannot_be_written(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "keep.txt").write_text("mine")
    assert run("--out", tmp_path / "run") == 2
    assert "exists already" in capsys.readouterr().err
    assert (tmp_path / "run" / "keep.txt").read_text() == "mine"
    (tmp_path / "file").write_text("")
    assert run("--out", tmp_path / "file" / "run") == 2
    assert "cannot be written" in capsys.readouterr().err


def test_cupy_without_a_usable_gpu(tmp_path, capsys):
    from minigrad.backend import BackendUnavailable, get_backend

    try:
        get_backend("cupy")
    except BackendUnavailable:
        assert run("--out", tmp_path / "run", "--backend", "cupy") == 2
        err = capsys.readouterr().err
        assert "CuPy" in err
        assert "--backend numpy" in err
        assert err.count("\n") == 1
    else:
        pytest.skip("this machine has a usable GPU")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("finished") / "run"
    assert run("--out", out) == 0
    return out


@pytest.mark.parametrize(
    ("spoil", "flags", "message"),
    [
        (lambda f: (f / "checkpoint.safetensors").unlink(), [], "there is no checkpoint"),
        (lambda f: truncate(f / "checkpoint.safetensors", 0.6), [], "truncated or not a checkpoint"),
        (lambda f: (f / "checkpoint.safetensors").write_bytes(b"PK"), [], "truncated or not a checkpoint"),
        (lambda f: (f / "config.json").unlink(), [], "config.json is missing or damaged"),
        (lambda f: truncate(f / "config.json", 0.5), [], "config.json is missing or damaged"),
        (lambda f: None, ["--estimator", "st"], "another configuration (--estimator reinmax, not st)"),
        (lambda f: None, ["--hidden", "8"], "another configuration (--hidden 16, not 8)"),
        (lambda f: None, ["--epochs", "1"], "--epochs must not be less"),
        (lambda f: None, ["--out", "elsewhere"], "--out and --resume exclude each other"),
        (lambda f: edit_config(f, variables=3), [], "belongs to another model"),
        (lambda f: edit_config(f, optimizer="sgd"), [], "belongs to another optimizer"),
        (lambda f: edit_config(f, lr=0.5), [], "checkpoint of another configuration (lr differ)"),
        (lambda f: edit_config(f, epochs="ten"), [], "config.json is missing or damaged (epochs is 'ten')"),
        (lambda f: edit_config(f, tau="warm"), [], "config.json is missing or damaged (tau is 'warm')"),
        (lambda f: (f / "metrics.jsonl").unlink(), [], "metrics.jsonl is shorter than when the checkpoint was made"),
        (
            lambda f: truncate(f / "metrics.jsonl", 0.7),
            [],
            "metrics.jsonl is shorter than when the checkpoint was made",
        ),
    ],
)
def test_a_resume_folder_that_does_not_fit(tmp_path, capsys, finished, spoil, flags, message):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    spoil(folder)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    assert train_vae.main(["--resume", str(folder), "--quiet", *flags]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert before == {p.name: p.read_bytes() for p in folder.iterdir()}


def truncate(path, fraction):
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * fraction)])


def edit_config(folder, **changes):
    about = json.loads((folder / "config.json").read_text())
    about["config"] |= changes
    (folder / "config.json").write_text(json.dumps(about))


@pytest.mark.parametrize("when", ["at once", "later", "in the last step of an epoch"])
def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint(tmp_path, capsys, monkeypatch, when):
    at = {"at once": 0, "later": 20, "in the last step of an epoch": 14}[when]
    step, count = train_vae.Training.step, iter(range(100))

    def spoiled_step(self, index):
        step(self, index)
        if next(count) == at:
            self.model.decoder.layers[0].weight.data[0] = np.inf

    monkeypatch.setattr(train_vae.Training, "step", spoiled_step)
    out = tmp_path / "run"
    assert run("--out", out) == 2
    err = capsys.readouterr().err
    steps = {"at once": "at step 2 (epoch 1)", "later": "at step 22 (epoch 2)"}
    assert steps.get(when, "at step 15 (epoch 1)") in err
    assert "the last good checkpoint is kept" in err
    assert err.count("\n") == 1
    monkeypatch.undo()
    assert train_vae.main(["--resume", str(out), "--quiet"]) == 0  # the checkpoint is good
    assert len(run_folder.RunFolder(out).metrics()) == 2


def test_a_full_disk_is_one_sentence_and_the_old_checkpoint_stays(tmp_path, capsys, monkeypatch):
    from minigrad import checkpoint

    out, write, count = tmp_path / "run", checkpoint.write_atomically, iter(range(100))

    def full(path, data):
        if next(count) == 3:  # config, first checkpoint, first epoch, second epoch
            raise OSError(28, "No space left on device", str(path))
        write(path, data)

    monkeypatch.setattr(checkpoint, "write_atomically", full)
    assert run("--out", out) == 2
    err = capsys.readouterr().err
    assert "No space left on device" in err
    assert err.count("\n") == 1
    monkeypatch.undo()
    assert train_vae.main(["--resume", str(out), "--quiet"]) == 0


def test_the_script_itself_exits_with_2_without_a_traceback(tmp_path):
    command = [sys.executable, str(ROOT / "scripts" / "train_vae.py"), "--estimator", "magic"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert result.returncode == 2
    assert result.stderr.startswith("train_vae.py: error: unknown estimator 'magic'")
    assert result.stdout == ""


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
