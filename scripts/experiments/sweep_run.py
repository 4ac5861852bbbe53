"""One run of a sweep, in a process of its own. scripts/sweep.py starts it, here or on a worker of a cluster.

    python scripts/experiments/sweep_run.py '{"script": "train_vae", "folder": ..., "config": {...}, ...}'

A folder without a usable checkpoint is begun anew, one with a checkpoint is resumed, one with a result is left alone.
The result is written last and in one step, so that a folder has all of it or none. A lock keeps two processes from
working in one folder, for example when a cluster takes a worker for dead that is not. The process saves and stops when
the sweep asks for it by a file, when whoever started it has gone, so that its standard input ends, and, for a sweep on
another machine, when that has not touched its file for a while.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

if __name__ == "__main__":  # before anything heavy is imported
    if sys.argv[1:] in (["-h"], ["--help"]):
        sys.exit(print(__doc__))
    try:
        task = json.loads(sys.argv[1])
        stopped = os.path.exists(task["stop"])
        _ = [task[name] for name in ("script", "folder", "lock", "alive", "config")]
    except (IndexError, ValueError, KeyError, TypeError, RecursionError):
        print("sweep_run.py: error: it is started by sweep.py, with a run as JSON; see --help.", file=sys.stderr)
        sys.exit(2)
    if stopped:
        sys.exit(130)
    for variable in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(variable, "1")  # one run, one core; NumPy looks at it when it is loaded

from experiments.start import before_numpy

before_numpy()

import contextlib
import shutil
import signal
import socket
import threading
import time

from experiments.errors import command, disk_errors
from experiments.flags import read_values
from experiments.loop import begin, resume
from experiments.results import RESULT, check_folder
from experiments.run_folder import CHECKPOINT, CONFIG, RunFolder, lock
from experiments.specification import as_json, load_experiment
from minigrad import checkpoint

LOOK_EVERY = 0.25  # seconds
PATIENCE = 120.0  # seconds that a sweep may be silent for


@contextlib.contextmanager
def locked(path: Path):
    """Hold the lock file for the time of the run; wait if another process has it. It says who is at work."""
    with disk_errors():
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a")  # noqa: SIM115 (closed below; what goes wrong in between is not the disk's)
    with file:
        while not lock(file):
            time.sleep(LOOK_EVERY)
        try:
            file.truncate(0)
            file.write(f"{socket.gethostname()}:{os.getpid()}")
            file.flush()
            yield
        finally:
            file.truncate(0)


def watch_input() -> None:
    """Interrupt this process when its standard input ends: see `executors`."""
    os.read(0, 1)
    os.kill(os.getpid(), signal.SIGTERM)


def watch(stop: str, alive: str) -> None:
    """Interrupt this process when the file `stop` appears, or `alive`, if there is one, is not touched for PATIENCE
    seconds. Only its own times are compared: clocks differ between machines."""
    touched, since = 0.0, time.monotonic()
    while not os.path.exists(stop) and (not alive or time.monotonic() - since < PATIENCE):
        time.sleep(LOOK_EVERY)
        with contextlib.suppress(OSError):
            if alive and os.stat(alive).st_mtime != touched:
                touched, since = os.stat(alive).st_mtime, time.monotonic()
    os.kill(os.getpid(), signal.SIGTERM)


def perform(script: str, folder: Path, values: dict) -> int:
    """Do what is left to do of the run, and write its result. -> the exit code, 0 if all is done

    values: the complete configuration, as JSON has it
    """
    begun = time.perf_counter()
    experiment = load_experiment(script)
    config = experiment.config_class(**read_values(experiment.config_class, values))
    has = check_folder(folder, as_json(config))
    if has == "result":
        return 0
    if has:
        try:
            checkpoint.load(folder / CHECKPOINT)
        except checkpoint.CheckpointError:
            has = ""
    if has:
        code = resume(experiment, folder, {"data_dir": config.data_dir} if config.data_dir else {}, quiet=True)
    else:
        shutil.rmtree(folder, ignore_errors=True)
        code = begin(experiment, config, folder, quiet=True)
    if code:
        return code
    with disk_errors():
        about = json.loads((folder / CONFIG).read_bytes())
    final = {k: v for line in RunFolder(folder).metrics() for k, v in line.items()}
    result = {"script": script, "config": as_json(config), "metrics": final}
    result |= {"seconds": round(time.perf_counter() - begun, 2), "resumed": bool(has)}
    result |= {k: v for k, v in about.items() if k != "config"}
    with disk_errors():
        checkpoint.write_atomically(folder / RESULT, (json.dumps(result, indent=2) + "\n").encode())
    return 0


@command
def main(argv=None) -> int:
    # outside of a training, too, a request to stop ends the run in order: the lock is emptied
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    threading.Thread(target=watch_input, daemon=True).start()
    threading.Thread(target=watch, args=(task["stop"], task["alive"]), daemon=True).start()
    sys.argv[0] = f"{task['script']}.py"  # whose errors they are
    with locked(Path(task["lock"])):
        return perform(task["script"], Path(task["folder"]), task["config"])


if __name__ == "__main__":
    sys.exit(main())
