"""What a command does before it imports NumPy. This file needs nothing but the standard library.

    sys.path.insert(0, …)                # the folder of the command, which Python leaves out under PYTHONSAFEPATH
    from experiments.start import before_numpy

    before_numpy()

From the import on, signals end the program in order (`signals`), and its streams can be written to, whatever it was
given: one that is closed is the null device. What standard error does not take is dropped, since no message changes how
a program ends. What standard output does not take is an OutputError: a result would be lost.

OpenBLAS, which NumPy's wheels contain, chooses its kernels by the processor's model number and falls back to those for
AVX2 on models it does not know. AMD's Zen 5 is one of them (OpenBLAS 0.3.31): its matrix products run about 1.5 times
as fast with the AVX-512 kernels. The choice can be set in the environment, but only before NumPy is loaded. A value
that the user set is left alone.
"""

from __future__ import annotations

from . import signals  # first: a signal during the other imports shall be a line, too

# isort: split
import importlib.util
import io
import os
import sys
from typing import Any

KERNELS = "OPENBLAS_CORETYPE"
LIBRARIES = ("matplotlib", "minigrad", "numpy", "safetensors", "scipy", "tqdm")
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of malloc.h; 32 MiB is the most that glibc takes for the latter
_AVX512 = {"avx512f", "avx512cd", "avx512bw", "avx512dq", "avx512vl"}
_ZEN5 = 26  # the family number of Zen 5; OpenBLAS knows Zen 1 to 4 (23 to 25)


class OutputError(Exception):
    """A result cannot be printed. For `errors.command` it is as a UserError."""


class Output(io.FileIO):
    """Standard output or standard error of the program."""

    def write(self, data: Any) -> int | None:
        try:
            return super().write(data)
        except OSError as error:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())  # it is said once, and not again at the exit
            if self.fileno() == 1:
                why = "was closed" if isinstance(error, BrokenPipeError) else f"cannot be written ({error.strerror})"
                raise OutputError(f"the standard output {why}.") from error
            return len(data)


def open_streams() -> None:
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:  # else the next file gets the number of the stream, and what is printed
            os.set_inheritable(number := os.open(os.devnull, os.O_RDWR), True)
            setattr(sys, name, open(number, "w" if number else "r", closefd=False))  # noqa: SIM115 (it stays open)
    for name, errors in (("stdout", "replace"), ("stderr", "backslashreplace")):  # where there is no − and no τ
        given = getattr(sys, name)
        if isinstance(getattr(given.buffer, "raw", given.buffer), io.FileIO):  # no console of Windows
            raw, lines = Output(given.fileno(), "w", closefd=False), given.line_buffering or given.write_through
            buffer = io.BufferedWriter(raw)
            setattr(sys, name, io.TextIOWrapper(buffer, given.encoding, errors, "\n", line_buffering=lines))


if signals.is_program():
    open_streams()
    os.environ["MPLBACKEND"] = "agg"  # Jupyter names its own one, which need not be installed here


def before_numpy() -> None:
    """Check that the libraries of the scripts are there (else exit code 2, one sentence), and choose BLAS's kernels."""
    missing = [name for name in LIBRARIES if importlib.util.find_spec(name) is None]
    if missing:
        name = os.path.basename(sys.argv[0])
        print(f"{name}: error: {', '.join(missing)} not found: pip install -e '.[scripts]'.", file=sys.stderr)
        raise SystemExit(2)
    choose_kernels()


def choose_kernels() -> None:
    """Set the variable where it helps and can still have an effect."""
    if KERNELS in os.environ or "numpy" in sys.modules or not sys.platform.startswith("linux"):
        return
    try:
        with open("/proc/cpuinfo") as file:
            kernels = kernels_for(file.read())
    except (OSError, ValueError):
        return
    if kernels:
        os.environ[KERNELS] = kernels


def kernels_for(cpuinfo: str) -> str | None:
    """The value for OPENBLAS_CORETYPE on a machine with this /proc/cpuinfo; None to leave the choice to OpenBLAS."""
    first = dict(line.split(":", 1) for line in cpuinfo.split("\n\n")[0].splitlines() if ":" in line)
    about = {key.strip(): value.strip() for key, value in first.items()}
    unknown = about.get("vendor_id") == "AuthenticAMD" and int(about.get("cpu family", 0)) >= _ZEN5
    return "SkylakeX" if unknown and set(about.get("flags", "").split()) >= _AVX512 else None


def keep_freed_memory() -> bool:
    """Ask glibc to keep the memory of freed arrays for the next ones; whether it agreed. For programs that train.

    By default it returns the large ones to the system, which hands them back zeroed, page by page, at every step: of a
    training step of the latent-tree LSTM that was a seventh. The process then keeps the most memory it ever used.
    """
    import ctypes

    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library
        return False
    return bool(mallopt(_MMAP_THRESHOLD, 32 * 2**20)) and bool(mallopt(_TRIM_THRESHOLD, 2**31 - 1))
