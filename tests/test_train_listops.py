"""Training on ListOps as a user meets it: results, every encoder, resume, Ctrl-C, and every way to get it wrong."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import load_file

import bench
import train_listops
from estimators import ESTIMATORS
from experiments import listops as shared
from experiments import run_folder
from minigrad import Rng, Tensor, checkpoint
from minigrad.optim import SGD, Plateau
from models import trees
from models.data import DataError, listops

ROOT = Path(__file__).parents[1]
SIZES = ["--generate", "60", "--dim", "8", "--hidden", "8", "--max-length", "15", "--batch", "8"]
TINY = [*SIZES, "--epochs", "2", "--quiet"]  # 35 training sequences: 5 steps an epoch, reports after 3 and 5
PICTURES = {"forest": train_listops.forest, "learning_curves": train_listops.learning_curves}


def run(*flags):
    return train_listops.main([str(f) for f in (*TINY, *flags)])


@pytest.fixture(autouse=True)
def generated_data_and_no_pictures(monkeypatch):
    """Drawing takes most of the time of a tiny run; one test below draws."""
    monkeypatch.delenv("MINIGRAD_DATA", raising=False)
    for name in PICTURES:
        monkeypatch.setattr(train_listops, name, lambda path, *_: path.write_bytes(b""))


def metrics(folder):
    return run_folder.RunFolder(folder).metrics()


def without_speed(folder):
    return [{k: v for k, v in line.items() if k != "sequences_per_second"} for line in metrics(folder)]


def assert_same_run(a, b):
    """Same metrics but for the speed, and the same checkpoints to the bit."""
    assert without_speed(a) == without_speed(b)
    for name in ("checkpoint.safetensors", "best.safetensors"):
        x, y = load_file(a / name), load_file(b / name)
        assert x.keys() == y.keys()
        for key in x:
            np.testing.assert_array_equal(x[key], y[key], err_msg=f"{name} {key}")


# ---- a run


def test_a_run_leaves_its_results_and_ends_with_the_promised_line(tmp_path, capsys, monkeypatch):
    for name, draw in PICTURES.items():
        monkeypatch.setattr(train_listops, name, draw)
    out = tmp_path / "run"
    assert train_listops.main([*TINY[:-1], "--out", str(out)]) == 0
    captured = capsys.readouterr()
    *reports, last = lines = metrics(out)
    assert [json.loads(line) for line in captured.out.splitlines()[:-1]] == lines
    best = max(line["valid_accuracy"] for line in reports)
    expected = f"final valid accuracy {best:.4f} test accuracy {last['test_accuracy']:.4f}"
    assert captured.out.splitlines()[-1] == expected
    assert [line["step"] for line in reports] == [3, 5, 8, 10]
    assert [line["epoch"] for line in reports] == [0.6, 1.0, 1.6, 2.0]
    for line in reports:
        assert 0.0 < line["train_loss"] < 3.0
        assert 0.0 < line["valid_loss"] < 3.0
        assert line["lr"] == 3e-3
        assert line["sequences_per_second"] > 0
    first_best = min(line["epoch"] for line in reports if line["valid_accuracy"] == best)
    assert last["best_epoch"] == first_best
    for part in ("by_length", "by_depth"):
        right = sum(accuracy * count for accuracy, count in last[part].values())
        assert sum(count for _, count in last[part].values()) == last["sequences"]
        assert right / last["sequences"] == pytest.approx(last["test_accuracy"], abs=1e-3)
    assert all(0.0 <= last[name] <= 1.0 for name in ("f1_gold", "f1_left", "f1_right", "f1_random", "random_gold"))
    for picture in ("curve.png", "trees.png"):
        assert (out / picture).read_bytes().startswith(b"\x89PNG")
    drawn = (out / "trees.txt").read_text().splitlines()
    assert len(drawn) == min(8, last["sequences"])
    assert all(
        line.count("(") == line.count(")") == len(line.replace("(", "").replace(")", "").split()) - 1 for line in drawn
    )
    about = json.loads((out / "config.json").read_text())
    assert about["config"]["seed"] == 0
    assert about["backend"] == "numpy"
    assert set(load_file(out / "best.safetensors")) <= set(load_file(out / "checkpoint.safetensors"))
    assert f"run folder {out}" in captured.err


@pytest.mark.parametrize("leaves", ["lstm", "affine"])
@pytest.mark.parametrize("encoder", shared.ENCODERS)
def test_every_encoder_trains(tmp_path, capsys, encoder, leaves):
    code = run("--out", tmp_path / "run", "--encoder", encoder, "--leaves", leaves)
    captured = capsys.readouterr()
    if (encoder, leaves) == ("lstm", "affine"):
        assert code == 2
        assert "the encoder lstm is the leaf LSTM itself: it cannot have affine leaves" in captured.err
        return
    assert code == 0
    assert captured.out.startswith("final valid accuracy ")
    arrays = load_file(tmp_path / "run" / "best.safetensors")
    assert ("model.query" in arrays) == (encoder == "latent")
    assert ("model.cell_weight" in arrays) == (encoder != "lstm")
    assert (tmp_path / "run" / "trees.txt").exists() == (encoder == "latent")
    assert ("f1_gold" in metrics(tmp_path / "run")[-1]) == (encoder == "latent")


def test_the_help_lists_the_estimators_that_can_choose_step_by_step():
    (text,) = (f.metadata["help"] for f in dataclasses.fields(shared.Config) if f.name == "estimator")
    listed = text.partition("one of ")[2].partition(";")[0].split(", ")
    assert "rloo" in listed
    refusal = r"cannot choose step by step|not 'categorical'"
    for name in ESTIMATORS:
        config = shared.Config(estimator=name)
        if name in listed:
            config.create_estimator()
        else:
            with pytest.raises((ValueError, run_folder.UserError), match=refusal):
                config.create_estimator()


@pytest.mark.parametrize(
    "estimator", ["gst-1.0", "st-gs", "reinmax", "gumbel-softmax", "reinforce-mean", "rloo", "rloo:samples=4"]
)
def test_estimators_that_choose_step_by_step_train(tmp_path, estimator):
    assert run("--out", tmp_path / "run", "--estimator", estimator, "--epochs", 1) == 0
    assert len(metrics(tmp_path / "run")) == 3


@pytest.mark.parametrize(
    "flags",
    [
        ["--split"],
        ["--dtype", "float64"],
        ["--optimizer", "sgd"],
        ["--optimizer", "radam"],
        ["--dropout", 0],
        ["--batch", 1000],
        ["--estimator", "st-gs", "--tau", 0.5],
    ],
)
def test_other_settings_train(tmp_path, capsys, flags):
    assert run("--out", tmp_path / "run", "--epochs", 1, *flags) == 0
    assert "final valid accuracy" in capsys.readouterr().out


def test_an_encoder_that_is_given_trees_is_given_those_of_its_name():
    sequences = listops.generate(30, seed=2)
    for split in (False, True):
        (batch,) = listops.batches(sequences, listops.Tokenizer(split), 30)
        assert shared.known_trees("latent", sequences, batch, split) is None
        assert shared.known_trees("lstm", sequences, batch, split) is None
        kinds = {"left": trees.left_branching, "right": trees.right_branching, "balanced": trees.balanced}
        for encoder in (*kinds, "gold"):
            given = shared.known_trees(encoder, sequences, batch, split)
            for row, i, n in zip(given, batch.index, batch.lengths, strict=True):
                expected = kinds[encoder](n) if encoder in kinds else trees.gold(sequences[i][0], split)
                np.testing.assert_array_equal(row, np.pad(expected, (0, len(row) - len(expected))))


def test_training_learns_a_few_sequences_by_heart(tmp_path, capsys):
    flags = ["--generate", 64, "--dim", 16, "--hidden", 16, "--max-length", 30, "--dropout", 0, "--lr", 1e-2]
    flags += ["--encoder", "gold", "--patience", 100, "--epochs", 15]
    assert run("--out", tmp_path / "run", *flags) == 0
    losses = [line["train_loss"] for line in metrics(tmp_path / "run")[:-1]]
    assert losses[0] > 2.2  # log 10 is what a guess costs
    assert losses[-1] < 1.7
    *reports, last = metrics(tmp_path / "run")
    accuracies = [line["valid_accuracy"] for line in reports]
    assert min(accuracies) < max(accuracies)
    assert last["best_epoch"] == reports[accuracies.index(max(accuracies))]["epoch"]
    line = f"final valid accuracy {max(accuracies):.4f} test accuracy {last['test_accuracy']:.4f}\n"
    assert capsys.readouterr().out == line


def test_every_step_has_noise_of_its_own(tmp_path, monkeypatch):
    cost, seen = shared.TreeLSTM.cost, []

    def recorded(self, ids, lengths, labels, rng, *others):
        seen.append(float(rng.uniform((1,), like=np.empty(0))[0]))
        return cost(self, ids, lengths, labels, rng, *others)

    monkeypatch.setattr(shared.TreeLSTM, "cost", recorded)
    assert run("--out", tmp_path / "run") == 0
    assert len(seen) == len(set(seen)) == 10


def test_the_same_flags_give_the_same_run_and_another_seed_another_one(tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        assert run("--out", tmp_path / name, "--seed", seed, "--epochs", 1) == 0
    assert_same_run(tmp_path / "a", tmp_path / "b")
    assert without_speed(tmp_path / "a") != without_speed(tmp_path / "c")


@pytest.mark.parametrize("flags", [["latent"], ["lstm"], ["gold", "--split"], ["right"]], ids=" ".join)
def test_the_evaluation_in_batches_is_that_of_each_sequence_alone(tmp_path, flags):
    assert run("--out", tmp_path / "run", "--lr", "1e-2", "--dtype", "float64", "--encoder", *flags) == 0
    _, config = run_folder.RunFolder.resume(tmp_path / "run", shared.Config, {}, ())
    training = train_listops.ListOps(config)
    arrays, _ = checkpoint.load(tmp_path / "run" / "best.safetensors")
    training.model.load_state_dict({name.removeprefix("model."): array for name, array in arrays.items()})
    loss, right, choices = training.evaluate("train")
    assert (choices is None) == (config.encoder != "latent")
    for i, (tokens, value) in enumerate(training.sequences["train"]):
        ids = training.tokenizer(tokens)
        given = {"right": trees.right_branching(len(ids)), "gold": trees.gold(tokens, config.split)}.get(config.encoder)
        logits, chosen = training.model.predict(ids[None], np.array([len(ids)]), None if given is None else given[None])
        p = np.exp(logits[0])
        assert loss[i] == pytest.approx(-np.log(p[value] / p.sum()), rel=1e-9)
        assert right[i] == (p.argmax() == value)
        if choices is not None:
            np.testing.assert_array_equal(choices[i], chosen[0])
    last = run_folder.RunFolder(tmp_path / "run").metrics()[-1]
    loss, right, _ = training.evaluate("test")
    assert last["test_loss"] == round(loss.mean(), 4)
    assert last["test_accuracy"] == round(right.mean(), 4)


def test_sequences_that_are_too_long_are_counted_and_said(tmp_path, caplog):
    assert run("--out", tmp_path / "run", "--epochs", 1) == 0
    splits = listops.load(counts=(60, 10, 10), seed=0)
    for (name, sequences), record in zip(splits.items(), caplog.records, strict=True):
        longer = sum(len(tokens) > 15 for tokens, _ in sequences)
        assert longer
        assert record.getMessage() == (
            f"{name}: {longer} of {len(sequences)} sequences are left out, which have more than 15 tokens or only one."
        )


def test_accuracy_is_broken_down_by_upper_bounds():
    right, values = np.array([True, False, True, True, False, False]), np.array([3, 10, 10, 11, 20, 21])
    found = shared.breakdown(right, values, (10, 15, 20))
    assert found == {"10": [0.6667, 3], "15": [1.0, 1], "20": [0.0, 1], "more": [0.0, 1]}


def test_agreement_is_the_mean_f1_of_the_trees():
    sequences = [(tokens, value) for tokens, value in listops.generate(40, seed=1) if len(tokens) < 40]
    gold = [trees.gold(tokens) for tokens, _ in sequences]
    left = [trees.left_branching(len(tokens)) for tokens, _ in sequences]
    between = np.mean([trees.f1(a, b) for a, b in zip(gold, left, strict=True)])
    of_gold, of_left = (shared.agreement(t, sequences, False, Rng(0)) for t in (gold, left))
    assert (of_gold["f1_gold"], of_left["f1_left"], of_left["f1_right"]) == (1.0, 1.0, 0.0)
    assert of_gold["f1_left"] == of_left["f1_gold"] == pytest.approx(between, abs=1e-4)
    assert of_gold["f1_random"] == of_gold["random_gold"] == of_left["random_gold"]
    assert shared.agreement([np.array([0])], [(b"", 0)], False, Rng(0)) == {}  # two tokens have only one tree


# ---- resume


def test_an_estimator_s_state_is_in_the_checkpoint(tmp_path):
    assert run("--out", tmp_path / "run", "--estimator", "reinforce-mean", "--epochs", 1) == 0
    arrays = load_file(tmp_path / "run" / "checkpoint.safetensors")
    state = [value for name, value in arrays.items() if name.startswith("estimator.")]
    assert state
    assert all(np.any(value != 0.0) for value in state)


def write_data(folder, seed):
    splits = listops.load(counts=(60, 10, 10), seed=seed)
    (folder / "listops").mkdir(parents=True)
    for name, sequences in splits.items():
        listops.write(folder / "listops" / f"{name}.tsv", sequences)
    return folder


def test_a_run_can_be_resumed_where_its_data_went_but_not_on_other_data(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("MINIGRAD_DATA", str(write_data(tmp_path / "data", seed=5)))
    out = tmp_path / "run"
    assert run("--out", out, "--epochs", 1) == 0
    (tmp_path / "data").rename(tmp_path / "moved")
    monkeypatch.delenv("MINIGRAD_DATA")
    capsys.readouterr()
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    resume = ["--resume", str(out), "--quiet", "--epochs", "2"]
    for where in ([], ["--data-dir", str(write_data(tmp_path / "other", seed=6))]):
        assert train_listops.main([*resume, *where]) == 2
        err = capsys.readouterr().err
        assert "the sequences are not those that the run began with" in err
        assert err.count("\n") == 1
        assert before == {p.name: p.read_bytes() for p in out.iterdir()}
    assert train_listops.main([*resume, "--data-dir", str(tmp_path / "moved")]) == 0
    assert len(metrics(out)) == 5


# ---- bad input: one sentence on standard error, exit code 2, no traceback, nothing left behind


@pytest.mark.parametrize("part", listops.SPLITS)
def test_a_broken_file_is_named_with_its_line(tmp_path, capsys, part):
    path = write_data(tmp_path / "data", seed=5) / "listops" / f"{part}.tsv"
    lines = path.read_text().split("\n")
    lines[2] = "4\t[MIN 4 7"
    path.write_text("\n".join(lines))
    assert run("--out", tmp_path / "run", "--data-dir", tmp_path / "data") == 2
    err = capsys.readouterr().err
    assert f"error: {path}, line 3: the operator [MIN is not closed by a ]." in err
    assert err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_disk_that_is_full_when_the_best_model_is_written_leaves_a_run_that_can_go_on(tmp_path, capsys, monkeypatch):
    """The best model is written before the checkpoint that relies on it."""
    write, seen = checkpoint.write_atomically, []

    def full(path, data):
        if "best" in path.name:
            seen.append(path)
            raise OSError(28, "No space left on device", str(path))
        write(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_atomically", full)
        assert run("--out", tmp_path / "run") == 2
    assert len(seen) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert run("--resume", tmp_path / "run") == 0
    assert (tmp_path / "run" / "best.safetensors").exists()


# ---- the schedule


def plateau(**options):
    return Plateau(SGD([Tensor(np.ones(3), requires_grad=True)], lr=0.8), **options)


def test_a_plateau_halves_the_learning_rate_after_more_than_patience_reports():
    schedule = plateau(patience=2)
    #           the best; two that are no better; a better one starts anew; three that are no better, and again
    reports = [0.5, 0.5, 0.4, 0.6, 0.6, 0.1, 0.6, 0.2, 0.2, 0.2, 0.9]
    best, rates = zip(*((schedule.step(x), schedule.optimizer.lr) for x in reports), strict=True)
    assert [i for i, is_best in enumerate(best) if is_best] == [0, 3, 10]
    assert rates == (0.8, 0.8, 0.8, 0.8, 0.8, 0.8, 0.4, 0.4, 0.4, 0.2, 0.2)


def test_a_plateau_s_improvement_exceeds_the_best_by_a_ten_thousandth_of_it():
    schedule = plateau(patience=0, factor=0.25)
    assert schedule.step(-1.0)  # also for metrics below zero
    assert not schedule.step(-0.99991)
    assert schedule.optimizer.lr == 0.2
    assert schedule.step(-0.9998)
    assert schedule.best == -0.9998
    schedule = plateau()
    assert [schedule.step(x) for x in (-100.0, -99.991, -99.98)] == [True, False, True]
    schedule = plateau()
    assert schedule.step(0.0)  # the first report is the best one, whatever it is
    assert not schedule.step(0.0)


def test_a_plateau_s_state_goes_through_a_round_trip():
    reports = [0.3, 0.2, 0.31, 0.1, 0.2, 0.2, 0.4, 0.1, 0.1]
    whole = plateau(patience=1)
    for metric in reports[:4]:
        whole.step(metric)
    other = plateau(patience=1)
    other.load_state_dict({k: v.copy() for k, v in whole.state_dict().items()})
    follow = lambda schedule: [(schedule.step(x), schedule.optimizer.lr, schedule.waited) for x in reports[4:]]
    assert follow(other) == follow(whole)
    assert whole.optimizer.lr < 0.8
    fresh = plateau()
    fresh.load_state_dict(plateau().state_dict())  # before the first report
    assert fresh.step(-5.0)


@pytest.mark.parametrize("state", [{}, {"plateau": np.zeros(2)}, {"cosine": np.zeros(3)}])
def test_a_state_that_is_not_a_plateau_s(state):
    with pytest.raises(ValueError, match="not a plateau schedule"):
        plateau().load_state_dict(state)


@pytest.mark.parametrize("options", [{"factor": 0.0}, {"factor": 1.0}, {"patience": -1}])
def test_a_plateau_out_of_range(options):
    with pytest.raises(ValueError, match=r"factor must be in \(0, 1\) and patience at least 0"):
        plateau(**options)


# ---- one step


def training_of(**changes):
    sizes = {"generate": 60, "dim": 8, "hidden": 8, "max_length": 15, "batch": 8}
    return train_listops.ListOps(shared.Config(**(sizes | changes)))


@pytest.mark.parametrize("clip", [5.0, 0.01])
def test_a_step_follows_the_clipped_gradient_of_the_mean_cost(clip):
    training, seen = training_of(clip=clip), []
    batch, optimizer = training.epoch_steps()[0], training.optimizer
    flat, bias_of = optimizer.flat, training.model.output.bias
    optimizer.step = lambda: seen.append((np.sqrt(flat.grad @ flat.grad), bias_of.grad.copy()))
    training.step(batch, Rng(0))
    ((norm, bias),) = seen
    # all classes are equally likely at first, so the mean of p − onehot is known
    expected = 0.1 - np.bincount(batch.labels, minlength=10) / len(batch.labels)
    whole = np.linalg.norm(expected)  # beside it the other gradients are tiny
    assert clip == 5.0 or norm == pytest.approx(clip, rel=1e-3)
    np.testing.assert_allclose(bias, expected * min(1.0, clip / whole), atol=0.02 * clip if clip < 1 else 2e-3)


def test_every_epoch_has_an_order_of_its_own():
    training = training_of()
    orders = []
    for training.epoch in (0, 1):
        orders.append(np.concatenate([batch.index for batch in training.epoch_steps()]))
    assert sorted(orders[0]) == sorted(orders[1])
    assert (orders[0] != orders[1]).any()


def test_long_sequences_are_evaluated_a_few_at_a_time(monkeypatch):
    monkeypatch.setattr(shared, "EVALUATION_TOKENS", 40)
    sequences, tokenizer = listops.generate(50, 0), listops.Tokenizer()
    batches = shared.evaluation_batches(sequences, tokenizer)
    assert sorted(np.concatenate([b.index for b in batches])) == list(range(50))
    assert any(b.ids.shape[1] > 40 for b in batches)
    for b in batches:
        assert b.ids.size <= 40 or len(b.index) == 1
        assert b.ids.shape[1] == b.lengths.max()
        for ids, n, label, i in zip(b.ids, b.lengths, b.labels, b.index, strict=True):
            np.testing.assert_array_equal(ids[:n], tokenizer(sequences[i][0]))
            assert label == sequences[i][1]


# ---- the benchmark


def test_without_a_file_the_benchmark_generates_sequences_of_ten_lengths(monkeypatch):
    monkeypatch.delenv("MINIGRAD_DATA", raising=False)
    _, batches = bench.listops_batches(None)
    assert len({batch.ids.shape[1] for batch in batches}) == len(batches) == 10


def test_a_file_with_too_few_sequences_for_the_benchmark(tmp_path):
    (tmp_path / "listops").mkdir()
    (tmp_path / "listops" / "valid.tsv").write_text("9\t[MAX 9 1 ]\n")
    with pytest.raises(DataError, match="too few lengths for 10 batches"):
        bench.listops_batches(tmp_path)


def test_however_short_its_turn_is_a_contender_takes_a_step():
    asked, answers = iter([1e-9, None]), []
    pipe = SimpleNamespace(recv=lambda: next(asked), send=answers.append)
    bench._contender("ops", "minigrad", (), pipe)
    problem, times = answers
    assert problem is None
    assert len(times[None]) == 1
