"""Sweeps as TOML files: which runs there are, what they are called, and the published numbers they stand beside.

    script = "train_vae"                  # a training command, scripts/train_vae.py
    title = "MNIST, four estimators"

    [fixed]                               # flags of every run
    epochs = 10
    [grid]                                # flags with lists of values, of which the product is taken
    seed = [0, 1]
    "variables,categories" = [[4, 8], [30, 10]]    # flags that change together
    [[cases]]                             # flags that go together; each case meets each point of the grid
    name = "ReinMax"                      # what the report calls it (default: its estimator)
    estimator = "reinmax"
    tau = 1.3
    published = { train = [125.08, 0.64], test = 124.2 }    # mean and standard deviation, or the mean alone
    [report]
    metrics = ["train", "test"]           # of the last metrics of a run; the estimators are compared by the first
    better = "lower"                      # or "higher"
    curve = "train"                       # the metric of the learning curves (default: the first)
    panels = ["variables", "categories"]  # flags whose values get a table each: only what is in one table is compared
    scale = 1                             # what to multiply the metrics by, 100 for per cent
    unit = "nats"                         # or { test = "nats", accuracy = "%" }, a table; scale, too
    source = "who published the numbers, and how they were measured"
    [small.fixed]                         # with --small, these and [small.grid] replace what is said above about their
    epochs = 2                            # flags; published numbers are then left out, since they are of other runs

`sweep.py --set KEY=VALUE` replaces what is said about a flag, too; then the published numbers stay, and the title says
what was changed. A specification has at most 100,000 runs, all of whose flags are checked before the first one
begins; what only the data decide, a run says itself.

A run's folder is named by a hash of the script and its complete configuration, defaults included. `data_dir` is not
part of it: it says where files are and not what is computed, so that results can move to another machine.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib
import itertools
import json
import math
import re
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from .errors import UserError, require
from .flags import as_text, check_seed, in_short, read_values
from .loop import Experiment

SCRIPTS = Path(__file__).resolve().parents[1]
PATH_FLAGS = ("data_dir",)  # flags that do not change what is computed
MOST_RUNS = 100_000
LARGEST_NUMBER = 1e100  # in a report: squares do not overflow

TOP = ("script", "title", "fixed", "grid", "cases", "small", "report")
SMALL = ("fixed", "grid")
REPORT = {
    "metrics": ["test"],
    "better": "lower",
    "curve": "",
    "panels": [],
    "scale": 1,
    "unit": "",
    "source": "",
}
CASE = ("name", "published")  # the keys of a case that are not flags


@dataclass(frozen=True)
class Run:
    """One run of a sweep.

    config: the complete configuration, an instance of the command's dataclass.
    panel, row: where the report puts it; runs that differ in the seed alone share both.
    published: {metric: [mean, standard deviation or None]}
    """

    script: str
    config: Any
    panel: str
    row: str
    published: dict

    @functools.cached_property
    def values(self) -> dict[str, Any]:
        """The configuration as JSON has it."""
        return as_json(self.config)

    @functools.cached_property
    def key(self) -> str:
        return run_key(self.script, self.values)

    @property
    def name(self) -> str:
        return ", ".join(filter(None, (self.panel, self.row, f"seed {self.config.seed}")))


def as_json(config: Any) -> dict[str, Any]:
    """A configuration as it is read from JSON again."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in vars(config).items()}


def without_path_flags(config: dict) -> dict:
    return {k: v for k, v in config.items() if k not in PATH_FLAGS}


def run_key(script: str, config: dict) -> str:
    """Twelve hexadecimal digits for the script and its configuration; the order of the flags does not matter."""
    return digest(json.dumps([script, without_path_flags(config)], sort_keys=True, ensure_ascii=False))


def digest(text: str) -> str:
    """Twelve hexadecimal digits that tell the text from others."""
    return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()


@dataclass(frozen=True)
class Specification:
    """What a file says, checked for its form: the flags are checked when `runs` looks at the script."""

    name: str
    script: str
    title: str
    fixed: dict
    grid: dict
    cases: list
    report: dict

    @classmethod
    def read(cls, path: Any, small: bool = False, changes: Iterable[str] = ()) -> Self:
        """The specification in a file.   changes: texts KEY=VALUE, a list is a grid
        UserError, one sentence with the file's name, if there is none."""
        path = Path(path)
        try:
            with open(path, "rb") as file:
                found = tomllib.load(file)
            return cls.of(path.stem + ("-small" if small else ""), found, small, changes)
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}.") from error
        except RecursionError as error:
            raise UserError(f"{path} is nested too deep: a specification has tables and lists of values.") from error
        except ValueError as error:  # TOMLDecodeError, UnicodeDecodeError, and a number of thousands of digits
            raise UserError(f"{path} is not TOML: {error}.") from error
        except UserError as error:
            raise UserError(f"{path}: {error}") from error

    @classmethod
    def of(cls, name: str, found: dict, small: bool, changes: Iterable[str] = ()) -> Self:
        tables = {"fixed": dict, "grid": dict, "cases": list, "small": dict, "report": dict}
        known(found, TOP, "the specification")
        for key, kind in tables.items():
            require(isinstance(found.get(key, kind()), kind), f"{key} must be a table.")
        require(isinstance(found.get("title", ""), str), f"title must be a text, got {in_short(found.get('title'))}.")
        script = found.get("script")
        require(isinstance(script, str), 'there is no script, as in script = "train_vae".')
        fixed, grid, cases = found.get("fixed", {}), found.get("grid", {}), found.get("cases", [])
        require(all(isinstance(case, dict) for case in cases), "[[cases]] must be tables.")
        replaced = found.get("small", {})
        known(replaced, SMALL, "[small]")
        require(
            all(isinstance(table, dict) for table in replaced.values()), "[small.fixed] and [small.grid] are tables."
        )
        if small:
            require(replaced, "there is no [small.fixed] or [small.grid], so there is no small version.")
            fixed, grid, cases = replace(fixed, grid, cases, **replaced)
            cases = [{k: v for k, v in case.items() if k != "published"} for case in cases]
        fixed, grid, cases = replace(fixed, grid, cases, **parse_changes(changes))
        for key, values in grid.items():
            require(isinstance(values, list), f"[grid] {key} must be a list of values, got {in_short(values)}.")
            require(values, f"[grid] {key} is empty: give it at least one value.")
            require(len({as_text(v) for v in values}) == len(values), f"[grid] {key} has a value twice.")
            n = key.count(",") + 1
            fits = n == 1 or all(isinstance(v, list) and len(v) == n for v in values)
            require(fits, f"[grid] {key!r} needs lists of {n} values.")
        require(grid or cases, "the grid is empty: there is neither a [grid] nor a [[cases]] to run.")
        for case in cases or [{}]:
            flags = [*fixed, *(flag for key in grid for flag in key.split(",")), *case]
            twice = sorted({key for key in flags if flags.count(key) > 1})
            require(not twice, f"{', '.join(twice)} is said twice: in two of [fixed], [grid] and [[cases]].")
        count = math.prod(map(len, grid.values())) * max(1, len(cases))
        require(count <= MOST_RUNS, f"the grid and the cases make more than {MOST_RUNS:,} runs: take fewer values.")
        report = check_report(found.get("report", {}))
        for case in cases:
            called = case.get("name", "")
            require(isinstance(called, str), f"the name of a case must be a text, got {in_short(called)}.")
            check_published(case.get("published", {}), report["metrics"])
        title = ("Small version of: " if small else "") + found.get("title", name)
        if changes:
            title += f", with {', '.join(changes)}"
            changed = re.sub(r"[^\w.=]+", "-", ",".join(changes).replace(" ", "")).strip("-")
            name += f"-{changed}" if len(changed) <= 100 else f"-{changed[:80]}-{digest(changed)}"  # a file's name
        return cls(name, script, title, fixed, grid, cases, report)

    def runs(self, data_dir: str = "", **override: Any) -> list[Run]:
        """All runs, in the order of the file.   data_dir: for the runs that read one;  override: flags of all runs
        UserError for an unknown script, flag or estimator, a value out of range, or a run that is there twice."""
        experiment = load_experiment(self.script)
        panels, found, groups, names, checked = self.report["panels"], {}, {}, {}, {}
        known(panels, [f.name for f in dataclasses.fields(experiment.config_class)], "[report] panels")
        points = [(key.split(","), values) for key, values in self.grid.items()]
        shown = [k for keys, values in points for k in keys if len(values) > 1 and k != "seed" and k not in panels]
        for case in self.cases or [{}]:
            published = {k: v if isinstance(v, list) else [v, None] for k, v in case.get("published", {}).items()}
            for point in itertools.product(*(values for _, values in points)):
                flags = self.fixed | {k: v for k, v in case.items() if k not in CASE}
                for (keys, _), value in zip(points, point, strict=True):
                    flags = flags | dict(zip(keys, value if len(keys) > 1 else [value], strict=True))
                config = configuration(experiment, flags | override, checked, data_dir)
                values = as_json(config)
                panel = describe({k: values[k] for k in panels})
                row = ", ".join(filter(None, (case_name(case), describe({k: values[k] for k in shown}))))
                run = Run(self.script, config, panel, row or self.script, published)
                group = {k: v for k, v in values.items() if k != "seed"}
                require(
                    groups.setdefault((panel, row), group) == group,
                    f"two cases are called {run.row!r}: give each its name.",
                )
                other = found.setdefault(run.key, run)
                if other is not run:
                    same = " and ".join(dict.fromkeys((other.name, run.name)))
                    raise UserError(f"two runs are one, {same}: nothing that is computed differs, leave one out.")
                same_name = names.setdefault(run.name, run) is run
                require(same_name, f"two runs are called {run.name!r}: give the cases other names.")
        require(
            not data_dir or any(run.config.data_dir for run in found.values()),
            "no run of the specification reads --data-dir: leave it out.",
        )
        return list(found.values())


def replace(of_fixed: dict, of_grid: dict, of_cases: list, fixed=(), grid=()) -> tuple[dict, dict, list]:
    """What is said about the flags in `fixed` and `grid` is gone, and these tables are there in its place."""
    gone = {flag for table in (fixed, grid) for key in table for flag in key.split(",")}
    keep = lambda table: {k: v for k, v in table.items() if not gone & set(k.split(","))}
    return keep(of_fixed) | dict(fixed), keep(of_grid) | dict(grid), [keep(case) for case in of_cases]


def parse_changes(changes) -> dict[str, dict]:
    """Texts KEY=VALUE, the value as in TOML -> {"fixed": …, "grid": …}; a list is a grid. UserError for other texts."""
    found = {"fixed": {}, "grid": {}}
    for text in changes:
        key, _, written = map(str.strip, text.partition("="))
        try:
            (value,) = tomllib.loads(f"value = {written}").values()
        except (ValueError, RecursionError):  # no TOML, more than one value, or too large a one
            key = ""
        form = "--set needs KEY=VALUE, the value as in a specification, as in lr=[1e-3,3e-4]"
        require(key, f"{form}; got {text if len(text) < 80 else f'{text[:60]}…'!r}.")
        require(key not in found["fixed"] | found["grid"], f"--set {key} is said twice.")
        found["grid" if isinstance(value, list) else "fixed"][key] = value
    return found


def check_report(found: dict) -> dict:
    """[report] with its defaults. UserError, one sentence, for a key or a value that it cannot have."""
    known(found, REPORT, "[report]")
    report, is_text = REPORT | found, lambda x: isinstance(x, str)
    for key in ("metrics", "panels"):
        names = report[key]
        require(isinstance(names, list) and all(map(is_text, names)), f"[report] {key} must be a list of names.")
    require(report["metrics"], "[report] metrics is empty: give it at least one name.")
    require(len({*report["metrics"]}) == len(report["metrics"]), "[report] metrics has a name twice: leave one out.")
    for key in ("curve", "source"):
        require(is_text(report[key]), f"[report] {key} must be a text, got {in_short(report[key])}.")
    report["curve"] = report["curve"] or report["metrics"][0]
    is_scale = lambda x: is_number(x) and x != 0
    for key, fits, what in (("scale", is_scale, "a number other than 0"), ("unit", is_text, "a text")):
        table = report[key] if isinstance(report[key], dict) else {report["curve"]: report[key]}
        fit, got = all(map(fits, table.values())), in_short(report[key])
        require(fit, f"[report] {key} must be {what} or a table of them, got {got}.")
        known(table, [*report["metrics"], report["curve"]], f"[report] {key}, which is for the metrics of the report")
    require(report["better"] in ("lower", "higher"), '[report] better must be "lower" or "higher".')
    return report


def check_published(found, metrics: list) -> None:
    """UserError, one sentence, if these are no numbers for metrics of the report."""
    require(
        isinstance(found, dict), f"published must be a table, as in {{ {metrics[0]} = 1.0 }}, got {in_short(found)}."
    )
    known(found, metrics, "published, which is for [report] metrics")
    for key, value in found.items():
        pair = isinstance(value, list) and len(value) == 2 and is_number(value[0])
        # None where a manifest has the mean alone
        pair = pair and (value[1] is None or (is_number(value[1]) and value[1] >= 0))
        sentence = f"published {key} must be a mean, or a mean and its standard deviation, got {in_short(value)}."
        require(pair or is_number(value), sentence)


def is_number(x) -> bool:
    """Is it a number that one can compute with, neither NaN nor infinite?"""
    return isinstance(x, int | float) and not isinstance(x, bool) and abs(x) <= LARGEST_NUMBER


def known(names_given, names, where: str) -> None:
    for key in names_given:
        if key not in names:
            raise UserError(f"unknown key {key[:80]!r} in {where}; the known ones are {', '.join(names)}.")


def case_name(case: dict) -> str:
    if "name" in case:
        return case["name"]
    return str(case["estimator"]) if "estimator" in case else describe({k: v for k, v in case.items() if k not in CASE})


def describe(flags: dict) -> str:
    """The flags in words; an estimator's name speaks for itself."""
    text = lambda v: ("×".join(map(str, v)) or "none") if isinstance(v, list) else str(v)
    return ", ".join(text(v) if k == "estimator" else f"{k} {text(v)}" for k, v in flags.items())


def load_experiment(name: str) -> type[Experiment]:
    """The experiment of the command scripts/NAME.py. Commands are plug-ins: a specification names them, and this is the
    one place that loads them."""
    names = sorted(p.stem for p in SCRIPTS.glob("train_*.py"))
    require(name in names, f"unknown script {name!r}; the known ones are {', '.join(names)}.")
    module = importlib.import_module(name)
    (found,) = (
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Experiment) and value.__module__ == module.__name__
    )
    return found


def configuration(experiment: type[Experiment], flags: dict, checked: dict, data_dir: str = "") -> Any:
    """The complete configuration for these flags. UserError, one sentence, for what the command would refuse.

    checked: what is known of others; only the seed is checked of one that differs in it alone.
    data_dir: where the data are, if the run reads any
    """
    values = read_values(experiment.config_class, flags, texts=True)
    config = experiment.config_class(**values)
    check_seed(config)
    reading = dataclasses.replace(config, data_dir=data_dir) if data_dir else config
    group = tuple(v for k, v in vars(config).items() if k != "seed")
    if group not in checked:
        given = [k for k, v in values.items() if v != getattr(experiment.config_class, k)]
        checked[group] = reading.check_given(given)
    return config if "data_dir" in checked[group] else reading
