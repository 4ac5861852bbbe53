"""Polynomial programming: the smallest problem that shows where an estimator's bias leads, with any of them.

    python scripts/polynomial.py --estimator st                # stays at 0.2475
    python scripts/polynomial.py --estimator reinmax           # goes on to the minimum, 0.2025
    python scripts/polynomial.py --estimator rloo:samples=4 --power 3 --epochs 10

(Liu, Dong, Liu, Yu & Gao 2023.) Many binary variables with logits θ (V, 2) each pay a cost of their own, and the mean
of the costs is to be least. With z the first coordinate of a one-hot, a = θ₁ − θ₂ and q = P(z = 1) = σ(a):

    E f(z) = q f(1) + (1 − q) f(0),     f(z) = |z − t|ᵖ,     f'(0) = −p tᵖ⁻¹,     f'(1) = p (1 − t)ᵖ⁻¹

    exact              d/da E f = q(1 − q) (f(1) − f(0)):  it never changes sign, so all z become 0 if t < ½, 1 if
                       t > ½, and the loss min(t, 1 − t)ᵖ. At the start q ≈ ½ and it is ½(f(0) + f(1)).
    straight-through   mean  q(1 − q) E f'(z),  E f'(z) = q f'(1) + (1 − q) f'(0): it vanishes inside, at
                           q* = tᵖ⁻¹/(tᵖ⁻¹ + (1 − t)ᵖ⁻¹) = σ((p − 1) log t/(1 − t))
                       and grows through 0 there, as f'(1) > 0 > f'(0): descent comes to q* from either side. The loss
                           q* (1 − t)ᵖ + (1 − q*) tᵖ = (t(1 − t))ᵖ⁻¹ / (tᵖ⁻¹ + (1 − t)ᵖ⁻¹)
                       is above the minimum for every p ≥ 1 (and t ≠ ½). The same holds for any τ and for the identity:
                       they only replace q(1 − q) by another positive factor.
    ReinMax            mean  q(1 − q) ½(f'(0) + f'(1)), and so ZGR and DARN (τ = 1): the exact gradient times
                           c = ½(f'(0) + f'(1)) / (f(1) − f(0))
                       which does not depend on q: positive for p > 1, 1 for p = 2, p − 1 in the limit t → ½.

    t = 0.45                    p = 1.5      p = 2        p = 3
    start                       0.35488      0.2525       0.12875
    straight-through, q*        0.47494      0.45         0.40099
    straight-through, loss      0.35222      0.2475       0.12130
    minimum                     0.30187      0.2025       0.09113
    ReinMax, c                  0.50084      1            1.99336

Each variable of each row of the batch is an example of its own, so that no estimator pays for the others' noise.
"""

from __future__ import annotations

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))
from experiments.start import before_numpy

before_numpy()

import math
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from estimators import ESTIMATORS, create
from estimators.base import SettingError
from experiments.errors import UserError, command, disk_errors, require, size_errors, user_errors
from experiments.flags import DTYPES, OUT_FLAG, at_least, check_lr, check_seed, flag, one_of, parse_flags, quiet_flag
from experiments.memory import check_memory, draws
from experiments.pictures import new_figure
from experiments.run_folder import RunFolder, new_folder
from minigrad import Rng, Tensor
from minigrad.backend import BACKENDS, BackendUnavailable, get_backend
from minigrad.ops import stable_sigmoid
from minigrad.optim import Adam

START = 0.01  # θ starts uniformly between −START and START
MOST = 10**8  # examples in a step: more are a mistake, and the machine would notice only while it computes


# ---- the problem and its closed forms; t in (0, 1), p ≥ 1


def cost(d, t: float, p: float):
    """f(z) = |z − t|ᵖ of each example.   d (B, 1, 2) one-hots or (B, 1) bits, or points between them   ->   (B,)"""
    z = d.reshape(d.shape[0], -1)[:, 0]
    return abs(z - t) ** p


def expected_loss(q: float, t: float, p: float) -> float:
    """E f(z) with q = P(z = 1)."""
    return q * (1.0 - t) ** p + (1.0 - q) * t**p


def optimum(t: float, p: float) -> float:
    """The least expected loss."""
    return min(t, 1.0 - t) ** p


def straight_through_fixed_point(t: float, p: float) -> float:
    """q* = σ((p − 1) log t/(1 − t)), where straight-through's mean gradient vanishes."""
    return 0.5 + 0.5 * math.tanh(0.5 * (p - 1.0) * math.log(t / (1.0 - t)))  # σ(x), and no x overflows


def reinmax_factor(t: float, p: float) -> float:
    """c = ½(f'(0) + f'(1)) / (f(1) − f(0)), by which ReinMax's mean gradient differs from the exact one.

    With s = min(t, 1 − t) and r = s/(1 − s) it is  p/(2(1 − s)) · (1 − rᵖ⁻¹)/(1 − rᵖ),  where no power underflows.
    """
    s = min(t, 1.0 - t)
    log_r = math.log(s / (1.0 - s))
    ratio = math.expm1((p - 1.0) * log_r) / math.expm1(p * log_r) if log_r else (p - 1.0) / p
    return p / (2.0 * (1.0 - s)) * ratio


def levels(t: float, p: float) -> dict[str, float]:
    """The three losses that a trajectory is read against."""
    return {
        "start": expected_loss(0.5, t, p),
        "straight-through's fixed point": expected_loss(straight_through_fixed_point(t, p), t, p),
        "minimum": optimum(t, p),
    }


# ---- a run


@dataclass(frozen=True)
class Config:
    estimator: str = flag("reinmax", f"one of {', '.join(ESTIMATORS)}; options as in rloo:samples=4")
    tau: float | None = flag(None, "temperature, for estimators that have one", type=float)
    power: float = flag(2.0, "p of the cost |z - t|**p, at least 1")
    target: float = flag(0.45, "t of the cost, between 0 and 1")
    variables: int = flag(128, "binary variables")
    batch: int = flag(64, "samples of each variable in a step")
    epochs: int = flag(40, "lines in the metrics")
    steps: int = flag(200, "steps in an epoch")
    lr: float = flag(1e-3, "learning rate of Adam")
    seed: int = flag(0, "fixes the start and all noise")
    backend: str = flag("numpy", f"one of {', '.join(BACKENDS)}")
    dtype: str = flag("float32", f"one of {', '.join(DTYPES)}")

    def check(self) -> None:
        """UserError, one sentence, for the first value out of range."""
        at_least(1, self, "variables", "batch", "epochs", "steps", "power")
        one_of(self, backend=sorted(BACKENDS), dtype=DTYPES)
        check_lr(self)
        check_seed(self)
        require(self.batch * self.variables <= MOST, f"--batch times --variables must be at most {MOST:,}.")
        require(0.0 < self.target < 1.0, f"--target must lie between 0 and 1, got {self.target}.")


class Descent:
    """θ on its way down with one estimator, `batch` samples of each variable in a step."""

    def __init__(self, config: Config, start, estimator, batch: int, xp):
        self.config, self.estimator = config, estimator
        self.theta = Tensor(start, requires_grad=True)
        self.optimizer = Adam([self.theta], config.lr)
        self.bits = estimator.family.name == "bernoulli"
        classes = () if self.bits else (2,)
        self.rows = xp.zeros((batch, config.variables, *classes), dtype=start.dtype)  # added, they repeat θ
        self.shape = (batch * config.variables, 1, *classes)

    def probability(self):
        """The mean over the variables of P(z = 1) for a hard sample, on the device."""
        theta = self.theta.data
        return stable_sigmoid(self.estimator.logit_scale * (theta[:, 0] - theta[:, 1])).mean()

    def step(self, rng: Rng):
        """(mean of the estimator's values, mean P(z = 1)) at θ, on the device; then θ moves."""
        c, probability = self.config, self.probability()
        self.optimizer.zero_grad()
        theta = self.theta[:, 0] - self.theta[:, 1] if self.bits else self.theta
        logits = (theta + self.rows).reshape(self.shape)
        loss = self.estimator(logits, lambda d: cost(d, c.target, c.power), rng).mean()
        loss.backward()
        self.optimizer.step()
        self.estimator.update()
        return loss.data, probability


class Race:
    """The estimator and, from the same start, the exact gradient."""

    def __init__(self, config: Config):
        c = self.config = config
        c.check()
        with user_errors(ValueError, BackendUnavailable):
            self.backend = get_backend(c.backend)
        with user_errors(SettingError):
            estimator = create(c.estimator, c.tau)
            estimator.check_size(1, 2)
        of = estimator.objective
        require(
            not estimator.multi_sample, f"{c.estimator} lowers {of}, which is not E f(z): choose another estimator."
        )
        numbers = c.batch * c.variables * (4 + draws(estimator))
        check_memory(numbers, c.dtype, "--batch, --variables or fewer samples", self.backend.name)
        self.rng = Rng(c.seed)
        with size_errors():
            uniform = self.rng.site("start").uniform((c.variables, 2), like=np.empty(0, c.dtype))
            start = self.backend.to_device(START * (2.0 * uniform - 1.0))
            self.estimated = Descent(c, start, estimator, c.batch, self.backend.xp)
            self.exact = Descent(c, start, create("exact"), 1, self.backend.xp)  # one row: its gradient has no noise

    def step(self, number: int):
        """(sampled loss, P(z = 1), P(z = 1) on the exact trajectory) before the step, on the device."""
        rng = self.rng.at(number).site("samples")
        sampled, probability = self.estimated.step(rng)
        return self.backend.xp.stack([sampled, probability, self.exact.step(rng)[1]])

    def epoch(self, number: int, progress) -> dict:
        """The metrics of an epoch, means over its steps. UserError if a loss is not finite.

        loss and exact_loss are expected ones, for hard samples; sampled_loss is the mean of what the estimator
        returned, the relaxed cost if its points are soft.
        """
        c, history = self.config, []
        for step in range((number - 1) * c.steps, number * c.steps):
            history.append(self.step(step))
            progress.update()
        values = self.backend.to_host(self.backend.xp.stack(history)).astype(np.float64)
        bad = ~np.isfinite(values).all(axis=1)
        if bad.any():
            at = int(bad.argmax())
            raise UserError(
                f"the loss became {values[at].sum()} at step {at + 1} of epoch {number}: the run is stopped; "
                "try a smaller --lr, a smaller --power or another --tau."
            )
        sampled, probability, exact = map(float, values.mean(axis=0))
        return {
            "epoch": number,
            "loss": expected_loss(probability, c.target, c.power),  # linear in q: the mean loss is that of the mean
            "sampled_loss": sampled,
            "exact_loss": expected_loss(exact, c.target, c.power),
            "probability": probability,
        }

    def run(self, folder: RunFolder, quiet: bool) -> None:
        c = self.config
        progress = tqdm(total=c.epochs * c.steps, unit="step", disable=quiet, dynamic_ncols=True)
        # the losses are looked at explicitly; NumPy's own warnings would only blur the message
        with progress, np.errstate(all="ignore"):
            for number in range(1, c.epochs + 1):
                text = folder.log(self.epoch(number, progress))
                if not quiet:
                    progress.write(text)


def draw(path, config: Config, metrics: list[dict]) -> None:
    """Both trajectories against the epoch, and the closed-form levels."""
    figure = new_figure(6, 4)
    axes = figure.subplots()
    epochs, marker = [m["epoch"] for m in metrics], "o" if len(metrics) < 20 else None
    for key, label, style in (("loss", config.estimator, "-"), ("exact_loss", "exact gradient", "--")):
        axes.plot(epochs, [m[key] for m in metrics], style, label=label, marker=marker, markersize=3)
    for (name, level), gray in zip(levels(config.target, config.power).items(), ("0.7", "0.45", "0.1"), strict=True):
        axes.axhline(level, color=gray, linestyle=":", label=f"{name}, {level:.5f}")
    axes.set_xlabel("epoch")
    axes.set_ylabel("expected loss, mean over the epoch")
    axes.set_title(f"E |z − t|ᵖ with t = {config.target:g}, p = {config.power:g}")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


@command
def main(argv=None) -> int:
    given, other = parse_flags(Config, __doc__, argv, (OUT_FLAG, quiet_flag("print nothing but the last line")))
    config, quiet = Config(**given), other["quiet"]
    name = config.estimator.replace(":", "-")
    path = new_folder(other.get("out"), "polynomial", name, f"p{config.power:g}", f"s{config.seed}")
    race = Race(config)
    with RunFolder.create(path, config, race.backend, numbered="out" not in other) as folder:
        if not quiet:
            known = ", ".join(f"{k} {v:.6f}" for k, v in levels(config.target, config.power).items())
            print(f"run folder {folder.path}\nlevels: {known}", file=sys.stderr)
        race.run(folder, quiet)
        metrics = folder.metrics()
        with disk_errors():
            draw(folder.path / "curve.png", config, metrics)
    print(f"final loss {metrics[-1]['loss']:.6f} exact {metrics[-1]['exact_loss']:.6f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
