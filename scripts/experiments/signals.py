"""Ctrl-C, SIGTERM and SIGHUP end a command in order: one line, no traceback, exit code 130.

`start` imports this file before anything else. From then on

    during the imports        a signal ends the process at once: an exception that is raised there can come out of an
                              extension module as an ImportError, with a traceback
    in `errors.command`       it raises KeyboardInterrupt, and a second one ends the process at once
    in `Interrupt`            the first one is a request, to stop where nothing is lost
    after the command         it only makes the end come sooner

All this is for a command that is the program. Who imports one keeps the handlers of the own program, but for the time
of an `Interrupt`. What is ignored when the program begins, as SIGHUP is under nohup, stays so.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
from collections.abc import Callable
from typing import Any, Self

CODE = 130  # of a command that was interrupted, as shells have it after Ctrl-C
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]

kept = "."  # what is said behind "interrupted": how to go on, or that nothing was kept


def is_program() -> bool:
    """Is a file of scripts/ what Python runs?"""
    import __main__  # which changes, under runpy

    main = getattr(__main__, "__file__", None)
    scripts = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
    return bool(main) and os.path.realpath(main).startswith(scripts + os.sep)


def leave(*_: object) -> None:
    """End at once, with a line. It goes to the descriptor: the signal may have come while sys.stderr was at work."""
    try:
        os.write(2, f"{os.path.basename(sys.argv[0])}: interrupted{kept}\n".encode(errors="replace"))
    finally:
        os._exit(CODE)


def interrupt(_: int, frame: Any) -> None:
    handle(leave)
    while frame:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":  # of a library that is imported when it is used
            leave()
        frame = frame.f_back
    raise KeyboardInterrupt


def overlook(*_: object) -> None:
    """A handler for when the last line is said, so that it is said once. Python reports a signal that comes just before
    SIG_IGN is set."""


def end_with(code: int) -> Callable[..., None]:
    """A handler for when all has been said and done."""
    return lambda *_: os._exit(code)


def handle(handler: Callable[..., None] | signal.Handlers) -> None:
    """Have the program's signals handled so from now on."""
    for number in _handled:
        signal.signal(number, handler)


def _unraisable(error: Any) -> None:
    """A signal during a __del__, where Python would print the exception and go on."""
    if error.exc_type is KeyboardInterrupt and _handled:
        leave()
    sys.__unraisablehook__(error)


_known = (signal.SIG_DFL, signal.default_int_handler)
_handled = [number for number in SIGNALS if is_program() and signal.getsignal(number) in _known]
handle(leave)
if _handled:
    sys.unraisablehook = _unraisable
    atexit.register(handle, signal.SIG_IGN)  # the last one of them; after it Python would let signals kill the process


class Interrupt:
    """While active, the first signal only sets `requested`. After it Ctrl-C interrupts as usual, and the others, which
    often come together, do nothing more. In a thread there is nothing to handle: Python gives signals to the first one.
    """

    requested = False

    def __enter__(self) -> Self:
        self._before = {}
        for number in SIGNALS:
            before = signal.getsignal(number)
            if before not in (signal.SIG_IGN, None):
                try:
                    signal.signal(number, self._handle)
                except ValueError:  # in a thread
                    break
                self._before[number] = before
        return self

    def _handle(self, *_: object) -> None:
        self.requested = True
        signal.signal(signal.SIGINT, self._before.get(signal.SIGINT, signal.SIG_IGN))

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
