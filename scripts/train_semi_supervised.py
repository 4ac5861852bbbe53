"""Train a semi-supervised VAE: a few images with labels, many without.

    python scripts/train_semi_supervised.py                        # the embedded 8×8 digits, half a minute
    python scripts/train_semi_supervised.py --labelled-only        # the same steps without the other images
    python scripts/train_semi_supervised.py --method sample --estimator st-gs
    python scripts/train_semi_supervised.py --data mnist --images 50000 --hidden 500 --latent 50 --epochs 100
    python scripts/train_semi_supervised.py --resume runs/NAME     # goes on bit for bit where it stopped

All flags are listed by --help.
"""

from __future__ import annotations

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))
from experiments.start import before_numpy

before_numpy()

from dataclasses import dataclass

import numpy as np

from estimators import ESTIMATORS, create
from experiments.errors import command, require
from experiments.flags import at_least, flag, one_of, sizes
from experiments.loop import Annealing, ImageConfig, ImageExperiment, Optimizing, batches, run
from experiments.memory import check_memory, draws, weights
from experiments.pictures import learning_curves, page
from minigrad import Rng, Tensor
from models.data import PIXELS
from models.semi_supervised import NO_BOUND_OF_SEVERAL, SemiSupervisedVAE

METHODS = ("marginal", "sample")
EVALUATION_BATCH = 200  # images; each is decoded once for every class
DRAWN = 10  # test images whose analogies are drawn


@dataclass(frozen=True)
class Config(Annealing, Optimizing, ImageConfig):
    pixels: str = flag("dynamic", f"{', '.join(PIXELS)}: gray values, binarised anew for every batch, or once")
    images: int = flag(0, "use so many training images, drawn by the seed; 0: all of them; published for MNIST: 50000")
    labels: int = flag(100, "how many of them keep their labels, equally many of each class")
    labelled_only: bool = flag(False, "leave the images without labels out of the objective; the steps stay the same")
    method: str = flag("marginal", "the expectation over the class: marginal (its sum) or sample (an estimator)")
    estimator: str = flag(
        "gumbel-softmax", f"for --method sample: one of {', '.join(ESTIMATORS)}; options as in rloo:samples=4"
    )
    anneal_every: int = flag(2000, "steps between two changes of the temperature")
    alpha: float = flag(1.0, "weight of −log q(label|x) for the images with labels")
    latent: int = flag(5, "M, the size of z; published for MNIST: 50")
    hidden: tuple = flag((128,), "widths of the hidden layers of all three networks; published: 500", type=sizes)
    epochs: int = flag(200, "passes over the images without labels")
    batch: int = flag(100, "images without labels in a batch, and at most so many with labels beside them")
    lr: float = flag(2e-3, "learning rate")
    seed: int = flag(0, "fixes the choice of labels, the initial weights, the order of the images and all noise")

    def check(self) -> None:
        super().check()
        at_least(1, self, "labels", "latent")
        at_least(0, self, "images", "alpha")
        one_of(self, method=METHODS)
        require(min(self.hidden, default=0) >= 1, f"--hidden needs widths of at least 1, got {self.hidden or 'none'}.")

    def unread(self, estimator) -> dict[str, str]:
        found, of_samples = super().unread(estimator), ("estimator", "tau", "anneal", "anneal_every", "tau_least")
        if self.method != "sample":
            found |= dict.fromkeys(of_samples, "without --method sample the class is summed over")
        if self.labelled_only:
            found |= dict.fromkeys(("method", *of_samples), "with --labelled-only no class is unknown")
        return found

    def create_estimator(self):
        if self.method != "sample":
            return None
        estimator = create(self.estimator, self.tau, "categorical")
        require(not estimator.multi_sample, f"{estimator.title} {NO_BOUND_OF_SEVERAL}")
        return estimator


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


class SemiSupervised(ImageExperiment):
    """One run: the two sets of images on the device, the model, the estimator of the class if there is one.

    train: the images without labels, which an epoch passes over once;   labelled, labels: the others
    """

    config_class = Config
    losses = ("labelled", "unlabelled")  # the two terms of J, each the mean over the batch
    progress_key = "test_accuracy"

    @classmethod
    def folder_parts(cls, c):
        how = c.estimator.replace(":", "-") if c.method == "sample" else c.method
        return "semi-supervised", c.data, how, f"s{c.seed}"

    def build(self, c: Config) -> None:
        self.load()
        classes = int(self.images.train_labels.max()) + 1
        if self.estimator is not None:
            self.check_size(1, classes)
        self.keep_labels(classes)
        pixels, rows = self.train.shape[1], min(c.batch, len(self.train)) * draws(self.estimator)
        numbers = 3 * weights(pixels, *c.hidden, c.latent, *c.hidden, pixels) + rows * (sum(c.hidden) + c.latent)
        check_memory(numbers, self.dtype, "--hidden, --latent, --batch or fewer samples", self.backend.name)
        shape, rng = (self.images.train.shape[1], classes, c.latent, c.hidden), self.rng.site("weights")
        self.model = SemiSupervisedVAE(*shape, rng=rng, dtype=self.dtype).to(self.backend)
        self.optimizer = c.optimizer_for(self.model)
        if self.estimator is not None:
            self.warn_of(self.estimator)

    def keep_labels(self, classes: int) -> None:
        c, images, to_device = self.config, self.images, self.backend.to_device
        available = len(images.train)
        require(c.images <= available, f"--images must be at most {available}, got {c.images}.")
        used = self.rng.site("images").permutation(available)[: c.images or available]
        labels = images.train_labels[used].astype(np.int64)
        known, unknown = with_labels(labels, c.labels, classes, self.rng.site("labels"))
        require(len(unknown) > 0, f"all {len(labels)} training images have labels: take fewer --labels.")
        self.labels = self.backend.indices(labels[known], classes)
        self.labelled, self.train = self.train[to_device(used[known])], self.train[to_device(used[unknown])]

    def step(self, index, rng: Rng) -> tuple:
        """Update the parameters on the images `index` without labels, and as many, or all, of those with labels."""
        c, rng = self.config, rng.site("step")
        known = self.backend.to_device(rng.site("known").permutation(len(self.labelled))[: c.batch])
        x, labels = self.binarised(self.labelled[known], rng.site("labelled pixels")), self.labels[known]
        self.optimizer.zero_grad()
        labelled = self.model.labelled(x, labels, rng.site("labelled"), c.alpha).mean()
        if c.labelled_only:
            objective, unlabelled = labelled, Tensor(0.0 * labelled.data)
        else:
            x = self.binarised(self.train[index], rng.site("unlabelled pixels"))
            unlabelled = self.model.unlabelled(x, rng.site("unlabelled"), self.estimator).mean()
            objective = labelled + unlabelled
        objective.backward()
        self.optimizer.step()
        return labelled.data, unlabelled.data

    # -- evaluation

    def evaluate(self, rng: Rng) -> tuple[float, float]:
        """(−ELBO with the class marginalised, accuracy of q(y|x)) over the test images."""
        bounds, classes, to_host = [], [], self.backend.to_host
        for start, x in batches(self.test, EVALUATION_BATCH):
            bounds.append(to_host(self.model.bound(x, rng.site(start))))
            classes.append(to_host(self.model.predict(x)))
        right = np.concatenate(classes) == self.images.test_labels
        return np.concatenate(bounds).mean(dtype=np.float64), right.mean()

    def report(self, losses, speed: float) -> dict:
        labelled, unlabelled = losses.mean(axis=0)
        line = {"epoch": self.epoch + 1, "train": labelled + unlabelled}
        line |= {"train_labelled": labelled, "train_unlabelled": unlabelled}
        line["test_bound"], line["test_accuracy"] = self.evaluate(self.rng.site("test").at(self.epoch + 1))
        if self.estimator is not None and self.config.anneal:
            line["tau"] = self.estimator.tau
        return line | {"ms_per_step": round(1e3 / speed, 3)}

    # -- the end

    def draw(self, folder) -> None:
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

    def last_words(self, metrics) -> str:
        last = metrics[-1]
        return f"final test accuracy {last['test_accuracy']:.4f} test -ELBO {last['test_bound']:.4f}"


@command
def main(argv=None) -> int:
    return run(SemiSupervised, argv)


if __name__ == "__main__":
    sys.exit(main())
