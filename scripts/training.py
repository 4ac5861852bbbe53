"""A training run that can stop after any step and go on elsewhere: what the training scripts have in common.

A script derives from `Training`, says what a step and a report are, and hands both classes to `run_script`.
"""

from __future__ import annotations

import dataclasses
import math
import shlex
import sys
import time
from pathlib import Path

from estimators.base import TemperedSampler
from minigrad.blas import keep_freed_memory
from run_folder import Interrupt, RunFolder, UserError, parse_flags, require, user_errors

import numpy as np
from tqdm import tqdm

CHECK_EVERY = 100  # steps between two looks at the losses; each look waits for the device


def annealed(step: int, start: float, rate: float, least: float, every: int) -> float:
    """The temperature of a step (Jang, Gu & Poole 2017, section 4.2):  τ = max(least, start · e^(−rate·t)).

    t is the step rounded down to a multiple of `every`, so that τ changes only then.  step from 0, rate ≥ 0,
    every ≥ 1.  rate = 0 keeps `start`.
    """
    if rate == 0.0:
        return start
    return max(least, start * math.exp(-rate * (step // every * every)))


def first_temperature(estimator, spec: str) -> float:
    """Where the temperature of an estimator begins to fall. UserError for one whose temperature is not a setting."""
    learns = "learns its temperature" if hasattr(estimator, "tau") else "has no temperature"
    require(isinstance(estimator, TemperedSampler), f"{spec} {learns}: leave --anneal out.")
    return estimator.tau


class Training:
    """Base class. A subclass sets backend, model, optimizer, estimator and steps_per_epoch, and defines

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
        self.estimator = None
        self.epoch = self.step_in_epoch = 0
        self.losses: list[tuple] = []  # one entry for each step since the latest report

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
            losses = self.backend.to_host(xp.stack([xp.stack(parts) for parts in self.losses])).astype(np.float64)
        bad = ~np.isfinite(losses).all(axis=1)
        if bad.any():
            step = self.step_in_epoch - len(losses) + int(bad.argmax()) + 1
            self.fail(f"the loss became {losses[bad][0].sum()}", step)
        return losses

    def fail(self, what: str, step_in_epoch: int):
        step = self.epoch * self.steps_per_epoch + step_in_epoch
        raise UserError(
            f"{what} at step {step} (epoch {self.epoch + 1}): training stopped, the last good checkpoint is kept; "
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
        done = self.epoch * self.steps_per_epoch + self.step_in_epoch
        progress = tqdm(total=total, initial=done, unit="step", disable=quiet, dynamic_ncols=True, smoothing=0.05)
        # losses and parameters are looked at explicitly; NumPy's own warnings would only blur the message
        with progress, Interrupt() as interrupt, np.errstate(all="ignore"):
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

    def checked(self, line: dict) -> dict:
        """The metrics with plain numbers; UserError if one is not finite."""
        if not all(map(math.isfinite, line.values())):
            self.fail("the evaluation became infinite or NaN", self.step_in_epoch)
        return {k: float(v) if not isinstance(v, int) else v for k, v in line.items()}


def run_script(config_class, training_class, description, argv, may_change, folder_for, finish) -> int:
    """Parse the flags, make or resume the run folder, train, and finish(training, folder, quiet). -> the exit code

    may_change: the flags that a resumed run may change.  folder_for(config): where a run goes without --out.
    """
    keep_freed_memory()
    names = [f"--{name.replace('_', '-')}" for name in may_change]
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
        with user_errors():
            _restore(training, folder, may_change)
            folder.write_config(config, training.backend)  # --epochs may have changed
    else:
        config = dataclasses.replace(config_class(), **given)
        out = Path(other.get("out") or folder_for(config))
        with user_errors():  # before any data is made or read
            require(not out.exists(), f"the output folder {out} exists already: choose another --out.")
        training = training_class(config)
        with user_errors():
            folder = RunFolder.create(out, config, training.backend)
    if not quiet:
        print(f"run folder {folder.path}", file=sys.stderr)

    with user_errors():
        finished = training.run(folder, quiet)
    if not finished:
        at = f"epoch {training.epoch + 1}, step {training.step_in_epoch}"
        print(
            f"stopped at {at}; go on with: python {sys.argv[0]} --resume {shlex.quote(str(folder.path))}",
            file=sys.stderr,
        )
        return 130
    with user_errors():
        finish(training, folder, quiet)
    return 0


def _restore(training: Training, folder: RunFolder, may_change) -> None:
    config = training.config
    arrays, info = folder.load()
    try:
        training.restore(arrays, info)
    except KeyError as error:
        raise ValueError(f"{folder.path} has a checkpoint of another program ({error} is missing).") from error
    require(training.epoch <= config.epochs, f"{folder.path} is at epoch {training.epoch}: --epochs must not be less.")
    saved = {k: tuple(v) if isinstance(v, list) else v for k, v in info["config"].items()}
    changed = [k for k, v in dataclasses.asdict(config).items() if v != saved[k] and k not in may_change]
    require(not changed, f"{folder.path} has a checkpoint of another configuration ({', '.join(changed)} differ).")
    folder.rewind_metrics(info)
