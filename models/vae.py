"""A variational autoencoder with a categorical code.

    x (B, D)  --encoder-->  logits θ (B, L, K)  --estimator-->  d (B, L, K)  --decoder-->  logits of the pixels (B, D)

L independent variables of K classes each, a uniform prior, Bernoulli pixels. The objective is the evidence lower bound
of Kingma & Welling (2014), per image and in nats:

    −ELBO(x) = E_{d ~ q(·|x)}[−log p(x|d)] + KL(q(·|x) ‖ uniform)

The KL term has a closed form and is differentiated as it stands. The expectation is what an estimator is for: the
model gives it the function d -> −log p(x|d), and gets back a value with a gradient for the encoder attached.
"""

from __future__ import annotations

import math

from minigrad import Rng, Tensor, no_grad
from minigrad.backend import array_module
from minigrad.fused import bce_with_logits, kl_to_uniform, log_softmax
from minigrad.nn import MLP, Module
from minigrad.ops import stable_sigmoid

import numpy as np


class CategoricalVAE(Module):
    """The network of Jang, Gu & Poole (2017) and of its successors: D-512-256-(L·K)-256-512-D with ReLUs.

    pixels D, variables L, categories K, hidden (encoder widths; the decoder mirrors them): all ≥ 1.
    rng: where the initial weights come from.  Inputs x are (B, D) in [0, 1], binary or gray.
    """

    def __init__(self, pixels=784, variables=30, categories=10, hidden=(512, 256), *, rng: Rng, dtype=np.float32):
        self.variables, self.categories = variables, categories
        code = variables * categories
        self.encoder = MLP([pixels, *hidden, code], rng.site("encoder"), dtype=dtype)
        self.decoder = MLP([code, *reversed(hidden), pixels], rng.site("decoder"), dtype=dtype)

    def encode(self, x) -> Tensor:
        """θ, the logits of q(d|x).   x (B, D) -> (B, L, K)"""
        return self.encoder(x).reshape(x.shape[0], self.variables, self.categories)

    def decode(self, d) -> Tensor:
        """The logits of p(x|d).   d (..., L, K), a Tensor -> (..., D)"""
        return self.decoder(d.reshape(*d.shape[:-2], self.variables * self.categories))

    def negative_elbo(self, x, estimator, rng: Rng) -> tuple[Tensor, Tensor]:
        """(reconstruction −log p(x|d), KL), each (B,) in nats; their sum is −ELBO. Both carry gradients."""
        logits = self.encode(x)
        reconstruction = estimator(logits, lambda d: bce_with_logits(self.decode(d), x), rng)
        return reconstruction, kl_to_uniform(logits).sum(axis=-1)

    def evaluate(self, x, rng: Rng):
        """(reconstruction, KL) as arrays (B,), with one hard sample d ~ q(d|x) per image and no gradient."""
        with no_grad():
            logits = self.encode(x)
            d = Tensor(rng.one_hot(logits.data))
            return bce_with_logits(self.decode(d), x).data, kl_to_uniform(logits).sum(axis=-1).data

    def importance_bound(self, x, rng: Rng, samples: int = 1000, chunk: int = 100):
        """−log (1/M) Σₘ p(x|dₘ) p(dₘ) / q(dₘ|x) with M hard samples: an upper bound of −log p(x), tighter than −ELBO
        and tight as M → ∞ (Burda, Grosse & Salakhutdinov 2016, eq. 8).   x (B, D) -> (B,) in nats

        chunk: how many samples are decoded at a time.
        """
        if samples < 1 or chunk < 1:
            raise ValueError(f"samples and chunk must be at least 1, got {samples} and {chunk}.")
        log_weights = []
        with no_grad():
            logits = self.encode(x)
            xp, log_q = array_module(logits.data), log_softmax(logits).data
            log_prior = -self.variables * math.log(self.categories)
            for start in range(0, samples, chunk):
                shape = (min(chunk, samples - start), *logits.shape)
                d = rng.site(start).one_hot(xp.broadcast_to(logits.data, shape))
                log_likelihood = -bce_with_logits(self.decode(Tensor(d)), x).data
                log_weights.append(log_likelihood + log_prior - (d * log_q).sum(axis=(-2, -1)))
        log_w = xp.concatenate(log_weights)
        m = log_w.max(axis=0)
        return -(m + xp.log(xp.exp(log_w - m).mean(axis=0)))

    def reconstruct(self, x, rng: Rng):
        """The mean image σ(decoder) for one hard code of each x.   (B, D) -> (B, D) in (0, 1)"""
        with no_grad():
            return stable_sigmoid(self.decode(Tensor(rng.one_hot(self.encode(x).data))).data)

    def sample(self, n: int, rng: Rng):
        """n images from the model: d from the uniform prior, then the mean image.   -> (n, D) in (0, 1)"""
        like = self.decoder.parameters()[0].data
        zeros = array_module(like).zeros((n, self.variables, self.categories), dtype=like.dtype)
        with no_grad():
            return stable_sigmoid(self.decode(Tensor(rng.one_hot(zeros))).data)
