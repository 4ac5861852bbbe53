"""Networks whose activations have few levels: trained by coarse gradients, without any sampling.

    a = x W + b,   y = step·min(max(⌈a/step⌉, 0), 2ᵇ − 1)        `minigrad.hard.quantised_relu`

The derivative of y is 0 wherever it exists, and backward its rule has that of a proxy: the identity, a ReLU or a
clipped ReLU (Cai et al. 2017; Yin, Lyu, Zhang, Osher, Qi & Xin 2019). With b = 0 the activation is the ReLU itself, in
full precision. Weights are not quantised, and neither are the input and the logits. All weights begin as
N(0, 2/inputs) (He et al. 2015).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np

from minigrad import Rng, Tensor, no_grad
from minigrad.backend import array_module, check_index
from minigrad.convolution import max_pool2d
from minigrad.fused import cross_entropy
from minigrad.hard import QUANTISED, quantised_relu
from minigrad.nn import Conv2d, Linear, Module, he_normal, parameter
from minigrad.ops import gather, relu

# The distance of two levels for 1, 2 and 4 bits with which the code of Yin et al. begins. They are within 1 % of the
# steps that round half of a standard normal distribution to its nearest level with the least squared error: 1.2240,
# 0.6508, 0.1932.
STEPS = {1: 1.2221, 2: 0.6511, 4: 0.1946}

PROXIES = tuple(QUANTISED)


class Activation:
    """A quantised ReLU of `bits` bits with this step and proxy; the ReLU itself for bits = 0.

    step: None for the one in STEPS.  ValueError for bits that it does not know, or what `quantised_relu` refuses.
    """

    def __init__(self, bits: int, step: float | None = None, proxy: str = "clipped_relu"):
        if bits and step is None and bits not in STEPS:
            raise ValueError(f"no step is known for {bits} bits, only for {', '.join(map(str, STEPS))}: give one.")
        self.bits, self.settings = bits, {"step": STEPS.get(bits) if step is None else step, "proxy": proxy}
        if bits:
            quantised_relu(np.zeros(0), bits=bits, **self.settings)  # ValueError, before anything is trained

    def __call__(self, x) -> Tensor:
        return quantised_relu(x, bits=self.bits, **self.settings) if self.bits else relu(x)


class Classifier(Module):
    """Base class: `__call__(x)` gives the logits (B, K) of x."""

    def cost(self, x, labels) -> Tensor:
        """−log p(label) of each example (B,).   labels (B,) integers on the model's device"""
        return cross_entropy(self(x), labels)

    def evaluate(self, x):
        """The logits (B, K) as an array where the model lives."""
        with no_grad():
            return self(x).data


def hinge(logits, labels) -> Tensor:
    """max(0, 1 − o_label + max of the other o) of each example (B,) (Crammer & Singer 2001).   logits o (B, K ≥ 2)"""
    xp = array_module(labels)
    check_index(labels, logits.shape[1])
    own = labels[:, None] == xp.arange(logits.shape[1])
    rival = xp.where(own, -math.inf, logits.data).argmax(axis=1)
    return relu(1.0 + (gather(logits, rival[:, None]) - gather(logits, labels[:, None])).reshape(-1))


class TwoLinearLayers(Classifier):
    """o = V μ(W x) without biases (Long, Yin & Xin 2020), x (B, D) -> o (B, K), trained by the hinge.

    With one bit it cannot classify data in which −x is as likely as x. Of the bits of a unit for x and for −x one is 1,
    so that o(x) + o(−x) = c, a constant (where no wᵀx is 0). If x and −x are both classified as k, then the sum of the
    inequalities oₖ > oⱼ is cₖ > cⱼ for every other class j, which can be so for one class k only. In all the others x
    or −x is wrong: of K classes of the same size at most ½ (1 + 1/K) is right. (The argument is ours.)

    fixed: V is not trained; then each class has as many units of its own, which vote with +1 for it and with
    −1/(K − 1) against it, and units must be a multiple of classes: ValueError otherwise.
    """

    def __init__(
        self, inputs: int, units: int, classes: int, activation: Activation, *, fixed: bool, rng: Rng, dtype=np.float32
    ):
        if fixed and units % classes:
            raise ValueError(f"a fixed second layer needs a multiple of {classes} units, got {units}.")
        self.activation = activation
        self.first = parameter(he_normal(rng.site("first"), (inputs, units), dtype))
        second = he_normal(rng.site("second"), (units, classes), dtype)
        if fixed:
            votes = np.arange(units)[:, None] % classes == np.arange(classes)
            second = np.where(votes, 1.0, -1.0 / (classes - 1)).astype(dtype)
        self.second = Tensor(second, requires_grad=not fixed)

    def cost(self, x, labels) -> Tensor:
        return hinge(self(x), labels)

    def __call__(self, x) -> Tensor:
        return self.activation(x @ self.first) @ self.second


class DenseNetwork(Classifier):
    """Linear layers of these sizes with a quantised activation between two: (B, sizes[0]) -> (B, sizes[-1]).

    ValueError unless there are at least two sizes, all of them at least 1.
    """

    def __init__(self, sizes: Sequence[int], activation: Activation, *, rng: Rng, dtype=np.float32):
        if len(sizes) < 2:
            raise ValueError(f"a network needs the sizes of its input and its output at least, got {list(sizes)}.")
        self.activation = activation
        self.layers = [
            Linear(i, o, rng.site(n), init=he_normal, dtype=dtype) for n, (i, o) in enumerate(itertools.pairwise(sizes))
        ]

    def __call__(self, x) -> Tensor:
        *hidden, last = self.layers
        for layer in hidden:
            x = self.activation(layer(x))
        return last(x)


class LeNet(Classifier):
    """Two convolutions of 5×5, each with max pooling of 2×2, then a dense network (LeCun et al. 1998).

        images (B, H·W) -> 6 channels -> pool -> quantise -> 16 channels -> pool -> quantise -> hidden -> (B, classes)

    An activation is monotone, so it and the maximum may change places. Behind the pool it has a quarter of the work,
    and the maximum is one of real numbers, of which hardly two are equal, and not one of levels.
    Images of fewer than 16 rows or columns get two zeros on each side, so that convolutions keep their size.

    shape: (H, W), both at least 4.  hidden: widths of the dense layers, published (120, 84).  ValueError otherwise.
    """

    CHANNELS, WINDOW, POOL = (1, 6, 16), 5, 2

    def __init__(
        self,
        shape: tuple[int, int],
        hidden: Sequence[int],
        classes: int,
        activation: Activation,
        *,
        rng: Rng,
        dtype=np.float32,
    ):
        if min(shape) < self.POOL**2:
            raise ValueError(f"images must have at least {self.POOL**2} rows and columns, got {shape}.")
        self.shape, self.activation = shape, activation
        padding = self.padding(shape)
        self.convolutions = [
            Conv2d(i, o, self.WINDOW, rng.site(f"convolution {n}"), padding=padding, init=he_normal, dtype=dtype)
            for n, (i, o) in enumerate(itertools.pairwise(self.CHANNELS))
        ]
        for _ in self.convolutions:
            shape = tuple((n + 2 * padding - self.WINDOW + 1) // self.POOL for n in shape)
        sizes = (self.CHANNELS[-1] * shape[0] * shape[1], *hidden, classes)
        self.dense = DenseNetwork(sizes, activation, rng=rng.site("dense"), dtype=dtype)

    @classmethod
    def padding(cls, shape: tuple[int, int]) -> int:
        return 0 if min(shape) >= 16 else cls.WINDOW // 2

    def __call__(self, x) -> Tensor:
        x = x.reshape(len(x), 1, *self.shape)
        for layer in self.convolutions:
            x = self.activation(max_pool2d(layer(x), size=self.POOL))
        return self.dense(x.reshape(len(x), -1))
