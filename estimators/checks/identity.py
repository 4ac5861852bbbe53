"""Which one is it: a rule of ours, sample by sample, or something with the mean of one?"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from scipy.optimize import minimize_scalar

from .. import ESTIMATORS, create
from ..base import SettingError, TemperedSampler, value_and_grad
from ..enumeration import Given
from .adapters import FromEstimator, from_estimator
from .bias import hardest
from .ladder import Rung
from .means import per_cent
from .report import FAILS, NOTED, Finding
from .subject import Subject

__all__ = ["identity"]


SAME = 1e-6  # of gradients at the same samples, relative to their norm
NEAR = 0.04  # of means, which have noise
MEANS = ("st", "st-identity", "st-gs", "gst-1.0", "gst-p", "darn", "reinmax")
TAUS = (0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.3, 1.5, 2.0, 3.0, 5.0)


def identity(s: Subject) -> list[Finding]:
    found = same_rule(s) or same_mean(s)
    return [found or Finding("identity", "which one", NOTED, "It is none of our rules, and has the mean of none.")]


# ---- sample by sample: our rule at its samples, with its cost


def same_rule(s: Subject) -> Finding | None:
    rung = s.quadratic
    theta = rung.logits + 0.5 * np.random.default_rng(1).standard_normal((48, *rung.shape))
    samples, g = s.call(rung, logits=theta)
    if samples is None or not np.isfinite(g).all() or not g.any():
        return None
    if s.relaxed:
        return same_relaxation(s, rung, samples, g)
    samples = np.rint(samples)
    if not np.isin(samples, (0.0, 1.0)).all():
        return None
    exactly: list[tuple[str, float, float]] = []
    scaled: list[tuple[str, float, float]] = []
    gradient = lambda ours: at_samples(ours, rung, theta, samples)
    for name in ESTIMATORS:
        ours = candidate(s, name, len(samples))
        if ours is None:
            continue
        label, factor, residual = best_fit(ours, gradient, g)
        if residual < SAME:
            (exactly if factor == 1.0 else scaled).append((label, factor, residual))
    if exactly:
        first, *others = (f"`{label}`" for label, _, _ in exactly)
        also = f" (and {', '.join(others)}: the same here)" if others else ""
        residual = max(1e-16, *(r for _, _, r in exactly))
        sentence = f"Sample by sample it is {first}{also}, to {residual:.0e}."
        return Finding("identity", "which one", NOTED, sentence, residual, {"is": [label for label, _, _ in exactly]})
    if scaled:
        label, factor, _ = scaled[0]
        sentence = f"Sample by sample it is {factor:.6g} times `{label}`: a factor is missing, or one too many."
        return Finding("identity", "which one", FAILS, sentence, factor)
    return None


def candidate(s: Subject, name: str, samples: int) -> FromEstimator | None:
    """Ours, if it is a rule of as many samples and of nothing else."""
    spec = f"{name}:samples={samples}" if samples > 1 else name
    try:
        made = create(spec, family=s.family)
    except SettingError:
        return None
    if made.randomness not in ("sample", "samples") or made.sample_count != samples or made.learned is not None:
        return None
    return FromEstimator(made, spec)


def at_samples(ours: FromEstimator, rung: Rung, theta: np.ndarray, samples: np.ndarray) -> np.ndarray | None:
    given = Given(samples=list(samples))
    try:
        return ours.run(theta, rung, 0, noise=given)[1]
    except (ValueError, AttributeError):  # it draws something else besides
        return None


def best_fit(
    ours: FromEstimator,
    gradient: Callable[[FromEstimator], np.ndarray | None],
    g: np.ndarray,
) -> tuple[str, float, float]:
    """(name with its options, factor c, ‖g − c ĝ‖/‖g‖), with τ = 1 if that fits, else with the τ that fits best."""

    def against(x: np.ndarray | None) -> tuple[float, float]:
        if x is None or not np.isfinite(x).all() or not x.any():
            return 1.0, math.inf
        factor, norm = float((x * g).sum() / (x * x).sum()), float(np.linalg.norm(g))
        factor = 1.0 if abs(factor - 1.0) < 1e-5 else factor  # as near as float32 comes
        return factor, float(np.linalg.norm(g - factor * x)) / norm

    factor, residual = against(gradient(ours))
    if residual < SAME or not isinstance(ours.estimator, TemperedSampler):
        return ours.title, factor, residual
    estimator = ours.estimator

    def at(log_tau: float) -> tuple[float, float]:
        estimator.tau = math.exp(log_tau)
        return against(gradient(ours))

    log_taus = np.log([tau for tau in TAUS if tau > estimator.min_tau])
    misfits = [at(x)[1] for x in log_taus]
    i = int(np.argmin(misfits))
    best = log_taus[i]
    if misfits[i] < 0.5:
        around = (log_taus[max(0, i - 1)], log_taus[min(len(log_taus) - 1, i + 1)])
        best = minimize_scalar(lambda x: at(x)[1], bounds=around, method="bounded", options={"xatol": 1e-10}).x
        rounded = math.log(float(f"{math.exp(best):.4g}"))
        best = rounded if abs(rounded - best) < 1e-6 else best
    return f"{ours.title}{',' if ':' in ours.title else ':'}tau={math.exp(best):.4g}", *at(best)


def same_relaxation(s: Subject, rung: Rung, samples: np.ndarray, g: np.ndarray) -> Finding | None:
    """(1/τ) J(y) ∇f(y) at its relaxed samples y."""
    y = samples[0].astype(np.float64)
    x = s.module.vjp(y, value_and_grad(rung, y)[1])
    factor = float((x * g).sum() / (x * x).sum())
    residual = float(np.linalg.norm(g - factor * x) / np.linalg.norm(g))
    if len(samples) > 1 or residual > SAME or factor <= 0.0:
        return None
    label = f"gumbel-softmax:tau={1.0 / factor:.6g}"
    sentence = f"At its samples it is `{label}`, to {max(residual, 1e-16):.0e}."
    return Finding("identity", "which one", NOTED, sentence, residual, {"is": [label]})


# ---- in the mean, on three costs together


def same_mean(s: Subject) -> Finding | None:
    rows = hardest(s)
    distances = [s.distances[r.name] for r in rows]
    if not all(math.isfinite(x.size) for x in distances):
        return None
    if not any(x.significant for x in distances):
        most = max(x.most for x in distances)
        sentence = f"Its mean is the exact gradient, as far as was seen (to {per_cent(most)} of its norm)."
        return Finding("identity", "which one", NOTED, sentence, most)
    target = np.concatenate([s.means[r.name].mean / s.unit[r.name] for r in rows])
    if not target.any():
        return None
    seed, known = next(s.seeds), []
    for spec in (f"{name}{tau}" for name in MEANS for tau in ("", *(f":tau={t:g}" for t in TAUS if t != 1.0))):
        try:
            ours = from_estimator(spec, s.family)
        except SettingError:  # not for these variables, or without a temperature
            continue
        parts = [ours(s.repeat(r.logits, 4 * s.n), r, seed)[1].mean(axis=0).ravel() / s.unit[r.name] for r in rows]
        known.append((spec, np.concatenate(parts)))

    def near(scaled: bool) -> Finding | None:
        """The nearest of them, perhaps times a number."""
        factors = [float((x * target).sum() / max((x * x).sum(), 1e-300)) if scaled else 1.0 for _, x in known]
        apart = [np.linalg.norm(target - c * x) for c, (_, x) in zip(factors, known, strict=True)]
        i = int(np.argmin(apart))
        residual, factor, label = float(apart[i] / np.linalg.norm(target)), factors[i], known[i][0]
        if residual > NEAR or factor <= 0.0:
            return None
        what = f"{factor:.2f} times `{label}`" if scaled else f"`{label}`"
        sentence = f"In the mean it is near {what}: within about {per_cent(residual + 0.005)}, on three costs."
        return Finding("identity", "which one", NOTED, sentence, residual, {"mean": label, "factor": factor})

    return near(scaled=False) or near(scaled=True)
