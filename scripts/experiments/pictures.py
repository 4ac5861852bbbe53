"""The pictures that the scripts leave in a run folder: matplotlib's object interface, no window, no state."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .errors import require

LINES = ("-", "--", ":", "-.")  # of curves: there are only ten colours
MOST_PANELS, MOST_ROWS = 12, 200  # of a comparison: a picture can be 65,535 pixels high

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# matplotlib is imported where the first figure is made: a wrong flag, `--help` and a run without pictures need not wait
# for it. That it is there, `start.before_numpy` has checked.


def check_picture(path) -> None:
    """UserError if a picture cannot have this name. For names that somebody gives, before anything is measured."""
    from matplotlib.backend_bases import FigureCanvasBase

    kind, parent = Path(path).suffix.lower().removeprefix("."), Path(path).parent
    known = sorted(FigureCanvasBase.filetypes.keys() - {"pgf"})  # which needs LaTeX
    require(not kind or kind in known, f"{path}: no picture ends in .{kind}, choose one of {', '.join(known)}.")
    require(not os.path.isdir(path), f"{path} is a folder: give the picture a name.")
    require(os.path.isdir(parent), f"there is no folder {parent} for the picture: make it, or choose another name.")


def plain(name: str, most: int = 40) -> str:
    """A name as a text of a picture, in one line of at most so many characters: nothing in it is mathematics, and none
    is left out of a legend, as those that begin with _ would be."""
    text = "".join(c if c.isprintable() else " " for c in str(name))
    text = text if len(text) <= most else f"{text[: most - 1]}…"
    return (" " if text.startswith("_") else "") + text.replace("$", r"\$")


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of that size in inches; `figure.savefig(path, dpi=150)` ends a picture."""
    from matplotlib import rcParams
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rcParams["text.usetex"] = False  # a matplotlibrc can want LaTeX, which need not be there, nor take our names
    warnings.filterwarnings("ignore", "Glyph .* missing from")  # a box stands for what the font does not have
    return FigureCanvasAgg(Figure(figsize=(width, height), layout="constrained")).figure


def curves(path, metrics: list[dict], title: str, what="−ELBO (nats per image)", labels=("train", "test")) -> None:
    """−ELBO, or `what` it is, against the epoch, for training and test images."""
    lines = [m for m in metrics if "train" in m]
    figure = new_figure(6, 4)
    axes = figure.subplots()
    epochs = [m["epoch"] for m in lines]
    for key, label in zip(("train", "test"), labels, strict=True):
        axes.plot(epochs, [m[key] for m in lines], label=label, marker="o" if len(lines) < 20 else None, markersize=3)
    axes.set_xlabel("epoch")
    axes.set_ylabel(what)
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


def page(path, images: np.ndarray, shape: tuple[int, int], title: str, columns: int = 10) -> None:
    """Images (N, height·width) in [0, 1] as one page, `columns` a row, dark on light."""
    height, width = shape
    rows = -(-len(images) // columns)
    sheet = np.zeros((rows * (height + 1) + 1, columns * (width + 1) + 1))
    for n, image in enumerate(images):
        y, x = (n // columns) * (height + 1) + 1, (n % columns) * (width + 1) + 1
        sheet[y : y + height, x : x + width] = image.reshape(shape)
    figure = new_figure(6, 6 * sheet.shape[0] / sheet.shape[1] + 0.4)
    axes = figure.subplots()
    axes.imshow(1.0 - sheet, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axes.set_axis_off()
    axes.set_title(title, fontsize=10)
    figure.savefig(path, dpi=150)


LISTOPS_LOSSES = {"train_loss": "train, sampled", "valid_loss": "validation, greedy"}


def learning_curves(
    path,
    metrics: list[dict],
    title: str,
    accuracy: str = "valid_accuracy",
    accuracy_label: str = "validation accuracy (%)",
    losses: dict[str, str] = LISTOPS_LOSSES,
    losses_label: str = "−log p(label) (nats)",
) -> None:
    """An accuracy (its key in the metrics) and losses ({key: label}) against the epoch, side by side."""
    lines = [m for m in metrics if accuracy in m]
    epochs, marker = [m["epoch"] for m in lines], "o" if len(lines) < 60 else None
    figure, left, right = _two_plots(title)
    left.plot(epochs, [100.0 * m[accuracy] for m in lines], marker=marker, markersize=3)
    left.set_ylabel(accuracy_label)
    for key, label in losses.items():
        right.plot(epochs, [m[key] for m in lines], marker=marker, markersize=3, label=label)
    right.set_ylabel(losses_label)
    right.legend()
    figure.savefig(path, dpi=150)


def _two_plots(title: str):
    """A figure with two plots against the epoch, side by side."""
    figure = new_figure(9, 4)
    for axes in figure.subplots(1, 2):
        axes.set_xlabel("epoch")
        axes.grid(alpha=0.3)
    figure.suptitle(title)
    return figure, *figure.axes


def gate_curves(path, metrics: list[dict], title: str) -> None:
    """Errors, and the fraction of gates that are on, against the epoch."""
    lines = [m for m in metrics if "train_loss" in m]
    epochs = [m["epoch"] for m in lines]
    figure, left, right = _two_plots(title)
    for key in ("valid", "test"):
        left.plot(epochs, [m[f"{key}_error"] for m in lines], label=key)
    left.set_ylabel("error (%)")
    left.legend()
    right.plot(epochs, [m["active"] for m in lines], label="drawn, in training")
    right.plot(epochs, [m["test_active"] for m in lines], label="above the threshold, test images")
    right.set_ylabel("fraction of gates that are on")
    right.set_ylim(0.0)
    right.legend()
    figure.savefig(path, dpi=150)


def forest(path, sentences: list[list[str]], choices) -> None:
    """Binary trees over their tokens, one below the other.   choices: for each, the merges that build it"""
    figure = new_figure(12, 2.2 * len(sentences))
    for axes, words, merges in zip(np.ravel(figure.subplots(len(sentences), 1)), sentences, choices, strict=True):
        nodes = [(float(i), 0.0) for i in range(len(words))]
        for at in merges:
            (x_l, y_l), (x_r, y_r) = nodes[at : at + 2]
            x, y = 0.5 * (x_l + x_r), max(y_l, y_r) + 1.0
            axes.plot([x_l, x, x_r], [y_l, y, y_r], color="black", linewidth=0.8)
            nodes[at : at + 2] = [(x, y)]
        for i, word in enumerate(words):
            axes.text(i, -0.3, word, ha="center", va="top", fontsize=7, rotation=0 if len(word) == 1 else 90)
        axes.set_ylim(-0.25 * nodes[0][1] - 1.5, nodes[0][1] + 0.5)
        axes.set_axis_off()
    figure.savefig(path, dpi=150)


def speed(path, seconds: dict[str, dict], size: str, step: str) -> None:
    """Seconds of a step against the size of what it works on, both on logarithmic axes; `size` and `step` say what."""
    figure = new_figure(6, 4.5)
    axes = figure.subplots()
    for name, found in seconds.items():
        axes.loglog(list(found), list(found.values()), marker="o", markersize=4, label=name)
    axes.set_xlabel(size)
    axes.set_ylabel(step)
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(path, dpi=150)


def comparison_curves(path, panels) -> None:
    """Learning curves, a panel beside the other.

    panels: [(title, label of the axis, [(name, (epochs, mean, standard deviation), …), …]), …]
    """
    for axes, (_, label, rows) in _grid(path, panels):
        for n, (name, (epochs, mean, sd), *_) in enumerate(rows):
            mean, sd = np.asarray(mean), np.asarray(sd)
            style = {"linestyle": LINES[n // 10 % 4], "marker": "o" if len(epochs) < 5 else None, "markersize": 3}
            (line,) = axes.plot(epochs, mean, label=plain(name), **style)
            axes.fill_between(epochs, mean - sd, mean + sd, color=line.get_color(), alpha=0.2, linewidth=0)
        axes.set_xlabel("epoch")
        axes.set_ylabel(plain(label))
        axes.grid(alpha=0.3)
        axes.legend(**{"fontsize": 7} | beside(len(rows)))


def comparison_bars(path, panels) -> None:
    """Means with their standard deviation, and a diamond for a published number; the axis begins where it has to.

    panels: [(title, label of the axis, [(name, …, (mean, standard deviation, published or None)), …]), …]
    """
    for axes, (_, label, rows) in _grid(path, panels):
        means, sds, published = zip(*(row[-1] for row in rows), strict=True)
        places = np.arange(len(rows))
        axes.barh(places, means, xerr=sds, height=0.6, color="tab:blue", alpha=0.6, capsize=3)
        known = [(p, y) for p, y in zip(published, places, strict=True) if p is not None]
        if known:
            axes.plot(*zip(*known, strict=True), "D", color="black", markersize=4, label="published")
            axes.legend(fontsize=7)
        ends = [*np.subtract(means, sds), *np.add(means, sds), *(p for p, _ in known)]
        margin = 0.1 * (max(ends) - min(ends)) or 0.1 * abs(max(ends)) or 1.0
        axes.set_xlim(min(ends) - margin, max(ends) + margin)
        axes.set_yticks(places, [plain(name) for name, *_ in rows])
        axes.invert_yaxis()
        axes.set_xlabel(f"{plain(label)}; the axis does not begin at 0")


def that_fit(panels: list) -> list:
    """Of the panels of a comparison, the first ones, with their first rows, for which there is room in a picture."""
    return [(*about, rows[:MOST_ROWS]) for *about, rows in panels[:MOST_PANELS]]


def _grid(path, panels, columns: int = 2):
    """Axes for each panel, with its title, high enough for a line of text for each row of the longest one; the picture
    is saved at the end."""
    columns = min(columns, len(panels))
    rows, height = -(-len(panels) // columns), max(4.0, 1.0 + 0.18 * max(len(panel[-1]) for panel in panels))
    figure = new_figure(6.5 * columns, height * rows)
    grid = np.ravel(figure.subplots(rows, columns, squeeze=False))
    for axes, panel in zip(grid, panels, strict=False):
        axes.set_title(plain(panel[0], 80), fontsize=9)
        yield axes, panel
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    figure.savefig(path, dpi=150)


def beside(rows: int) -> dict:
    """Where the legend of so many rows is: beside the curves if it would cover them."""
    return {"fontsize": 7, "loc": "upper left", "bbox_to_anchor": (1, 1)} if rows > 10 else {}


def several_curves(path, curves: dict[str, tuple[list, list]], label: str, against: str = "epoch") -> None:
    """One metric of several runs against the epoch, or something else.   curves: {name: (epochs, values)}, at most
    MOST_ROWS"""
    figure = new_figure(7, max(4.5, 1.0 + 0.18 * len(curves)))
    axes = figure.subplots()
    for n, (name, (epochs, values)) in enumerate(curves.items()):
        axes.plot(epochs, values, LINES[n // 10 % 4], marker="o", markersize=3, label=plain(name))
    axes.set_xlabel(plain(against))
    axes.set_ylabel(plain(label.replace("_", " ")))
    axes.grid(alpha=0.3)
    axes.legend(**beside(len(curves)))
    figure.savefig(path, dpi=150)


def spike_raster(path, layers: dict[str, np.ndarray], membranes, threshold: float, outputs: np.ndarray, title) -> None:
    """What one image does to a spiking network, from step to step: a bar for each spike of each layer, the membranes
    of some neurons of the first hidden one, and the outputs so far.

    layers: {name: spikes (T, N)};  membranes (T, N) of the second of `layers`, or None;  outputs (T, K)
    """
    figure = new_figure(8, 1.5 * (len(layers) + 2))
    rows = figure.subplots(len(layers) + 2, 1, sharex=True)
    T, steps = len(outputs), np.arange(1, len(outputs) + 1)
    for axes, (name, spikes) in zip(rows, layers.items(), strict=False):
        at, neuron = np.nonzero(spikes)
        axes.hlines(neuron, at + 0.6, at + 1.4, linewidth=0.5, color="black")
        axes.set_xlim(0.5, T + 0.5)
        axes.set_ylim(spikes.shape[1] - 0.5, -0.5)
        axes.set_ylabel(f"{name}\n{np.count_nonzero(spikes)} spikes", fontsize=8)
    potentials, totals = rows[-2:]
    if membranes is not None:
        often = list(layers.values())[1].sum(axis=0)
        for n in np.argsort(abs(often - 0.4 * T), kind="stable")[:3]:  # those that do not fire all the time
            potentials.plot(steps, membranes[:, n], marker="o", markersize=3, linewidth=1)
        potentials.axhline(threshold, color="black", linewidth=0.8, linestyle="--")
    potentials.set_ylabel("membranes of\n3 neurons, layer 1", fontsize=8)
    for k, output in enumerate(np.cumsum(outputs, axis=0).T / steps):
        totals.plot(steps, output, LINES[k // 5 % 4], label=str(k), linewidth=1)
    totals.set_ylabel("mean output\nso far", fontsize=8)
    totals.legend(fontsize=6, ncols=2, loc="upper left", bbox_to_anchor=(1, 1))
    totals.set_xlabel("time step")
    rows[0].set_title(title, fontsize=10)
    figure.savefig(path, dpi=150)
