"""Whenever a signal comes, a command ends in order: one line, how to go on, exit code 130, no traceback."""

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import signals

SCRIPTS = Path(__file__).parents[1] / "scripts"
TINY = "--epochs 2 --hidden 4 --variables 1 --categories 2 --batch 100 --quiet --out run"
VAE = ["train_vae.py", *TINY.split()]
GO_ON = f"; go on with: python {SCRIPTS / VAE[0]} --resume run\n"
INTERRUPTED, NOTHING = "train_vae.py: interrupted.\n", "train_vae.py: interrupted: nothing was kept.\n"

# Python runs it first. It sends the signals NAMES, each when a function is called: FILE:FUNCTION, or its number among
# all calls after the handlers were set
SENDER = """
import atexit, ctypes, os, sys
kill = ctypes.CDLL(None).kill
todo, calls = [(*name.split(",")[0].rsplit(":"), int(name.split(",")[1])) for name in os.environ["NAMES"].split()], 0
def watch(frame, event, _):
    global calls
    if event != "call":
        return
    name = frame.f_code.co_name
    if calls or name == "handle" and frame.f_code.co_filename.endswith("experiments/signals.py"):
        calls += 1
    if todo:
        *at, number = todo[0]
        if calls == int(at[0]) if len(at) == 1 else name == at[1] and frame.f_code.co_filename.endswith(at[0]):
            todo.pop(0)
            return [*map(kill, [os.getpid()], [number])]  # not handled in here, where an exception would end the watch
    elif "COUNT" not in os.environ:
        sys.setprofile(None)
sys.setprofile(watch)
if "COUNT" in os.environ:
    atexit.register(lambda: open(os.environ["COUNT"], "w").write(str(calls)))
"""


def run(folder, command, *at, **options):
    """The finished process of a command that gets signals.   at: (where, which signal)"""
    (folder / "sitecustomize.py").write_text(SENDER)
    path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
    names = " ".join(f"{where},{int(number)}" for where, number in at)
    env = os.environ | {"PYTHONPATH": path, "NAMES": names} | options.pop("env", {})
    command = [sys.executable, str(SCRIPTS / command[0]), *command[1:]]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=env, **options)


INT, TERM, HUP = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
CASES = {
    "an import of ours": ([("experiments/loop.py:<module>", INT)], INTERRUPTED),
    "an extension module": ([("numpy/_core/multiarray.py:<module>", TERM)], INTERRUPTED),
    "twice in the imports": (
        [("numpy/__init__.py:<module>", INT), ("numpy/_core/__init__.py:<module>", INT)],
        INTERRUPTED,
    ),
    "the data": ([("data/__init__.py:load_images", HUP)], NOTHING),
    "the folder": ([("run_folder.py:record", HUP)], NOTHING),
    "twice in the folder": ([("run_folder.py:record", INT), ("run_folder.py:remove_unless_begun", INT)], NOTHING),
    "twice, in the last line": ([("data/__init__.py:load_images", HUP), ("experiments/start.py:write", INT)], NOTHING),
    "the first checkpoint": ([("checkpoint.py:save", INT)], f"stopped at epoch 1, step 1{GO_ON}"),
    "a step, by the terminal": ([("train_vae.py:step", HUP)], f"stopped at epoch 1, step 1{GO_ON}"),
    "a step, by a cluster": (
        [("vae.py:step", TERM), ("checkpoint.py:save", HUP)],
        f"stopped at epoch 1, step 1{GO_ON}",
    ),
    "twice in the save": (
        [("train_vae.py:step", INT), ("checkpoint.py:write_atomically", INT)],
        f"train_vae.py: interrupted{GO_ON}",
    ),
    "the final measurement": ([("train_vae.py:final", TERM)], f"train_vae.py: interrupted{GO_ON}"),
    "the pictures": ([("matplotlib/figure.py:<module>", INT)], f"train_vae.py: interrupted{GO_ON}"),
    "the end": ([("threading.py:_shutdown", INT)], ""),
}
QUICK = ("an extension module", "the data", "twice in the save")


@pytest.mark.parametrize(
    "case", [case if case in QUICK else pytest.param(case, marks=pytest.mark.slow) for case in CASES]
)
def test_a_signal_is_one_line_that_says_how_to_go_on(tmp_path, case):
    at, said = CASES[case]
    ran = run(tmp_path, VAE, *at)
    assert (ran.returncode, ran.stderr) == (130 if said else 0, said)
    assert (tmp_path / "run" / "checkpoint.safetensors").exists() == ("--resume" in said or not said)


@pytest.mark.slow
def test_a_signal_at_any_call_of_the_whole_run(tmp_path):
    (tmp_path / "whole").mkdir()
    assert run(tmp_path / "whole", VAE, env={"COUNT": "calls"}, check=True).stderr == ""
    calls, rng = int((tmp_path / "whole" / "calls").read_text()), random.Random(0)
    for number in range(20):
        folder = tmp_path / str(number)
        folder.mkdir()
        at = sorted(rng.randrange(2, calls) for _ in range(rng.choice((1, 2))))
        ran = run(folder, VAE, *((str(n), rng.choice((INT, TERM, HUP))) for n in at))
        assert ran.returncode in (0, 130), ran.stderr
        assert ran.stderr.count("\n") == (ran.returncode != 0), (at, ran.stderr)
        kept = (folder / "run" / "checkpoint.safetensors").exists()
        assert ("--resume" in ran.stderr) == (kept and ran.returncode != 0), (at, ran.stderr)
        command = ["train_vae.py", "--resume", "run", "--quiet"] if kept else VAE
        assert run(folder, command, check=True).stderr == "", at


OTHERS = {
    "polynomial.py --steps 5 --quiet --out run": "polynomial.py:epoch",
    "coarse_gradient.py --steps 5 --quiet --out run": "coarse_gradient.py:descend",
    "measure_gradients.py --images 3 --samples 40 --estimators st-gs --taus 1 --quiet": "measure_gradients.py:rows",
    "evaluate_listops.py nothing nothing": "evaluate_listops.py:restore",
    "draw_curves.py nothing": "run_folder.py:metrics",
    "report.py .": "report.py:read_sweeps",
    "sweep.py nothing": "specification.py:read",
    "bench.py ops": "bench.py:measure",
    "minimal_vae.py": "minimal_vae.py:train",
}


@pytest.mark.slow
@pytest.mark.parametrize("command", OTHERS)
@pytest.mark.parametrize("number", [INT, TERM, HUP])
def test_every_command_ends_in_one_line(tmp_path, command, number):
    name = command.split()[0]
    for at in ("numpy/_core/multiarray.py:<module>", OTHERS[command]):
        ran = run(tmp_path, command.split(), (at, number))
        assert (ran.returncode, ran.stderr) == (130, f"{name}: interrupted.\n")


@pytest.mark.slow
def test_ctrl_c_on_the_terminal_of_a_benchmark_is_one_line(tmp_path):
    """It goes to the contenders, too."""
    command = [sys.executable, str(SCRIPTS / "bench.py"), "ops", "--seconds", "60"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    with pytest.raises(subprocess.TimeoutExpired):
        process.communicate(timeout=3)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate()
    lines = [line for line in err.splitlines() if "not installed" not in line and "left out" not in line]
    assert (process.returncode, out, lines) == (130, "", ["bench.py: interrupted."])


@pytest.mark.slow
def test_a_benchmark_that_is_killed_ends_its_contenders_in_silence(tmp_path):
    command = [sys.executable, str(SCRIPTS / "bench.py"), "ops", "--seconds", "0.3"]
    with open(tmp_path / "err", "w+") as err:
        process = subprocess.Popen(command, stderr=err, stdout=subprocess.PIPE, start_new_session=True)
        with pytest.raises(subprocess.TimeoutExpired):
            process.communicate(timeout=3)
        process.kill()
        process.communicate()  # its contenders have the output, too: until all have ended
        err.seek(0)
        assert "Traceback" not in err.read()


@pytest.mark.slow
@pytest.mark.parametrize("number", [INT, TERM, HUP])
def test_a_signal_that_is_ignored_stays_ignored(tmp_path, number):
    """As under nohup, and as Ctrl-C is for what a script starts with &."""
    at = [
        (where, number) for where in ("numpy/_core/multiarray.py:<module>", "train_vae.py:step", "train_vae.py:final")
    ]
    ran = run(tmp_path, VAE, *at, preexec_fn=lambda: signal.signal(number, signal.SIG_IGN))
    assert (ran.returncode, ran.stderr) == (0, "")


def test_a_program_that_imports_a_command_keeps_its_handlers():
    assert not signals.is_program()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    with signals.Interrupt() as interrupt:
        os.kill(os.getpid(), signal.SIGHUP)
        assert interrupt.requested
        os.kill(os.getpid(), signal.SIGTERM)  # they often come together
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
