"""What `conformance.check_estimator` has found: an object, text, JSON, Markdown and one page of HTML."""

from __future__ import annotations

import html
import json
import math
import textwrap
from dataclasses import asdict, dataclass, field
from typing import Any

from ..measure import finite

HOLDS, FAILS, NOTED, UNDECIDED = "holds", "FAILS", "noted", "undecided"

CHAPTERS = {
    "forward": "Samples",
    "bias": "Bias, in units of the exact gradient's norm",
    "claim": "Claims",
    "identity": "Which one is it?",
    "variance": "Variance and cost",
    "invariance": "What must change nothing",
    "leak": "Leaks",
}


@dataclass(frozen=True)
class Finding:
    """One thing that was decided.   chapter: a key of `CHAPTERS`.  verdict: "holds", "FAILS", "noted" for what is
    neither right nor wrong, "undecided" where the budget did not suffice.  number: what the sentence is about."""

    chapter: str
    name: str
    verdict: str
    sentence: str
    number: float | None = None
    data: dict[str, Any] = field(default_factory=dict)


def decide(chapter: str, name: str, good: bool, yes: str, no: str, number: float | None = None) -> Finding:
    """A finding that holds, with the sentence `yes`, or fails, with `no`."""
    return Finding(chapter, name, HOLDS if good else FAILS, yes if good else no, number)


@dataclass(frozen=True, kw_only=True)
class Report:
    """The findings about one estimator.

    `failures` are the findings that fail, and `check()` raises if there are any. `str(report)` is text for a terminal;
    `to_json()`, `to_markdown()` and `to_html()` are strings, the last one a page that needs no other file.
    """

    title: str
    framework: str
    family: str
    claim: str | None
    level: float
    seconds: float
    findings: tuple[Finding, ...]
    compared: tuple[dict[str, Any], ...] = ()

    @property
    def failures(self) -> tuple[Finding, ...]:
        return tuple(f for f in self.findings if f.verdict == FAILS)

    def check(self) -> None:
        """AssertionError, with the sentences of all that fails, for use in a test."""
        if self.failures:
            lines = "\n".join(f"  {f.name}: {f.sentence}" for f in self.failures)
            raise AssertionError(
                f"{self.title} fails in {len(self.failures)} of {len(self.findings)} findings:\n{lines}"
            )

    def find(self, name: str) -> Finding:
        """The finding of that name; KeyError if there is none."""
        for finding in self.findings:
            if finding.name == name:
                return finding
        raise KeyError(name)

    @property
    def summary(self) -> str:
        n = len(self.failures)
        what = (
            "Nothing fails."
            if not n
            else f"{n} finding{'s' if n > 1 else ''} of {len(self.findings)} fail{'s' if n == 1 else ''}."
        )
        claim = "without a claim" if self.claim is None else f"claimed to be exact for {self.claim}"
        return f"{self.title} ({self.framework}, {self.family}, {claim}): {what}"

    def chapters(self) -> list[tuple[str, list[Finding]]]:
        found = [(title, [f for f in self.findings if f.chapter == key]) for key, title in CHAPTERS.items()]
        return [(title, rows) for title, rows in found if rows]

    def __str__(self) -> str:
        lines = [self.summary]
        for title, rows in self.chapters():
            lines += ["", title]
            width = max(len(f.name) for f in rows)
            for f in rows:
                head = f"  {f.verdict:9}  {f.name:{width}}  "
                lines += textwrap.wrap(f.sentence, 120, initial_indent=head, subsequent_indent=" " * len(head))
        lines += ["", f"One error rate of {1.0 - self.level:.2g} for all of it; {self.seconds:.0f} seconds."]
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        found = asdict(self) | {"summary": self.summary}
        found["findings"] = [
            f | {"number": finite(f["number"]), "data": {k: finite(v) for k, v in f["data"].items()}}
            for f in found["findings"]
        ]
        found["compared"] = [{k: finite(v) for k, v in c.items()} for c in found["compared"]]
        return found

    def to_json(self) -> str:
        return json.dumps(self.as_dict(), indent=1, ensure_ascii=False, allow_nan=False)

    def to_markdown(self) -> str:
        lines = [f"# {self.summary}"]
        for title, rows in self.chapters():
            lines += ["", f"## {title}", "", "| | | |", "| --- | --- | --- |"]
            lines += [f"| {f.verdict} | {_cell(f.name)} | {_cell(f.sentence)} |" for f in rows]
        lines += ["", f"One error rate of {1.0 - self.level:.2g} for all of it; {self.seconds:.0f} seconds."]
        return "\n".join(lines) + "\n"

    def to_html(self) -> str:
        text = html.escape
        parts = [f"<h1>{text(self.title)}</h1><p class=lead>{text(self.summary)}</p>"]
        for title, rows in self.chapters():
            parts.append(f"<h2>{text(title)}</h2>")
            if title == CHAPTERS["bias"]:
                parts.append(_ladder(rows))
            if title == CHAPTERS["variance"]:
                parts.append(_scatter(self.compared))
            cells = "".join(
                f"<tr class={f.verdict.lower()}><td>{f.verdict}<td>{text(f.name)}<td>{text(f.sentence)}" for f in rows
            )
            parts.append(f"<table>{cells}</table>")
        parts.append(f"<p>One error rate of {1.0 - self.level:.2g} for all of it; {self.seconds:.0f} seconds.</p>")
        head = f"<!doctype html><html lang=en><meta charset=utf-8><title>{text(self.title)}</title>{STYLE}"
        return f"{head}{''.join(parts)}</html>\n"


STYLE = """<meta name=viewport content="width=device-width"><style>
:root{color-scheme:light dark}
body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}
h1{font-size:1.5rem}h2{font-size:1.15rem;margin-top:2rem}table{border-collapse:collapse;width:100%}
td{padding:.25rem .6rem;border-top:1px solid #8884;vertical-align:top}td:first-child{width:6rem}
.fails td:first-child{color:#c22;font-weight:bold}.holds td:first-child{color:#282}
svg{width:100%;height:auto;font:12px system-ui,sans-serif}svg text{fill:currentColor}svg line{stroke:currentColor}
</style>"""


COLORS = {FAILS: "#c22", HOLDS: "#282"}
OURS, THEIRS = 'r="4" fill="#888"', 'r="6" fill="#c60"'


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _ladder(rows: list[Finding]) -> str:
    """Bias with its interval, row by row, as a picture; where none was seen, what cannot be excluded."""
    ends = [f.data["bias"] + 3.0 * f.data["error"] if _biased(f) else f.data["most"] for f in rows]
    ticks = _ticks(min(max([e for e in ends if math.isfinite(e)] + [0.02]), 3.0))
    x, marks, bottom = lambda value: 220.0 + 540.0 * min(value / ticks[-1], 1.02), [], 18 + 20 * len(rows)
    for n, f in enumerate(rows):
        y, bias, error = 18 + 20 * n, f.data["bias"], f.data["error"]
        low, high = (max(0.0, bias - 2.6 * error), bias + 2.6 * error) if _biased(f) else (0.0, f.data["most"])
        style = f'style="stroke:{COLORS.get(f.verdict, "#36c")};stroke-width:4;stroke-linecap:round"'
        marks.append(f'<text x="212" y="{y + 4}" text-anchor="end">{html.escape(f.name)}</text>')
        marks.append(f'<line x1="{x(low):.1f}" x2="{x(high):.1f}" y1="{y}" y2="{y}" {style}/>')
        if _biased(f):
            marks.append(f'<circle cx="{x(bias):.1f}" cy="{y}" r="4" fill="{COLORS.get(f.verdict, "#36c")}"/>')
    grid = [
        f'<line x1="{x(v):.1f}" x2="{x(v):.1f}" y1="8" y2="{bottom}" style="opacity:.2"/>'
        f'<text x="{x(v):.1f}" y="{bottom + 14}" text-anchor="middle">{v:g}</text>'
        for v in ticks
    ]
    label = "bias with its interval where one was found, else what cannot be excluded"
    return f'<svg viewBox="0 0 820 {bottom + 22}" role="img" aria-label="{label}">{"".join(grid + marks)}</svg>'


def _scatter(points: tuple[dict[str, Any], ...]) -> str:
    """Bias against deviation, this estimator among ours, as a picture."""
    points = tuple(p for p in points if math.isfinite(p["deviation"]) and math.isfinite(p["bias"]))
    if not points:
        return ""
    across, up = (_ticks(max([p[key] for p in points] + [0.1])) for key in ("deviation", "bias"))
    x, y = lambda v: 60.0 + 640.0 * v / across[-1], lambda v: 280.0 - 255.0 * v / up[-1]
    marks: list[str] = []
    placed: list[tuple[float, float]] = []
    for p in sorted(points, key=lambda p: (p["bias"], p["deviation"])):
        at = x(p["deviation"]) + 8.0, y(p["bias"]) - 5.0
        while any(abs(at[0] - u) < 90.0 and abs(at[1] - v) < 12.0 for u, v in placed):
            at = at[0], at[1] - 12.0  # above the label that is in its way
        placed.append(at)
        marks.append(f'<circle cx="{x(p["deviation"]):.1f}" cy="{y(p["bias"]):.1f}" {OURS if p["ours"] else THEIRS}/>')
        marks.append(f'<text x="{at[0]:.1f}" y="{at[1]:.1f}">{html.escape(p["name"])}</text>')
    axes = ['<line x1="60" x2="760" y1="280" y2="280"/><line x1="60" x2="60" y1="15" y2="280"/>']
    axes += [f'<text x="{x(v):.1f}" y="295" text-anchor="middle">{v:g}</text>' for v in across]
    axes += [f'<text x="54" y="{y(v) + 4:.1f}" text-anchor="end">{v:g}</text>' for v in up]
    axes.append('<text x="760" y="310" text-anchor="end">deviation</text><text x="66" y="20">bias</text>')
    return f'<svg viewBox="0 0 820 316" role="img" aria-label="bias against deviation">{"".join(axes + marks)}</svg>'


def _biased(finding: Finding) -> bool:
    return finding.sentence.startswith("biased")


def _ticks(most: float) -> list[float]:
    """Round numbers from 0 to the first one that is not below `most`, at most six."""
    power = 10.0 ** math.floor(math.log10(most / 5.0))
    step = next(m * power for m in (1.0, 2.0, 5.0, 10.0) if 5.0 * m * power >= most)
    return [round(step * n, 12) for n in range(math.ceil(most / step) + 1)]
