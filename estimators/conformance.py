"""Hold anybody's estimator against the truth.

    import torch.nn.functional as F
    from estimators.conformance import check_estimator, from_torch
    report = check_estimator(from_torch(lambda logits: F.gumbel_softmax(logits, hard=True)), exact_for="none")
    print(report)
    report.check()                      # AssertionError with the sentences of what fails

`checks.adapters` says how an estimator is handed over. What is decided, each with a verdict, a number and a sentence:

    forward      are the samples distributed as softmax θ (or σ θ) says, and are they one-hots?
    bias         the mean of the gradient against the exact one, cost by cost up the ladder
    claims       is it exact for what its author says, and for no more?
    identity     is it one of our rules, sample by sample, or whose mean has it?
    variance     its deviation beside those of ours, what it asks of the cost, how long it takes
    invariances  what must change nothing: a constant in the logits, other names of the classes, the other examples …
    leaks        what lies behind the cost gets the gradient at the sample, and nothing else

**How it is decided.** A row of the ladder is asked in calls of 2,048 independent examples, and the means of the calls
are compared with the exact gradient by Hotelling's T², which knows that examples of one call may depend on each other.
The number of calls doubles until the bias is larger than its error, or cannot be larger than 1 % of the gradient's
norm, or the budget is spent. Looks and rows share one error rate, 1 − level, by Bonferroni: if an estimator is right,
the whole report has a false alarm with at most that probability. Nothing is called unbiased: what is shown is that a
bias would have been seen if it were larger than so many per cent.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import numpy as np

from . import create
from .checks.adapters import (
    Adapter,
    from_estimator,
    from_jax,
    from_jax_gradient,
    from_torch,
    from_torch_gradient,
)
from .checks.bias import bias, claims
from .checks.costs import variance
from .checks.identity import identity
from .checks.invariances import invariances, leaks
from .checks.ladder import EXACT_ON
from .checks.report import Finding, Report
from .checks.samples import forward, trial
from .checks.subject import ROWS, ConformanceError, Subject
from .measure import FAMILIES

__all__ = [
    "ConformanceError",
    "Finding",
    "Report",
    "check_estimator",
    "from_estimator",
    "from_jax",
    "from_jax_gradient",
    "from_torch",
    "from_torch_gradient",
]


def check_estimator(
    fn: Callable,
    family: str = "categorical",
    exact_for: str | None = None,
    *,
    same_as: str | None = None,
    budget: float = 45.0,
    level: float = 0.99,
    seed: int = 0,
    rows: int = ROWS,
    progress: Callable[[float, str], object] = lambda done, what: None,
) -> Report:
    """Judge an estimator.

    fn: what an adapter gives, or a function fn(logits, cost, seed) -> (samples, gradients), see `checks.adapters`.
    family: "categorical" or "bernoulli".
    exact_for: what its author claims, "none", "linear", "separable", "quadratic" or "all", as `Estimator.exact_for`;
        None for no claim, or for the one that is known of ours.
    same_as: the name of one of ours, like "st-gs:tau=0.5", whose mean it claims to have.
    budget: seconds for the ladder, the longest part; more for what varies much.   rows: examples in a call, at least 16
    level: the probability that a right estimator raises no alarm, in (0, 1).   seed: of all noise, at least 0
    progress: called with the fraction that is done, and what is being done

    ConformanceError if fn returns something else than an estimator does; what fn raises is not caught. SettingError for
    an unknown name in same_as, ValueError for other arguments out of range.
    """
    if family not in FAMILIES:
        raise ValueError(f"unknown family {family!r}; the known ones are {', '.join(FAMILIES)}.")
    if exact_for is not None and exact_for not in EXACT_ON:
        raise ValueError(f"exact_for must be one of {', '.join(EXACT_ON)}, got {exact_for!r}.")
    if not (0.0 < level < 1.0 and 0.0 < budget < math.inf and rows >= 16 and seed >= 0):
        raise ValueError(
            "level must lie in (0, 1), budget be positive, rows at least 16 and seed at least 0, "
            f"got {level}, {budget}, {rows}, {seed}."
        )
    if same_as is not None:
        create(same_as, family=family)
    adapter = fn if isinstance(fn, Adapter) else Adapter(fn)
    claim = adapter.exact_for if exact_for is None else exact_for
    start, s = time.perf_counter(), Subject(adapter, family, claim, level, seed, rows, progress)
    progress(0.0, "samples")
    with np.errstate(all="ignore"):  # what is not finite is looked for explicitly
        found = trial(s) + forward(s) + bias(s, budget) + claims(s, same_as)
        for done, what, check in (
            (0.75, "which one it is", identity),
            (0.85, "variance", variance),
            (0.9, "invariances", invariances),
            (0.98, "leaks", leaks),
        ):
            progress(done, what)
            found += check(s)
    progress(1.0, "done")
    return Report(
        title=adapter.title,
        framework=adapter.framework,
        family=family,
        claim=claim,
        level=level,
        seconds=time.perf_counter() - start,
        findings=tuple(found),
        compared=tuple(s.compared),
    )
