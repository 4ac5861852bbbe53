"""The table of estimators, made from the classes.

    python scripts/estimator_table.py            # print it
    python scripts/estimator_table.py --write    # put it into README.md

A test keeps README.md current.
"""

from __future__ import annotations

import inspect
import sys
from pathlib import Path

from estimators import ESTIMATORS, facts

README = Path(__file__).resolve().parents[1] / "README.md"
BEGIN, END = "<!-- estimators: made by scripts/estimator_table.py -->", "<!-- end of estimators -->"


def table() -> str:
    rows = [("name", "estimator", "from", "exact for", "evaluations of f", "uses ∇f", "sample", "options")]
    rows.append(("---",) * len(rows[0]))
    for name, factory in ESTIMATORS.items():
        cls = facts(name)
        fixed = getattr(factory, "keywords", {})
        title = cls.title + "".join(f", {key} {value}" for key, value in fixed.items())
        options = ", ".join(f"`{key}`" for key in inspect.signature(factory).parameters if key not in fixed)
        exact = {"all": "every f", "quadratic": "quadratic f", "linear": "linear f", "none": "—"}[cls.exact_for]
        uses = "yes" if cls.cost_gradient else "no"
        rows.append((f"`{name}`", title, cls.paper, exact, cls.evaluations, uses, cls.support, options))
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def with_table(readme: str) -> str:
    before, rest = readme.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


def main() -> None:
    if "--write" in sys.argv[1:]:
        README.write_text(with_table(README.read_text()))
    else:
        print(table())


if __name__ == "__main__":
    main()
