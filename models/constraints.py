"""The published convolutional network that reads digits under constraints (Yang, Lee & Park 2022), LeNet-like.

(N, H, W) --5×5--> 6 maps --2×2 max, ReLU--5×5--> 16 maps --2×2 max, ReLU--> 120 ReLU -> 84 ReLU -> K logits
"""

from __future__ import annotations

import numpy as np

from minigrad import Rng, Tensor
from minigrad.convolution import max_pool2d
from minigrad.nn import MLP, Conv2d, Module, xavier_uniform
from minigrad.ops import relu

CHANNELS, WINDOW = (1, 6, 16), 5
SMALLEST = 16  # what leaves the second pooling one pixel


class ConvNet(Module):
    """x (N, H·W)  ->  logits (N, classes).     shape: (H, W), both at least 16 (ValueError)"""

    def __init__(self, shape: tuple[int, int], classes: int, *, rng: Rng, dtype=np.float32):
        if min(shape) < SMALLEST:
            raise ValueError(
                f"two convolutions of 5 × 5 with pooling need {SMALLEST} × {SMALLEST} pixels, got {shape}."
            )
        self.shape = shape
        options = {"init": xavier_uniform, "dtype": dtype}
        self.first = Conv2d(*CHANNELS[:2], WINDOW, rng.site("first"), **options)
        self.second = Conv2d(*CHANNELS[1:], WINDOW, rng.site("second"), **options)
        height, width = (((n - 4) // 2 - 4) // 2 for n in shape)
        self.dense = MLP([CHANNELS[-1] * height * width, 120, 84, classes], rng.site("dense"), **options)

    def __call__(self, x) -> Tensor:
        maps = Tensor(x.reshape(len(x), 1, *self.shape))
        for layer in (self.first, self.second):
            maps = relu(max_pool2d(layer(maps)))
        return self.dense(maps.reshape(len(x), -1))
