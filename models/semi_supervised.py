"""A semi-supervised variational autoencoder: a few images with labels, many without, and one model for both.

    y ~ uniform over K classes       z ~ N(0, I)       x ~ p(x|y, z), Bernoulli pixels
    q(y|x)  the classifier           q(z|x, y) = N(μ, diag σ²)  the style, given the class

(Kingma, Rezende, Mohamed & Welling 2014, model M2; with a sampled class, Jang, Gu & Poole 2017, section 4.3.) What is
minimised is −ELBO, in nats per image. With a label the class is observed, without one it is a latent variable:

    L(x, y) = E_{z ~ q(z|x,y)}[−log p(x|y, z)] + KL(q(z|x, y) ‖ N(0, I)) − log p(y)
    U(x)    = Σ_y q(y|x) L(x, y) − H(q(y|x))
    J       = E_labelled[L(x, y) − α log q(y|x)] + E_unlabelled[U(x)]

(The entropy H stands outside the sum over y; eq. 10 of Jang et al. has it inside.) The term with α is there because
L does not mention the classifier: without it the labels would not teach q(y|x). Since −log p(y) = log K is the same
for all classes, and log K − H(q) = KL(q ‖ uniform),

    U(x) = E_{y ~ q(y|x)}[f(x, y)] + KL(q(y|x) ‖ uniform)            L(x, y) = f(x, y) + log K

with f = −log p(x|y, z) + KL(q(z|x, y) ‖ N(0, I)), one z = μ + σε for each image. The KL terms are in closed form. The
expectation over y is either the sum over all K classes, or one call of an estimator, which evaluates f at samples.
"""

from __future__ import annotations

import math

import numpy as np

from minigrad import Rng, Tensor, no_grad
from minigrad.backend import array_module
from minigrad.fused import bce_with_logits, cross_entropy, kl_to_standard_normal, kl_to_uniform, softmax
from minigrad.nn import MLP, Linear, Module, normal, parameter
from minigrad.ops import matmul, relu, split, stable_sigmoid
from minigrad.random import one_hot

NO_BOUND_OF_SEVERAL = "is a bound of several samples, which needs the density of each z; take an estimator of a mean."


class WithClass(Module):
    """An MLP of an input a and a class y, one-hot or between the classes. Its first layer is

        h = max(a W + y V + b, 0)        a (B, I)   y (..., B, K) or (..., 1, K)   ->   h (..., B, H)

    The product a W does not depend on y: it is made once for each row of a, however many classes the row meets.
    """

    def __init__(self, inputs: int, classes: int, hidden, outputs: int, rng: Rng, dtype):
        self.first = Linear(inputs, hidden[0], rng.site("first"), dtype=dtype)
        # one entry of a one-hot y is not 0, whatever K: a fan-in of 1, and the spread of U(±1)
        self.of_class = parameter(normal(rng.site("class"), (classes, hidden[0]), dtype, std=math.sqrt(1.0 / 3.0)))
        self.rest = MLP([*hidden, outputs], rng.site("rest"), dtype=dtype)

    def __call__(self, a, y) -> Tensor:
        return self.rest(relu(self.first(a) + matmul(y, self.of_class)))


class SemiSupervisedVAE(Module):
    """pixels D, classes K, latent M (the size of z), hidden (the widths of the hidden layers of all three networks):
    all ≥ 1 (ValueError).  rng: where the initial weights come from.

    The defaults are the dense networks of Kingma et al.  Inputs x are (B, D) in [0, 1], arrays on the model's device.
    logit_scale: q(y|x) has the logits logit_scale·θ. It is 1 but for estimators that draw their samples so; a model
    takes it from the estimator that trains it, like a temperature.
    """

    def __init__(self, pixels=784, classes=10, latent=50, hidden=(500,), *, rng: Rng, dtype=np.float32):
        if min(pixels, classes, latent, *hidden) < 1 or not hidden:
            raise ValueError(
                f"sizes must be at least 1, got pixels {pixels}, classes {classes}, latent {latent}, hidden {hidden}."
            )
        self.classes, self.logit_scale = classes, 1.0
        self.classifier = MLP([pixels, *hidden, classes], rng.site("classifier"), dtype=dtype)
        self.encoder = WithClass(pixels, classes, hidden, 2 * latent, rng.site("encoder"), dtype)
        self.decoder = WithClass(latent, classes, hidden, pixels, rng.site("decoder"), dtype)

    def classify(self, x) -> Tensor:
        """The logits of q(y|x), logit_scale·θ.   x (B, D) -> (B, K)"""
        return self._scaled(self.classifier(x))

    def _scaled(self, theta) -> Tensor:
        return theta if self.logit_scale == 1.0 else theta * self.logit_scale

    def style(self, x, y) -> tuple[Tensor, Tensor]:
        """μ and log σ² of q(z|x, y).   x (B, D), y (..., B or 1, K) -> (..., B, M) each"""
        return split(self.encoder(x, y), sections=2, axis=-1)

    def cost(self, x, y, rng: Rng) -> Tensor:
        """f(x, y) = −log p(x|y, z) + KL(q(z|x, y) ‖ N(0, I)).   x (B, D), y (..., B or 1, K) -> (..., B)

        All y of one image share one noise ε (B, M): every f stays an unbiased estimate, the differences between the
        classes have less variance, and the sum over the classes is what enumeration with `cost` gives.
        """
        mean, log_variance = self.style(x, y)
        z = mean + (0.5 * log_variance).exp() * rng.normal(mean.shape[-2:], like=x)
        return bce_with_logits(self.decoder(z, y), x) + kl_to_standard_normal(mean, log_variance)

    def _all_classes(self, x):
        """Every class for every image: y (K, 1, K)."""
        return one_hot(array_module(x).arange(self.classes), self.classes, x)[:, None]

    # -- the objective: two terms, each the mean of one of these

    def labelled(self, x, labels, rng: Rng, alpha: float = 1.0) -> Tensor:
        """L(x, y) − α log q(y|x), (B,).   labels (B,): integers in [0, K) on the model's device"""
        bound = self.cost(x, one_hot(labels, self.classes, x), rng) + math.log(self.classes)
        return bound + alpha * cross_entropy(self.classify(x), labels)

    def unlabelled(self, x, rng: Rng, estimator=None) -> Tensor:
        """U(x), (B,): by the sum over all classes, in one pass over K·B rows, or with an estimator of E_{y ~ q(y|x)}.

        ValueError for an estimator of a bound with several samples, or of bits.
        """
        if estimator is None:
            return self._marginal(x, self.classify(x), rng)
        estimator.check_family("categorical")
        if estimator.multi_sample:
            raise ValueError(f"{estimator.title} {NO_BOUND_OF_SEVERAL}")
        self.logit_scale = estimator.logit_scale
        theta, cost = self.classifier(x), lambda y: self.cost(x, y, rng.site("style"))
        return estimator(theta, cost, rng.site("class"), inputs=x) + kl_to_uniform(self._scaled(theta))

    def _marginal(self, x, logits, rng: Rng) -> Tensor:
        costs = self.cost(x, self._all_classes(x), rng.site("style"))
        return (softmax(logits) * costs.T).sum(axis=-1) + kl_to_uniform(logits)

    # -- evaluation

    def bound(self, x, rng: Rng):
        """U(x) with the class marginalised and one z, an array (B,)."""
        with no_grad():
            return self._marginal(x, self.classify(x), rng).data

    def predict(self, x):
        """The most probable class of each x, integers (B,)."""
        with no_grad():
            return self.classify(x).data.argmax(axis=-1)

    def analogies(self, x):
        """The mean images of all classes in the style of each x: z is the mean of q(z|x, ŷ) for the most probable ŷ.

        x (B, D) -> (B, K, D) in (0, 1)
        """
        with no_grad():
            y = one_hot(self.predict(x), self.classes, x)
            z, _ = self.style(x, y)
            return stable_sigmoid(self.decoder(z, self._all_classes(x)).data).swapaxes(0, 1)
