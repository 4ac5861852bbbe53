"""Train a VAE with categorical or Bernoulli latent variables, with any of the estimators.

    python scripts/train_vae.py                                    # the embedded 8×8 digits, half a minute
    python scripts/train_vae.py --data mnist --estimator st-gs --tau 0.5 --epochs 20
    python scripts/train_vae.py --resume runs/NAME                 # goes on bit for bit where it stopped

All flags are listed by --help.
"""

from __future__ import annotations

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))
from experiments.start import before_numpy

before_numpy()

import numpy as np

from experiments.errors import command
from experiments.loop import batches, run
from experiments.pictures import curves, page
from experiments.vae import VAEExperiment
from minigrad import Rng, grad

EVALUATION_BATCH = 1000


class VAE(VAEExperiment):
    """One run of the VAE that `experiments.vae` builds."""

    losses = ("Σ reconstruction", "Σ KL")  # over the batch
    progress_key = "test"
    may_change = ("epochs", "data_dir", "bound_samples", "gradient_draws")

    @classmethod
    def folder_parts(cls, c):
        return c.data, c.estimator.replace(":", "-"), f"s{c.seed}"

    def step(self, index, rng: Rng) -> tuple:
        """Update the parameters on the images `index` (an integer array on the device)."""
        x = self.binarised(self.train[index], rng.site("pixels"))
        self.optimizer.zero_grad()
        reconstruction, kl = self.model.negative_elbo(x, self.estimator, rng.site("code"))
        (reconstruction + kl).mean().backward()
        self.optimizer.step()
        return reconstruction.data.sum(), kl.data.sum()

    # -- evaluation, always with hard samples

    def evaluate(self, images, rng: Rng) -> tuple[float, float]:
        """(reconstruction, KL) per image over all `images`, one hard sample each."""
        parts, xp = [], self.backend.xp
        for start, x in batches(images, EVALUATION_BATCH):
            reconstruction, kl = self.model.evaluate(x, rng.site(start))
            parts.append(xp.stack([reconstruction.sum(), kl.sum()]))
        totals = self.backend.to_host(xp.stack(parts)).sum(axis=0, dtype=np.float64)
        return float(totals[0]) / len(images), float(totals[1]) / len(images)

    def report(self, losses, speed: float) -> dict:
        reconstruction, kl = losses.sum(axis=0) / len(self.train)
        epoch = self.epoch + 1
        line = {"epoch": epoch}
        if self.estimator.support == "soft" or self.estimator.multi_sample:  # another objective than −ELBO was trained
            line["train_relaxed" if self.estimator.support == "soft" else "train_bound"] = reconstruction + kl
            rng = self.rng.site("train, hard").at(epoch)
            reconstruction, kl = self.evaluate(self.binarised(self.train, rng.site("pixels")), rng)
        line |= {"train": reconstruction + kl, "train_reconstruction": reconstruction, "train_kl": kl}
        test_reconstruction, test_kl = self.evaluate(self.test, self.rng.site("test").at(epoch))
        line["test"] = test_reconstruction + test_kl
        line |= {"test_reconstruction": test_reconstruction, "test_kl": test_kl}
        return line | self.images_per_second(speed)

    def gradient_noise(self) -> dict[str, float]:
        """Of the encoder's gradient over the draws of the estimator, on one batch of (at most) 1,000 training images:
        the variance summed over the parameters, and the squared norm of the mean (as Fan et al. 2022 measure it)."""
        x = self.binarised(self.train[:EVALUATION_BATCH], self.rng.site("gradient pixels"))
        parameters = self.model.encoder.parameters()
        mean, squares, n = 0.0, 0.0, self.config.gradient_draws
        for draw in range(n):
            reconstruction, kl = self.model.negative_elbo(x, self.estimator, self.rng.site("gradient").at(draw))
            g = self.backend.xp.concatenate([g.reshape(-1) for g in grad((reconstruction + kl).mean(), parameters)])
            change = g - mean  # Welford's recurrence
            mean = mean + change / (draw + 1)
            squares = squares + change * (g - mean)
        to_float = lambda a: float(self.backend.to_host(a.sum(dtype=np.float64)))
        return {"gradient_variance": to_float(squares) / (n - 1), "gradient_norm2": to_float(mean * mean)}

    def importance_bound(self) -> float:
        rng, total = self.rng.site("bound"), 0.0
        for start, x in batches(self.test, 100):
            bound = self.model.importance_bound(x, rng.site(start), self.config.bound_samples)
            total += float(self.backend.to_host(bound).sum(dtype=np.float64))
        return total / len(self.test)

    # -- the end

    def final(self, folder) -> dict:
        c, line = self.config, {}
        if c.bound_samples:
            line |= {"test_bound": self.importance_bound(), "bound_samples": c.bound_samples}
        if c.gradient_draws:
            line |= self.gradient_noise() | {"gradient_draws": c.gradient_draws}
        return line and {"epoch": self.epoch} | line

    def draw(self, folder) -> None:
        """The curve of −ELBO, a page of reconstructions, a page of samples from the prior."""
        to_host, rng = self.backend.to_host, self.rng.site("pictures")
        curves(folder.path / "curve.png", folder.metrics(), f"{self.config.estimator} on {self.config.data}")
        x = self.test[:50]
        pairs = np.stack([to_host(x), to_host(self.model.reconstruct(x, rng))], axis=1).reshape(-1, x.shape[1])
        title = "test images, each left of its reconstruction"
        page(folder.path / "reconstructions.png", pairs, self.images.shape, title)
        samples = to_host(self.model.sample(100, rng.site("prior")))
        page(folder.path / "samples.png", samples, self.images.shape, "samples from the prior")

    def last_words(self, metrics) -> str:
        last = [line for line in metrics if "train" in line][-1]
        return f"final train -ELBO {last['train']:.4f} test -ELBO {last['test']:.4f}"


@command
def main(argv=None) -> int:
    return run(VAE, argv)


if __name__ == "__main__":
    sys.exit(main())
