"""The ladder: costs from constant to exponential, whose exact gradient is known by enumeration.

A rung is one cost on L variables of K classes, or on L bits, with one set of logits. It is evaluated from one table of
coefficients on whatever calls it: arrays of NumPy, Tensors of this engine, tensors of PyTorch, arrays of JAX. Nothing
but operators, `reshape` and `sum` is asked of them.

With x the L·K numbers of d side by side, y_l the part of variable l, and coefficients a, M:

    constant         0.7
    linear           ⟨a, x⟩
    multilinear      Πₗ (⟨aₗ, y_l⟩ + 1)                        linear in each variable, the others fixed
    quadratic        ⟨a, x⟩ + xᵀM x
    multiquadratic   Πₗ (⟨aₗ, y_l⟩ + 1 + y_lᵀ Mₗ y_l)          quadratic in each variable
    separable        Σₗ (⟨aₗ, y_l⟩ + 1 + y_lᵀ Mₗ y_l)          a sum of functions of one variable
    cubic            (⟨a, x⟩ + 0.6)³
    exponential      exp(0.8 (⟨a, x⟩ + xᵀM x))

An estimator may be exact for some of them and biased for the others; `EXACT_ON` says for which a claim stands.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from minigrad import Tensor, grad

from .. import bernoulli, categorical
from ..exact import exact_gradient

__all__ = ["EXACT_ON", "KINDS", "OF_SEVERAL", "Rung"]

KINDS = (
    "constant",
    "linear",
    "multilinear",
    "separable",
    "quadratic",
    "multiquadratic",
    "cubic",
    "exponential",
)
OF_SEVERAL = ("multilinear", "separable", "multiquadratic")  # for one variable they are linear or quadratic

# for which costs an estimator that is exact_for … is exact
EXACT_ON = {
    "none": {"constant"},
    "linear": {"constant", "linear", "multilinear"},
    "separable": {"constant", "linear", "separable"},
    "quadratic": {"constant", "linear", "multilinear", "separable", "quadratic", "multiquadratic"},
    "all": set(KINDS),
}


class Rung:
    """One cost, and the logits at which it is asked.

    kind: one of `KINDS`.  variables L ≥ 1, classes K ≥ 1 (2 for bits).  family: "categorical" or "bernoulli".
    ValueError for others.

    Called with d (..., L, K), or (..., L) for bits, it gives (...): one value for each example, of d's kind and dtype.
    It counts: `calls`, and `evaluations`, those of all examples in all calls.
    """

    def __init__(self, kind: str, variables: int = 3, classes: int = 3, family: str = "categorical", seed: int = 600):
        if kind not in KINDS:
            raise ValueError(f"unknown cost {kind!r}; the known ones are {', '.join(KINDS)}.")
        if family not in ("categorical", "bernoulli") or variables < 1 or classes < 1:
            raise ValueError(f"no such variables: {variables} of {classes} classes, family {family!r}.")
        self.kind, self.variables = kind, variables
        self.family = categorical if family == "categorical" else bernoulli
        self.shape = (variables, classes) if family == "categorical" else (variables,)
        rng, n = np.random.default_rng(seed + 10 * variables + classes), math.prod(self.shape)
        self.logits = 0.7 * rng.standard_normal(self.shape)
        self.a, self.m = rng.standard_normal(n), 0.6 * rng.standard_normal((n, n))
        self.calls = self.evaluations = 0
        self._weights: Any = None  # what stands in for a, if somebody wants its gradient
        self._points: list[Any] | None = None

    @property
    def name(self) -> str:
        bits = self.family is bernoulli
        plural = "" if self.variables == 1 else "s"
        what = f"{self.variables} bit{plural}" if bits else f"{self.variables} × {self.shape[-1]}"
        return f"{self.kind}, {what}"

    def __call__(self, d: Any) -> Any:
        leading = tuple(d.shape)[: len(d.shape) - len(self.shape)]
        if tuple(d.shape)[len(leading) :] != self.shape:
            raise ValueError(f"the cost is one of d (..., {', '.join(map(str, self.shape))}), got {tuple(d.shape)}.")
        self.calls += 1
        self.evaluations += math.prod(leading)
        if self._points is not None:
            self._points.append(d)
        return self._values(d, self._weights)

    @contextlib.contextmanager
    def watched(self, weights: Any = None) -> Iterator[list[Any]]:
        """Inside, the points of all calls are added to the list that it gives, and `weights` (L·K,), which may be a
        tensor that wants its gradient, stand in for a."""
        before = self._points, self._weights
        self._points, self._weights = [], weights
        try:
            yield self._points
        finally:
            self._points, self._weights = before

    def _values(self, d: Any, weights: Any = None) -> Any:
        x = d.reshape((*tuple(d.shape)[: len(d.shape) - len(self.shape)], math.prod(self.shape)))
        a = _like(x, self.a) if weights is None else weights
        if self.kind == "constant":
            return (0.0 * x).sum(-1) + 0.7
        if self.kind in OF_SEVERAL:
            parts = [self._of_one(x, a, l) for l in range(self.variables)]
            return sum(parts[1:], parts[0]) if self.kind == "separable" else math.prod(parts[1:], start=parts[0])
        linear = x @ a
        if self.kind == "linear":
            return linear
        if self.kind == "cubic":
            return (linear + 0.6) ** 3.0
        quadratic = linear + ((x @ _like(x, self.m)) * x).sum(-1)
        return quadratic if self.kind == "quadratic" else math.e ** (0.8 * quadratic)

    def _of_one(self, x: Any, a: Any, l: int) -> Any:
        k = math.prod(self.shape[1:])
        own = slice(l * k, (l + 1) * k)
        y = x[..., own]
        affine = y @ a[own] + 1.0
        return affine if self.kind == "multilinear" else affine + ((y @ _like(x, self.m[own, own])) * y).sum(-1)

    # -- the truth

    def exact(self, logits: np.ndarray | None = None, scale: float = 1.0) -> np.ndarray:
        """∇θ E f(D) in float64, shaped like the logits, with D from the logits scale · θ.

        logits: (L, K), or (L,) for bits; else its own. All joint outcomes are enumerated, without being counted.
        """
        theta = scale * (self.logits if logits is None else np.asarray(logits, np.float64))[None]
        outcomes = self.family.outcomes(theta.shape)
        p = self.family.probability(theta)
        return scale * exact_gradient(p, outcomes, self.values(outcomes)[None], self.family)[0][0]

    def values(self, d: np.ndarray) -> np.ndarray:
        """The cost at an array (..., L, K), uncounted."""
        return self._values(np.asarray(d, np.float64))

    def gradient_of_weights(self, d: np.ndarray) -> np.ndarray:
        """∂/∂a of the sum of the costs at the points d (..., L, K), (L·K,), uncounted."""
        a = Tensor(self.a, requires_grad=True)
        f = self._values(Tensor(np.asarray(d, np.float64)), a)
        return grad(f.sum(), [a])[0] if f.requires_grad else np.zeros_like(self.a)


def _like(x: Any, a: np.ndarray) -> Any:
    """The array a as x has its numbers: of its framework, dtype and device."""
    if hasattr(x, "new_tensor"):  # PyTorch
        return x.new_tensor(a)
    return a.astype(x.dtype)  # NumPy, JAX and this engine take a NumPy array
