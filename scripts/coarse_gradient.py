"""Where coarse gradients lead: the proxies of a step on two problems that are small enough to be looked at as a whole.

    python scripts/coarse_gradient.py                                  # the population problem, ten seconds
    python scripts/coarse_gradient.py --ratio 0.5                      # where the identity is caught
    python scripts/coarse_gradient.py --problem subspaces              # two-sided data, half a minute
    python scripts/coarse_gradient.py --problem subspaces --sided one

population   Yin et al. 2019, `models/population.py`: descent along the expected coarse gradients of three proxies, once
             from a start beside the spurious minimum, and from random ones. v* has the length √m and a random direction
             with (1ᵀv*)²/‖v*‖² = --ratio. A run ends at the global minimum if its loss is below 1e-6; caught if w is
             within 0.1 of 0, where its direction jumps; and at the spurious minimum if its loss is within 1 % of that
             one's and θ > 0.99 π.
subspaces    Long, Yin & Xin 2020, `models/data/subspaces.py`: two linear layers with a staircase between them and the
             hinge, the whole data in a step, until all points are classified. Then new points of the same subspaces
             are.
"""

from __future__ import annotations

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))
from experiments.start import before_numpy

before_numpy()

import dataclasses
import math
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from experiments.errors import command, disk_errors, require, size_errors
from experiments.flags import (
    OUT_FLAG,
    at_least,
    at_most,
    check_lr,
    check_read,
    check_seed,
    flag,
    one_of,
    parse_flags,
    quiet_flag,
    sizes,
)
from experiments.memory import check_memory, weights
from experiments.pictures import LINES, new_figure
from experiments.run_folder import RunFolder, new_folder
from minigrad import Rng
from minigrad.backend import get_backend
from minigrad.optim import SGD
from models import population, quantised
from models.data import subspaces
from models.quantised import Activation, TwoLinearLayers, hinge

MOST, MOST_SEEDS = 10**7, 10**4  # steps and starts; seeds: more are a mistake
LEAST_RATIO = 1e-3  # below, the loss of the spurious minimum comes near that of the global one, which is 0
BESIDE = 0.01  # the deviation of the start beside the spurious minimum, in every coordinate
DRAWN = 400  # steps of a trajectory that are drawn
NEW = 250  # points in a class that are not trained on
ENDS = ("global", "caught", "spurious", "elsewhere")


@dataclass(frozen=True)
class Problem:
    """What is chosen for a problem unless a flag says otherwise, and the flags that it alone has."""

    settings: dict
    flags: tuple


PROBLEMS = {
    "population": Problem(
        {"proxies": population.PROXIES, "units": 4, "steps": 20_000, "lr": 0.01},
        ("inputs", "ratio", "starts"),
    ),
    "subspaces": Problem(
        {"proxies": quantised.PROXIES, "units": 64, "steps": 1000, "lr": 0.1},
        ("sided", "bits", "alpha", "classes", "dimensions", "points", "fixed", "seeds"),
    ),
}


def names(text: str) -> tuple[str, ...]:
    """The type of a flag like --proxies relu,identity."""
    return tuple(text.split(","))


@dataclass(frozen=True)
class Config:
    problem: str = flag("population", f"one of {', '.join(PROBLEMS)}")
    proxies: tuple = flag((), "which ones, as in relu,identity; else all that the problem knows", type=names)
    units: int | None = flag(None, "units with a step, the rows m of Z; else 4, subspaces: 64", type=int)
    steps: int | None = flag(None, "steps at most; else 20000, subspaces: 1000", type=int)
    lr: float | None = flag(None, "learning rate; else 0.01, subspaces: 0.1", type=float)
    seed: int = flag(0, "fixes v*, w*, all starts and the data; with several seeds, the first of them")
    inputs: int = flag(5, "population: n, the columns of Z")
    ratio: float = flag(1.5, "population: (1ᵀv*)²/‖v*‖², above 0 and below (m + 1)/2, where a spurious minimum is")
    starts: int = flag(50, "population: random starts")
    sided: str = flag("two", "subspaces: one (−x is no data) or two (−x is as likely as x)")
    bits: tuple = flag((1, 2), "subspaces: bits of the staircase", type=sizes)
    alpha: float = flag(0.25, "subspaces: the distance of two levels")
    classes: int = flag(4, "subspaces: classes")
    dimensions: int = flag(6, "subspaces: the dimension of each class's subspace")
    points: int = flag(50, "subspaces: points in a class")
    fixed: bool = flag(False, "subspaces: do not train the second layer")
    seeds: int = flag(5, "subspaces: runs of each kind")

    def check(self) -> None:
        """UserError, one sentence, for the first value out of range.   The configuration is one that is `complete`."""
        one_of(self, problem=PROBLEMS, sided=subspaces.SIDES)
        known = PROBLEMS[self.problem].settings["proxies"]
        for proxy in self.proxies:
            require(proxy in known, f"unknown proxy {proxy!r}; {self.problem} knows {', '.join(known)}.")
        for name in ("proxies", "bits"):
            values = getattr(self, name)
            require(len(set(values)) == len(values), f"--{name} has something twice: name each once.")
        at_least(1, self, "steps", "inputs", "starts", "dimensions", "points", "seeds")
        at_least(2, self, "units", "classes")
        at_most(MOST, self, "steps", "starts")
        at_most(MOST_SEEDS, self, "seeds")
        most = 0.5 * (self.units + 1)
        require(
            LEAST_RATIO <= self.ratio < most or self.problem != "population",
            f"--ratio must be at least {LEAST_RATIO} and below (m + 1)/2 = {most:g}, where a spurious minimum is, got "
            f"{self.ratio}.",
        )
        require(self.bits and all(1 <= b <= 16 for b in self.bits), "--bits must be from 1 to 16, as in --bits 1,2.")
        require(0.0 < self.alpha < math.inf, f"--alpha must be positive and finite, got {self.alpha}.")
        fits = not self.fixed or self.units % self.classes == 0
        require(fits, f"--fixed needs a multiple of {self.classes} --units, equally many a class, got {self.units}.")
        check_lr(self)
        check_seed(self)
        require(self.seed + self.seeds <= 2**64, "--seed must leave room for --seeds below 2**64.")

    def complete(self):
        """Itself with the problem's settings where no flag was given."""
        one_of(self, problem=PROBLEMS)
        chosen = {k: v for k, v in PROBLEMS[self.problem].settings.items() if getattr(self, k) in (None, ())}
        return dataclasses.replace(self, **chosen)

    def unread(self) -> dict[str, str]:
        return {
            name: f"--problem {self.problem} does not read it"
            for problem, other in PROBLEMS.items()
            if problem != self.problem
            for name in other.flags
        }


# ---- the population problem


@dataclass(frozen=True)
class Descent:
    """One proxy's: the steps that are drawn, and the losses there from the start beside the spurious minimum; the loss,
    θ and ‖w‖ at which all starts end, of which that is the first."""

    proxy: str
    steps: list[int]
    losses: list[float]
    end_losses: np.ndarray
    end_angles: np.ndarray
    end_norms: np.ndarray


class Population:
    """Descent with every proxy from the same starts: the first one beside the spurious minimum, the others random."""

    def __init__(self, config: Config) -> None:
        c = self.config = config
        check_memory(10 * (c.starts + 1) * (c.units + c.inputs), np.float64, "--starts, --units or --inputs")
        rng = Rng(c.seed)
        normal = lambda site, *shape: rng.site(site).normal(shape, like=np.empty(0, np.float64))
        with size_errors():
            direction, w_star = normal("v*", c.units), normal("w*", c.inputs)
            v, w = normal("v", c.starts + 1, c.units), normal("w", c.starts + 1, c.inputs)
        direction -= direction.mean()  # orthogonal to 1
        across = math.sqrt(c.units - c.ratio) / np.linalg.norm(direction)
        v_star = math.sqrt(c.ratio / c.units) + across * direction
        self.target = v_star, w_star / np.linalg.norm(w_star)
        spurious = population.spurious_minimum(*self.target)
        for start, point in zip((v, w), spurious, strict=True):
            start[0] = point + BESIDE * start[0]
        self.start = v, w
        self.spurious = float(population.loss(*spurious, *self.target))

    def descend(self, proxy: str, progress) -> Descent:
        c = self.config
        steps = sorted({0, *np.geomspace(1, c.steps, DRAWN).astype(int).tolist(), c.steps})
        drawn, losses = set(steps), []
        with np.errstate(all="ignore"):  # what is not finite is looked for below
            for step, (v, w) in enumerate(population.descend(*self.start, *self.target, proxy, c.lr, c.steps)):
                if step in drawn:
                    losses.append(float(population.loss(v[0], w[0], *self.target)))
                progress.update(step > 0)
            ends = population.loss(v, w, *self.target), population.angle(w, self.target[1]), np.linalg.norm(w, axis=1)
        require(np.isfinite(ends).all(), f"the loss became infinite or NaN with the proxy {proxy}: try a smaller --lr.")
        return Descent(proxy, steps, losses, *ends)

    def line(self, found: Descent) -> dict:
        """The metrics of a proxy: where the start beside the spurious minimum went, and where the random ones end."""
        near = (abs(found.end_losses / self.spurious - 1.0) <= 0.01) & (found.end_angles > 0.99 * math.pi)
        kinds = np.select([found.end_losses < 1e-6, found.end_norms < 0.1, near], [0, 1, 2], 3)
        return {
            "proxy": found.proxy,
            "loss": found.losses[-1],
            "highest_loss": max(found.losses),
            "end": ENDS[kinds[0]],
            "norm": float(found.end_norms[0]),
            **{end: int((kinds[1:] == n).sum()) for n, end in enumerate(ENDS)},
        }

    def run(self, folder: RunFolder, quiet: bool) -> str:
        """-> the last line"""
        c, lines, descents = self.config, [], []
        with tqdm(total=len(c.proxies) * c.steps, unit="step", disable=quiet, dynamic_ncols=True) as progress:
            for proxy in c.proxies:
                descents.append(self.descend(proxy, progress))
                lines.append(self.line(descents[-1]))
                text = folder.log(lines[-1])
                if not quiet:
                    progress.write(text)
        if not quiet:
            print(self.table(lines))
        with disk_errors():
            self.draw(folder.path / "curve.png", descents)
        return f"final at the global minimum of {c.starts}: " + " ".join(f"{m['proxy']} {m['global']}" for m in lines)

    def table(self, lines: list[dict]) -> str:
        c, caught = self.config, population.catches_the_identity(self.target[0])
        rows = [
            f"spurious minimum: loss {self.spurious:.4f}; the identity is {'' if caught else 'not '}caught there",
            f"{'':14}{'beside the spurious minimum':42}{c.starts} random starts, where they end",
            f"{'proxy':14}{'highest loss':14}{'last loss':12}{'end':16}" + "".join(f"{end:11}" for end in ENDS),
        ]
        for m in lines:
            beside = f"{m['highest_loss']:<14.4f}{m['loss']:<12.4f}{m['end']:16}"
            rows.append(f"{m['proxy']:14}{beside}" + "".join(f"{m[end]:<11}" for end in ENDS))
        return "\n".join(row.rstrip() for row in rows)

    def draw(self, path, descents: list[Descent]) -> None:
        """Left the loss of the start beside the spurious minimum, step by step; right all ends."""
        figure = new_figure(9, 4)
        left, right = figure.subplots(1, 2)
        for n, found in enumerate(descents):
            color, line = f"C{n}", LINES[n % len(LINES)]
            left.plot(np.maximum(found.steps, 0.8), found.losses, line, color=color, label=found.proxy)
            ends = np.sort(np.maximum(found.end_losses[1:], 1e-16))
            right.plot(np.arange(1, len(ends) + 1), ends, ".", color=color, label=found.proxy)
        left.set_xscale("log")
        left.set_xlabel("step")
        left.set_ylabel("loss")
        left.set_title("one start beside the spurious minimum", fontsize=10)
        right.set_yscale("log")
        right.set_xlabel("random start, in the order of its last loss")
        right.set_ylabel("loss after the last step, 1e−16 or more")
        right.set_title(f"{self.config.starts} random starts", fontsize=10)
        for axes in (left, right):
            axes.axhline(self.spurious, color="0.5", linestyle=":", label="spurious minimum")
            axes.grid(alpha=0.3)
        left.legend(fontsize=8)
        figure.savefig(path, dpi=110)


# ---- data in subspaces


class Subspaces:
    """Every proxy with every number of bits, on the data of every seed."""

    def __init__(self, config: Config) -> None:
        c = self.config = config
        inputs, points = c.classes * c.dimensions, c.classes * (c.points + NEW)
        # drawing takes three arrays of bases, or two of points; training, the units before and behind the staircase
        numbers = 3 * inputs**2 + 2 * weights(inputs, c.units, c.classes) + 2 * points * inputs
        numbers += c.classes * max(c.points, NEW) * (3 * c.units + c.classes)
        check_memory(numbers, np.float64, "--classes, --dimensions, --points or --units")

    def train(self, bits: int, proxy: str, seed: int) -> tuple[list[float], float]:
        """(the accuracy before each step and after the last one, which ends where it is 1; then that on new points)"""
        c, rng = self.config, Rng(seed)
        x, labels = subspaces.generate(c.classes, c.dimensions, c.points + NEW, c.sided, rng.site("data"))
        new = np.arange(len(x)) % (c.points + NEW) >= c.points
        (x, new_x), (labels, new_labels) = ((a[~new], a[new]) for a in (x, labels))
        activation, common = Activation(bits, c.alpha, proxy), {"rng": rng.site("weights"), "dtype": np.float64}
        model = TwoLinearLayers(x.shape[1], c.units, c.classes, activation, fixed=c.fixed, **common)
        optimizer, accuracies = SGD(model.parameters(), c.lr), []
        accuracy = lambda logits, labels: float((logits.argmax(axis=1) == labels).mean())
        for step in range(c.steps + 1):
            logits = model(x)
            accuracies.append(accuracy(logits.data, labels))
            if accuracies[-1] == 1.0 or step == c.steps:
                break
            loss = hinge(logits, labels).mean()
            require(math.isfinite(loss.data), f"the loss became {loss.data} at step {step + 1}: try a smaller --lr.")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return accuracies, accuracy(model.evaluate(new_x), new_labels)

    def run(self, folder: RunFolder, quiet: bool) -> str:
        """-> the last line"""
        c, curves, lines = self.config, {}, []
        kinds = [(bits, proxy, c.seed + n) for bits in c.bits for proxy in c.proxies for n in range(c.seeds)]
        progress = tqdm(kinds, unit="run", disable=quiet, dynamic_ncols=True)
        with progress, size_errors(), np.errstate(all="ignore"):
            for bits, proxy, seed in progress:
                accuracies, new = self.train(bits, proxy, seed)
                curves.setdefault((bits, proxy), []).append(accuracies)
                line = {"sided": c.sided, "bits": bits, "proxy": proxy, "seed": seed}
                line |= {"accuracy": accuracies[-1], "steps": len(accuracies) - 1, "new_accuracy": new}
                lines.append(line)
                text = folder.log(lines[-1])
                if not quiet:
                    progress.write(text)
        if not quiet:
            print(self.table(curves, lines))
        with disk_errors():
            self.draw(folder.path / "curve.png", curves)
        perfect = sum(m["accuracy"] == 1.0 for m in lines)
        return f"final {c.sided}-sided: {perfect} of {len(lines)} runs classify all points"

    def table(self, curves: dict, lines: list[dict]) -> str:
        """For each proxy and number of bits the `outcome` of its runs, and their mean accuracy on new points."""
        c, width = self.config, 36
        rows = [f"{'proxy':14}" + "".join(f"{f'{b} bits' if b > 1 else '1 bit':{width}}" for b in c.bits)]
        for proxy in c.proxies:
            row = f"{proxy:14}"
            for bits in c.bits:
                new = np.mean([m["new_accuracy"] for m in lines if (m["bits"], m["proxy"]) == (bits, proxy)])
                row += f"{f'{outcome(curves[bits, proxy])}; new {100.0 * new:.1f} %':{width}}"
            rows.append(row)
        return "\n".join(row.rstrip() for row in rows)

    def draw(self, path, curves: dict) -> None:
        """The accuracy against the step, the mean over the seeds, with a plot for each number of bits."""
        c = self.config
        figure = new_figure(3.2 * len(c.bits) + 1.0, 3.6)
        for axes, bits in zip(figure.subplots(1, len(c.bits), sharey=True, squeeze=False)[0], c.bits, strict=True):
            for proxy in c.proxies:
                runs = curves[bits, proxy]
                longest = max(map(len, runs))  # a run that ended stays at its last accuracy, 1
                mean = np.mean([run + [run[-1]] * (longest - len(run)) for run in runs], axis=0)
                axes.plot(100.0 * mean, label=proxy)
            axes.set_title(f"{bits} bits" if bits > 1 else "1 bit", fontsize=10)
            axes.set_xlabel("step")
            axes.grid(alpha=0.3)
        figure.axes[0].set_ylabel("accuracy (%)")
        figure.axes[0].legend(fontsize=8)
        figure.suptitle(f"{c.sided}-sided data in {c.classes} subspaces of {c.dimensions} dimensions")
        figure.savefig(path, dpi=110)


def outcome(runs: list[list[float]]) -> str:
    """'5 of 5, step 23 to 41', or the accuracies in per cent of those that fail, '0 of 5, 87.5 to 93.0 %'."""
    ends, steps = [run[-1] for run in runs], [len(run) - 1 for run in runs]
    perfect = sum(end == 1.0 for end in ends)
    if perfect == len(runs):
        return f"{perfect} of {len(runs)}, step {min(steps)} to {max(steps)}"
    failed = [100.0 * end for end in ends if end < 1.0]
    return f"{perfect} of {len(runs)}, {min(failed):.1f} to {max(failed):.1f} %"


@command
def main(argv=None) -> int:
    given, other = parse_flags(Config, __doc__, argv, (OUT_FLAG, quiet_flag("print nothing but the last line")))
    config, quiet = Config(**given).complete(), other["quiet"]
    config.check()
    check_read(given, config.unread())
    details = (f"{config.sided}-sided",) if config.problem == "subspaces" else ()
    path = new_folder(other.get("out"), "coarse-gradient", config.problem, *details, f"s{config.seed}")
    problem = (Population if config.problem == "population" else Subspaces)(config)
    with RunFolder.create(path, config, get_backend("numpy"), numbered="out" not in other) as folder:
        if not quiet:
            print(f"run folder {folder.path}", file=sys.stderr)
        last = problem.run(folder, quiet)
    print(last)
    return 0


if __name__ == "__main__":
    sys.exit(main())
