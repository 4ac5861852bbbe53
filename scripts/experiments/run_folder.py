"""The folder of one run: `config.json` (all flags, versions, backend and device), `metrics.jsonl` (a line an epoch),
`checkpoint.safetensors` (always whole, see `minigrad.checkpoint`) and the pictures of the command.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import platform
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import numpy as np

import minigrad
from minigrad import checkpoint
from minigrad.backend import Backend
from minigrad.checkpoint import CheckpointError

from .errors import UserError, disk_errors, require, user_errors
from .flags import option, read_values, shown

try:
    import fcntl
except ImportError:  # Windows: no locks
    fcntl = None  # type: ignore[assignment]

CHECKPOINT, CONFIG, METRICS = "checkpoint.safetensors", "config.json", "metrics.jsonl"


def lock(file: Any) -> bool:
    """Lock what is open (a file, or the descriptor of a folder) until it is closed. False if another process has it."""
    try:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        pass
    return True


def read_config(path: Path, config_class: type) -> Any:
    """The complete configuration in a run folder. UserError if it is no run folder of this program."""
    try:
        stored = json.loads((path / CONFIG).read_text())["config"]
        names = {f.name for f in dataclasses.fields(config_class)}
        require(isinstance(stored, dict) and stored.keys() == names, "it belongs to another program")
        return config_class(**read_values(config_class, stored))
    except (OSError, ValueError, KeyError, TypeError, UserError) as error:
        why = str(error).rstrip(".")
        raise UserError(f"{path} is no run folder: its {CONFIG} is missing or damaged ({why}).") from error


class RunFolder:
    """A folder for one run. `create` makes it, `resume` opens one that has a checkpoint."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path)

    @classmethod
    def create(cls, path: Path, config: Any, backend: Backend) -> Self:
        path = Path(path)
        check_new(path)
        folder = cls(path)
        try:
            path.mkdir(parents=True)
            folder.write_config(config, backend)
        except (OSError, UserError) as error:
            why = getattr(error, "strerror", None) or error
            raise UserError(f"the output folder {path} cannot be written ({why}): choose another --out.") from error
        return folder

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder for the time of a run. UserError if another process does: their metrics would be mixed."""
        if not fcntl:
            yield
            return
        folder = os.open(self.path, os.O_RDONLY)
        try:
            require(lock(folder), f"another process is at work in {self.path}: wait until it has ended, or stop it.")
            yield
        finally:
            os.close(folder)

    def write_config(self, config: Any, backend: Backend) -> None:
        """Record all flags, and what they ran on."""
        about = {
            "config": dataclasses.asdict(config),
            "minigrad": minigrad.__version__,
            "python": platform.python_version(),
            "numpy": np.__version__,
            "backend": backend.name,
            "backend_version": backend.version,
            "device": backend.device,
        }
        with disk_errors():
            checkpoint.write_atomically(self.path / CONFIG, (json.dumps(about, indent=2) + "\n").encode())

    @classmethod
    def resume(cls, path: Path, config_class: type, given: dict[str, Any], may_change: tuple[str, ...]):
        """(folder, config): the stored configuration, which the flags `given` may not contradict."""
        path = Path(path)
        with disk_errors():
            require(path.is_dir(), f"there is no run folder {path}.")
        stored = read_config(path, config_class)
        for name, value in given.items():
            before = getattr(stored, name)
            require(
                value == before or name in may_change,
                f"{path} was made with another configuration ({option(name)} {shown(before)}, not {shown(value)}): "
                "leave the flag out, or start a new run.",
            )
        return cls(path), dataclasses.replace(stored, **given)

    def save(self, arrays: dict[str, np.ndarray], info: dict[str, Any]) -> None:
        """Replace the checkpoint. `info` also remembers how long the metrics are, so that a resumed run adds to them
        where this checkpoint stands and not where a later crash happened."""
        metrics = self.path / METRICS
        info = info | {"metrics_bytes": metrics.stat().st_size if metrics.exists() else 0}
        with disk_errors():
            checkpoint.save(self.path / CHECKPOINT, arrays, info)

    def load(self, name: str = CHECKPOINT) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """(arrays, info) of the checkpoint, or of another one in the folder. UserError if it is missing or damaged."""
        with user_errors(CheckpointError), disk_errors():
            return checkpoint.load(self.path / name)

    def rewind_metrics(self, info: dict[str, Any]) -> None:
        """Cut off what was logged after the checkpoint. UserError if what was logged before it is not there, whole."""
        metrics, kept = self.path / METRICS, info["metrics_bytes"]
        size = metrics.stat().st_size if metrics.exists() else 0
        require(
            size >= kept, f"{metrics} is shorter than when the checkpoint was made: restore it, or start a new run."
        )
        self.metrics(kept)
        if size > kept:
            with disk_errors(), open(metrics, "r+b") as file:
                file.truncate(kept)

    def log(self, line: dict[str, Any]) -> str:
        """Append one JSON line to the metrics, and have it on the disk before a checkpoint counts on it; returns it."""
        text = json.dumps(line)
        with disk_errors(), open(self.path / METRICS, "a") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())
        return text

    def metrics(self, size: int | None = None) -> list[dict[str, Any]]:
        """What was logged (in the first `size` bytes of the file). UserError if it is not lines of JSON."""
        path = self.path / METRICS
        try:
            return [dict(json.loads(line)) for line in path.read_bytes()[:size].splitlines()] if path.exists() else []
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"{path} is damaged ({error}): restore it, or start a new run.") from error


def check_new(path: Path) -> None:
    """UserError if it exists, or lies below a file."""
    require(not path.exists(), f"the output folder {path} exists already: choose another --out.")
    base = next(parent for parent in path.parents if parent.exists())
    require(base.is_dir(), f"the output folder {path} cannot be written ({base} is no folder): choose another --out.")


def default_folder(*parts: object) -> Path:
    """runs/PART-PART-…-date-time, a name that is not taken."""
    base = Path("runs") / "-".join([*map(str, parts), time.strftime("%Y%m%d-%H%M%S")]).replace("/", "_")
    path, n = base, 1
    while path.exists():
        n += 1
        path = base.with_name(f"{base.name}-{n}")
    return path


class Interrupt:
    """While active, the first Ctrl-C (or a SIGTERM) only sets `requested`; the second one interrupts as usual."""

    requested = False

    def __enter__(self) -> Self:
        self._before = {s: signal.signal(s, self._handle) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _handle(self, *_: object) -> None:
        self.requested = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def __exit__(self, *_: object) -> None:
        for s, handler in self._before.items():
            signal.signal(s, handler)
