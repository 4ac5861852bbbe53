"""What an estimate costs: its deviation beside those of ours, evaluations of the cost, and time."""

from __future__ import annotations

import time

import numpy as np

from ..base import SettingError
from ..measure import EnumeratedCost
from .report import NOTED, Finding
from .subject import Subject

__all__ = ["variance"]


def variance(s: Subject) -> list[Finding]:
    rung = s.quadratic
    calls, rows = rung.calls, rung.rows
    start = time.perf_counter()
    g = np.concatenate([s.call(rung)[1] for _ in range(4)]).astype(np.float64)
    seconds = time.perf_counter() - start
    calls, rows = (rung.calls - calls) / 4, (rung.rows - rows) / len(g)
    unit = s.unit[rung.name]
    deviation = float(np.sqrt(g.reshape(len(g), -1).var(axis=0).sum())) / unit
    x = s.distances[rung.name]
    s.compared.append({"name": s.adapter.title, "bias": x.size, "deviation": deviation, "ours": False})
    problem = EnumeratedCost(rung.logits[None], rung, s.family)
    unbiased = not any(d.significant for d in s.distances.values())
    names = ("rloo:samples=2", "rloo:samples=4", "local-expectation", "muprop", "rebar", "disarm") if unbiased else ()
    names += ("reinforce", "st", "st-gs", "gst-1.0", "reinmax", "zgr", "darn", "exact")
    nearest = []
    for name in names:
        try:
            found = problem.measure(name, samples=2000)
        except SettingError:
            continue
        s.compared.append({"name": name, "bias": found.bias, "deviation": found.deviation, "ours": True})
        nearest.append(f"{name} {found.deviation:.2f}")
    sentence = f"The deviation of one estimate is {deviation:.2f} of the gradient's norm; ours: {', '.join(nearest)}."
    return [
        Finding("variance", "deviation", NOTED, sentence, deviation),
        Finding(
            "variance",
            "evaluations",
            NOTED,
            f"It evaluates the cost {rows:g} times for an example, in {calls:g} calls.",
            rows,
        ),
        Finding(
            "variance",
            "time",
            NOTED,
            f"{1e6 * seconds / len(g):.2f} µs for an example, {s.n} at a time.",
            seconds / len(g),
        ),
    ]
