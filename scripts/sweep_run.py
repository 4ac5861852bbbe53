"""One run of a sweep, in a process of its own. scripts/sweep.py starts it, here or on a worker of a cluster.

    python scripts/sweep_run.py '{"script": "train_vae", "folder": ..., "flags": [...], "config": {...}, ...}'

A folder without a usable checkpoint is begun anew, one with a checkpoint is resumed, one with a result is left alone.
The result is written last and in one step, so that a folder has all of it or none. A lock keeps two processes from
working in one folder, for example when a cluster takes a worker for dead that is not. The process saves and stops when
the sweep asks for it by a file, or when whoever started it has gone.
"""

from __future__ import annotations

import json
import os
import sys

if __name__ == "__main__":  # before anything heavy is imported
    if sys.argv[1:] in (["-h"], ["--help"]):
        sys.exit(print(__doc__))
    try:
        task = json.loads(sys.argv[1])
        stopped = os.path.exists(task["stop"])
    except (IndexError, ValueError, KeyError, TypeError):
        print("sweep_run.py: error: it is started by sweep.py, with a run as JSON; see --help.", file=sys.stderr)
        sys.exit(2)
    if stopped:
        sys.exit(130)
    for variable in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(variable, "1")  # one run, one core; NumPy looks at it when it is loaded

import contextlib
import shutil
import signal
import socket
import threading
import time
from pathlib import Path

from experiments.run_folder import CHECKPOINT, CONFIG, RunFolder, UserError, lock, report_errors, require, user_errors
from experiments.specification import load_script, without_path_flags
from minigrad import checkpoint

RESULT = "result.json"
LOOK_EVERY = 0.25  # seconds


def read_result(folder: Path) -> dict | None:
    """What a finished run left, None where there is no result. UserError if it is damaged."""
    path = folder / RESULT
    try:
        result = json.loads(path.read_bytes())
        if not (isinstance(result["config"], dict) and isinstance(result["metrics"], dict)):
            raise TypeError("it has no configuration or no metrics")
        return result
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}).") from error


def check_folder(folder: Path, config: dict) -> str:
    """What a folder holds: "" nothing usable, "checkpoint" or "result". UserError, and nothing is touched, if it is of
    another configuration or no run folder."""
    if not folder.exists():
        return ""
    try:
        stored = json.loads((folder / CONFIG).read_bytes())["config"]
        differ = sorted(k for k in stored.keys() | config.keys() if stored.get(k) != config.get(k))
    except FileNotFoundError:
        rest = [p.name for p in folder.iterdir() if p.suffix != ".part"]  # a run was killed while it made the folder
        require(not rest, f"{folder} is no run folder, since it has no {CONFIG}: move it, or choose another --out.")
        return ""
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{folder} is no run folder: its {CONFIG} is damaged ({error}): move it, or choose another --out."
        ) from error
    differ = without_path_flags(dict.fromkeys(differ))
    require(
        not differ,
        f"{folder} has a run of another configuration ({', '.join(differ)} differ): move it, or choose another --out.",
    )
    with contextlib.suppress(UserError):
        result = read_result(folder)
        if result and without_path_flags(result["config"]) == without_path_flags(
            config
        ):  # else it was copied from elsewhere
            return "result"
    return "checkpoint" if (folder / CHECKPOINT).exists() else ""


@contextlib.contextmanager
def locked(path: Path):
    """Hold the lock file for the time of the run; wait if another process has it. It says who is at work."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        while not lock(file):
            time.sleep(LOOK_EVERY)
        try:
            file.truncate(0)
            file.write(f"{socket.gethostname()}:{os.getpid()}")
            file.flush()
            yield
        finally:
            file.truncate(0)


def watch(stop: Path, parent: int) -> None:
    """Interrupt this process when the file `stop` appears or the process `parent` has ended."""
    while not stop.exists() and os.getppid() == parent:
        time.sleep(LOOK_EVERY)
    os.kill(os.getpid(), signal.SIGTERM)


def perform(script: str, folder: Path, config: dict, flags: list[str], places: list[str]) -> int:
    """Do what is left to do of the run, and write its result. -> the exit code of the script, 0 if all is done"""
    start = time.perf_counter()
    has = check_folder(folder, config)
    if has == "result":
        return 0
    if has:
        try:
            checkpoint.load(folder / CHECKPOINT)
        except checkpoint.CheckpointError:
            has = ""
    if not has:
        shutil.rmtree(folder, ignore_errors=True)
    where = ["--resume", str(folder)] if has else ["--out", str(folder), *flags]
    code = load_script(script).main([*where, *places, "--quiet"])
    if code:
        return code
    about = json.loads((folder / CONFIG).read_bytes())
    final = {k: v for line in RunFolder(folder).metrics() for k, v in line.items()}
    result = {"script": script, "config": config, "metrics": final}
    result |= {"seconds": round(time.perf_counter() - start, 2), "resumed": bool(has)}
    result |= {k: v for k, v in about.items() if k != "config"}
    checkpoint.write_atomically(folder / RESULT, (json.dumps(result, indent=2) + "\n").encode())
    return 0


@report_errors
def main(argv=None) -> int:
    # outside of a script's training, too, a request to stop ends the run in order: the lock is emptied
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    threading.Thread(target=watch, args=(Path(task["stop"]), os.getppid()), daemon=True).start()
    sys.argv[0] = f"{task['script']}.py"  # whose errors they are
    with user_errors(), locked(Path(task["lock"])):
        return perform(task["script"], Path(task["folder"]), task["config"], task["flags"], task["places"])


if __name__ == "__main__":
    sys.exit(main())
