"""The evaluation of a trained model: the numbers of its run, and every way to get it wrong."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import evaluate_listops
import train_listops
import train_vae
from experiments import run_folder
from minigrad import checkpoint
from models.data import listops

ROOT = Path(__file__).parents[1]
SIZES = ["--generate", "200", "--dim", "8", "--hidden", "8", "--max-length", "15", "--epochs", "2", "--lr", "1e-2"]
SPLITS = {"counts": (200, 20, 22), "seed": 0}  # what such a run generates
RUNS = {
    "latent": [],
    "latent split": ["--split", "--dtype", "float64", "--leaves", "affine"],
    "gold": ["--encoder", "gold"],
    "gold split": ["--encoder", "gold", "--split"],
    "balanced": ["--encoder", "balanced"],
    "lstm": ["--encoder", "lstm"],
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with the runs, one of train_vae.py, and test.tsv, the test split with what is too long for the runs."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MINIGRAD_DATA", raising=False)
        for script, names in ((train_listops, ("forest", "learning_curves")), (train_vae, ("curves", "page"))):
            for name in names:
                patch.setattr(script, name, lambda *_: None)
        for name, flags in RUNS.items():
            assert train_listops.main([*SIZES, *flags, "--quiet", "--out", str(folder / name)]) == 0
        listops.write(folder / "test.tsv", listops.load(**SPLITS)["test"])
        vae = ["--epochs", "1", "--hidden", "4", "--variables", "1", "--categories", "2", "--quiet"]
        assert train_vae.main([*vae, "--out", str(folder / "vae")]) == 0
    return folder


def evaluate(capsys, *arguments):
    """(the JSON line, the lines after it)"""
    capsys.readouterr()
    assert evaluate_listops.main([str(a) for a in arguments]) == 0
    first, *others = capsys.readouterr().out.splitlines()
    return json.loads(first), others


@pytest.mark.parametrize("name", RUNS)
def test_the_best_model_on_the_test_split_gives_what_its_run_logged(trained, tmp_path, capsys, caplog, name):
    last = run_folder.RunFolder(trained / name).metrics()[-1]
    expected = {k.removeprefix("test_"): v for k, v in last.items() if k != "best_epoch"}
    found, others = evaluate(capsys, trained / name, trained / "test.tsv", "--max-length", 15)
    about = {"checkpoint": str(trained / name / "best.safetensors"), "file": str(trained / "test.tsv")}
    assert found == about | {"backend": "numpy"} | expected
    assert ("f1_gold" in found) == name.startswith("latent")
    assert others == []

    # a file that has only those that the run kept, without a limit
    tokenizer = listops.Tokenizer("split" in name)
    sequences = listops.read(trained / "test.tsv")
    kept, left_out = listops.within(sequences, tokenizer, 15)
    assert left_out
    said = f"{trained / 'test.tsv'}: {left_out} of {len(sequences)} sequences are left out"
    assert [r.getMessage() for r in caplog.records] == [f"{said}, which have more than 15 tokens or only one."]
    listops.write(tmp_path / "kept.tsv", kept)
    found, _ = evaluate(capsys, trained / name / "best.safetensors", tmp_path / "kept.tsv")
    assert found == about | {"file": str(tmp_path / "kept.tsv"), "backend": "numpy"} | expected
    assert len(caplog.records) == 1


def test_without_a_limit_all_sequences_count_but_single_digits(trained, tmp_path, capsys, caplog):
    sequences = listops.read(trained / "test.tsv")
    listops.write(tmp_path / "x.tsv", [(bytes([5]), 5), *sequences])
    found, _ = evaluate(capsys, trained / "latent", tmp_path / "x.tsv")
    assert found["sequences"] == len(sequences)
    lengths = [len(tokens) for tokens, _ in sequences]
    assert sum(count for bound, (_, count) in found["by_length"].items() if bound in ("10", "20")) == sum(
        n <= 20 for n in lengths
    )
    (record,) = caplog.records
    assert record.getMessage() == (
        f"{tmp_path / 'x.tsv'}: 1 of {len(sequences) + 1} sequences are left out, which have only one token."
    )


def test_a_checkpoint_of_the_last_step_is_evaluated_too(trained, tmp_path, capsys):
    """Its parameters are those after the last step, not the best ones."""
    arrays, info = checkpoint.load(trained / "gold" / "checkpoint.safetensors")
    arrays["model.output.bias"] = np.full(10, -1000.0, np.float32)
    arrays["model.output.bias"][3] = 1000.0  # always the answer 3
    checkpoint.save(tmp_path / "checkpoint.safetensors", arrays, info)
    found, _ = evaluate(capsys, tmp_path / "checkpoint.safetensors", trained / "test.tsv")
    sequences = listops.read(trained / "test.tsv")
    assert found["accuracy"] == pytest.approx(np.mean([value == 3 for _, value in sequences]), abs=1e-4)


@pytest.mark.parametrize("name", ["latent", "latent split"])
def test_trees_are_printed_as_brackets(trained, capsys, name):
    flags = ["--max-length", 15, "--trees", 3]
    _, lines = evaluate(capsys, trained / name, trained / "test.tsv", *flags)
    drawn = (trained / name / "trees.txt").read_text().splitlines()
    assert lines == drawn[:3]
    tokenizer = listops.Tokenizer("split" in name)
    kept, _ = listops.within(listops.read(trained / "test.tsv"), tokenizer, 15)
    for line, (tokens, _) in zip(lines, kept, strict=False):
        assert re.sub(r"[()]", " ", line).split() == [tokenizer.tokens[i] for i in tokenizer(tokens)]
    _, lines = evaluate(capsys, trained / name, trained / "test.tsv", *flags[:2], "--trees", 1000)
    assert len(lines) == len(kept)


# ---- bad input: one sentence on standard error, exit code 2, nothing on standard output


def refused(capsys, *arguments):
    """The sentence."""
    capsys.readouterr()
    assert evaluate_listops.main([str(a) for a in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.endswith((".\n", "help.\n"))
    assert "error: " in captured.err
    return captured.err


def change(path, **config):
    arrays, info = checkpoint.load(path)
    checkpoint.save(path, arrays, info | {"config": info["config"] | config})


def without(path, name):
    arrays, info = checkpoint.load(path)
    if name in arrays:
        del arrays[name]
    else:
        del info["config"][name]
    checkpoint.save(path, arrays, info)


def replace(path, name, value):
    arrays, info = checkpoint.load(path)
    checkpoint.save(path, arrays | {name: value}, info)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda p: p.unlink(), "there is no checkpoint {path}: give another one, or begin anew."),
        (lambda p: p.write_bytes(p.read_bytes()[:-50]), "{path} is damaged or not a checkpoint of this project"),
        (lambda p: p.write_bytes(p.read_bytes()[:30]), "{path} is damaged or not a checkpoint of this project"),
        (lambda p: p.write_bytes(b"PK"), "{path} is damaged or not a checkpoint of this project"),
        (lambda p: p.write_bytes(b""), "{path} is damaged or not a checkpoint of this project"),
        (lambda p: checkpoint.save(p, {"w": np.ones(2)}, {}), "{path} is a checkpoint of another program: it has no"),
        (lambda p: checkpoint.save(p, {}, {"config": 1}), "{path} is a checkpoint of another program: it has no"),
        (lambda p: change(p, warmth=3), "its configuration differs from that of train_listops.py in warmth."),
        (lambda p: without(p, "leaves"), "its configuration differs from that of train_listops.py in leaves."),
        (lambda p: change(p, dim=9), "{path} cannot be used: word.weight is float32(16, 9) here and float32(16, 8) in"),
        (lambda p: change(p, split=True), "it belongs to another model."),
        (lambda p: change(p, dtype="float64"), "it belongs to another model."),
        (lambda p: change(p, leaves="affine"), "it belongs to another model."),
        (lambda p: change(p, encoder="gold"), "{path} cannot be used: the saved state has also query"),
        (lambda p: change(p, encoder="tree"), "{path} cannot be used: unknown encoder 'tree'"),
        (lambda p: change(p, dim=0), "{path} cannot be used: --dim must be at least 1, got 0."),
        (lambda p: change(p, dim="ten"), "{path} cannot be used: "),
        (lambda p: change(p, dim=8.5), "{path} cannot be used: "),
        (lambda p: change(p, dim=10**12), "does not fit into memory"),
        (lambda p: without(p, "model.query"), "{path} cannot be used: the saved state lacks query"),
        (lambda p: replace(p, "model.query", np.ones(7, np.float32)), "{path} cannot be used: query is float32(8,)"),
        (lambda p: replace(p, "model.extra", np.ones(7, np.float32)), "the saved state has also extra"),
        (lambda p: replace(p, "model.output.bias", np.full(10, np.nan, np.float32)), "a loss that is infinite or NaN"),
        (lambda p: replace(p, "model.output.bias", np.full(10, np.inf, np.float32)), "a loss that is infinite or NaN"),
    ],
)
@pytest.mark.parametrize("by", ["file", "folder"])
def test_a_checkpoint_that_cannot_be_evaluated(trained, tmp_path, capsys, spoil, message, by):
    path = tmp_path / "best.safetensors"
    shutil.copy(trained / "latent" / "best.safetensors", path)
    spoil(path)
    given = path if by == "file" else tmp_path
    assert message.format(path=path) in refused(capsys, given, trained / "test.tsv")


def test_a_checkpoint_whose_name_is_too_long(trained, capsys):
    assert "File name too long" in refused(capsys, "x" * 300, trained / "test.tsv")


def test_a_checkpoint_of_another_script(trained, capsys):
    path = trained / "vae" / "checkpoint.safetensors"
    error = refused(capsys, path, trained / "test.tsv")
    assert f"{path} is a checkpoint of another program or version: its configuration differs" in error
    error = refused(capsys, trained / "vae", trained / "test.tsv")
    assert f"there is no checkpoint {trained / 'vae' / 'best.safetensors'}: give another one" in error


GOOD = "2\t( ( ( [MIN 2 ) 7 ) ] )"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("3\t( ( ( [MIN 4 ) 7 ) ] )", "the label is '3', but the sequence has the value 4."),
        ("x\t( ( ( [MIN 4 ) 7 ) ] )", "the label is 'x', but the sequence has the value 4."),
        ("4\t( ( ( [MIN 4 ) 7 ) ]", "its parentheses are not balanced, or do not build each list from the left."),
        ("4\t[MIN 4 7", "the operator [MIN is not closed by a ]."),
        ("4\t[MIN 4 7 ] ]", "a ] without its operator."),
        ("4\t[AVG 4 7 ]", "unknown token '[AVG'."),
        ("4\t[MIN 4 " + "7" * 5000, "unknown token '777777777777...7777777777777'."),
        ("4" * 5000 + "\t[MIN 4 7 ]", "the label is '444444444444...4444444444444', but the sequence has the value 4."),
        ("4\t[MIN ]", "the operator [MIN has no arguments."),
        ("4\t", "it is empty."),
        ("", "an empty line."),
        ("4 [MIN 4 7 ]", "no tab between a label and a sequence."),
    ],
)
def test_a_file_with_a_wrong_line(trained, tmp_path, capsys, line, message):
    path = tmp_path / "x.tsv"
    path.write_text(f"{GOOD}\n{line}\n{GOOD}\n")
    assert f"error: {path}, line 2: {message}\n" in refused(capsys, trained / "latent", path)


def test_a_file_without_sequences(trained, tmp_path, capsys):
    path = tmp_path / "x.tsv"
    assert f"{path} cannot be read (No such file" in refused(capsys, trained / "latent", path)
    assert f"{tmp_path} cannot be read (Is a directory" in refused(capsys, trained / "latent", tmp_path)
    path.write_text("")
    assert f"{path} is empty" in refused(capsys, trained / "latent", path)
    path.write_bytes(b"\xff\xfe\x00")
    assert f"{path} cannot be read (it is not text)" in refused(capsys, trained / "latent", path)
    path.write_text("5\t5\n")
    assert f"{path}: no sequence has 2 tokens or more." in refused(capsys, trained / "latent", path)
    path.write_text("9\t[MAX 1 2 3 9 ]\n")
    error = refused(capsys, trained / "latent", path, "--max-length", 5)
    assert f"{path}: no sequence has 2 to 5 tokens: raise --max-length." in error
    path.write_text("9\t[MAX 9 9 ]\n9\t[MAX" + " 9" * 10_000 + " ]\n")
    error = refused(capsys, trained / "latent", path)
    assert f"{path} has a sequence of 10,002 tokens: give --max-length 10000 or less." in error


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--max-length", "4"], "--max-length must be at least 5, got 4."),
        (["--max-length", "10001"], "--max-length must be at most 10,000, got 10001."),
        (["--max-length", "many"], "argument --max-length: 'many' is not a whole number"),
        (["--trees", "-1"], "--trees must be at least 0, got -1."),
        (["--backend", "tpu"], "unknown backend 'tpu'; the known ones are auto, cupy, numpy"),
        (["--batch", "3"], "unrecognized arguments: --batch 3"),
    ],
)
def test_a_bad_flag(trained, capsys, flags, message):
    assert message in refused(capsys, trained / "latent", trained / "test.tsv", *flags)


def test_missing_arguments(trained, capsys):
    assert "the following arguments are required: checkpoint, file" in refused(capsys)
    assert "the following arguments are required: file" in refused(capsys, trained / "latent")


@pytest.mark.parametrize("name", ["gold", "lstm"])
def test_trees_of_a_model_that_chooses_none(trained, capsys, name):
    error = refused(capsys, trained / name, trained / "test.tsv", "--trees", 2)
    assert "--trees is for a model that chooses trees" in error
    assert f"has the encoder {name}." in error


def test_cupy_without_a_usable_gpu(trained, capsys):
    from minigrad.backend import BackendUnavailable, get_backend

    try:
        get_backend("cupy")
    except BackendUnavailable:
        error = refused(capsys, trained / "latent", trained / "test.tsv", "--backend", "cupy")
        assert "CuPy" in error
        assert "--backend numpy" in error
    else:
        pytest.skip("this machine has a usable GPU")


def test_the_script_itself(trained, tmp_path):
    def script(*arguments):
        command = [sys.executable, str(ROOT / "scripts" / "evaluate_listops.py"), *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)

    result = script(trained / "latent", trained / "test.tsv", "--max-length", 15, "--trees", 2)
    assert result.returncode == 0
    assert len(result.stdout.splitlines()) == 3
    assert result.stderr.count("\n") == 1
    assert "sequences are left out, which have more than 15 tokens or only one." in result.stderr
    result = script(trained / "latent", tmp_path / "absent.tsv")
    assert result.returncode == 2
    assert result.stderr.startswith(f"evaluate_listops.py: error: {tmp_path / 'absent.tsv'} cannot be read")
    assert result.stdout == ""
