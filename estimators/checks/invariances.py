"""What must change nothing, and what lies behind the cost."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from .. import bernoulli
from .adapters import FromEstimator
from .ladder import Rung
from .means import Distance, Means, distance, per_cent
from .report import FAILS, HOLDS, NOTED, Finding, decide
from .subject import FIRST, Subject

__all__ = ["invariances", "leaks"]

SHIFTS = (1.0, 40.0, 60.0, 300.0)  # constants added to the logits
SMALL_BATCHES = 2.0  # seconds for batches of four
SAME = 1e-4  # as near as float32 comes at large logits: of two gradients at the same samples, relative to the largest


def invariances(s: Subject) -> list[Finding]:
    minus = "a class with the logit −∞", "a class with the logit −1e9"
    of_classes = (
        ("a constant in the logits", shift),
        (minus[0], lambda s: masked(s, minus[0], -np.inf)),
        (minus[1], lambda s: masked(s, minus[1], -1e9)),
        ("one class", one_class),
        ("a logit of +∞", infinite_above),
    )
    of_all = (
        ("0 and 1 exchanged" if s.bits else "a permutation of the classes", renamed),
        ("the other examples of a batch", other_examples),
        ("logits of ±1e4", extreme),
        ("logits of ±∞" if s.bits else "a logit of −∞ among others", infinite),
        ("equal logits", ties),
        ("a batch of one", batch_of_one),
        (f"batches of 4 and of {s.n}", small_batch),
        ("float32", single_precision),
    )
    return [tried(s, name, check) for name, check in (*(() if s.bits else of_classes), *of_all)]


def tried(s: Subject, name: str, check: Callable[[Subject], Finding]) -> Finding:
    """At the edges, an exception is what was found, and not the end of everything."""
    try:
        return check(s)
    except Exception as error:  # of somebody's function, whatever it is
        why = str(error).strip().split("\n")[0][:150]
        refuses = check is infinite_above
        sentence = f"It {'refuses them' if refuses else 'raises'}: {type(error).__name__}{f', {why}' if why else ''}"
        return Finding("invariance", name, HOLDS if refuses else FAILS, f"{sentence.rstrip('.,:')}.")


def unchanged(name: str, x: Distance, yes: str = "") -> Finding:
    """A mean gradient that is to be the same."""
    yes = yes or f"The mean gradient changes by at most {per_cent(x.most)} of its norm."
    no = f"The mean gradient changes by {x.size:.3f} ± {x.error:.3f} of its norm."
    return decide("invariance", name, not x.significant, yes, no, x.size)


def shift(s: Subject) -> Finding:
    rung, seed, theta = s.quadratic, next(s.seeds), s.repeat(s.quadratic.logits, 512)
    plain = s.call(rung, logits=theta, seed=seed)
    errors = [difference(plain, s.call(rung, logits=theta + c, seed=seed)) for c in SHIFTS]
    wrong = [f"{_amount(e)} after {c:g}" for c, e in zip(SHIFTS, errors, strict=True) if not e < SAME]
    yes = f"Constants up to {max(SHIFTS):g} in the logits change nothing."
    no = f"A constant in all logits of a variable changes the gradient: {', '.join(wrong)}."
    return decide("invariance", "a constant in the logits", not wrong, yes, no, max(errors))


def difference(first: tuple[Any, np.ndarray], second: tuple[Any, np.ndarray], rows: slice = slice(None)) -> float:
    """The largest difference of the gradients of two calls with the same noise, relative to the largest one.

    A sample may be another one where the noise comes as near to a border as rounding; if more than 2 % are, all is
    different, 1. What is not finite is infinitely different.
    """
    (d, g), (other_d, other_g) = first, second
    same = np.ones(len(g), bool)
    if d is not None and other_d is not None:
        same = (np.abs(d - other_d) < 1e-4).reshape(len(d), len(g), -1).all(axis=(0, 2))
    same = np.flatnonzero(same[rows])
    if len(same) < 0.98 * len(g[rows]):
        return 1.0
    a, b = g[rows][same], other_g[rows][same]
    return float(np.abs(a - b).max() / max(np.abs(g).max(), 1e-300)) if np.isfinite(b).all() else math.inf


def masked(s: Subject, name: str, value: float) -> Finding:
    """Classes that cannot be, as if they were not there."""
    plain, rung, means = s.quadratic, WithMasked(s.quadratic), Means()
    theta = s.repeat(np.pad(plain.logits, ((0, 0), (0, 1)), constant_values=value), s.n)
    for _ in range(FIRST):
        d, g = s.call(rung, logits=theta)
        drawn = 0.0 if d is None else float(np.abs(d[..., -1]).max())
        if not np.isfinite(g).all():
            return Finding("invariance", name, FAILS, "The gradients are not finite.", math.inf)
        if value == -np.inf and np.abs(g[..., -1]).max() > 1e-9 * np.abs(g).max():
            return Finding("invariance", name, FAILS, "The class gets a gradient.", float(np.abs(g[..., -1]).max()))
        if drawn > SAME:
            return Finding("invariance", name, FAILS, "The class is drawn.", drawn)
        means.vectors.append(g.mean(axis=0, dtype=np.float64).ravel())
    without = [np.pad(v.reshape(plain.shape), ((0, 0), (0, 1))).ravel() for v in s.means[plain.name].vectors]
    return unchanged(name, s.apart(means, Means(without), plain), "It is as if the class were not there.")


def one_class(s: Subject) -> Finding:
    (d, g), name = s.call(Rung("quadratic", 2, 1), 8), "one class"
    if not np.isfinite(g).all() or (d is not None and not np.allclose(d, 1.0)):
        return Finding("invariance", name, FAILS, "A variable of one class has no sample 1 with a finite gradient.")
    if np.abs(g).max() > SAME:
        return Finding("invariance", name, NOTED, "A variable of one class gets a gradient, which changes nothing.")
    return Finding("invariance", name, HOLDS, "A variable of one class is 1, and its gradient 0.")


def renamed(s: Subject) -> Finding:
    rung, means = Renamed(s.quadratic), Means()
    s.add(rung, 2 * FIRST, means)
    back = Means([rung.back(v.reshape(rung.shape)).ravel() for v in means.vectors])
    name = "0 and 1 exchanged" if s.bits else "a permutation of the classes"
    if s.special:
        return Finding("invariance", name, NOTED, "Outputs between 0 and 1 have no such names.")
    return unchanged(name, s.apart(back, s.means[s.quadratic.name], s.quadratic))


def other_examples(s: Subject) -> Finding:
    rung, seed, theta = s.quadratic, next(s.seeds), s.repeat(s.quadratic.logits, 32)
    moved = theta.copy()
    moved[4:] += np.random.default_rng(2).standard_normal(moved[4:].shape)
    first, second = (s.call(rung, logits=x, seed=seed) for x in (theta, moved))
    error = difference(first, second, slice(4))
    if error == 1.0:  # other samples: how much noise is drawn depends on the logits, and the mean decides
        return in_the_mean(s)
    yes, no = "does not depend on them.", f"depends on them, with the same noise: {_amount(error)}."
    yes, no = (f"An example's gradient {x}" for x in (yes, no))
    return decide("invariance", "the other examples of a batch", error < SAME, yes, no, error)


def in_the_mean(s: Subject) -> Finding:
    """The mean of half a batch, beside others than its like."""
    means, half, theta = Means(), s.n // 2, s.repeat(s.quadratic.logits, s.n)
    theta[half:] += np.random.default_rng(2).standard_normal(theta[half:].shape)
    for _ in range(2 * FIRST):
        means.vectors.append(s.call(s.quadratic, logits=theta)[1][:half].mean(axis=0, dtype=np.float64).ravel())
    return unchanged("the other examples of a batch", s.apart(means, s.means[s.quadratic.name], s.quadratic))


def extreme(s: Subject) -> Finding:
    return finite_at(s, "logits of ±1e4", np.array([1e4, -1e4] if s.bits else [1e4, 0.0, -1e4]))


def infinite(s: Subject) -> Finding:
    """Of classes, −∞ only; a bit may be sure of either value."""
    name = "logits of ±∞" if s.bits else "a logit of −∞ among others"
    return finite_at(s, name, np.array([np.inf, -np.inf] if s.bits else [0.0, 1.0, -np.inf]))


def infinite_above(s: Subject) -> Finding:
    """A softmax has no value where a logit is +∞: NaN says so, and so does the sure class. Another class hides it."""
    name, logits = "a logit of +∞", np.array([np.inf, 0.0, 0.0])
    d, g = s.call(s.quadratic, logits=s.repeat(np.broadcast_to(logits, s.quadratic.shape), 64))
    if not np.isfinite(g).all():
        return Finding("invariance", name, HOLDS, "The gradient is not finite: a softmax has no value there.")
    sure = d is None or bool((d[..., 0] == 1.0).all())
    return decide("invariance", name, sure, "Its class is the sample.", "Another class is drawn, and nothing says so.")


def finite_at(s: Subject, name: str, logits: np.ndarray) -> Finding:
    d, g = s.call(s.quadratic, logits=s.repeat(np.broadcast_to(logits, s.quadratic.shape), 64))
    good = bool(np.isfinite(g).all() and (d is None or np.isfinite(d).all()))
    if s.special and not good:
        return Finding("invariance", name, NOTED, "Its outputs have no bound, and are not finite there.")
    return decide("invariance", name, good, "All is finite.", "The gradients or the samples are not finite.")


def ties(s: Subject) -> Finding:
    """Equal logits, all 0: nothing happens there that does not happen beside."""
    equal, beside, theta = Means(), Means(), np.zeros((s.n, *s.quadratic.shape))
    nudge = 1e-6 * np.random.default_rng(3).standard_normal(s.quadratic.shape)
    s.add(s.quadratic, 2 * FIRST, equal, logits=theta)
    s.add(s.quadratic, 2 * FIRST, beside, logits=theta + nudge)
    x = s.apart(equal, beside, s.quadratic, 1e-4)
    return unchanged("equal logits", x, "The mean gradient there is that beside.")


def batch_of_one(s: Subject) -> Finding:
    good = bool(np.isfinite(s.call(s.quadratic, 1)[1]).all())
    return decide("invariance", "a batch of one", good, "Its gradient is finite.", "Its gradient is not finite.")


def small_batch(s: Subject) -> Finding:
    """A baseline over the batch that sees its own example shows in batches of four."""
    rung, means, end = s.quadratic, Means(), time.perf_counter() + SMALL_BATCHES
    while means.n < 4096 and (means.n < 64 or time.perf_counter() < end):
        s.add(rung, 1, means, n=4)
    return unchanged(f"batches of 4 and of {s.n}", s.apart(means, s.means[rung.name], rung))


def single_precision(s: Subject) -> Finding:
    rung, means, name = s.quadratic, Means(), "float32"
    s.add(rung, FIRST, means, dtype=np.float32)
    if not np.isfinite(means.vectors).all():
        return Finding("invariance", name, FAILS, "The gradients are not finite in float32.", math.inf)
    dtype = s.call(rung, 8, dtype=np.float32)[1].dtype
    yes = "The mean gradient is that of float64" + ("." if dtype == np.float32 else f", and comes as {dtype}.")
    return unchanged(name, s.apart(means, s.means[rung.name], rung, 1e-4), yes)


# ---- leaks


def leaks(s: Subject) -> list[Finding]:
    """Coefficients of the cost stand for weights behind it."""
    rung, name = s.quadratic, "weights behind the cost"
    theta = s.repeat(rung.logits, 256)
    bound = isinstance(s.adapter, FromEstimator) and s.adapter.estimator.multi_sample
    samples, _, da = s.adapter.run(theta, rung, next(s.seeds), True)
    if da is None or bound:
        sentence = "The gradient at weights behind the cost cannot be seen, or none arrives." if not bound else ""
        return [Finding("leak", name, NOTED, sentence or "Its bound weighs them by the costs.")]
    if samples is not None:
        expected = rung.gradient_of_weights(samples) * theta.size / np.size(samples)
        error = float(np.abs(da - expected).max() / np.abs(expected).max())
        if error < 1e-5:
            sentence = "Weights behind the cost get the gradient at the sample, and nothing else."
            return [Finding("leak", name, HOLDS, sentence, error)]
    # where samples are weighted, or all outcomes enumerated, ∂/∂a E f(D) must be right on average
    outcomes = s.module.outcomes((1, *rung.shape))
    p = s.module.probability(s.adapter.logit_scale * rung.logits[None])
    q = s.module.outcome_probability(p, outcomes)[0]
    exact = q @ np.stack([rung.gradient_of_weights(z[None]) for z in outcomes])
    calls = (s.adapter.run(theta, rung, next(s.seeds), True)[2] for _ in range(2 * FIRST))
    means = Means([np.asarray(v, np.float64).ravel() / len(theta) for v in calls])
    norm = float(np.linalg.norm(exact))
    x = distance(means.mean - exact, means.covariance, means.n, s.alpha, norm, s.precision)
    yes = f"Weights behind the cost get the right gradient on average, to {per_cent(x.most)} of its norm."
    no = f"The gradient at weights behind the cost is off by {x.size:.3f} ± {x.error:.3f} of its norm."
    return [decide("leak", name, not x.significant, yes, no, x.size)]


# ---- the same problem in other words


class Renamed(Rung):
    """With other names of the classes: the last becomes the first. Of bits, 0 and 1 are exchanged."""

    def __init__(self, rung: Rung) -> None:
        self.__dict__ |= rung.__dict__
        self.bits = rung.family is bernoulli
        self.logits = -rung.logits if self.bits else np.roll(rung.logits, 1, axis=-1)

    def _values(self, d: Any, weights: Any = None) -> Any:
        order = np.roll(np.arange(self.shape[-1]), -1)
        return super()._values(1.0 - d if self.bits else d[..., order], weights)

    def back(self, g: np.ndarray) -> np.ndarray:
        return -g if self.bits else np.roll(g, -1, axis=-1)


class WithMasked(Rung):
    """With one class more, which costs nothing."""

    def __init__(self, rung: Rung) -> None:
        self.__dict__ |= rung.__dict__
        self.inner, self.shape = rung, (*rung.shape[:-1], rung.shape[-1] + 1)

    def _values(self, d: Any, weights: Any = None) -> Any:
        return self.inner._values(d[..., : self.inner.shape[-1]], weights)


def _amount(error: float) -> str:
    return "NaN or ∞" if not error < math.inf else per_cent(error)
