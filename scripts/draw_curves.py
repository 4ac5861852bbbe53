"""Draw one metric of several runs against the epoch, finished or not; one that is a list, against the place in it.

python scripts/draw_curves.py runs/A runs/B --metric valid_accuracy --out curves.png
python scripts/draw_curves.py runs/A runs/B --metric accuracy_after --against "time steps" --out steps.png
"""

from __future__ import annotations

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))
from experiments.start import before_numpy

before_numpy()

from pathlib import Path

from experiments.errors import command, disk_errors, require
from experiments.flags import Parser
from experiments.pictures import MOST_ROWS, check_picture, several_curves
from experiments.run_folder import METRICS, RunFolder
from experiments.specification import is_number


@command
def main(argv=None) -> int:
    parser = Parser(description=__doc__ and __doc__.split("\n\n")[0])
    parser.add_argument("runs", nargs="+", help="run folders; NAME=FOLDER gives a curve that name")
    parser.add_argument("--metric", default="valid_accuracy", help="a key of metrics.jsonl (default valid_accuracy)")
    parser.add_argument("--against", default="epoch", help="what the axis is called (default epoch)")
    parser.add_argument("--out", default="curves.png", help="where the picture goes (default curves.png)")
    flags, curves = parser.parse_args(argv), {}
    check_picture(flags.out)
    require(len(flags.runs) <= MOST_ROWS, f"a picture has room for {MOST_ROWS} curves, got {len(flags.runs)}.")
    for text in flags.runs:
        with disk_errors():
            name, _, path = ("", "", text) if Path(text).is_dir() else text.rpartition("=")
        points = [(m.get("epoch"), m.get(flags.metric)) for m in RunFolder(Path(path)).metrics()]
        lists = [value for _, value in points if isinstance(value, list)]
        points = list(enumerate(lists[-1], start=1)) if lists else points
        points = [point for point in points if all(map(is_number, point))]
        about = f"{path!r} has no {METRICS} with numbers for {flags.metric!r}"
        require(points, f"{about}: give another run folder or --metric.")
        name = name or Path(path).name
        require(name not in curves, f"two curves are called {name!r}: give NAME={path}, with another name.")
        curves[name] = tuple(zip(*points, strict=True))
    with disk_errors():
        several_curves(flags.out, curves, flags.metric, flags.against)
    return 0


if __name__ == "__main__":
    sys.exit(main())
