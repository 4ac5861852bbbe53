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

An error inside a rule keeps its traceback, and a note below it names the op, the line that called it, and its inputs.
"""

from __future__ import annotations

import functools
import itertools
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from threading import get_ident
from types import CodeType, FrameType
from typing import TYPE_CHECKING, Any, Protocol, Self, overload

import numpy as np

from .backend import ARRAY_MODULES, Array, array_module, to_host

__all__ = [
    "Gradients",
    "Node",
    "Op",
    "RuleError",
    "Tensor",
    "enable_grad",
    "grad",
    "mark_updated",
    "no_grad",
    "nodes_of",
    "op",
    "unbroadcast",
]

Operand = Any  # what an op takes beside a Tensor: an array or a Python number, which are constants
_NUMBERS = frozenset({float, int, bool})

_PACKAGE = os.path.dirname(__file__) + os.sep
_clock = itertools.count(1)  # what is made later has a larger number, and so has an update
_quiet: set[int] = set()  # the threads that are within `no_grad()`: what one does must not reach another
_new = object.__new__


class Tensor:
    """An array, and how it was made.

    data: an array of NumPy or CuPy, float32 or float64 (else TypeError). Lists of numbers and Python numbers become
    float64 NumPy arrays.
    requires_grad: for a leaf, whether `backward()` shall leave a gradient in `.grad` (an array like `data`, or None).
    node, index: what an op made is output `index` of a `Node`, or its only one (None); a leaf has no node.
    grad_buffer: for a parameter, the array that `backward()` writes its gradient into; it belongs to the optimizer.

    In-place operations, views that share gradients and higher-order derivatives are not offered. Plain arrays and
    Python numbers mix freely with Tensors: they are constants. Two Tensors of different dtypes never mix.
    """

    # grad_buffer and updated are a leaf's alone: what an op made leaves them unset
    __slots__ = (
        "__weakref__",
        "created",
        "data",
        "grad",
        "grad_buffer",
        "index",
        "node",
        "requires_grad",
        "updated",
    )
    __array_ufunc__ = None  # ndarray * Tensor asks Tensor.__rmul__ instead of making an array of objects

    data: Array
    grad: Array | None
    grad_buffer: Array | None
    node: Node | None
    index: int | None
    requires_grad: bool
    created: int
    updated: int

    def __init__(self, data: Array | Sequence | float, requires_grad: bool = False) -> None:
        if isinstance(data, Tensor):
            raise TypeError("Tensor of a Tensor: use it as it is, or its .detach().")
        if not hasattr(data, "dtype"):
            data = np.asarray(data)
            if data.dtype.kind not in "biuf" and data.size:  # None would become NaN, and "1" the number 1
                raise TypeError(f"a Tensor holds numbers, got {data.dtype}: use an array or a list of numbers.")
            data = data.astype(np.float64)
        elif isinstance(data, np.generic):  # a NumPy scalar cannot be written into, as a parameter must be
            data = np.asarray(data)
        if data.dtype != np.float32 and data.dtype != np.float64:
            raise TypeError(f"a Tensor holds float32 or float64, got {data.dtype}: use data.astype('float32').")
        array_module(data)
        self._become_leaf(data, requires_grad)

    def _become_leaf(self, data: Array, requires_grad: bool) -> None:
        self.data = data
        self.requires_grad = requires_grad
        self.grad = self.grad_buffer = self.node = self.index = None
        self.created = next(_clock)
        self.updated = 0

    # -- what it is

    @property
    def shape(self) -> tuple[int, ...]:
        return self.data.shape

    @property
    def dtype(self) -> np.dtype:
        return self.data.dtype

    @property
    def ndim(self) -> int:
        return self.data.ndim

    @property
    def size(self) -> int:
        return self.data.size

    def __len__(self) -> int:
        return self.data.shape[0]

    def __repr__(self) -> str:
        made_by = f", made by {self.node.op.name}" if self.node else ", requires_grad" if self.requires_grad else ""
        return f"Tensor({self.data}{made_by})"

    def __bool__(self) -> bool:
        raise TypeError("a Tensor is neither true nor false: compare its .item(), or ask for its .size.")

    def __array__(self, *_: Any, **__: Any) -> np.ndarray:
        raise TypeError("a Tensor does not turn into an array by itself: use .data, or .numpy() for a host copy.")

    def __reduce__(self) -> tuple:
        """For `copy` and `pickle`: a leaf made anew, since two Tensors of one creation number would count as one."""
        if self.node is not None:
            raise TypeError(f"only a leaf can be copied or pickled, not what {self.node.op.name} made: use .detach().")
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

    def backward(self, g: Array | None = None) -> None:
        """Add ∂self/∂leaf to `.grad` of every leaf that requires a gradient.

        g: the gradient of the final objective with respect to self, an array of its shape and dtype; it may be left
        out for a Tensor with one element, where it is 1.

        Why an order at all? In `b = a + a; c = b + b` the gradient of b has two parts, and b's rule may run only when
        both have arrived. Creation order is such an order: whatever used b was created after b, so visiting the nodes
        newest first completes each gradient before it is passed on.

        Why is a second call an error? Every rule's closure, and with it the arrays it saved, is freed as soon as it
        has been used; memory shrinks while the walk goes on. Run the forward pass again to differentiate again.

        RuntimeError, too, if an optimizer has updated a parameter since the graph was built: the closures share its
        array, and the gradient would be one at neither point.
        """
        gradients = Gradients()
        gradients.add(self, _start(self, g))
        _walk(nodes_of(self), gradients, keep=False)
        gradients.write_to_leaves()

    if TYPE_CHECKING:  # the operator table, which `minigrad.ops` fills in

        def __add__(self, other: Operand) -> Tensor: ...
        def __radd__(self, other: Operand) -> Tensor: ...
        def __sub__(self, other: Operand) -> Tensor: ...
        def __rsub__(self, other: Operand) -> Tensor: ...
        def __mul__(self, other: Operand) -> Tensor: ...
        def __rmul__(self, other: Operand) -> Tensor: ...
        def __truediv__(self, other: Operand) -> Tensor: ...
        def __rtruediv__(self, other: Operand) -> Tensor: ...
        def __pow__(self, other: Operand) -> Tensor: ...
        def __rpow__(self, other: Operand) -> Tensor: ...
        def __matmul__(self, other: Operand) -> Tensor: ...
        def __rmatmul__(self, other: Operand) -> Tensor: ...
        def __neg__(self) -> Tensor: ...
        def __abs__(self) -> Tensor: ...
        def __getitem__(self, key: Any) -> Tensor: ...
        def __iter__(self) -> Iterator[Tensor]: ...
        def __eq__(self, other: Operand) -> Array: ...
        def __ne__(self, other: Operand) -> Array: ...
        def __lt__(self, other: Operand) -> Array: ...
        def __le__(self, other: Operand) -> Array: ...
        def __gt__(self, other: Operand) -> Array: ...
        def __ge__(self, other: Operand) -> Array: ...
        def __hash__(self) -> int: ...
        @property
        def T(self) -> Tensor: ...
        def reshape(self, *shape: Any) -> Tensor: ...
        def transpose(self, *axes: Any) -> Tensor: ...
        def sum(self, axis: Any = None, keepdims: bool = False) -> Tensor: ...
        def mean(self, axis: Any = None, keepdims: bool = False) -> Tensor: ...
        def max(self, axis: Any = None, keepdims: bool = False) -> Tensor: ...
        def logsumexp(self, axis: Any = None, keepdims: bool = False) -> Tensor: ...
        def exp(self) -> Tensor: ...
        def log(self) -> Tensor: ...
        def sqrt(self) -> Tensor: ...
        def tanh(self) -> Tensor: ...
        def sigmoid(self) -> Tensor: ...
        def relu(self) -> Tensor: ...
        def cumsum(self, *, axis: int = -1) -> Tensor: ...


def grad(y: Tensor, inputs: Iterable[Tensor], g: Array | None = None, keep: bool = False) -> list[Array]:
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
    g = _start(y, g)
    nodes = nodes_of(y, since=min((z.created if z.node is None else z.node.order for z in inputs), default=0))
    gradients = _TargetGradients(inputs, nodes)
    gradients.add(y, g)
    _walk(nodes, gradients, keep)
    found = [gradients.of(z) for z in inputs]
    return [array_module(z.data).zeros_like(z.data) if dz is None else dz for z, dz in zip(inputs, found, strict=True)]


def mark_updated(parameters: Iterable[Tensor]) -> None:
    """Note that the arrays of these leaves were written into: graphs that were built before cannot be differentiated.

    For whoever changes parameters in place, as an optimizer does.
    """
    now = next(_clock)
    for p in parameters:
        p.updated = now


class no_grad:
    """`with no_grad():` computes values only, in this thread: no closure is kept, no graph is built."""

    _record = False

    def __init__(self) -> None:
        self._before: list[bool] = []  # one entry for each time it was entered: the same object may be nested

    def __enter__(self) -> Self:
        self._before.append(get_ident() not in _quiet)
        self._set(self._record)
        return self

    def __exit__(self, *_: object) -> None:
        self._set(self._before.pop())

    @staticmethod
    def _set(record: bool) -> None:
        (_quiet.discard if record else _quiet.add)(get_ident())


class enable_grad(no_grad):
    """`with enable_grad():` builds graphs again, also within `no_grad()`."""

    _record = True


# ---- ops


class RuleError(RuntimeError):
    """A rule broke its contract: another number of gradients than inputs, or one of another shape or dtype."""


class Op:
    """What the engine knows of an op: its name, its bare `rule`, and for a stochastic estimator its `surrogate`.

    surrogate(*arrays, **settings) returns a pair: the positions of the inputs that get a gradient, and a function of
    just those inputs whose derivative, at their present values, is what the rule passes back. `minigrad.check.audit`
    verifies the rule against it. `enumerated` names the test that proves a rule for which there is no such function.
    """

    __slots__ = ("enumerated", "name", "rule", "surrogate")

    def __init__(self, rule: Callable, surrogate: Callable | None = None, enumerated: str | None = None) -> None:
        self.name: str = getattr(rule, "__name__", "rule")
        self.rule, self.surrogate, self.enumerated = rule, surrogate, enumerated

    def vjp(self, backward: Callable | None, gs: Sequence[Array], inputs: Sequence, gradients: Gradients) -> None:
        """Run a rule backwards: hand the gradient of each input that wants one to `gradients`, and check it.

        This is the only place that knows in which forms a rule may return them.
        gs: the gradients of the outputs.  inputs: what the op was called with; Tensors that require a gradient get it.
        RuntimeError if there is no rule; RuleError if it does not return one gradient for each input, of its shape and
        dtype.
        """
        if backward is None:
            raise RuntimeError(
                f"{self.name} has no derivative: call it on .detach(), or take the gradient of what came before."
            )
        returned = backward(*gs)
        if type(returned) is not tuple:
            returned = (returned,)
        if len(returned) != len(inputs):
            raise RuleError(
                f"{self.name} has {len(inputs)} inputs, its rule gave {len(returned)} gradients: {place_of(backward)}."
            )
        wants = gradients.wants
        for x, given in zip(inputs, returned):  # noqa: B905 (lengths were compared just above)
            if given is None or type(x) is not Tensor or not x.requires_grad or (wants is not None and not wants(x)):
                continue
            if callable(given):
                buffer = gradients.buffer_of(x) if x.node is None else None
                dx = given() if buffer is None or given.__code__.co_argcount == 0 else given(out=buffer)
            else:
                dx = given
            data = x.data
            if dx.shape != data.shape or (dx.dtype is not data.dtype and dx.dtype != data.dtype):
                raise RuleError(
                    f"{self.name}: the gradient of an input of {_describe((data,))} came out as {_describe((dx,))}: "
                    f"see the rule at {place_of(given if callable(given) else backward)}."
                )
            gradients.add(x, dx)


class LiftedOp(Protocol):
    """A function on Tensors, arrays and numbers, with the `rule` on arrays that it was made of."""

    rule: Callable[..., tuple[Any, Any]]
    op: Op
    __name__: str

    def __call__(self, *inputs: Any, **settings: Any) -> Any: ...


@overload
def op(rule: Callable) -> LiftedOp: ...
@overload
def op(*, surrogate: Callable | None = ..., enumerated: str | None = ...) -> Callable[[Callable], LiftedOp]: ...
def op(rule: Callable | None = None, *, surrogate: Callable | None = None, enumerated: str | None = None) -> Any:
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
                elif dtype is not data.dtype and dtype != data.dtype:
                    raise TypeError(f"{this.name}: {_describe(inputs)} mix dtypes; convert one with .astype.")
                if x.requires_grad:
                    tracked = True
                x = data
            elif type(x) not in ARRAY_MODULES and type(x) not in _NUMBERS:
                _check_operand(x, this.name)
            arrays.append(x)

        try:
            out, backward = rule(*arrays, **settings)
        except Exception as error:
            error.add_note(f"in {this.name}, called at {_line_of(*_caller(sys._getframe(1)))}: {_describe(inputs)}")
            raise

        tracked = tracked and not (_quiet and get_ident() in _quiet)
        if type(out) is tuple:
            if dtype is not None and any(o.dtype != dtype for o in out):
                raise TypeError(f"{this.name}: {_describe(inputs)} give {_describe(out)}; convert them to one dtype.")
            if not tracked:
                return tuple(map(_constant, out))
            node = _node(this, inputs, settings, backward, sys._getframe(1))
            node.outputs = out
            node.output_keys = tuple([next(_clock) for _ in out])
            return tuple([_output(o, node, i) for i, o in enumerate(out)])
        if dtype is not None and out.dtype is not dtype and out.dtype != dtype:
            raise TypeError(f"{this.name}: {_describe(inputs)} give {out.dtype}; convert the inputs to one dtype.")
        if tracked:
            return _output(out, _node(this, inputs, settings, backward, sys._getframe(1)))
        return _constant(out)

    apply.rule, apply.op = rule, this  # type: ignore[attr-defined]
    return apply


class Node:
    """One call of an op that gradients can pass through: what the tape remembers of it.

    op, inputs (the positional arguments: Tensors and constants), settings (the others)
    backward: the rule's closure, until it has been used; then `freed` is True and the inputs are forgotten
    outputs: the arrays of a rule with several outputs, None for a single one
    order: when it was made; a node is newer than everything that its inputs were made of
    """

    __slots__ = ("backward", "code", "inputs", "instruction", "op", "order", "output_keys", "outputs", "settings")

    op: Op
    inputs: tuple
    settings: dict[str, Any]
    backward: Callable | None
    outputs: tuple[Array, ...] | None
    output_keys: tuple[int, ...]  # the numbers of these outputs, where there are several; one output has the node's
    order: int
    code: CodeType  # the code that called the op …
    instruction: int  # … and where in it

    @property
    def freed(self) -> bool:
        return self.backward is _used

    @property
    def called_at(self) -> str:
        """`file.py:12`, the line that called the op: the first one outside of minigrad."""
        return _line_of(self.code, self.instruction)


def _check_operand(x, name):
    """TypeError unless it is a NumPy scalar: NumPy would make arrays of a list, of None and of much else."""
    if not isinstance(x, np.generic):
        raise TypeError(f"{name}: an input is a {type(x).__name__}: make it an array or a Tensor first.")


def _constant(data):
    tensor = _new(Tensor)
    tensor._become_leaf(data, False)
    return tensor


def _node(this, inputs, settings, backward, frame):
    node = _new(Node)
    node.op = this
    node.inputs = inputs
    node.settings = settings
    node.backward = backward
    node.outputs = None
    node.order = next(_clock)
    code = frame.f_code
    if code.co_filename.startswith(_PACKAGE):
        code, node.instruction = _caller(frame)
    else:
        node.instruction = frame.f_lasti
    node.code = code
    return node


def _output(data, node, index=None):
    tensor = _new(Tensor)
    tensor.data = data
    tensor.requires_grad = True
    tensor.grad = None
    tensor.node = node
    tensor.index = index
    tensor.created = node.order if index is None else node.output_keys[index]
    return tensor


def _used(*_: Array) -> None:
    raise RuntimeError("this graph was already differentiated and freed: run the forward pass again.")


# ---- the walk


def nodes_of(y: Tensor, since: int = 0) -> list[Node]:
    """The nodes that y was computed from, oldest first, without recursion; those made before `since` are left out.

    RuntimeError if one of them has used a parameter that was updated since.
    """
    found: dict[int, Node] = {}
    stack = [] if y.node is None else [y.node]
    while stack:
        node = stack.pop()
        order = node.order
        if order in found or order < since:
            continue
        found[order] = node
        for x in node.inputs:
            if type(x) is Tensor:
                if x.node is not None:
                    stack.append(x.node)
                elif x.updated > order:
                    raise RuntimeError(
                        f"a parameter of {node.op.name}, called at {node.called_at}, was updated after this graph was "
                        "built, so that its gradient would be one at neither point: run the forward pass again."
                    )
    return [found[order] for order in sorted(found)]


class Gradients:
    """What has arrived at each Tensor so far, by its number.

    The first gradient is kept by reference, since it may be shared; the second makes a sum that belongs to the engine,
    and those after it are added in place.
    """

    __slots__ = ("arrived", "leaves", "owned")

    wants: Callable[[Tensor], bool] | None = None  # is the gradient of this Tensor asked for?  None: all of them are

    def __init__(self) -> None:
        self.arrived: dict[int, Array] = {}
        self.leaves: list[Tensor] = []
        self.owned: set[int] = set()

    def buffer_of(self, x: Tensor) -> Array | None:
        """The array that a rule may write the gradient of this leaf into, if there is one and nothing is in it."""
        return x.grad_buffer if x.grad is None and x.created not in self.arrived else None

    def add(self, x: Tensor, dx: Array) -> None:
        key = x.created
        if key not in self.arrived:
            self.arrived[key] = dx
            if x.node is None:
                self.leaves.append(x)
                if dx is x.grad_buffer:  # the rule has written it there
                    self.owned.add(key)
        elif key in self.owned and dx.ndim:
            self.arrived[key] += dx
        else:
            self.arrived[key] = self.arrived[key] + dx
            self.owned.add(key)

    def of_outputs(self, node: Node) -> tuple[Array, ...] | None:
        """The complete gradients of a node's outputs, zeros where none arrived; None if there is none at all."""
        if node.outputs is None:
            g = self.arrived.pop(node.order, None)
            return None if g is None else (g,)
        gs = [self.arrived.pop(key, None) for key in node.output_keys]
        if all(g is None for g in gs):
            return None
        return tuple([array_module(o).zeros_like(o) if g is None else g for g, o in zip(gs, node.outputs, strict=True)])

    def write_to_leaves(self) -> None:
        for leaf in self.leaves:
            g = self.arrived[leaf.created]
            if leaf.grad_buffer is not None:
                if g is not leaf.grad_buffer:
                    leaf.grad_buffer[...] = g if leaf.grad is None else leaf.grad + g
                leaf.grad = leaf.grad_buffer
            elif leaf.grad is not None:
                leaf.grad = leaf.grad + g
            else:  # a sum of two numbers is a NumPy scalar, which is no array
                leaf.grad = g if leaf.created in self.owned and g.ndim else array_module(g).asarray(g).copy()


class _TargetGradients(Gradients):
    """… when only the gradients of some Tensors are asked for: nothing else is computed.

    targets: their numbers;   path: the numbers of the nodes between y and them
    """

    __slots__ = ("kept", "path", "targets")

    def __init__(self, targets: list[Tensor], nodes: list[Node]) -> None:
        super().__init__()
        self.kept: dict[int, Array] = {}  # of targets that an op has made, once everything that used them has run
        self.targets = {z.created for z in targets}
        self.path: set[int] = set()
        oldest = min(self.targets, default=0)
        for node in nodes:  # oldest first, so that what lies below is known
            if node.freed and node.order > oldest:
                _used()  # it has forgotten its inputs, and a target may have been among them
            if any(type(x) is Tensor and self.wants(x) for x in node.inputs):
                self.path.add(node.order)

    def wants(self, x: Tensor) -> bool:
        """Is it a target, or made of one?"""
        return x.created in self.targets or (x.node is not None and x.node.order in self.path)

    def buffer_of(self, x: Tensor) -> Array | None:
        return None  # `.grad` is left alone

    def of_outputs(self, node: Node) -> tuple[Array, ...] | None:
        for key in (node.order,) if node.outputs is None else node.output_keys:
            if key in self.targets and key in self.arrived:
                self.kept[key] = self.arrived[key]
        return super().of_outputs(node) if node.order in self.path else None

    def of(self, z: Tensor) -> Array | None:
        """The gradient of a target, once the walk is over; None if nothing arrived."""
        return (self.arrived if z.node is None else self.kept).get(z.created)


def _walk(nodes: list[Node], gradients: Gradients, keep: bool) -> None:
    """Run the rules of the nodes, newest first, on what has arrived at their outputs."""
    for node in reversed(nodes):
        gs = gradients.of_outputs(node)
        if gs is None:
            continue  # nothing arrived, or nothing below it was asked for
        try:
            node.op.vjp(node.backward, gs, node.inputs, gradients)
        except Exception as error:
            if not node.freed:
                where = f"called at {node.called_at}: {_describe(node.inputs)}"
                error.add_note(f"in the backward pass of {node.op.name}, {where}")
            raise
        if not keep:
            node.backward, node.inputs = _used, ()


def _start(y: Tensor, g: Array | None) -> Array:
    """The gradient that the walk begins with, checked."""
    if not isinstance(y, Tensor):
        raise TypeError(f"only a Tensor has a gradient, got {type(y).__name__}.")
    if not y.requires_grad:
        raise RuntimeError(
            "this Tensor does not depend on anything that requires a gradient: make a leaf with requires_grad=True, "
            "and use it outside of no_grad()."
        )
    if g is None:
        if y.data.size != 1:
            raise RuntimeError(f"a Tensor of shape {y.shape} needs the gradient of the objective: backward(g).")
        return array_module(y.data).ones_like(y.data)
    if type(g) is Tensor:
        raise TypeError("g must be an array, not a Tensor: pass its .data.")
    if getattr(g, "shape", None) != y.data.shape or g.dtype != y.data.dtype:
        raise TypeError(f"g is {_describe((g,))}, the Tensor is {y.dtype}{y.shape}: they must be alike.")
    if array_module(g) is not array_module(y.data):  # a rule that only multiplies by a number would not notice
        raise TypeError("g and the Tensor must be on the same device: send g there with Backend.to_device.")
    return g


# ---- small pieces


def _caller(frame: FrameType) -> tuple[CodeType, int]:
    """The user's code and the instruction in it, not the one in nn.py or in the operator table."""
    while frame.f_code.co_filename.startswith(_PACKAGE) and frame.f_back is not None:
        frame = frame.f_back
    return frame.f_code, frame.f_lasti


def _line_of(code: CodeType, instruction: int) -> str:
    line = next((line for start, end, line in code.co_lines() if start <= instruction < end), "?")
    return f"{os.path.basename(code.co_filename)}:{line}"


def place_of(function: Callable | None) -> str:
    """`file.py:12`, where a function was defined."""
    code = getattr(function, "__code__", None)
    return f"{os.path.basename(code.co_filename)}:{code.co_firstlineno}" if code else repr(function)


def unbroadcast(g: Array, shape: tuple[int, ...]) -> Array:
    """Undo broadcasting: sum g over the axes along which an array of `shape` was repeated."""
    if g.shape == shape:
        return g
    if g.ndim > len(shape):
        g = g.sum(axis=tuple(range(g.ndim - len(shape))))
    repeated = tuple(i for i, n in enumerate(shape) if n == 1 and g.shape[i] != 1)
    return g.sum(axis=repeated, keepdims=True) if repeated else g


def _describe(inputs: Iterable) -> str:
    return ", ".join(
        f"{x.dtype}{x.shape}" if hasattr(x, "dtype") and hasattr(x, "shape") else type(x).__name__ for x in inputs
    )
