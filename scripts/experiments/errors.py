"""Two kinds of errors, never mixed.

What a person gave (a flag, a file, a device, an estimator's name) is one sentence that says what to do, and exit code
2: a `UserError`, raised where it enters. What a programmer did wrong (an error in a rule, a shape in a model) is a
traceback, always: who studies a derivation and gets it wrong needs nothing more. So nothing here catches an exception
that a model, an estimator or a rule could have raised; `user_errors` stands around single calls that check what a
person gave.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from . import signals, start


class UserError(Exception):
    """Something the user can mend. The message is one sentence; commands print it and exit with code 2."""

    def __str__(self) -> str:
        return " ".join(super().__str__().splitlines())  # a name in it can have several lines


def require(condition: object, sentence: str) -> None:
    """UserError with the sentence unless the condition holds."""
    if not condition:
        raise UserError(sentence)


@contextlib.contextmanager
def user_errors(*kinds: type[Exception], file: Path | None = None) -> Iterator[None]:
    """Exceptions of these kinds become UserErrors with the same message: around one call that checks what was given.

    file: what it came from, which the message then names.
    """
    try:
        yield
    except kinds as error:
        raise UserError(f"{file} cannot be used: {error}" if file else str(error)) from error


@contextlib.contextmanager
def size_errors() -> Iterator[None]:
    """What is too large for the memory, while something is built whose sizes a person gave."""
    try:
        yield
    except (MemoryError, OverflowError) as error:
        why = f" ({error})" if str(error) else ""
        raise UserError(f"this does not fit into memory{why}: choose smaller sizes.") from error


@contextlib.contextmanager
def disk_errors(file: Path | None = None) -> Iterator[None]:
    """What a file system refuses: a full disk, a name that is too long, a folder without permission.

    file: what is written; for a full disk Python does not say it
    """
    try:
        yield
    except OSError as error:
        raise UserError(f"{error.filename or file or 'the disk'}: {error.strerror or error}.") from error


def command(main: Callable[..., int | None]) -> Callable[..., int]:
    """Run `main(argv)` as a command: a UserError is a line on standard error and exit code 2, a signal exit code 130.

    Every other exception goes its way, with its traceback.
    """

    @functools.wraps(main)
    def wrapped(argv: list[str] | None = None) -> int:
        signals.kept = "."
        try:
            try:
                signals.handle(signals.interrupt)
                code, said = _run(main, argv), ""
            except (UserError, start.OutputError) as error:
                code, said = 2, f"error: {error}"
            signals.handle(signals.overlook)
        except KeyboardInterrupt:
            code, said = signals.CODE, f"interrupted{signals.kept}"
            signals.handle(signals.overlook)
        if said:
            print(f"{Path(sys.argv[0]).name}: {said}", file=sys.stderr)
        signals.handle(signals.end_with(code))
        return code

    return wrapped


def _run(main: Callable[..., int | None], argv: list[str] | None) -> int:
    try:
        code = main(argv) or 0
    except SystemExit:  # after --help
        sys.stdout.flush()
        raise
    print(end="", flush=True)
    return code
