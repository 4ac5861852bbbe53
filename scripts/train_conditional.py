"""Train a classifier whose experts stand behind sparse stochastic gates, and measure what is saved by computing only
those that are on.

    python scripts/train_conditional.py                                # the embedded 8×8 digits, half a minute
    python scripts/train_conditional.py --gate sts                     # or noisy-rectifier:noise=normal, st-identity …
    python scripts/train_conditional.py --gate sigmoid                 # a baseline with dense gates
    python scripts/train_conditional.py --data mnist --experts 2000 --gater 400 --epochs 100
    python scripts/train_conditional.py --resume runs/NAME             # goes on bit for bit where it stopped

All flags are listed by --help.
"""

from __future__ import annotations

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))
from experiments.start import before_numpy

before_numpy()

import itertools
import math
import statistics
import time
from dataclasses import dataclass

import numpy as np

from estimators import create
from experiments.errors import command, require
from experiments.flags import at_least, flag
from experiments.loop import ImageConfig, LabelledExperiment, batches, run
from experiments.memory import check_evaluations, check_memory, draws, weights
from experiments.pictures import gate_curves
from minigrad import Rng, no_grad
from minigrad.optim import SGD
from models.conditional import BetaNoise, ConditionalNetwork, Controller, DenseGate

CLASSES = 10
MAX_COLUMN_NORM = 2.1  # as published, for W₀, W₁ and W₂
TIMED = 100  # test images on which predictions are timed
CALLS, SECONDS = 11, 1.0  # as many calls of each, or more until so much time is over


@dataclass(frozen=True)
class Settings:
    """What goes with a gate unless a flag says otherwise: its unit, λ, momentum, the gater's share of --lr, β."""

    unit: str
    sparsity: float = 0.0
    momentum: float = 0.0
    gater_lr: float = 1.0
    beta: float = 0.0
    noise: float = 0.0  # of a baseline


# As published, but for the λ of sts, 1e-3 there, which takes longer than the digits are trained. The paper's
# straight-through has λ = 0.1, its score function 1.
BASELINES = {
    "sigmoid": Settings("sigmoid"),
    "sigmoid-noise": Settings("sigmoid", noise=1.0),
    "rectifier": Settings("rectifier"),
}
GATES = {
    "noisy-rectifier": Settings("rectifier", sparsity=1e-5),
    "sts": Settings("smooth", sparsity=0.01, momentum=0.5, beta=40.1),
}
DIFFERENTIABLE = Settings("bit", sparsity=0.1)
SCORE_FUNCTION = Settings("bit", sparsity=1.0, gater_lr=0.01)


@dataclass(frozen=True)
class Config(ImageConfig):
    gate: str = flag(
        "st",
        "noisy-rectifier, sts, st, st-identity, reinforce-minvar or another estimator for bits, with options as in "
        f"noisy-rectifier:noise=normal; or a dense baseline: {', '.join(BASELINES)}",
    )
    tau: float | None = flag(None, "temperature, for estimators that have one", type=float)
    experts: int | None = flag(None, "N; else 400, and --target of it for a baseline; published: 2000", type=int)
    gater: int = flag(50, "G, the tanh units of the gater; published: 400")
    target: float = flag(0.1, "s, the fraction of gates to be on")
    sparsity: float | None = flag(None, "λ, the weight of the sparsity cost; else what suits the gate", type=float)
    beta: float | None = flag(None, "β of the noise in the gates' logits, 0 for none; else 40.1 for sts", type=float)
    epochs: int = flag(200, "passes over the training images")
    batch: int = flag(32, "images in a batch")
    lr: float = flag(0.1, "learning rate")
    momentum: float | None = flag(None, "else 0.5 for sts, 0 for the others", type=float)
    gater_lr: float | None = flag(
        None, "the gater's learning rate in terms of --lr; else 0.01 for score functions, 1 for the others", type=float
    )

    def check(self) -> None:
        super().check()
        at_least(1, self, "experts", "gater")
        at_least(0, self, "sparsity", "gater_lr")
        momentum = self.momentum
        fits = momentum is None or 0.0 <= momentum < 1.0
        require(fits, f"--momentum must be at least 0 and below 1, got {momentum}.")
        require(0.0 < self.target < 1.0, f"--target must lie between 0 and 1, got {self.target}.")
        beta = self.beta
        # beyond, the noise is nearly none, and its quantiles take minutes or are NaN
        require(not beta or 1.0 < beta <= 1e9, f"--beta must be 0, or above 1 and at most 1e9, got {beta}.")
        name, options, _ = self.gate.partition(":")
        require(not options or name not in BASELINES, f"the baseline {name} has no options: give --gate {name}.")

    def unread(self, estimator) -> dict[str, str]:
        found = super().unread(estimator)
        if estimator is None:
            parts = {"tau": "temperature", "sparsity": "sparsity cost", "beta": "Beta noise"}
            found |= {name: f"the baseline {self.gate} has no {what}" for name, what in parts.items()}
            if self.experts:
                found["target"] = f"the baseline {self.gate} has --experts {self.experts}, all of them on"
        return found

    def create_estimator(self):
        return None if self.gate in BASELINES else create(self.gate, self.tau, "bernoulli")


def settings_for(config: Config, estimator) -> Settings:
    if estimator is None:
        return BASELINES[config.gate]
    usual = DIFFERENTIABLE if estimator.cost_gradient else SCORE_FUNCTION
    return GATES.get(config.gate.partition(":")[0], usual)


class Conditional(LabelledExperiment):
    """One run: the images and labels on the device, the network, its gates, the controller of λ if there is one."""

    config_class = Config
    losses = ("Σ −log p(label)", "the fraction of gates that are on")
    progress_key = "test_error"

    @classmethod
    def folder_parts(cls, c):
        return "conditional", c.data, c.gate.replace(":", "-"), f"s{c.seed}"

    def build(self, c: Config) -> None:
        self.baseline = self.estimator is None
        usual = settings_for(c, self.estimator)
        choose = lambda name: getattr(usual if getattr(c, name) is None else c, name)
        self.gate = DenseGate(usual.unit, usual.noise) if self.baseline else self.estimator
        experts = c.experts or (max(1, round(400 * c.target)) if self.baseline else 400)
        if not self.baseline:
            self.check_size(experts, 2)
            check_evaluations(self.estimator, experts, 2)
        self.load()
        pixels = self.train.shape[1]
        rows = min(c.batch, len(self.train)) * draws(self.estimator)
        numbers = 2 * (weights(pixels, experts, CLASSES) + weights(pixels, c.gater, experts)) + rows * experts
        check_memory(numbers, self.dtype, "--experts, --gater, --batch or fewer samples", self.backend.name)
        noise = BetaNoise(c.target, choose("beta")) if choose("beta") else None
        sizes = {"experts": experts, "gater": c.gater, "unit": usual.unit, "noise": noise}
        rng = self.rng.site("weights")
        self.model = ConditionalNetwork(pixels, CLASSES, **sizes, rng=rng, dtype=self.dtype).to(self.backend)
        self.optimizer = SGD(self.model.parameters(), c.lr, choose("momentum"))
        self.weight, self.gater_lr = choose("sparsity"), choose("gater_lr")
        self.controller = None
        if usual.unit == "rectifier" and not self.baseline:
            self.controller = Controller(c.target, self.weight, self.model.experts.weight.data)

    def parts(self) -> dict:
        return super().parts() | ({} if self.controller is None else {"controller": self.controller})

    def step(self, index, rng: Rng) -> tuple:
        """Update the parameters on the images `index` (an integer array on the device)."""
        x = self.binarised(self.train[index], rng.site("pixels"))
        self.optimizer.zero_grad()
        cost, a, h = self.model.cost(x, self.train_labels[index], self.gate, rng.site("gates"))
        loss = cost.mean()
        if not self.baseline:
            weight = self.controller.weight if self.controller else self.weight
            loss = loss + self.model.sparsity_cost(a, h, self.config.target) * weight
        loss.backward()
        if self.gater_lr != 1.0:  # for SGD, also with momentum, a smaller gradient is a smaller learning rate
            for p in (*self.model.gater.parameters(), *self.model.gates.parameters()):
                p.grad *= self.gater_lr
        self.optimizer.step()
        self.model.limit_columns(MAX_COLUMN_NORM)
        active = (h.data != 0).astype(h.dtype).mean()
        if self.controller is not None:
            self.controller.update(active)
        return cost.data.sum(), active

    # -- evaluation, always with deterministic gates

    def threshold(self) -> float:
        """Of the logits: it leaves on a fraction --target of the gates of the validation images."""
        if self.baseline:
            return self.model.threshold(np.zeros(0), 1.0)
        with no_grad():
            logits = [self.model.gate_logits(x).data for _, x in batches(self.valid, self.EVALUATION_BATCH)]
        return self.model.threshold(np.concatenate(list(map(self.backend.to_host, logits))), self.config.target)

    def evaluate(self, images, labels, threshold: float) -> tuple[float, float]:
        """(error in percent, the fraction of gates that are on)"""
        wrong, on = self.counts(images, labels, lambda x, start: self.model.evaluate(x, threshold))
        return 100.0 * float(wrong), float(on) / self.model.experts.bias.size

    def report(self, losses, speed: float) -> dict:
        threshold = self.threshold()
        line = {"epoch": self.epoch + 1, "train_loss": losses[:, 0].sum() / len(self.train)}
        line["active"] = losses[:, 1].mean()
        if self.controller is not None:
            line["sparsity"] = float(self.backend.to_host(self.controller.weight))
        line["valid_error"], _ = self.evaluate(self.valid, self.valid_labels, threshold)
        line["test_error"], line["test_active"] = self.evaluate(self.test, self.test_labels, threshold)
        if not self.baseline:
            line["saved"] = saved(self.model.multiply_adds(line["test_active"] * self.model.experts.bias.size))
        return line | self.images_per_second(speed)

    # -- the end

    def final(self, folder) -> dict:
        """The test error when only the experts that are on are computed, and what that saves: multiply-adds counted,
        and microseconds for an image, one image at a time and in a batch."""
        threshold = self.threshold()
        predict, x, labels = self.model.predictor(threshold), self.backend.to_host(self.test), self.images.test_labels
        logits, on = predict(x)
        count = self.model.multiply_adds(float(on.mean()))
        contenders = {
            "gated": predict,
            "all experts": predict.all_experts,
            "without gates": predict.without_gates,
        }
        x = x[:TIMED]
        return {
            "epoch": self.epoch,
            "threshold": 0.5 + 0.5 * math.tanh(0.5 * threshold),  # of σ(a)
            "test_error": 100.0 * float((logits.argmax(axis=1) != labels).mean()),
            "test_active": float(on.mean()) / self.model.experts.bias.size,
            "multiply_adds": count,
            **({} if self.baseline else {"saved": saved(count)}),
            "microseconds": {
                "one at a time": microseconds(contenders, [x[n : n + 1] for n in range(len(x))]),
                f"batch of {len(x)}": microseconds(contenders, [x]),
            },
        }

    def draw(self, folder) -> None:
        gate_curves(folder.path / "curve.png", folder.metrics(), f"{self.config.gate} on {self.config.data}")

    def last_words(self, metrics) -> str:
        line = metrics[-1]
        needed, taken = 1.0 - saved(line["multiply_adds"]), line["microseconds"]["one at a time"]
        return (
            f"final test error {line['test_error']:.2f} % active {line['test_active']:.4f} multiply-adds {needed:.4f} "
            f"time {taken['gated'] / taken['without gates']:.4f} of a network without gates"
        )


def saved(count: dict) -> float:
    """The fraction of the multiply-adds that gates save of a network with as many experts and none, what the gater
    costs included; negative for a loss."""
    return 1.0 - (count["gater"] + count["experts"]) / count["dense"]


def microseconds(contenders: dict, batches: list) -> dict[str, float]:
    """The median time of a call of each, for an image; they take turns on every batch."""
    times = {name: [] for name in contenders}
    calls, end = itertools.cycle(batches), time.perf_counter() + SECONDS
    for n, x in enumerate(calls):
        if n >= CALLS and time.perf_counter() > end:
            break
        for name, function in contenders.items():
            start = time.perf_counter()
            function(x)
            times[name].append((time.perf_counter() - start) / len(x))
    return {name: round(1e6 * statistics.median(found), 2) for name, found in times.items()}


@command
def main(argv=None) -> int:
    return run(Conditional, argv)


if __name__ == "__main__":
    sys.exit(main())
