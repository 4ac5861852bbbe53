"""1,797 handwritten digits of 8×8 pixels, embedded: the program needs no download to train on real data.

They are the test part of "Optical Recognition of Handwritten Digits" by E. Alpaydin and C. Kaynak (1998), UCI Machine
Learning Repository, https://doi.org/10.24432/C50P49, licensed CC BY 4.0: 13 writers, pixels counted from 0 to 16 in
blocks of 4×4 of a 32×32 bitmap. scikit-learn distributes the same array as `load_digits`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

FILE = Path(__file__).with_name("digits.npz")


def load(_data_dir=None):
    """((train images (1437, 8, 8) uint8, labels (1437,)), (test images (360, 8, 8), labels (360,)), 16).

    Every fifth image is a test image, beginning with the first.
    """
    with np.load(FILE) as arrays:
        images, labels = arrays["images"], arrays["labels"]
    test = np.arange(len(images)) % 5 == 0
    return (images[~test], labels[~test]), (images[test], labels[test]), 16
