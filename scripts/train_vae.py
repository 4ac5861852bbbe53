"""Train a VAE with a categorical or a Bernoulli code, with any of the estimators.

    python scripts/train_vae.py                                    # the embedded 8×8 digits, half a minute
    python scripts/train_vae.py --data mnist --estimator st-gs --tau 0.5 --epochs 20
    python scripts/train_vae.py --resume runs/NAME                 # goes on bit for bit where it stopped

All flags are listed by --help.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass

import numpy as np

from estimators import ESTIMATORS, create
from experiments import loop as training
from experiments.pictures import curves, page
from experiments.run_folder import (
    RunFolder,
    at_least,
    default_folder,
    flag,
    one_of,
    report_errors,
    require,
    sizes,
    unused,
)
from minigrad import Rng, grad
from models.vae import BernoulliVAE, CategoricalVAE

CODES = ("", "categorical", "bernoulli")
PRIORS = ("uniform", "learned")
EVALUATION_BATCH = 1000


@dataclass(frozen=True)
class Config(training.Annealing, training.Optimizing, training.ImageConfig):
    estimator: str = flag("reinmax", f"one of {', '.join(ESTIMATORS)}; options as in rloo:samples=4")
    code: str = flag("", f"{' or '.join(CODES[1:])}: the kind of variables; else the first that the estimator handles")
    variables: int | None = flag(None, "L, the number of variables; else 8 categorical ones or 24 bits", type=int)
    categories: int = flag(8, "K, the number of categories of each categorical variable")
    hidden: tuple = flag(
        (512, 256), "widths of the encoder's hidden layers, or none; mirrored by the decoder", type=sizes
    )
    slope: float = flag(0.0, "of leaky ReLUs below 0; 0 for plain ReLUs")
    prior: str = flag("uniform", f"{' or '.join(PRIORS)}: of the code")
    epochs: int = flag(120, "passes over the training images")
    gradient_draws: int = flag(0, "N > 1: report the variance of the encoder's gradient over N draws at the end")
    bound_samples: int = flag(0, "M > 0: report the importance-weighted bound with M samples at the end")

    def check(self) -> None:
        super().check()
        at_least(1, self, "variables", "categories")
        at_least(0, self, "gradient_draws", "bound_samples")
        require(self.gradient_draws != 1, "--gradient-draws must be 0 or at least 2, got 1.")
        one_of(self, code=CODES, prior=PRIORS)
        require(min(self.hidden, default=1) >= 1, f"--hidden needs widths of at least 1, got {self.hidden}.")
        require(0.0 <= self.slope < 1.0, f"--slope must be at least 0 and below 1, got {self.slope}.")
        if not self.hidden:
            unused(self, "a network without hidden layers has no ReLU", "slope")

    def create_estimator(self):
        return create(self.estimator, self.tau, self.code or None)


class Training(training.ImageTraining):
    """One run: the data on the device, the model, its estimator."""

    loss_parts = 2  # Σ reconstruction and Σ KL over the batch
    progress_key = "test"

    def build(self, c: Config) -> None:
        self.estimator = c.create_estimator()
        self.first_tau = c.first_tau(self.estimator)
        self.warn(self.estimator)
        bits = self.estimator.family.name == "bernoulli"
        variables = c.variables or (24 if bits else 8)
        self.estimator.check_size(variables, 2 if bits else c.categories)
        self.load()
        sizes = (self.train.shape[1], variables) if bits else (self.train.shape[1], variables, c.categories)
        settings = {"hidden": c.hidden, "rng": self.rng.site("weights"), "dtype": self.dtype}
        settings |= {"slope": c.slope, "learned_prior": c.prior == "learned"}
        self.model = (BernoulliVAE if bits else CategoricalVAE)(*sizes, **settings).to(self.backend)
        self.optimizer = c.optimizer_for(self.model)

    # -- one step

    def step(self, index) -> None:
        """Update the parameters on the images `index` (an integer array on the device)."""
        rng = self.rng.at(self.steps)
        self.set_temperature()
        x = self.binarised(self.train[index], rng.site("pixels"))
        self.optimizer.zero_grad()
        reconstruction, kl = self.model.negative_elbo(x, self.estimator, rng.site("code"))
        (reconstruction + kl).mean().backward()
        self.optimizer.step()
        self.estimator.update()
        self.losses.append((reconstruction.data.sum(), kl.data.sum()))
        self.step_in_epoch += 1

    # -- evaluation, always with hard samples

    def evaluate(self, images, rng: Rng) -> tuple[float, float]:
        """(reconstruction, KL) per image over all `images`, one hard sample each."""
        parts = []
        for start in range(0, len(images), EVALUATION_BATCH):
            x, logit_scale = images[start : start + EVALUATION_BATCH], self.estimator.logit_scale
            reconstruction, kl = self.model.evaluate(x, rng.site(start), logit_scale)
            parts.append((reconstruction.sum(), kl.sum()))
        xp = self.backend.xp
        totals = self.backend.to_host(xp.stack([xp.stack(p) for p in parts])).sum(axis=0, dtype=np.float64)
        return float(totals[0]) / len(images), float(totals[1]) / len(images)

    def gradient_noise(self) -> dict[str, float]:
        """Of the encoder's gradient over the draws of the estimator, on one batch of (at most) 1,000 training images:
        the variance summed over the parameters, and the squared norm of the mean (as Fan et al. 2022 measure it)."""
        self.set_temperature()  # a run that was resumed at its end has not had a step
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
        for start in range(0, len(self.test), 100):
            x, samples = self.test[start : start + 100], self.config.bound_samples
            bound = self.model.importance_bound(x, rng.site(start), samples, logit_scale=self.estimator.logit_scale)
            total += float(self.backend.to_host(bound).sum(dtype=np.float64))
        return total / len(self.test)

    def report(self, first: int, start: float) -> dict:
        """The metrics of the epoch that has just ended."""
        reconstruction, kl = self.check_losses().sum(axis=0) / len(self.train)
        self.backend.synchronize()
        rate = (len(self.train) - first * self.config.batch) / max(time.perf_counter() - start, 1e-9)
        line = {"epoch": self.epoch + 1}
        if self.estimator.support == "soft" or self.estimator.multi_sample:  # another objective than −ELBO was trained
            line["train_relaxed" if self.estimator.support == "soft" else "train_bound"] = reconstruction + kl
            rng = self.rng.site("train, hard").at(self.epoch + 1)
            reconstruction, kl = self.evaluate(self.binarised(self.train, rng.site("pixels")), rng)
        line |= {"train": reconstruction + kl, "train_reconstruction": reconstruction, "train_kl": kl}
        test_reconstruction, test_kl = self.evaluate(self.test, self.rng.site("test").at(self.epoch + 1))
        line["test"] = test_reconstruction + test_kl
        line |= {"test_reconstruction": test_reconstruction, "test_kl": test_kl, "images_per_second": round(rate, 1)}
        return line

    def draw(self, folder: RunFolder) -> None:
        """The curve of −ELBO, a page of reconstructions, a page of samples from the prior."""
        to_host, rng = self.backend.to_host, self.rng.site("pictures")
        curves(folder.path / "curve.png", folder.metrics(), f"{self.config.estimator} on {self.config.data}")
        x = self.test[:50]
        reconstructed = self.model.reconstruct(x, rng, self.estimator.logit_scale)
        pairs = np.stack([to_host(x), to_host(reconstructed)], axis=1).reshape(-1, x.shape[1])
        page(
            folder.path / "reconstructions.png",
            pairs,
            self.images.shape,
            "test images, each left of its reconstruction",
        )
        samples = to_host(self.model.sample(100, rng.site("prior")))
        page(folder.path / "samples.png", samples, self.images.shape, "samples from the prior")


def finish(run: Training, folder: RunFolder, quiet: bool) -> None:
    run.draw(folder)
    if not quiet:
        print(f"metrics, pictures and checkpoint are in {folder.path}", file=sys.stderr)
    extra = {}
    if run.config.bound_samples:
        extra |= {"test_bound": run.importance_bound(), "bound_samples": run.config.bound_samples}
    if run.config.gradient_draws:
        extra |= run.gradient_noise() | {"gradient_draws": run.config.gradient_draws}
    if extra:
        text = folder.log(run.checked({"epoch": run.epoch} | extra))
        if not quiet:
            print(text)
    last = [line for line in folder.metrics() if "train" in line][-1]
    print(f"final train -ELBO {last['train']:.4f} test -ELBO {last['test']:.4f}")


@report_errors
def main(argv=None) -> int:
    may_change = ("epochs", "data_dir", "bound_samples", "gradient_draws")
    folder_for = lambda c: default_folder(c.data, c.estimator.replace(":", "-"), f"s{c.seed}")
    return training.run_script(Config, Training, __doc__.split("\n\n")[0], argv, may_change, folder_for, finish)


if __name__ == "__main__":
    sys.exit(main())
