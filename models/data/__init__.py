"""Data sets: arrays in, batches out.

`load_images` gives images for the VAE experiments; `DATASETS` lists the names it knows. Nothing here draws from a
global generator: binarisation and the order of an epoch are addressed noise (`minigrad.random`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from minigrad import Rng

from . import digits, mnist
from .errors import DataError

DATASETS = {"digits": digits.load, "mnist": mnist.load}
PIXELS = ("gray", "dynamic", "fixed")

# The fixed binarisation is drawn once from this seed, for everyone: the files that Larochelle & Murray (2011) binarised
# are not distributed with MNIST.
FIXED_BINARISATION_SEED = 20110411

__all__ = ["DATASETS", "FIXED_BINARISATION_SEED", "PIXELS", "DataError", "Images", "binarise", "load_images"]


@dataclass(frozen=True)
class Images:
    """train, test: (N, height·width) in [0, 1];  train_labels, test_labels: (N,) uint8;  shape: (height, width)."""

    train: np.ndarray
    train_labels: np.ndarray
    test: np.ndarray
    test_labels: np.ndarray
    shape: tuple[int, int]


def load_images(name: str, data_dir=None, pixels: str = "gray", dtype=np.float32) -> Images:
    """The data set `name` ("digits", embedded, or "mnist").

    data_dir: a folder with one folder per data set; without it, the environment variable MINIGRAD_DATA, and without
    that a download into the user's cache.   pixels: "gray" and "dynamic" give gray values (dynamic binarisation
    happens anew for every batch, see `binarise`), "fixed" gives 0 and 1, drawn once.
    DataError, one sentence, for a missing, truncated or altered file; ValueError for an unknown name.
    """
    if name not in DATASETS:
        raise ValueError(f"unknown data set {name!r}; the known ones are {', '.join(DATASETS)}.")
    if pixels not in PIXELS:
        raise ValueError(f"unknown pixels {pixels!r}; the known ones are {', '.join(PIXELS)}.")
    (train, train_labels), (test, test_labels), brightest = DATASETS[name](data_dir)
    shape = train.shape[1:]
    scaled = [(x.reshape(len(x), -1) / brightest).astype(dtype) for x in (train, test)]
    if pixels == "fixed":
        rng = Rng(FIXED_BINARISATION_SEED)
        parts = zip(scaled, ("train", "test"), strict=True)  # in float32, since the noise of float64 has other values
        scaled = [binarise(x.astype(np.float32), rng.site(part)).astype(dtype) for x, part in parts]
    return Images(scaled[0], train_labels, scaled[1], test_labels, shape)


def binarise(x, rng: Rng):
    """Each pixel 1 with its gray value as the probability, else 0.   x (...) in [0, 1] -> (...) of the same dtype"""
    return (rng.uniform(x.shape, like=x) < x).astype(x.dtype)
