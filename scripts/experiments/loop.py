"""A training run that can stop after any step and go on elsewhere: what the training scripts have in common.

A script derives its flags from `Config` and its run from `Training`, or from `ImageConfig` and `ImageTraining` if it
learns from images, says what a step and a report are, and hands both classes to `run_script`.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from estimators.base import TemperedSampler
from experiments.run_folder import (
    CHECKPOINT,
    DTYPES,
    Interrupt,
    RunFolder,
    UserError,
    at_least,
    flag,
    one_of,
    option,
    parse_flags,
    require,
    unused,
    user_errors,
)
from experiments.start import keep_freed_memory
from minigrad import Rng
from minigrad.backend import BACKENDS, get_backend
from minigrad.optim import OPTIMIZERS
from models.data import DATASETS, PIXELS, binarise, load_images

log = logging.getLogger(__name__)

CHECK_EVERY = 100  # steps between two looks at the losses; each look waits for the device


# ---- flags


@dataclass(frozen=True)
class Config:
    """The flags of every training script, which may give them other defaults."""

    data_dir: str = flag("", "a folder with one folder per data set; else MINIGRAD_DATA, else a download")
    epochs: int = flag(1, "passes over the training examples")
    batch: int = flag(100, "examples in a batch")
    lr: float = flag(1e-3, "learning rate")
    seed: int = flag(0, "fixes the initial weights, the order of the examples and all noise")
    backend: str = flag("numpy", f"one of {', '.join(BACKENDS)}")
    dtype: str = flag("float32", f"one of {', '.join(DTYPES)}")

    def check(self) -> None:
        """UserError, one sentence, for the first value out of range; a script adds its own. Names are checked where
        they are looked up."""
        at_least(1, self, "epochs", "batch")
        one_of(self, dtype=DTYPES)

    def create_estimator(self):
        """A new estimator as the flags want it, None if they want none. ValueError or UserError, one sentence, for one
        that is unknown or cannot train the model."""
        raise NotImplementedError


@dataclass(frozen=True)
class ImageConfig(Config):
    """The flags of a script that learns from images."""

    data: str = flag("digits", f"data set: {', '.join(DATASETS)}")
    pixels: str = flag("gray", f"{', '.join(PIXELS)}: gray values, binarised anew for every batch, or once")


@dataclass(frozen=True)
class Optimizing:
    """The flags of a script that leaves the choice of the optimizer."""

    optimizer: str = flag("adam", f"one of {', '.join(OPTIMIZERS)}")
    momentum: float = flag(0.9, "momentum of sgd")

    def check(self) -> None:
        super().check()
        one_of(self, optimizer=OPTIMIZERS)
        if self.optimizer != "sgd":
            unused(self, f"{self.optimizer} takes no momentum", "momentum")

    def optimizer_for(self, model):
        options = {"momentum": self.momentum} if self.optimizer == "sgd" else {}
        return OPTIMIZERS[self.optimizer](model.parameters(), self.lr, **options)


@dataclass(frozen=True)
class Annealing:
    """The flags of a script whose estimator can have a falling temperature."""

    tau: float | None = flag(None, "temperature, at first, for estimators that have one", type=float)
    anneal: float = flag(0.0, "rate r: the temperature of step t is max(tau-least, tau · exp(−r t)); 0 keeps it")
    anneal_every: int = flag(500, "steps between two changes of the temperature")
    tau_least: float = flag(0.5, "the lowest temperature, if it is annealed")

    def check(self) -> None:
        super().check()
        at_least(0, self, "anneal")
        at_least(1, self, "anneal_every")
        require(0.0 < self.tau_least < math.inf, f"--tau-least must be positive and finite, got {self.tau_least}.")
        if not self.anneal:
            unused(self, "without --anneal the temperature stays", "anneal_every", "tau_least")

    def first_tau(self, estimator) -> float | None:
        """Where the temperature of the estimator begins to fall; None if it does not. UserError for one whose
        temperature is not a setting, begins below the lowest one, or may not fall so low."""
        if not self.anneal:
            return None
        learns = "learns its temperature" if hasattr(estimator, "tau") else "has no temperature"
        require(isinstance(estimator, TemperedSampler), f"{self.estimator} {learns}: leave --anneal out.")
        first, least = estimator.tau, self.tau_least
        require(least <= first, f"--tau-least must be at most the first temperature {first}, got {least}.")
        min_tau = estimator.min_tau
        require(
            least >= min_tau,
            f"{self.estimator} needs a temperature of at least {min_tau:g}: give --tau-least {min_tau:g} or more.",
        )
        return first

    def tau_at(self, step: int, first: float) -> float:
        return annealed(step, first, self.anneal, self.tau_least, self.anneal_every)


# ---- the temperature


def annealed(step: int, start: float, rate: float, least: float, every: int) -> float:
    """The temperature of a step (Jang, Gu & Poole 2017, section 4.2):  τ = max(least, start · e^(−rate·t)).

    t is the step rounded down to a multiple of `every`, so that τ changes only then.  step from 0, rate ≥ 0,
    every ≥ 1.  rate = 0 keeps `start`.
    """
    if rate == 0.0:
        return start
    return max(least, start * math.exp(-rate * (step // every * every)))


# ---- the run


class Training:
    """Base class. A subclass sets model, optimizer, estimator and steps_per_epoch in `build`, and defines

    epoch_steps()          the arguments of this epoch's steps, something to index by the step
    step(argument)         one update; appends to `losses` a tuple of sums on the device, and counts step_in_epoch
    report(first, start)   the metrics since step `first` of the epoch, which began at time.perf_counter() = start; a
                           dict of numbers
    """

    loss_parts = 1  # how many sums a step appends
    reports_per_epoch = 1
    progress_key = ""  # which metric the progress bar shows

    def __init__(self, config):
        self.config = config
        self.estimator = self.first_tau = None  # first_tau: where a falling temperature begins, see `Annealing`
        self.epoch = self.step_in_epoch = 0
        self.losses: list[tuple] = []  # one entry for each step since the latest report
        with user_errors():
            config.check()
            self.backend, self.rng, self.dtype = get_backend(config.backend), Rng(config.seed), np.dtype(config.dtype)
            self.build(config)

    @property
    def steps(self) -> int:
        """How many steps there have been."""
        return self.epoch * self.steps_per_epoch + self.step_in_epoch

    def warn(self, estimator) -> None:
        if estimator.warning:
            log.warning("%s may not train the model: %s.", self.config.estimator, estimator.warning)

    def set_temperature(self) -> None:
        """Give the estimator the temperature of this step, if it is one that falls."""
        if self.first_tau:
            self.estimator.tau = self.config.tau_at(self.steps, self.first_tau)

    def report_after(self) -> set[int]:
        """After which steps of an epoch there is a report; the last one is among them."""
        n = self.reports_per_epoch
        return {math.ceil(self.steps_per_epoch * i / n) for i in range(1, n + 1)}

    def check_losses(self) -> np.ndarray:
        """The losses since the latest report on the host, (steps, loss_parts) float64. UserError that names the first
        one not finite."""
        xp = self.backend.xp
        losses = np.zeros((0, self.loss_parts))
        if self.losses:
            together = xp.stack([part for parts in self.losses for part in parts])  # one launch, not one for each step
            losses = self.backend.to_host(together.reshape(-1, self.loss_parts)).astype(np.float64)
        bad = ~np.isfinite(losses).all(axis=1)
        if bad.any():
            step = self.step_in_epoch - len(losses) + int(bad.argmax()) + 1
            self.fail(f"the loss became {losses[bad][0].sum()}", step)
        return losses

    def fail(self, what: str, step_in_epoch: int):
        step = self.epoch * self.steps_per_epoch + step_in_epoch
        epoch = max(0, step - 1) // self.steps_per_epoch + 1
        raise UserError(
            f"{what} at step {step} (epoch {epoch}): training stopped, the last good checkpoint is kept; "
            "try a smaller --lr, or another temperature if there is one, in a new run."
        )

    # -- the state: everything that a step depends on and that is not addressed by (seed, step)

    def state(self):
        """(arrays, info) for a checkpoint. UserError, so that nothing is saved, if a parameter is not finite."""
        arrays = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        if not all(np.isfinite(a).all() for a in arrays.values()):
            self.fail("a parameter became infinite or NaN", self.step_in_epoch)
        arrays |= {f"optimizer.{k}": v for k, v in self.optimizer.state_dict().items()}
        if self.estimator is not None:
            arrays |= {f"estimator.{k}": v for k, v in self.estimator.state_dict().items()}
        arrays["losses"] = self.check_losses()
        return arrays, {
            "epoch": self.epoch,
            "step_in_epoch": self.step_in_epoch,
            "config": dataclasses.asdict(self.config),
        }

    def restore(self, arrays, info) -> None:
        part = lambda name: {k[len(name) + 1 :]: v for k, v in arrays.items() if k.startswith(name + ".")}
        self.model.load_state_dict(part("model"))
        self.optimizer.load_state_dict(part("optimizer"))
        if self.estimator is not None:
            self.estimator.load_state_dict(part("estimator"))
        losses = self.backend.to_device(arrays["losses"], self.config.dtype)
        self.losses = [tuple(parts) for parts in losses] if len(losses) else []
        self.epoch, self.step_in_epoch = info["epoch"], info["step_in_epoch"]

    # -- the loop

    def run(self, folder: RunFolder, quiet: bool) -> bool:
        """Train to the last epoch. False if the user interrupted; the checkpoint then holds the last step."""
        c = self.config
        total = c.epochs * self.steps_per_epoch
        done = self.steps
        progress = tqdm(total=total, initial=done, unit="step", disable=quiet, dynamic_ncols=True, smoothing=0.05)
        with progress, Interrupt() as interrupt:
            if not done:
                folder.save(*self.state())
            while self.epoch < c.epochs:
                steps, report_after = self.epoch_steps(), self.report_after()
                start, first = time.perf_counter(), self.step_in_epoch
                for n in range(first, self.steps_per_epoch):
                    self.step(steps[n])
                    progress.update()
                    if self.step_in_epoch % CHECK_EVERY == 0:
                        self.check_losses()
                    if self.step_in_epoch in report_after:
                        line = self.checked(self.report(first, start))
                        self.losses, first = [], self.step_in_epoch
                        if first == self.steps_per_epoch:
                            self.epoch, self.step_in_epoch = self.epoch + 1, 0
                        text = folder.log(line)
                        self.before_saving(folder)
                        folder.save(*self.state())
                        start = time.perf_counter()
                        if not quiet:
                            progress.write(text)
                            progress.set_postfix_str(f"{self.progress_key} {line[self.progress_key]:.2f}")
                        if interrupt.requested:
                            return self.epoch == c.epochs
                    elif interrupt.requested:
                        folder.save(*self.state())
                        return False
        return True

    def before_saving(self, folder: RunFolder) -> None:
        """Called when a report was logged, before the checkpoint: what the checkpoint relies on is written first."""

    def check_folder(self, folder: RunFolder) -> None:
        """Called when a run was restored: an error if the folder lacks what the run needs beside its checkpoint."""

    def checked(self, line: dict) -> dict:
        """The metrics with plain numbers; UserError if one is not finite."""
        if not all(map(math.isfinite, line.values())):
            self.fail("the evaluation became infinite or NaN", self.step_in_epoch)
        return {k: float(v) if not isinstance(v, int) else v for k, v in line.items()}


class ImageTraining(Training):
    """A run on images. `load` is for `build`.

    images: on the host;   train, test (N, pixels): on the device.   Those for tests are binarised once where those for
    training are binarised anew for every batch.
    """

    def load(self) -> None:
        c = self.config
        self.images = load_images(c.data, c.data_dir or None, c.pixels, self.dtype)
        self.train, self.test = (self.backend.to_device(x) for x in (self.images.train, self.images.test))
        self.test = self.binarised(self.test, self.rng.site("test pixels"))

    def binarised(self, x, rng: Rng):
        """The images as --pixels wants them for a step, or for a measurement on training images."""
        return binarise(x, rng) if self.config.pixels == "dynamic" else x

    def epoch_steps(self):
        """Which training images each step has, integer arrays on the device."""
        order = self.rng.site("order").at(self.epoch).permutation(len(self.train))
        order, size = self.backend.to_device(order), self.config.batch
        return [order[start : start + size] for start in range(0, len(order), size)]

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.train) // self.config.batch)  # no float: a batch can be too large for one


def run_script(config_class, training_class, description, argv, may_change, folder_for, finish) -> int:
    """Parse the flags, make or resume the run folder, train, and finish(training, folder, quiet). -> the exit code

    may_change: the flags that a resumed run may change.  folder_for(config): where a run goes without --out.
    """
    keep_freed_memory()
    names = [option(name) for name in may_change]
    extra = (
        ("--out", {"help": "the run folder to make (default: a new one below runs/)"}),
        ("--resume", {"help": f"a run folder to go on with; only {', '.join(names[:-1])} and {names[-1]} may change"}),
        ("--quiet", {"action": "store_true", "default": False, "help": "print nothing but warnings and the last line"}),
    )
    given, other = parse_flags(config_class, description, argv, extra)
    quiet = other["quiet"]
    if "resume" in other:
        require("out" not in other, "--out and --resume exclude each other: a resumed run stays in its folder.")
        with user_errors():
            folder, config = RunFolder.resume(other["resume"], config_class, given, set(may_change))
        training = training_class(config)
    else:
        config = dataclasses.replace(config_class(), **given)
        with user_errors():  # before any data is made or read
            out = Path(other.get("out") or folder_for(config))
            require(not out.exists(), f"the output folder {out} exists already: choose another --out.")
        training = training_class(config)
        with user_errors():
            folder = RunFolder.create(out, config, training.backend)
    # losses, parameters and metrics are looked at explicitly; NumPy's own warnings would only blur the message
    with user_errors(), folder.locked(), np.errstate(all="ignore"):
        if "resume" in other:
            _restore(training, folder, may_change)
            folder.write_config(config, training.backend)  # --epochs may have changed
        if not quiet:
            print(f"run folder {folder.path}", file=sys.stderr)
        if not training.run(folder, quiet):
            at = f"epoch {training.epoch + 1}, step {training.step_in_epoch}"
            again = f"python {sys.argv[0]} --resume {shlex.quote(str(folder.path))}"
            print(f"stopped at {at}; go on with: {again}", file=sys.stderr)
            return 130
        finish(training, folder, quiet)
    return 0


def _restore(training: Training, folder: RunFolder, may_change) -> None:
    config = training.config
    arrays, info = folder.load()
    try:
        training.restore(arrays, info)
        training.check_folder(folder)
        saved = {k: tuple(v) if isinstance(v, list) else v for k, v in info["config"].items()}
        counts = [info[name] for name in ("epoch", "step_in_epoch", "metrics_bytes")]
        if not all(type(n) is int and n >= 0 for n in counts):
            raise TypeError(f"{counts} are no counts")
    except KeyError as error:
        raise ValueError(f"{folder.path} has a checkpoint of another program ({error} is missing).") from error
    except (AttributeError, IndexError, TypeError) as error:
        raise ValueError(f"{folder.path / CHECKPOINT} is damaged ({error}): restore it, or start a new run.") from error
    require(training.epoch <= config.epochs, f"{folder.path} is at epoch {training.epoch}: --epochs must not be less.")
    changed = [k for k, v in dataclasses.asdict(config).items() if v != saved.get(k) and k not in may_change]
    require(not changed, f"{folder.path} has a checkpoint of another configuration ({', '.join(changed)} differ).")
    at, n = training.step_in_epoch, training.steps_per_epoch
    require(at < n, f"{folder.path / CHECKPOINT} is damaged (step {at} of {n}): restore it, or start a new run.")
    folder.rewind_metrics(info)
