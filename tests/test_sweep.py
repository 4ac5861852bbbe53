"""Sweeps: what a specification means, runs that stop and go on, lost workers, and every way to get it wrong."""

import contextlib
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path

import pytest

import sweep
import train_vae
from estimators import reinmax
from experiments import executors, sweep_run, sweeps
from experiments.errors import UserError
from experiments.specification import Specification, run_key
from minigrad import checkpoint

ROOT = Path(__file__).parents[1]
SPECS = sorted((ROOT / "scripts" / "specs").glob("*.toml"))
TINY = """
script = "train_vae"
[fixed]
hidden = [8]
variables = 2
categories = 4
epochs = {epochs}
[grid]
seed = {seeds}
"""
NOT_RESULTS = ("seconds", "resumed", "images_per_second")  # of a result: times


def write(path, text=TINY, epochs=1, seeds=(0, 1)) -> Path:
    path = path / "tiny.toml"
    path.write_text(text.format(epochs=epochs, seeds=list(seeds)))
    return path


def run(spec, out, *flags) -> int:
    return sweep.main([str(spec), "--out", str(out), *map(str, flags)])


def results(out) -> dict:
    """{folder: result without its times}."""
    found = {path.parent.name: json.loads(path.read_text()) for path in Path(out).glob("*/result.json")}
    drop = lambda table: {k: v for k, v in table.items() if k not in NOT_RESULTS}
    return {key: drop(result) | {"metrics": drop(result["metrics"])} for key, result in found.items()}


# ---- an executor that does each run here and now


class Here(Executor):
    def submit(self, function, *arguments):
        future = Future()
        try:
            future.set_result(function(*arguments))
        except Exception as error:
            future.set_exception(error)
        return future


def perform_here(command):
    """What a process for this command would do."""
    task = json.loads(command[-1])
    try:
        code = sweep_run.perform(task["script"], Path(task["folder"]), task["config"])
        return subprocess.CompletedProcess(command, code, "", "")
    except UserError as error:
        return subprocess.CompletedProcess(command, 2, "", f"train_vae.py: error: {error}\n")


def executor(found: executors.Worker):
    @contextlib.contextmanager
    def make(flags, backends):
        yield found

    return make


@pytest.fixture
def here(monkeypatch):
    """here(start) makes sweeps do `start` with their commands, by default the run itself in this process."""

    def use(start=perform_here):
        monkeypatch.setitem(executors.EXECUTORS, "processes", executor(executors.Worker("here", Here(), start)))

    monkeypatch.setattr(train_vae.VAE, "draw", lambda *_: None)
    use()
    return use


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(specification, folder) of a finished sweep, whose process was never disturbed. Its run is long enough to be
    interrupted, and then killed, before it ends."""
    base = tmp_path_factory.mktemp("finished")
    spec = write(base, epochs=100, seeds=[0])
    assert run(spec, base / "runs") == 0
    return spec, base / "runs"


# ---- what is done, and that it is done once


def test_runs_are_the_script_s_own_and_are_not_repeated(tmp_path, capsys, monkeypatch, finished):
    spec, out = finished
    found = results(out)
    ((key, result),) = found.items()
    monkeypatch.setattr(train_vae.VAE, "draw", lambda *_: None)
    flags = ["--hidden", 8, "--variables", 2, "--categories", 4, "--epochs", 100, "--seed", 0]
    assert train_vae.main([*map(str, flags), "--quiet", "--out", str(tmp_path / "alone")]) == 0
    locked = json.loads((tmp_path / "alone" / "metrics.jsonl").read_text().splitlines()[-1])
    assert {k: v for k, v in locked.items() if k not in NOT_RESULTS} == result["metrics"]
    assert key == run_key("train_vae", result["config"])
    monkeypatch.setattr(executors.subprocess, "Popen", None)  # nothing may be started
    capsys.readouterr()
    assert run(spec, out) == 0
    assert capsys.readouterr().out.startswith("1 of 1 runs are finished")
    assert run(spec, out, "--list") == 0
    assert capsys.readouterr().out.split()[:2] == [key, "result"]


def when(condition, action) -> threading.Thread:
    """Do the action in a thread as soon as the condition is not empty; it gets what the condition gave."""

    def work():
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            found = condition()
            if found:
                return action(found)
            time.sleep(0.01)

    thread = threading.Thread(target=work)
    thread.start()
    return thread


def at_work(out):
    """The process ids of runs that have logged an epoch."""
    locks = [out / ".sweep" / f"{path.parent.name}.lock" for path in out.glob("*/metrics.jsonl")]
    return [int(lock.read_text().split(":")[1]) for lock in locks if lock.exists() and lock.read_text()]


def test_a_sweep_that_was_interrupted_and_one_that_was_killed_end_like_one_that_was_not(tmp_path, capsys, finished):
    spec, whole = finished
    out = tmp_path / "runs"
    sessions = []

    def interrupt(pids):
        sessions.append(os.getsid(pids[0]))
        os.kill(os.getpid(), signal.SIGINT)

    thread = when(lambda: at_work(out), interrupt)
    assert run(spec, out) == 130
    thread.join()
    assert os.getsid(0) not in sessions  # Ctrl-C on a terminal reaches the sweep, and the sweep asks the run to stop
    said = capsys.readouterr().err
    assert "stopping: the runs at work save their checkpoints" in said
    assert "runs are finished; go on with: python" in said.splitlines()[-1]
    assert "submitted again" not in said
    assert not at_work(out)  # they have ended
    assert not results(out)
    assert not list((out / ".sweep").glob("stop*"))

    thread = when(lambda: at_work(out), lambda pids: os.kill(pids[0], signal.SIGKILL))
    assert run(spec, out) == 0
    thread.join()
    assert "its process was lost (Killed); submitted again" in capsys.readouterr().err
    assert results(out) == results(whole)
    assert json.loads(next(out.glob("*/result.json")).read_text())["resumed"]


def test_a_sweep_that_ends_at_once_asks_its_runs_to_stop(tmp_path, monkeypatch):
    """After a second Ctrl-C, or when the terminal has gone: a pool of threads waits for all that was submitted."""
    asked = []

    def start(command):
        time.sleep(0.2)
        asked.append(Path(json.loads(command[-1])["stop"]).exists())
        return subprocess.CompletedProcess(command, 2, "", "")

    @contextlib.contextmanager
    def one_at_a_time(flags, backends):
        with ThreadPoolExecutor(1) as pool:
            yield executors.Worker("here", pool, start)

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setitem(executors.EXECUTORS, "processes", one_at_a_time)
    monkeypatch.setattr(sweeps.Overview, "show", interrupt)
    assert run(write(tmp_path, seeds=range(3)), tmp_path / "runs") == 130
    assert len(asked) == 3
    assert asked[-1]


def test_a_process_stops_when_its_sweep_says_so_or_says_nothing_any_more(monkeypatch, tmp_path):
    sent, stop, alive, now = [], str(tmp_path / "stop"), tmp_path / "alive", [0.0]
    monkeypatch.setattr(os, "kill", lambda pid, number: sent.append((pid, number, now[0])))
    monkeypatch.setattr(sweep_run.time, "monotonic", lambda: now[0])

    def sleep(_):
        now[0] += 50.0
        if now[0] <= 500.0:
            alive.touch()
            os.utime(alive, (now[0], now[0]))

    monkeypatch.setattr(sweep_run.time, "sleep", sleep)
    sweep_run.watch(stop, str(alive))
    assert sent == [(os.getpid(), signal.SIGTERM, 650.0)]
    monkeypatch.setattr(sweep_run.time, "sleep", lambda _: Path(stop).touch())
    sweep_run.watch(stop, "")
    assert len(sent) == 2


SLOW_TO_IMPORT = """
import os, sys, time
if "sweep_run.py" in sys.argv[0]:
    with open(os.environ["STARTED"], "a") as file:
        print(os.getpid(), file=file)
    time.sleep(0.5)
"""


@pytest.mark.parametrize(
    "begun", [pytest.param(False, id="at the start"), pytest.param(True, id="in training", marks=pytest.mark.slow)]
)
def test_a_run_does_not_outlive_a_sweep_that_is_killed(tmp_path, monkeypatch, begun):
    """At its start, before it has looked at anything, as in training."""
    (tmp_path / "sitecustomize.py").write_text(SLOW_TO_IMPORT)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(ROOT)]))
    monkeypatch.setenv("STARTED", str(tmp_path / "started"))
    spec, out = write(tmp_path, epochs=100_000, seeds=[0]), tmp_path / "runs"
    sweeping = subprocess.Popen([sys.executable, str(ROOT / "scripts" / "sweep.py"), str(spec), "--out", str(out)])
    ready = (lambda: at_work(out)) if begun else (lambda: (tmp_path / "started").exists())
    when(ready, lambda _: sweeping.kill()).join()
    sweeping.wait()
    (pid,) = map(int, (tmp_path / "started").read_text().split())
    gone = []
    when(lambda: not Path(f"/proc/{pid}").exists(), gone.append).join()
    assert gone, os.kill(pid, signal.SIGKILL)
    assert not (out / ".sweep").is_dir() or not any(lock.read_text() for lock in (out / ".sweep").glob("*.lock"))


def test_a_request_to_stop_that_comes_outside_of_the_training_ends_the_run_in_order(tmp_path):
    """Here it comes before the run, while the process waits for another one's lock."""
    task = dict.fromkeys(("script", "folder"), "train_vae") | {"config": {}}
    task |= {name: str(tmp_path / name) for name in ("lock", "stop")} | {"alive": ""}
    command = [sys.executable, str(ROOT / "scripts" / "experiments" / "sweep_run.py"), json.dumps(task)]
    popen = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL)
    with sweep_run.locked(tmp_path / "lock"), popen as process:
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(1.5)
        (tmp_path / "stop").touch()
        assert process.wait() == 130


def test_two_processes_are_never_in_one_folder(tmp_path):
    order = []

    def second():
        with sweep_run.locked(tmp_path / "lock"):
            order.append("second")

    with sweep_run.locked(tmp_path / "lock"):
        thread = threading.Thread(target=second)
        thread.start()
        time.sleep(0.05)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]
    assert (tmp_path / "lock").read_text() == ""


def test_blas_threads_are_pinned_before_numpy_is_loaded(tmp_path):
    """The process stops where it would load NumPy, and says what it would find in the environment."""
    (tmp_path / "numpy.py").write_text("import os\nprint(os.environ['OPENBLAS_NUM_THREADS'])\nraise SystemExit(7)\n")
    task = json.dumps(dict.fromkeys(("script", "folder", "lock", "stop", "alive", "config"), str(tmp_path / "stop")))
    command = [sys.executable, str(ROOT / "scripts" / "experiments" / "sweep_run.py"), task]
    env = {k: v for k, v in os.environ.items() if k != "OPENBLAS_NUM_THREADS"}
    env["PYTHONPATH"] = os.pathsep.join([str(tmp_path), str(ROOT)])
    for given, expected in (({}, "1"), ({"OPENBLAS_NUM_THREADS": "3"}, "3")):
        result = subprocess.run(command, env=env | given, capture_output=True, text=True, check=False)
        assert (result.returncode, result.stdout) == (7, expected + "\n"), result.stderr
    (tmp_path / "stop").touch()
    assert subprocess.run(command, env=env, check=False).returncode == 130


# ---- what is found in a folder


def remove(*names):
    return lambda folder: [path.unlink() for path in folder.iterdir() if not names or path.name in names]


def test_what_cannot_be_used_is_made_again(tmp_path, here):
    """No checkpoint, half a one, an empty folder, a file that was being written, half a result, that of another run."""
    spec, out = write(tmp_path, seeds=[0]), tmp_path / "runs"
    assert run(spec, out) == 0
    (folder,), expected = [path.parent for path in out.glob("*/result.json")], results(out)
    for removed, written, content in (
        (remove("result.json", "checkpoint.safetensors"), "metrics.jsonl", b"{"),
        (remove("result.json"), "checkpoint.safetensors", b"PK"),
        (remove(), "config.json.part", b"{"),
        (remove("result.json"), "result.json", b'{"config"'),
        (remove("result.json"), "result.json", b'{"config": {"seed": 7}, "metrics": {"train": 0.0}}'),
    ):
        removed(folder)
        (folder / written).write_bytes(content)
        assert run(spec, out) == 0
        assert results(out) == expected


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: edit(f / "config.json", seed=7), "has a run of another configuration (seed differ)"),
        (lambda f: edit(f / "config.json", flavour=7), "has a run of another configuration (flavour differ)"),
        (lambda f: (f / "config.json").write_text("{"), "move it, or choose another --out"),
        (lambda f: (f / "config.json").rename(f / "thesis.txt"), "is no run folder, since it has no config.json"),
    ],
)
def test_a_folder_of_something_else_is_an_error_and_is_left_alone(tmp_path, capsys, finished, spoil, message):
    spec, whole = finished
    out = tmp_path / "runs"
    shutil.copytree(whole, out)
    folder = next(out.glob("*/result.json")).parent
    spoil(folder)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert run(spec, out) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}


def edit(path, **changes):
    about = json.loads(path.read_text())
    about["config"] |= changes
    path.write_text(json.dumps(about))


# ---- what goes wrong


def test_a_full_disk_fails_one_run_and_the_others_are_finished(tmp_path, capsys, monkeypatch, here):
    spec, out, atomically = write(tmp_path, seeds=(0, 1, 2)), tmp_path / "runs", checkpoint.write_atomically
    unlucky = Specification.read(spec).runs()[1].key

    def full(path, data):
        if Path(path).name == "result.json" and unlucky in str(path):
            raise OSError(28, "No space left on device", str(path))
        atomically(path, data)

    monkeypatch.setattr(checkpoint, "write_atomically", full)
    assert run(spec, out) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert "error: 1 of 3 runs failed, 2 of 3 runs are finished; the first one:" in last
    assert "No space left on device. Start the sweep again to go on." in last
    assert len(results(out)) == 2
    assert "No space left" in (out / ".sweep" / f"{unlucky}.log").read_text()
    monkeypatch.setattr(checkpoint, "write_atomically", atomically)
    assert run(spec, out) == 0
    assert len(results(out)) == 3


@pytest.mark.parametrize(
    ("outcome", "sentence", "starts"),
    [
        (-signal.SIGKILL, "its process was lost (Killed), 3 times: see --retries", 3),
        (130, "it was interrupted, 3 times", 3),
        (RuntimeError("gone"), "its worker was lost (RuntimeError), 3 times", 3),
        (2, "the loss became nan", 1),
        (1, "ZeroDivisionError: division by zero; in the backward pass of exp; all that it said is in ", 1),
        (0, "exit code 0 and no result; all that it said is in ", 1),
    ],
)
def test_lost_runs_are_submitted_again_and_failed_ones_are_not(tmp_path, capsys, here, outcome, sentence, starts):
    said = {
        2: "train_vae.py: error: the loss became nan.",
        1: "Traceback\n  ...\nZeroDivisionError: division by zero\nin the backward pass of exp",
    }
    count = []

    def start(command):
        count.append(command)
        if isinstance(outcome, Exception):
            raise outcome
        return subprocess.CompletedProcess(command, outcome, "", said.get(outcome, ""))

    here(start)
    assert run(write(tmp_path, seeds=[0]), tmp_path / "runs") == 2
    errors = capsys.readouterr().err
    assert len(count) == starts
    assert sentence in errors.splitlines()[-1]
    assert errors.count("submitted again") == starts - 1
    assert "Traceback" not in errors
    if outcome == 1:  # the file has it
        (log,) = (tmp_path / "runs" / ".sweep").glob("*.log")
        assert str(log) in errors
        assert log.read_text() == said[1] + "\n"


def test_a_run_with_a_wrong_rule_fails_with_its_traceback_in_a_file(tmp_path, capsys, monkeypatch):
    """The real processes: each imports an error in the rule of `linear` before it begins."""
    (tmp_path / "sitecustomize.py").write_text(
        "from minigrad import fused\n"
        "def wrong(x, w, g):\n"
        "    return lambda: g @ w, lambda: x.T @ g, lambda: g.sum(axis=0)\n"
        "fused._linear_backward = wrong\n"
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(ROOT)]))
    out = tmp_path / "runs"
    assert run(write(tmp_path, seeds=[0]), out) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert "1 of 1 runs failed" in last
    assert "ValueError: matmul" in last
    assert "in the backward pass of linear, called at vae.py:" in last
    (log,) = (out / ".sweep").glob("*.log")
    assert f"all that it said is in {log}" in last
    said = log.read_text()
    assert said.startswith("Traceback (most recent call last):")
    assert "return lambda: g @ w, lambda: x.T @ g, lambda: g.sum(axis=0)" in said


def test_without_retries_a_lost_run_has_failed(tmp_path, capsys, here):
    here(lambda command: subprocess.CompletedProcess(command, -9, "", ""))
    assert run(write(tmp_path), tmp_path / "runs", "--retries", 0) == 2
    assert "2 of 2 runs failed, 0 of 2 runs are finished" in capsys.readouterr().err


@pytest.mark.parametrize("there", ["nothing", "no address", "a web server"])
@pytest.mark.daily(1)
def test_a_scheduler_that_does_not_answer_is_a_sentence_and_nothing_is_made(tmp_path, there):
    pytest.importorskip("distributed", reason="DASK NOT RUN: distributed is not installed")
    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=refuse, args=(server,), daemon=True).start()
        port = server.getsockname()[1] if there == "a web server" else 9
        address = "nonsense" if there == "no address" else f"tcp://127.0.0.1:{port}"
        flags = ["--executor", "dask", "--scheduler", address, "--timeout", "0.5", "--out", str(tmp_path / "runs")]
        script = [sys.executable, str(ROOT / "scripts" / "sweep.py"), str(write(tmp_path))]
        result = subprocess.run([*script, *flags], capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr == f"sweep.py: error: the scheduler {address} does not answer: is it running, and reachable?\n"
    assert not (tmp_path / "runs").exists()


def refuse(server):
    """What a web server says to who does not speak its language."""
    with contextlib.suppress(OSError):  # until the server is closed
        while True:
            connection, _ = server.accept()
            connection.sendall(b"HTTP/1.1 400 Bad Request\r\nContent-Type: text/html\r\n\r\n")
            connection.close()


def test_a_scheduler_that_goes_away_is_a_sentence(tmp_path, capsys, monkeypatch):
    gone = executors.Worker("there", Here(), lambda command: None, alive=lambda: False)
    monkeypatch.setitem(executors.EXECUTORS, "dask", executor(gone))
    flags = ["--executor", "dask", "--scheduler", "tcp://127.0.0.1:9"]
    assert run(write(tmp_path), tmp_path / "runs", *flags) == 2
    assert "tcp://127.0.0.1:9 does not answer any more: finished runs are kept" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("executor", "module", "message"),
    [("dask", "distributed", "Dask is not installed"), ("mpi", "mpi4py.futures", "MPI cannot be used")],
)
def test_an_executor_that_is_not_installed_is_a_sentence(tmp_path, capsys, monkeypatch, executor, module, message):
    monkeypatch.setitem(sys.modules, module, None)
    flags = ["--scheduler", "tcp://127.0.0.1:9"] if executor == "dask" else []
    assert run(write(tmp_path), tmp_path / "runs", "--executor", executor, *flags) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


BAD = {
    'script = "train_vae"\ncolour = 1': "unknown key 'colour' in the specification; the known ones are script",
    'script = "train_vae"\n[grid]\nlrr = [1]': "unknown key 'lrr'; the flags are data_dir, epochs",
    'script = "train_vae"\n[grid]\nestimator = ["magic"]': "unknown estimator 'magic'; the known ones are exact",
    'script = "train_vae"\n[grid]\nestimator = ["rloo"]\ntau = [1.0]': "rloo has no option 'tau'",
    'script = "train_vae"\n[grid]\nestimator = ["gst:gap=-1"]': "gap, unless it is 'p', must be a number from 0 to",
    'script = "train_conditional"\n[grid]\ngate = ["magic"]': "unknown estimator 'magic'; the known ones are exact",
    'script = "train_listops"\n[grid]\nestimator = ["rebar"]': "REBAR needs all choices and their costs in one call",
    'script = "train_semi_supervised"\n[fixed]\nmethod = "sample"\n[grid]\nestimator = ["vimco"]': "several samples",
    'script = "train_semi_supervised"\n[fixed]\nmethod = "sample"\n[grid]\nestimator = ["darn"]': "not 'categorical'",
    'script = "train_vae"\n[grid]\nseed = []': "[grid] seed is empty",
    'script = "train_vae"\n[fixed]\nseed = 1': "the grid is empty",
    'script = "train_vae"\n[grid]\nseed = 1': "[grid] seed must be a list of values, got 1",
    'script = "train_vae"\n[grid]\nseed = [1, 1]': "[grid] seed has a value twice",
    'script = "train_vae"\n[grid]\n"lr,tau" = [[1], [2]]': "[grid] 'lr,tau' needs lists of 2 values",
    'script = "train_vae"\n[grid]\nepochs = ["ten"]': 'epochs cannot be "ten"',
    'script = "train_vae"\n[grid]\nepochs = [true]': "epochs cannot be true",
    'script = "train_vae"\n[grid]\nepochs = [0]': "--epochs must be at least 1, got 0",
    'script = "train_listops"\n[grid]\nsplit = [1]': "split cannot be 1",
    'script = "train_vae"\n[fixed]\nseed = 1\n[grid]\nseed = [1]': "seed is said twice",
    'script = "train_vae"\n[[cases]]\nseed = 1\n[grid]\n"lr,seed" = [[1, 1]]': "seed is said twice",
    'script = "train_vae"\n[[cases]]\ntau = 1.0\n[[cases]]\nlr = 0.1\nname = "tau 1.0"': "two cases are called",
    'script = "run_folder"\n[grid]\nseed = [1]': "unknown script 'run_folder'; the known ones are train_",
    "[grid]\nseed = [1]": "there is no script",
    'script = "train_vae"\n[grid]\nseed = [1]\n[report]\nmetric = 1': "unknown key 'metric' in [report]",
    'script = "train_vae"\n[grid]\nseed = [1]\n[report]\nbetter = "up"': '[report] better must be "lower" or "higher"',
    'script = "train_vae"\n[grid]\nseed = [1]\n[report]\nunit = 1': "unit must be a text or a table of them, got 1",
    'script = "train_vae"\n[grid]\nseed = [1]\n[report.scale]\ntest = "a"': "scale must be a number other than 0 or a",
    'script = "train_vae"\ntitle = 3\n[grid]\nseed = [1]': "title must be a text, got 3",
    'script = "train_vae"\n[grid]\nseed = [1]\n[report]\npanels = ["taau"]': "unknown key 'taau' in [report] panels",
    'script = "train_vae"\n[grid]\nseed = [1]\n[report]\npanels = "tau"': "[report] panels must be a list of names",
    'script = "train_vae"\n[grid]\nseed = [1]\n[report]\nmetrics = [1]': "[report] metrics must be a list of names",
    'script = "train_vae"\n[grid]\nseed = [1]\n[report]\nmetrics = []': "[report] metrics is empty",
    'script = "train_vae"\n[grid]\nseed = [1]\n[report]\ncurve = 3': "[report] curve must be a text, got 3",
    'script = "train_vae"\n[[cases]]\npublished = 3': "published must be a table, as in { test = 1.0 }, got 3",
    'script = "train_vae"\n[[cases]]\npublished = { tset = 3 }': "unknown key 'tset' in published",
    'script = "train_vae"\n[[cases]]\npublished = { test = "a" }': "published test must be a mean, or a mean and its",
    'script = "train_vae"\n[[cases]]\npublished = { test = [1.0] }': "standard deviation, got [1.0]",
    'script = "train_vae"\n[grid]\nseed = [1]\n[small]\nfixed = 3': "[small.fixed] and [small.grid] are tables",
    'script = "train_listops"\n[grid]\nsplit = [2020-01-01]': 'split cannot be "2020-01-01"',
    'script = "train_vae"\n[grid': "is not TOML",
    f'script = "train_vae"\n[grid]\nseed = [{"9" * 5000}]': "is not TOML: Exceeds the limit",
    f'script = "train_vae"\n[grid]\nseed = [0x{"f" * 5000}]': "seed cannot be a whole number that is too large to show",
    f'script = "train_vae"\n[grid]\nseed = {"[" * 100_000}': "is nested too deep",
    f'script = "train_vae"\n[grid]\ndata = ["{"x" * 5000}"]': "unknown data set",
    f'script = "train_vae"\n{"k" * 5000} = 1': "unknown key 'kkk",
    'script = "train_vae"\n[grid]\nlr = [1e-3, nan]': "the learning rate, must be positive and finite, got nan",
    'script = "train_vae"\n[grid]\nlr = [1e-3]\nseed = [0, -1]': "--seed must be an integer from 0",
    'script = "train_vae"\n[grid]\nseed = [1]\n[report]\nscale = nan': "[report] scale must be a number other than 0",
    'script = "train_vae"\n[[cases]]\npublished = { test = inf }': "published test must be a mean, or a mean and its",
    'script = "train_vae"\n[fixed]\ndata = "mnist"\n[grid]\ndata_dir = [".", "/"]': "data_dir ., seed 0 and data_dir /",
    'script = "train_vae"\n[fixed]\ndata = "mnist"\ndata_dir = "/no"\n[grid]\nseed = [1]': "there is no folder '/no'",
    'script = "train_vae"\n[[cases]]\nname = ["a"]': 'the name of a case must be a text, got ["a"]',
    'script = "train_vae"\n[[cases]]\npublished = { test = [1, -2] }': "published test must be a mean, or a mean and",
    'script = "train_vae"\n[grid]\nseed = [1]\n[report]\nscale = 0': "scale must be a number other than 0",
    'script = "train_vae"\n[grid]\nseed = [1]\n[report.unit]\ntrain = "%"': "unknown key 'train' in [report] unit",
    'script = "train_vae"\n[grid]\nseed = [1]\n[report]\nmetrics = ["test", "test"]': "metrics has a name twice",
    'script = "train_vae"\n[grid]\ntau = [1, 1.0]': "two runs are one, tau 1.0, seed 0: nothing that is",
    'script = "train_vae"\n[[cases]]\nname = "a"\n[[cases]]\nname = "b"': "two runs are one, a, seed 0 and b, seed 0",
    'script = "train_vae"\n[fixed]\ndata_dir = "/"\n[grid]\nseed = [1]': "the digits are embedded: leave --data-dir",
    'script = "train_vae"\n[fixed]\nmomentum = 0.5\n[grid]\nseed = [1]': "adam takes no momentum: leave --momentum",
    f'script = "train_vae"\n[grid]\nseed = {[*range(200_000)]}': "make more than 100,000 runs: take fewer values",
    'script = "train_vae"\n[grid]\n'
    + "".join(
        f"{key} = {[*range(1000)]}\n" for key in ("seed", "epochs", "batch", "lr", "tau", "variables")
    ): "make more than 100,000 runs",
    'script = "train_vae"\ngrid = 1': "grid must be a table",
}


@pytest.mark.parametrize(("text", "message"), BAD.items())
def test_a_bad_specification_is_a_sentence_and_nothing_is_made(tmp_path, capsys, text, message):
    (tmp_path / "bad.toml").write_text(text)
    assert run(tmp_path / "bad.toml", tmp_path / "runs") == 2
    error = capsys.readouterr().err
    assert message in error
    assert "bad.toml" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--small"], "there is no [small.fixed] or [small.grid]"),
        (["--workers", "0"], "--workers must be at least 1"),
        (["--workers", "1000000000"], "--workers must be at most 400, got 1000000000"),
        (["--timeout", "inf"], "--timeout must be positive and finite, got inf"),
        (["--timeout", "3"], "no scheduler is asked: leave --timeout out"),
        (["--executor", "dask", "--scheduler", "a", "--workers", "2"], "Dask has workers of its own: leave --workers"),
        (["--set", "lr=1", "--set", "lr=2"], "--set lr is said twice"),
        (["--set", "lr=" + "[" * 10_000], "--set needs KEY=VALUE"),
        (["--data-dir", "/"], "no run of the specification reads --data-dir: leave it out"),
        (["--executor", "slurm"], "unknown executor 'slurm'; the known ones are processes, dask, mpi"),
        (["--executor", "dask"], "--executor dask and --scheduler ADDRESS go together"),
        (["--scheduler", "tcp://127.0.0.1:9"], "--executor dask and --scheduler ADDRESS go together"),
        (
            ["--set", "epochs"],
            "--set needs KEY=VALUE, the value as in a specification, as in lr=[1e-3,3e-4]; got 'epochs'",
        ),
        (["--set", "epochs=two"], "got 'epochs=two'"),
        (["--set", "=2"], "got '=2'"),
        (["--set", "epochs=2\nlr=3"], "--set needs KEY=VALUE"),
        (["--set", "flavour=2"], "unknown key 'flavour'; the flags are"),
        (["--set", "seed=[]"], "[grid] seed is empty"),
        (["--retries", "-1"], "--retries must be at least 0"),
        (["--backend", "tpu"], "unknown backend 'tpu'"),
        (["--out", "/proc/nothing"], "/proc/nothing"),
        (["--out", "/dev/null"], "/dev/null is no folder: choose another --out"),
        (["--out", "/dev/null", "--list"], "/dev/null is no folder: choose another --out"),
        (["--data-dir", ""], "data-dir is empty: give it a value, or leave it out"),
    ],
)
def test_a_bad_flag_is_a_sentence(tmp_path, capsys, flags, message):
    assert run(write(tmp_path), tmp_path / "runs", *flags) == 2
    error = capsys.readouterr().err
    assert message in error.splitlines()[-1]
    assert sweep.main([str(tmp_path / "nothing.toml")]) == 2


# ---- what a specification means


KEY = "d63b86a4791f"  # if this changes, nobody's finished runs are found again


def test_names_of_folders_are_stable_and_know_every_setting_but_paths():
    config = {"estimator": "reinmax", "tau": 1.3, "hidden": [512, 256], "seed": 0, "data_dir": "", "anneal": None}
    assert run_key("train_vae", config) == KEY
    assert run_key("train_vae", dict(reversed(config.items())) | {"data_dir": "elsewhere"}) == KEY
    others = [run_key("train_vae", config | {name: 2.5}) for name in config if name != "data_dir"]
    assert len({KEY, run_key("train_listops", config), *others}) == len(others) + 2


def test_defaults_that_are_said_and_numbers_that_are_spelled_otherwise_give_the_same_run(tmp_path):
    spelled = [
        TINY,
        TINY.replace("[fixed]", "[fixed]\nlr = 0.1e-2\ntau = 1"),
        TINY.replace("[fixed]", "[fixed]\ntau = 1.0"),
    ]
    keys = [[r.key for r in Specification.read(write(tmp_path, text)).runs()] for text in spelled]
    assert keys[1] == keys[2]
    assert keys[0] != keys[1]  # no temperature is another configuration than the temperature 1


def test_runs_are_the_product_of_cases_and_grid():
    found = {
        "script": "train_vae",
        "fixed": {"epochs": 3, "lr": 1e-2},
        "cases": [
            {"name": "A", "estimator": "st", "tau": 1.0, "published": {"test": 3, "train": [1.0, 0.5]}},
            {"estimator": "rloo"},
        ],
        "grid": {"variables,categories": [[2, 3], [4, 5]], "batch": [10, 20], "seed": [0, 1]},
        "report": {"panels": ["variables"], "metrics": ["test", "train"]},
        "small": {"fixed": {"epochs": 1, "tau": 2.0}, "grid": {"seed": [5]}},
    }
    spec = Specification.of("x", found, small=False)
    runs = spec.runs(backend="numpy")
    assert len(runs) == len({run.key for run in runs}) == 2 * 2 * 2 * 2
    assert runs[0].name == "variables 2, A, categories 3, batch 10, seed 0"
    assert runs[-1].name == "variables 4, rloo, categories 5, batch 20, seed 1"
    assert runs[0].published == {"test": [3, None], "train": [1.0, 0.5]}
    assert all(run.config.epochs == 3 and run.config.lr == 1e-2 for run in runs)
    with pytest.raises(UserError, match="rloo has no option 'tau'"):
        Specification.of("x", found, small=True).runs()
    del found["cases"][1]
    small = Specification.of("x", found, small=True).runs()
    assert [(r.config.seed, r.config.tau, r.config.epochs, r.published) for r in small] == [(5, 2.0, 1, {})] * 4


@pytest.mark.parametrize(
    ("script", "flags"),
    [
        ("train_structured", {"estimator": "none"}),
        ("train_semi_supervised", {"method": "marginal"}),
        ("train_conditional", {"gate": "sigmoid"}),
        ("train_quantised", {"bits": 0}),
        ("train_constraints", {"method": "exact"}),
        ("train_listops", {"encoder": "gold"}),
    ],
)
def test_runs_without_an_estimator_can_be_specified(script, flags):
    (run,) = Specification.of("x", {"script": script, "cases": [flags]}, small=False).runs()
    assert flags.items() <= run.values.items()


def test_where_the_data_are_is_said_to_the_runs_that_read_some():
    found = {"script": "train_vae", "grid": {"data": ["digits", "mnist"]}}
    spec = Specification.of("x", found, small=False)
    assert [(r.config.data, r.config.data_dir) for r in spec.runs(data_dir="/")] == [("digits", ""), ("mnist", "/")]
    with pytest.raises(UserError, match="there is no folder '/nonexistent'"):  # now, and not once for each run
        spec.runs(data_dir="/nonexistent")


def test_no_more_runs_than_the_window_are_with_the_executor(tmp_path, monkeypatch, here):
    """What is done after each run goes through all that were submitted: 100,000 at a time would be quadratic."""
    most, usual = [], sweeps.wait

    def wait(futures, **options):
        most.append(len(futures))
        return usual(futures, **options)

    monkeypatch.setattr(sweeps, "wait", wait)
    monkeypatch.setattr(sweeps, "WINDOW", 2)
    here(lambda command: subprocess.CompletedProcess(command, 2, "", "no"))
    assert run(write(tmp_path, seeds=range(5)), tmp_path / "runs") == 2
    assert max(most) == 2


def test_set_replaces_what_is_said_about_a_flag_wherever_it_is_said(tmp_path, capsys):
    found = {
        "script": "train_vae",
        "title": "T",
        "fixed": {"epochs": 3, "lr": 1e-2},
        "cases": [{"name": "one", "estimator": "st", "published": {"test": 1.0}}, {"name": "two", "tau": 0.5}],
        "grid": {"seed": [1, 2], "variables,categories": [[2, 3], [4, 5]]},
        "small": {"fixed": {"epochs": 1}},
    }
    spec = Specification.of("x", found, False, ["epochs=7", "lr = [1e-3, 1e-4]", "tau=2.0", "categories=6", "seed=4"])
    runs = spec.runs()
    at = [(r.config.epochs, r.config.seed, r.config.tau, r.config.categories) for r in runs]
    assert set(at) == {(7, 4, 2.0, 6)}
    assert [(r.row, r.config.lr) for r in runs] == [
        ("one, lr 0.001", 1e-3),
        ("one, lr 0.0001", 1e-4),
        ("two, lr 0.001", 1e-3),
        ("two, lr 0.0001", 1e-4),
    ]
    assert [r.published for r in runs] == [{"test": [1.0, None]}] * 2 + [{}] * 2
    assert spec.title == "T, with epochs=7, lr = [1e-3, 1e-4], tau=2.0, categories=6, seed=4"
    assert spec.name == "x-epochs=7-lr=-1e-3-1e-4-tau=2.0-categories=6-seed=4"
    names = [Specification.of("x", found, False, [f"seed={[*range(n)]}"]).name for n in (200, 300)]
    assert max(map(len, names)) < 200  # a file is called so
    assert names[0] != names[1]
    small = Specification.of("x", found, True, ["seed=4"])
    assert (small.fixed, small.name) == ({"epochs": 1, "lr": 1e-2, "seed": 4}, "x-seed=4")

    path = write(tmp_path)
    assert run(path, tmp_path / "runs", "--set", "seed=5", "--set", "hidden=[[4], [2]]", "--list") == 0
    assert [line.split("begun")[1].strip() for line in capsys.readouterr().out.splitlines()] == [
        "hidden 4, seed 5",
        "hidden 2, seed 5",
    ]


@pytest.mark.parametrize("small", [False, True], ids=["full", "small"])
@pytest.mark.parametrize("path", SPECS, ids=lambda path: path.stem)
def test_the_specifications_of_the_repository_are_good(path, small):
    spec = Specification.read(path, small)
    metrics = [metric for case in spec.cases for metric in case.get("published", {})]
    assert set(metrics) <= set(spec.report["metrics"])
    assert not metrics or spec.report["source"]
    for key in spec.fixed.keys() & {"data", "generate"}:  # there are problems that read no data
        assert spec.fixed[key] in ({"digits", 2000} if small else {"mnist", 90000})
    runs = spec.runs()
    assert len({run.config.seed for run in runs}) >= 2


# ---- where runs are done


def test_gpus_are_dealt_out_in_turns(monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert executors.visible_gpus() == ["3", "5"]
    given, barrier = [], threading.Barrier(4)

    def record(command, env):
        given.append(env["CUDA_VISIBLE_DEVICES"])
        barrier.wait(10)

    monkeypatch.setattr(executors, "start", record)
    with executors.processes(sweep.Flags(workers=4), {"cupy"}) as worker:
        assert worker.title == "4 at a time on 2 GPUs"
        for future in [worker.executor.submit(worker.start, []) for _ in range(4)]:
            future.result()
    assert sorted(given) == ["3", "3", "5", "5"]
    with executors.processes(sweep.Flags(), {"cupy"}) as worker:
        assert worker.title == "2 at a time on 2 GPUs"
    with executors.processes(sweep.Flags(), {"numpy"}) as worker:
        assert worker.title == f"{executors.cores()} at a time"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    listed = "GPU 0: NVIDIA H200 (UUID: GPU-1)\n  MIG 1g (UUID: MIG-2)\nGPU 1: NVIDIA H200 (UUID: GPU-3)\n"
    monkeypatch.setattr(executors.subprocess, "run", lambda *a, **k: subprocess.CompletedProcess(a, 0, listed, ""))
    assert executors.visible_gpus() == ["0", "1"]


def test_the_overview_shows_who_does_what_and_how_far_it_is(tmp_path, monkeypatch):
    class Terminal(io.StringIO):
        isatty = lambda self: True

    spec = Specification.read(write(tmp_path, epochs=4, seeds=(0, 1, 2)))
    runs = spec.runs()
    state = sweeps.Sweep(spec, runs, tmp_path / "runs", sweep.Flags())
    state.write_manifest()
    key = runs[1].key
    state.lock(key).write_text("node7:4711")
    state.finished.add(runs[0].key)
    state.submitted = {Future(): runs[1], Future(): runs[2]}
    (tmp_path / "runs" / key).mkdir()
    (tmp_path / "runs" / key / "metrics.jsonl").write_text('{"epoch": 2, "train": 9, "test": 41.25}\n{"epoch": 3, "tr')
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("LINES", "24")
    stream = Terminal()
    overview = sweeps.Overview(stream, every=0.0)
    overview.show(state)
    first, second = stream.getvalue().splitlines()
    assert first.startswith("tiny: 1 of 3 finished, 1 running, 1 waiting, 0 failed; 0:00 so far")
    shown = "node7:4711 epoch 2 of 4 train_vae, seed 1: test 41.25"
    assert second.split() == [key, *shown.split()]
    assert state.shown({"epoch": 2, "test": {"10": [0.5, 3]}, "train": 9.0}) == "train 9"  # only numbers
    overview.say("an event")
    assert "\x1b[2F\x1b[Jan event\n" in stream.getvalue()  # the table was taken away first
    plain = io.StringIO()
    sweeps.Overview(plain).show(state)
    assert plain.getvalue() == ""
    assert sweeps.clock(3725.2) == "1:02:05"


@pytest.mark.slow
def test_dask_with_two_workers_one_of_which_is_killed(tmp_path):
    """A real scheduler and two workers on the loopback interface; results are those of processes on this machine."""
    pytest.importorskip("distributed", reason="DASK NOT RUN: distributed is not installed")
    spec, whole, started = write(tmp_path, epochs=100, seeds=range(4)), tmp_path / "whole", []
    assert run(spec, whole) == 0
    quiet = {"stderr": subprocess.DEVNULL, "cwd": tmp_path}

    def dask(*command):
        started.append(subprocess.Popen([sys.executable, "-m", "dask", *map(str, command)], **quiet))

    try:
        about = tmp_path / "scheduler.json"
        dask("scheduler", "--host", "127.0.0.1", "--port", 0, "--no-dashboard", "--scheduler-file", about)
        deadline = time.monotonic() + 60
        while not about.exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        address = json.loads(about.read_text())["address"]
        for _ in range(2):
            dask("worker", address, "--host", "127.0.0.1", "--nthreads", 1, "--no-nanny", "--no-dashboard")
        out = tmp_path / "runs"
        killed = []

        def kill_the_worker(pids):
            parent = int(Path(f"/proc/{pids[0]}/stat").read_text().rpartition(")")[2].split()[1])
            killed.extend(p for p in started[1:] if p.pid == parent)
            os.kill(parent, signal.SIGKILL)

        thread = when(lambda: at_work(out), kill_the_worker)
        script = [sys.executable, str(ROOT / "scripts" / "sweep.py"), str(spec), "--out", str(out)]
        flags = ["--executor", "dask", "--scheduler", address]
        result = subprocess.run([*script, *flags], capture_output=True, text=True, timeout=300, check=False)
        thread.join()
        assert result.returncode == 0, result.stderr
        assert len(killed) == 1
        assert results(out) == results(whole)
    finally:
        for process in reversed(started):
            process.kill()
            process.wait()


def test_an_error_in_the_constructor_of_an_estimator_is_not_said_of_the_specification(tmp_path, monkeypatch):
    def broken(*_, **__):
        raise ValueError("shapes")

    monkeypatch.setattr(reinmax.ReinMax, "__init__", broken)
    with pytest.raises(ValueError, match="shapes"):
        run(write(tmp_path), tmp_path / "runs")


TASKS = ["{", "{}", '{"stop": "x"}', "5"]


@pytest.mark.parametrize(("arguments", "code"), [(["--help"], 0), ([], 2), *(([task], 2) for task in TASKS)])
def test_a_run_started_by_hand_is_told_how_it_is_started(arguments, code):
    command = [sys.executable, str(ROOT / "scripts" / "experiments" / "sweep_run.py"), *arguments]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == code
    assert "sweep.py" in (result.stderr if code else result.stdout)
    assert result.stderr.count("\n") == (1 if code else 0)
