"""The pictures that the scripts leave in a run folder: matplotlib's object interface, no window, no state."""

from __future__ import annotations

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


def _save(figure: Figure, path) -> None:
    FigureCanvasAgg(figure).print_figure(path, dpi=150)


def curves(path, metrics: list[dict], title: str) -> None:
    """−ELBO against the epoch, for training and test images."""
    lines = [m for m in metrics if "train" in m]
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    epochs = [m["epoch"] for m in lines]
    for key, label in (("train", "train"), ("test", "test")):
        axes.plot(epochs, [m[key] for m in lines], label=label, marker="o" if len(lines) < 20 else None, markersize=3)
    axes.set_xlabel("epoch")
    axes.set_ylabel("−ELBO (nats per image)")
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
