"""Spiking networks (S. Yin et al. 2017): neurons that are silent or send a 1, over T time steps.

    pixels (B, D) --code--> spikes x (T, B, D) --W, b--> currents I (T, B, N) --neurons--> spikes s (T, B, N) --W, b-->

The currents of the last layer are the outputs o (T, B, K); their mean over the steps decides.

A neuron fires when its membrane u exceeds the threshold, s = 1[u > 1], and the derivative of that step is a proxy, in
the paper ½·1[0 < u < 2]. What is left in the membrane when the next step begins makes two kinds of networks:

    discontinuous   nothing: u_t = I_t. Every step is a network with binary activations on a pattern of its own, and
                    all T·B patterns are one batch.
    continuous      u_t = leak·(what the reset left of u_{t−1}) + I_t. A layer's currents of all steps are one product,
                    since they depend on the layer below alone; then the membranes go from step to step.

A spike is 0 or 1, so that a layer multiplies nothing: each spike adds a row of W to the currents, and silence costs
nothing. `SpikingNetwork.count` counts these additions. What it does not count are the biases and the membranes, some
operations for each neuron and step.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from minigrad import Rng, Tensor
from minigrad.backend import Array, array_module, asarray_like, check_index, check_unit_interval
from minigrad.convolution import max_pool2d
from minigrad.hard import STEP, hard_step, step_array
from minigrad.nn import Conv2d, Linear, Module, uniform_fan_in
from minigrad.ops import check_number, dropout, relu, stack
from minigrad.tensor import op

THRESHOLD = 1.0
WINDOW = 5  # of a convolution, which keeps the size of the image


# ---- the codes of pixels: (B, D) in [0, 1] -> spikes (T, B, D)


def rate(x, steps: int, rng: Rng):
    """In every step a pixel spikes with its gray value as the probability.   ValueError, on the host, outside [0, 1]"""
    check_unit_interval(x)
    return (rng.uniform((steps, *x.shape), like=x) < x).astype(x.dtype)


def latency(x, steps: int, rng: Rng | None = None):
    """Time to first spike: the gray value p spikes once, in step ⌊(1 − p) T⌋ of 0 … T − 1, and never if p = 0.

    ValueError, on the host, outside [0, 1]
    """
    check_unit_interval(x)
    xp = array_module(x)
    return (xp.arange(steps)[:, None, None] == xp.floor((1.0 - x) * steps)).astype(x.dtype)


CODES = {"rate": rate, "latency": latency}


# ---- neurons


class Reset(NamedTuple):
    """What is left of the membrane after a step, and its derivatives: of u, s and the threshold."""

    left: Callable[[Array, Array, float], Array]
    by_u: Callable[[Array, Array, float], Array]
    by_s: Callable[[Array, Array, float], Array]


RESETS = {
    "subtract": Reset(lambda u, s, c: u - c * s, lambda u, s, c: 1.0, lambda u, s, c: -c),
    "zero": Reset(lambda u, s, c: u * (1.0 - s), lambda u, s, c: 1.0 - s, lambda u, s, c: -u),
    "none": Reset(lambda u, s, c: u, lambda u, s, c: 1.0, lambda u, s, c: 0.0),
}


def membranes(currents, *, leak: float, reset: str, threshold: float = THRESHOLD):
    """(u, s), the membranes before the reset and the spikes.   currents (T, …), an array -> (T, …) both

    TypeError for integers, which cannot leak.
    """
    if currents.dtype.kind != "f":
        raise TypeError(f"currents must be floating-point numbers, got {currents.dtype}: convert them.")
    xp, r = array_module(currents), 0.0
    u, s = xp.empty_like(currents), xp.empty_like(currents)
    for t in range(len(currents)):
        u[t] = leak * r + currents[t]
        s[t] = step_array(u[t] - threshold)
        r = RESETS[reset].left(u[t], s[t], threshold)
    return u, s


def _surrogate(currents, *, leak, reset, detach_reset, proxy, threshold=THRESHOLD):
    """s̃_t = s_t + μ(ũ_t − c) − μ(u_t − c), s and u as recorded here: the values of the spikes, and the slope μ′."""
    xp, mu, r = array_module(currents), STEP[proxy].function, RESETS[reset].left
    u, s = membranes(currents, leak=leak, reset=reset, threshold=threshold)

    def spikes(moved):
        u_t, s_t, out = u[0], s[0], []
        for t in range(len(moved)):
            left = r(u_t, s[t - 1] if detach_reset else s_t, threshold) if t else 0.0
            u_t = leak * left + moved[t]
            s_t = s[t] + mu(u_t - threshold, xp) - mu(u[t] - threshold, xp)
            out.append(s_t)
        return xp.stack(out)

    return (0,), spikes


@op(surrogate=_surrogate)
def integrate_and_fire(
    currents, *, leak: float, reset: str, detach_reset: bool, proxy: str, threshold: float = THRESHOLD
):
    """The spikes s (T, …), 0 or 1, of neurons with the currents I (T, …), which are at rest before the first step:

        u_t = leak·r_{t−1} + I_t        s_t = 1[u_t > c]        r_t = R(u_t, s_t)        r_{−1} = 0

        reset      R(u, s)       ∂R/∂u     ∂R/∂s
        subtract   u − c s       1         −c
        zero       u (1 − s)     1 − s     −u
        none       u             1         0

    With the slope μ′ of a proxy for that of the step, and from the last step, behind which dr = 0, to the first:

        ds_t = g_t + dr_t ∂R/∂s         the second term is left out if the reset is detached
        du_t = ds_t μ′(u_t − c) + dr_t ∂R/∂u
        dI_t = du_t                     dr_{t−1} = leak·du_t

    leak in [0, 1]; 1 loses nothing, and with 0 no step knows of another.   c: the threshold, > 0
    reset: a name in `RESETS`.   detach_reset: take the s in R for a constant.   proxy: a name in `minigrad.hard.STEP`
    ValueError for others and for currents without a step.
    """
    _check(leak, reset, proxy, threshold)
    if not currents.ndim or not len(currents):
        raise ValueError(f"currents need an axis of at least one step in front, got the shape {currents.shape}.")
    xp, R, c = array_module(currents), RESETS[reset], threshold
    u, s = membranes(currents, leak=leak, reset=reset, threshold=c)

    def backward(g):
        du, dr = xp.empty_like(u), 0.0
        for t in reversed(range(len(u))):
            ds = g[t] if detach_reset else g[t] + dr * R.by_s(u[t], s[t], c)
            du[t] = ds * STEP[proxy].derivative(u[t] - c, xp) + dr * R.by_u(u[t], s[t], c)
            dr = leak * du[t]
        return du

    return s, backward


def integrate_and_fire_plain(
    currents: Tensor, *, leak: float, reset: str, detach_reset: bool, proxy: str, threshold: float = THRESHOLD
) -> Tensor:
    """`integrate_and_fire` as it is defined, step by step on the tape."""
    _check(leak, reset, proxy, threshold)
    left, spikes = 0.0, []
    for t in range(len(currents)):
        u = leak * left + currents[t]
        s = hard_step(u - threshold, proxy=proxy)
        left = RESETS[reset].left(u, s.detach() if detach_reset else s, threshold)
        spikes.append(s)
    return stack(*spikes)


def _check(leak: float, reset: str, proxy: str, threshold: float) -> None:
    if not 0.0 <= check_number("leak", leak) <= 1.0:
        raise ValueError(f"leak must be from 0 to 1, got {leak}.")
    if not 0.0 < check_number("threshold", threshold) < math.inf:
        raise ValueError(f"threshold must be positive and finite, got {threshold}.")
    for name, value, known in (("reset", reset, RESETS), ("proxy", proxy, STEP)):
        if value not in known:
            raise ValueError(f"unknown {name} {value!r}; the known ones are {', '.join(known)}.")


@dataclass(frozen=True)
class Discontinuous:
    """Neurons that forget their membrane after every step."""

    proxy: str = "rectangle"

    def __call__(self, currents: Tensor) -> Tensor:
        return hard_step(currents - THRESHOLD, proxy=self.proxy)

    def membranes(self, currents):
        """For pictures.   an array (T, …) -> (T, …)"""
        return currents


@dataclass(frozen=True)
class Continuous:
    """Neurons that integrate; published: leak 1, "subtract", not detached.   See `integrate_and_fire`."""

    leak: float = 1.0
    reset: str = "subtract"
    detach_reset: bool = False
    proxy: str = "rectangle"

    def __call__(self, currents: Tensor) -> Tensor:
        return integrate_and_fire(currents, **vars(self))

    def membranes(self, currents):
        """For pictures, before the reset.   an array (T, …) -> (T, …)"""
        return membranes(currents, leak=self.leak, reset=self.reset)[0]


# ---- the network


def wide_uniform(rng, shape, dtype=np.float32):
    """U(±3/√I): at a threshold of 1 the usual ±1/√I would leave most neurons silent. The factor is ours."""
    return 3.0 * uniform_fan_in(rng, shape, dtype)


def squared_hinge(outputs: Tensor, labels) -> Tensor:
    """Σₖ max(0, 1 − tₖ oₖ)² / K,  tₖ = 1 for the label's class and −1 for the others.

    outputs (…, B, K), labels (B,) integers -> (…, B).   Errors as `cross_entropy` has them.
    """
    xp = array_module(labels)
    if labels.shape != outputs.shape[-2:-1]:
        raise ValueError(f"there must be one label for each row of outputs: {labels.shape} and {outputs.shape}.")
    check_index(labels, outputs.shape[-1])
    t = 2.0 * (labels[:, None] == xp.arange(outputs.shape[-1])).astype(outputs.dtype) - 1.0
    lacking = relu(1.0 - t * outputs)
    return (lacking * lacking).mean(axis=-1)


class SpikingNetwork(Module):
    """Convolutions, then dense layers, with spiking neurons behind all but the last one.

    shape (H, W) of the images, classes K, channels: of the convolutions, if there are any, hidden: widths of the dense
    layers, all ≥ 1.   neurons: a function from currents to spikes, (T, B, …) Tensors.
    dropout, input_dropout in [0, 1): of hidden spikes and of the input's, the same ones in all steps of an image.
    ValueError otherwise.

    A convolution's windows are 5 × 5 with zeros around the image; of its currents, the largest of 2 × 2 enters one
    neuron.  (The paper says 12 and 64 channels and 512 dense units; these windows are the usual ones.)
    """

    def __init__(
        self,
        shape: tuple[int, int],
        classes: int = 10,
        *,
        channels: Sequence[int] = (),
        hidden: Sequence[int] = (512, 512),
        neurons: Callable[[Tensor], Tensor],
        dropout: float = 0.0,
        input_dropout: float = 0.0,
        rng: Rng,
        dtype=np.float32,
    ):
        for name, share in (("dropout", dropout), ("input_dropout", input_dropout)):
            if not 0.0 <= share < 1.0:
                raise ValueError(f"{name} must be at least 0 and below 1, got {share}.")
        if min(s >> len(channels) for s in shape) < 1:
            raise ValueError(f"images of {shape[0]} × {shape[1]} cannot be halved {len(channels)} times.")
        self.neurons, self.dropout, self.input_dropout = neurons, dropout, input_dropout
        self.layers, self.inputs = [], []  # of each layer, the shape of what enters it for one image and step
        planes, options = (1, *channels), {"init": wide_uniform, "dtype": dtype}
        for n, (of, to) in enumerate(itertools.pairwise(planes)):
            self.inputs.append((of, *(s >> n for s in shape)))
            self.layers.append(Conv2d(of, to, WINDOW, rng.site(f"conv {n}"), padding=WINDOW // 2, **options))
        widths = (planes[-1] * math.prod(s >> len(channels) for s in shape), *hidden, classes)
        for n, (of, to) in enumerate(itertools.pairwise(widths)):
            self.inputs.append((of,))
            self.layers.append(Linear(of, to, rng.site(f"dense {n}"), **options))

    def __call__(self, x, rng: Rng | None = None):
        """(outputs (T, B, K), [(currents, spikes) of each hidden layer, (T, B, …)]).   x (T, B, D) spikes

        rng draws the dropout; None, for evaluation, drops nothing.
        """
        hidden = []
        for n, layer in enumerate(self.layers):
            T, B = x.shape[:2]
            x = self._dropped(x.reshape(T, B, *self.inputs[n]), self.dropout if n else self.input_dropout, rng, n)
            if isinstance(layer, Linear):
                currents = layer(x)
            else:
                pooled = max_pool2d(layer(x.reshape(T * B, *self.inputs[n])))
                currents = pooled.reshape(T, B, *pooled.shape[1:])
            if n + 1 < len(self.layers):
                x = self.neurons(currents)
                hidden.append((currents, x))
        return currents, hidden

    def _dropped(self, x, share: float, rng: Rng | None, n: int):
        if rng is None or not share:
            return x
        like = x.data if isinstance(x, Tensor) else x
        return dropout(x, rng.site(n).uniform(x.shape[1:], like=like) >= share, rate=share)

    def fan_out(self, n: int) -> np.ndarray:
        """How many additions a spike that enters layer n causes, by its place; broadcasts with `inputs[n]`."""
        layer = self.layers[n]
        if isinstance(layer, Linear):
            return np.array([float(layer.weight.shape[1])])
        reach = WINDOW // 2  # so many windows to each side look at a place, if the image goes on so far
        windows = [[min(s, i + reach + 1) - max(0, i - reach) for i in range(s)] for s in self.inputs[n][1:]]
        return layer.weight.shape[3] * np.outer(*windows).astype(np.float64)

    def dense_multiply_adds(self) -> float:
        """What a network of this size with real numbers in place of spikes has to do for an image."""
        return sum(float((np.ones(i) * self.fan_out(n)).sum()) for n, i in enumerate(self.inputs))

    def count(self, entering: Sequence[Array]):
        """(spikes, additions) of each image, (layers, B) float64 arrays each.

        entering: the spikes that enter each layer, (T, B, …) arrays
        """
        xp, spikes, additions = array_module(entering[0]), [], []
        for n, x in enumerate(entering):
            by_place = x.sum(axis=0, dtype=np.float64).reshape(x.shape[1], *self.inputs[n])
            axes = tuple(range(1, by_place.ndim))
            spikes.append(by_place.sum(axis=axes))
            additions.append((by_place * asarray_like(self.fan_out(n), by_place)).sum(axis=axes))
        return xp.stack(spikes), xp.stack(additions)
