"""The engine: a Tensor, the `@op` decorator that lifts a rule onto the tape, and the walk that runs it backwards.

A **rule** is a plain function on arrays. It computes the output and returns it together with a function `backward`
that turns the gradient of the loss with respect to the output into the gradients with respect to the inputs:

    @op
    def multiply(a, b):
        def backward(g):                                   # g = ∂ℒ/∂out
            da = lambda: unbroadcast(g * b, a.shape)       # computed only if `a` asked for a gradient
            db = lambda: unbroadcast(g * a, b.shape)
            return da, db
        return a * b, backward

The contract of a rule:

* Positional parameters are arrays, and each gets one gradient, in order. Keyword-only parameters are settings.
* `backward(g)` is pure: it writes neither into `g` nor into an input nor into anything saved. It returns an array,
  None (no gradient), or a zero-argument function, for work that can be skipped. A rule with one input may return its
  gradient without a tuple. A function that takes `out` writes its result there if `out` is not None.
* A gradient has its input's shape and dtype; the engine checks this. Broadcasting is undone in the rule, visibly.
* A rule with several outputs returns them as a tuple, and its `backward` gets one gradient for each.
* A rule without a derivative returns `(out, None)`; asking for a gradient through it is an error, never silence.
* `multiply.rule` is the bare function on arrays, for tests and for other rules.
"""

from __future__ import annotations

import functools
import itertools
import os
import sys
from threading import get_ident

import numpy as np

from .backend import array_module, to_host

__all__ = ["Op", "Tensor", "enable_grad", "grad", "no_grad", "op", "unbroadcast"]

_PACKAGE = os.path.dirname(__file__) + os.sep
_creation = itertools.count()
_quiet: set[int] = set()  # the threads that are within `no_grad()`: what one does must not reach another
_new = object.__new__


class Tensor:
    """An array, and how it was made.

    data: an array of NumPy or CuPy, float32 or float64 (else TypeError). Lists and Python numbers become float64 NumPy
    arrays.
    requires_grad: for a leaf, whether `backward()` shall leave a gradient in `.grad` (an array like `data`, or None).

    In-place operations, views that share gradients and higher-order derivatives are not offered. Plain arrays and
    Python numbers mix freely with Tensors: they are constants. Two Tensors of different dtypes never mix.
    """

    __slots__ = (
        "__weakref__",
        "_backward",  # the rule's closure, until it is used
        "_code",  # the code object that called the op …
        "_index",  # which output of a rule with several outputs this is, else None
        "_inputs",  # the positional arguments of the rule: Tensors and constants
        "_instruction",  # … and where in it
        "_op",  # the op that made it, None for a leaf
        "_order",  # creation number; an op's output is newer than its inputs
        "_settings",  # the keyword arguments of the rule
        "buffer",  # for a parameter: where its gradient has to be written, see minigrad.optim
        "data",
        "grad",
        "requires_grad",
    )
    __array_ufunc__ = None  # ndarray * Tensor asks Tensor.__rmul__ instead of making an array of objects

    def __init__(self, data, requires_grad: bool = False):
        if isinstance(data, Tensor):
            raise TypeError("Tensor of a Tensor: use it as it is, or its .detach().")
        if not hasattr(data, "dtype"):
            data = np.asarray(data, dtype=np.float64)
        elif isinstance(data, np.generic):  # a NumPy scalar cannot be written into, as a parameter must be
            data = np.asarray(data)
        if data.dtype != np.float32 and data.dtype != np.float64:
            raise TypeError(f"a Tensor holds float32 or float64, got {data.dtype}: use data.astype('float32').")
        array_module(data)
        self._start(data, requires_grad)

    def _start(self, data, requires_grad):
        self.data = data
        self.requires_grad = requires_grad
        self.grad = self.buffer = self._op = self._backward = self._settings = self._code = self._index = None
        self._inputs = ()
        self._order = next(_creation)

    # -- what it is

    @property
    def shape(self):
        return self.data.shape

    @property
    def dtype(self):
        return self.data.dtype

    @property
    def ndim(self):
        return self.data.ndim

    @property
    def size(self):
        return self.data.size

    def __len__(self):
        return self.data.shape[0]

    def __repr__(self):
        made_by = f", made by {self._op.name}" if self._op else ", requires_grad" if self.requires_grad else ""
        return f"Tensor({self.data}{made_by})"

    def __bool__(self):
        raise TypeError("a Tensor is neither true nor false: compare its .item(), or ask for its .size.")

    def __array__(self, *_, **__):
        raise TypeError("a Tensor does not turn into an array by itself: use .data, or .numpy() for a host copy.")

    def __reduce__(self):
        """For `copy` and `pickle`: a leaf made anew, since two Tensors with one creation number would count as one."""
        if self._op is not None:
            raise TypeError(f"only a leaf can be copied or pickled, not what {self._op.name} made: use .detach().")
        return Tensor, (self.data, self.requires_grad), (None, {"grad": self.grad})

    def item(self) -> float:
        """The value of a Tensor with one element, as a Python float."""
        return self.data.item()

    def numpy(self) -> np.ndarray:
        """The value as a NumPy array, on whatever device it lives."""
        return to_host(self.data)

    def detach(self) -> Tensor:
        """A constant with the same array."""
        return Tensor(self.data)

    # -- the way back

    def backward(self, g=None) -> None:
        """Add ∂self/∂leaf to `.grad` of every leaf that requires a gradient.

        g: the gradient of the final objective with respect to self, an array of its shape and dtype; it may be left
        out for a Tensor with one element, where it is 1.

        Why an order at all? In `b = a + a; c = b + b` the gradient of b has two parts, and b's rule may run only when
        both have arrived. Creation order is such an order: whatever used b was created after b, so visiting the nodes
        newest first completes each gradient before it is passed on.

        Why is a second call an error? Every rule's closure, and with it the arrays it saved, is freed as soon as it
        has been used; memory shrinks while the walk goes on. Run the forward pass again to differentiate again.
        """
        for leaf, g_leaf, owned in _walk(self, g, None, keep=False):
            if leaf.buffer is not None:
                if g_leaf is not leaf.buffer:
                    leaf.buffer[...] = g_leaf if leaf.grad is None else leaf.grad + g_leaf
                leaf.grad = leaf.buffer
            elif leaf.grad is None:
                leaf.grad = g_leaf if owned else g_leaf.copy()
            else:
                leaf.grad = leaf.grad + g_leaf


def grad(y: Tensor, inputs, g=None, keep: bool = False) -> list:
    """∂y/∂z for each Tensor z of `inputs` (leaves or not), as a list of arrays; `.grad` is left alone.

    Only rules on a path from y down to some z are run, so the work for other inputs (the weight products of a network,
    say) is skipped, and what lies below the lowest z stays usable. g: as for `Tensor.backward`.  keep: leave the graph
    usable for another call; without it, another call through what was used is an error, never zeros.
    TypeError for an input that is no Tensor, or requires no gradient.
    A z that y does not depend on gets an array of zeros. The arrays may be shared or read-only: copy before writing.
    """
    if isinstance(inputs, Tensor):  # its elements would be new Tensors, on which y does not depend
        raise TypeError("grad: the inputs must be a list of Tensors, not one Tensor.")
    inputs = list(inputs)
    for z in inputs:
        if not isinstance(z, Tensor) or not z.requires_grad:
            raise TypeError("grad: each input must be a Tensor that requires a gradient (requires_grad=True).")
    found = {z._order: g_z for z, g_z, _ in _walk(y, g, inputs, keep)}
    return [found[z._order] if z._order in found else array_module(z.data).zeros_like(z.data) for z in inputs]


class no_grad:
    """`with no_grad():` computes values only, in this thread: no closure is kept, no graph is built."""

    _record = False

    def __init__(self):
        self._before = []  # one entry for each time it was entered: the same object may be nested

    def __enter__(self):
        self._before.append(get_ident() not in _quiet)
        self._set(self._record)

    def __exit__(self, *_):
        self._set(self._before.pop())

    @staticmethod
    def _set(record):
        (_quiet.discard if record else _quiet.add)(get_ident())


class enable_grad(no_grad):
    """`with enable_grad():` builds graphs again, also within `no_grad()`."""

    _record = True


class Op:
    """What the engine knows of an op: its name, its bare `rule`, and for a stochastic estimator its `surrogate`.

    surrogate(*arrays, **settings) returns a pair: the positions of the inputs that get a gradient, and a function of
    just those inputs whose derivative, at their present values, is what the rule passes back. `minigrad.check.audit`
    verifies the rule against it. `enumerated` names the test that proves a rule for which there is no such function.
    """

    __slots__ = ("enumerated", "name", "rule", "surrogate")

    def __init__(self, rule, surrogate, enumerated):
        self.name, self.rule, self.surrogate, self.enumerated = rule.__name__, rule, surrogate, enumerated


def op(rule=None, *, surrogate=None, enumerated=None):
    """Lift a rule on arrays to a function on Tensors, arrays and numbers (see the module's docstring).

    The lifted function has `.rule` (the bare rule) and `.op` (an `Op`), and raises TypeError when its result would
    have another dtype than its Tensors.
    """
    if rule is None:
        return functools.partial(op, surrogate=surrogate, enumerated=enumerated)
    this = Op(rule, surrogate, enumerated)

    @functools.wraps(rule)
    def apply(*inputs, **settings):
        arrays, dtype, tracked = [], None, False
        for x in inputs:
            if type(x) is Tensor:
                data = x.data
                if dtype is None:
                    dtype = data.dtype
                elif dtype != data.dtype:
                    raise TypeError(f"{this.name}: {_describe(inputs)} mix dtypes; convert one with .astype.")
                if x.requires_grad:
                    tracked = True
                x = data
            arrays.append(x)

        try:
            out, backward = rule(*arrays, **settings)
        except (ValueError, IndexError) as error:
            raise type(error)(f"{this.name}: {error} (inputs: {_describe(inputs)})") from None

        tracked = tracked and not (_quiet and get_ident() in _quiet)
        if type(out) is tuple:
            if dtype is not None and any(o.dtype != dtype for o in out):
                raise TypeError(f"{this.name}: {_describe(inputs)} give {_describe(out)}; convert them to one dtype.")
            return _several(this, out, backward, inputs, settings, tracked)
        if dtype is not None and out.dtype != dtype:
            raise TypeError(f"{this.name}: {_describe(inputs)} give {out.dtype}; convert the inputs to one dtype.")
        if tracked:
            return _node(out, this, inputs, settings, backward, sys._getframe(1))
        return _constant(out)

    apply.rule, apply.op = rule, this
    return apply


def _constant(data):
    tensor = _new(Tensor)
    tensor._start(data, False)
    return tensor


def _node(data, this, inputs, settings, backward, frame):
    """The Tensor that remembers how it was made; `frame` is where the op was called."""
    code = frame.f_code
    while code.co_filename.startswith(_PACKAGE):  # the user's line, not the one in nn.py or in the operator table
        frame = frame.f_back
        code = frame.f_code
    tensor = _new(Tensor)
    tensor.data = data
    tensor.requires_grad = True
    tensor.grad = tensor.buffer = tensor._index = None
    tensor._op = this
    tensor._inputs = inputs
    tensor._settings = settings
    tensor._backward = backward
    tensor._order = next(_creation)
    tensor._code = code
    tensor._instruction = frame.f_lasti
    return tensor


def _several(this, outs, backward, inputs, settings, tracked):
    """One node holds all outputs of a rule; each output is a Tensor that knows its place in that node."""
    tensors = tuple(map(_constant, outs))
    if tracked:
        node = _node(outs, this, inputs, settings, backward, sys._getframe(2))
        for i, tensor in enumerate(tensors):
            tensor.requires_grad, tensor._op, tensor._inputs, tensor._index = True, this, (node,), i
            tensor._order = next(_creation)  # newer than the node
    return tensors


def _used(*_):
    raise RuntimeError("this graph was already differentiated and freed: run the forward pass again.")


def _reachable(y: Tensor, oldest: int = -1) -> dict[int, Tensor]:
    """The nodes that y was computed from, by creation number, without recursion; none older than `oldest`."""
    nodes, stack = {}, [y]
    while stack:
        t = stack.pop()
        order = t._order
        if order not in nodes:
            nodes[order] = t
            for x in t._inputs:
                if type(x) is Tensor and x.requires_grad and x._order not in nodes and x._order >= oldest:
                    stack.append(x)
    return nodes


def _walk(y: Tensor, g, targets, keep):
    """Run the rules newest first. Yields (tensor, its complete gradient, whether the engine owns that array) for each
    target; without targets, for each leaf."""
    if not y.requires_grad:
        raise RuntimeError("this Tensor does not depend on anything that requires a gradient.")
    if g is None:
        if y.data.size != 1:
            raise RuntimeError(f"a Tensor of shape {y.shape} needs the gradient of the objective: backward(g).")
        g = array_module(y.data).ones_like(y.data)
    elif type(g) is Tensor:
        raise TypeError("g must be an array, not a Tensor: pass its .data.")
    elif getattr(g, "shape", None) != y.data.shape or g.dtype != y.data.dtype:
        raise TypeError(f"g is {_describe((g,))}, the Tensor is {y.dtype}{y.shape}: they must be alike.")
    elif array_module(g) is not array_module(y.data):  # a rule that only multiplies by a number would not notice
        raise TypeError("g and the Tensor must be on the same device: send g there with Backend.to_device.")

    if targets is None:
        nodes, wanted, on_path = _reachable(y), None, None
    else:
        wanted = {z._order for z in targets}
        lowest = min(wanted, default=y._order)
        nodes = _reachable(y, lowest)
        on_path = set()
        for order in sorted(nodes):
            if order > lowest and nodes[order]._backward is _used:
                _used()  # it has forgotten its inputs, and a target may have been among them
            if order in wanted or any(type(x) is Tensor and x._order in on_path for x in nodes[order]._inputs):
                on_path.add(order)

    grads, owned = {y._order: g}, set()
    for order in sorted(nodes, reverse=True):
        t = nodes.pop(order)
        g = grads.pop(order, None)
        if g is None:
            continue  # everything that used t returned None for it
        if (t._op is None) if wanted is None else (order in wanted):
            yield t, g, order in owned
        if t._op is None:
            continue

        inputs, index = t._inputs, t._index
        if wanted and order in wanted and not any(type(x) is Tensor and x._order in on_path for x in inputs):
            continue  # nothing below it was asked for
        if index is not None:  # an output of a rule with several: put g in its place and wait for the others
            node = inputs[0]
            grads.setdefault(node._order, [None] * len(node.data))[index] = g
            continue

        rule = t._backward
        if rule is None:
            raise RuntimeError(f"{t._op.name}, created at {created_at(t)}, has no derivative.")
        if type(g) is list:
            zeros_like = array_module(t.data[0]).zeros_like
            gradients = rule(*[zeros_like(d) if gi is None else gi for gi, d in zip(g, t.data, strict=True)])
        else:
            gradients = rule(g)
        if not keep:
            t._backward = _used
        if type(gradients) is not tuple:
            gradients = (gradients,)
        if len(gradients) != len(inputs):
            raise RuntimeError(f"{t._op.name} has {len(inputs)} inputs, its rule gave {len(gradients)} gradients.")

        for x, dx in zip(inputs, gradients):  # noqa: B905 (lengths were compared just above)
            if type(x) is not Tensor or not x.requires_grad or dx is None:
                continue
            k = x._order
            if on_path is not None and k not in on_path:
                continue
            if callable(dx):
                if x.buffer is not None and x.grad is None and wanted is None and k not in grads and _takes_out(dx):
                    dx = dx(out=x.buffer)
                    owned.add(k)
                else:
                    dx = dx()
            data = x.data
            if dx.shape != data.shape or dx.dtype != data.dtype:
                raise RuntimeError(
                    f"{t._op.name}, created at {created_at(t)}: the gradient of an input of {data.dtype}{data.shape} "
                    f"came out as {dx.dtype}{dx.shape}."
                )
            if k not in grads:
                grads[k] = dx
            elif k in owned and data.ndim:
                grads[k] += dx
            else:  # the first sum makes an array that the engine owns and may write into from now on
                grads[k] = grads[k] + dx
                owned.add(k)
        if not keep:
            t._inputs = ()


def _takes_out(function) -> bool:
    return function.__code__.co_argcount == 1


def created_at(t: Tensor) -> str:
    """`file.py:12`, the line that called the op."""
    line = next((line for start, end, line in t._code.co_lines() if start <= t._instruction < end), "?")
    return f"{os.path.basename(t._code.co_filename)}:{line}"


def unbroadcast(g, shape):
    """Undo broadcasting: sum g over the axes along which an array of `shape` was repeated."""
    if g.shape == shape:
        return g
    if g.ndim > len(shape):
        g = g.sum(axis=tuple(range(g.ndim - len(shape))))
    repeated = tuple(i for i, n in enumerate(shape) if n == 1 and g.shape[i] != 1)
    return g.sum(axis=repeated, keepdims=True) if repeated else g


def _describe(inputs) -> str:
    return ", ".join(
        f"{x.dtype}{x.shape}" if hasattr(x, "dtype") and hasattr(x, "shape") else type(x).__name__ for x in inputs
    )
