"""Draw the picture of models/README.md: which pairs of neighbours exist while a sequence is merged.

python scripts/tools/draw_merges.py --out models/merges.png
"""

from __future__ import annotations

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
from experiments.start import before_numpy

before_numpy()

import numpy as np

from experiments.errors import command, disk_errors
from experiments.flags import Parser
from experiments.pictures import check_picture, new_figure
from models import linear_time

CHOICES = (2, 0, 3, 1, 1, 0)  # the merges of the example, seven tokens


def rows_of(choices):
    """For each step: (nodes as (first, last) token, rows of the candidates, the chosen position), from the real forward
    pass on states that do not matter. Pairs have their rows in the order in which they come into being."""
    T, H = len(choices) + 1, 1
    pick = lambda k, v, mask: np.array([choices[k]])
    states = np.zeros((1, T, H))
    trace = linear_time.forward(states, states, np.zeros((2 * H, 5 * H)), np.zeros(5 * H), np.zeros(H), [T], pick)
    nodes, rows = [(i, i) for i in range(T)], []
    for merge, at in zip(trace.merges, choices, strict=True):
        rows.append((list(nodes), merge.candidates[0].tolist(), at))
        nodes[at : at + 2] = [(nodes[at][0], nodes[at + 1][1])]
    return rows, trace.pair_count


def draw(path) -> None:
    rows, used = rows_of(CHOICES)
    figure = new_figure(9, 5.2)
    axes = figure.subplots()
    seen: set[int] = set()
    for k, (nodes, pairs, at) in enumerate(rows):
        x = [0.5 * (first + last) for first, last in nodes]
        axes.text(-1.3, -k, f"step {k}", va="center", fontsize=9)
        for n, (first, last) in enumerate(nodes):
            axes.plot([first - 0.12, last + 0.12], [-k, -k], color="0.8", linewidth=9, solid_capstyle="round", zorder=1)
            label = f"{first + 1}" if first == last else f"{first + 1}–{last + 1}"
            axes.text(x[n], -k, label, ha="center", va="center", fontsize=8, zorder=3)
        for n, pair in enumerate(pairs):
            middle = 0.5 * (nodes[n][1] + nodes[n + 1][0])
            color = "tab:orange" if pair not in seen else "white"
            edge = "tab:red" if n == at else "0.4"
            width = 2.2 if n == at else 0.8
            axes.plot(middle, -k - 0.38, "s", markersize=11, markerfacecolor=color, markeredgecolor=edge, mew=width)
            axes.text(middle, -k - 0.38, str(pair + 1), ha="center", va="center", fontsize=6)
        seen |= set(pairs)
    title = f"{len(CHOICES) + 1} tokens: {used} different pairs; evaluated anew at every step, "
    axes.set_title(
        title + f"{sum(len(p) for _, p, _ in rows)}\n"
        "gray: nodes with the tokens they cover;  squares: candidate pairs, orange when they are new;  red: the choice",
        fontsize=9,
    )
    axes.set_axis_off()
    figure.savefig(path, dpi=150)


@command
def main(argv=None) -> int:
    parser = Parser(description=__doc__ and __doc__.split("\n\n")[0])
    parser.add_argument("--out", default="merges.png", help="where the picture goes (default merges.png)")
    out = parser.parse_args(argv).out
    check_picture(out)
    with disk_errors():
        draw(out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
