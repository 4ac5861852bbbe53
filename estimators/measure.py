"""Bias, standard deviation, mean squared error and direction of an estimator, against the exact gradient.

    >>> import numpy as np
    >>> from estimators.measure import EnumeratedCost, measure
    >>> logits = np.array([[[1.0, 0.0, -1.0], [0.5, 0.0, 0.5]]])     # (B, L, K): 1 example, 2 variables, 3 classes
    >>> w = np.array([[1.0, 0.2, 0.0], [0.5, 1.0, 0.3]])
    >>> cost = lambda d: ((d * w).sum(axis=(1, 2)) + 0.5) ** 3.0      # d (n, 2, 3) -> (n,), a Tensor
    >>> found = measure("reinmax", logits, cost)
    >>> print(f"{found.how}: bias {found.bias:.4f}, deviation {found.deviation:.4f}, cosine {found.cosine:.4f}")
    enumerated: bias 0.0367, deviation 0.7780, cosine 0.9999
    >>> found = measure("rloo:samples=4", logits, cost, samples=4000)
    >>> low, high = found.deviation_interval
    >>> print(f"{found.how}: deviation {found.deviation:.3f}, between {low:.3f} and {high:.3f}")
    sampled: deviation 1.112, between 1.094 and 1.130

The cost may differ by example: then it is a function of d and of the index of each row's example. Many estimators can
share one problem, whose outcomes are evaluated once:

    >>> target = np.array([0.2, 0.7])
    >>> cost = lambda b, i: abs(b.mean(axis=1) - target[i])           # b (n, 3) of 3 bits, i (n,) -> (n,)
    >>> problem = EnumeratedCost(np.array([[0.0, 0.5, 1.0], [0.2, -0.4, 0.0]]), cost, family="bernoulli")
    >>> print(problem.gradient.round(4).tolist())
    [[0.0732, 0.0657, 0.0507], [-0.0527, -0.0405, -0.0502]]
    >>> for name in ("reinforce", "st", "darn"):
    ...     print(f"{name:9}  mse {problem.measure(name).mse:.4f}")
    reinforce  mse 10.9162
    st         mse 0.6357
    darn       mse 0.7912

**Definitions.** The gradient g is that of Σ E f(D), the sum over the examples, with respect to the logits θ of every
example; D ~ Cat(softmax θ), or bits with p = σ(θ). All joint outcomes are enumerated (at most 16,384), so g is exact.
With ‖·‖ over all examples together, and in units of ‖g‖:

    bias       ‖E ĝ − g‖                 deviation   √tr Var ĝ                 cosine   of E ĝ and g
    mse        E‖ĝ − g‖² = bias² + deviation²                                  (in units of ‖g‖²)

**Enumerated** is an estimator that is a function of one sample D alone, or of none (its `randomness` is "sample" or
"none"): the means are sums over all outcomes, exact.

**Sampled** is any other: `samples` independent estimates for each example. There ‖mean − g‖² is too large by
tr Var / n, the mean's own noise, which is subtracted. The 95 % intervals are of a jackknife that leaves out one of 20
groups of estimates at a time, with Student's t; bias and deviation take theirs from their squares. Where there is no
bias, the jackknife overstates the error of bias², so that the interval is too long; it then begins at 0. The interval
of a cosine near 1 is rather short.

Estimators that learn (running means, networks) are measured as they are; what a name creates is fresh. Those whose
samples are soft, or sharper than θ says, are compared with the same g as all others: what they estimate instead counts
as bias.
"""

from __future__ import annotations

import copy
import functools
import inspect
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from numbers import Integral
from types import ModuleType
from typing import Any

import numpy as np
from scipy.special import stdtrit

from minigrad import Rng, Tensor, grad, no_grad

from . import create
from .base import Estimator, attach_gradient, check_inputs, checked_cost, cost_and_gradient, value_and_grad
from .enumeration import Given
from .exact import check_outcomes, exact_gradient

__all__ = [
    "FAMILIES",
    "GROUPS",
    "Cost",
    "EnumeratedCost",
    "Measurable",
    "Measurement",
    "enumerated",
    "measure",
    "sampled",
]

FAMILIES: dict[str, ModuleType] = {family.name: family for family in Estimator.families}
SAMPLES = 2000  # estimates of each example, unless `samples` says another number
GROUPS = 20  # of the jackknife
CONFIDENCE = 0.95
ROWS = 4096  # estimates in one call, if the examples allow it

Cost = Callable[..., Tensor]  # (d) or (d, index)
Measurable = Estimator | str | Callable[[], Estimator]  # a name makes a fresh estimator, and so does a factory


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What was found about one estimator. The module says how the numbers are defined.

    how: "enumerated", exact, or "sampled".
    samples: how many estimates of each example; None where enumerated.
    bias, deviation: at least 0, in units of ‖g‖.   mse: at least 0, in units of ‖g‖².
    cosine: from −1 to 1; NaN where the mean of the estimates is 0, or cannot be told from 0.
    bias_interval, ...: (low, high), 95 %; None where enumerated. The cosine's may be NaN where the mean is uncertain.
    gradient_norm: ‖g‖, positive.
    """

    how: str
    samples: int | None = None
    bias: float
    bias_interval: tuple[float, float] | None = None
    deviation: float
    deviation_interval: tuple[float, float] | None = None
    mse: float
    mse_interval: tuple[float, float] | None = None
    cosine: float
    cosine_interval: tuple[float, float] | None = None
    gradient_norm: float

    def as_dict(self) -> dict[str, Any]:
        """The fields that are not None, as JSON can hold them: lists, and None for a number that is not finite."""
        known = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: finite(value) for name, value in known.items() if value is not None}


def finite(value: Any) -> Any:
    """What JSON can hold: None for a number that is not finite, a list for a tuple."""
    if isinstance(value, list | tuple):
        return [finite(x) for x in value]
    if isinstance(value, float | np.floating):
        return float(value) if math.isfinite(value) else None
    return value


# ---- the problem


class EnumeratedCost:
    """A cost at all joint outcomes of its variables, and with that the exact gradient of its expectation.

    The outcomes are evaluated when the problem is made, once for all estimators that are measured on it.

    logits: (B, ..., K), float32 or float64, on the host, or (B, ...) for bits; B ≥ 1 examples of at most 16,384 joint
        outcomes each. The estimates are computed in this dtype.
    cost: `cost(d)` for a Tensor d (n, ..., K), or (n, ...), gives a Tensor (n,), one value for each row, which depends
        on that row alone, and not on chance. A function that needs two arguments is called as `cost(d, index)`, where
        index (n,) holds the number of each row's example, 0 … B − 1. Estimators with `support` "soft", and some
        control variates, evaluate it between the outcomes; those with `cost_gradient` differentiate it.
    family: "categorical" or "bernoulli", the kind of variables.
    inputs: (B, ...), what learned baselines look at; without it, they look at the logits.
    costs, slopes: for a cost that can be had faster for all examples together. costs(outcomes (N, ...)) gives f as an
        array (B, N), slopes(outcomes) gives its gradient, (B, N, ...), both in the dtype of the logits.

    TypeError or ValueError, in one sentence, for what does not fit this.

    The attributes are `logits` (a copy), `inputs`, `family` (the module), `outcomes` (N, ...) and `costs` (B, N) in the
    dtype of the logits, `slopes` (B, N, ...) when they are first asked for, and, in float64, `gradient` (B, ...) and
    its norm over all examples, `gradient_norm`.
    """

    def __init__(
        self,
        logits: np.ndarray,
        cost: Cost,
        family: str = "categorical",
        *,
        inputs: np.ndarray | None = None,
        costs: Callable[[np.ndarray], np.ndarray] | None = None,
        slopes: Callable[[np.ndarray], np.ndarray] | None = None,
    ) -> None:
        if family not in FAMILIES:
            raise ValueError(f"unknown family {family!r}; the known ones are {', '.join(FAMILIES)}.")
        self.family = FAMILIES[family]
        self.logits = checked_logits(logits, family)
        B, (L, K) = len(self.logits), self.family.sizes(self.logits.shape)
        check_inputs(inputs, B)
        self.inputs = inputs
        self._cost, self._takes_index, self._slopes = cost, needs_index(cost), slopes
        check_outcomes(L, K)
        self.outcomes = self.family.outcomes(self.logits.shape).astype(self.logits.dtype)
        place = K ** np.arange(L)[::-1]  # of each variable in the number of an outcome; the last one runs fastest
        place = np.outer(place, np.arange(K)) if family == "categorical" else place
        self._place = place.astype(self.logits.dtype).ravel()
        found = self._all_costs() if costs is None else costs(self.outcomes)
        self.costs = checked_table("costs", found, (B, len(self.outcomes)), self.logits.dtype)
        self._check_costs()
        theta, outcomes = self.logits.astype(np.float64), self.outcomes.astype(np.float64)
        p = self.family.probability(theta)
        self.gradient: np.ndarray = exact_gradient(p, outcomes, self.costs.astype(np.float64), self.family)[0]
        self.gradient_norm = math.sqrt(np.square(self.gradient).sum())

    @functools.cached_property
    def slopes(self) -> np.ndarray:
        """∇f at every outcome, (B, N, ...). RuntimeError if the cost varies, but is no function of d for the engine."""
        shape = (len(self.logits), *self.outcomes.shape)
        if self._slopes is not None:
            return checked_table("slopes", self._slopes(self.outcomes), shape, self.logits.dtype)

        def at(index):
            f, g = cost_and_gradient(lambda z: self._evaluate(z, index), self.outcomes)
            if not f.requires_grad and f.data.min() < f.data.max():
                raise RuntimeError("the cost has no derivative with respect to d, which this estimator needs.")
            return g

        return self._for_all_examples(at)

    def _all_costs(self) -> np.ndarray:
        with no_grad():
            return self._for_all_examples(lambda index: self._evaluate(Tensor(self.outcomes), index).data)

    def _for_all_examples(self, evaluate: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        """evaluate(index (N,)) -> (N, ...) for each example, or once if the cost is the same for all: (B, N, ...)"""
        B, N = len(self.logits), len(self.outcomes)
        if self._takes_index:
            return np.stack([evaluate(np.full(N, i)) for i in range(B)])
        one = evaluate(np.zeros(N, np.int64))
        return np.broadcast_to(one, (B, *one.shape))

    def _check_costs(self) -> None:
        """ValueError unless the cost of an outcome is that of the row by itself."""
        with no_grad():
            alone = float(self._evaluate(Tensor(self.outcomes[-1:]), np.array([len(self.logits) - 1])).data[0])
        among_all, scale = float(self.costs[-1, -1]), float(abs(self.costs).max())
        if abs(alone - among_all) > math.sqrt(np.finfo(self.logits.dtype).eps) * scale:  # not so for NaN
            raise ValueError(
                "the cost must depend on its own row of d alone, and not on chance: the last outcome of the last "
                f"example costs {among_all:.6g} among all outcomes, and {alone:.6g} by itself; compute it row by row."
            )

    def check_norm(self) -> None:
        """ValueError if the exact gradient is not finite, or 0: nothing can be compared with it."""
        if not math.isfinite(self.gradient_norm):
            raise ValueError("the exact gradient is not finite: look for such numbers in the logits and in the costs.")
        rounding = np.finfo(np.float64).eps * float(abs(self.costs).max()) * math.sqrt(self.gradient.size)
        if self.gradient_norm <= 4.0 * rounding:
            raise ValueError(
                "the exact gradient is 0, up to rounding: nothing can be compared with it, take another cost."
            )

    def _evaluate(self, d: Tensor, index: np.ndarray) -> Tensor:
        """The cost of each row of d (n, ...), of the example with its index (n,) -> (n,)"""
        f = self._cost(d, index) if self._takes_index else self._cost(d)
        return checked_cost(f, d.shape[:1], d.dtype)

    def cost_of_rows(self, examples: np.ndarray, repeats: int) -> Cost:
        """The cost of rows of which `repeats` in succession belong to each of the examples.

        examples (b,) -> a function of d (b·repeats, ...), as estimators call it. It looks outcomes up. Of a point that
        all rows of an example have in common, like MuProp's p, it evaluates one.
        """
        index = np.repeat(examples, repeats)

        def cost(d: Tensor) -> Tensor:
            flat = d.data.reshape(len(index), -1)
            number = np.rint(flat @ self._place).astype(np.int64).clip(0, len(self.outcomes) - 1)
            if np.array_equal(self.outcomes[number], d.data):
                f = Tensor(self.costs[index, number])
                return attach_gradient(f, d, self.slopes[index, number]) if d.requires_grad else f
            points = d.data.reshape(len(examples), repeats, *d.shape[1:])
            if not (points == points[:, :1]).all():
                return self._evaluate(d, index)
            one = points[:, 0].copy()
            if not d.requires_grad:
                return Tensor(np.repeat(self._evaluate(Tensor(one), examples).data, repeats))
            f, g = value_and_grad(lambda z: self._evaluate(z, examples), one)
            return attach_gradient(Tensor(np.repeat(f, repeats)), d, np.repeat(g, repeats, axis=0))

        return cost

    def estimates(self, estimator: Estimator, examples: np.ndarray, repeats: int, rng: Rng | Given) -> np.ndarray:
        """The estimates ĝ of one call with `repeats` rows of each of the examples (b,).

        -> (b, repeats, P) float64, where P is the number of logits of an example. The estimator may remember the call.
        """
        repeated = lambda x: np.repeat(x[examples], repeats, axis=0)
        theta = Tensor(repeated(self.logits), requires_grad=True)
        x = None if self.inputs is None or estimator.learned is None else repeated(self.inputs)
        value = estimator(theta, self.cost_of_rows(examples, repeats), rng, inputs=x)
        g = grad(value, [theta], np.ones_like(value.data))[0]  # what the cost depends on besides gets none
        return g.astype(np.float64).reshape(len(examples), repeats, self.logits[0].size)

    def measure(self, estimator: Measurable, *, samples: int = SAMPLES, rng: Rng | int = 0) -> Measurement:
        """As the function `measure`, for this problem."""
        check_groups(samples)
        exactly = fresh(estimator, self.family.name).randomness in ("sample", "none")
        return enumerated(estimator, self, rng) if exactly else sampled(estimator, self, rng, samples)


def checked_logits(logits: np.ndarray, family: str) -> np.ndarray:
    """A copy of the logits. TypeError unless they are floats, ValueError unless they have their axes."""
    if isinstance(logits, Tensor):
        raise TypeError("the logits must be an array, not a Tensor: pass its .data.")
    array = np.array(logits)
    if array.dtype not in (np.float32, np.float64):
        raise TypeError(f"the logits must be float32 or float64, got {array.dtype}: use logits.astype(float).")
    axes = "(B, ..., K)" if family == "categorical" else "(B, ...)"
    if array.ndim < (2 if family == "categorical" else 1) or not array.size:
        raise ValueError(f"the logits must be {axes} with at least one example and logit, got the shape {array.shape}.")
    return array


def checked_table(name: str, table: np.ndarray, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
    """What the function called `name` gave. ValueError unless it has this shape and dtype."""
    if table.shape != shape or table.dtype != dtype:
        raise ValueError(f"{name} must give {dtype} {shape}, but it gave {table.dtype} {table.shape}.")
    return table


def needs_index(cost: Cost) -> bool:
    """Does the cost need the index of each row's example besides d? TypeError for what cannot be called with either."""
    if not callable(cost):
        raise TypeError(f"the cost must be a function of d, or of d and the index of each row's example, got {cost!r}.")
    try:
        parameters = inspect.signature(cost).parameters.values()
    except ValueError:  # a built-in function may not say
        return False
    by_position = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    needed = [p.name for p in parameters if p.kind in by_position and p.default is p.empty]
    if len(needed) > 2:
        raise TypeError(f"the cost gets d, or d and the index of each row's example, but it needs {', '.join(needed)}.")
    return len(needed) == 2


def fresh(estimator: Measurable, family: str) -> Estimator:
    """An estimator to be used up: what a name or a factory makes, or a copy of an instance.

    TypeError for anything else. ValueError for one that is not for this family, or whose value is no mean of costs.
    """
    made: object = None
    if isinstance(estimator, str):
        made = create(estimator, family=family)
    elif isinstance(estimator, Estimator):
        made = copy.deepcopy(estimator)
    elif callable(estimator):
        made = estimator()
    if not isinstance(made, Estimator):
        raise TypeError(f"expected an estimator, its name or a function that makes one, got {estimator!r}.")
    if made.family.name != family:
        own = made.family.name
        raise ValueError(
            f"{called(made)} is for {own} variables, but the problem has {family} ones: choose one family."
        )
    if made.multi_sample:
        own = f"{called(made)} estimates the gradient of {made.objective}, which is not that of E f(D)"
        raise ValueError(f"{own}: take another estimator.")
    return made


def prepared(estimator: Measurable, problem: EnumeratedCost) -> Estimator:
    """A fresh estimator for this problem. ValueError if they do not fit, or there is no gradient to compare with."""
    made = fresh(estimator, problem.family.name)
    made.check_size(*problem.family.sizes(problem.logits.shape))
    problem.check_norm()
    return made


def called(estimator: Estimator) -> str:
    return estimator.title or type(estimator).__name__


def check_groups(samples: int) -> None:
    """ValueError unless the samples are enough for the groups of the jackknife."""
    if not isinstance(samples, Integral) or samples < 2 * GROUPS:
        raise ValueError(
            f"samples must be an integer of at least {2 * GROUPS}, two for each of the {GROUPS} groups of the "
            f"jackknife, got {samples!r}."
        )


# ---- to measure


def measure(
    estimator: Measurable,
    logits: np.ndarray,
    cost: Cost,
    *,
    samples: int = SAMPLES,
    rng: Rng | int = 0,
    family: str = "categorical",
    inputs: np.ndarray | None = None,
) -> Measurement:
    """Measure one estimator: `enumerated` if it is a function of one sample, else `sampled`.

    estimator: a name as for `estimators.create`, like "rloo:samples=4", or a function without arguments that makes an
        estimator, which are measured when fresh; or an estimator, which is measured as it is, and stays as it is.
    logits, cost, family, inputs: as for `EnumeratedCost`. For several estimators make one, and call its `measure`.
    samples: estimates of each example where sampled, at least 40; they are made 20·⌈samples / 20⌉.
    rng: the noise, a `minigrad.Rng` or a seed. The same one gives the same numbers.

    ValueError, in one sentence, for too few samples, an estimator for other variables or with an objective that is not
    a mean of costs (`multi_sample`), and an exact gradient that is 0 or not finite; besides what `EnumeratedCost` says.
    TypeError for what is no estimator.
    """
    check_groups(samples)
    return EnumeratedCost(logits, cost, family, inputs=inputs).measure(estimator, samples=samples, rng=rng)


def enumerated(estimator: Measurable, problem: EnumeratedCost, rng: Rng | int = 0) -> Measurement:
    """The exact numbers of an estimator whose `randomness` is "sample" or "none"; ValueError for any other.

    rng: what networks of a learned baseline begin with, a `minigrad.Rng` or a seed.
    """
    made, rng = prepared(estimator, problem), as_rng(rng)
    B = len(problem.logits)
    g = problem.gradient.reshape(B, -1)
    if made.randomness == "none":
        mean, variance = problem.estimates(made, np.arange(B), 1, rng)[:, 0], 0.0
    elif made.randomness == "sample":
        p = problem.family.probability(made.logit_scale * problem.logits.astype(np.float64))
        q = problem.family.outcome_probability(p, problem.outcomes.astype(np.float64))
        mean, variance = np.empty_like(g), 0.0
        for i in range(B):
            given = Given(samples=[problem.outcomes], rng=rng)
            estimates = problem.estimates(made, np.array([i]), len(problem.outcomes), given)[0]
            if given.unused:
                raise ValueError(
                    f"{called(made)} has the randomness 'sample', but it has not drawn its sample "
                    "by rng.one_hot or rng.bernoulli: state the randomness that it has."
                )
            mean[i] = q[i] @ estimates
            variance += q[i] @ np.square(estimates - mean[i]).sum(axis=1)
    else:
        own = f"{called(made)} is no function of one sample: its randomness is {made.randomness!r}"
        raise ValueError(f"{own}; use `sampled` or `measure`.")
    size, bias2 = np.square(g).sum(), np.square(mean - g).sum()
    norm = math.sqrt(np.square(mean).sum() * size)
    return Measurement(
        how="enumerated",
        bias=math.sqrt(bias2 / size),
        deviation=math.sqrt(variance / size),
        mse=float((bias2 + variance) / size),
        cosine=float(np.clip((mean * g).sum() / norm, -1.0, 1.0)) if norm else math.nan,
        gradient_norm=problem.gradient_norm,
    )


def sampled(estimator: Measurable, problem: EnumeratedCost, rng: Rng | int = 0, samples: int = SAMPLES) -> Measurement:
    """The numbers from at least `samples` ≥ 40 estimates of each example, with 95 % intervals, for any estimator."""
    check_groups(samples)
    made, rng, B = prepared(estimator, problem), as_rng(rng), len(problem.logits)
    g, examples = problem.gradient.reshape(B, -1), np.arange(B)
    per_group, at_a_time = -(-samples // GROUPS), max(1, ROWS // B)
    errors, squares = np.zeros((GROUPS, g.size)), np.zeros(GROUPS)  # Σ (ĝ − g) and Σ ‖ĝ − g‖² of each group
    call = itertools.count()
    for group in range(GROUPS):
        for start in range(0, per_group, at_a_time):
            repeats = min(at_a_time, per_group - start)
            error = problem.estimates(made, examples, repeats, rng.at(next(call))) - g[:, None]
            errors[group] += error.sum(axis=1).ravel()
            squares[group] += np.square(error).sum()
    n = GROUPS * per_group
    found: dict[str, Any] = {}
    left_out = from_sums(n - per_group, errors.sum(axis=0) - errors, squares.sum() - squares, g.ravel())
    student = stdtrit(GROUPS - 1, 0.5 + 0.5 * CONFIDENCE)
    for name, value in from_sums(n, errors.sum(axis=0), squares.sum(), g.ravel()).items():
        spread = np.square(left_out[name] - left_out[name].mean()).sum()
        margin = student * math.sqrt((GROUPS - 1) / GROUPS * spread)
        found |= within_bounds(name, value, value - margin, value + margin)
    return Measurement(how="sampled", samples=n, gradient_norm=problem.gradient_norm, **found)


def as_rng(rng: Rng | int) -> Rng:
    """The noise that a seed stands for; ValueError for a seed that `Rng` refuses."""
    return rng if isinstance(rng, Rng) else Rng(rng)


def from_sums(n: int, errors: np.ndarray, squares: Any, g: np.ndarray) -> dict[str, Any]:
    """The statistics of n estimates.   errors Σ (ĝ − g) (..., P), squares Σ ‖ĝ − g‖² (...), g (P,)  ->  (...) each

    With e the mean of ĝ − g:   tr Var = (Σ‖ĝ − g‖² − n‖e‖²)/(n − 1),   bias² = ‖e‖² − tr Var/n,
                                ‖E ĝ‖² = ‖g + e‖² − tr Var/n
    """
    size, e = np.square(g).sum(), errors / n
    e2 = np.square(e).sum(axis=-1)
    variance = (squares - n * e2) / (n - 1)
    norm2 = (np.square(g + e).sum(axis=-1) - variance / n) * size
    product = (g + e) @ g
    cosine = np.where(norm2 > 0, product / np.sqrt(np.where(norm2 > 0, norm2, 1.0)), np.nan)
    return {
        "bias2": (e2 - variance / n) / size,
        "variance": variance / size,
        "mse": squares / n / size,
        "cosine": cosine,
    }


def within_bounds(name: str, *values: float) -> dict[str, Any]:
    """A value and the ends of its interval as they are reported: roots of squares, and nothing that cannot be.

    NaN stays NaN.
    """
    root = {"bias2": "bias", "variance": "deviation"}
    if name == "cosine":
        value, low, high = (float(np.clip(x, -1.0, 1.0)) for x in values)
    else:
        value, low, high = (float(np.maximum(x, 0.0)) ** (0.5 if name in root else 1.0) for x in values)
    name = root.get(name, name)
    return {name: value, f"{name}_interval": (low, high)}
