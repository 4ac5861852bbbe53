"""The samples: is it an estimator at all, what are its samples like, and how are they distributed?"""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.stats import chi2

from .. import categorical
from .adapters import FromEstimator
from .ladder import Rung
from .means import per_cent
from .report import FAILS, HOLDS, NOTED, Finding, decide
from .subject import ConformanceError, Subject

__all__ = ["forward", "trial"]

CALLS = 16
SPECIAL = "Its outputs are meant to be something else than outcomes."
OWN = 2e-3  # of finite differences, relative to the largest gradient
ROUNDING = 1e-4  # numbers as near as that to 0 and 1 are meant to be 0 and 1


def trial(s: Subject) -> list[Finding]:
    """ConformanceError if what it returns cannot be judged."""
    seed, name = next(s.seeds), s.adapter.title
    samples, g = s.call(s.quadratic, 64, seed=seed)
    finite, found = np.isfinite(g), []
    if not finite.any():
        raise ConformanceError(f"{name} gives no finite number in its gradients.")
    if samples is None and not isinstance(s.adapter, FromEstimator):
        raise ConformanceError(f"{name} returns no samples: return what the cost was evaluated at, too.")
    if not finite.all():
        sentence = f"{per_cent(float((~finite).mean()))} of the numbers in its gradients are not finite."
        found.append(Finding("forward", "finite gradients", FAILS, sentence))
    if not g.any():
        found.append(Finding("forward", "a gradient", FAILS, "All gradients are 0: nothing reaches the logits."))
    same = np.array_equal(g, s.call(s.quadratic, 64, seed=seed)[1], equal_nan=True)
    yes, no = "The same seed gives the same gradients.", "The same seed gives other gradients."
    found.append(decide("invariance", "the same seed twice", same, yes, no))
    if samples is not None and np.array_equal(samples, s.call(s.quadratic, 64)[0]):
        sentence = "Other seeds give the same samples: it ignores its noise."
        found.append(Finding("forward", "noise", FAILS, sentence))
    return found


def forward(s: Subject) -> list[Finding]:
    first = [s.call(s.quadratic)[0] for _ in range(CALLS)]
    if first[0] is None:
        return [Finding("forward", "hard or relaxed", NOTED, "It draws no samples.")]
    d = np.stack([samples[0] for samples in first]).astype(np.float64)  # of several samples, the first
    kind = kind_of(s, d)
    found = [kind, noise_of_each(s, d), distribution(s, d.reshape(-1, *d.shape[2:]))]
    return [*found, own_cost(s)] if s.relaxed else found


def kind_of(s: Subject, d: np.ndarray) -> Finding:
    """Hard, relaxed or neither; sets `relaxed`.   d (calls, n, …)"""
    name, what = "hard or relaxed", "0 or 1" if s.bits else "one-hot"
    off = float(np.abs(d - np.rint(d)).max())
    sums = s.bits or float(np.abs(d.sum(axis=-1) - 1.0).max()) < ROUNDING
    whole = bool(sums and np.isin(np.rint(d), (0.0, 1.0)).all())
    if whole and off == 0.0:
        return Finding("forward", name, HOLDS, f"The samples are exactly {what}.", off)
    if whole and off < ROUNDING:
        sentence = f"The samples are {what} but for rounding, up to {off:.1g}: a comparison like d == 1 fails."
        return Finding("forward", name, NOTED, sentence, off)
    low, high = float(d.min()), float(d.max())
    s.relaxed = bool(sums and low >= -ROUNDING and high <= 1.0 + ROUNDING)
    if s.relaxed:
        return Finding("forward", name, NOTED, "The samples are relaxed: points between the outcomes.", off)
    sentence = f"The samples are neither hard nor relaxed: numbers from {low:.3g} to {high:.3g}."
    return Finding("forward", name, NOTED, sentence, off)


def noise_of_each(s: Subject, d: np.ndarray) -> Finding:
    """Two examples of a call agree as often as two independent ones do, or do they share their noise?"""
    rows = outcome_rows(s, d).reshape(CALLS, s.n, -1)
    half = s.n // 2
    agree = float((rows[:, :half] == rows[:, half : 2 * half]).all(axis=2).mean())
    counts = np.unique(rows.reshape(CALLS * s.n, -1), axis=0, return_counts=True)[1]
    expected = float(((counts / counts.sum()) ** 2).sum())
    # calls with shared noise agree always; by chance, this far above is below 1e-9
    error = math.sqrt(expected * (1.0 - expected) / (CALLS * half))
    shared = agree - expected > 0.02 + 6.0 * error
    often = f"Two examples of a batch agree in {per_cent(agree)} of the cases, independent ones in {per_cent(expected)}"
    yes, no = "The examples of a batch have noise of their own.", f"{often}: they share their noise."
    return decide("forward", "noise of each example", not shared, yes, no, agree - expected)


def outcome_rows(s: Subject, d: np.ndarray) -> np.ndarray:
    """The discrete outcome that each sample is, or stands for if it is relaxed."""
    if not s.relaxed:
        return np.rint(d)
    return (d > 0.5).astype(np.float64) if s.bits else categorical.harden(d)


def distribution(s: Subject, d: np.ndarray) -> Finding:
    """χ² against the probabilities of all outcomes.   d (n, …)"""
    rung, name = s.quadratic, "distribution"
    if s.special and not s.relaxed:
        return Finding("forward", name, NOTED, SPECIAL)
    outcomes = s.module.outcomes((1, *rung.shape))
    same = outcome_rows(s, d)[:, None] == outcomes
    counts, n = same.reshape(*same.shape[:2], -1).all(axis=2).sum(axis=0), len(d)
    if counts.sum() < n:
        share = 1.0 - counts.sum() / n
        sentence = f"{per_cent(share)} of the samples are none of the {len(outcomes)} outcomes."
        return Finding("forward", name, FAILS, sentence, share)

    def misfit(logits: np.ndarray) -> float:
        q = s.module.outcome_probability(s.module.probability(logits[None]), outcomes)[0]
        return float(((counts - n * q) ** 2 / np.maximum(n * q, 1e-9)).sum())

    limit, scale = chi2.isf(s.alpha, len(outcomes) - 1), s.adapter.logit_scale
    statistic = misfit(scale * rung.logits)
    if statistic < limit:
        what = "largest classes of the relaxed samples" if s.relaxed else "samples"
        law = "σ(θ)" if s.bits else "softmax(θ)"
        law = law if scale == 1.0 else f"{law[:-3]}({scale:.3g} θ)"
        return Finding("forward", name, HOLDS, f"{n:,} {what} are distributed as {law} says (χ²).", statistic)
    if s.special:
        return Finding("forward", name, NOTED, SPECIAL)
    q = s.module.outcome_probability(s.module.probability(scale * rung.logits[None]), outcomes)[0]
    worst = int(np.abs(counts / n - q).argmax())
    sentence = f"One outcome has the frequency {counts[worst] / n:.4f} in place of {q[worst]:.4f}"
    best = minimize_scalar(lambda x: misfit(math.exp(x) * rung.logits), bounds=(-3.0, 3.0), method="bounded")
    if misfit(s.module.probability(rung.logits[None])[0]) < limit:
        sentence += ": probabilities were taken for logits"
    elif best.fun < limit:
        sentence += f": the logits were multiplied by {math.exp(best.x):.3g}"
    return Finding("forward", name, FAILS, f"{sentence}.", statistic)


def own_cost(s: Subject) -> Finding:
    """At fixed noise a relaxed sample is a smooth function of θ: is the gradient that of the cost at it, row by row?

    The longer step is for those that compute in float32. A few rows may jump: noise that is redrawn, a kink.
    """
    rung, seed = s.quadratic, next(s.seeds)
    theta = s.repeat(rung.logits, 64)
    g = s.call(rung, logits=theta, seed=seed)[1]

    def off(own: np.ndarray) -> float:
        rows = np.abs(g - own).reshape(len(g), -1).max(axis=1)
        return float(np.quantile(rows, 0.95) / np.abs(own).max())

    own = min((by_differences(s, rung, theta, seed, h) for h in (1e-5, 1e-3)), key=off)
    error, factor = off(own), float((own * g).sum() / (own * own).sum())
    why = f": it is {factor:.4g} times as large" if off(factor * own) < OWN else ""
    yes = "At fixed noise, the gradient is that of the cost at the relaxed sample, row by row."
    no = f"At fixed noise, the gradient is not that of the cost at the relaxed sample{why}."
    return decide("forward", "its own relaxed cost", error < OWN, yes, no, error)


def by_differences(s: Subject, rung: Rung, theta: np.ndarray, seed: int, h: float) -> np.ndarray:
    """The gradient of the cost at the samples, at the noise of that seed, by central differences."""
    own = np.empty_like(theta)
    for at in itertools.product(*map(range, rung.shape)):
        moved: list[np.ndarray] = []
        here: Any = (slice(None), *at)
        for step in (h, -h):
            x = theta.copy()
            x[here] += step
            samples, _ = s.call(rung, logits=x, seed=seed)
            moved.append(rung.values(samples).mean(axis=0))
        own[here] = (moved[0] - moved[1]) / (2.0 * h)
    return own
