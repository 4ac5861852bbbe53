"""Finite differences against every rule: for one rule, for a function of Tensors, or for a whole live graph.

    check_rule(multiply.rule, a, b)          # one rule, each input, with a random cotangent
    gradcheck(lambda a, b: (a * b).sum(), [a, b])
    print(audit(loss))                       # every node of a graph, at the values it holds

All of them compare ⟨g, (f(x + hv) − f(x − hv)) / 2h⟩ with ⟨dx, v⟩ in float64 for a **random** cotangent g: a seed of
ones would test nothing on softmax, whose gradients then vanish.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .backend import asarray_like, to_host
from .tensor import Gradients, Node, Op, RuleError, Tensor, grad, nodes_of

_STEP = 1e-6
_MOST_KINKS = 0.1  # the share of a node's outputs that may sit on a kink


class CheckFailed(AssertionError):
    """A rule disagrees with finite differences or breaks the contract; the message says where."""


def check_rule(
    rule: Callable,
    *arrays: Any,
    wrt: Iterable[int] | None = None,
    tolerance: float = 1e-6,
    float32: bool = True,
    seed: int = 0,
    **settings: Any,
) -> None:
    """Verify one rule `rule(*arrays, **settings) -> (out, backward)` by central differences, element by element.

    arrays: the inputs, NumPy; floating ones are checked in float64, others (indices, masks) are passed on as they are.
    wrt: the positions to check (default: all floating arrays).   float32: also check dtypes with float32 inputs.

    Checked: the values (relative error at most `tolerance`, measured against the largest entry), shapes and dtypes;
    that `backward` can be called twice with the same result and writes into nothing it was given (inputs, saved
    outputs and cotangents are read-only); that non-contiguous inputs give the same; and that the gradient is large
    enough to mean anything. Raises CheckFailed.
    """
    case = _Case(rule, arrays, wrt, settings)
    outs, _ = case.run(case.x64)
    rng = np.random.default_rng(seed)
    gs = [_frozen(rng.standard_normal(np.shape(o))) for o in outs]
    found = case.gradients(case.x64, gs)
    case.check_differences(found, gs, outs, tolerance)
    case.check_strides(found, gs)
    if float32:
        case.check_float32(gs)


class _Case:
    """A rule with the inputs that it is checked at.   x64: the inputs, floating ones in float64"""

    def __init__(self, rule: Callable, arrays: tuple, wrt: Iterable[int] | None, settings: dict[str, Any]) -> None:
        self.op, self.settings = Op(rule), settings
        self.floating = [i for i, a in enumerate(arrays) if _is_floating(a)]
        self.wrt = self.floating if wrt is None else list(wrt)
        self.x64 = [np.array(a, np.float64) if i in self.floating else a for i, a in enumerate(arrays)]

    def failed(self, what: str) -> CheckFailed:
        return CheckFailed(f"{self.op.name}: {what}")

    def run(self, xs: Sequence) -> tuple[tuple, Callable]:
        """(outputs as a tuple, backward); the inputs are read-only for the rule."""
        try:
            out, backward = self.op.rule(*map(_frozen, xs), **self.settings)
        except ValueError as error:
            raise self.refused(error) from error
        return _as_tuple(out), backward

    def refused(self, error: ValueError) -> Exception:
        """What NumPy says of a write into a read-only array is a failed check; other errors are the rule's own."""
        if "read-only" in str(error):
            return self.failed(f"writes into an input, an output or the cotangent ({error}).")
        return error

    def gradients(self, xs: Sequence, gs: Sequence) -> list:
        """The gradients of the inputs for the cotangents gs. CheckFailed unless a second call gives the same."""
        outs, backward = self.run(xs)
        for o in outs:
            _freeze(o)
        try:
            first, second = (_vjp(self.op, backward, gs, xs, self.wrt) for _ in range(2))
        except RuleError as error:
            raise self.failed(str(error)) from error
        except ValueError as error:
            raise self.refused(error) from error
        for a, b in zip(first, second, strict=True):
            if (a is None) != (b is None) or (a is not None and not np.array_equal(a, b)):
                raise self.failed("calling backward twice gave two results; it must be pure.")
        return first

    def check_differences(self, found: list, gs: Sequence, outs: tuple, tolerance: float) -> None:
        """Every entry of every gradient against a central difference of ⟨g, out⟩."""
        # rounding in the outputs, amplified by 1/2h, is what a central difference cannot resolve
        noise = 1e-9 * max(1.0, *(np.abs(np.where(np.abs(o) < 1e15, o, 0.0)).max(initial=0.0) for o in outs))
        largest = 0.0
        for i in self.wrt:
            dx = found[i]
            if dx is None:
                raise self.failed(f"no gradient for input {i}.")
            true = self.central_differences(i, gs)
            scale = np.abs(true).max(initial=0.0)
            largest = max(largest, scale)
            error = np.abs(dx - true).max(initial=0.0)
            if not error <= tolerance * scale + noise:
                at = np.unravel_index(np.argmax(np.abs(dx - true)), dx.shape)
                where = f"input {i} at {tuple(map(int, at))}"
                raise self.failed(f"{where}: the rule gives {dx[at]:.9g}, differences {true[at]:.9g}.")
        if self.wrt and largest < 1e-3:
            raise self.failed("every true gradient is below 1e-3, so this case tests nothing; choose other inputs.")

    def central_differences(self, i: int, gs: Sequence) -> np.ndarray:
        """∂⟨g, out⟩/∂xᵢ, entry by entry: (⟨g, out(x + h)⟩ − ⟨g, out(x − h)⟩)/2h."""
        true = np.empty_like(self.x64[i])
        for at in np.ndindex(true.shape):
            h = _STEP * max(1.0, abs(self.x64[i][at]))
            ups, downs = (self.run(_moved(self.x64, i, at, step))[0] for step in (h, -h))
            true[at] = sum(float(np.sum(g * (u - d))) for g, u, d in zip(gs, ups, downs, strict=True)) / (2 * h)
        return true

    def check_strides(self, found: list, gs: Sequence) -> None:
        """Inputs that are not contiguous in memory give the same gradients."""
        strided = [_non_contiguous(x) if i in self.floating else x for i, x in enumerate(self.x64)]
        for a, b in zip(found, self.gradients(strided, gs), strict=True):
            if a is not None and not np.allclose(a, b, rtol=1e-12, atol=1e-12):
                raise self.failed("non-contiguous inputs give another gradient.")

    def check_float32(self, gs: Sequence) -> None:
        """float32 inputs give float32 outputs and float32 gradients."""
        x32 = [x.astype(np.float32) if i in self.floating else x for i, x in enumerate(self.x64)]
        outs, backward = self.run(x32)
        if any(o.dtype != np.float32 for o in outs):
            raise self.failed(f"float32 inputs give {', '.join(str(o.dtype) for o in outs)}.")
        try:
            _vjp(self.op, backward, [g.astype(np.float32) for g in gs], x32, self.wrt)
        except RuleError as error:
            raise self.failed(str(error)) from error


def gradcheck(function: Callable, inputs: Iterable, tolerance: float = 1e-6, seed: int = 0) -> None:
    """Verify the gradient of `function(*Tensors) -> Tensor` with respect to all `inputs` (arrays or Tensors).

    The inputs may be on a device; the function is called with copies of them on the host.

    >>> gradcheck(lambda a, b: (a * b).sum(), [[1.0, 2.0], [3.0, 4.0]])
    """

    if isinstance(inputs, Tensor):
        raise TypeError("gradcheck: the inputs must be a list of arrays or Tensors, not one Tensor.")

    def rule(*arrays):
        tensors = [Tensor(a, requires_grad=True) for a in arrays]
        y = function(*tensors)
        return y.data, lambda g: tuple(grad(y, tensors, g.astype(y.dtype), keep=True))

    rule.__name__ = getattr(function, "__name__", "function")
    arrays = [np.asarray(to_host(x.data if isinstance(x, Tensor) else x), dtype=np.float64) for x in inputs]
    check_rule(rule, *arrays, tolerance=tolerance, seed=seed, float32=False)


# ---- a whole graph


@dataclass(frozen=True)
class AuditRow:
    """One node: the op, where it was created, the shapes of its inputs, the worst relative error, the verdict."""

    op: str
    created: str
    shapes: str
    error: float | None
    verdict: str

    @property
    def ok(self) -> bool:
        return self.verdict.startswith(("ok", "checked by enumeration"))


@dataclass(frozen=True)
class Audit:
    """The rows of an audit, oldest node first. `ok` is True when every rule was verified; printing gives a table."""

    rows: tuple[AuditRow, ...]

    @property
    def ok(self) -> bool:
        return all(row.ok for row in self.rows)

    def __str__(self) -> str:
        cells = [("op", "created at", "inputs", "worst rel. error", "verdict")]
        for r in self.rows:
            cells.append((r.op, r.created, r.shapes, "" if r.error is None else f"{r.error:.1e}", r.verdict))
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in cells]
        good = sum(r.ok for r in self.rows)
        return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:], f"{good} of {len(self.rows)} nodes ok"])


def audit(loss: Tensor, tolerance: float = 1e-5, seed: int = 0) -> Audit:
    """Verify the rule of every node `loss` was computed from, at the values each node holds; call before backward().

    A node's arrays are taken in float64, and for each input the directional derivative along a random direction is
    compared with what the rule returns. The live closure (perhaps float32) must give the same to the precision of
    its dtype. Outputs that sit on a kink of the function (a ReLU at 0) or nearer than a step to the edge of its domain
    (log 1e-8) cannot be differenced; they are left out of the cotangent and counted in the verdict, and a node where
    they are more than a tenth is not called ok, nor is one whose gradient rounding hides from differences.
    A stochastic estimator is verified against the surrogate that it declares.
    RuntimeError if there is no graph, or it was already differentiated.
    """
    if not isinstance(loss, Tensor):
        raise TypeError(f"audit looks at the graph of a Tensor, got {type(loss).__name__}.")
    if loss.node is None:
        raise RuntimeError("audit: this Tensor was not computed from anything that requires a gradient: give a loss.")
    nodes = nodes_of(loss)
    if any(node.freed for node in nodes):
        raise RuntimeError("audit: this graph was already differentiated and freed; call audit before backward.")
    rng, rows = np.random.default_rng(seed), []
    with np.errstate(all="ignore"):  # what is not finite is a verdict, not a warning
        for node in nodes:
            checked = _NodeCheck(node)
            error, verdict = checked.verdict(rng, tolerance)
            rows.append(AuditRow(node.op.name, node.called_at, checked.shapes, error, verdict))
    return Audit(tuple(rows))


class _NodeCheck:
    """A node of a live graph with its inputs on the host, floating ones in float64.

    wrt: the positions of the inputs that want a gradient
    """

    def __init__(self, node: Node) -> None:
        self.node, self.op = node, node.op
        arrays = [x.data if type(x) is Tensor else x for x in node.inputs]
        arrays = [a if np.isscalar(a) else to_host(a) for a in arrays]
        self.x64 = [a.astype(np.float64) if _is_floating(a) else a for a in arrays]
        self.shapes = ", ".join(str(np.shape(a)).replace(" ", "") for a in arrays)
        self.settings = {k: _settings_to_host(v) for k, v in node.settings.items()}
        self.wrt = [i for i, x in enumerate(node.inputs) if type(x) is Tensor and x.requires_grad]

    def verdict(self, rng: np.random.Generator, tolerance: float) -> tuple[float | None, str]:
        """(the worst relative error, what is to be said of the node)"""
        if self.op.enumerated:
            return None, f"checked by enumeration in tests ({self.op.enumerated})"
        _, backward = self.op.rule(*self.x64, **self.settings)
        if backward is None:
            return None, "no derivative"
        point, evaluate = self.function()
        f0 = evaluate(point)
        if not all(np.isfinite(f).all() for f in f0):
            return None, "FAILED: a value is infinite or NaN"
        gs = [rng.standard_normal(np.shape(o)) for o in f0]
        worst, kinks, total = 0.0, 0, sum(np.size(o) for o in f0)
        for i, x in zip(self.wrt, point, strict=True):
            v = _direction(x, rng)
            moved = lambda step: evaluate([p + step * v if p is x else p for p in point])  # noqa: B023 (used at once)
            pulled_back = lambda cotangents: self.vjp(backward, cotangents)[i]  # noqa: B023
            found = _along(moved, pulled_back, f0, gs, v, x, tolerance)
            if isinstance(found, str):
                return None, found if found.startswith("FAILED") else f"{found} for input {i}"
            left_out, error, drowned = found
            if error > tolerance and drowned:
                return error, "not decided: the gradient is lost in the rounding of the outputs"
            worst, kinks = max(worst, error), max(kinks, left_out)
        if not self.live_closure_agrees(backward, gs):
            return worst, "FAILED: the live closure differs from the rule in float64"
        if not worst <= tolerance:
            return worst, "FAILED"
        if kinks > _MOST_KINKS * total:
            return worst, f"not decided: {kinks} of {total} outputs at a kink"
        note = " (surrogate)" if self.op.surrogate else ""
        return worst, f"ok{note}" + (f", {kinks} of {total} at a kink" if kinks else "")

    def vjp(self, backward: Callable, gs: Sequence) -> list:
        return _vjp(self.op, backward, gs, self.x64, self.wrt)

    def function(self) -> tuple[list, Callable]:
        """(point, evaluate): the inputs `wrt` at their values, and the outputs as a function of just those.

        It is the op itself, or the surrogate that a stochastic estimator declares."""
        if self.op.surrogate:
            self.wrt, surrogate = self.op.surrogate(*self.x64, **self.settings)
            return [self.x64[i] for i in self.wrt], lambda moved: _as_tuple(surrogate(*moved))

        def evaluate(moved: Sequence) -> tuple:
            xs = list(self.x64)
            for i, x in zip(self.wrt, moved, strict=True):
                xs[i] = x
            return _as_tuple(self.op.rule(*xs, **self.settings)[0])

        return [self.x64[i] for i in self.wrt], evaluate

    def live_closure_agrees(self, backward: Callable, gs: Sequence) -> bool:
        """Does the closure of the live graph, in its own dtype, give what the rule gives in float64?"""
        like = next(x.data for x in self.node.inputs if type(x) is Tensor)
        here = [asarray_like(a.astype(like.dtype), like) if i in self.wrt else a for i, a in enumerate(self.x64)]
        live = _vjp(self.op, self.node.backward, [asarray_like(g.astype(like.dtype), like) for g in gs], here, self.wrt)
        exact = self.vjp(backward, gs)
        for i in self.wrt:
            a, b = to_host(live[i]).astype(np.float64), exact[i]
            if not np.abs(a - b).max(initial=0.0) <= 2e-3 * max(np.abs(b).max(initial=0.0), 1e-6):
                return False
        return True


def _direction(x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A random direction v in which x is moved."""
    v = rng.standard_normal(x.shape)
    v = np.where(np.abs(v) < 0.05, np.copysign(0.05, v), v)  # a kink that is hardly crossed would look smooth
    return np.where(np.abs(x) > 1e15, 0.0, v)  # masked logits: an entry of 1e30 would make every step vanish


def _along(
    moved: Callable, pulled_back: Callable, f0: tuple, gs: list, v: np.ndarray, x: np.ndarray, tolerance: float
) -> tuple[int, float, bool] | str:
    """Compare ⟨g, ∂f/∂x v⟩ by differences with ⟨dx, v⟩.   moved(step) = f(x + step·v), pulled_back(g) = dx

    -> (how many outputs were left out, the relative error, is it within rounding?), or what is wrong in words.

    The step of the largest entry may be too long for smaller ones, so that shorter ones are tried as long as something
    is wrong; what is really wrong is so with every step.
    """
    h = _STEP * max(1.0, np.abs(x[np.abs(x) <= 1e15]).max(initial=0.0))
    total, tried = sum(np.size(o) for o in f0), []
    while True:
        smooth, terms, rounding = _differences(moved, f0, gs, h)
        dx = pulled_back([np.where(s, g, 0.0) for s, g in zip(smooth, gs, strict=True)])
        if dx is None:
            return "no gradient"
        difference = abs(sum(float(term.sum()) for term in terms) - float(np.sum(dx * v)))
        # the scale a sum of random signs has; a plain |numeric| could be small by chance
        error = difference / max(_norm(terms), _norm([dx * v]), 1e-12)
        if not np.isfinite(error):
            return "FAILED: a gradient is infinite or NaN"
        left_out = total - sum(int(np.sum(s)) for s in smooth)
        tried.append((left_out, error, difference <= rounding))
        if h <= _STEP or (error <= tolerance and left_out <= _MOST_KINKS * total):
            return min(tried)
        h = max(h / 10.0, _STEP)


def _differences(moved, f0, gs, h):
    """⟨g, (f(x + hv) − f(x − hv)) / 2h⟩ for each output g belongs to, in its terms.     moved(step) = f(x + step·v)

    -> smooth (outputs at a kink are left out: their two slopes differ), terms (0 there), and how much of the sum of all
    terms may be rounding: of the outputs, or of numbers near 1 behind them.
    """
    up, down = moved(h), moved(-h)
    smooth = [
        np.abs(u - 2.0 * f + d) <= 1e-2 * h * np.maximum(1.0, np.abs(u - d) / (2 * h)) + 1e-12 * np.abs(f)
        for u, f, d in zip(up, f0, down, strict=True)
    ]
    terms = [np.where(s, g * (u - d) / (2 * h), 0.0) for s, g, u, d in zip(smooth, gs, up, down, strict=True)]
    sizes = [np.where(np.abs(f) < 1e15, np.maximum(1.0, np.abs(f)), 0.0) for f in f0]
    rounding = 4e-16 / h * _norm([np.where(s, g * n, 0.0) for s, g, n in zip(smooth, gs, sizes, strict=True)])
    return smooth, terms, rounding


# ---- small pieces


def _vjp(op: Op, backward: Callable | None, gs: Sequence, xs: Sequence, wrt: Iterable[int]) -> list:
    """One gradient for each input x; None for those that are not in `wrt`, or get none from the rule."""
    inputs, gradients = [Tensor(x, requires_grad=True) if i in wrt else x for i, x in enumerate(xs)], Gradients()
    op.vjp(backward, gs, inputs, gradients)
    return [gradients.arrived.get(x.created) if isinstance(x, Tensor) else None for x in inputs]


def _norm(arrays) -> float:
    return float(np.sqrt(sum(float(np.sum(a**2)) for a in arrays)))


def _moved(arrays, i, at, step) -> list:
    """The arrays, with entry `at` of a copy of the i-th moved by `step`."""
    moved = arrays[i].copy()
    moved[at] += step
    return [*arrays[:i], moved, *arrays[i + 1 :]]


def _is_floating(a) -> bool:
    return hasattr(a, "dtype") and a.dtype.kind == "f"


def _as_tuple(x) -> tuple:
    return x if type(x) is tuple else (x,)


def _settings_to_host(v):
    return tuple(map(_settings_to_host, v)) if isinstance(v, tuple) else to_host(v) if hasattr(v, "dtype") else v


def _freeze(a) -> None:
    if isinstance(a, np.ndarray):
        a.flags.writeable = False


def _frozen(a):
    """A read-only view of an array, as it lies in memory; anything else as it is."""
    a = a[...] if isinstance(a, np.ndarray) else a
    _freeze(a)
    return a


def _non_contiguous(x):
    if x.ndim == 0:
        return x
    return np.repeat(x, 2, axis=-1)[..., ::2]
