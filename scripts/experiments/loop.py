"""An experiment, and the loop that runs it: a run can stop after any step and go on elsewhere.

A command says three things and hands them to `run`:

    class Config(…)                 its flags
    class VAE(ImageExperiment):     what is built, what one step is, and what is measured
        def build(self, config): …          sets model, optimizer (and steps_per_epoch)
        def step(self, index, rng): …       one update; returns its losses, sums over the batch
        def report(self, losses, speed): …  the metrics since the latest report

The loop does what nobody shall forget: it counts the steps, sets a falling temperature, lets the estimator learn, tells
the model which logit scale the estimator has, looks for losses that are not finite, reports, saves and resumes.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from tqdm import tqdm

from estimators.base import SettingError, TemperedSampler
from minigrad import Rng
from minigrad.backend import BACKENDS, BackendUnavailable, get_backend
from minigrad.checkpoint import StateError
from minigrad.optim import OPTIMIZERS
from models.data import DATASETS, PIXELS, DataError, Images, binarise, load_images
from models.data.errors import data_folder

from . import signals
from .errors import UserError, disk_errors, require, size_errors, user_errors
from .flags import (
    DTYPES,
    OUT_FLAG,
    at_least,
    check_lr,
    check_read,
    check_seed,
    flag,
    one_of,
    option,
    parse_flags,
    quiet_flag,
)
from .run_folder import CHECKPOINT, RunFolder, new_folder
from .start import keep_freed_memory

log = logging.getLogger(__name__)

COUNTS = ("epoch", "step_in_epoch")  # of a checkpoint
# the learning rate when the fraction t of all steps is over: t in [0, 1), from the first rate to the last one
SCHEDULES = {
    "constant": lambda t, first, last: first,
    "cosine": lambda t, first, last: last + 0.5 * (first - last) * (1.0 + math.cos(math.pi * t)),
    "exponential": lambda t, first, last: first * (last / first) ** t,
}
CHECK_EVERY = 100  # steps between two looks at the losses; each look waits for the device


# ---- flags


@dataclass(frozen=True)
class Config:
    """The flags of every training command, which may give them other defaults."""

    data_dir: str = flag("", "a folder with one folder per data set; else MINIGRAD_DATA, else a download")
    epochs: int = flag(1, "passes over the training examples")
    batch: int = flag(100, "examples in a batch")
    lr: float = flag(1e-3, "learning rate")
    seed: int = flag(0, "fixes the initial weights, the order of the examples and all noise")
    backend: str = flag("numpy", f"one of {', '.join(BACKENDS)}")
    dtype: str = flag("float32", f"one of {', '.join(DTYPES)}")

    def check(self) -> None:
        """UserError, one sentence, for the first value out of range; a command adds its own."""
        at_least(1, self, "epochs", "batch")
        check_lr(self)
        check_seed(self)
        one_of(self, backend=sorted(BACKENDS), dtype=DTYPES)

    def create_estimator(self) -> Any:
        """A new estimator as the flags want it, None if they want none. ValueError or UserError, one sentence, for one
        that is unknown or cannot train the model."""
        return None

    def unread(self, estimator: Any) -> dict[str, str]:
        """{flag: why, a clause} of the flags that have no effect beside the others.   estimator: the one they want"""
        return {}

    def check_given(self, given: Iterable[str]) -> dict[str, str]:
        """All that can be checked before a run begins; UserError. -> those that are not read, see `unread`

        given: the names of the flags that somebody gave
        """
        self.check()
        with user_errors(SettingError):
            unread = self.unread(self.create_estimator())
        check_read(given, unread)
        if "data_dir" not in unread:
            with user_errors(DataError):
                data_folder(self.data_dir)
        return unread


@dataclass(frozen=True)
class ImageConfig(Config):
    """The flags of a command that learns from images."""

    data: str = flag("digits", f"data set: {', '.join(DATASETS)}")
    pixels: str = flag("gray", f"{', '.join(PIXELS)}: gray values, binarised anew for every batch, or once")

    def check(self) -> None:
        super().check()
        for name, known, what in (("data", DATASETS, "data set"), ("pixels", PIXELS, "pixels")):
            value = getattr(self, name)
            require(value in known, f"unknown {what} {value!r}; the known ones are {', '.join(known)}.")

    def unread(self, estimator: Any) -> dict[str, str]:
        embedded = {"data_dir": "the digits are embedded"} if self.data == "digits" else {}
        return super().unread(estimator) | embedded


@dataclass(frozen=True)
class Optimizing(Config):
    """The flags of a command that leaves the choice of the optimizer."""

    optimizer: str = flag("adam", f"one of {', '.join(OPTIMIZERS)}")
    momentum: float = flag(0.9, "momentum of sgd")

    def check(self) -> None:
        super().check()
        one_of(self, optimizer=OPTIMIZERS)
        require(0.0 <= self.momentum < 1.0, f"--momentum must be at least 0 and below 1, got {self.momentum}.")

    def unread(self, estimator: Any) -> dict[str, str]:
        without = {} if self.optimizer == "sgd" else {"momentum": f"{self.optimizer} takes no momentum"}
        return super().unread(estimator) | without

    def optimizer_for(self, model: Any) -> Any:
        options = {"momentum": self.momentum} if self.optimizer == "sgd" else {}
        return OPTIMIZERS[self.optimizer](model.parameters(), self.lr, **options)


@dataclass(frozen=True)
class Scheduled(Optimizing):
    """The flags of a command whose learning rate can fall from step to step."""

    schedule: str = flag("constant", f"the way of the learning rate from --lr to --lr-last: {', '.join(SCHEDULES)}")
    lr_last: float = flag(1e-5, "the learning rate that the last step comes close to")

    def check(self) -> None:
        super().check()
        one_of(self, schedule=SCHEDULES)
        fits = self.schedule == "constant" or 0.0 < self.lr_last <= self.lr
        require(fits, f"--lr-last must be above 0 and at most --lr {self.lr:g}, got {self.lr_last}.")

    def unread(self, estimator: Any) -> dict[str, str]:
        falls = {} if self.schedule != "constant" else {"lr_last": "the learning rate is constant"}
        return super().unread(estimator) | falls

    def lr_at(self, step: int, steps: int) -> float:
        """The learning rate of a step, from 0, of so many in all."""
        return SCHEDULES[self.schedule](step / steps, self.lr, self.lr_last)


@dataclass(frozen=True)
class Annealing(Config):
    """The flags of a command whose estimator can have a falling temperature."""

    tau: float | None = flag(None, "temperature, at first, for estimators that have one", type=float)
    anneal: float = flag(0.0, "rate r: the temperature of step t is max(tau-least, tau · exp(−r t)); 0 keeps it")
    anneal_every: int = flag(500, "steps between two changes of the temperature")
    tau_least: float = flag(0.5, "the lowest temperature, if it is annealed")

    def check(self) -> None:
        super().check()
        at_least(0, self, "anneal")
        at_least(1, self, "anneal_every")
        require(0.0 < self.tau_least < math.inf, f"--tau-least must be positive and finite, got {self.tau_least}.")

    def unread(self, estimator: Any) -> dict[str, str]:
        stays = "without --anneal the temperature stays"
        return super().unread(estimator) | ({} if self.anneal else {"anneal_every": stays, "tau_least": stays})

    def first_tau(self, estimator: Any) -> float | None:
        """Where the temperature of the estimator begins to fall; None if it does not. UserError for one whose
        temperature is not a setting, begins below the lowest one, or may not fall so low."""
        if not self.anneal:
            return None
        learns = "learns its temperature" if hasattr(estimator, "tau") else "has no temperature"
        require(isinstance(estimator, TemperedSampler), f"{self.estimator} {learns}: leave --anneal out.")
        first, least = estimator.tau, self.tau_least
        require(least <= first, f"--tau-least must be at most the first temperature {first}, got {least}.")
        lowest = estimator.min_tau
        require(
            least >= lowest,
            f"{self.estimator} needs a temperature of at least {lowest:g}: give --tau-least {lowest:g} or more.",
        )
        return first

    def tau_at(self, step: int, first: float) -> float:
        return annealed(step, first, self.anneal, self.tau_least, self.anneal_every)


def annealed(step: int, start: float, rate: float, least: float, every: int) -> float:
    """The temperature of a step (Jang, Gu & Poole 2017, section 4.2):  τ = max(least, start · e^(−rate·t)).

    t is the step rounded down to a multiple of `every`, so that τ changes only then.  step from 0, rate ≥ 0,
    every ≥ 1.  rate = 0 keeps `start`.
    """
    if rate == 0.0:
        return start
    return max(least, start * math.exp(-rate * (step // every * every)))


# ---- experiments


class Experiment:
    """Base class: what a command builds, steps and measures. The loop owns `epoch` and `step_in_epoch`.

    A subclass sets the class attributes and defines

    build(config)           sets model and optimizer; and estimator, if it is not the one that the flags want
    epoch_steps()           the arguments of this epoch's steps, something to index by the step
    steps_per_epoch         how many they are
    step(argument, rng)     one update; returns its losses, as many sums on the device as `losses` has names
    report(losses, speed)   the metrics since the latest report, a dict of numbers.  losses (steps, parts): what the
                            steps since then returned, on the host;  speed: steps per second
    """

    config_class: ClassVar[type[Config]] = Config
    losses: ClassVar[tuple[str, ...]] = ("loss",)
    reports_per_epoch: ClassVar[int] = 1
    progress_key: ClassVar[str] = ""  # which metric the progress bar shows
    may_change: ClassVar[tuple[str, ...]] = ("epochs", "data_dir")  # flags that a resumed run may change

    remarks: Sequence[str] = ()  # what to say before the first step

    model: Any
    optimizer: Any
    steps_per_epoch: Any

    def __init__(self, config: Any) -> None:
        self.config = config
        self.epoch = self.step_in_epoch = 0
        config.check()
        with user_errors(ValueError, BackendUnavailable):
            self.backend = get_backend(config.backend)
        self.rng, self.dtype = Rng(config.seed), np.dtype(config.dtype)
        with user_errors(SettingError):  # what the flags say about the estimator
            self.estimator = config.create_estimator()
        self.first_tau = config.first_tau(self.estimator) if isinstance(config, Annealing) else None
        with size_errors():
            self.build(config)
        self.set_logit_scale()

    @classmethod
    def folder_parts(cls, config: Any) -> tuple:
        """What the default name of a run folder is made of."""
        return (config.seed,)

    def build(self, config: Any) -> None:
        raise NotImplementedError

    def epoch_steps(self) -> Sequence:
        raise NotImplementedError

    def step(self, argument: Any, rng: Rng) -> tuple:
        raise NotImplementedError

    def report(self, losses: np.ndarray, speed: float) -> dict[str, Any]:
        raise NotImplementedError

    # -- what a subclass may add

    def parts(self) -> dict[str, Any]:
        """Everything that has a state, by the name that its arrays have in a checkpoint."""
        found = {"model": self.model, "optimizer": self.optimizer}
        return found if self.estimator is None else found | {"estimator": self.estimator}

    def info(self) -> dict[str, Any]:
        """What else a checkpoint remembers, for JSON."""
        return {}

    def restore_info(self, info: dict[str, Any]) -> None:
        """UserError if what was remembered does not fit."""

    def before_saving(self, folder: RunFolder, arrays: dict[str, np.ndarray], info: dict[str, Any]) -> None:
        """Called after a report, before its checkpoint is written: what that relies on is written first."""

    def check_folder(self, folder: RunFolder) -> None:
        """Called when a run was restored: UserError if the folder lacks what the run needs beside its checkpoint."""

    def final(self, folder: RunFolder) -> dict[str, Any]:
        """What is measured once, at the end; it is logged as a line of its own."""
        return {}

    def draw(self, folder: RunFolder) -> None:
        """The pictures of a finished run."""

    def last_words(self, metrics: list[dict[str, Any]]) -> str:
        """The line that a finished run ends with."""
        raise NotImplementedError

    # -- what they can use

    def check_size(self, variables: int, categories: int) -> None:
        """UserError if the estimator cannot handle so many variables of so many categories."""
        with user_errors(SettingError):
            self.estimator.check_size(variables, categories)

    def warn_of(self, estimator: Any) -> None:
        if estimator.warning:
            log.warning("%s may not train the model: %s.", self.config.estimator, estimator.warning)

    @property
    def steps(self) -> int:
        """How many steps there have been."""
        return self.epoch * self.steps_per_epoch + self.step_in_epoch

    def set_temperature(self) -> None:
        """Give the estimator the temperature of this step, if it is one that falls."""
        if self.first_tau:
            self.estimator.tau = self.config.tau_at(self.steps, self.first_tau)

    def set_learning_rate(self) -> None:
        """Give the optimizer the learning rate of this step, if it is one that falls."""
        if isinstance(self.config, Scheduled):
            self.optimizer.lr = self.config.lr_at(self.steps, self.config.epochs * self.steps_per_epoch)

    def set_logit_scale(self) -> None:
        """Tell the model from which logits the estimator draws its samples."""
        if self.estimator is not None and hasattr(self.model, "logit_scale"):
            self.model.logit_scale = self.estimator.logit_scale


class ImageExperiment(Experiment):
    """An experiment on images. `load` is for `build`.

    images: on the host;   train, test (N, pixels): on the device.   Those for tests are binarised once where those for
    training are binarised anew for every batch.
    """

    config_class = ImageConfig

    def read_images(self) -> Images:
        """The images of --data."""
        c = self.config
        with user_errors(DataError), disk_errors():
            return load_images(c.data, c.data_dir or None, c.pixels, self.dtype)

    def load(self) -> None:
        self.images = self.read_images()
        self.train, self.test = (self.backend.to_device(x) for x in (self.images.train, self.images.test))
        self.test = self.binarised(self.test, self.rng.site("test pixels"))

    def binarised(self, x: Any, rng: Rng) -> Any:
        """The images as --pixels wants them for a step, or for a measurement on training images."""
        return binarise(x, rng) if self.config.pixels == "dynamic" else x

    def epoch_steps(self) -> Sequence:
        """Which training images each step has, integer arrays on the device."""
        order = self.rng.site("order").at(self.epoch).permutation(len(self.train))
        order, size = self.backend.to_device(order), self.config.batch
        return [order[start : start + size] for start in range(0, len(order), size)]

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.train) // self.config.batch)  # no float: a batch can be too large for one

    def images_per_second(self, speed: float) -> dict[str, float]:
        """For the metrics.   speed: steps per second"""
        return {"images_per_second": round(speed * len(self.train) / self.steps_per_epoch, 1)}


class LabelledExperiment(ImageExperiment):
    """An experiment on images and their labels; the last sixth of the training images is for validation: 10,000 of
    MNIST's, as usual.

    valid (N, pixels); train_labels, valid_labels, test_labels (N,) int64: on the device
    """

    CLASSES = 10
    EVALUATION_BATCH = 1000

    def load(self) -> None:
        super().load()
        cut = len(self.train) - len(self.train) // 6
        labels = (self.images.train_labels[:cut], self.images.train_labels[cut:], self.images.test_labels)
        self.train_labels, self.valid_labels, self.test_labels = (self.backend.indices(y, self.CLASSES) for y in labels)
        self.valid = self.binarised(self.train[cut:], self.rng.site("validation pixels"))
        self.train = self.train[:cut]

    def counts(self, images: Any, labels: Any, evaluate: Callable) -> np.ndarray:
        """(how many predictions are wrong, …), each divided by the number of images.

        evaluate(x, start): of the images from `start` on, logits (B, classes), and arrays that are to be summed besides
        """
        parts, xp = [], self.backend.xp
        for start, x in batches(images, self.EVALUATION_BATCH):
            logits, *others = evaluate(x, start)
            wrong = logits.argmax(axis=1) != labels[start : start + self.EVALUATION_BATCH]
            parts.append(xp.stack([wrong.sum(dtype=np.float64), *(a.sum(dtype=np.float64) for a in others)]))
        return self.backend.to_host(xp.stack(parts)).sum(axis=0) / len(images)


# ---- the loop


class Loop:
    """Runs an experiment from where it stands to its last epoch."""

    def __init__(self, experiment: Experiment, folder: RunFolder, quiet: bool) -> None:
        self.experiment, self.folder, self.quiet = experiment, folder, quiet
        self.losses: list[tuple] = []  # one entry for each step since the latest report

    def run(self) -> bool:
        """Train to the last epoch. False if the user interrupted; the checkpoint then holds the last step."""
        x = self.experiment
        epochs, done = x.config.epochs, x.steps
        bar = {"total": epochs * x.steps_per_epoch, "initial": done, "unit": "step", "smoothing": 0.05}
        # losses, parameters and metrics are looked at explicitly; NumPy's own warnings would only blur the message
        with tqdm(**bar, disable=self.quiet, dynamic_ncols=True) as progress, signals.Interrupt() as interrupt:
            if not done:
                self.save()
            while x.epoch < epochs:
                steps, reports = x.epoch_steps(), self.report_after()
                start, first = time.perf_counter(), x.step_in_epoch
                for n in range(first, x.steps_per_epoch):
                    self.step(steps[n])
                    progress.update()
                    if x.step_in_epoch % CHECK_EVERY == 0:
                        self.losses_so_far()
                    if x.step_in_epoch in reports:
                        self.report((x.step_in_epoch - first) / max(time.perf_counter() - start, 1e-9), progress)
                        start, first = time.perf_counter(), x.step_in_epoch
                        if interrupt.requested:
                            return False
                    elif interrupt.requested:
                        self.save()
                        return False
            return not interrupt.requested

    def step(self, argument: Any) -> None:
        x = self.experiment
        x.set_temperature()
        x.set_learning_rate()
        self.losses.append(x.step(argument, x.rng.at(x.steps)))
        if x.estimator is not None:
            x.estimator.update()
            x.set_logit_scale()
        x.step_in_epoch += 1

    def report_after(self) -> set[int]:
        """After which steps of an epoch there is a report; the last one is among them."""
        n, steps = self.experiment.reports_per_epoch, self.experiment.steps_per_epoch
        return {math.ceil(steps * i / n) for i in range(1, n + 1)}

    def report(self, speed: float, progress: tqdm) -> None:
        """Measure, write the metrics, then the checkpoint that counts on them."""
        x = self.experiment
        losses = self.losses_so_far()
        x.backend.synchronize()
        line = self.checked(x.report(losses, speed))
        self.losses = []
        if x.step_in_epoch == x.steps_per_epoch:
            x.epoch, x.step_in_epoch = x.epoch + 1, 0
        text = self.folder.log(line)
        self.save(is_report=True)
        if not self.quiet:
            progress.write(text)
            progress.set_postfix_str(f"{x.progress_key} {line[x.progress_key]:.2f}")

    # -- numbers that are not finite

    def losses_so_far(self) -> np.ndarray:
        """The losses since the latest report on the host, (steps, parts) float64. UserError that names the first one
        not finite."""
        x = self.experiment
        losses = np.zeros((0, len(x.losses)))
        if self.losses:
            together = x.backend.xp.stack([part for parts in self.losses for part in parts])  # one launch for all
            losses = x.backend.to_host(together.reshape(-1, len(x.losses))).astype(np.float64)
        bad = ~np.isfinite(losses).all(axis=1)
        if bad.any():
            step = x.step_in_epoch - len(losses) + int(bad.argmax()) + 1
            raise self.stopped(f"the loss became {losses[bad][0].sum()}", step)
        return losses

    def checked(self, line: dict[str, Any]) -> dict[str, Any]:
        """The metrics as JSON has them; UserError if one is not finite."""
        numbers = {k: v for k, v in line.items() if not isinstance(v, dict | list | str)}
        if not all(map(math.isfinite, numbers.values())):
            raise self.stopped("the evaluation became infinite or NaN", self.experiment.step_in_epoch)
        return line | {k: v if isinstance(v, int) else float(v) for k, v in numbers.items()}

    def stopped(self, what: str, step_in_epoch: int) -> UserError:
        x = self.experiment
        step = x.epoch * x.steps_per_epoch + step_in_epoch
        epoch = max(0, step - 1) // x.steps_per_epoch + 1
        return UserError(
            f"{what} at step {step} (epoch {epoch}): training stopped, the last good checkpoint is kept; "
            "try a smaller --lr, or another temperature if there is one, in a new run."
        )

    # -- the state: everything that a step depends on and that is not addressed by (seed, step)

    def state(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """(arrays, info) for a checkpoint. UserError, so that nothing is saved, if a parameter is not finite."""
        x = self.experiment
        arrays = {f"{name}.{key}": a for name, part in x.parts().items() for key, a in part.state_dict().items()}
        if not all(np.isfinite(a).all() for name, a in arrays.items() if name.startswith("model.")):
            raise self.stopped("a parameter became infinite or NaN", x.step_in_epoch)
        arrays["losses"] = self.losses_so_far()
        counts = {"epoch": x.epoch, "step_in_epoch": x.step_in_epoch}
        return arrays, counts | {"config": dataclasses.asdict(x.config)} | x.info()

    def save(self, is_report: bool = False) -> None:
        arrays, info = self.state()
        if is_report:
            with disk_errors():
                self.experiment.before_saving(self.folder, arrays, info)
        self.folder.save(arrays, info)
        signals.kept = go_on(self.folder)

    def restore(self) -> None:
        """Go on where the checkpoint stands. UserError, and the folder is as it was, if it does not fit."""
        x, folder = self.experiment, self.folder
        arrays, info = folder.load()
        self.check_checkpoint(arrays, info)
        with user_errors(StateError, file=folder.path / CHECKPOINT):
            self.load_state(arrays, info)
        x.check_folder(folder)
        require(x.epoch <= x.config.epochs, f"{folder.path} is at epoch {x.epoch}: --epochs must not be less.")
        saved = {k: tuple(v) if isinstance(v, list) else v for k, v in info["config"].items()}
        config = dataclasses.asdict(x.config)
        changed = [k for k, v in config.items() if v != saved.get(k) and k not in x.may_change]
        require(not changed, f"{folder.path} has a checkpoint of another configuration ({', '.join(changed)} differ).")
        keeps_epochs = config.get("schedule", "constant") == "constant" or config["epochs"] == saved["epochs"]
        why = "over which its learning rate falls: leave --epochs out."
        require(keeps_epochs, f"{folder.path} was begun for {saved['epochs']} epochs, {why}")
        folder.rewind(info)

    def check_checkpoint(self, arrays: dict[str, np.ndarray], info: dict[str, Any]) -> None:
        """UserError unless the checkpoint has the form that `state` gives it."""
        steps, path, own = self.experiment.steps_per_epoch, self.folder.path, self.experiment.info()
        lines = "metrics_bytes" if "metrics_bytes" in info else "metrics_lines"
        missing = [name for name in (*COUNTS, lines, "config", *own) if name not in info]
        missing += ["losses"] if "losses" not in arrays else []
        require(not missing, f"{path} has a checkpoint of another program ({', '.join(missing)} missing).")
        counts, losses, at = [info[name] for name in (*COUNTS, lines)], arrays["losses"], info["step_in_epoch"]
        fits = all(type(n) is int and n >= 0 for n in counts)
        why = "" if fits else "its counts are no counts"
        if fits and at >= steps:
            why = f"step {at} of {steps}"
        if not isinstance(info["config"], dict) or any(type(info[name]) is not type(own[name]) for name in own):
            why = "what it says of the run has another form"
        if losses.ndim != 2 or losses.shape[1] != len(self.experiment.losses):
            why = f"its losses have the shape {losses.shape}"
        require(not why, f"{path / CHECKPOINT} is damaged ({why}): restore it, or start a new run.")

    def load_state(self, arrays: dict[str, np.ndarray], info: dict[str, Any]) -> None:
        """What `state` has saved. ValueError if it is that of another experiment."""
        x = self.experiment
        x.restore_info(info)
        for name, part in x.parts().items():
            prefix = f"{name}."
            part.load_state_dict({k[len(prefix) :]: v for k, v in arrays.items() if k.startswith(prefix)})
        losses = x.backend.to_device(arrays["losses"], x.config.dtype)
        self.losses = [tuple(parts) for parts in losses] if len(losses) else []
        x.epoch, x.step_in_epoch = info["epoch"], info["step_in_epoch"]
        x.set_logit_scale()

    def finish(self) -> None:
        """What is measured once, the pictures, and the last line."""
        x, folder = self.experiment, self.folder
        x.set_temperature()  # a run that is resumed after its last epoch never takes a step
        line = x.final(folder)
        if line:
            text = folder.log(self.checked(line))
            if not self.quiet:
                print(text)
        with disk_errors():
            x.draw(folder)
        if not self.quiet:
            print(f"metrics, pictures and checkpoint are in {folder.path}", file=sys.stderr)
        print(x.last_words(folder.metrics()))


# ---- commands


def run(experiment_class: type[Experiment], argv: Sequence[str] | None = None) -> int:
    """The whole of a training command: parse the flags, make or resume the run folder, train. -> the exit code"""
    names = [option(name) for name in experiment_class.may_change]
    extra = (
        OUT_FLAG,
        ("--resume", {"help": f"a run folder to go on with; only {', '.join(names[:-1])} and {names[-1]} may change"}),
        quiet_flag("print nothing but warnings and the last line"),
    )
    description = sys.modules[experiment_class.__module__].__doc__
    given, other = parse_flags(experiment_class.config_class, description, argv, extra)
    if "resume" in other:
        require("out" not in other, "--out and --resume exclude each other: a resumed run stays in its folder.")
        return resume(experiment_class, other["resume"], given, other["quiet"])
    config = experiment_class.config_class(**given)
    config.check_given(given)
    return begin(experiment_class, config, other.get("out"), other["quiet"])


def begin(experiment_class: type[Experiment], config: Any, out: Any = None, quiet: bool = False) -> int:
    """A new run in the folder `out`, or in one with a default name. -> the exit code"""
    signals.kept = ": nothing was kept."
    path = new_folder(out, *experiment_class.folder_parts(config))
    experiment = experiment_class(config)
    with RunFolder.create(path, config, experiment.backend, numbered=not out) as folder:
        return _train(Loop(experiment, folder, quiet))


def resume(experiment_class: type[Experiment], path: Any, given: dict[str, Any], quiet: bool = False) -> int:
    """Go on with the run in a folder.   given: flags, of which only `may_change` may differ. -> the exit code"""
    folder, config = RunFolder.resume(path, experiment_class.config_class, given, experiment_class.may_change)
    config.check_given(given)
    signals.kept = go_on(folder)
    with folder.locked(), np.errstate(all="ignore"):
        folder.check_writable()
        loop = Loop(experiment_class(config), folder, quiet)
        loop.restore()
        at = {name: getattr(loop.experiment, name) for name in COUNTS}
        folder.record(config, loop.experiment.backend, at)  # --epochs may have changed
        return _train(loop)


def go_on(folder: RunFolder) -> str:
    path = str(folder.path)
    path = f"./{path}" if path.startswith("-") else path  # else it would be taken for a flag
    return f"; go on with: python {shlex.quote(sys.argv[0])} --resume {shlex.quote(path)}"


def _train(loop: Loop) -> int:
    x, folder = loop.experiment, loop.folder
    keep_freed_memory()
    with np.errstate(all="ignore"):
        if not loop.quiet:
            print("\n".join([f"run folder {folder.path}", *x.remarks]), file=sys.stderr)
        if not loop.run():
            last = x.epoch == x.config.epochs
            at = "after the last epoch" if last else f"at epoch {x.epoch + 1}, step {x.step_in_epoch}"
            print(f"stopped {at}{go_on(folder)}", file=sys.stderr)
            return signals.CODE
        loop.finish()
    return 0


def batches(x: Any, size: int) -> Iterable[tuple[int, Any]]:
    """(start, x[start : start + size]) for all of x."""
    return ((start, x[start : start + size]) for start in range(0, len(x), size))
