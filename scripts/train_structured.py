"""Train a stochastic network to complete images: the lower half from the upper half, with any of the estimators.

    python scripts/train_structured.py                             # the embedded 8×8 digits, half a minute
    python scripts/train_structured.py --train-samples 20          # a minute, and completions that differ
    python scripts/train_structured.py --estimator none            # the deterministic network of the same size
    python scripts/train_structured.py --data mnist --optimizer sgd --lr 1e-3 --code categorical --epochs 100
    python scripts/train_structured.py --resume runs/NAME          # goes on bit for bit where it stopped

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
from estimators.base import TemperedSampler
from minigrad import Rng, no_grad
from minigrad.backend import BACKENDS, get_backend
from minigrad.fused import bce_with_logits
from minigrad.ops import stable_sigmoid
from minigrad.optim import OPTIMIZERS
from models.data import DATASETS, PIXELS, binarise, load_images
from models.structured import StochasticNetwork
from pictures import curves, page
from run_folder import RunFolder, default_folder, flag, report_errors, require, user_errors
from training import annealed

import numpy as np

log = logging.getLogger(__name__)

DTYPES = ("float32", "float64")
CODES = ("bernoulli", "categorical")
NONE = "none"
EVALUATION_BATCH = 100  # images, each with up to 100 samples at a time
REPORT_SAMPLES = 10  # of each test image after an epoch; --samples at the end
# images on the page, samples of each, and how many have their mean there
COMPLETED, COMPLETIONS, AVERAGED = 10, 8, 1000


@dataclass(frozen=True)
class Config:
    data: str = flag("digits", f"data set: {', '.join(DATASETS)}")
    data_dir: str = flag("", "a folder with one folder per data set; else MINIGRAD_DATA, else a download")
    pixels: str = flag("fixed", f"{', '.join(PIXELS)}: gray values, binarised anew for every batch, or once")
    code: str = flag("bernoulli", f"{' or '.join(CODES)}: the kind of variables in the stochastic layers")
    variables: int | None = flag(None, "L, variables in a layer; else 200 bits or 20 categorical ones", type=int)
    categories: int = flag(10, "K, the number of categories of each categorical variable")
    layers: int = flag(2, "stochastic layers")
    estimator: str = flag(
        "st-gs",
        f"one of {', '.join(ESTIMATORS)}, options as in rloo:samples=4, for each layer; or {NONE}: a deterministic "
        "network that passes probabilities on",
    )
    tau: float | None = flag(None, "temperature, at first, for estimators that have one", type=float)
    anneal: float = flag(0.0, "rate r: the temperature of step t is max(tau-least, tau · exp(-r t)); 0 keeps it")
    anneal_every: int = flag(500, "steps between two changes of the temperature")
    tau_least: float = flag(0.5, "the lowest temperature, if it is annealed")
    epochs: int = flag(200, "passes over the training images")
    batch: int = flag(100, "images in a batch")
    lr: float = flag(3e-3, "learning rate")
    optimizer: str = flag("adam", f"one of {', '.join(OPTIMIZERS)}; published: sgd")
    momentum: float = flag(0.9, "momentum of sgd")
    seed: int = flag(0, "fixes the initial weights, the order of the images and all noise")
    train_samples: int = flag(1, "M > 1: train −log of the mean of p(y|d) over M samples; for samples with a rule")
    samples: int = flag(1000, "M, hard samples of each test image for the negative log-likelihood at the end")
    backend: str = flag("numpy", f"one of {', '.join(BACKENDS)}")
    dtype: str = flag("float32", f"one of {', '.join(DTYPES)}")

    def check(self) -> None:
        """UserError, one sentence, for the first value out of range; names are checked where they are looked up."""
        for name in (
            "variables",
            "categories",
            "layers",
            "epochs",
            "batch",
            "train_samples",
            "samples",
            "anneal_every",
        ):
            value = getattr(self, name)
            require(value is None or value >= 1, f"--{name.replace('_', '-')} must be at least 1, got {value}.")
        require(math.isfinite(self.anneal) and self.anneal >= 0.0, f"--anneal must be at least 0, got {self.anneal}.")
        require(
            math.isfinite(self.tau_least) and self.tau_least > 0.0,
            f"--tau-least must be positive, got {self.tau_least}.",
        )
        for name, known in (("code", CODES), ("optimizer", OPTIMIZERS), ("dtype", DTYPES)):
            value = getattr(self, name)
            require(value in known, f"unknown {name} {value!r}; the known ones are {', '.join(known)}.")


class Estimators(list):
    """One estimator for each stochastic layer, all of one kind, as one: their updates and their states."""

    @property
    def sharpness(self) -> list[float]:
        return [estimator.sharpness for estimator in self]

    def update(self) -> None:
        for estimator in self:
            estimator.update()

    def state_dict(self) -> dict[str, np.ndarray]:
        return {f"{l}.{k}": v for l, estimator in enumerate(self) for k, v in estimator.state_dict().items()}

    def load_state_dict(self, state) -> None:
        for l, estimator in enumerate(self):
            own = f"{l}."
            estimator.load_state_dict({k[len(own) :]: v for k, v in state.items() if k.startswith(own)})


class Training(training.Training):
    """One run: the data on the device, the network, an estimator for each of its layers (None: no samples at all)."""

    progress_key = "test"

    def __init__(self, config: Config):
        super().__init__(config)
        c = config
        with user_errors():
            c.check()
            self.backend = get_backend(c.backend)
            bits = c.code == "bernoulli"
            variables, categories = c.variables or (200 if bits else 20), None if bits else c.categories
            if c.estimator != NONE:
                self.estimator = Estimators(create(c.estimator, c.tau, c.code) for _ in range(c.layers))
                if self.estimator[0].caution:
                    log.warning("%s may not train the network: %s.", c.estimator, self.estimator[0].caution)
                self.estimator[0].check_size(variables, 2 if bits else categories)
                self.tau = getattr(self.estimator[0], "tau", None)
            else:
                require(c.tau is None, "a network without an estimator has no temperature: leave out --tau.")
                require(
                    c.train_samples == 1, "a network without an estimator has no samples: leave out --train-samples."
                )
            require(
                c.anneal == 0.0 or (self.estimator is not None and isinstance(self.estimator[0], TemperedSampler)),
                f"the estimator {c.estimator} has no temperature that could be annealed: leave out --anneal.",
            )
            self.images = load_images(c.data, c.data_dir or None, c.pixels, np.dtype(c.dtype))
            self.rng = Rng(c.seed)
            self.train, self.test = (self.backend.to_device(x) for x in (self.images.train, self.images.test))
            if c.pixels == "dynamic":  # the test images are binarised once, the training images at every step
                self.test = binarise(self.test, self.rng.site("test pixels"))
            height, width = self.images.shape
            self.seen = height // 2 * width  # pixels of the upper half, which come first
            sizes = (self.seen, height * width - self.seen, variables, categories, c.layers)
            self.model = StochasticNetwork(*sizes, rng=self.rng.site("weights"), dtype=np.dtype(c.dtype))
            if self.estimator is not None:
                self.model.check(self.estimator, c.train_samples)
            self.model.to(self.backend)
            options = {"momentum": c.momentum} if c.optimizer == "sgd" else {}
            self.optimizer = OPTIMIZERS[c.optimizer](self.model.parameters(), c.lr, **options)
        self.steps_per_epoch = math.ceil(len(self.train) / c.batch)

    # -- one step

    def epoch_steps(self):
        """The images of each step, integer arrays on the device."""
        order = self.rng.site("order").at(self.epoch).permutation(len(self.train))
        order, size = self.backend.to_device(order), self.config.batch
        return [order[start : start + size] for start in range(0, len(order), size)]

    def step(self, index) -> None:
        """Update the parameters on the images `index` (an integer array on the device)."""
        c, step = self.config, self.epoch * self.steps_per_epoch + self.step_in_epoch
        rng, images = self.rng.at(step), self.train[index]
        if c.pixels == "dynamic":
            images = binarise(images, rng.site("pixels"))
        x, y = self.halves(images)
        self.optimizer.zero_grad()
        if self.estimator is None:
            cost = bce_with_logits(self.model.mean_field(x), y)
        else:
            if c.anneal:
                tau = annealed(step, self.tau, c.anneal, c.tau_least, c.anneal_every)
                for estimator in self.estimator:
                    estimator.tau = tau
            cost = self.model.cost(x, y, self.estimator, rng.site("network"), c.train_samples)
        cost.mean().backward()
        self.optimizer.step()
        if self.estimator is not None:
            self.estimator.update()
        self.losses.append((cost.data.sum(),))
        self.step_in_epoch += 1

    def halves(self, images):
        """The upper and the lower half of images (B, height·width)."""
        return images[:, : self.seen], images[:, self.seen :]

    # -- evaluation, always with hard samples

    def nll(self, images, samples: int, rng: Rng) -> float:
        """−log p(lower half | upper half) per image, in nats, with so many samples; the deterministic network needs
        none."""
        total = 0.0
        for start in range(0, len(images), EVALUATION_BATCH):
            x, y = self.halves(images[start : start + EVALUATION_BATCH])
            if self.estimator is None:
                with no_grad():
                    nats = bce_with_logits(self.model.mean_field(x), y).data
            else:
                nats = self.model.nll(x, y, rng.site(start), samples, sharpness=self.estimator.sharpness)
            total += float(self.backend.to_host(nats).sum(dtype=np.float64))
        return total / len(images)

    def report(self, first: int, start: float) -> dict:
        """The metrics of the epoch that has just ended. train: the objective as it was trained, with one sample, and
        with a soft one if that is what the estimator draws."""
        (train,) = self.check_losses().sum(axis=0) / len(self.train)
        self.backend.synchronize()
        rate = (len(self.train) - first * self.config.batch) / max(time.perf_counter() - start, 1e-9)
        test = self.nll(self.test, REPORT_SAMPLES, self.rng.site("test").at(self.epoch + 1))
        line = {"epoch": self.epoch + 1, "train": train, "test": test}
        if self.config.anneal:
            line["tau"] = self.estimator[0].tau
        return line | {"images_per_second": round(rate, 1)}

    def draw(self, folder: RunFolder) -> None:
        """The learning curve, and a page of completed test images."""
        c, rng, sampled = self.config, self.rng.site("pictures"), self.estimator is not None
        labels = ("train", f"test, {REPORT_SAMPLES} samples" if sampled else "test")
        title = f"{c.estimator}, {c.code} layers, on {c.data}"
        curves(folder.path / "curve.png", folder.metrics(), title, "−log p(lower half | upper half), nats", labels)
        x, _ = self.halves(self.test[:COMPLETED])
        if sampled:
            completed = stable_sigmoid(self.model.sample(x, AVERAGED, rng, self.estimator.sharpness))
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


def finish(run: Training, folder: RunFolder, quiet: bool) -> None:
    run.draw(folder)
    samples = run.config.samples if run.estimator is not None else 1
    line = {"epoch": run.epoch, "test_nll": run.nll(run.test, samples, run.rng.site("final")), "samples": samples}
    text = folder.log(line)
    if not quiet:
        print(text)
        print(f"metrics, pictures and checkpoint are in {folder.path}", file=sys.stderr)
    last = [line for line in folder.metrics() if "train" in line][-1]
    print(f"final train {last['train']:.4f} test nll {line['test_nll']:.4f}")


@report_errors
def main(argv=None) -> int:
    may_change = ("epochs", "data_dir", "samples")
    folder_for = lambda c: default_folder("structured", c.data, c.code, c.estimator.replace(":", "-"), f"s{c.seed}")
    return training.run_script(Config, Training, __doc__.split("\n\n")[0], argv, may_change, folder_for, finish)


if __name__ == "__main__":
    sys.exit(main())
