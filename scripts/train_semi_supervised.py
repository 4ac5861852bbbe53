"""Train a semi-supervised VAE: a few images with labels, many without.

    python scripts/train_semi_supervised.py                        # the embedded 8×8 digits, half a minute
    python scripts/train_semi_supervised.py --labelled-only        # the same steps without the other images
    python scripts/train_semi_supervised.py --method sample --estimator st-gs
    python scripts/train_semi_supervised.py --data mnist --images 50000 --hidden 500 --latent 50 --epochs 100
    python scripts/train_semi_supervised.py --resume runs/NAME     # goes on bit for bit where it stopped

All flags are listed by --help.
"""

from __future__ import annotations

import logging
import math
import sys
import time
from dataclasses import dataclass

import training
from estimators import ESTIMATORS, create
from minigrad import Rng, Tensor
from minigrad.backend import BACKENDS, get_backend
from minigrad.optim import OPTIMIZERS
from models.data import DATASETS, PIXELS, binarise, load_images
from models.semi_supervised import NO_BOUND_OF_SEVERAL, SemiSupervisedVAE
from pictures import learning_curves, page
from run_folder import RunFolder, default_folder, flag, report_errors, require, sizes, user_errors

import numpy as np

log = logging.getLogger(__name__)

DTYPES = ("float32", "float64")
METHODS = ("marginal", "sample")
EVALUATION_BATCH = 200  # images; each is decoded once for every class
DRAWN = 10  # test images whose analogies are drawn


@dataclass(frozen=True)
class Config:
    data: str = flag("digits", f"data set: {', '.join(DATASETS)}")
    data_dir: str = flag("", "a folder with one folder per data set; else MINIGRAD_DATA, else a download")
    pixels: str = flag("dynamic", f"{', '.join(PIXELS)}: gray values, binarised anew for every batch, or once")
    images: int = flag(0, "use so many training images, drawn by the seed; 0: all of them; published for MNIST: 50000")
    labels: int = flag(100, "how many of them keep their labels, equally many of each class")
    labelled_only: bool = flag(False, "leave the images without labels out of the objective; the steps stay the same")
    method: str = flag("marginal", "the expectation over the class: marginal (its sum) or sample (an estimator)")
    estimator: str = flag(
        "gumbel-softmax", f"for --method sample: one of {', '.join(ESTIMATORS)}; options as in rloo:samples=4"
    )
    tau: float | None = flag(None, "temperature at first, for estimators that have one", type=float)
    anneal: float = flag(0.0, "r: the temperature is τ e^(−r·step), at least --tau-least; 0: fixed; published: 3e-5")
    anneal_every: int = flag(2000, "steps after which the temperature changes")
    tau_least: float = flag(0.5, "where an annealed temperature stays")
    alpha: float = flag(1.0, "weight of −log q(label|x) for the images with labels")
    latent: int = flag(5, "M, the size of z; published for MNIST: 50")
    hidden: tuple = flag((128,), "widths of the hidden layers of all three networks; published: 500", type=sizes)
    epochs: int = flag(200, "passes over the images without labels")
    batch: int = flag(100, "images without labels in a batch, and at most so many with labels beside them")
    lr: float = flag(2e-3, "learning rate")
    optimizer: str = flag("adam", f"one of {', '.join(OPTIMIZERS)}")
    seed: int = flag(0, "fixes the choice of labels, the initial weights, the order of the images and all noise")
    backend: str = flag("numpy", f"one of {', '.join(BACKENDS)}")
    dtype: str = flag("float32", f"one of {', '.join(DTYPES)}")

    def check(self) -> None:
        """UserError, one sentence, for the first value out of range; names are checked where they are looked up."""
        for name in ("labels", "latent", "epochs", "batch", "anneal_every"):
            value = getattr(self, name)
            require(value >= 1, f"--{name.replace('_', '-')} must be at least 1, got {value}.")
        require(self.images >= 0, f"--images must be at least 0, got {self.images}.")
        require(min(self.hidden) >= 1, f"--hidden needs widths of at least 1, got {self.hidden}.")
        for name in ("alpha", "anneal"):
            value = getattr(self, name)
            require(0.0 <= value < math.inf, f"--{name} must be at least 0 and finite, got {value}.")
        require(0.0 < self.tau_least < math.inf, f"--tau-least must be positive and finite, got {self.tau_least}.")
        for name, known in (("method", METHODS), ("optimizer", OPTIMIZERS), ("dtype", DTYPES)):
            value = getattr(self, name)
            require(value in known, f"unknown {name} {value!r}; the known ones are {', '.join(known)}.")


def with_labels(labels, n: int, classes: int, rng: Rng):
    """(with, without): which examples keep their labels, n in all and equally many of each class (the first n mod K
    classes have one more), and which do not; two arrays of indices, sorted.   UserError if that is not possible"""
    require(n >= classes, f"--labels must be at least {classes}, one for each class, got {n}.")
    require(n <= len(labels), f"--labels must be at most {len(labels)}, the number of training images, got {n}.")
    order, chosen = rng.permutation(len(labels)), np.zeros(len(labels), bool)
    for k in range(classes):
        members, wanted = order[labels[order] == k], n // classes + (k < n % classes)
        require(len(members) >= wanted, f"class {k} has {len(members)} images, not {wanted}: take fewer --labels.")
        chosen[members[:wanted]] = True
    return np.flatnonzero(chosen), np.flatnonzero(~chosen)


class Training(training.Training):
    """One run: the two sets of images on the device, the model, the estimator of the class if there is one."""

    loss_parts = 2  # the two terms of J, each the mean over the batch
    progress_key = "test_accuracy"

    def __init__(self, config: Config):
        super().__init__(config)
        c = config
        with user_errors():
            c.check()
            self.backend, self.rng = get_backend(c.backend), Rng(c.seed)
            self.images = load_images(c.data, c.data_dir or None, c.pixels, np.dtype(c.dtype))
            classes = int(self.images.train_labels.max()) + 1
            if c.method == "sample":
                self.estimator = self._estimator(classes)
            self._to_device(classes)
            sizes, rng = (self.images.train.shape[1], classes, c.latent, c.hidden), self.rng.site("weights")
            self.model = SemiSupervisedVAE(*sizes, rng=rng, dtype=np.dtype(c.dtype)).to(self.backend)
            self.optimizer = OPTIMIZERS[c.optimizer](self.model.parameters(), c.lr)
        self.steps_per_epoch = math.ceil(len(self.unlabelled) / c.batch)

    def _estimator(self, classes: int):
        c = self.config
        estimator = create(c.estimator, c.tau, "categorical")
        require(not estimator.multi_sample, f"{estimator.title} {NO_BOUND_OF_SEVERAL}")
        estimator.check_size(1, classes)
        if estimator.caution:
            log.warning("%s may not train the model: %s.", c.estimator, estimator.caution)
        if c.anneal:
            self.tau = training.first_temperature(estimator, c.estimator)
            require(
                c.tau_least <= self.tau,
                f"--tau-least must be at most the first temperature {self.tau}, got {c.tau_least}.",
            )
        return estimator

    def _to_device(self, classes: int) -> None:
        c, images, to_device = self.config, self.images, self.backend.to_device
        available = len(images.train)
        require(c.images <= available, f"--images must be at most {available}, got {c.images}.")
        used = self.rng.site("images").permutation(available)[: c.images or available]
        x, labels = images.train[used], images.train_labels[used].astype(np.int64)
        known, unknown = with_labels(labels, c.labels, classes, self.rng.site("labels"))
        require(len(unknown) > 0, f"all {len(labels)} training images have labels: take fewer --labels.")
        self.labelled, self.labels, self.unlabelled = (
            to_device(x[known]),
            to_device(labels[known]),
            to_device(x[unknown]),
        )
        self.test = to_device(images.test)  # binarised once, where the training images are at every step
        self.test = self._pixels(self.test, self.rng.site("test pixels"))

    @property
    def sharpness(self) -> float:
        return 1.0 if self.estimator is None else self.estimator.sharpness

    # -- one step

    def epoch_steps(self):
        """The images without labels of each step, integer arrays on the device."""
        order = self.backend.to_device(self.rng.site("order").at(self.epoch).permutation(len(self.unlabelled)))
        size = self.config.batch
        return [order[start : start + size] for start in range(0, len(order), size)]

    def step(self, index) -> None:
        """Update the parameters on the images `index` without labels, and as many, or all, of those with labels."""
        c, number = self.config, self.epoch * self.steps_per_epoch + self.step_in_epoch
        rng = self.rng.site("step").at(number)
        if self.estimator is not None and c.anneal:
            self.estimator.tau = training.annealed(number, self.tau, c.anneal, c.tau_least, c.anneal_every)
        known = self.backend.to_device(rng.site("known").permutation(len(self.labelled))[: c.batch])
        x, labels = self._pixels(self.labelled[known], rng.site("labelled pixels")), self.labels[known]
        self.optimizer.zero_grad()
        labelled = self.model.labelled(x, labels, rng.site("labelled"), c.alpha, self.sharpness).mean()
        if c.labelled_only:
            objective, unlabelled = labelled, Tensor(0.0 * labelled.data)
        else:
            x = self._pixels(self.unlabelled[index], rng.site("unlabelled pixels"))
            unlabelled = self.model.unlabelled(x, rng.site("unlabelled"), self.estimator).mean()
            objective = labelled + unlabelled
        objective.backward()
        self.optimizer.step()
        if self.estimator is not None:
            self.estimator.update()
        self.losses.append((labelled.data, unlabelled.data))
        self.step_in_epoch += 1

    def _pixels(self, x, rng: Rng):
        return binarise(x, rng) if self.config.pixels == "dynamic" else x

    # -- evaluation

    def evaluate(self, rng: Rng) -> tuple[float, float]:
        """(−ELBO with the class marginalised, accuracy of q(y|x)) over the test images."""
        bounds, classes, to_host = [], [], self.backend.to_host
        for start in range(0, len(self.test), EVALUATION_BATCH):
            x = self.test[start : start + EVALUATION_BATCH]
            bounds.append(to_host(self.model.bound(x, rng.site(start), self.sharpness)))
            classes.append(to_host(self.model.predict(x)))
        right = np.concatenate(classes) == self.images.test_labels
        return np.concatenate(bounds).mean(dtype=np.float64), right.mean()

    def report(self, first: int, start: float) -> dict:
        """The metrics of the epoch that has just ended."""
        labelled, unlabelled = self.check_losses().mean(axis=0)
        self.backend.synchronize()
        seconds = max(time.perf_counter() - start, 1e-9) / (self.step_in_epoch - first)
        line = {"epoch": self.epoch + 1, "train": labelled + unlabelled}
        line |= {"train_labelled": labelled, "train_unlabelled": unlabelled}
        line["test_bound"], line["test_accuracy"] = self.evaluate(self.rng.site("test").at(self.epoch + 1))
        if self.estimator is not None and self.config.anneal:
            line["tau"] = self.estimator.tau
        return line | {"ms_per_step": round(1e3 * seconds, 3)}

    def draw(self, folder: RunFolder) -> None:
        """The curves of accuracy and objective, and a page of analogies."""
        c = self.config
        how = "labels only" if c.labelled_only else c.estimator if c.method == "sample" else "marginalised"
        labels = {
            "title": f"{c.labels} labels of {c.data}, {how}",
            "accuracy": "test_accuracy",
            "accuracy_label": "test accuracy (%)",
            "losses": {"train_unlabelled": "U, training", "test_bound": "U, test, marginalised"},
            "losses_label": "−ELBO (nats per image)",
        }
        learning_curves(folder.path / "curve.png", folder.metrics(), **labels)
        x = self.test[:: -(-len(self.test) // DRAWN)]
        rows = np.concatenate([self.backend.to_host(a) for a in (x[:, None], self.model.analogies(x))], axis=1)
        images, columns = rows.reshape(-1, x.shape[1]), rows.shape[1]
        title = "test images, and all classes in the style of each"
        page(folder.path / "analogies.png", images, self.images.shape, title, columns)


def finish(run: Training, folder: RunFolder, quiet: bool) -> None:
    run.draw(folder)
    if not quiet:
        print(f"metrics, pictures and checkpoint are in {folder.path}", file=sys.stderr)
    last = folder.metrics()[-1]
    print(f"final test accuracy {last['test_accuracy']:.4f} test -ELBO {last['test_bound']:.4f}")


@report_errors
def main(argv=None) -> int:
    may_change = ("epochs", "data_dir")
    how = lambda c: c.estimator.replace(":", "-") if c.method == "sample" else c.method
    folder_for = lambda c: default_folder("semi-supervised", c.data, how(c), f"s{c.seed}")
    return training.run_script(Config, Training, __doc__.split("\n\n")[0], argv, may_change, folder_for, finish)


if __name__ == "__main__":
    sys.exit(main())
