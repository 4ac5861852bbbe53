"""Conditional computation (Bengio, Léonard & Courville 2013): experts behind sparse stochastic gates.

    x (B, D) --W₀, b₀-->  H (B, N), N linear experts  ------------>  H ⊙ h  --W₃, b₃-->  logits of the K classes
    x (B, D) --W₁, b₁-->  t = tanh (B, G), the gater  --W₂, b₂-->  a (B, N)  --estimator-->  gates h (B, N)

An expert whose gate is 0 contributes nothing, so it need not be computed: at test time a gate is on where σ(a) exceeds
a threshold, and `Predictor` then touches the columns of W₀ and the rows of W₃ of these experts only. An additional cost
keeps about a tenth of the gates on. The gates' distribution and their gradient are the estimator's, which the model is
handed; what the model knows of them is their `unit`:

    unit         drawn, in training              when on, at test time   name in the paper
    "bit"        b ~ Bernoulli(σ(a))             1                       stochastic binary neuron, straight-through
    "smooth"     b √σ(a), b ~ Bernoulli(√σ(a))   √σ(a)                   stochastic times smooth
    "rectifier"  max(0, a + z)                   max(0, a)               noisy rectifier; a baseline without z
    "sigmoid"    σ(a), or σ(a + z): never off    σ(a)                    baselines

The paper's eq. 3 draws h = 1[z > σ(a)] with z uniform, which is on with probability 1 − σ(a); meant is z < σ(a). From
the authors' code come the 1e-6 in the sparsity cost, the controller of λ, the initial values, and the Beta noise in the
logits of the smooth units.
"""

from __future__ import annotations

import math

import numpy as np
from scipy.special import betaincinv

from minigrad import Rng, Tensor, no_grad
from minigrad.backend import Array, array_module, asarray_like, to_host
from minigrad.checkpoint import StateError
from minigrad.fused import cross_entropy
from minigrad.kernels import inner
from minigrad.nn import Linear, Module, normal, xavier_uniform
from minigrad.ops import exp, log, relu, sigmoid, softplus, stable_sigmoid, tanh

EPSILON = 1e-6  # inside the logarithms of the sparsity cost
NONZERO = 15  # weights into each rectifier gate that do not begin at 0


def root_sigmoid(a):
    """√σ(a) = e^(−½ softplus(−a)) of a Tensor: its derivative stays finite where σ(a) underflows."""
    return exp(-0.5 * softplus(-a))


def _value_of_smooth(a):
    return array_module(a).sqrt(stable_sigmoid(a))


# unit -> (its value where it is on, of an array a;  P(h ≠ 0) of a Tensor a, where a sparsity cost needs it)
UNITS = {
    "bit": (lambda a: array_module(a).ones_like(a), sigmoid),
    "smooth": (_value_of_smooth, root_sigmoid),
    "rectifier": (lambda a: array_module(a).maximum(a, 0.0), None),
    "sigmoid": (stable_sigmoid, None),
}


# ---- what keeps the gates sparse


def activity_cost(p, target: float) -> Tensor:
    """−Σᵢ [s log p̄ᵢ + (1 − s) log(1 − p̄ᵢ)],  p̄ᵢ the mean of expert i's probability over the batch.

    Least where every p̄ᵢ = s: each expert is on for a fraction s of the examples.    p (B, N) a Tensor -> a scalar
    """
    mean = p.mean(axis=0)
    return -(target * log(mean + EPSILON) + (1.0 - target) * log(1.0 - mean + EPSILON)).sum()


class Controller:
    """λ of the rectifiers' cost λ Σ|h| (over experts and batch), which follows the fraction ŝ of gates that are on:

        λ ← λ − δ λ [s − ŝ > 0.01] + δ λ [s − ŝ < −0.01],   then clipped to [1e-13, 1]

    target s in (0, 1); weight: λ at first; decay: δ.  λ is an array without axes where the model lives, so that no step
    waits for the device.
    """

    SLACK, LOW, HIGH = 0.01, 1e-13, 1.0

    def __init__(self, target: float, weight: float, like, decay: float = 0.1):
        self.target, self.decay = target, decay
        self.weight = asarray_like(np.array(weight, like.dtype), like)

    def update(self, active) -> None:
        """After a step with the fraction `active` of gates on (an array without axes)."""
        below, above = self.target - active > self.SLACK, self.target - active < -self.SLACK
        change = self.decay * self.weight
        self.weight = (self.weight - below * change + above * change).clip(self.LOW, self.HIGH)

    def state_dict(self) -> dict[str, np.ndarray]:
        return {"weight": np.array(to_host(self.weight))}

    def load_state_dict(self, state: dict[str, np.ndarray]) -> None:
        """StateError if the state is not that of a controller."""
        if state.keys() != {"weight"} or state["weight"].shape != self.weight.shape:
            raise StateError(
                "the saved state is not that of a controller: load one that was saved by its state_dict()."
            )
        self.weight = asarray_like(state["weight"], self.weight)


class BetaNoise:
    """What the authors add to the logits of smooth units in training:  c (z − ½),  z ~ Beta(α, β).

        α = (s (β − 2) + 1) / (1 − s), so that z has its mode at s, and  c = |log(s⁻² − 1)|, where σ(±c) = s² or 1 − s²

    At test time they add its mean. A constant in the logits is a part of the bias b₂, so here b₂ begins at `mean`,
    `draw` has mean 0, and the trained network needs no more than its weights.

    target s in (0, 1), beta β > 1: ValueError otherwise.  Draws come from a table of 4,096 quantiles.
    """

    QUANTILES = 4096

    def __init__(self, target: float, beta: float):
        if not (0.0 < target < 1.0 and 1.0 < beta < math.inf):
            raise ValueError(f"Beta noise needs a target between 0 and 1 and a finite β > 1, got {target} and {beta}.")
        alpha, scale = (target * (beta - 2.0) + 1.0) / (1.0 - target), abs(math.log(target**-2 - 1.0))
        z = betaincinv(alpha, beta, (np.arange(self.QUANTILES) + 0.5) / self.QUANTILES)
        self.mean = scale * float(z.mean() - 0.5)
        self.table = scale * (z - 0.5) - self.mean
        self.sent: dict[tuple, Array] = {}  # the table for each kind of array and dtype, sent to a device once

    def draw(self, rng: Rng, shape, like):
        """An array of the shape, with the dtype and on the device of `like`."""
        u = rng.uniform(shape, like=like)
        key = type(like), like.dtype
        if key not in self.sent:
            self.sent[key] = asarray_like(self.table.astype(like.dtype), like)
        return self.sent[key][(u * self.QUANTILES).astype(np.int64)]


class DenseGate:
    """A baseline's gates, called as an estimator is: σ(a + noise·z) or max(0, a + noise·z) with z ~ N(0, 1), without
    bits, differentiated as they stand.   unit: "sigmoid" or "rectifier"."""

    logit_scale = 1.0

    def __init__(self, unit: str, noise: float = 0.0):
        self.function, self.noise = {"sigmoid": sigmoid, "rectifier": relu}[unit], noise

    def check_family(self, family: str) -> None:
        """It has no bits, but takes their place."""

    def __call__(self, logits, cost, rng, inputs=None) -> Tensor:
        if self.noise:
            logits = logits + self.noise * rng.normal(logits.shape, like=logits.data)
        return cost(self.function(logits))


# ---- the network


def sparse_normal(rng, shape, dtype=np.float32):
    """N(0, 1) at 15 random places of each column (all, if there are fewer), else 0 (Martens 2010)."""
    rank = rng.site("places").uniform(shape).argsort(axis=0).argsort(axis=0)
    return normal(rng, shape, dtype, std=1.0) * (rank < NONZERO)


def four_xavier(rng, shape, dtype=np.float32):
    """U(±4√(6/(I+O))), for the inputs of sigmoids (Glorot & Bengio 2010)."""
    return 4.0 * xavier_uniform(rng, shape, dtype)


class ConditionalNetwork(Module):
    """pixels D, classes K, experts N, gater G: all ≥ 1.   unit: what the gates are, see above.  ValueError otherwise.

    Initial values as published: U(±√(6/(I+O))), four times that for the gates' weights W₂, or 15 normal ones in each
    column for rectifiers; biases 0, or the mean of the noise.   noise: a BetaNoise for the logits in training, or None
    """

    def __init__(
        self,
        pixels=784,
        classes=10,
        *,
        experts=2000,
        gater=400,
        unit: str = "bit",
        noise: BetaNoise | None = None,
        rng: Rng,
        dtype=np.float32,
    ):
        if unit not in UNITS:
            raise ValueError(f"unknown unit {unit!r}; the known ones are {', '.join(UNITS)}.")
        if min(pixels, classes, experts, gater) < 1:
            raise ValueError(
                f"sizes must be at least 1, got pixels {pixels}, classes {classes}, experts {experts}, gater {gater}."
            )
        self.unit, self.noise = unit, noise
        layer = lambda i, o, name, init, bias=0.0: Linear(i, o, rng.site(name), init=init, bias=bias, dtype=dtype)
        self.experts = layer(pixels, experts, "experts", xavier_uniform)  # W₀, b₀
        self.gater = layer(pixels, gater, "gater", xavier_uniform)  # W₁, b₁
        start, bias = sparse_normal if unit == "rectifier" else four_xavier, noise.mean if noise else 0.0
        self.gates = layer(gater, experts, "gates", start, bias)  # W₂, b₂
        self.output = layer(experts, classes, "output", xavier_uniform)  # W₃, b₃

    def gate_logits(self, x) -> Tensor:
        """a (B, N).   x (B, D)"""
        return self.gates(tanh(self.gater(x)))

    def cost(self, x, labels, estimator, rng: Rng) -> tuple[Tensor, Tensor, Tensor]:
        """(−log p(label) of each example (B,) with all gradients attached, the gates' noisy logits (B, N), the gates of
        the estimator's first evaluation (B, N)).   x (B, D), labels (B,) integers on the model's device

        ValueError for an estimator of other variables than bits.
        """
        estimator.check_family("bernoulli")
        H, a, seen = self.experts(x), self.gate_logits(x), []
        if self.noise:
            a = a + self.noise.draw(rng.site("noise"), a.shape, a.data)

        def cost(h):
            seen.append(h)
            return cross_entropy(self.output(H * h), labels)

        value = estimator(a, cost, rng, inputs=x)
        return value, a if estimator.logit_scale == 1.0 else a * estimator.logit_scale, seen[0]

    def sparsity_cost(self, a, h, target: float):
        """What λ multiplies: `activity_cost` of the logits a, or Σ|h| for rectifiers, through the unit's own rule."""
        probability = UNITS[self.unit][1]
        return h.sum() if probability is None else activity_cost(probability(a), target)  # h ≥ 0, so that |h| = h

    def limit_columns(self, most: float) -> None:
        """Shrink every column of W₀, W₁ and W₂, what enters one unit, to a norm of at most `most`."""
        for layer in (self.experts, self.gater, self.gates):
            w, xp = layer.weight.data, array_module(layer.weight.data)
            w *= most / xp.maximum(xp.sqrt(inner(w.T, w.T)), most)

    # -- test time

    def evaluate(self, x, threshold: float):
        """(logits (B, K), how many gates are on (B,)) with deterministic gates, as arrays where the model lives. All
        experts are computed, and those with a ≤ threshold multiplied by 0."""
        with no_grad():
            a = self.gate_logits(x).data
            on = a > threshold
            h = Tensor(on * UNITS[self.unit][0](a))
            return self.output(self.experts(x) * h).data, on.sum(axis=1)

    def threshold(self, a, target: float) -> float:
        """What a fraction `target` of the logits a (any shape, on the host) exceeds; −∞ for target = 1.

        A rectifier is 0 where a ≤ 0, whatever the target: its threshold is at least 0.
        """
        least = 0.0 if self.unit == "rectifier" else -math.inf
        a, on = a.reshape(-1), round(target * a.size)
        return least if on >= a.size else max(least, float(np.partition(a, -on - 1)[-on - 1]))

    def multiply_adds(self, active: float) -> dict[str, float]:
        """Multiply-adds of the matrix products for one example with `active` experts on:

        gater    D G + G N
        experts  active (D + K)
        dense    N (D + K), what a network without gates has
        """
        (D, N), G, K = self.experts.weight.shape, self.gater.weight.shape[1], self.output.weight.shape[1]
        return {"gater": D * G + G * N, "experts": active * (D + K), "dense": N * (D + K)}

    def predictor(self, threshold: float) -> Predictor:
        return Predictor(self, threshold)


class Predictor:
    """The trained network at test time, on the host: experts that are off are not computed.

    What is saved in multiply-adds is saved in time for one example at a time and thousands of experts; in a batch, a
    matrix product that shares W₀ among all examples is faster than fetching the weights that each one needs.

    threshold: of the logits a; −∞ for gates that are all on.  It keeps a copy of the weights.
    """

    def __init__(self, model: ConditionalNetwork, threshold: float):
        self.threshold, self.value = threshold, UNITS[model.unit][0]
        copies = model.state_dict()  # in the order of the layers, so that training may go on
        self.W_0, self.b_0, self.W_1, self.b_1, self.W_2, self.b_2, self.W_3, self.b_3 = copies.values()
        self.columns = np.ascontiguousarray(self.W_0.T)  # an expert's weights side by side
        self.room = np.empty_like(self.columns)  # fetching weights into fresh memory takes twice as long

    def gate_logits(self, x):
        return np.tanh(x @ self.W_1 + self.b_1) @ self.W_2 + self.b_2

    def __call__(self, x):
        """(logits (B, K), how many experts were computed for each example (B,)).   x (B, D) on the host"""
        a = self.gate_logits(x)
        y, active = np.empty((len(x), len(self.b_3)), x.dtype), np.empty(len(x), np.int64)
        for n, (x_n, a_n) in enumerate(zip(x, a, strict=True)):
            on = np.flatnonzero(a_n > self.threshold)
            W_on = np.take(self.columns, on, axis=0, out=self.room[: len(on)], mode="clip")
            H = W_on @ x_n + self.b_0[on]
            y[n] = (H * self.value(a_n[on])) @ self.W_3[on] + self.b_3
            active[n] = len(on)
        return y, active

    def all_experts(self, x):
        """The same logits, with every expert computed and those that are off multiplied by 0."""
        a = self.gate_logits(x)
        return ((x @ self.W_0 + self.b_0) * ((a > self.threshold) * self.value(a))) @ self.W_3 + self.b_3

    def without_gates(self, x):
        """What a network of as many experts without gates would compute; only its time means something."""
        return (x @ self.W_0 + self.b_0) @ self.W_3 + self.b_3
