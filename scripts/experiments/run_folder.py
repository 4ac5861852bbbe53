"""What every training script needs around its loop: flags from a dataclass, a run folder, errors in one sentence.

A run folder holds `config.json` (all flags, versions, backend and device), `metrics.jsonl` (a line an epoch),
`checkpoint.safetensors` (always whole, see `minigrad.checkpoint`) and the pictures of the script.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import io
import json
import math
import os
import platform
import signal
import sys
import time
from pathlib import Path

import numpy as np

import minigrad
from minigrad import checkpoint
from minigrad.backend import BackendUnavailable

_missing = [name for name in ("matplotlib", "safetensors", "tqdm") if importlib.util.find_spec(name) is None]
if _missing:  # at import: every script imports this module before it imports one of them
    print(
        f"{Path(sys.argv[0]).name}: error: {', '.join(_missing)} not found: pip install -e '.[scripts]'.",
        file=sys.stderr,
    )
    raise SystemExit(2)

try:
    import fcntl
except ImportError:  # Windows: no locks
    fcntl = None

CHECKPOINT, CONFIG, METRICS = "checkpoint.safetensors", "config.json", "metrics.jsonl"


class UserError(Exception):
    """Something the user can mend. The message is one sentence; scripts print it and exit with code 2."""


@contextlib.contextmanager
def user_errors():
    """Turn what bad input raises while a run is set up, or a failing disk, into a UserError."""
    try:
        yield
    except (MemoryError, OverflowError) as error:
        raise UserError(f"this does not fit into memory ({error}): choose smaller sizes.") from error
    except (ValueError, BackendUnavailable) as error:
        raise UserError(str(error)) from error
    except BrokenPipeError as error:
        raise UserError("the standard output was closed.") from error
    except OSError as error:
        raise UserError(f"{error.filename or 'the disk'}: {error.strerror or error}.") from error


def _flush_output() -> None:
    """UserError if what was printed cannot be written; it is then given up, so that Python does not try at its exit."""
    try:
        with user_errors():
            print(end="", flush=True)
    except UserError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise


def report_errors(main):
    """Run `main(argv)`; a UserError becomes a line on standard error and exit code 2."""

    def wrapped(argv=None) -> int:
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="replace")  # where it has no − and no τ
        try:
            code = main(argv) or 0
            _flush_output()
            return code
        except UserError as error:
            print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print(f"{Path(sys.argv[0]).name}: interrupted.", file=sys.stderr)
            return 130

    return wrapped


# ---- flags

DTYPES = ("float32", "float64")


def flag(default, text: str, **argparse_options):
    """A dataclass field that is also a command-line flag with this help text."""
    return dataclasses.field(default=default, metadata={"help": text, **argparse_options})


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message.rstrip('.')}; see --help.")


def parse_flags(config_class, description: str, argv, extra=()):
    """(the flags given, the others), two dicts. `extra`: (name, options) of flags that are not in the configuration.

    Flags that were not given are absent, so that a resumed run can tell "left out" from "given".
    """
    parser = Parser(description=description, allow_abbrev=False)
    fields = dataclasses.fields(config_class)
    for f in fields:
        options = dict(f.metadata)
        text = f"{options.pop('help')} (default: {_shown(f.default)})"
        if type(f.default) is bool:
            options["action"] = "store_true"
        else:
            options.setdefault("type", type(f.default))
        parser.add_argument(option(f.name), default=argparse.SUPPRESS, help=text, **options)
    for name, options in extra:
        parser.add_argument(name, **({"default": argparse.SUPPRESS} | options))
    given = vars(parser.parse_args(argv))
    names = {f.name for f in fields}
    return {k: v for k, v in given.items() if k in names}, {k: v for k, v in given.items() if k not in names}


def _shown(value):
    if value in (None, "", ()):
        return "none"
    return ",".join(map(str, value)) if isinstance(value, tuple) else value


def sizes(text: str) -> tuple[int, ...]:
    """The type of a flag like --hidden 512,256; "none" is the empty list."""
    if text == "none":
        return ()
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers like 512,256") from None


def require(condition: bool, sentence: str) -> None:
    if not condition:
        raise UserError(sentence)


def option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def at_least(least: int, config, *names: str) -> None:
    """UserError for a number below `least`, or not finite; None is left alone."""
    for name in names:
        value = getattr(config, name)
        range_ = f"at least {least}" + (" and finite" if isinstance(value, float) else "")
        require(value is None or least <= value < math.inf, f"{option(name)} must be {range_}, got {value}.")


def one_of(config, **names) -> None:
    """UserError for a flag that is none of the known names.   names: {flag: those that it may be}"""
    for name, known in names.items():
        value = getattr(config, name)
        require(value in known, f"unknown {name} {value!r}; the known ones are {', '.join(filter(None, known))}.")


def unused(config, why: str, *names: str) -> None:
    """UserError for a flag that would have no effect and has another value than its default; `why` is a sentence."""
    for name in names:
        require(getattr(config, name) == getattr(type(config), name), f"{why}: leave {option(name)} out.")


# ---- the folder


def lock(file) -> bool:
    """Lock what is open (a file, or the descriptor of a folder) until it is closed. False if another process has it."""
    try:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        pass
    return True


class RunFolder:
    """A folder for one run. `create` makes it, `resume` opens one that has a checkpoint."""

    def __init__(self, path: Path):
        self.path = path

    @classmethod
    def create(cls, path, config, backend) -> RunFolder:
        path = Path(path)
        require(not path.exists(), f"the output folder {path} exists already: choose another --out.")
        folder = cls(path)
        try:
            path.mkdir(parents=True)
            folder.write_config(config, backend)
        except OSError as error:
            why = error.strerror or error
            raise UserError(f"the output folder {path} cannot be written ({why}): choose another --out.") from error
        return folder

    @contextlib.contextmanager
    def locked(self):
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

    def write_config(self, config, backend) -> None:
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
        checkpoint.write_atomically(self.path / CONFIG, (json.dumps(about, indent=2) + "\n").encode())

    @classmethod
    def resume(cls, path, config_class, given: dict, may_change: set[str]):
        """(folder, config): the stored configuration, which the flags `given` may not contradict."""
        path = Path(path)
        require(path.is_dir(), f"there is no run folder {path}.")
        try:
            stored = json.loads((path / CONFIG).read_text())["config"]
            fields = {f.name: f for f in dataclasses.fields(config_class)}
            stored = {k: tuple(v) if isinstance(v, list) else v for k, v in stored.items()}
            if stored.keys() != fields.keys():
                raise ValueError("it belongs to another program")
            for name, field in fields.items():
                default = field.default
                kind = field.metadata["type"] if default is None else type(default)
                kinds = (int, float) if kind is float else (kind,)  # and true is no number
                fits = type(stored[name]) in kinds or (default is None and stored[name] is None)
                if not fits or (kind is tuple and not all(type(v) is type(default[0]) for v in stored[name])):
                    raise ValueError(f"{name} is {stored[name]!r}")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} is no run folder: its {CONFIG} is missing or damaged ({error}).") from error
        for name, value in given.items():
            if value != stored[name] and name not in may_change:
                raise UserError(
                    f"{path} was made with another configuration ({option(name)} {_shown(stored[name])}, "
                    f"not {_shown(value)}): leave the flag out, or start a new run."
                )
        return cls(path), config_class(**(stored | given))

    def save(self, arrays, info) -> None:
        """Replace the checkpoint. `info` also remembers how long the metrics are, so that a resumed run adds to them
        where this checkpoint stands and not where a later crash happened."""
        metrics = self.path / METRICS
        info = info | {"metrics_bytes": metrics.stat().st_size if metrics.exists() else 0}
        checkpoint.save(self.path / CHECKPOINT, arrays, info)

    def load(self):
        """(arrays, info) of the checkpoint."""
        return checkpoint.load(self.path / CHECKPOINT)

    def rewind_metrics(self, info) -> None:
        """Cut off what was logged after the checkpoint. UserError if what was logged before it is not there, whole."""
        metrics, kept = self.path / METRICS, info["metrics_bytes"]
        size = metrics.stat().st_size if metrics.exists() else 0
        require(
            size >= kept, f"{metrics} is shorter than when the checkpoint was made: restore it, or start a new run."
        )
        self.metrics(kept)
        if size > kept:
            with open(metrics, "r+b") as file:
                file.truncate(kept)

    def log(self, line: dict) -> str:
        """Append one JSON line to the metrics, and have it on the disk before a checkpoint counts on it; returns it."""
        text = json.dumps(line)
        with open(self.path / METRICS, "a") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())
        return text

    def metrics(self, size: int | None = None) -> list[dict]:
        """What was logged (in the first `size` bytes of the file). UserError if it is not lines of JSON."""
        path = self.path / METRICS
        try:
            return [dict(json.loads(line)) for line in path.read_bytes()[:size].splitlines()] if path.exists() else []
        except (ValueError, TypeError) as error:
            raise UserError(f"{path} is damaged ({error}): restore it, or start a new run.") from error


def default_folder(*parts) -> Path:
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

    def __enter__(self):
        self._before = {s: signal.signal(s, self._handle) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _handle(self, *_):
        self.requested = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def __exit__(self, *_):
        for s, handler in self._before.items():
            signal.signal(s, handler)
