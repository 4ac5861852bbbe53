"""Finite differences against every rule: for one rule, for a function of Tensors, or for a whole live graph.

    check_rule(multiply.rule, a, b)          # one rule, each input, with a random cotangent
    gradcheck(lambda a, b: (a * b).sum(), [a, b])
    print(audit(loss))                       # every node of a graph, at the values it holds

All of them compare ⟨g, (f(x + hv) − f(x − hv)) / 2h⟩ with ⟨dx, v⟩ in float64 for a **random** cotangent g: a seed of
ones would test nothing on softmax, whose gradients then vanish.
"""

from __future__ import annotations

import functools
import inspect
from dataclasses import dataclass

import numpy as np

from .backend import asarray_like, to_host
from .tensor import Tensor, _reachable, created_at, grad

_STEP = 1e-6
_MOST_KINKS = 0.1  # the share of a node's outputs that may sit on a kink


class CheckFailed(AssertionError):
    """A rule disagrees with finite differences or breaks the contract; the message says where."""


def check_rule(rule, *arrays, wrt=None, tolerance: float = 1e-6, float32: bool = True, seed: int = 0, **settings):
    """Verify one rule `rule(*arrays, **settings) -> (out, backward)` by central differences, element by element.

    arrays: the inputs, NumPy; floating ones are checked in float64, others (indices, masks) are passed on as they are.
    wrt: the positions to check (default: all floating arrays).   float32: also check dtypes with float32 inputs.

    Checked: the values (relative error at most `tolerance`, measured against the largest entry), shapes and dtypes;
    that `backward` can be called twice with the same result and writes into nothing it was given (inputs, saved
    outputs and cotangents are read-only); that non-contiguous inputs give the same; and that the gradient is large
    enough to mean anything. Raises CheckFailed.
    """
    rng = np.random.default_rng(seed)
    floating = [i for i, a in enumerate(arrays) if _is_floating(a)]
    wrt = floating if wrt is None else list(wrt)
    name = getattr(rule, "__name__", "rule")
    x64 = [np.array(a, np.float64) if i in floating else a for i, a in enumerate(arrays)]

    def run(xs):
        out, backward = rule(*xs, **settings)
        return out if type(out) is tuple else (out,), backward

    def gradients(xs, gs):
        outs, backward = run([_frozen(x) for x in xs])
        for o in outs:
            _freeze(o)
        first = _evaluated(backward(*gs), wrt)
        second = _evaluated(backward(*gs), wrt)
        for a, b in zip(first, second, strict=True):
            if (a is None) != (b is None) or (a is not None and not np.array_equal(a, b)):
                raise CheckFailed(f"{name}: calling backward twice gave two results; it must be pure.")
        return first

    try:
        outs, _ = run([_frozen(x) for x in x64])
        gs = [_frozen(rng.standard_normal(np.shape(o))) for o in outs]
        found = gradients(x64, gs)
    except ValueError as error:
        if "read-only" in str(error):
            raise CheckFailed(f"{name}: writes into an input, an output or the cotangent ({error}).") from error
        raise
    if len(found) != len(arrays):
        raise CheckFailed(f"{name}: {len(arrays)} inputs, but backward gave {len(found)} gradients.")

    # rounding in the outputs, amplified by 1/2h, is what a central difference cannot resolve
    noise = 1e-9 * max(1.0, *(np.abs(np.where(np.abs(o) < 1e15, o, 0.0)).max(initial=0.0) for o in outs))
    largest = 0.0
    for i in wrt:
        dx = found[i]
        if dx is None:
            raise CheckFailed(f"{name}: no gradient for input {i}.")
        if dx.shape != x64[i].shape or dx.dtype != np.float64:
            raise CheckFailed(f"{name}: input {i} is float64{x64[i].shape}, its gradient {dx.dtype}{dx.shape}.")
        true = np.empty_like(x64[i])
        for at in np.ndindex(x64[i].shape):
            h = _STEP * max(1.0, abs(x64[i][at]))
            ups, downs = (run(_moved(x64, i, at, step))[0] for step in (h, -h))
            true[at] = sum(float(np.sum(g * (u - d))) for g, u, d in zip(gs, ups, downs, strict=True)) / (2 * h)
        scale = np.abs(true).max(initial=0.0)
        largest = max(largest, scale)
        error = np.abs(dx - true).max(initial=0.0)
        if not error <= tolerance * scale + noise:
            at = np.unravel_index(np.argmax(np.abs(dx - true)), dx.shape)
            raise CheckFailed(
                f"{name}: input {i} at {tuple(map(int, at))}: the rule gives {dx[at]:.9g}, differences {true[at]:.9g}."
            )
    if wrt and largest < 1e-3:
        raise CheckFailed(
            f"{name}: every true gradient is below 1e-3, so this case tests nothing; choose other inputs."
        )

    strided = [_non_contiguous(x) if i in floating else x for i, x in enumerate(x64)]
    for a, b in zip(found, gradients(strided, gs), strict=True):
        if a is not None and not np.allclose(a, b, rtol=1e-12, atol=1e-12):
            raise CheckFailed(f"{name}: non-contiguous inputs give another gradient.")
    if float32:
        x32 = [x.astype(np.float32) if i in floating else x for i, x in enumerate(x64)]
        outs, backward = run(x32)
        if any(o.dtype != np.float32 for o in outs):
            raise CheckFailed(f"{name}: float32 inputs give {', '.join(str(o.dtype) for o in outs)}.")
        for i, dx in enumerate(_evaluated(backward(*[g.astype(np.float32) for g in gs]), wrt)):
            if i in wrt and dx.dtype != np.float32:
                raise CheckFailed(f"{name}: the gradient of float32 input {i} is {dx.dtype}.")


def gradcheck(function, inputs, tolerance: float = 1e-6, seed: int = 0) -> None:
    """Verify the gradient of `function(*Tensors) -> Tensor` with respect to all `inputs` (arrays or Tensors).

    The inputs may be on a device; the function is called with copies of them on the host.

    >>> gradcheck(lambda a, b: (a * b).sum(), [[1.0, 2.0], [3.0, 4.0]])
    """

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

    def __str__(self):
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
    if not loss.requires_grad or loss._op is None:
        raise RuntimeError("audit: this Tensor was not computed from anything that requires a gradient.")
    rng = np.random.default_rng(seed)
    nodes = _reachable(loss)
    rows = []
    for order in sorted(nodes):
        t = nodes[order]
        if t._op is not None and t._index is None:
            if not t._inputs:
                raise RuntimeError(
                    "audit: this graph was already differentiated and freed; call audit before backward."
                )
            with np.errstate(all="ignore"):  # what is not finite is a verdict, not a warning
                rows.append(_audit_node(t, rng, tolerance))
    return Audit(tuple(rows))


def _audit_node(t: Tensor, rng, tolerance) -> AuditRow:
    arrays = [to_host(x.data) if type(x) is Tensor else x if np.isscalar(x) else to_host(x) for x in t._inputs]
    x64 = [a.astype(np.float64) if _is_floating(a) else a for a in arrays]
    shapes = ", ".join(str(np.shape(a)).replace(" ", "") for a in arrays)
    row = functools.partial(AuditRow, t._op.name, created_at(t), shapes)
    wrt = [i for i, x in enumerate(t._inputs) if type(x) is Tensor and x.requires_grad]
    if t._op.enumerated:
        return row(None, f"checked by enumeration in tests ({t._op.enumerated})")
    settings = {k: _settings_to_host(v) for k, v in t._settings.items()}

    _, backward = t._op.rule(*x64, **settings)
    if backward is None:
        return row(None, "no derivative")
    if t._op.surrogate:
        wrt, surrogate = t._op.surrogate(*x64, **settings)
        point = [x64[i] for i in wrt]
        evaluate = lambda moved: _as_tuple(surrogate(*moved))
    else:
        point = [x64[i] for i in wrt]

        def evaluate(moved):
            xs = list(x64)
            for i, x in zip(wrt, moved, strict=True):
                xs[i] = x
            return _as_tuple(t._op.rule(*xs, **settings)[0])

    f0 = evaluate(point)
    if not all(np.isfinite(f).all() for f in f0):
        return row(None, "FAILED: a value is infinite or NaN")
    gs = [rng.standard_normal(np.shape(o)) for o in f0]
    worst, kinks, total = 0.0, 0, sum(np.size(o) for o in f0)
    for i, x in zip(wrt, point, strict=True):
        # masked logits and the like: an entry of 1e30 would make every step vanish, and nothing depends on it
        v = rng.standard_normal(x.shape)
        v = np.where(np.abs(v) < 0.05, np.copysign(0.05, v), v)  # a kink that is hardly crossed would look smooth
        v = np.where(np.abs(x) > 1e15, 0.0, v)
        h = _STEP * max(1.0, np.abs(x[np.abs(x) <= 1e15]).max(initial=0.0))
        moved = lambda step: evaluate([p + step * v if p is x else p for p in point])  # noqa: B023 (used at once)
        tried = []
        while True:
            smooth, terms, rounding = _differences(moved, f0, gs, h)
            masked = [np.where(s, g, 0.0) for s, g in zip(smooth, gs, strict=True)]
            dx = _evaluated(backward(*masked), wrt)[i]
            if dx is None:
                return row(None, f"no gradient for input {i}")
            difference = abs(sum(float(term.sum()) for term in terms) - float(np.sum(dx * v)))
            # the scale a sum of random signs has; a plain |numeric| could be small by chance
            error = difference / max(_norm(terms), _norm([dx * v]), 1e-12)
            if not np.isfinite(error):
                return row(None, "FAILED: a gradient is infinite or NaN")
            left_out = total - sum(int(np.sum(s)) for s in smooth)
            tried.append((left_out, error, difference <= rounding))
            # the step of the largest entry may be too long for smaller ones; what is wrong is so with every step
            if h <= _STEP or (error <= tolerance and left_out <= _MOST_KINKS * total):
                break
            h = max(h / 10.0, _STEP)
        left_out, error, drowned = min(tried)
        if error > tolerance and drowned:
            return row(error, "not decided: the gradient is lost in the rounding of the outputs")
        worst, kinks = max(worst, error), max(kinks, left_out)

    live = _evaluated(
        t._backward(*[asarray_like(g.astype(o.dtype), o) for g, o in zip(gs, _as_tuple(t.data), strict=True)]), wrt
    )
    exact = _evaluated(backward(*gs), wrt)
    for i in wrt:
        a, b = to_host(live[i]).astype(np.float64), exact[i]
        if not np.abs(a - b).max(initial=0.0) <= 2e-3 * max(np.abs(b).max(initial=0.0), 1e-6):
            return row(worst, "FAILED: the live closure differs from the rule in float64")
    if not worst <= tolerance:
        return row(worst, "FAILED")
    if kinks > _MOST_KINKS * total:
        return row(worst, f"not decided: {kinks} of {total} outputs at a kink")
    note = " (surrogate)" if t._op.surrogate else ""
    return row(worst, f"ok{note}" + (f", {kinks} of {total} at a kink" if kinks else ""))


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


def _evaluated(gradients, wrt) -> tuple:
    """A backward's result as a tuple, deferred work done for the inputs `wrt`; None for the others."""
    gradients = _as_tuple(gradients)
    return tuple(None if i not in wrt else dx() if inspect.isfunction(dx) else dx for i, dx in enumerate(gradients))


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
