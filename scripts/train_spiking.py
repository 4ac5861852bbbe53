"""Train a spiking network on images whose pixels are coded as spikes, and count the additions that its spikes cause.

    python scripts/train_spiking.py                      # the embedded 8×8 digits, a quarter of a minute
    python scripts/train_spiking.py --coding latency     # each pixel spikes once: the brighter, the earlier
    python scripts/train_spiking.py --integration discontinuous --steps 1 --test-steps 16
    python scripts/train_spiking.py --data mnist --integration discontinuous --steps 1 --test-steps 16 --epochs 10 \
        --hidden 512,512 --batch 100
    python scripts/train_spiking.py --resume runs/NAME   # goes on bit for bit where it stopped

All flags are listed by --help.
"""

from __future__ import annotations

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))
from experiments.start import before_numpy

before_numpy()

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from experiments.errors import command, require
from experiments.flags import at_least, flag, one_of, option, shown, sizes
from experiments.loop import SCHEDULES, ImageConfig, LabelledExperiment, Scheduled, run
from experiments.memory import check_memory, convolutions, weights
from experiments.pictures import learning_curves, several_curves, spike_raster
from minigrad import Rng, no_grad
from minigrad.hard import STEP
from models.spiking import CODES, RESETS, THRESHOLD, WINDOW, Continuous, Discontinuous, SpikingNetwork, squared_hinge

CLASSES = 10
INTEGRATIONS = ("discontinuous", "continuous")
NETWORKS = ("dense", "conv")
LOSS_AT = ("every", "mean")
MOST_STEPS = 1000


@dataclass(frozen=True)
class Config(Scheduled, ImageConfig):
    integration: str = flag("continuous", "discontinuous: a step leaves nothing in the membranes; continuous: it does")
    coding: str = flag(
        "rate", "of pixels: rate, random in every step, or latency, one spike: the brighter, the earlier"
    )
    steps: int = flag(8, "T, time steps of an image")
    test_steps: int | None = flag(
        None, "time steps of a test image at the end, where accuracy is measured after each; else as --steps", type=int
    )
    leak: float = flag(1.0, "what a membrane keeps from step to step; published: 1")
    reset: str = flag("subtract", f"of the membrane of a neuron that fired: {', '.join(RESETS)}")
    detach_reset: bool = flag(False, "do not differentiate the reset")
    proxy: str = flag("rectangle", f"whose slope is that of a spike: {', '.join(STEP)}")
    network: str = flag("dense", f"one of {', '.join(NETWORKS)}")
    channels: tuple = flag((12, 64), "of the convolutions of --network conv", type=sizes)
    hidden: tuple = flag(
        (256, 256), "widths of the dense layers; published: 1024,1024, and 512 behind convolutions", type=sizes
    )
    dropout: float = flag(0.1, "of hidden spikes; published: 0.3 for discontinuous, 0.2 for continuous integration")
    input_dropout: float = flag(0.1, "of the input's spikes; published: 0.1 and 0.2")
    loss_at: str = flag("mean", "the squared hinge of the mean output, or of the output at every step, as published")
    sparsity: float = flag(0.0, "λ of λ·Σ mean(s²), over the hidden layers, which makes spikes fewer")
    epochs: int = flag(30, "passes over the training images; published: 400, and 100 for continuous integration")
    batch: int = flag(20, "images in a batch; published: 100")
    lr: float = flag(2e-3, "learning rate, at first; published: 1e-3")
    schedule: str = flag("exponential", f"the way of the learning rate from --lr to --lr-last: {', '.join(SCHEDULES)}")
    lr_last: float = flag(1e-4, "the learning rate that the last step comes close to; published: 1e-5 or 1e-6")

    def check(self) -> None:
        super().check()
        at_least(1, self, "steps", "test_steps")
        at_least(0, self, "sparsity")
        most = max(self.steps, self.test_steps or 1)
        require(most <= MOST_STEPS, f"--steps and --test-steps must be at most {MOST_STEPS:,}, got {most}.")
        one_of(self, integration=INTEGRATIONS, coding=CODES, reset=RESETS, proxy=STEP, network=NETWORKS)
        require(self.loss_at in LOSS_AT, f"--loss-at must be {' or '.join(LOSS_AT)}, got {self.loss_at!r}.")
        require(0.0 <= self.leak <= 1.0, f"--leak must be from 0 to 1, got {self.leak}.")
        for name in ("dropout", "input_dropout"):
            share = getattr(self, name)
            require(0.0 <= share < 1.0, f"{option(name)} must be at least 0 and below 1, got {share}.")
        for name in ("hidden", "channels"):
            widths = getattr(self, name)
            require(min(widths, default=1) >= 1, f"--{name} needs widths of at least 1, got {shown(widths)}.")
        wanted = self.network != "conv" or self.channels
        require(wanted, "--network conv needs --channels: give at least one number, or --network dense.")

    def unread(self, estimator) -> dict[str, str]:
        found = super().unread(estimator)
        if self.integration == "discontinuous":
            why = "discontinuous integration empties the membranes after every step"
            found |= dict.fromkeys(("leak", "reset", "detach_reset"), why)
        elif self.leak == 0.0:
            found |= dict.fromkeys(("reset", "detach_reset"), "with --leak 0 a membrane keeps nothing that is reset")
        elif self.reset == "none":
            found["detach_reset"] = "with --reset none there is no reset"
        if self.steps == 1:
            found["loss_at"] = "with --steps 1 there is one output"
            found.setdefault("detach_reset", "with --steps 1 nothing comes after a reset")
            if self.test_steps in (None, 1):
                found = dict.fromkeys(("leak", "reset"), "with --steps 1 no step comes before another") | found
        if not self.hidden and self.network == "dense":
            of_neurons = ("integration", "leak", "reset", "detach_reset", "proxy", "dropout", "sparsity")
            found |= dict.fromkeys(of_neurons, "without --hidden layers there are no neurons")
        if self.coding == "latency":
            found["test_steps"] = "the code of --coding latency has --steps steps"
        if self.network == "dense":
            found["channels"] = "--network dense has no convolutions"
        return found

    def neurons(self) -> Discontinuous | Continuous:
        if self.integration == "discontinuous":
            return Discontinuous(self.proxy)
        return Continuous(self.leak, self.reset, self.detach_reset, self.proxy)


class Measured(NamedTuple):
    """Means over images. With discontinuous integration each step is a draw of T = 1, so that `single_step_accuracy` is
    the accuracy at T = 1, averaged over so many draws."""

    accuracy_after: np.ndarray  # (T,) of the outputs up to each step
    single_step_accuracy: float  # of the outputs of one step by themselves, the mean over the steps
    spikes: np.ndarray  # that enter each layer in all steps
    additions: float  # that they cause


class Spiking(LabelledExperiment):
    """One run: the images and labels on the device, and the network."""

    config_class = Config
    losses = ("Σ loss", "spikes of an image")
    progress_key = "valid_accuracy"
    may_change = ("epochs", "data_dir", "test_steps")

    @classmethod
    def folder_parts(cls, c):
        return "spiking", c.data, c.integration, c.coding, f"T{c.steps}", f"s{c.seed}"

    def build(self, c: Config) -> None:
        self.load()
        shape, channels = self.images.shape, c.channels if c.network == "conv" else ()
        halved = f"each of --channels halves the images of {shape[0]} × {shape[1]}"
        require(min(shape) >> len(channels), f"{halved}: give fewer than {len(channels)}.")
        self.test_steps = c.test_steps or c.steps
        rows = c.steps * min(c.batch, len(self.train))
        numbers = memory(shape, channels, c.hidden, rows)
        check_memory(numbers, self.dtype, "--hidden, --channels, --batch or --steps", self.backend.name)
        sizes = {"channels": channels, "hidden": c.hidden, "dropout": c.dropout, "input_dropout": c.input_dropout}
        rng = self.rng.site("weights")
        model = SpikingNetwork(shape, CLASSES, **sizes, neurons=c.neurons(), rng=rng, dtype=self.dtype)
        self.model = model.to(self.backend)
        self.optimizer = c.optimizer_for(self.model)

    def spikes(self, x, steps: int, rng: Rng):
        """(T, B, D), of the images x (B, D)."""
        return CODES[self.config.coding](x, steps, rng)

    def step(self, index, rng: Rng) -> tuple:
        """Update the parameters on the images `index` (an integer array on the device)."""
        c, x = self.config, self.binarised(self.train[index], rng.site("pixels"))
        self.optimizer.zero_grad()
        outputs, hidden = self.model(self.spikes(x, c.steps, rng.site("spikes")), rng.site("dropout"))
        if c.loss_at == "mean":
            outputs = outputs.mean(axis=0)
        loss = squared_hinge(outputs, self.train_labels[index]).mean()
        objective, fired = loss, 0.0 * loss.data
        for _, s in hidden:
            fired = fired + s.data.sum() / len(x)
            if c.sparsity:
                objective = objective + c.sparsity * (s * s).mean()
        objective.backward()
        self.optimizer.step()
        return loss.data * len(x), fired

    # -- evaluation, without dropout; rate-coded input stays random

    def evaluate(self, images, labels, steps: int, rng: Rng) -> Measured:
        self.EVALUATION_BATCH = max(1, 1000 // steps)  # a thousand patterns at a time

        def measure(x, start):
            with no_grad():
                entering = self.spikes(x, steps, rng.site(start))
                outputs, hidden = self.model(entering)
            spikes, additions = self.model.count([entering, *(s.data for _, s in hidden)])
            totals, right = outputs.data.cumsum(axis=0), labels[start : start + self.EVALUATION_BATCH]
            wrong, wrong_alone = (o.argmax(axis=2) != right for o in (totals, outputs.data))
            return totals[-1], *wrong, wrong_alone.mean(axis=0), *spikes, *additions

        found, layers = self.counts(images, labels, measure)[1:], len(self.model.layers)
        wrong, alone, spikes, additions = np.split(found, [steps, steps + 1, steps + 1 + layers])
        return Measured(1.0 - wrong, 1.0 - alone[0], spikes, additions.sum())

    def report(self, losses, speed: float) -> dict:
        at = self.epoch + 1
        line = {"epoch": at, "train_loss": losses[:, 0].sum() / len(self.train), "train_spikes": losses[:, 1].mean()}
        parts = {"valid": (self.valid, self.valid_labels), "test": (self.test, self.test_labels)}
        for part, (images, labels) in parts.items():
            found = self.evaluate(images, labels, self.config.steps, self.rng.site(f"{part} spikes").at(at))
            line[f"{part}_accuracy"] = found.accuracy_after[-1]
        return line | {"additions": found.additions} | self.images_per_second(speed)

    # -- the end

    def final(self, folder) -> dict:
        """What the test images give in --test-steps steps, beside a dense network, and the epoch that was best on the
        validation images, which is what the paper reports."""
        found = self.evaluate(self.test, self.test_labels, self.test_steps, self.rng.site("final spikes"))
        best = max((m for m in folder.metrics() if "train_loss" in m), key=lambda m: m["valid_accuracy"])
        dense = self.model.dense_multiply_adds()
        return {
            "epoch": self.epoch,
            "test_accuracy": found.accuracy_after[-1],
            "accuracy_after": [round(a, 6) for a in found.accuracy_after],
            "single_step_accuracy": found.single_step_accuracy,
            "spikes": [round(s, 3) for s in found.spikes],
            "additions": found.additions,
            "dense_multiply_adds": dense,
            "factor": dense / max(found.additions, 1.0),
            "best_epoch": best["epoch"],
            "best_epoch_accuracy": best["test_accuracy"],
        }

    def draw(self, folder) -> None:
        """The curves, accuracy against steps, and the spikes and membranes of one digit."""
        c, metrics = self.config, folder.metrics()
        title = f"{c.integration} integration, {c.coding} code, T = {c.steps}, {c.data}"
        losses = {"train_loss": "train"}
        learning_curves(folder.path / "curve.png", metrics, title, losses=losses, losses_label="squared hinge")
        if self.test_steps > 1:
            accuracies = {
                f"{c.integration}, {c.coding}": (range(1, self.test_steps + 1), metrics[-1]["accuracy_after"])
            }
            several_curves(folder.path / "steps.png", accuracies, "test accuracy", "time steps")
        x = self.spikes(self.test[:1], self.test_steps, self.rng.site("drawn"))
        with no_grad():
            outputs, hidden = self.model(x)
        to_host = lambda a: self.backend.to_host(a)[:, 0].reshape(len(x), -1)
        layers = {"pixels": to_host(x)}
        layers |= {f"layer {n + 1}": to_host(s.data) for n, (_, s) in enumerate(hidden)}
        membranes = to_host(self.model.neurons.membranes(hidden[0][0].data)) if hidden else None
        spike_raster(folder.path / "spikes.png", layers, membranes, THRESHOLD, to_host(outputs.data), title)

    def last_words(self, metrics) -> str:
        last = metrics[-1]
        return (
            f"final test accuracy {last['test_accuracy']:.4f} additions {last['additions']:.0f} "
            f"dense multiply-adds {last['dense_multiply_adds']:.0f} factor {last['factor']:.2f}"
        )


def memory(shape, channels, hidden, rows: int) -> int:
    """How many numbers there are at least: weights with their gradients, convolutions, and for each neuron its current,
    membrane, spike, and the gradient of one of them."""
    planes, pixels = (1, *channels), [(shape[0] >> n) * (shape[1] >> n) for n in range(len(channels) + 1)]
    widths = (planes[-1] * pixels[-1], *hidden, CLASSES)
    neurons = sum(c * n for c, n in zip(channels, pixels[1:], strict=True)) + sum(hidden)
    numbers = rows * (convolutions(shape, planes, WINDOW, WINDOW // 2) + pixels[0] + 4 * neurons)
    return numbers + 2 * (WINDOW**2 * weights(*planes) + weights(*widths))


@command
def main(argv=None) -> int:
    return run(Spiking, argv)


if __name__ == "__main__":
    sys.exit(main())
