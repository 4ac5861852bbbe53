"""Elementary ops, each with its rule in sight, and the operator table of Tensor.

Everywhere: x, a, b are inputs, y the output, g = ∂ℒ/∂y the gradient that arrives, and dx = ∂ℒ/∂x what is passed on.
All ops are smooth where their rule is used by the tests; at a kink the rule says which one-sided slope it takes.
"""

from __future__ import annotations

import math

import numpy as np

from .backend import Array, array_module, check_integers
from .tensor import Tensor, op, unbroadcast

# ---- arithmetic, with broadcasting: dx is summed over the axes along which x was repeated


@op
def add(a, b):
    """y = a + b        ∂y/∂a = ∂y/∂b = 1"""

    def backward(g):
        return lambda: unbroadcast(g, a.shape), lambda: unbroadcast(g, b.shape)

    return a + b, backward


@op
def subtract(a, b):
    """y = a − b        ∂y/∂a = 1          ∂y/∂b = −1"""

    def backward(g):
        return lambda: unbroadcast(g, a.shape), lambda: unbroadcast(-g, b.shape)

    return a - b, backward


@op
def multiply(a, b):
    """y = a b          ∂y/∂a = b          ∂y/∂b = a"""

    def backward(g):
        da = lambda: unbroadcast(g * b, a.shape)
        db = lambda: unbroadcast(g * a, b.shape)
        return da, db

    return a * b, backward


@op
def divide(a, b):
    """y = a/b        ∂y/∂a = 1/b        ∂y/∂b = −a/b² = −y/b"""
    y = a / b

    def backward(g):
        da = lambda: unbroadcast(g / b, a.shape)
        db = lambda: unbroadcast(-g * y / b, b.shape)
        return da, db

    return y, backward


@op
def power(a, b):
    """y = aᵇ         ∂y/∂a = b aᵇ⁻¹     ∂y/∂b = y log a   (needs a > 0, or a = 0 ≤ b, where it is taken as 0)"""
    y = a**b

    def log_a():
        if hasattr(a, "dtype"):
            return array_module(a).log(a + ((a == 0) & (b >= 0)), dtype=y.dtype)
        return math.nan if a < 0 else math.log(a or 1)

    def backward(g):
        # a⁰ = 1 everywhere, also where a⁻¹ is infinite: where b = 0, any finite power will do
        da = lambda: unbroadcast(g * b * a ** (b - 1 + (b == 0)), a.shape)
        db = lambda: unbroadcast(g * y * log_a(), b.shape)
        return da, db

    return y, backward


@op
def negative(x):
    """y = −x        dy/dx = −1"""
    return -x, lambda g: -g


# ---- elementwise functions


@op
def exp(x):
    """y = eˣ        dy/dx = y"""
    y = array_module(x).exp(x)
    return y, lambda g: g * y


@op
def log(x):
    """y = log x     dy/dx = 1/x"""
    return array_module(x).log(x), lambda g: g / x


@op
def sqrt(x):
    """y = √x         dy/dx = 1/(2y)"""
    y = array_module(x).sqrt(x)
    return y, lambda g: g / (2.0 * y)


@op
def tanh(x):
    """y = tanh x     dy/dx = 1 − y²"""
    y = array_module(x).tanh(x)
    return y, lambda g: g * (1.0 - y * y)


@op
def sigmoid(x):
    """y = σ(x)       dy/dx = y (1 − y)"""
    y = stable_sigmoid(x)
    return y, lambda g: g * y * (1.0 - y)


@op
def softplus(x):
    """y = log(1 + eˣ) = max(x, 0) + log(1 + e^−|x|)        dy/dx = σ(x)"""
    xp = array_module(x)
    y = xp.maximum(x, 0.0) + xp.log1p(xp.exp(-abs(x)))
    return y, lambda g: g * stable_sigmoid(x)


@op
def relu(x):
    """y = max(x, 0)  dy/dx = [x > 0]: the slope at 0 is taken as 0."""
    return array_module(x).maximum(x, 0.0), lambda g: g * (x > 0)


@op
def leaky_relu(x, *, slope: float = 0.01):
    """y = x where x > 0, else slope·x.  The derivative at 0 is taken as the slope."""
    xp, slope = array_module(x), check_number("slope", slope)
    return xp.where(x > 0, x, slope * x), lambda g: xp.where(x > 0, g, slope * g)


@op
def absolute(x):
    """y = |x|        dy/dx = sign x, 0 at 0."""
    return abs(x), lambda g: g * array_module(x).sign(x)


@op
def maximum(a, b):
    """Elementwise, with broadcasting. A tie gives the whole gradient to a."""
    xp = array_module(a) if hasattr(a, "dtype") else array_module(b)

    def backward(g):
        da = lambda: unbroadcast(g * (a >= b), a.shape)
        db = lambda: unbroadcast(g * (a < b), b.shape)
        return da, db

    return xp.maximum(a, b), backward


@op
def minimum(a, b):
    """Elementwise, with broadcasting. A tie gives the whole gradient to a."""
    xp = array_module(a) if hasattr(a, "dtype") else array_module(b)

    def backward(g):
        da = lambda: unbroadcast(g * (a <= b), a.shape)
        db = lambda: unbroadcast(g * (a > b), b.shape)
        return da, db

    return xp.minimum(a, b), backward


@op
def clip(x, *, low: float, high: float):
    """y = min(max(x, low), high)     dy/dx = [low ≤ x ≤ high]        ValueError unless low ≤ high; ±∞ is no bound."""
    low, high = check_number("low", low), check_number("high", high)
    if low > high:
        raise ValueError(f"low must not be above high, got {low} and {high}.")
    return array_module(x).clip(x, low, high), lambda g: g * ((x >= low) & (x <= high))


@op
def where(condition, a, b):
    """y = a where the boolean array `condition` holds, else b; all three broadcast. TypeError if it is not boolean."""
    xp = array_module(condition)
    check_mask(condition)

    def backward(g):
        da = lambda: unbroadcast(xp.where(condition, g, 0.0), a.shape)
        db = lambda: unbroadcast(xp.where(condition, 0.0, g), b.shape)
        return None, da, db

    return xp.where(condition, a, b), backward


@op
def dropout(x, mask, *, rate: float):
    """y = x·m/(1−rate).   mask: booleans that broadcast with x, True with probability 1−rate, drawn by the caller.

    (Srivastava et al. 2014, in the form that needs no rescaling at test time.)  0 ≤ rate < 1 (ValueError); TypeError
    for a mask that is not boolean.
    """
    check_mask(mask)
    if not 0.0 <= check_number("rate", rate) < 1.0:
        raise ValueError(f"rate must be at least 0 and below 1, got {rate}.")
    scale = 1.0 / (1.0 - rate)
    return x * mask * scale, lambda g: (unbroadcast(g * mask * scale, x.shape), None)


# ---- reductions: the output has fewer axes, so g is stretched back over the ones that were summed away


def _axis(axis, ndim):
    """The axis counted from the front; ValueError if there is none such, TypeError if it is no integer."""
    check_integers(axis)
    if not -ndim <= axis < ndim:
        raise ValueError(f"axis {axis} is out of bounds for an array with {ndim} axes: count from 0, or back from -1.")
    return int(axis) % ndim


def _axes(axis, ndim):
    axes = range(ndim) if axis is None else axis if isinstance(axis, tuple) else (axis,)
    return tuple(_axis(a, ndim) for a in axes)


def _stretchable(g, axis, ndim, keepdims):
    """g with axes of length 1 where the reduction removed them."""
    if keepdims or ndim == 0:
        return g
    axes, shape = _axes(axis, ndim), iter(g.shape)
    return g.reshape([1 if i in axes else next(shape) for i in range(ndim)])


@op
def sum(x, *, axis=None, keepdims: bool = False):
    """y = Σ x over one axis, a tuple of axes, or all.       ∂y/∂xᵢ = 1"""

    def backward(g):
        return array_module(x).broadcast_to(_stretchable(g, axis, x.ndim, keepdims), x.shape)

    return x.sum(axis=axis, keepdims=keepdims), backward


@op
def mean(x, *, axis=None, keepdims: bool = False):
    """y = (1/n) Σ x over one axis, a tuple of axes, or all, n elements each.       ∂y/∂xᵢ = 1/n"""
    y = x.mean(axis=axis, keepdims=keepdims)
    n = math.prod(x.shape[i] for i in _axes(axis, x.ndim))

    def backward(g):
        return array_module(x).broadcast_to(_stretchable(g / n, axis, x.ndim, keepdims), x.shape)

    return y, backward


@op
def max(x, *, axis=None, keepdims: bool = False):
    """The largest element along the axes. Ties share the gradient equally."""
    top = x.max(axis=axis, keepdims=True)

    def backward(g):
        winners = (x == top).astype(x.dtype)
        return winners * (_stretchable(g, axis, x.ndim, keepdims) / winners.sum(axis=axis, keepdims=True))

    return top if keepdims else x.max(axis=axis), backward


@op
def logsumexp(x, *, axis=None, keepdims: bool = False):
    """y = log Σ eˣ, computed as m + log Σ e^(x−m) with m = max x.       ∂y/∂xᵢ = e^(xᵢ−y) = softmax(x)ᵢ

    Where the largest is ±∞, so is y, and those that are as large share the gradient.
    """
    xp = array_module(x)
    m = x.max(axis=axis, keepdims=True)
    largest = x == m  # where x − m is 0, and ∞ − ∞ would be no number
    e = xp.exp(xp.where(largest, 0.0, x) - xp.where(largest, 0.0, m))
    total = e.sum(axis=axis, keepdims=True)
    y = m + xp.log(total)

    def backward(g):
        return _stretchable(g, axis, x.ndim, keepdims) * (e / total)

    return y if keepdims else y.reshape([n for i, n in enumerate(x.shape) if i not in _axes(axis, x.ndim)]), backward


@op
def cumsum(x, *, axis: int = -1):
    """yᵢ = Σ_{j≤i} xⱼ, so xⱼ reaches every yᵢ with i ≥ j:  dxⱼ = Σ_{i≥j} gᵢ, a cumulative sum from the other end."""
    xp, axis = array_module(x), _axis(axis, x.ndim)
    return xp.cumsum(x, axis=axis), lambda g: xp.flip(xp.cumsum(xp.flip(g, axis), axis=axis), axis)


# ---- products


@op
def matmul(a, b):
    """y = a b        da = g bᵀ        db = aᵀ g

    a (..., M, K)  b (..., K, N)  ->  y (..., M, N); leading axes broadcast. A vector a counts as one row, a vector b
    as one column, and the axis added for it is dropped from y. ValueError for a number.
    """
    if not (getattr(a, "ndim", 0) and getattr(b, "ndim", 0)):
        raise ValueError("a matrix product needs arrays with axes: multiply by a number with *.")
    rows = a.reshape(1, -1) if a.ndim == 1 else a
    columns = b.reshape(-1, 1) if b.ndim == 1 else b
    y = a @ b

    def backward(g):
        shape = list(g.shape)  # put back the axes that were dropped for vectors, the column's first
        if b.ndim == 1:
            shape.append(1)
        if a.ndim == 1:
            shape.insert(len(shape) - 1, 1)
        g = g.reshape(shape)
        da = lambda: unbroadcast(g @ columns.swapaxes(-1, -2), rows.shape).reshape(a.shape)
        db = lambda: unbroadcast(rows.swapaxes(-1, -2) @ g, columns.shape).reshape(b.shape)
        return da, db

    return y, backward


# ---- moving elements: the rule moves the gradient back to where each element came from


@op
def reshape(x, *, shape):
    """The same elements in another shape, in the same order; one length may be −1."""
    return x.reshape(shape), lambda g: g.reshape(x.shape)


@op
def transpose(x, *, axes=None):
    """Axis i of y is axis axes[i] of x; without axes, the order is reversed. The rule applies the inverse order."""
    order = tuple(range(x.ndim))[::-1] if axes is None else axes
    y = x.transpose(order)
    inverse = [_axes(order, x.ndim).index(i) for i in range(x.ndim)]
    return y, lambda g: g.transpose(inverse)


@op
def concat(*xs, axis: int = 0):
    """Join along an existing axis; the rule cuts g at the seams. ValueError for no inputs."""
    if not xs:
        raise ValueError("there must be at least one array to join.")
    xp, axis = array_module(xs[0]), _axis(axis, xs[0].ndim)

    def backward(g):
        pieces, start = [], 0
        for x in xs:
            at = [slice(None)] * g.ndim
            at[axis] = slice(start, start + x.shape[axis])
            start += x.shape[axis]
            pieces.append(g[tuple(at)])
        return tuple(pieces)

    return xp.concatenate(xs, axis=axis), backward


@op
def stack(*xs, axis: int = 0):
    """Join along a new axis; the rule takes the slices of g apart. ValueError for no inputs."""
    if not xs:
        raise ValueError("there must be at least one array to join.")
    axis = _axis(axis, xs[0].ndim + 1)
    y = array_module(xs[0]).stack(xs, axis=axis)
    before = (slice(None),) * axis

    def backward(g):
        return tuple(g[(*before, i)] for i in range(len(xs)))

    return y, backward


@op
def split(x, *, sections: int, axis: int = 0):
    """Cut into equal parts, returned as a tuple; the rule joins their gradients. ValueError if they are not equal."""
    xp, axis = array_module(x), _axis(axis, x.ndim)
    check_integers(sections)
    if sections < 1 or x.shape[axis] % sections:
        raise ValueError(f"an axis of length {x.shape[axis]} cannot be cut into {sections} equal parts.")
    return tuple(xp.split(x, sections, axis=axis)), lambda *gs: xp.concatenate(gs, axis=axis)


@op
def getitem(x, *, key):
    """y = x[key] for integers, slices, None, `...`, and arrays of integers (duplicates add up) or of booleans, which
    are on x's device.

    TypeError for anything else, which NumPy might read as integers: a list, a tuple within the key, a range, True.
    """
    keys = key if type(key) is tuple else (key,)
    for k in keys:
        plain = k is None or k is Ellipsis or type(k) in (int, slice)
        if not plain and getattr(getattr(k, "dtype", None), "kind", "") not in ("i", "u", "b"):
            raise TypeError(
                "an index is an integer, a slice, None, ... or an array of integers or booleans, "
                f"got {type(k).__name__}: make a sequence an array first."
            )
    has_arrays = any(hasattr(k, "dtype") for k in keys)

    def backward(g):
        xp = array_module(x)
        dx = xp.zeros_like(x)
        if has_arrays:
            xp.add.at(dx, key, g)  # two entries of y may be the same entry of x
        else:
            dx[key] = g
        return dx

    return x[key], backward


@op
def gather(x, index, *, axis: int = -1):
    """y[..., i, ...] = x[..., index[..., i, ...], ...]: one element per entry of `index` (take_along_axis).

    index: integers, of x's shape but for the length of `axis` (ValueError).
    """
    xp = array_module(x)
    axis = _axis(axis, x.ndim)
    check_integers(index)
    others = lambda shape: shape[:axis] + shape[axis + 1 :]
    if index.ndim != x.ndim or others(index.shape) != others(x.shape):
        raise ValueError(f"the index must have the shape of x, {x.shape}, but for axis {axis}: it has {index.shape}.")

    def backward(g):
        dx = xp.zeros_like(x)
        grid = [xp.arange(n).reshape([-1 if i == a else 1 for i in range(x.ndim)]) for a, n in enumerate(index.shape)]
        grid[axis] = index
        xp.add.at(dx, tuple(grid), g)
        return dx, None

    return xp.take_along_axis(x, index, axis=axis), backward


@op
def take(x, index, *, axis: int = 0):
    """y = the slices of x at the integers `index` (any shape) along `axis`; duplicates add up on the way back.

    TypeError unless the index is an integer or an array of them.
    """
    xp = array_module(x)
    axis = _axis(axis, x.ndim)
    check_integers(index)
    key = (slice(None),) * axis + (index,)

    def backward(g):
        dx = xp.zeros_like(x)
        xp.add.at(dx, key, g)
        return dx, None

    return x[key], backward


# ---- plain functions that several rules share


def check_mask(mask: Array) -> None:
    """TypeError unless it is an array of booleans: other numbers choose by their truth and weigh by their value."""
    if not hasattr(mask, "dtype") or mask.dtype.kind != "b":
        raise TypeError("a mask or condition must be an array of booleans: compare its numbers first.")


def check_number(name: str, value: float) -> float:
    """A setting that every element shares; TypeError unless it is one real number that compares with others."""
    if not isinstance(value, int | float | np.integer | np.floating) or value != value:
        raise TypeError(f"{name} must be one real number, got {value!r}.")
    return float(value)


def stable_sigmoid(x: Array) -> Array:
    """σ(x) = 1/(1 + e⁻ˣ) = e^min(x,0) / (1 + e^−|x|): no exponential overflows, and small values keep their digits."""
    xp = array_module(x)
    return xp.exp(xp.minimum(x, 0.0)) / (1.0 + xp.exp(-abs(x)))


# ---- the operator table


def _reshape(x, *shape):
    """x.reshape(2, 3) or x.reshape((2, 3)); one length may be −1."""
    return reshape(x, shape=shape[0] if len(shape) == 1 else shape)


def _transpose(x, *axes):
    """x.transpose() reverses the axes, x.transpose(1, 0, 2) orders them."""
    return transpose(x, axes=(axes[0] if len(axes) == 1 else axes) if axes else None)


def _reduction(function):
    def method(x, axis=None, keepdims=False):
        return function(x, axis=axis, keepdims=keepdims)

    method.__doc__ = function.__doc__
    return method


def _value(x):
    return x.data if type(x) is Tensor else x


Tensor.__add__ = Tensor.__radd__ = add
Tensor.__sub__ = subtract
Tensor.__rsub__ = lambda b, a: subtract(a, b)
Tensor.__mul__ = Tensor.__rmul__ = multiply
Tensor.__truediv__ = divide
Tensor.__rtruediv__ = lambda b, a: divide(a, b)
Tensor.__pow__ = power
Tensor.__rpow__ = lambda b, a: power(a, b)
Tensor.__matmul__ = matmul
Tensor.__rmatmul__ = lambda b, a: matmul(a, b)
Tensor.__neg__ = negative
Tensor.__abs__ = absolute
Tensor.__getitem__ = lambda x, key: getitem(x, key=key)
Tensor.reshape = _reshape
Tensor.transpose = _transpose
Tensor.T = property(transpose)  # type: ignore[assignment]
Tensor.sum, Tensor.mean, Tensor.max = _reduction(sum), _reduction(mean), _reduction(max)
Tensor.logsumexp = _reduction(logsumexp)
for _function in (exp, log, sqrt, tanh, sigmoid, relu, cumsum):
    setattr(Tensor, _function.__name__, _function)
# comparisons have no derivative: they give plain boolean arrays, which are constants
Tensor.__eq__ = lambda a, b: _value(a) == _value(b)
Tensor.__ne__ = lambda a, b: _value(a) != _value(b)
Tensor.__hash__ = object.__hash__
Tensor.__gt__ = lambda a, b: _value(a) > _value(b)
Tensor.__ge__ = lambda a, b: _value(a) >= _value(b)
Tensor.__lt__ = lambda a, b: _value(a) < _value(b)
Tensor.__le__ = lambda a, b: _value(a) <= _value(b)
