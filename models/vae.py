"""Variational autoencoders with a discrete code.

    x (B, D)  --encoder-->  logits θ of q(d|x)  --estimator-->  code d ~ q(d|x)  --decoder-->  logits of p(x|d) (B, D)

`CategoricalVAE` has L independent variables of K classes each, θ and d (B, L, K); `BernoulliVAE` has L independent
bits, (B, L). The prior p(d) is uniform, or learned, with logits of its own for each variable; the pixels are Bernoulli.
The objective is the evidence lower bound of Kingma & Welling (2014), per image and in nats:

    −ELBO(x) = E_{d ~ q(·|x)}[−log p(x|d)] + KL(q(·|x) ‖ p(d))

The KL term has a closed form and is differentiated as it stands. The expectation is what an estimator is for: the
model gives it the function d -> −log p(x|d), and gets back a value with a gradient for the encoder attached.
"""

from __future__ import annotations

import math

import numpy as np

from minigrad import Rng, Tensor, no_grad
from minigrad.backend import array_module
from minigrad.fused import bce_with_logits, kl_to_fair_coin, kl_to_uniform, log_softmax, softmax
from minigrad.nn import MLP, Module, parameter
from minigrad.ops import logsumexp, sigmoid, softplus, stable_sigmoid


class DiscreteVAE(Module):
    """What both kinds share: the network of Jang, Gu & Poole (2017) and of its successors, D-512-256-code-256-512-D
    with ReLUs, its bounds, and its samples.

    pixels D, code_shape (without the batch axis), hidden (encoder widths; the decoder mirrors them; () for linear maps
    only, as 784-200-784): all ≥ 1 (ValueError).   slope: of leaky ReLUs, 0 for plain ones.
    learned_prior: is p(d) trained, too?
    rng: where the initial weights come from.  Inputs x are (B, D) in [0, 1], binary or gray.

    logit_scale: q(d|x) has the logits logit_scale·θ. It is 1 but for estimators that draw their samples so; a model
    takes it from the estimator that trains it, like a temperature.
    """

    def __init__(self, pixels: int, latent_shape: tuple, hidden, rng: Rng, dtype, slope=0.0, learned_prior=False):
        if min(pixels, *latent_shape, *hidden) < 1:
            raise ValueError(f"sizes must be at least 1, got pixels {pixels}, latent {latent_shape}, hidden {hidden}.")
        self.latent_shape, self.logit_scale, options = latent_shape, 1.0, {"slope": slope, "dtype": dtype}
        self.encoder = MLP([pixels, *hidden, math.prod(latent_shape)], rng.site("encoder"), **options)
        self.decoder = MLP([math.prod(latent_shape), *reversed(hidden), pixels], rng.site("decoder"), **options)
        self.prior = parameter(np.zeros(latent_shape, dtype)) if learned_prior else None  # the logits of p(d)

    # what the two families differ in

    family = ""  # as an estimator names it

    def kl(self, logits) -> Tensor:
        """KL(q(·|x) ‖ p(d)) for each example, (B,)."""
        raise NotImplementedError

    def log_prior(self, d):
        """log p(d), summed over the variables: (..., B), or a number where it is the same for all d."""
        raise NotImplementedError

    def log_q(self, logits, d) -> Tensor:
        """log q(d|x), summed over the variables; differentiable in both.

        logits (B, ...), d (..., B, ...) -> (..., B)
        """
        raise NotImplementedError

    def draw(self, logits, rng: Rng):
        """A hard code d ~ q(d|x), an array like the logits."""
        raise NotImplementedError

    # the model

    def theta(self, x) -> Tensor:
        """θ, what an estimator is given.   x (B, D) -> (B, ...)"""
        return self.encoder(x).reshape(x.shape[0], *self.latent_shape)

    def encode(self, x) -> Tensor:
        """The logits of q(d|x), logit_scale·θ.   x (B, D) -> (B, ...)"""
        return self._scaled(self.theta(x))

    def _scaled(self, theta) -> Tensor:
        return theta if self.logit_scale == 1.0 else theta * self.logit_scale

    def decode(self, d) -> Tensor:
        """The logits of p(x|d).   d (..., *latent_shape), a Tensor -> (..., D)"""
        leading = d.shape[: d.ndim - len(self.latent_shape)]
        return self.decoder(d.reshape(*leading, math.prod(self.latent_shape)))

    def negative_elbo(self, x, estimator, rng: Rng) -> tuple[Tensor, Tensor]:
        """(reconstruction −log p(x|d), KL), each (B,) in nats; their sum is −ELBO. Both carry gradients.

        For an estimator of a bound with several samples (VIMCO) the first one is −log mean p(x, d)/q(d|x), which has
        the KL divergence inside, and the second one is 0.
        ValueError for an estimator of the other kind of variables.
        """
        estimator.check_family(self.family)
        self.logit_scale = estimator.logit_scale
        theta = self.theta(x)
        logits = self._scaled(theta)
        reconstruct = lambda d: bce_with_logits(self.decode(d), x)
        if estimator.multi_sample:
            cost = lambda d: reconstruct(d) + self.log_q(logits, d) - self.log_prior(d)
            bound = estimator(theta, cost, rng, inputs=x)
            return bound, Tensor(array_module(bound.data).zeros_like(bound.data))
        return estimator(theta, reconstruct, rng, inputs=x), self.kl(logits)

    def evaluate(self, x, rng: Rng):
        """(reconstruction, KL) as arrays (B,), with one hard sample d ~ q(d|x) per image and no gradient."""
        with no_grad():
            logits = self.encode(x)
            d = Tensor(self.draw(logits.data, rng))
            return bce_with_logits(self.decode(d), x).data, self.kl(logits).data

    def importance_bound(self, x, rng: Rng, samples: int = 1000, chunk: int = 100):
        """−log (1/M) Σₘ p(x|dₘ) p(dₘ) / q(dₘ|x) with M hard samples: an upper bound of −log p(x), tighter than −ELBO
        and tight as M → ∞ (Burda, Grosse & Salakhutdinov 2016, eq. 8).   x (B, D) -> (B,) in nats

        chunk: how many samples are decoded at a time.  ValueError if it or `samples` is below 1.
        """
        if samples < 1 or chunk < 1:
            raise ValueError(f"samples and chunk must be at least 1, got {samples} and {chunk}.")
        log_weights = []
        with no_grad():
            logits = self.encode(x)
            xp = array_module(logits.data)
            for start in range(0, samples, chunk):
                shape = (min(chunk, samples - start), *logits.shape)
                d = Tensor(self.draw(xp.broadcast_to(logits.data, shape), rng.site(start)))
                log_likelihood = -bce_with_logits(self.decode(d), x)
                log_weights.append((log_likelihood + self.log_prior(d) - self.log_q(logits, d)).data)
        return math.log(samples) - logsumexp.rule(xp.concatenate(log_weights), axis=0)[0]

    def reconstruct(self, x, rng: Rng):
        """The mean image σ(decoder) for one hard code of each x.   (B, D) -> (B, D) in (0, 1)"""
        with no_grad():
            logits = self.encode(x)
            return stable_sigmoid(self.decode(Tensor(self.draw(logits.data, rng))).data)

    def sample(self, n: int, rng: Rng):
        """n images from the model: d from the prior, then the mean image.   -> (n, D) in (0, 1)"""
        like = self.decoder.parameters()[0].data
        logits = array_module(like).zeros((n, *self.latent_shape), dtype=like.dtype)
        if self.prior is not None:
            logits = logits + self.prior.data
        with no_grad():
            return stable_sigmoid(self.decode(Tensor(self.draw(logits, rng))).data)


class CategoricalVAE(DiscreteVAE):
    """L variables of K classes: θ and d are (B, L, K), d one-hot in the last axis."""

    family = "categorical"

    def __init__(
        self, pixels=784, variables=30, categories=10, hidden=(512, 256), *, rng: Rng, dtype=np.float32, **options
    ):
        super().__init__(pixels, (variables, categories), hidden, rng, dtype, **options)
        self.variables, self.categories = variables, categories
        self.uniform = -variables * math.log(categories)  # log p(d) of the uniform prior

    def kl(self, logits):
        """With the uniform prior's divergence Σ p log p + log K:  KL = that − log K − Σ p log p(d)."""
        kl = kl_to_uniform(logits).sum(axis=-1)
        if self.prior is None:
            return kl
        return kl + self.uniform - (softmax(logits) * log_softmax(self.prior)).sum(axis=(-2, -1))

    def log_prior(self, d):
        return self.uniform if self.prior is None else (d * log_softmax(self.prior)).sum(axis=(-2, -1))

    def log_q(self, logits, d):
        return (log_softmax(logits) * d).sum(axis=(-2, -1))

    def draw(self, logits, rng):
        return rng.one_hot(logits)


class BernoulliVAE(DiscreteVAE):
    """L bits: θ and d are (B, L), d zeros and ones."""

    family = "bernoulli"

    def __init__(self, pixels=784, variables=200, hidden=(512, 256), *, rng: Rng, dtype=np.float32, **options):
        super().__init__(pixels, (variables,), hidden, rng, dtype, **options)
        self.variables = variables
        self.uniform = -variables * math.log(2.0)

    def kl(self, logits):
        kl = kl_to_fair_coin(logits).sum(axis=-1)
        return kl if self.prior is None else kl + self.uniform - self.log_prior(sigmoid(logits))

    def log_prior(self, d):
        """Σ d log π + (1 − d) log(1 − π) = Σ dψ − softplus ψ,  π = σ(ψ).  Linear in d: its mean is its value at E d."""
        return self.uniform if self.prior is None else (d * self.prior - softplus(self.prior)).sum(axis=-1)

    def log_q(self, logits, d):
        return (d * logits - softplus(logits)).sum(axis=-1)

    def draw(self, logits, rng):
        return rng.bernoulli(logits)
