"""Train a network by logical constraints on its answers: it reads digits of which only sums are told, finds paths, and
fills Sudokus.

    python scripts/train_constraints.py                            # two embedded digits and their sum, a few seconds
    python scripts/train_constraints.py --method exact             # the likelihood of the sum, by enumeration
    python scripts/train_constraints.py --method rloo:samples=4    # or another estimator for categorical variables
    python scripts/train_constraints.py --data mnist --batch 64 --examples 30000 --epochs 2
    python scripts/train_constraints.py --problem sudoku4 --examples 5000 --epochs 40 --h1 0
    python scripts/train_constraints.py --cnf FILE                 # another theory over the atoms of the problem
    python scripts/train_constraints.py --resume runs/NAME         # goes on bit for bit where it stopped

All flags are listed by --help.
"""

from __future__ import annotations

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))
from experiments.start import before_numpy

before_numpy()

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from estimators import ESTIMATORS, create
from experiments.errors import command, disk_errors, require, user_errors
from experiments.flags import at_least, at_most, flag, one_of, sizes
from experiments.loop import ImageConfig, LabelledExperiment, Optimizing, batches, run
from experiments.memory import check_evaluations, check_memory, convolutions, draws, weights
from experiments.pictures import learning_curves
from experiments.specification import digest
from minigrad import Rng, no_grad
from minigrad.fused import softmax
from minigrad.nn import MLP, xavier_uniform
from minigrad.ops import log
from models.cnf import BINARISERS, NORMALISATIONS, PARTS, Given, Theory, TheoryError, constraint_loss, satisfied
from models.constraints import CHANNELS, SMALLEST, WINDOW, ConvNet
from models.data import Images
from models.theories import COMPLETIONS, READINGS, groups_of_images, operator_images

METHODS = ("constraint", "exact")
NETWORKS = ("", "mlp", "cnn")
MOST_EXAMPLES = 1_000_000
EVALUATED = 5000  # groups of the validation images, and of the test images
COMPLETED = 1000  # examples for validation, and for tests, where they are generated
DRAWN, DRAWN_SIDE = (2400, 1200), 16  # images of operators for training and tests, and their size
LEAST = 1e-30  # added to a likelihood before its logarithm


@dataclass(frozen=True)
class Config(Optimizing, ImageConfig):
    problem: str = flag("add", f"one of {', '.join((*READINGS, *COMPLETIONS))}")
    method: str = flag(
        "constraint",
        "constraint (the loss of the theory), exact (−log of the probability that the facts are true, by enumeration) "
        f"or an estimator of the probability that they are not: {', '.join(ESTIMATORS)}; options as in rloo:samples=4",
    )
    tau: float | None = flag(None, "temperature, for estimators that have one", type=float)
    cnf: str = flag(
        "", "a DIMACS file with another theory over the problem's atoms; a run leaves its own as theory.cnf"
    )
    normalise: str = flag(
        "sample",
        "the means in the loss: sample (over the clauses of each example, then over the batch), batch (over all "
        "clauses of the batch, as published) or all (over the whole theory, also what the facts satisfy)",
    )
    binariser: str = flag("probability", f"what becomes a truth value: one of {', '.join(BINARISERS)}")
    without: str = flag("", f"parts of the loss to leave out, like deduce,sat: some of {', '.join(PARTS)}, labels")
    h0: float = flag(1.0, "h₀, the weight of the constraint; 0 leaves what else there is")
    h1: float = flag(0.1, "h₁, the weight of the mean square of the network's outputs")
    examples: int = flag(6000, "training examples: groups of images, or generated ones; published for add: 30000")
    network: str = flag("", "mlp or cnn, the published one; else cnn for MNIST and mlp for small images")
    hidden: tuple = flag((512,), "widths of the hidden layers of an mlp that sees images", type=sizes)
    epochs: int = flag(8, "passes over the training examples")
    batch: int = flag(16, "examples in a batch")
    lr: float = flag(2e-3, "learning rate; published: 1e-3 for add, 5e-4 for the others with digits")

    def check(self) -> None:
        super().check()
        at_least(1, self, "examples")
        at_most(MOST_EXAMPLES, self, "examples")
        at_least(0, self, "h0", "h1")
        known = {"normalise": NORMALISATIONS, "binariser": BINARISERS, "network": NETWORKS}
        one_of(self, problem=(*READINGS, *COMPLETIONS), **known)
        require(min(self.hidden, default=1) >= 1, f"--hidden needs widths of at least 1, got {self.hidden}.")
        parts = (*PARTS, "labels")
        for part in self.left_out:
            require(part in parts, f"--without has no part {part!r}: the known ones are {', '.join(parts)}.")
        completes = self.problem in COMPLETIONS
        why = f"{self.problem} has the method constraint alone: leave --method out."
        require(not completes or self.method == "constraint", why)
        require(
            completes or "labels" not in self.left_out, f"{self.problem} has no labels: leave them out of --without."
        )
        why = f"a cnn needs images of at least {SMALLEST} × {SMALLEST}: give --data mnist or --network mlp."
        require(self.images != "digits" or self.network != "cnn", why)

    @property
    def left_out(self) -> list[str]:
        return self.without.split(",") if self.without else []

    @property
    def images(self) -> str:
        """Which images are read, "" for none."""
        return "" if self.problem in COMPLETIONS else "operators" if self.problem == "apply2x2" else self.data

    @property
    def convolutional(self) -> bool:
        return self.network == "cnn" or (not self.network and self.images == "mnist")

    def unread(self, estimator) -> dict[str, str]:
        found = super().unread(estimator)
        if self.images != self.data:
            which = "reads no images" if not self.images else "draws its images"
            found |= dict.fromkeys(("data", "data_dir", "pixels"), f"{self.problem} {which}")
        if not self.images:
            found |= dict.fromkeys(("network", "hidden"), f"{self.problem} has a network of its own")
        elif self.convolutional:
            found["hidden"] = "the cnn has the published widths"
        if self.method != "constraint":
            of_theory = ("cnf", "normalise", "binariser", "without")
            found |= dict.fromkeys(of_theory, f"--method {self.method} has no theory")
        if estimator is None:
            found["tau"] = f"--method {self.method} has no estimator"
        return found

    def create_estimator(self):
        if self.method in METHODS:
            return None
        estimator = create(self.method, self.tau, "categorical")
        why = "which the probability of a constraint is not: choose another one"
        require(not estimator.multi_sample, f"{estimator.title} is a bound of several samples, {why}.")
        return estimator

    @property
    def estimator(self) -> str:
        """What a warning about it calls it."""
        return self.method


class Constraints(LabelledExperiment):
    """One run: a problem, its theory, a network, and examples of which no class of an image is known.

    train: (N, k), which of the `pictures` each example has, or (N, I) inputs to be completed;   facts: (N, copies, f)
    """

    config_class = Config
    losses = ("loss", "constraint")  # of a step, times its examples
    progress_key = "test_accuracy"

    @classmethod
    def folder_parts(cls, c):
        images, method = filter(None, [c.images]), c.method.replace(":", "-")
        return "constraints", c.problem, *images, method, f"s{c.seed}"

    def build(self, c: Config) -> None:
        self.reads = c.problem in READINGS
        known = READINGS if self.reads else COMPLETIONS
        self.problem = known[c.problem](c.binariser, self.backend.to_device)
        self.theory = self.load_theory(c) if c.cnf else self.problem.theory
        about = self.theory, self.problem.first, self.problem.count, self.backend
        self.given = Given(*about)
        self.looked_at = Given(*about, everything=True) if c.normalise == "all" else self.given
        copies, seen = len(self.problem.copies) if self.reads else 1, (self.looked_at, self.given)
        for given, rows in zip(seen, (min(c.batch, c.examples), self.EVALUATION_BATCH), strict=True):
            literals = rows * copies * given.sign.shape[0] * (given.always.size + given.under.shape[1])
            # of each literal: its atom and its place in the batch, and its truth at least twice
            check_memory(3 * literals, np.int64, "--batch, another --normalise or a smaller --cnf", self.backend.name)
        (self.build_reading if self.reads else self.build_completion)(c)
        self.optimizer = c.optimizer_for(self.model)

    def load_theory(self, c: Config) -> Theory:
        require(os.path.isfile(c.cnf), f"there is no file {c.cnf!r}: give one to --cnf that can be read again.")
        with user_errors(TheoryError, file=Path(c.cnf)), disk_errors(Path(c.cnf)):
            theory = Theory.load(c.cnf)
        atoms = self.problem.theory.atoms
        why = f"--problem {c.problem} needs {atoms} with this binariser, those of the theory.cnf of its runs."
        require(theory.atoms == atoms, f"{c.cnf} has {theory.atoms} atoms, and {why}")
        return theory

    def build_reading(self, c: Config) -> None:
        problem, to_device = self.problem, self.backend.to_device
        if self.estimator is not None:
            self.check_size(problem.items, problem.classes)
            check_evaluations(self.estimator, problem.items, problem.classes)
            self.warn_of(self.estimator)
        joint = 1 if c.method == "constraint" or c.problem.startswith("member") else problem.classes**problem.items
        self.load()
        if c.convolutional:
            numbers, of_image = 0, convolutions(self.images.shape, CHANNELS, WINDOW, 0)
        else:
            pixels = self.train.shape[1]
            numbers, of_image = 2 * weights(pixels, *c.hidden, problem.classes), pixels + 2 * sum(c.hidden)
        of_example = joint + problem.items * (of_image + draws(self.estimator) * problem.classes)
        numbers += min(c.batch, c.examples) * of_example
        check_memory(numbers, self.dtype, "--hidden, --batch or fewer samples", self.backend.name)
        self.pictures, labels = self.train, self.images.train_labels.astype(np.int64)
        cut, rng = len(self.pictures), self.rng.site("groups")
        groups, facts = self.groups(labels[:cut], c.examples, rng.site("train"))
        self.train, self.facts = to_device(groups), to_device(facts)
        self.examined = {}
        for name, y in (("valid", labels[cut:]), ("test", self.images.test_labels.astype(np.int64))):
            self.examined[name] = tuple(map(to_device, self.groups(y, EVALUATED, rng.site(name))))
        del self.train_labels  # they have become facts
        options = {"rng": self.rng.site("weights"), "dtype": self.dtype}
        if c.convolutional:
            model = ConvNet(self.images.shape, problem.classes, **options)
        else:
            model = MLP([self.pictures.shape[1], *c.hidden, problem.classes], init=xavier_uniform, **options)
        self.model = model.to(self.backend)

    def groups(self, labels: np.ndarray, n: int, rng: Rng) -> tuple[np.ndarray, np.ndarray]:
        """(which images are in each of n examples (n, k), the facts that are told of them)."""
        groups = groups_of_images(len(labels), n, self.problem.items, rng)
        values = labels[groups]
        return groups, self.problem.facts(values, self.problem.told(rng.site("told"), values))

    def read_images(self) -> Images:
        if self.config.images != "operators":
            return super().read_images()
        drawn = [operator_images(self.rng.site("operators").site(n), size, DRAWN_SIDE) for n, size in enumerate(DRAWN)]
        (train, train_labels), (test, test_labels) = drawn
        train, test = train.astype(self.dtype), test.astype(self.dtype)
        return Images(train, train_labels, test, test_labels, (DRAWN_SIDE, DRAWN_SIDE))

    def build_completion(self, c: Config) -> None:
        to_device, parts = self.backend.to_device, ("train", "valid", "test")
        splits = self.problem.splits(self.rng.site("examples"), c.examples, COMPLETED, COMPLETED)
        made = {
            name: (
                to_device(x, self.dtype),
                to_device(facts),
                to_device(y, self.dtype if y.dtype.kind == "f" else None),
            )
            for name, (x, facts, y) in zip(parts, splits, strict=True)
        }
        self.train, self.facts, self.labels = made.pop("train")
        self.examined = made
        options = {"init": xavier_uniform, "dtype": self.dtype}
        self.model = MLP(self.problem.sizes, self.rng.site("weights"), **options).to(self.backend)

    def info(self) -> dict:
        return {"theory": digest(repr(self.theory.clauses)) if self.config.cnf else ""}

    def restore_info(self, info: dict) -> None:
        same = info["theory"] == self.info()["theory"]
        require(same, f"the theory in {self.config.cnf} is not the one that the run began with: restore it.")

    # -- training

    def step(self, index, rng: Rng) -> tuple:
        """Update the parameters on the examples `index`."""
        c, facts = self.config, self.facts[index]
        self.optimizer.zero_grad()
        if self.reads:
            pictures = self.pictures[self.train[index].reshape(-1)]
            x = self.model(self.binarised(pictures, rng.site("pixels")))
            x = x.reshape(len(index), self.problem.items, self.problem.classes)
            loss = (x * x).mean() * c.h1
        else:
            x = self.model(self.train[index])
            loss = (x * x).mean() * c.h1
            if "labels" not in c.left_out:
                loss = loss + self.problem.label_loss(x, self.labels[index]).mean()
        constraint = self.constraint(x, facts, rng.site("samples"))
        loss = loss + constraint * c.h0
        loss.backward()
        self.optimizer.step()
        return loss.data * len(index), constraint.data * len(index)

    def constraint(self, x, facts, rng: Rng):
        """What is to be small so that the facts (B, copies, f) are true, for outputs x: a Tensor, one number."""
        c = self.config
        if c.method == "constraint":
            clauses = self.looked_at(facts.reshape(-1, facts.shape[2]))
            parts = zip(PARTS, constraint_loss(self.problem.truth(x), clauses, c.normalise), strict=True)
            return sum((part for name, part in parts if name not in c.left_out), start=(x * 0.0).sum())
        if c.method == "exact":
            return -log(self.problem.holds(softmax(x), facts) + LEAST).mean()
        return self.estimator(x, lambda d: 1.0 - self.problem.holds(d, facts), rng).mean()

    # -- evaluation

    def evaluate(self, name: str) -> dict[str, float]:
        """For "valid" or "test": `accuracy`, how many images (cells, edges) are right, and `satisfied`, how many
        answers satisfy all constraints."""
        measured = self.evaluate_reading(name) if self.reads else self.evaluate_completion(name)
        return {f"{name}_{key}": float(value) for key, value in measured.items()}

    def evaluate_reading(self, name: str) -> dict:
        xp, (groups, facts) = self.backend.xp, self.examined[name]
        images, labels = getattr(self, name), getattr(self, f"{name}_labels")
        with no_grad():
            classes = [self.model(x).data.argmax(axis=1) for _, x in batches(images, self.EVALUATION_BATCH)]
            classes, good = xp.concatenate(classes), []
            for start, group in batches(groups, self.EVALUATION_BATCH):
                fact = facts[start : start + self.EVALUATION_BATCH].reshape(-1, facts.shape[2])
                v = self.problem.answer(classes[group], images)
                good.append(satisfied(v, self.given(fact)).reshape(len(group), -1).all(axis=1))
        return {"accuracy": (classes == labels).mean(), "satisfied": xp.concatenate(good).mean()}

    def evaluate_completion(self, name: str) -> dict:
        inputs, facts, labels = self.examined[name]
        with no_grad():
            answer = self.problem.answer(self.model(inputs).data, inputs)
        right = self.problem.right(answer, labels)
        line = {"accuracy": right.mean(), "solved": right.all(axis=1).mean()}
        line["satisfied"] = satisfied(answer, self.given(facts[:, 0])).mean()
        if hasattr(self.problem, "valid"):
            line["valid"] = self.problem.valid(*map(self.backend.to_host, (answer, inputs))).mean()
        return line

    def report(self, losses, speed: float) -> dict:
        total, constraint = losses.sum(axis=0) / len(self.train)
        line = {"epoch": self.epoch + 1, "train_loss": total, "train_constraint": constraint}
        return line | self.evaluate("valid") | self.evaluate("test") | {"ms_per_step": round(1e3 / speed, 3)}

    # -- the end

    def draw(self, folder) -> None:
        """The curves, and the theory as a DIMACS file."""
        c = self.config
        labels = {"accuracy": "test_accuracy", "accuracy_label": "test accuracy (%)", "losses_label": "loss"}
        labels["losses"] = {"train_loss": "training", "train_constraint": "of the constraint"}
        learning_curves(folder.path / "curve.png", folder.metrics(), f"{c.problem}, {c.method}", **labels)
        self.theory.save(folder.path / "theory.cnf")

    def last_words(self, metrics) -> str:
        return f"final test accuracy {metrics[-1]['test_accuracy']:.4f} satisfied {metrics[-1]['test_satisfied']:.4f}"


@command
def main(argv=None) -> int:
    return run(Constraints, argv)


if __name__ == "__main__":
    sys.exit(main())
