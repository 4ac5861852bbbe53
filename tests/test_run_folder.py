"""A run folder: made once, gone again if nothing was kept, and never with less in it than before."""

import dataclasses
import json
import os
import random
import shutil
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import train_vae
from experiments import environment, loop, run_folder
from experiments.errors import UserError
from experiments.run_folder import RunFolder
from minigrad import checkpoint, nn
from minigrad.backend import Backend
from models.data import load_images

TINY = ["--epochs", "2", "--hidden", "4", "--variables", "1", "--categories", "2", "--batch", "100", "--quiet"]
CONFIG = train_vae.VAE.config_class()


def make_small(patch):
    def few(*arguments):
        images = load_images(*arguments)
        return dataclasses.replace(images, train=images.train[:300], test=images.test[:50])

    patch.setattr(loop, "load_images", few)
    patch.setattr(train_vae.VAE, "draw", lambda *_: None)


@pytest.fixture(autouse=True)
def few_images_and_no_pictures(monkeypatch):
    make_small(monkeypatch)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run, with a last line that was logged after its checkpoint."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    with pytest.MonkeyPatch.context() as patch:
        make_small(patch)
        assert train_vae.main([*TINY, "--gradient-draws", "2", "--out", str(folder)]) == 0
    return folder


@pytest.fixture
def folder(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def resume(folder, *flags):
    return train_vae.main(["--resume", str(folder), "--quiet", *flags])


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def metrics(folder):
    return [{k: v for k, v in line.items() if k != "images_per_second"} for line in RunFolder(folder).metrics()]


# ---- made once


def test_runs_that_start_in_one_second_get_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(time, "strftime", lambda _: "now")
    paths, barrier = [], threading.Barrier(8)

    def begin():
        path = run_folder.new_folder(None, "test", "s0")
        barrier.wait()
        with RunFolder.create(path, CONFIG, Backend(), numbered=True) as made:
            made.log({"epoch": 1})
            paths.append(str(made.path))

    threads = [threading.Thread(target=begin) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(paths) == ["runs/test-s0-now", *(f"runs/test-s0-now-{n}" for n in range(2, 9))]


def test_a_name_that_was_given_is_not_shared(tmp_path):
    path = run_folder.new_folder(tmp_path / "run")
    with RunFolder.create(path, CONFIG, Backend()):
        before = content(path)
        with pytest.raises(UserError, match="another process is at work in"), RunFolder.create(path, CONFIG, Backend()):
            pass
        assert content(path) == before


# ---- gone again if nothing was kept


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, UserError])
@pytest.mark.parametrize("exists", [False, True])
def test_a_run_that_ends_before_it_has_kept_anything_leaves_no_folder(tmp_path, monkeypatch, error, exists):
    out = tmp_path / "a" / "run"
    if exists:
        out.mkdir(parents=True)

    def failing(self):
        (self.folder.path / "checkpoint.safetensors.part").write_text("begun")
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(loop.Loop, "run", failing)
        try:
            assert train_vae.main([*TINY, "--out", str(out)]) == (2 if error is UserError else 130)
        except MemoryError:
            assert error is MemoryError
    assert [path.name for path in tmp_path.rglob("*")] == (["a", "run"] if exists else [])
    assert train_vae.main([*TINY, "--out", str(out)]) == 0


def test_a_run_that_was_killed_before_its_first_checkpoint_is_not_in_the_way(tmp_path):
    out = tmp_path / "run"
    with RunFolder.create(out, CONFIG, Backend()):
        (out / "config.json.part").write_text("{")
    assert {path.name for path in out.iterdir()} == {"config.json", "config.json.part"}
    assert train_vae.main([*TINY, "--out", str(out)]) == 0
    assert train_vae.main([*TINY, "--out", str(out)]) == 2


@pytest.mark.parametrize("name", ["config.json", "notes.part", "metrics.jsonl"])
def test_a_folder_with_anything_of_somebody_else_is_no_output(tmp_path, capsys, name):
    (tmp_path / name).write_text('{"name": "another program"}')
    assert train_vae.main([*TINY, "--out", str(tmp_path)]) == 2
    assert "exists already: choose another --out" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_run_in_a_thread_needs_no_signals(tmp_path):
    codes = []
    thread = threading.Thread(target=lambda: codes.append(train_vae.main([*TINY, "--out", str(tmp_path / "run")])))
    thread.start()
    thread.join()
    assert codes == [0]


# ---- never less than before


@pytest.mark.parametrize("flags", [(), ("--epochs", "3")])
def test_a_resume_that_ends_before_it_logs_has_cut_nothing(folder, monkeypatch, flags):
    before = (folder / "metrics.jsonl").read_bytes()

    def killed(*_):
        raise SystemError

    monkeypatch.setattr(loop.Loop, "step" if flags else "finish", killed)
    with pytest.raises(SystemError):
        resume(folder, *flags)
    assert (folder / "metrics.jsonl").read_bytes() == before


def test_a_resumed_run_goes_on_behind_the_lines_of_its_checkpoint(folder):
    with open(folder / "metrics.jsonl", "ab") as file:
        file.write(b'{"epoch": 9, "train": 1e9}\n{"epoch')
    assert resume(folder, "--epochs", "3") == 0
    assert [line["epoch"] for line in metrics(folder)] == [1, 2, 3, 3]


EDITS = {
    "CRLF": lambda data: data.replace(b"\n", b"\r\n"),
    "a space": lambda data: data.replace(b",", b" ,", 1),
    "a number as another program writes it": lambda data: data.replace(b'"epoch": 1', b'"epoch":1'),
}


@pytest.mark.parametrize(("edit", "old"), [*((edit, False) for edit in EDITS), ("CRLF", True), ("a space", True)])
def test_metrics_that_were_edited_and_say_the_same_are_continued(folder, finished, edit, old):
    if old:  # a checkpoint that counts bytes
        arrays, info = checkpoint.load(folder / "checkpoint.safetensors")
        lines = (folder / "metrics.jsonl").read_bytes().splitlines(keepends=True)
        info = {k: v for k, v in info.items() if not k.startswith("metrics")}
        info["metrics_bytes"] = len(b"".join(lines[:2]))
        checkpoint.save(folder / "checkpoint.safetensors", arrays, info)
    (folder / "metrics.jsonl").write_bytes(EDITS[edit]((folder / "metrics.jsonl").read_bytes()))
    assert resume(folder) == 0
    assert metrics(folder) == metrics(finished)


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl", "checkpoint.safetensors"])
def test_a_full_disk_names_the_file(tmp_path, capsys, monkeypatch, name):
    def full(descriptor):
        if name in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(28, "No space left on device")

    if not Path("/proc/self/fd").exists():
        pytest.skip("there is no /proc")
    monkeypatch.setattr(os, "fsync", full)
    assert train_vae.main([*TINY, "--out", str(tmp_path / "run")]) == 2
    said = f"{Path(sys.argv[0]).name}: error: {tmp_path / 'run' / name}: No space left on device.\n"
    assert capsys.readouterr().err == said
    assert (tmp_path / "run").exists() == (name == "metrics.jsonl")


def test_a_line_that_was_not_written_to_its_end_is_none(folder):
    before = metrics(folder)
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"epoch": 3, "tra')
    assert metrics(folder) == before


def test_a_folder_that_cannot_be_written_is_refused_first(folder, capsys, monkeypatch):
    before = content(folder)
    monkeypatch.setattr(run_folder.os, "access", lambda *_: False)
    monkeypatch.setattr(train_vae.VAE, "build", None)
    assert resume(folder) == 2
    assert capsys.readouterr().err == f"{Path(sys.argv[0]).name}: error: the run folder {folder} cannot be written.\n"
    assert train_vae.main([*TINY, "--out", str(folder.parent / "new")]) == 2
    assert "cannot be written (Permission denied): choose another --out.\n" in capsys.readouterr().err
    assert content(folder) == before


def test_an_error_of_a_part_s_own_is_no_damaged_checkpoint(folder, monkeypatch):
    def broken(*_):
        raise error

    error = ValueError("operands could not be broadcast together")
    monkeypatch.setattr(nn.Module, "load_state_dict", broken)
    with pytest.raises(ValueError, match="broadcast") as caught:
        resume(folder)
    assert caught.value is error


def assert_refused_or_the_same(folder, finished, capsys):
    """What a resume has to be, whatever has become of the folder."""
    before = content(folder)
    capsys.readouterr()
    code = resume(folder)
    captured = capsys.readouterr()
    if code:
        assert (code, captured.out, captured.err.count("\n")) == (2, "", 1), captured.err
        assert content(folder) == before
        return
    assert content(folder).keys() >= before.keys()
    lines, expected = metrics(folder), metrics(finished)
    assert [line for line in lines if "train" in line][:2] == expected[:2]
    if (last := json.loads((folder / "config.json").read_text())["config"])["epochs"] == 2 == last["gradient_draws"]:
        assert lines == expected
        same, found = load_file(finished / "checkpoint.safetensors"), load_file(folder / "checkpoint.safetensors")
        assert same.keys() == found.keys()
        assert all(np.array_equal(same[name], found[name]) for name in same)


FILES = ("config.json", "metrics.jsonl", "checkpoint.safetensors")


def damage(folder, name, at, rng):
    """Change one byte of a file, or cut it there."""
    data = bytearray((folder / name).read_bytes())
    if rng.random() < 0.2:
        data = data[:at]
    else:
        data[at] = rng.choice([data[at] ^ 1 << rng.randrange(8), rng.randrange(256), 0x0A, 0x20, 0x30])
    (folder / name).write_bytes(data)


def every_byte(finished, tmp_path, capsys, places):
    rng = random.Random(0)
    for name in FILES:
        for at in places(rng, (finished / name).stat().st_size):
            shutil.rmtree(tmp_path / "run", ignore_errors=True)
            damage(shutil.copytree(finished, tmp_path / "run"), name, at, rng)
            assert_refused_or_the_same(tmp_path / "run", finished, capsys)


def test_a_byte_that_was_changed_is_one_sentence_or_changes_nothing(finished, tmp_path, capsys):
    every_byte(finished, tmp_path, capsys, lambda rng, size: rng.sample(range(size), 40))


@pytest.mark.slow
def test_whatever_byte_was_changed(finished, tmp_path, capsys):
    every_byte(finished, tmp_path, capsys, lambda _, size: range(0, size, 1 if size < 2000 else 3))


# ---- bit for bit, or it is said


def test_a_run_records_what_its_bits_depend_on(folder, monkeypatch):
    about = json.loads((folder / "config.json").read_text())
    assert about["numpy"] == np.__version__
    assert about["backend"] == "numpy"
    assert {"minigrad", "scipy", "python", "device", "blas", "blas_threads", "blas_kernels", "simd"} <= about.keys()
    monkeypatch.setattr(environment, "_openblas", lambda *_: None)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.delenv("OPENBLAS_NUM_THREADS", raising=False)
    monkeypatch.delenv("OPENBLAS_CORETYPE", raising=False)
    assert {"blas_threads": "3", "blas_kernels": "unknown"}.items() <= environment.cpu().items()


def test_a_resume_under_another_environment_says_that_it_is_not_bit_for_bit(folder, capsys, caplog, monkeypatch):
    assert resume(folder) == 0
    assert caplog.text == ""
    now = environment.environment(Backend())
    monkeypatch.setattr(run_folder, "environment", lambda _: now | {"blas_threads": 7, "numpy": "9.0"})
    assert resume(folder) == 0
    (said,) = [record.getMessage() for record in caplog.records]
    threads, version = now["blas_threads"], now["numpy"]
    assert said == (
        f"{folder} goes on, but not bit for bit: numpy was {version} and is 9.0, blas_threads was {threads} and is 7."
    )
    about = json.loads((folder / "config.json").read_text())
    until = {"epoch": 2, "step_in_epoch": 0}
    assert about["earlier"] == [{"until": until, "numpy": version, "blas_threads": threads}]
    assert about["blas_threads"] == 7
    assert resume(folder) == 0
    assert len(caplog.records) == 1
    assert json.loads((folder / "config.json").read_text()) == about
