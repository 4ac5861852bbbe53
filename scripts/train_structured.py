"""Train a stochastic network to complete images: the lower half from the upper half, with any of the estimators.

    python scripts/train_structured.py                             # the embedded 8×8 digits, half a minute
    python scripts/train_structured.py --train-samples 20          # a minute, and completions that differ
    python scripts/train_structured.py --estimator none            # the deterministic network of the same size
    python scripts/train_structured.py --data mnist --optimizer sgd --lr 1e-3 --code categorical --epochs 100
    python scripts/train_structured.py --resume runs/NAME          # goes on bit for bit where it stopped

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
from experiments.errors import command, user_errors
from experiments.flags import at_least, at_most, flag, one_of
from experiments.loop import Annealing, ImageConfig, ImageExperiment, Optimizing, batches, run
from experiments.memory import check_evaluations, check_memory, draws, weights
from experiments.pictures import curves, page
from minigrad import Rng, no_grad
from minigrad.checkpoint import StateError
from minigrad.fused import bce_with_logits
from minigrad.ops import stable_sigmoid
from models.data import PIXELS
from models.structured import StochasticNetwork

FAMILIES = ("bernoulli", "categorical")
NONE = "none"
EVALUATION_BATCH = 100  # images, each with up to 100 samples at a time
MOST_LAYERS = 100  # each is a call within that of the layer below
MOST_SAMPLES = 1_000_000
REPORT_SAMPLES = 10  # of each test image after an epoch; --samples at the end
# images on the page, samples of each, and how many have their mean there
COMPLETED, COMPLETIONS, AVERAGED = 10, 8, 1000


@dataclass(frozen=True)
class Config(Annealing, Optimizing, ImageConfig):
    pixels: str = flag("fixed", f"{', '.join(PIXELS)}: gray values, binarised anew for every batch, or once")
    code: str = flag("bernoulli", f"{' or '.join(FAMILIES)}: the family of the variables in the stochastic layers")
    variables: int | None = flag(None, "L, variables in a layer; else 200 bits or 20 categorical ones", type=int)
    categories: int = flag(10, "K, the number of categories of each categorical variable")
    layers: int = flag(2, "stochastic layers, at most 100")
    estimator: str = flag(
        "st-gs",
        f"one of {', '.join(ESTIMATORS)}, options as in rloo:samples=4, for each layer; or {NONE}: a deterministic "
        "network that passes probabilities on",
    )
    epochs: int = flag(200, "passes over the training images")
    lr: float = flag(3e-3, "learning rate")
    train_samples: int = flag(1, "M > 1: train −log of the mean of p(y|d) over M samples; for samples with a rule")
    samples: int = flag(1000, "M, hard samples of each test image for the negative log-likelihood at the end")

    def check(self) -> None:
        super().check()
        at_least(1, self, "variables", "categories", "layers", "train_samples", "samples")
        one_of(self, code=FAMILIES)
        at_most(MOST_LAYERS, self, "layers")
        at_most(MOST_SAMPLES, self, "samples")

    def unread(self, estimator) -> dict[str, str]:
        found, without = super().unread(estimator), "a network without an estimator has no"
        if self.code == "bernoulli":
            found["categories"] = "bits have no categories"
        if estimator is None:
            found |= dict.fromkeys(("tau", "anneal", "anneal_every", "tau_least"), f"{without} temperature")
            found |= dict.fromkeys(("samples", "train_samples"), f"{without} samples")
        return found

    def create_estimator(self):
        """For one layer."""
        return None if self.estimator == NONE else create(self.estimator, self.tau, self.code)


class Estimators(list):
    """One estimator for each stochastic layer, all of one kind, as one: their updates and their states."""

    @property
    def logit_scale(self) -> list[float]:
        return [estimator.logit_scale for estimator in self]

    @property
    def tau(self) -> float:
        return self[0].tau

    @tau.setter
    def tau(self, tau: float) -> None:
        for estimator in self:
            estimator.tau = tau

    def update(self) -> None:
        for estimator in self:
            estimator.update()

    def state_dict(self) -> dict[str, np.ndarray]:
        return {f"{l}.{k}": v for l, estimator in enumerate(self) for k, v in estimator.state_dict().items()}

    def load_state_dict(self, state) -> None:
        """StateError if the state is not that of estimators for so many layers."""
        layers = tuple(f"{l}." for l in range(len(self)))
        if not all(key.startswith(layers) for key in state):
            raise StateError("the saved state is of another number of layers: build as many as it was saved from.")
        for l, estimator in enumerate(self):
            own = f"{l}."
            estimator.load_state_dict({k[len(own) :]: v for k, v in state.items() if k.startswith(own)})


class Structured(ImageExperiment):
    """One run: the data on the device, the network, an estimator for each of its layers (None: no samples at all)."""

    config_class = Config
    losses = ("Σ cost",)
    progress_key = "test"
    may_change = ("epochs", "data_dir", "samples")

    @classmethod
    def folder_parts(cls, c):
        return "structured", c.data, c.code, c.estimator.replace(":", "-"), f"s{c.seed}"

    def build(self, c: Config) -> None:
        bits = c.code == "bernoulli"
        variables, categories = c.variables or (200 if bits else 20), None if bits else c.categories
        rows = 1
        if self.estimator is not None:
            self.check_size(variables, 2 if bits else categories)
            check_evaluations(self.estimator, variables, 2 if bits else categories, c.layers)
            rows = draws(self.estimator) ** c.layers * c.train_samples
            self.estimator = Estimators([self.estimator, *(c.create_estimator() for _ in range(c.layers - 1))])
        self.load()
        height, width = self.images.shape
        self.seen = height // 2 * width  # pixels of the upper half, which come first
        latent = variables if bits else variables * categories
        rows *= min(c.batch, len(self.train))
        numbers = 3 * weights(self.seen, *[latent] * c.layers, height * width - self.seen) + rows * latent
        flags = "--variables, --categories, --layers, --train-samples, --batch or fewer samples"
        check_memory(numbers, self.dtype, flags, self.backend.name)
        shape = (self.seen, height * width - self.seen, variables, categories, c.layers)
        self.model = StochasticNetwork(*shape, rng=self.rng.site("weights"), dtype=self.dtype).to(self.backend)
        if self.estimator is not None:
            with user_errors(ValueError):  # an estimator that cannot be nested, or not be given several samples
                self.model.check(self.estimator, c.train_samples)
            self.warn_of(self.estimator[0])
        self.optimizer = c.optimizer_for(self.model)

    def step(self, index, rng: Rng) -> tuple:
        """Update the parameters on the images `index` (an integer array on the device)."""
        x, y = self.halves(self.binarised(self.train[index], rng.site("pixels")))
        self.optimizer.zero_grad()
        if self.estimator is None:
            cost = bce_with_logits(self.model.mean_field(x), y)
        else:
            cost = self.model.cost(x, y, self.estimator, rng.site("network"), self.config.train_samples)
        cost.mean().backward()
        self.optimizer.step()
        return (cost.data.sum(),)

    def halves(self, images):
        """The upper and the lower half of images (B, height·width)."""
        return images[:, : self.seen], images[:, self.seen :]

    # -- evaluation, always with hard samples

    def nll(self, images, samples: int, rng: Rng) -> float:
        """−log p(lower half | upper half) per image, in nats, with so many samples; the deterministic network needs
        none."""
        total = 0.0
        for start, part in batches(images, EVALUATION_BATCH):
            x, y = self.halves(part)
            if self.estimator is None:
                with no_grad():
                    nats = bce_with_logits(self.model.mean_field(x), y).data
            else:
                nats = self.model.nll(x, y, rng.site(start), samples)
            total += float(self.backend.to_host(nats).sum(dtype=np.float64))
        return total / len(images)

    def report(self, losses, speed: float) -> dict:
        """train: the objective as it was trained, with one sample, and with a soft one if that is what the estimator
        draws."""
        (train,) = losses.sum(axis=0) / len(self.train)
        test = self.nll(self.test, REPORT_SAMPLES, self.rng.site("test").at(self.epoch + 1))
        line = {"epoch": self.epoch + 1, "train": train, "test": test}
        if self.config.anneal:
            line["tau"] = self.estimator.tau
        return line | self.images_per_second(speed)

    # -- the end

    def final(self, folder) -> dict:
        samples = 1 if self.estimator is None else self.config.samples
        nll = self.nll(self.test, samples, self.rng.site("final"))
        return {"epoch": self.epoch, "test_nll": nll, "samples": samples}

    def draw(self, folder) -> None:
        """The learning curve, and a page of completed test images."""
        c, rng, sampled = self.config, self.rng.site("pictures"), self.estimator is not None
        labels = ("train", f"test, {REPORT_SAMPLES} samples" if sampled else "test")
        title = f"{c.estimator}, {c.code} layers, on {c.data}"
        curves(folder.path / "curve.png", folder.metrics(), title, "−log p(lower half | upper half), nats", labels)
        x, _ = self.halves(self.test[:COMPLETED])
        if sampled:
            completed = stable_sigmoid(self.model.sample(x, AVERAGED, rng))
            lower = [completed.mean(axis=0), *completed[:COMPLETIONS]]
            title = f"test images, their mean completions, and {COMPLETIONS} sampled ones"
        else:
            with no_grad():
                lower = [stable_sigmoid(self.model.mean_field(x).data)]
            title = "test images, each left of its completion"
        to_host = self.backend.to_host
        pages = [to_host(self.test[:COMPLETED])]
        pages += [np.concatenate([to_host(x), to_host(half)], axis=1) for half in lower]
        columns = 10 if not sampled else len(pages)
        images = np.stack(pages, axis=1).reshape(-1, pages[0].shape[1])
        page(folder.path / "completions.png", images, self.images.shape, title, columns)

    def last_words(self, metrics) -> str:
        last = [line for line in metrics if "train" in line][-1]
        return f"final train {last['train']:.4f} test nll {metrics[-1]['test_nll']:.4f}"


@command
def main(argv=None) -> int:
    return run(Structured, argv)


if __name__ == "__main__":
    sys.exit(main())
