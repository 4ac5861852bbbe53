"""What the bits of a run depend on beside its flags: versions, the device, and how BLAS computes."""

from __future__ import annotations

import ctypes
import itertools
import os
import sys
from typing import Any

import numpy as np
import scipy

import minigrad
from minigrad.backend import Backend

THREADS = ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS", "OMP_NUM_THREADS")
KERNELS = ("OPENBLAS_CORETYPE", "MKL_ENABLE_INSTRUCTIONS")


def environment(backend: Backend) -> dict[str, Any]:
    """For JSON, flat. What a CPU computes with is left out where a GPU computes."""
    found = {"minigrad": minigrad.__version__, "numpy": np.__version__, "scipy": scipy.__version__}
    found |= {"backend": backend.name, "backend_version": backend.version, "device": backend.device}
    return found | (cpu() if backend.name == "numpy" else {})


def cpu() -> dict[str, Any]:
    """The BLAS that NumPy was built with, how many threads and which kernels it uses, and NumPy's own instructions."""
    built: Any = np.show_config(mode="dicts")
    blas = built.get("Build Dependencies", {}).get("blas", {})
    return {
        "blas": f"{blas.get('name', 'unknown')} {blas.get('version', '')}".strip(),
        "blas_threads": _openblas("get_num_threads", ctypes.c_int) or _variable(THREADS),
        "blas_kernels": _openblas("get_corename", ctypes.c_char_p) or _variable(KERNELS),
        "simd": " ".join(built.get("SIMD Extensions", {}).get("found", [])) or "baseline",
    }


def _openblas(name: str, kind: Any) -> Any:
    """What the OpenBLAS says that NumPy has loaded; None for another library. Its names differ from build to build."""
    try:
        library = ctypes.CDLL(sys.modules["numpy._core._multiarray_umath"].__file__)  # its symbols, and those of BLAS
    except (KeyError, OSError):
        return None
    for before, after in itertools.product(("scipy_openblas_", "openblas_"), ("64_", "")):
        function = getattr(library, f"{before}{name}{after}", None)
        if function:
            function.restype = kind
            found = function()
            return found.decode() if isinstance(found, bytes) else found
    return None


def _variable(names: tuple[str, ...]) -> str:
    return next((os.environ[name] for name in names if name in os.environ), "unknown")
