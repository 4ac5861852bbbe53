"""Modules hold parameters and name them; the mathematics is in `minigrad.fused`.

A Module finds its parameters by looking at its attributes, in the order they were set: leaf Tensors that require a
gradient, other Modules, and lists, tuples and dictionaries of either. Initial values come from `minigrad.random`, so a
seed fixes them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import DTypeLike

from . import fused
from .backend import Array, Backend, asarray_like
from .checkpoint import StateError
from .convolution import conv2d
from .ops import leaky_relu
from .random import Rng, Shape
from .tensor import Tensor, mark_updated

Initializer = Callable[..., np.ndarray]


class UniformNoise(Protocol):
    """Where numbers between 0 and 1 come from: an `Rng`, or what stands in for one."""

    def uniform(self, shape: Shape, like: Array | None = None) -> Array: ...


# ---- initialisers: (rng, shape, dtype) -> array on the host. A weight is (I, O), so fan_in = I and fan_out = O.


def uniform_fan_in(rng: UniformNoise, shape: Shape, dtype: DTypeLike = np.float32) -> np.ndarray:
    """U(−1/√I, 1/√I), PyTorch's default for the weight of a linear layer."""
    return _uniform(rng, shape, 1.0 / math.sqrt(shape[0]), dtype)


def xavier_uniform(rng: UniformNoise, shape: Shape, dtype: DTypeLike = np.float32) -> np.ndarray:
    """U(±√(6/(I+O))): keeps the variance of activations and gradients alike (Glorot & Bengio 2010, eq. 16)."""
    return _uniform(rng, shape, math.sqrt(6.0 / (shape[0] + shape[1])), dtype)


def he_normal(rng: Rng, shape: Shape, dtype: DTypeLike = np.float32) -> np.ndarray:
    """N(0, 2/I): keeps the variance through ReLUs (He et al. 2015, eq. 10)."""
    return normal(rng, shape, dtype, std=math.sqrt(2.0 / shape[0]))


def normal(rng: Rng, shape: Shape, dtype: DTypeLike = np.float32, std: float = 0.01) -> np.ndarray:
    """N(0, std²)."""
    return (std * rng.normal(shape, like=np.empty(0, np.float64))).astype(dtype)


def orthogonal(rng: Rng, shape: Shape, dtype: DTypeLike = np.float32) -> np.ndarray:
    """A matrix with orthonormal rows or columns, uniformly distributed (Saxe et al. 2014; Mezzadri 2007).

    QR of a normal matrix, with the signs of R's diagonal moved into Q: without that, Q is not uniform.
    """
    rows, columns = shape
    tall = normal(rng, (rows, columns) if rows >= columns else (columns, rows), np.float64, std=1.0)
    q, r = np.linalg.qr(tall)
    q *= np.sign(np.diag(r))
    return np.ascontiguousarray(q if rows >= columns else q.T, dtype=dtype)


def _uniform(rng, shape, bound, dtype):
    return (bound * (2.0 * rng.uniform(shape, like=np.empty(0, np.float64)) - 1.0)).astype(dtype)


# ---- modules


class Module:
    """Base class. Set parameters and submodules as attributes; define `__call__`."""

    def named_parameters(self) -> dict[str, Tensor]:
        """{"decoder.0.weight": Tensor, ...}, in the order the attributes were set. What is shared counts once, under
        its first name, and a child may refer to its parent. ValueError for two parameters of one name."""
        found: dict[str, Tensor] = {}
        seen: set[int] = set()

        def collect(name, value):
            if not isinstance(value, Tensor | Module | dict | list | tuple) or id(value) in seen:
                return
            seen.add(id(value))
            if isinstance(value, Tensor):
                if value.requires_grad and value.node is None:  # not a result that is kept for later
                    if name in found:
                        raise ValueError(f"two parameters are called {name}: use other keys, without dots.")
                    found[name] = value
                return
            parts = vars(value) if isinstance(value, Module) else value
            for key, part in parts.items() if isinstance(parts, dict) else enumerate(parts):
                collect(f"{name}.{key}" if name else str(key), part)

        collect("", self)
        return found

    def parameters(self) -> list[Tensor]:
        """The Tensors of `named_parameters`."""
        return list(self.named_parameters().values())

    def to(self, backend: Backend, dtype: Any = None) -> Self:
        """Move every parameter to a `minigrad.backend.Backend`, as `dtype` if given; make the optimizer afterwards.

        TypeError for a dtype that is neither float32 nor float64. Graphs that were built before cannot be
        differentiated then.
        """
        if dtype is not None and np.dtype(dtype) not in (np.float32, np.float64):
            raise TypeError(f"parameters are float32 or float64, not {np.dtype(dtype)}: choose one of these.")
        parameters = self.parameters()
        for p in parameters:
            p.data, p.grad, p.grad_buffer = backend.to_device(p.numpy(), dtype), None, None
        mark_updated(parameters)
        return self

    def state_dict(self) -> dict[str, np.ndarray]:
        """Copies of all parameters, on the host."""
        return {name: np.array(p.numpy()) for name, p in self.named_parameters().items()}

    def load_state_dict(self, state: dict[str, np.ndarray]) -> None:
        """Write the arrays into the parameters, in place. StateError if names, shapes or dtypes differ."""
        parameters = self.named_parameters()
        for names, what in (
            (parameters.keys() - state.keys(), "lacks"),
            (state.keys() - parameters.keys(), "has also"),
        ):
            if names:
                raise StateError(f"the saved state {what} {', '.join(sorted(names))}: it belongs to another model.")
        for name, p in parameters.items():
            if state[name].shape != p.shape or state[name].dtype != p.dtype:
                raise StateError(
                    f"{name} is {p.dtype}{p.shape} here and {state[name].dtype}{state[name].shape} in the saved "
                    "state: it belongs to another model."
                )
        for name, p in parameters.items():
            p.data[...] = asarray_like(state[name], p.data)
        mark_updated(parameters.values())


def parameter(array: Any) -> Tensor:
    """A leaf Tensor that requires a gradient."""
    return Tensor(array, requires_grad=True)


def _check_widths(**widths: int) -> None:
    """ValueError, with the name of the one that is no integer from 1 on."""
    for name, width in widths.items():
        if not isinstance(width, int | np.integer) or width < 1:
            raise ValueError(f"{name} must be an integer of at least 1, got {width!r}.")


class Linear(Module):
    """y = x W + b, or max(x W + b, 0) with relu=True.     weight (inputs, outputs), bias (outputs,)

    A slope > 0 makes that ReLU a leaky one, max(y, slope·y).

    The bias is drawn as PyTorch does, U(±1/√inputs), unless `bias` gives a constant for it.
    ValueError unless both sizes are integers of at least 1.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        rng: Rng,
        *,
        relu: bool = False,
        slope: float = 0.0,
        init: Initializer = uniform_fan_in,
        bias: float | None = None,
        dtype: DTypeLike = np.float32,
    ) -> None:
        _check_widths(inputs=inputs, outputs=outputs)
        self.weight = parameter(init(rng.site("weight"), (inputs, outputs), dtype))
        start = _uniform(rng.site("bias"), (outputs,), 1.0 / math.sqrt(inputs), dtype)
        self.bias = parameter(start if bias is None else np.full(outputs, float(bias), dtype))
        self.relu, self.slope = relu, slope

    def __call__(self, x: Tensor | Array) -> Tensor:
        if self.relu and self.slope:
            return leaky_relu(fused.linear(x, self.weight, self.bias), slope=self.slope)
        return (fused.linear_relu if self.relu else fused.linear)(x, self.weight, self.bias)


class MLP(Module):
    """Linear layers of the given sizes with ReLUs between them, leaky ones with a slope; the last layer has none.

    ValueError unless there are at least two sizes.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        rng: Rng,
        *,
        slope: float = 0.0,
        init: Initializer = uniform_fan_in,
        dtype: DTypeLike = np.float32,
    ) -> None:
        if len(sizes) < 2:
            raise ValueError(f"an MLP needs the sizes of its input and its output at least, got {list(sizes)}.")
        last = len(sizes) - 2
        self.layers = [
            Linear(i, o, rng.site(n), relu=n < last, slope=slope, init=init, dtype=dtype)
            for n, (i, o) in enumerate(itertools.pairwise(sizes))
        ]

    def __call__(self, x: Tensor | Array) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Conv2d(Module):
    """`minigrad.convolution.conv2d` with weights: (N, channels, H, W) -> (N, outputs, P, Q).

    size: of the window, which is a square.     weight (channels, size, size, outputs), bias (outputs,)

    The weight is drawn as the matrix (channels·size², outputs) of a linear layer, the bias from
    U(±1/√(channels·size²)), as PyTorch does.  ValueError unless channels, outputs and size are integers of at least 1.
    """

    def __init__(
        self,
        channels: int,
        outputs: int,
        size: int,
        rng: Rng,
        *,
        stride: int = 1,
        padding: int = 0,
        init: Initializer = uniform_fan_in,
        dtype: DTypeLike = np.float32,
    ) -> None:
        _check_widths(channels=channels, outputs=outputs, size=size)
        inputs = channels * size * size
        matrix = init(rng.site("weight"), (inputs, outputs), dtype)
        self.weight = parameter(matrix.reshape(channels, size, size, outputs))
        self.bias = parameter(_uniform(rng.site("bias"), (outputs,), 1.0 / math.sqrt(inputs), dtype))
        self.stride, self.padding = stride, padding

    def __call__(self, x: Tensor | Array) -> Tensor:
        return conv2d(x, self.weight, self.bias, stride=self.stride, padding=self.padding)


class Embedding(Module):
    """Rows of a table, looked up by integer.     weight (vocabulary, width)"""

    def __init__(
        self, vocabulary: int, width: int, rng: Rng, *, init: Initializer = normal, dtype: DTypeLike = np.float32
    ) -> None:
        _check_widths(vocabulary=vocabulary, width=width)
        self.weight = parameter(init(rng.site("weight"), (vocabulary, width), dtype))

    def __call__(self, ids: Array) -> Tensor:
        return fused.embedding(self.weight, ids)


class LSTM(Module):
    """A one-layer LSTM over x (T, N, I), from zero states.  -> (T, N, H) hidden states and (T, N, H) cells.

    Gates in the order i, f, u, o; the input's part of all pre-activations is one product for the whole sequence.
    """

    def __init__(
        self,
        inputs: int,
        hidden: int,
        rng: Rng,
        *,
        init_input: Initializer = uniform_fan_in,
        init_hidden: Initializer = orthogonal,
        dtype: DTypeLike = np.float32,
    ) -> None:
        _check_widths(inputs=inputs, hidden=hidden)
        self.hidden = hidden
        self.w_input = parameter(init_input(rng.site("input"), (inputs, 4 * hidden), dtype))
        self.w_hidden = parameter(init_hidden(rng.site("hidden"), (hidden, 4 * hidden), dtype))
        bias = np.zeros(4 * hidden, dtype)
        bias[hidden : 2 * hidden] = 1.0  # remember at first (Jozefowicz et al. 2015)
        self.bias = parameter(bias)

    def __call__(self, x: Tensor | Array) -> tuple[Tensor, Tensor]:
        return fused.lstm(x, self.w_input, self.w_hidden, self.bias)
