"""What a command does before it imports NumPy. This file needs nothing but the standard library.

    sys.path.insert(0, …)                # the folder of the command, which Python leaves out under PYTHONSAFEPATH
    from experiments.start import before_numpy

    before_numpy()

OpenBLAS, which NumPy's wheels contain, chooses its kernels by the processor's model number and falls back to those for
AVX2 on models it does not know. AMD's Zen 5 is one of them (OpenBLAS 0.3.31): its matrix products run about 1.5 times
as fast with the AVX-512 kernels. The choice can be set in the environment, but only before NumPy is loaded. A value
that the user set is left alone.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import sys
from pathlib import Path

KERNELS = "OPENBLAS_CORETYPE"
LIBRARIES = ("matplotlib", "safetensors", "tqdm")  # of the extra `scripts`
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of malloc.h; 32 MiB is the most that glibc takes for the latter
_AVX512 = {"avx512f", "avx512cd", "avx512bw", "avx512dq", "avx512vl"}
_ZEN5 = 26  # the family number of Zen 5; OpenBLAS knows Zen 1 to 4 (23 to 25)


def before_numpy() -> None:
    """Check that the libraries of the scripts are there (else exit code 2, one sentence), and choose BLAS's kernels."""
    missing = [name for name in LIBRARIES if importlib.util.find_spec(name) is None]
    if missing:
        name = Path(sys.argv[0]).name
        print(f"{name}: error: {', '.join(missing)} not found: pip install -e '.[scripts]'.", file=sys.stderr)
        raise SystemExit(2)
    choose_kernels()


def choose_kernels() -> None:
    """Set the variable where it helps and can still have an effect."""
    if KERNELS in os.environ or "numpy" in sys.modules or not sys.platform.startswith("linux"):
        return
    try:
        kernels = kernels_for(Path("/proc/cpuinfo").read_text())
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
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library
        return False
    return bool(mallopt(_MMAP_THRESHOLD, 32 * 2**20)) and bool(mallopt(_TRIM_THRESHOLD, 2**31 - 1))
