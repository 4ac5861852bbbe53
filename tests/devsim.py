"""A stand-in device: arrays that compute with NumPy and refuse what CuPy refuses.

It runs the ops, the estimators and whole training steps where there is no GPU, and turns "no hidden transfer in a
training step" into a test:

    with forbid("sync", "d2h", "h2d"):
        step()

What it knows of CuPy comes from `cupy_api.json` (`scripts/tools/snapshot_cupy_api.py`). It is stricter where CuPy
is silently slow or wrong: host arrays as indices, repeated indices in an assignment, indices out of range.
Since it computes with NumPy, its results must equal NumPy's to the last bit.
"""

from __future__ import annotations

import contextlib
import json
import types
from collections import Counter
from pathlib import Path
from typing import ClassVar

import numpy as np

from minigrad import kernels
from minigrad.backend import Backend, register_array_type

API = json.loads((Path(__file__).parent / "cupy_api.json").read_text())

stats: Counter = Counter()  # "launch", "sync", "h2d", "d2h"
_forbidden: list[str] = []

# the size of the result is known to the device only, so CuPy waits for it
_WAITS = {"argwhere", "bincount", "compress", "extract", "flatnonzero", "nonzero", "tobytes", "unique"}
# functions that begin with a shape, a number or subscripts; all others want arrays, where NumPy takes anything
_WITHOUT_ARRAY = {"arange", "einsum", "empty", "eye", "full", "identity", "indices", "linspace", "ones", "tri", "zeros"}


class ForbiddenTransfer(AssertionError):
    """A host-device transfer or a wait where `forbid` allows none."""


@contextlib.contextmanager
def forbid(*kinds):
    _forbidden.extend(kinds)
    try:
        yield
    finally:
        del _forbidden[-len(kinds) :]


def _event(kind: str, what: str):
    stats[kind] += 1
    if kind in _forbidden:
        raise ForbiddenTransfer(f"hidden {kind} in a place that allows none: {what}")


def _implicit():
    return TypeError("Implicit conversion to a NumPy array is not allowed. Please use `.get()` (as CuPy says).")


def _unwrap(x, where: str):
    if isinstance(x, DeviceArray):
        return x._a
    if isinstance(x, np.ndarray):
        raise TypeError(f"Unsupported type {type(x)}: {where} mixes a host array with device arrays (as CuPy says).")
    if isinstance(x, list | tuple):
        return type(x)(_unwrap(y, where) for y in x)
    return x


def _wrap(x):
    if isinstance(x, np.ndarray | np.generic | bool):  # allclose and its like give an array, too
        return DeviceArray(np.asarray(x))
    if isinstance(x, list | tuple):
        return type(x)(_wrap(y) for y in x)
    return x


def _check_keywords(name, given, allowed):
    if allowed is not None:
        for keyword in given:
            if keyword not in allowed:
                raise TypeError(f"CuPy's {name} has no parameter {keyword!r}")


def _launch(name: str, operands, result, written: bool = False):
    """Count what CuPy sends to the device: nothing for a view, for memory that is not filled or for an empty result,
    one kernel for everything else, and before a product one more for each matrix that cuBLAS cannot read as it lies.

    written: the result went into an array that was there before.  A few functions are more than one kernel in CuPy.
    """
    first = result[0] if isinstance(result, list | tuple) and result else result
    arrays = [a for a in operands if isinstance(a, np.ndarray)]
    is_view = isinstance(first, np.ndarray) and any(np.may_share_memory(first, a) for a in arrays)
    if name in ("empty", "empty_like") or not getattr(first, "size", 1) or (is_view and not written):
        return
    stats["launch"] += 1
    if "matmul" in name or name == "dot":
        batched = max(a.ndim for a in arrays) > 2  # CuPy wants rows there, and takes columns, too, elsewhere
        as_it_lies = lambda a: a.flags.c_contiguous or (not batched and a.flags.f_contiguous)
        stats["launch"] += sum(not as_it_lies(a) for a in arrays)


def _call(function, name, arguments, keywords, allowed=None):
    _check_keywords(name, keywords, allowed)
    if name in _WAITS or (name == "where" and len(arguments) == 1):
        _event("sync", name)
    out = keywords.get("out")
    keywords = {k: _unwrap(v, name) for k, v in keywords.items()}
    arguments = [_unwrap(a, name) for a in arguments]
    result = function(*arguments, **keywords)
    owner = getattr(function, "__self__", None)  # of a method
    _launch(name, [*arguments, owner], result, out is not None)
    return out if out is not None else _wrap(result)


class DeviceArray:
    """An array on the stand-in device. Reductions give 0-d arrays, never scalars."""

    __slots__ = ("_a",)
    __array_priority__ = 100

    def __init__(self, a: np.ndarray):
        self._a = a

    shape = property(lambda self: self._a.shape)
    dtype = property(lambda self: self._a.dtype)
    ndim = property(lambda self: self._a.ndim)
    size = property(lambda self: self._a.size)
    nbytes = property(lambda self: self._a.nbytes)
    strides = property(lambda self: self._a.strides)
    T = property(lambda self: DeviceArray(self._a.T))

    # -- what waits for the device or copies to the host

    def get(self):
        _event("d2h", ".get()")
        return self._a.copy()

    def item(self):
        _event("sync", ".item()")
        return self._a.item()

    def tolist(self):
        _event("sync", ".tolist()")
        return self._a.tolist()

    def __float__(self):
        _event("sync", "float()")
        return float(self._a)

    def __int__(self):
        _event("sync", "int()")
        return int(self._a)

    def __bool__(self):
        _event("sync", "bool()")
        return bool(self._a)

    def __repr__(self):
        _event("sync", "repr()")
        return f"device {self._a!r}"

    def __array__(self, *_, **__):
        raise _implicit()

    def __array_ufunc__(self, *_, **__):
        raise _implicit()

    def __array_function__(self, *_, **__):
        raise TypeError("np.f(device array): call the function of the array's own module instead")

    def __len__(self):
        return len(self._a)

    def __iter__(self):
        if not self._a.ndim:
            raise TypeError("iteration over a 0-d array")
        return (DeviceArray(a) for a in self._a)

    # -- methods, as far as CuPy's ndarray has them

    def __getattr__(self, name):
        if name not in API["ndarray"] or name.startswith("__"):
            raise AttributeError(f"CuPy's ndarray has no attribute {name!r}")
        method = getattr(self._a, name)
        if not callable(method):
            return _wrap(method)
        return lambda *arguments, **keywords: _call(method, name, arguments, keywords, API["ndarray"][name])

    # -- indexing

    def _key(self, key):
        keys = key if isinstance(key, tuple) else (key,)
        for k in keys:
            if isinstance(k, np.ndarray | list):
                raise TypeError("a host array as an index: CuPy would copy it silently; send it once with asarray")
            if isinstance(k, DeviceArray):
                if k.dtype == bool:
                    _event("sync", "a boolean array as an index")
                k = k._a
            yield k

    def __getitem__(self, key):
        key = tuple(self._key(key))
        if not any(k is Ellipsis for k in key):
            key = (*key, ...)  # so that a single number is a view, too, as in CuPy
        result = self._a[key]
        _launch("take", [self._a], result)
        return DeviceArray(result)

    def __setitem__(self, key, value):
        stats["launch"] += 1
        if isinstance(value, np.ndarray | list | tuple):
            raise TypeError("device[key] = host array")
        key, value = tuple(self._key(key)), _unwrap(value, "assignment")
        self._a[key] = value
        written = self._a[key]
        if not np.array_equal(written, np.broadcast_to(value, written.shape).astype(written.dtype), equal_nan=True):
            raise ValueError("repeated indices with different values: the result is undefined on a GPU, use add.at")


def _operator(name):
    in_place = name.startswith("__i")

    def forward(self, other):
        if not isinstance(other, DeviceArray | int | float | bool | np.generic):
            if getattr(other, "__array_ufunc__", self) is None and not in_place:
                return NotImplemented  # the turn of a Tensor
            raise TypeError(f"Unsupported type {type(other)}: {name} mixes it with a device array (as CuPy says)")
        operand = _unwrap(other, name)
        result = getattr(self._a, name)(operand)
        if result is not NotImplemented:
            _launch(name, [self._a, operand], result, in_place)
        if in_place:
            return self
        return result if result is NotImplemented else _wrap(result)

    return forward


for _name in ["add", "sub", "mul", "truediv", "floordiv", "pow", "mod", "and", "or", "xor", "matmul"]:
    for _prefix in ("", "r", "i"):
        if not (_prefix == "i" and _name == "matmul"):  # CuPy has no @=
            setattr(DeviceArray, f"__{_prefix}{_name}__", _operator(f"__{_prefix}{_name}__"))
for _name in ["lt", "le", "gt", "ge", "eq", "ne"]:
    setattr(DeviceArray, f"__{_name}__", _operator(f"__{_name}__"))
DeviceArray.__hash__ = None
for _name in ["neg", "pos", "abs", "invert"]:
    setattr(
        DeviceArray,
        f"__{_name}__",
        lambda self, _method=f"__{_name}__": _call(getattr(self._a, _method), _method, (), {}),
    )


class _Ufunc:
    def __init__(self, name):
        self._function, self.__name__ = getattr(np, name), name

    def __call__(self, *arguments, **keywords):
        if any(isinstance(a, list | tuple) for a in arguments):
            raise TypeError(f"Unsupported type list in {self.__name__} (as CuPy says)")
        allowed = API["ufunc_keywords"]
        if self.__name__ == "matmul":
            allowed = API["functions"].get("matmul") or allowed
        return _call(self._function, self.__name__, arguments, keywords, allowed)

    def __getattr__(self, method):
        if self.__name__ not in API["ufunc_methods"].get(method, ()):
            raise AttributeError(f"CuPy has no {self.__name__}.{method}")
        function = getattr(self._function, method)
        if method != "at":
            return lambda *arguments, **keywords: _call(function, method, arguments, keywords)

        def at(array, key, value=None):
            stats["launch"] += 1
            function(array._a, tuple(array._key(key)), _unwrap(value, "add.at"))

        return at


class _Module(types.ModuleType):
    """The array module of the stand-in: what CuPy has, with CuPy's parameters."""

    ndarray = DeviceArray

    def asarray(self, a, dtype=None):
        if isinstance(a, DeviceArray):
            return a if dtype is None else a.astype(dtype)
        _event("h2d", "asarray")
        host = np.array(a, dtype=dtype)
        if host.dtype.kind not in "biufc":
            raise ValueError(f"Unsupported dtype {host.dtype} (as CuPy says)")
        return DeviceArray(host)

    def __getattr__(self, name):
        if name in API["constants"]:
            return getattr(np, name)
        if name in API["ufuncs"] or name == "matmul":
            return _Ufunc(name)
        if name in API["functions"]:
            value = getattr(np, name)
            if isinstance(value, type):
                return value  # a dtype
            return lambda *arguments, **keywords: self._function(name, value, arguments, keywords)
        raise AttributeError(f"CuPy has no function {name!r}")

    def _function(self, name, function, arguments, keywords):
        first = arguments[0] if arguments else None
        if name not in _WITHOUT_ARRAY:
            for x in first if isinstance(first, list | tuple) else [first]:
                if not isinstance(x, DeviceArray):
                    raise TypeError(f"Unsupported type {type(x)}: {name} wants device arrays (as CuPy says)")
        elif name == "arange" and any(isinstance(x, DeviceArray) for x in arguments):
            _event("sync", "arange of a device array")
        return _call(function, name, arguments, keywords, API["functions"][name])


class _ReductionKernel:
    """CuPy's, for sums over the last axis of arrays of one dtype T, by NumPy's body: the C code is not read."""

    BODIES: ClassVar = {"inner": kernels.inner, "total": kernels.total}

    def __init__(self, in_params, out_params, map_expr, reduce_expr, post_map_expr, identity, name):
        self._body, self._name, self._count = self.BODIES[name], name, in_params.count("T ")

    def __call__(self, *arguments, axis):
        if axis != -1 or len(arguments) != self._count:
            raise TypeError(f"the kernel {self._name} takes {self._count} arrays and axis=-1")
        if not all(isinstance(a, DeviceArray) and a.dtype == arguments[0].dtype for a in arguments):
            raise TypeError(f"Type is mismatched in the kernel {self._name} (as CuPy says)")
        return _call(self._body, self._name, arguments, {})


_Module.ReductionKernel = _ReductionKernel

xp = _Module("devsim")
register_array_type(DeviceArray, xp)


class DevsimBackend(Backend):
    name = "devsim"
    xp = xp
    device = "stand-in"
