"""The folder of one run: `config.json` (all flags, versions, backend and device), `metrics.jsonl` (a line an epoch),
`checkpoint.safetensors` (always whole, see `minigrad.checkpoint`) and the pictures of the command.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import logging
import os
import platform
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import numpy as np

from minigrad import checkpoint
from minigrad.backend import Backend
from minigrad.checkpoint import CheckpointError

from .environment import environment
from .errors import UserError, disk_errors, require, user_errors
from .flags import option, read_values, shown

try:
    import fcntl
except ImportError:  # Windows: no locks
    fcntl = None  # type: ignore[assignment]

log = logging.getLogger(__name__)

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


def read_file(path: Path) -> bytes:
    """What a file of a run holds. OSError for a pipe, which would be waited for, or a device, which may never end."""
    if path.exists() and not path.is_file():
        raise OSError(f"{path.name} is no file")
    return path.read_bytes()


def read_config(path: Path, config_class: type) -> tuple[Any, dict[str, Any]]:
    """(the configuration in a run folder, all that stands beside it). UserError if it is of another program."""
    try:
        about = json.loads(read_file(path / CONFIG))
        stored = about["config"]
        names = {f.name for f in dataclasses.fields(config_class)}
        require(isinstance(stored, dict) and stored.keys() == names, "it belongs to another program")
        return config_class(**read_values(config_class, stored)), about
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError, UserError) as error:
        why = str(error).rstrip(".")
        raise UserError(f"{path} is no run folder: its {CONFIG} is missing or damaged ({why}).") from error


class RunFolder:
    """A folder for one run. `create` makes it, `resume` opens one that has a checkpoint."""

    def __init__(self, path: Path, about: dict[str, Any] | None = None) -> None:
        self.path, self.about = Path(path), about or {}
        self.logged: int | None = None  # how many lines of the metrics are this run's; None for all
        self.checksum = 0  # of those lines
        self.rewound = False  # are there others behind them?

    @classmethod
    @contextlib.contextmanager
    def create(cls, path: Path, config: Any, backend: Backend, numbered: bool = False) -> Iterator[Self]:
        """Make the folder, and hold it for the time of a run. If that ends before it has kept anything, the folder
        goes away again, so that the same command works once more.

        numbered: where another run has just made it, take the next of path-2, path-3, …   Else UserError.
        """
        made = [parent for parent in path.parents if not parent.exists()]
        try:
            path, is_new = _make(path, numbered)
        except OSError as error:
            raise UserError(cannot_be_written(path, error.strerror)) from error
        folder = cls(path)
        with folder.locked():
            with disk_errors():
                require(_is_free(path), f"the output folder {path} exists already: choose another --out.")
            try:
                folder.logged = 0
                folder.record(config, backend)
                yield folder
            except BaseException:
                folder.remove_unless_begun([path, *made] if is_new else [])
                raise

    def remove_unless_begun(self, made: list[Path]) -> None:
        """Remove the folders that were made, the inner one first, unless one holds more than a configuration."""
        with contextlib.suppress(OSError):
            if _is_free(self.path):
                for file in self.path.iterdir():
                    file.unlink()
                for folder in made:
                    folder.rmdir()

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder for the time of a run. UserError if another process does: their metrics would be mixed."""
        if not fcntl:
            yield
            return
        with disk_errors():
            folder = os.open(self.path, os.O_RDONLY)
        try:
            require(lock(folder), f"another process is at work in {self.path}: wait until it has ended, or stop it.")
            yield
        finally:
            os.close(folder)

    def record(self, config: Any, backend: Backend, at: dict[str, int] | None = None) -> None:
        """Write down all flags, and what the run is done with.

        at: where a resumed run stands. If it was done with something else until there, that is said, and kept.
        """
        now, earlier = environment(backend), self.about.get("earlier", [])
        before = {name: self.about[name] for name in now if self.about.get(name, now[name]) != now[name]}
        if before:
            changes = ", ".join(f"{name} was {value} and is {now[name]}" for name, value in before.items())
            log.warning("%s goes on, but not bit for bit: %s.", self.path, changes)
            earlier = [*(earlier if isinstance(earlier, list) else []), {"until": at, **before}]
        about = {"config": dataclasses.asdict(config), "python": platform.python_version(), **now}
        self.about = about | ({"earlier": earlier} if earlier else {})
        with disk_errors(self.path / CONFIG):
            checkpoint.write_atomically(self.path / CONFIG, (json.dumps(self.about, indent=2) + "\n").encode())

    @classmethod
    def resume(cls, path: Path, config_class: type, given: dict[str, Any], may_change: tuple[str, ...]):
        """(folder, config): the stored configuration, which the flags `given` may not contradict."""
        path = Path(path)
        with disk_errors():
            require(path.is_dir(), f"there is no run folder {path}.")
        stored, about = read_config(path, config_class)
        for name, value in given.items():
            before = getattr(stored, name)
            require(
                value == before or name in may_change,
                f"{path} was made with another configuration ({option(name)} {shown(before)}, not {shown(value)}): "
                "leave the flag out, or start a new run.",
            )
        return cls(path, about), dataclasses.replace(stored, **given)

    def check_writable(self) -> None:
        """UserError if what a run changes cannot be changed: now, and not after an epoch."""
        require(os.access(self.path, os.W_OK | os.X_OK), f"the run folder {self.path} cannot be written.")
        own = {name + end for name in (CONFIG, CHECKPOINT, METRICS) for end in ("", ".part")}
        with disk_errors():
            for file in self.path.iterdir():
                fits = file.is_file() or not file.exists() or (file.is_dir() and file.name not in own)
                require(fits, f"{file} is no file, where the run needs one: move it.")

    def save(self, arrays: dict[str, np.ndarray], info: dict[str, Any]) -> None:
        """Replace the checkpoint. `info` also remembers the lines of the metrics, so that a resumed run adds to them
        where this checkpoint stands and not where a later crash happened."""
        info = info | {"metrics_lines": self.logged, "metrics_crc32": self.checksum}
        with disk_errors(self.path / CHECKPOINT):
            checkpoint.save(self.path / CHECKPOINT, arrays, info)

    def load(self, name: str = CHECKPOINT) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """(arrays, info) of the checkpoint, or of another one in the folder. UserError if it is missing or damaged."""
        with user_errors(CheckpointError), disk_errors():
            return checkpoint.load(self.path / name)

    def rewind(self, info: dict[str, Any]) -> None:
        """Only what was logged before the checkpoint counts. UserError if that is not there as it was.

        The file is left as it is until the next `log`: should the run never come so far, nothing is lost.
        """
        path = self.path / METRICS
        with disk_errors():
            bytes_ = info.get("metrics_bytes")  # of older versions
            kept = info["metrics_lines"] if bytes_ is None else len(self._lines(bytes_))
        self.logged, self.rewound = kept, True
        lines = self.metrics()
        for line in lines:
            self.checksum = zlib.crc32(json.dumps(line).encode(), self.checksum)
        same = self.checksum == info.get("metrics_crc32", self.checksum)
        why = "shorter than" if len(lines) < kept else "" if same else "not as it was"
        require(not why, f"{path} is {why} when the checkpoint was made: restore it, or start a new run.")

    def log(self, line: dict[str, Any]) -> str:
        """Append one JSON line to the metrics, and have it on the disk before a checkpoint counts on it; returns it."""
        text, path = json.dumps(line), self.path / METRICS
        with disk_errors(path):
            if self.rewound:
                data = b"".join(kept + b"\n" for kept in [*self._lines()[: self.logged], text.encode()])
                checkpoint.write_atomically(path, data)
            else:
                with open(path, "a") as file:
                    file.write(text + "\n")
                    file.flush()
                    os.fsync(file.fileno())
        if self.logged is not None:
            self.logged, self.checksum = self.logged + 1, zlib.crc32(text.encode(), self.checksum)
        self.rewound = False
        return text

    def metrics(self) -> list[dict[str, Any]]:
        """What was logged. UserError if it is not lines of JSON."""
        path = self.path / METRICS
        try:
            return [dict(json.loads(line)) for line in self._lines()[: self.logged]]
        except (OSError, ValueError, TypeError, RecursionError) as error:
            raise UserError(f"{path} is damaged ({error}): restore it, or start a new run.") from error

    def _lines(self, size: int | None = None) -> list[bytes]:
        """The lines of the metrics that begin in the first `size` bytes. A last one without its end was not written."""
        path = self.path / METRICS
        data = read_file(path) if path.exists() else b""
        return data[: data.rfind(b"\n") + 1][:size].splitlines()


def _is_free(path: Path) -> bool:
    """Is the folder empty, but for what a run leaves that is killed before its first checkpoint?"""
    names = {file.name for file in path.iterdir()}
    own = {CONFIG, *(f"{name}.part" for name in (CONFIG, CHECKPOINT, METRICS))}
    return names <= own and (CONFIG not in names or b'"minigrad":' in read_file(path / CONFIG))


def _make(path: Path, numbered: bool) -> tuple[Path, bool]:
    """(the folder, was it made?)"""
    path.parent.mkdir(parents=True, exist_ok=True)
    found, n = path, 1
    while True:
        try:
            found.mkdir()
            return found, True
        except FileExistsError:
            if not numbered:
                return found, False
        n += 1
        found = path.with_name(f"{path.name}-{n}")


def cannot_be_written(path: Path, why: object) -> str:
    return f"the output folder {path} cannot be written ({why}): choose another --out."


def new_folder(out: str | None, *parts: object) -> Path:
    """Where the results go: `out`, or runs/PART-PART-…-date-time. UserError if it cannot be made.

    For before anything is computed, and before data are read; `RunFolder.create` then makes it.
    """
    name = "-".join([*map(str, parts), time.strftime("%Y%m%d-%H%M%S")]).replace("/", "_")
    path = Path(out or Path("runs") / name)
    with disk_errors():
        taken = path.exists() and not (path.is_dir() and _is_free(path))
        require(not (out and taken), f"the output folder {path} exists already: choose another --out.")
        base = next(folder for folder in (path, *path.parents) if folder.exists())
    require(base.is_dir(), cannot_be_written(path, f"{base} is no folder"))
    require(os.access(base, os.W_OK | os.X_OK), cannot_be_written(path, os.strerror(errno.EACCES)))
    return path
