"""What an estimate costs: its deviation beside those of ours, evaluations of the cost, and time."""

from __future__ import annotations

import time

import numpy as np

from ..base import SettingError
from ..measure import EnumeratedCost
from .report import NOTED, Finding
from .subject import Subject

__all__ = ["variance"]

CALLS = 4
UNBIASED = ("rloo:samples=2", "rloo:samples=4", "local-expectation", "muprop", "disarm", "arsm", "rebar")
BIASED = ("st", "st-gs", "gst-1.0", "reinmax", "darn")


def variance(s: Subject) -> list[Finding]:
    """On the quadratic rung, beside ours of the same kind: without a bias, or with one."""
    rung, calls, evaluations = s.quadratic, s.quadratic.calls, s.quadratic.evaluations
    start = time.perf_counter()
    g = np.concatenate([s.call(rung)[1] for _ in range(CALLS)]).astype(np.float64)
    seconds = (time.perf_counter() - start) / len(g)
    each, in_calls = (rung.evaluations - evaluations) / len(g), (rung.calls - calls) / CALLS
    deviation = float(np.sqrt(g.reshape(len(g), -1).var(axis=0).sum())) / s.unit[rung.name]
    bias = s.distances[rung.name].size
    s.compared.append({"name": s.adapter.title, "bias": bias, "deviation": deviation, "ours": False})
    unbiased = not any(x.significant for x in s.distances.values())
    problem, ours = EnumeratedCost(rung.logits[None], rung, s.family), []
    for name in (*(UNBIASED if unbiased else BIASED), "reinforce", "exact"):
        try:
            found = problem.measure(name, samples=2000)
        except SettingError:  # not for these variables
            continue
        s.compared.append({"name": name, "bias": found.bias, "deviation": found.deviation, "ours": True})
        ours.append(f"{name} {found.deviation:.2f}")
    sentence = f"One estimate has a deviation of {deviation:.2f} of the gradient's norm; ours: {', '.join(ours)}."
    asks = f"It evaluates the cost {each:g} times for an example, in {in_calls:g} calls."
    takes = f"It takes {1e6 * seconds:.2f} µs for an example, {s.n} at a time, the cost included."
    return [
        Finding("variance", "deviation", NOTED, sentence, deviation),
        Finding("variance", "evaluations", NOTED, asks, each),
        Finding("variance", "time", NOTED, takes, seconds),
    ]
