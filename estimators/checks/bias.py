"""The ladder: the mean of the gradient against the exact one, and what is claimed of it."""

from __future__ import annotations

import math
import time

import numpy as np

from .adapters import from_estimator
from .ladder import EXACT_ON, Rung
from .means import Distance, Means, distance, per_cent
from .report import FAILS, HOLDS, NOTED, UNDECIDED, Finding
from .subject import FIRST, Subject

__all__ = ["bias", "claims", "hardest"]

RESOLUTION = 0.01  # in units of the gradient's norm: a bias below it need not be found
HARDEST = ("quadratic", "cubic", "exponential")  # the rungs on which means are compared
WORDS = {
    "none": "no cost but a constant",
    "linear": "costs that are linear in each variable",
    "separable": "sums of quadratic functions of one variable",
    "quadratic": "costs that are quadratic in each variable",
    "all": "all costs",
}


def bias(s: Subject, budget: float) -> list[Finding]:
    """Calls double for the rungs that are not decided, for so many seconds, but at least 32 calls each."""
    end, calls, looks, undecided = time.perf_counter() + budget, FIRST, 0, list(s.rungs)
    while undecided:
        looks += 1
        for rung in undecided:
            means = s.means[rung.name]
            while means.n < calls and (means.n < FIRST or time.perf_counter() < end):
                s.add(rung, 1, means)
            s.distances[rung.name] = from_exact(s, rung, s.alpha / (looks * (looks + 1)))  # all looks: at most alpha
            s.progress(0.1 + 0.6 * min(1.0, 1.0 - (end - time.perf_counter()) / max(budget, 1e-9)), rung.name)
        if time.perf_counter() > end:
            break
        undecided, calls = [r for r in undecided if not decided(s.distances[r.name])], 2 * calls
    return [found_bias(s, rung) for rung in s.rungs]


def from_exact(s: Subject, rung: Rung, alpha: float) -> Distance:
    means = s.means[rung.name]
    e = means.mean - s.adapter.exact(rung).ravel()
    return distance(e, means.covariance, means.n, alpha, s.unit[rung.name], s.precision)


def decided(x: Distance) -> bool:
    return x.error <= max(RESOLUTION, 0.05 * x.size) if x.significant else x.most < RESOLUTION


def found_bias(s: Subject, rung: Rung) -> Finding:
    x, exact = s.distances[rung.name], is_claimed(s, rung)
    if not math.isfinite(x.size):
        verdict, sentence = NOTED if s.special else FAILS, "the mean is not finite"
    elif x.significant:
        verdict, sentence = FAILS if exact else NOTED, f"biased: {x.size:.3f} ± {x.error:.3f} of the gradient's norm"
    else:
        verdict = HOLDS if exact else NOTED if x.most < 5 * RESOLUTION else UNDECIDED
        sentence = (
            "no bias above rounding"
            if x.most < s.precision
            else f"no bias above {per_cent(x.most)} at {100.0 * s.level:g} %"
        )
    data = {"bias": x.size, "error": x.error, "most": x.most, "draws": s.means[rung.name].n * s.n, "claimed": exact}
    return Finding("bias", rung.name, verdict, sentence, x.size, data)


def is_claimed(s: Subject, rung: Rung) -> bool:
    return rung.kind == "constant" or (s.claim is not None and covers(s.claim, rung))


def covers(claim: str, rung: Rung) -> bool:
    """(A quadratic function of one variable alone is separable.)"""
    return rung.kind in EXACT_ON[claim] or (claim == "separable" and rung.kind == "quadratic" and rung.variables == 1)


# ---- claims, in both directions


def claims(s: Subject, same_as: str | None) -> list[Finding]:
    found = [] if s.claim is None else [exact_where_claimed(s, s.claim)]
    if s.claim not in (None, "all"):
        found.append(no_more_than_claimed(s, s.claim))
    factor = common_factor(s)
    if factor is not None:
        sentence = (
            f"On every rung the mean is {factor:.3f} times the exact gradient: a factor is missing, or one too many."
        )
        verdict = NOTED if s.claim == "none" else FAILS
        found.append(Finding("claim", "a common factor", verdict, sentence, factor))
    return found if same_as is None else [*found, mean_of_other(s, same_as)]


def exact_where_claimed(s: Subject, claim: str) -> Finding:
    rows = [r for r in s.rungs if is_claimed(s, r)]
    wrong = [r.name for r in rows if s.distances[r.name].significant]
    which = "on all rungs" if len(wrong) > 1 and len(wrong) >= len(rows) - 1 else f"on {'; '.join(wrong)}"
    end = f"but is biased {which}." if wrong else "and no bias was seen there."
    sentence = f"It claims to be exact for {WORDS[claim]}, {end}"
    return Finding("claim", "what it claims", FAILS if wrong else HOLDS, sentence, float(len(wrong)))


def no_more_than_claimed(s: Subject, claim: str) -> Finding:
    """Is there a larger claim on none of whose rungs a bias was seen?"""
    name, known = "what it does not claim", s.distances
    for larger in reversed([c for c, kinds in EXACT_ON.items() if kinds > EXACT_ON[claim]]):
        rows = [known[r.name] for r in s.rungs if covers(larger, r)]
        if all(not x.significant and x.most < 2 * RESOLUTION for x in rows):
            most = per_cent(max(x.most for x in rows))
            why = f"No bias above {most} for {WORDS[larger]} either: the claim is too modest, or the bias is smaller."
            return Finding("claim", name, FAILS, why)
    return Finding("claim", name, HOLDS, "Nothing beyond its claim shows to be exact.")


def common_factor(s: Subject) -> float | None:
    """c, if on every rung the mean is c times the exact gradient and not once; None if not."""
    rows = [r for r in s.rungs if r.kind != "constant"]
    if not all(s.distances[r.name].significant and math.isfinite(s.distances[r.name].size) for r in rows):
        return None
    pairs = [(s.adapter.exact(r).ravel(), s.means[r.name]) for r in rows]
    c = float(np.median([g @ m.mean / (g @ g) for g, m in pairs]))
    for rung, (g, m) in zip(rows, pairs, strict=True):
        norm = abs(c) * s.unit[rung.name]
        x = distance(m.mean - c * g, m.covariance, m.n, s.alpha, norm, s.precision)
        if not x.size < 0.1 or (x.significant and x.size > 0.02):
            return None
    return c if abs(c - 1.0) > 0.02 else None


def mean_of_other(s: Subject, name: str) -> Finding:
    """Has it the mean that one of ours has?"""
    other = from_estimator(name, s.family)
    found = []
    for rung in hardest(s):
        means, theta = Means(), s.repeat(rung.logits, s.n)
        for _ in range(min(256, s.means[rung.name].n)):
            means.vectors.append(other(theta, rung, next(s.seeds))[1].mean(axis=0).ravel())
        x = s.apart(s.means[rung.name], means, rung)
        found.append((x.significant, x.most, x, rung.name))
    _, _, x, rung_name = max(found, key=lambda f: f[:2])
    if x.significant:
        sentence = f"Its mean is not that of `{name}`: {x.size:.3f} ± {x.error:.3f} of the norm apart on {rung_name}."
    else:
        sentence = f"Its mean is that of `{name}`, as far as was seen: at most {per_cent(x.most)} of the norm apart."
    return Finding("claim", f"the mean of {name}", FAILS if x.significant else HOLDS, sentence, x.size)


def hardest(s: Subject) -> list[Rung]:
    return [r for r in s.rungs if r.variables > 1 and r.kind in HARDEST]
