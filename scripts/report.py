"""What came out of sweeps: means over the seeds beside the published numbers, paired comparisons, and pictures.

    python scripts/report.py runs/mnist_10_epochs                # writes report.md, report.csv, pairs.csv and pictures
    python scripts/report.py runs --out report                   # all sweeps in and below a folder

A paired comparison of two estimators takes the difference of the two runs of each seed, which share the initial weights
and the order of the examples, and gives the mean difference with Student's interval at 95 %. It needs two seeds; each
interval stands for itself, so that among many pairs some exclude 0 by chance.
"""

from __future__ import annotations

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))
from experiments.start import before_numpy

before_numpy()

import csv
import io
import itertools
import json
import math
import re
import statistics
from dataclasses import dataclass
from pathlib import Path

from scipy.special import stdtrit

from experiments.errors import UserError, command, disk_errors, require
from experiments.flags import flag, parse_flags
from experiments.pictures import comparison_bars, comparison_curves, that_fit
from experiments.results import MANIFEST, read_result
from experiments.run_folder import METRICS, read_file
from experiments.specification import check_published, check_report, describe, is_number, without_path_flags
from minigrad import checkpoint

CONFIDENCE = 0.95
MOST_COMPARED = 200  # rows of a table, each with each other
RUNS = (("runs", {"help": "a folder with sweeps in or below it"}),)


@dataclass(frozen=True)
class Flags:
    out: str = flag("", "where the report goes; else into the folder of the runs")


# ---- statistics


def mean_sd(values) -> tuple[float, float | None]:
    """The mean and the standard deviation of the sample (None for a single value)."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def interval(differences) -> tuple[float, float, float] | None:
    """(mean, low, high) of Student's interval for the mean of the differences; None for fewer than two."""
    n = len(differences)
    if n < 2:
        return None
    mean, sd = mean_sd(differences)
    half = stdtrit(n - 1, 0.5 + 0.5 * CONFIDENCE) * sd / math.sqrt(n)
    return mean, mean - half, mean + half


# ---- what was found


@dataclass
class Row:
    """The runs that differ in the seed alone.   results, curves: {seed: …} of the finished ones"""

    name: str
    expected: int
    published: dict
    results: dict
    curves: dict

    def values(self, metric: str) -> dict:
        """{seed: the final value} of those that have it."""
        return {seed: metrics[metric] for seed, metrics in self.results.items() if metric in metrics}


@dataclass
class Panel:
    """What is compared with each other: the rows of one table."""

    sweep: str
    title: str
    about: str
    report: dict
    rows: list[Row]

    def scale(self, metric: str) -> float:
        return of_metric(self.report["scale"], metric, 1)

    def unit(self, metric: str) -> str:
        """In brackets, behind the name of the metric."""
        unit = of_metric(self.report["unit"], metric, "")
        return f" ({unit})" if unit else ""


def of_metric(setting, metric: str, default):
    """A setting of [report] that is one value for all metrics or a table of values."""
    return setting.get(metric, default) if isinstance(setting, dict) else setting


def read_sweeps(folder: Path, notes: list[str]) -> list[Panel]:
    """The panels of all sweeps in and below a folder. What is missing or damaged is left out, and said in the notes."""
    panels = []
    for path in sorted(folder.rglob(f"*{MANIFEST}")):
        try:
            about = json.loads(path.read_bytes())
            found = read_sweep(path.parent, about, notes)
            list(picture_data(found))  # what is damaged shows where it is used
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError, UserError) as error:
            why = str(error).rstrip(".")[:200]
            notes.append(f"{path} is damaged and left out ({type(error).__name__}: {why}): start its sweep again.")
            continue
        panels += found
    return panels


def read_sweep(folder: Path, about: dict, notes: list[str]) -> list[Panel]:
    """The panels of one manifest, whatever JSON it is: UserError or one of the errors that `read_sweeps` knows."""
    panels: dict[str, Panel] = {}
    found: dict[tuple[str, str], Row] = {}
    runs, settings, unfinished = about["runs"], check_report(about["report"]), 0
    texts = [about["name"], about["title"], *(run[key] for run in runs for key in ("panel", "row", "key"))]
    require(all(isinstance(text, str) for text in texts), "a name is no text")
    require(all(re.fullmatch("[0-9a-f]{12}", run["key"]) for run in runs), "a key is not that of a run")
    for run in runs:
        check_published(run["published"], settings["metrics"])
    same = {k: v for k, v in runs[0]["config"].items() if all(r["config"].get(k) == v for r in runs)}
    same = {k: v for k, v in without_path_flags(same).items() if v not in (None, "")}
    for run in runs:
        name = run["panel"]
        title = f"{about['title']}: {name}" if name else about["title"]
        panel = panels.setdefault(name, Panel(about["name"], title, describe(same), settings, []))
        if (name, run["row"]) not in found:
            found[name, run["row"]] = Row(run["row"], 0, run["published"], {}, {})
            panel.rows.append(found[name, run["row"]])
        row = found[name, run["row"]]
        row.expected += 1
        try:
            result = read_result(folder / run["key"])
            if result and without_path_flags(result["config"]) != without_path_flags(run["config"]):
                raise UserError(f"{folder / run['key']} is of another configuration.")
            if result:
                seed = run["config"].get("seed", 0)
                row.curves[seed] = read_metrics(folder / run["key"] / METRICS)
                row.results[seed] = numbers(result["metrics"])
        except UserError as error:
            notes.append(f"{str(error).rstrip('.')}: left out; move {folder / run['key']} and start the sweep again.")
            result = None
        unfinished += not result
    if unfinished:
        notes.append(f"{about['name']}: {unfinished} of {len(runs)} runs are not finished.")
    return list(panels.values())


def read_metrics(path: Path) -> list[dict]:
    try:
        return [numbers(json.loads(line)) for line in read_file(path).splitlines()]
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is missing or damaged ({error}).") from error


def numbers(metrics: dict) -> dict:
    return {k: v for k, v in metrics.items() if is_number(v)}


def curve(row: Row, metric: str):
    """(epochs, mean, standard deviation) of a metric over the seeds, at the epochs that all of them have."""
    of = [{m["epoch"]: m[metric] for m in lines if metric in m and "epoch" in m} for lines in row.curves.values()]
    epochs = sorted(set.intersection(*map(set, of))) if of else []
    spread = [mean_sd([values[epoch] for values in of]) for epoch in epochs]
    return epochs, [mean for mean, _ in spread], [sd or 0.0 for _, sd in spread]


# ---- tables


@dataclass(frozen=True)
class Entry:
    """One number of a table, and what it is compared with."""

    sweep: str
    panel: str
    row: str
    metric: str
    seeds: int
    expected: int
    mean: float
    sd: float | None
    published: float | None
    published_sd: float | None

    @property
    def difference(self) -> float | None:
        return None if self.published is None else self.mean - self.published


@dataclass(frozen=True)
class Pair:
    """The differences first − second over the seeds that both have."""

    sweep: str
    panel: str
    metric: str
    first: str
    second: str
    seeds: int
    difference: float
    low: float
    high: float


def entries(panel: Panel) -> list[Entry]:
    found = []
    for row, metric in itertools.product(panel.rows, panel.report["metrics"]):
        scale = panel.scale(metric)
        values = [scale * v for v in row.values(metric).values()]
        if values:
            published = [None if v is None else scale * v for v in row.published.get(metric, (None, None))]
            names = (panel.sweep, panel.title, row.name, metric)
            found.append(Entry(*names, len(values), row.expected, *mean_sd(values), *published))
    return found


def pairs(panel: Panel) -> list[Pair]:
    metric = panel.report["metrics"][0]
    found, scale = [], panel.scale(metric)
    for a, b in itertools.combinations(panel.rows[:MOST_COMPARED], 2):
        first, second = a.values(metric), b.values(metric)
        differences = [scale * (first[seed] - second[seed]) for seed in first if seed in second]
        known = interval(differences)
        if known:
            found.append(Pair(panel.sweep, panel.title, metric, a.name, b.name, len(differences), *known))
    return found


def decimals(x: float) -> int:
    """How many a number of this size gets: two, or those of its first three digits, so that none is lost."""
    return 2 - math.floor(math.log10(abs(x))) if 0.0 < abs(x) < 1.0 else 2


def fixed(x: float, digits: int, sign: str = "") -> str:
    return f"{x:{sign}.{digits}f}" if digits <= 6 else f"{x:{sign}.2e}"


def spread(mean, sd, digits: int) -> str:
    return "" if mean is None else fixed(mean, digits) + ("" if sd is None else f" ± {fixed(sd, digits)}")


def signed(x: float, digits: int) -> str:
    return fixed(round(x, digits) + 0.0, digits, "+")  # never −0.00


def markdown_table(header, rows) -> str:
    """Cells are Markdown already: names come from `markdown_text`."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def markdown_text(name: str) -> str:
    """A name, in a line of Markdown or a cell of a table, as it is: nothing in it is markup or mathematics."""
    text = "".join(c if c.isprintable() else " " for c in name)
    return re.sub(r"[\\`*\[\]<>|~$&#]|(?<!\w)_|_(?!\w)", r"\\\g<0>", text)


def panel_markdown(panel: Panel) -> str:
    """A heading, what the runs share, the table, and the comparisons."""
    found, report = entries(panel), panel.report
    lines = [f"## {markdown_text(panel.title)}", "", f"{markdown_text(panel.sweep)}: {markdown_text(panel.about)}.", ""]
    if not found:
        return "\n".join([*lines, "No run is finished."])
    header, known = ["", "seeds"], {(e.row, e.metric): e for e in found}
    beside = {metric: any(e.published is not None for e in found if e.metric == metric) for metric in report["metrics"]}
    for metric, published in beside.items():
        header += [markdown_text(metric + panel.unit(metric)), *(["published", "difference"] if published else [])]
    rows = []
    for row in panel.rows:
        done = len(row.results)
        cells = [markdown_text(row.name), str(done) if done == row.expected else f"{done} of {row.expected}"]
        for metric, published in beside.items():
            e = known.get((row.name, metric))
            digits = decimals(e.mean) if e else 0
            cells.append(spread(e.mean, e.sd, digits) if e else "")
            if published:
                cells.append(spread(e.published, e.published_sd, digits) if e else "")
                cells.append(signed(e.difference, digits) if e and e.published is not None else "")
        rows.append(cells)
    lines.append(markdown_table(header, rows))
    if any(beside.values()) and report["source"]:
        lines += ["", f"Published: {markdown_text(report['source'])}."]
    compared = pairs(panel)
    if compared:
        metric = compared[0].metric
        sign, rows = 1 if report["better"] == "higher" else -1, []
        digits = decimals(max(abs(e.mean) for e in found if e.metric == metric))
        for p in compared:
            mean, low, high = (signed(x, digits) for x in (p.difference, p.low, p.high))
            first, second, better = map(markdown_text, (p.first, p.second, verdict(p, sign)))
            rows.append([first, second, p.seeds, mean, f"{low} to {high}", better])
        of = markdown_text(metric + panel.unit(metric))
        what = f"Differences of {of}, seed by seed; {report['better']} is better."
        lines += ["", what, ""]
        lines.append(markdown_table(["", "minus", "seeds", "mean", "95 % interval", "better"], rows))
    return "\n".join(lines)


def verdict(pair: Pair, sign: int) -> str:
    if pair.low <= 0.0 <= pair.high:
        return "undecided"
    return pair.first if sign * pair.difference > 0 else pair.second


HEAD = """# Report

Mean ± standard deviation over the seeds of finished runs, at the end of training. An interval is Student's at 95 % for
the mean difference between runs of the same seed; each stands for itself: among many, some exclude 0 by chance."""


def markdown(panels: list[Panel], notes: list[str]) -> str:
    notes = ["\n".join(f"- {markdown_text(note)}" for note in notes)] if notes else []
    pictures = "![Learning curves](curves.png)\n\n![The final numbers](bars.png)"
    return "\n\n".join([HEAD, *notes, *map(panel_markdown, panels), pictures]) + "\n"


def as_csv(kind, found, *more: str) -> bytes:
    """Dataclass instances as CSV, a column for each field and each further attribute."""
    columns = [*kind.__dataclass_fields__, *more]
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([getattr(entry, column) for column in columns] for entry in found)
    return text.getvalue().encode(errors="replace")


def picture_data(panels: list[Panel]):
    """What the pictures show: [(title, axis, [(row, curve, (mean, sd, published))])] of panels with finished runs."""
    for panel in panels:
        metric, curve_metric = panel.report["metrics"][0], panel.report["curve"]
        found, scale = {(e.row, e.metric): e for e in entries(panel)}, panel.scale(curve_metric)
        rows = []
        for row in panel.rows:
            entry = found.get((row.name, metric))
            if entry:
                epochs, mean, sd = curve(row, curve_metric)
                scaled = (epochs, [scale * v for v in mean], [scale * v for v in sd])
                rows.append((row.name, scaled, (entry.mean, entry.sd or 0.0, entry.published)))
        if rows:
            yield panel.title, curve_metric + panel.unit(curve_metric), metric + panel.unit(metric), rows


@command
def main(argv=None) -> int:
    given, where = parse_flags(Flags, __doc__, argv, RUNS)
    folder = Path(where["runs"])
    out, notes = Path(given.get("out") or folder), []
    with disk_errors():
        require(folder.is_dir(), f"there is no folder {folder}.")
        panels = read_sweeps(folder, notes)
    nothing = f"{folder} has no sweep in or below it, no file *{MANIFEST}: start one with scripts/sweep.py."
    require(panels, " ".join(notes) or nothing)
    shown = list(picture_data(panels))
    fit = that_fit(shown)
    if sum(len(rows) for *_, rows in fit) < sum(len(rows) for *_, rows in shown):
        notes.append("the pictures show the first rows of the first tables: there is no room for all of them.")
    if any(len(panel.rows) > MOST_COMPARED for panel in panels):
        notes.append(f"only the first {MOST_COMPARED} rows of a table are compared with each other.")
    for note in notes:
        print(note, file=sys.stderr)
    with disk_errors():
        out.mkdir(parents=True, exist_ok=True)
        write = lambda name, data: checkpoint.write_atomically(out / name, data)
        write("report.csv", as_csv(Entry, [e for p in panels for e in entries(p)], "difference"))
        write("pairs.csv", as_csv(Pair, [p for panel in panels for p in pairs(panel)]))
        write("report.md", markdown(panels, notes).encode())
        if shown:
            comparison_curves(out / "curves.png", [(title, axis, rows) for title, axis, _, rows in fit])
            comparison_bars(out / "bars.png", [(title, axis, rows) for title, _, axis, rows in fit])
    print(f"{sum(len(r.results) for p in panels for r in p.rows)} finished runs: {out / 'report.md'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
