"""The pictures that the scripts leave in a run folder: matplotlib's object interface, no window, no state."""

from __future__ import annotations

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


def _save(figure: Figure, path) -> None:
    FigureCanvasAgg(figure).print_figure(path, dpi=150)


def curves(path, metrics: list[dict], title: str, what="−ELBO (nats per image)", labels=("train", "test")) -> None:
    """−ELBO, or `what` it is, against the epoch, for training and test images."""
    lines = [m for m in metrics if "train" in m]
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    epochs = [m["epoch"] for m in lines]
    for key, label in zip(("train", "test"), labels, strict=True):
        axes.plot(epochs, [m[key] for m in lines], label=label, marker="o" if len(lines) < 20 else None, markersize=3)
    axes.set_xlabel("epoch")
    axes.set_ylabel(what)
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend()
    _save(figure, path)


def page(path, images: np.ndarray, shape: tuple[int, int], title: str, columns: int = 10) -> None:
    """Images (N, height·width) in [0, 1] as one page, `columns` a row, dark on light."""
    height, width = shape
    rows = -(-len(images) // columns)
    sheet = np.zeros((rows * (height + 1) + 1, columns * (width + 1) + 1))
    for n, image in enumerate(images):
        y, x = (n // columns) * (height + 1) + 1, (n % columns) * (width + 1) + 1
        sheet[y : y + height, x : x + width] = image.reshape(shape)
    figure = Figure(figsize=(6, 6 * sheet.shape[0] / sheet.shape[1] + 0.4), layout="constrained")
    axes = figure.subplots()
    axes.imshow(1.0 - sheet, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axes.set_axis_off()
    axes.set_title(title, fontsize=10)
    _save(figure, path)


def learning_curves(path, metrics: list[dict], title: str) -> None:
    """Validation accuracy and the losses against the epoch."""
    lines = [m for m in metrics if "valid_accuracy" in m]
    epochs = [m["epoch"] for m in lines]
    figure = Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(epochs, [100.0 * m["valid_accuracy"] for m in lines], marker="o", markersize=3)
    left.set_ylabel("validation accuracy (%)")
    for key, label in (("train_loss", "train, sampled"), ("valid_loss", "validation, greedy")):
        right.plot(epochs, [m[key] for m in lines], marker="o", markersize=3, label=label)
    right.set_ylabel("−log p(label) (nats)")
    right.legend()
    for axes in (left, right):
        axes.set_xlabel("epoch")
        axes.grid(alpha=0.3)
    figure.suptitle(title)
    _save(figure, path)


def forest(path, sentences: list[list[str]], choices) -> None:
    """Binary trees over their tokens, one below the other.   choices: for each, the merges that build it"""
    figure = Figure(figsize=(12, 2.2 * len(sentences)), layout="constrained")
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
    _save(figure, path)


def speed(path, seconds: dict[str, dict]) -> None:
    """Seconds of a step against the length of the sequences, both on logarithmic axes."""
    figure = Figure(figsize=(6, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, found in seconds.items():
        axes.loglog(list(found), list(found.values()), marker="o", markersize=4, label=name)
    axes.set_xlabel("tokens T")
    axes.set_ylabel("seconds for a training step of 16 sequences")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    _save(figure, path)
