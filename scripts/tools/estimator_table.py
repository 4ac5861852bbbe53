"""The tables of estimators, made from the classes.

    python scripts/tools/estimator_table.py            # print them
    python scripts/tools/estimator_table.py --write    # put them into README.md and estimators/README.md

A test keeps both files current.
"""

from __future__ import annotations

import inspect
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from estimators import ESTIMATORS, facts
from experiments.errors import command, disk_errors
from experiments.flags import Parser

ROOT = Path(__file__).resolve().parents[2]
EXACT_FOR = {"all": "every f", "quadratic": "quadratic f", "linear": "linear f", "none": "—"}


def rows():
    """For each registered name: (name, its title, the estimator, its options)."""
    for name, factory in ESTIMATORS.items():
        estimator, fixed = facts(name), getattr(factory, "keywords", {})
        title = estimator.title + "".join(f", {k}" if v is True else f", {k} {v}" for k, v in fixed.items())
        options = ", ".join(f"`{key}`" for key in inspect.signature(factory).parameters if key not in fixed)
        yield name, title, estimator, options


def markdown(lines) -> str:
    header, *body = lines
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, ("---",) * len(header), *body))


def variables(estimator) -> str:
    return " or ".join({"categorical": "one-hots", "bernoulli": "bits"}[family.name] for family in estimator.families)


def overview() -> str:
    """For the front page: what each is called, where it comes from, and what it can be told."""
    lines = [("name", "estimator", "from", "variables", "exact for", "evaluations of f", "options")]
    for name, title, e, options in rows():
        exact = EXACT_FOR[e.exact_for]
        if e.objective != "E f(D)" and e.exact_for != "none":
            exact += " (of its own objective)"
        evaluations = e.evaluations + (" and ∇f" if e.cost_gradient else "")
        lines.append((f"`{name}`", title, e.paper, variables(e), exact, evaluations, options))
    return markdown(lines)


def guide() -> str:
    """For the field guide: all facts."""
    lines = [("name", "variables", "estimates ∇ of", "exact for", "evaluations of f", "uses ∇f", "sample", "learns")]
    for name, _, e, _ in rows():
        learns = "by itself" if e.learned else "running means" if e.state and not e.learned else ""
        learns = "slope" if name == "st-slope" else learns
        facts_of = (e.objective, EXACT_FOR[e.exact_for], e.evaluations, "yes" if e.cost_gradient else "no", e.support)
        lines.append((f"`{name}`", variables(e), *facts_of, learns))
    return markdown(lines)


TABLES = {  # file: (the comment before the table, the comment after it, the table)
    "README.md": (
        "<!-- estimators: made by scripts/tools/estimator_table.py -->",
        "<!-- end of estimators -->",
        overview,
    ),
    "estimators/README.md": (
        "<!-- guide table: made by scripts/tools/estimator_table.py -->",
        "<!-- end of guide table -->",
        guide,
    ),
}


def with_table(file: str, text: str) -> str:
    """The text of the file with its table made anew."""
    begin, end, table = TABLES[file]
    before, rest = text.split(begin)
    _, after = rest.split(end)
    return f"{before}{begin}\n{table()}\n{end}{after}"


@command
def main(argv=None) -> int:
    parser = Parser(description=__doc__ and __doc__.split("\n\n")[0])
    parser.add_argument("--write", action="store_true", help="put them into README.md and estimators/README.md")
    write = parser.parse_args(argv).write
    for file, (_, _, table) in TABLES.items():
        if write:
            with disk_errors():
                (ROOT / file).write_text(with_table(file, (ROOT / file).read_text()))
        else:
            print(table())
    return 0


if __name__ == "__main__":
    sys.exit(main())
