"""Structured output prediction: a stochastic network that completes what it sees of an image.

    x (B, I)  --layer 0-->  d₁ ~ p(d₁|x)  --layer 1-->  d₂ ~ p(d₂|d₁)  -- … -->  logits of p(y|d) (B, O)

Every layer is linear, and its units are bits or one-hot variables. One upper half x of an image has many lower halves
y; a deterministic network gives their mean, pixel by pixel, and this one can choose (Raiko, Berglund, Alain & Dinh
2015; Jang, Gu & Poole 2017, section 4.1). Training lowers E[−log p(y|d)], evaluation gives −log (1/M) Σₘ p(y|dₘ).

No part of the network sees y before it answers, so with one sample d and y are independent given x, and the best that
it can do in training is p(y|d) = p(y|x): its noise is a regulariser. Several samples, −log (1/M) Σₘ p(y|dₘ) in training
as well, reward a network whose samples differ, since one of them has to be right.

The estimators nest: the cost of layer l is what the estimator of layer l + 1 says of the network above it.

    cost₁(d₁) = estimator₂(θ₂(d₁), cost₂)        cost₂(d₂) = −log p(y|d₂)

So a score function weighs its layer by the whole cost that follows, and a sample with a rule passes the gradient on.
Three things make that right. The noise of a layer has one address: an estimator that evaluates cost₁ at several points
sees one function of d₁, and what is unbiased for every function is so for each noise, hence on average. The weights
get their gradient from the evaluations that the value is made of, not from those that serve a control variate
(`estimators.base.value_and_grad`). And each layer's estimator has a state of its own, and learns from the first
evaluation after its `update`, which is at a sample. What would be wrong is a value that is not linear in the cost,
which here is an estimate: a bound of several samples is for the last layer only, and score functions train with one.
"""

from __future__ import annotations

import itertools
import math

import numpy as np

from minigrad import Rng, Tensor, no_grad
from minigrad.backend import array_module
from minigrad.fused import bce_with_logits, softmax
from minigrad.nn import Linear, Module, xavier_uniform
from minigrad.ops import logsumexp, sigmoid


class StochasticNetwork(Module):
    """inputs I, outputs O.  variables, categories: a layer has L one-hot variables of K classes, d (B, L, K), or, with
    categories=None, L bits, d (B, L).  layers: how many of them.  All ≥ 1 (ValueError).

    The defaults are the published network, 392-200-200-392; variables=20, categories=10 is the categorical one.
    rng: where the initial weights come from (Glorot's; the biases are 0).  y is (B, O) in [0, 1], binary or gray.

    logit_scale: one number for each layer, whose samples have the logits logit_scale·θ. It is 1 but for estimators that
    draw their samples so; a network that is trained takes it from its estimators, like a temperature.
    """

    def __init__(
        self, inputs=392, outputs=392, variables=200, categories=None, layers=2, *, rng: Rng, dtype=np.float32
    ):
        if min(inputs, outputs, variables, layers, 1 if categories is None else categories) < 1:
            raise ValueError(
                f"sizes must be at least 1, got inputs {inputs}, outputs {outputs}, variables {variables}, "
                f"categories {categories}, layers {layers}."
            )
        self.family = "bernoulli" if categories is None else "categorical"
        self.latent_shape = (variables,) if categories is None else (variables, categories)
        sizes = itertools.pairwise([inputs, *[math.prod(self.latent_shape)] * layers, outputs])
        options = {"init": xavier_uniform, "bias": 0.0, "dtype": dtype}
        self.layers = [Linear(i, o, rng.site(n), **options) for n, (i, o) in enumerate(sizes)]
        self.logit_scale = [1.0] * layers

    @property
    def depth(self) -> int:
        """How many stochastic layers there are."""
        return len(self.layers) - 1

    # -- the parts

    def logits(self, l: int, below) -> Tensor:
        """θ of stochastic layer l given the layer below it, or, for l = depth, the logits of p(y|d).

        below: a Tensor, x (..., I) for l = 0, else d (..., L, K) or (..., L)
        """
        if l > 0:
            below = below.reshape(*below.shape[: below.ndim - len(self.latent_shape)], math.prod(self.latent_shape))
        theta = self.layers[l](below)
        return theta if l == self.depth else theta.reshape(*theta.shape[:-1], *self.latent_shape)

    def draw(self, logits, rng: Rng):
        """Hard d with these logits, an array like them."""
        return rng.bernoulli(logits) if self.family == "bernoulli" else rng.one_hot(logits)

    # -- training

    def cost(self, x, y, estimators, rng: Rng, samples: int = 1) -> Tensor:
        """E[−log p(y|d)] with one sample, or −log (1/M) Σₘ p(y|dₘ) with M, (B,) in nats, with all gradients attached.

        x (B, I), y (B, O): arrays.  estimators: one for each stochastic layer, the first one next to x.  samples: M.
        ValueError if there are too many estimators or too few, if one serves two layers, is for the other kind of
        variables, or cannot be nested; for M > 1, if one of them is no sample with a rule (`estimators.Sampler`).
        ValueError, too, for a y of another shape.
        """
        self.check(estimators, samples)
        self._check_targets(x, y)
        self.logit_scale = [estimator.logit_scale for estimator in estimators]
        if samples == 1:
            return self._cost_given(Tensor(x), 0, y, estimators, rng)
        x, y = (array_module(a).concatenate([a] * samples) for a in (x, y))
        costs = self._cost_given(Tensor(x), 0, y, estimators, rng).reshape(samples, -1)
        return math.log(samples) - logsumexp(-costs, axis=0)

    def _cost_given(self, below, l, y, estimators, rng):
        """E[−log p(y|d)] over layer l and those above it, given the layer below."""
        theta = self.logits(l, below)
        if l == self.depth:
            return bce_with_logits(theta, y)
        cost = lambda d: self._cost_given(d, l + 1, y, estimators, rng)
        return estimators[l](theta, cost, rng.site(l), inputs=below.data)

    def check(self, estimators, samples: int = 1) -> None:
        """ValueError, one sentence, for estimators that cannot train the network: see `cost`."""
        if samples < 1:
            raise ValueError(f"samples must be at least 1, got {samples}.")
        if len(estimators) != self.depth or len({id(e) for e in estimators}) < self.depth:
            raise ValueError(
                f"a network of {self.depth} stochastic layers needs as many estimators, each with a state of its own: "
                f"got {len(estimators)}, {len({id(e) for e in estimators})} of them different."
            )
        for l, estimator in enumerate(estimators):
            estimator.check_family(self.family, f"layer {l}")
            if samples > 1 and not estimator.single_sample:
                raise ValueError(
                    f"{estimator.title} is no sample with a rule: it estimates the gradient of a mean of costs, which "
                    f"the bound of {samples} samples is not; train with one."
                )
            if estimator.multi_sample and l < self.depth - 1:
                raise ValueError(
                    f"{estimator.title} is a bound of several samples and not linear in their costs, which are "
                    f"estimates for all layers but the last: take another one for layer {l} of {self.depth}."
                )

    def _check_targets(self, x, y) -> None:
        """ValueError unless y is (B, O): one row, or one column, would be compared with all."""
        shape = (len(x), *self.layers[-1].bias.shape)
        if y.shape != shape:
            raise ValueError(f"y must be (B, O), which is {shape} for this x, got {y.shape}.")

    def mean_field(self, x) -> Tensor:
        """The logits of y in the deterministic network that passes probabilities on instead of samples.  -> (B, O)"""
        below, mean = Tensor(x), sigmoid if self.family == "bernoulli" else softmax
        for l in range(self.depth):
            below = mean(self.logits(l, below))
        return self.logits(self.depth, below)

    # -- evaluation, with hard samples and no gradient

    def sample(self, x, n: int, rng: Rng):
        """The logits of p(y|d) for n samples d of each x, an array (n, B, O)."""
        with no_grad():
            theta = self.logits(0, Tensor(x)).data
            theta = array_module(theta).broadcast_to(theta, (n, *theta.shape))
            for l in range(self.depth):
                d = self.draw(theta * self.logit_scale[l], rng.site(l))
                theta = self.logits(l + 1, Tensor(d)).data
        return theta

    def nll(self, x, y, rng: Rng, samples: int = 1000, chunk: int = 100):
        """−log (1/M) Σₘ p(y|dₘ) with M hard samples, (B,) in nats: above −log p(y|x) in the mean, and tight as M → ∞.

        chunk: how many samples are drawn at a time.  ValueError if it or `samples` is below 1, or for a y of another
        shape.
        """
        if samples < 1 or chunk < 1:
            raise ValueError(f"samples and chunk must be at least 1, got {samples} and {chunk}.")
        self._check_targets(x, y)
        parts = []
        for start in range(0, samples, chunk):
            logits = self.sample(x, min(chunk, samples - start), rng.site(start))
            parts.append(-bce_with_logits.rule(logits, y)[0])
        return math.log(samples) - logsumexp.rule(array_module(logits).concatenate(parts), axis=0)[0]
