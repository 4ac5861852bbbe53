"""Where arrays live: NumPy by default, CuPy when asked for.

Two ideas, kept apart. Inside an op, `array_module(x)` answers "which library does this array belong to?" by looking
at the array's type. At the edges of a program, a `Backend` creates arrays, moves them and waits for the device.
This is the only file that names CuPy, and it imports it only when a caller asks for it.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import numpy as np

__all__ = [
    "BACKENDS",
    "Array",
    "Backend",
    "BackendUnavailable",
    "array_module",
    "asarray_like",
    "get_backend",
    "register_array_type",
    "to_host",
]

log = logging.getLogger(__name__)

Array = Any  # numpy.ndarray, cupy.ndarray, or the stand-in of the tests: they have no common type

INSTALL_HINT = "pip install 'cupy-cuda13x[ctk]' (or cupy-cuda12x, as your driver wants it), or use --backend numpy"


class BackendUnavailable(RuntimeError):
    """The requested backend cannot run here; the message is one sentence that says why and what to do."""


# NumPy's reductions return scalars (np.float32), which behave as 0-d arrays everywhere in this project.
ARRAY_MODULES: dict[type, object] = {np.ndarray: np, np.float32: np, np.float64: np, np.bool_: np, np.int64: np}


def register_array_type(array_type: type, module: object) -> None:
    """Make `array_module` answer `module` for arrays of exactly this type (CuPy and the tests' stand-in use it)."""
    ARRAY_MODULES[array_type] = module


def array_module(x: Array) -> Any:
    """The array library of `x`: numpy, cupy, or a registered stand-in. TypeError for anything else.

    A look-up by type is cheap enough for every op and, unlike `cupy.get_array_module`, refuses lists and None.
    """
    try:
        return ARRAY_MODULES[type(x)]
    except KeyError:
        if isinstance(x, np.generic):
            return np
        raise TypeError(
            f"expected an array of a known backend, got {type(x).__module__}.{type(x).__qualname__}; "
            "convert it with Backend.to_device or numpy.asarray first."
        ) from None


def asarray_like(host: np.ndarray, like: Array) -> Array:
    """Send the NumPy array `host` to where the array `like` lives. For NumPy this is the identity."""
    return array_module(like).asarray(host)


def on_host(x: Array) -> bool:
    """Can its values be looked at without waiting for a device?"""
    return array_module(x) is np


def to_host(x: Array) -> np.ndarray:
    """Copy an array of any backend to a NumPy array. This is the one door from a device to the host."""
    return x.get() if hasattr(x, "get") else np.asarray(x)


class Backend:
    """An array library together with the operations a program needs at its edges.

    name: "numpy" or "cupy".     xp: the array module.     device: a description that goes into result files.
    """

    name: str = "numpy"
    xp: Any = np
    device: str = "cpu"
    version: str = np.__version__

    def to_device(self, host: Any, dtype: Any = None) -> Array:
        """A NumPy array (any shape) on the device, as `dtype` if given. The one door from the host to a device."""
        return self.xp.asarray(np.asarray(host, dtype=dtype))

    def indices(self, host: Any, size: int) -> Array:
        """Indices or labels on the device, int64. TypeError unless they are integers, IndexError if one leaves
        [0, size): a device would take it for another one, without a word."""
        host = np.asarray(host)
        check_index(host, size)
        return self.to_device(host, np.int64)

    def to_host(self, array: Array) -> np.ndarray:
        """An array of this backend as a NumPy array; waits for the device to finish computing it."""
        return to_host(array)

    def synchronize(self) -> None:
        """Wait until the device has finished. Nothing to do on a CPU."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name} {self.version}, {self.device})"


class CupyBackend(Backend):
    """CuPy on the current device. BackendUnavailable where it cannot run."""

    name = "cupy"

    def __init__(self) -> None:
        cp = load_cupy()
        self.xp = cp
        self.version = cp.__version__
        properties = cp.cuda.runtime.getDeviceProperties(cp.cuda.Device().id)
        self.device = properties["name"].decode()
        register_array_type(cp.ndarray, cp)

    def synchronize(self) -> None:
        self.xp.cuda.get_current_stream().synchronize()


@functools.cache
def load_cupy() -> Any:
    """Import CuPy ≥ 14 and prove that it computes; otherwise BackendUnavailable with one sentence.

    `import cupy` succeeds on machines without a GPU, and NVRTC, the CUDA headers and cuBLAS are searched only at
    first use; so a small product of device arrays is the only real evidence.
    """
    try:
        import cupy as cp
    except Exception as error:  # ImportError as a rule, but broken installations raise others
        raise BackendUnavailable(f"CuPy cannot be imported ({_first_line(error)}): {INSTALL_HINT}.") from error
    major = cp.__version__.split(".")[0]
    if not major.isdigit() or int(major) < 14:
        raise BackendUnavailable(f"CuPy {cp.__version__} is not version 14 or newer: {INSTALL_HINT}.")
    try:
        if cp.cuda.runtime.getDeviceCount() == 0:
            raise RuntimeError("no device is visible, see CUDA_VISIBLE_DEVICES")
        a = cp.arange(6, dtype=cp.float32).reshape(2, 3)
        if not float((cp.exp(a) @ a.T).sum()) > 0:
            raise RuntimeError("a matrix product came out wrong")
    except Exception as error:
        raise BackendUnavailable(
            f"CuPy {cp.__version__} is installed but finds no usable GPU ({_first_line(error)}): "
            "check the NVIDIA driver with nvidia-smi, or use --backend numpy."
        ) from error
    return cp


def _first_line(error: Exception) -> str:
    lines = [line.strip(" =") for line in str(error).splitlines()]
    return next(filter(None, lines), type(error).__name__)


def check_integers(index: Array | int) -> None:
    """TypeError unless it is an integer or an array of them. Booleans are none: they pick as 0 and 1 in one function of
    NumPy and as a mask in another."""
    kind = index.dtype.kind if hasattr(index, "dtype") else type(index).__name__
    if kind not in ("i", "u", "int"):
        got = f"an array of {index.dtype}" if hasattr(index, "dtype") else kind
        raise TypeError(f"an index or label must be an integer or an array of integers, got {got}: convert it first.")


def check_index(index: Array, size: int) -> None:
    """TypeError unless it is an array of integers; IndexError if one on the host leaves [0, size). A device is not
    asked: it would have to be waited for."""
    host = on_host(index)
    check_integers(index)
    if host and index.size and not (index.min() >= 0 and index.max() < size):
        raise IndexError(f"an index or label lies outside 0 to {size - 1}.")


def check_unit_interval(x: Array) -> None:
    """ValueError if an array on the host leaves [0, 1]. A device is not asked."""
    if type(x) is np.ndarray and x.size and (x.min() < 0 or x.max() > 1):
        raise ValueError(
            f"probabilities and images must lie in [0, 1], got {x.min():g} to {x.max():g}: scale them first."
        )


@functools.cache
def _auto() -> Backend:
    try:
        return CupyBackend()
    except BackendUnavailable as error:
        log.warning("backend auto: using numpy, because %s", error)
        return Backend()


BACKENDS: dict[str, Callable[[], Backend]] = {"numpy": Backend, "cupy": CupyBackend, "auto": _auto}


def get_backend(name: str = "numpy") -> Backend:
    """The backend called `name`.

    "cupy" raises BackendUnavailable where there is no usable GPU; "auto" falls back to NumPy and logs the reason
    once, so that a result of the CPU is never mistaken for one of the GPU. ValueError for an unknown name.
    """
    if name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}; the known ones are {', '.join(sorted(BACKENDS))}.")
    return BACKENDS[name]()
