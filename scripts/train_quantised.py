"""Train a network whose activations have 1, 2 or 4 bits, by a coarse gradient.

    python scripts/train_quantised.py                                  # the embedded 8×8 digits, a few seconds
    python scripts/train_quantised.py --bits 1 --proxy relu            # fails; --proxy identity does not
    python scripts/train_quantised.py --bits 0                         # full precision
    python scripts/train_quantised.py --network lenet --data mnist --bits 4 --epochs 5
    python scripts/train_quantised.py --resume runs/NAME               # goes on bit for bit where it stopped

All flags are listed by --help.
"""

from __future__ import annotations

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))
from experiments.start import before_numpy

before_numpy()

import math
from dataclasses import dataclass

from experiments.errors import command, require
from experiments.flags import flag, one_of, sizes
from experiments.loop import SCHEDULES, ImageConfig, LabelledExperiment, Scheduled, run
from experiments.memory import check_memory, convolutions, weights
from experiments.pictures import learning_curves
from minigrad import Rng
from models.quantised import PROXIES, STEPS, Activation, DenseNetwork, LeNet

CLASSES = 10
NETWORKS = ("dense", "lenet")


@dataclass(frozen=True)
class Config(Scheduled, ImageConfig):
    network: str = flag("dense", f"one of {', '.join(NETWORKS)}")
    hidden: tuple = flag((120, 84), "widths of the dense hidden layers; those of LeNet are 120,84", type=sizes)
    bits: int = flag(2, "of an activation, from 1 to 16; 0 for full precision, a ReLU")
    proxy: str = flag("clipped_relu", f"whose derivative a quantised activation has: {', '.join(PROXIES)}")
    alpha: float | None = flag(
        None,
        f"the distance of two levels; else {', '.join(f'{a:g}' for a in STEPS.values())} for "
        f"{', '.join(map(str, STEPS))} bits",
        type=float,
    )
    epochs: int = flag(60, "passes over the training images; 5 are enough for MNIST")
    lr: float = flag(2e-3, "learning rate")
    schedule: str = flag("cosine", f"the way of the learning rate from --lr to --lr-last: {', '.join(SCHEDULES)}")

    def check(self) -> None:
        super().check()
        one_of(self, network=NETWORKS, proxy=PROXIES)
        require(0 <= self.bits <= 16, f"--bits must be from 0 to 16, got {self.bits}.")
        alpha, known = self.alpha, ", ".join(map(str, STEPS))
        require(
            alpha is not None or not self.bits or self.bits in STEPS,
            f"--bits {self.bits} needs --alpha, the distance of two levels: it is known for {known} bits only.",
        )
        require(alpha is None or 0.0 < alpha < math.inf, f"--alpha must be positive and finite, got {alpha}.")
        require(min(self.hidden, default=1) >= 1, f"--hidden needs widths of at least 1, got {self.hidden}.")
        require(
            self.hidden or self.network != "dense",
            "a dense network without hidden layers has nothing to quantise: give --hidden widths.",
        )

    def unread(self, estimator) -> dict[str, str]:
        full = dict.fromkeys(("proxy", "alpha"), "in full precision, with --bits 0, nothing is quantised")
        return super().unread(estimator) | ({} if self.bits else full)


class Quantised(LabelledExperiment):
    """One run: the images and labels on the device, the network, its optimizer."""

    config_class = Config
    losses = ("Σ −log p(label)",)
    progress_key = "valid_accuracy"

    @classmethod
    def folder_parts(cls, c):
        return "quantised", c.data, c.network, f"{c.bits}-bits", *([c.proxy] if c.bits else []), f"s{c.seed}"

    def build(self, c: Config) -> None:
        self.load()
        pixels, rows = self.train.shape[1], min(c.batch, len(self.train))
        numbers = 2 * weights(*c.hidden, CLASSES) + rows * sum(c.hidden)
        if c.network == "dense":
            numbers += 2 * weights(pixels, *c.hidden[:1])
        else:
            padding = LeNet.padding(self.images.shape)
            numbers += rows * convolutions(self.images.shape, LeNet.CHANNELS, LeNet.WINDOW, padding)
        check_memory(numbers, self.dtype, "--hidden or --batch", self.backend.name)
        activation, common = (
            Activation(c.bits, c.alpha, c.proxy),
            {"rng": self.rng.site("weights"), "dtype": self.dtype},
        )
        if c.network == "dense":
            model = DenseNetwork((pixels, *c.hidden, CLASSES), activation, **common)
        else:
            model = LeNet(self.images.shape, c.hidden, CLASSES, activation, **common)
        self.model = model.to(self.backend)
        self.optimizer = c.optimizer_for(self.model)

    def step(self, index, rng: Rng) -> tuple:
        """Update the parameters on the images `index` (an integer array on the device)."""
        x = self.binarised(self.train[index], rng.site("pixels"))
        self.optimizer.zero_grad()
        cost = self.model.cost(x, self.train_labels[index])
        cost.mean().backward()
        self.optimizer.step()
        return (cost.data.sum(),)

    def accuracy(self, images, labels) -> float:
        (wrong,) = self.counts(images, labels, lambda x, start: (self.model.evaluate(x),))
        return 1.0 - float(wrong)

    def report(self, losses, speed: float) -> dict:
        line = {"epoch": self.epoch + 1, "train_loss": losses.sum() / len(self.train)}
        line["valid_accuracy"] = self.accuracy(self.valid, self.valid_labels)
        line["test_accuracy"] = self.accuracy(self.test, self.test_labels)
        return line | self.images_per_second(speed)

    def draw(self, folder) -> None:
        c = self.config
        how = f"{c.bits} bits, {c.proxy}" if c.bits else "full precision"
        losses = {"train_loss": "training images, as they came"}
        learning_curves(folder.path / "curve.png", folder.metrics(), f"{c.network} on {c.data}, {how}", losses=losses)

    def last_words(self, metrics) -> str:
        last = metrics[-1]
        return f"final validation accuracy {last['valid_accuracy']:.4f} test accuracy {last['test_accuracy']:.4f}"


@command
def main(argv=None) -> int:
    return run(Quantised, argv)


if __name__ == "__main__":
    sys.exit(main())
