"""A VAE with discrete latent variables on one page: from a batch of digits to a step of Adam.

    python scripts/minimal_vae.py

It has no flags and no folders; change the constants. `scripts/train_vae.py` is the long way: the same numbers, with
checkpoints, pictures, other data and other optimizers.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

if __name__ == "__main__":  # a signal is a line, here too
    for n in (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):
        if signal.getsignal(n) is not signal.SIG_IGN:
            signal.signal(n, lambda *_: os._exit(os.write(2, b"minimal_vae.py: interrupted.\n") and 130))

from estimators import create
from minigrad import Rng
from minigrad.fused import bce_with_logits
from minigrad.optim import Adam
from models.data import load_images
from models.vae import BernoulliVAE, CategoricalVAE

ESTIMATOR = "reinmax"  # any name of estimators.ESTIMATORS, with options as in "rloo:samples=4"
EPOCHS, BATCH, LEARNING_RATE, SEED = 20, 100, 1e-3, 0


def train(name: str = ESTIMATOR) -> Iterator[tuple[float, float]]:
    """Train, and yield (mean −ELBO of the training images, −ELBO of the test images) after each epoch, in nats."""
    images = load_images("digits")  # train (1437, 64) and test (360, 64), gray values in [0, 1]
    rng = Rng(SEED)  # every random number has an address: rng.site(name).at(step)
    estimator = create(name)
    if estimator.family.name == "categorical":  # 8 variables of 8 classes: logits (B, 8, 8)
        model = CategoricalVAE(64, variables=8, categories=8, rng=rng.site("weights"))
    else:  # 24 bits: logits (B, 24)
        model = BernoulliVAE(64, variables=24, rng=rng.site("weights"))
    optimizer, step = Adam(model.parameters(), LEARNING_RATE), 0

    for epoch in range(EPOCHS):
        order, total = rng.site("order").at(epoch).permutation(len(images.train)), 0.0
        for start in range(0, len(order), BATCH):
            x = images.train[order[start : start + BATCH]]
            theta = model.theta(x)  # the encoder's output, from which the estimator draws d
            logits = theta * estimator.logit_scale  # those of q(d|x); the scale is 1 for nearly all estimators
            reconstruction = lambda d: bce_with_logits(model.decode(d), x)  # noqa: B023  −log p(x|d), one number each
            bound_of_one = lambda d: reconstruction(d) + model.log_q(logits, d) - model.log_prior(d)  # noqa: B023

            optimizer.zero_grad()
            noise = rng.at(step).site("code")
            if estimator.multi_sample:  # VIMCO: its bound of several samples has the KL divergence inside
                loss = estimator(theta, bound_of_one, noise, inputs=x)
            else:  # the expectation is the estimator's, the KL divergence has a closed form
                loss = estimator(theta, reconstruction, noise, inputs=x) + model.kl(logits)
            loss.mean().backward()
            optimizer.step()
            estimator.update()  # learned baselines and running means learn from this step

            total, step = total + float(loss.data.sum()), step + 1
        model.logit_scale = estimator.logit_scale
        tested = sum(part.mean() for part in model.evaluate(images.test, rng.site("test").at(epoch + 1).site(0)))
        yield total / len(order), float(tested)


if __name__ == "__main__":
    for number, (trained, tested) in enumerate(train(), start=1):
        print(f"epoch {number:3}   train -ELBO {trained:7.3f}   test -ELBO {tested:7.3f}")
