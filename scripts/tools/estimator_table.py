"""The table of estimators, made from the classes.

    python scripts/tools/estimator_table.py            # print it
    python scripts/tools/estimator_table.py --write    # put it into estimators/README.md

A test keeps the file current.
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
GUIDE = "estimators/README.md"
BEGIN, END = "<!-- guide table: made by scripts/tools/estimator_table.py -->", "<!-- end of guide table -->"
EXACT_FOR = {
    "all": "every f",
    "quadratic": "quadratic in each variable",
    "linear": "linear in each variable",
    "none": "—",
}


def options(factory) -> str:
    """What it can be told in its name."""
    fixed = getattr(factory, "keywords", {})
    return ", ".join(f"`{key}`" for key in inspect.signature(factory).parameters if key not in fixed)


def markdown(lines) -> str:
    header, *body = lines
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, ("---",) * len(header), *body))


def variables(estimator) -> str:
    return " or ".join({"categorical": "one-hots", "bernoulli": "bits"}[family.name] for family in estimator.families)


def table() -> str:
    """For the field guide: all facts."""
    header = ("name", "variables", "estimates ∇ of", "exact for", "evaluations of f", "uses ∇f", "sample", "learns")
    lines = [(*header, "options")]
    for name, factory in ESTIMATORS.items():
        e = facts(name)
        learns = "by itself" if e.learned else "running means" if e.state else ""
        learns = "slope" if name == "st-slope" else learns
        facts_of = (e.objective, EXACT_FOR[e.exact_for], e.evaluations, "yes" if e.cost_gradient else "no", e.support)
        lines.append((f"`{name}`", variables(e), *facts_of, learns, options(factory)))
    return markdown(lines)


def with_table(text: str) -> str:
    """The text of the guide with its table made anew."""
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


@command
def main(argv=None) -> int:
    parser = Parser(description=__doc__ and __doc__.split("\n\n")[0])
    parser.add_argument("--write", action="store_true", help=f"put it into {GUIDE}")
    if not parser.parse_args(argv).write:
        print(table())
        return 0
    with disk_errors():
        (ROOT / GUIDE).write_text(with_table((ROOT / GUIDE).read_text()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
