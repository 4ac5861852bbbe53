"""Train a tree LSTM on ListOps that learns which neighbours to merge, or one of its baselines.

    python scripts/train_listops.py                                # a small model on generated lists, a few minutes
    python scripts/train_listops.py --data-dir DIR --encoder gold  # DIR/listops/{train,valid,test}.tsv
    python scripts/train_listops.py --resume runs/NAME             # goes on bit for bit where it stopped

The published size and settings are in README.md; all flags are listed by --help.
"""

from __future__ import annotations

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))
from experiments.start import before_numpy

before_numpy()

import hashlib

from experiments.errors import command, disk_errors, require, user_errors
from experiments.listops import BEST, Config, evaluate, known_trees, make_model, short_enough, spelled, summary
from experiments.loop import Experiment, run
from experiments.pictures import forest, learning_curves
from minigrad import Rng, checkpoint
from minigrad.optim import OPTIMIZERS, Plateau, clip_grad_norm
from models import trees
from models.data import DataError, listops

DRAWN = 8  # trees that are drawn at the end


class ListOps(Experiment):
    """One run: the sequences, the model, the estimator of its choices, the schedule, the best model so far."""

    config_class = Config
    losses = ("Σ −log p(label)", "how many sequences")
    reports_per_epoch = 2
    progress_key = "valid_accuracy"

    @classmethod
    def folder_parts(cls, c):
        how = (c.encoder, *([c.estimator.replace(":", "-")] if c.encoder == "latent" else []))
        return "listops", *how, f"s{c.seed}"

    def build(self, c: Config) -> None:
        self.tokenizer = listops.Tokenizer(c.split)
        self.model = make_model(c, self.tokenizer, self.rng.site("weights")).to(self.backend)
        with user_errors(DataError), disk_errors():
            found = listops.files(c.data_dir or None)
        require(
            found or not c.data_dir,
            f"{c.data_dir} has no listops/train.tsv, valid.tsv or test.tsv: give another --data-dir, or none.",
        )
        counts = (c.generate, max(10, min(1000, c.generate // 10)), max(10, c.generate // 9))
        with user_errors(DataError):
            splits = listops.load(c.data_dir or None, counts, c.seed)
        self.remarks = (f"sequences {listops.sources(c.data_dir or None)}",)
        self.sequences = short_enough(splits, self.tokenizer, c.max_length)
        self.steps_per_epoch = -(-len(self.sequences["train"]) // c.batch)
        self.fingerprint = hashlib.blake2b(repr(splits).encode(), digest_size=8).hexdigest()
        self.optimizer = OPTIMIZERS[c.optimizer](self.model.parameters(), c.lr)
        self.schedule = Plateau(self.optimizer, patience=c.patience)
        self.best, self.is_best = -1.0, False  # validation accuracy

    # -- one step

    def epoch_steps(self):
        rng = self.rng.site("order").at(self.epoch)
        return listops.batches(self.sequences["train"], self.tokenizer, self.config.batch, rng)

    def step(self, batch, rng: Rng) -> tuple:
        """Update the parameters on one batch."""
        c, indices = self.config, self.backend.indices
        given = known_trees(c.encoder, self.sequences["train"], batch, c.split)
        self.optimizer.zero_grad()
        ids, labels = indices(batch.ids, self.tokenizer.size), indices(batch.labels, 10)
        cost = self.model.cost(ids, batch.lengths, labels, rng.site("step"), self.estimator, given)
        cost.mean().backward()
        clip_grad_norm(self.optimizer, c.clip)
        self.optimizer.step()
        return cost.data.sum(), self.backend.xp.asarray(len(batch.labels), dtype=cost.dtype)

    # -- evaluation

    def evaluate(self, split: str):
        return evaluate(self.model, self.config, self.sequences[split], self.tokenizer, self.backend)

    def report(self, losses, speed: float) -> dict:
        total, count = losses.sum(axis=0)
        loss, right, _ = self.evaluate("valid")
        lr = self.optimizer.lr
        self.schedule.step(right.mean())
        self.is_best, self.best = right.mean() > self.best, max(self.best, float(right.mean()))
        return {
            "epoch": self.epoch + self.step_in_epoch / self.steps_per_epoch,
            "step": self.steps,
            "train_loss": total / count,
            "valid_loss": loss.mean(),
            "valid_accuracy": right.mean(),
            "lr": lr,
            "sequences_per_second": round(speed * self.config.batch, 1),
        }

    # -- the state

    def parts(self) -> dict:
        return super().parts() | {"schedule": self.schedule}

    def info(self) -> dict:
        return {"data": self.fingerprint, "best": self.best}

    def restore_info(self, info) -> None:
        require(
            info["data"] == self.fingerprint,
            "the sequences are not those that the run began with: give the same --data-dir, or start a new run.",
        )
        self.best = info["best"]

    def before_saving(self, folder, arrays, info) -> None:
        if self.is_best:
            model = {k: v for k, v in arrays.items() if k.startswith("model.")}
            checkpoint.save(folder.path / BEST, model, info)

    def check_folder(self, folder) -> None:
        if self.best >= 0.0:
            own = self.model.state_dict()
            self.load_best(folder)  # an error now, and not after the last epoch, if it is that of another model
            self.model.load_state_dict(own)

    def load_best(self, folder) -> float:
        """Take the parameters of the best model. -> the epoch that they are from"""
        arrays, info = folder.load(BEST)
        with user_errors(checkpoint.StateError, file=folder.path / BEST):
            self.model.load_state_dict({k[len("model.") :]: v for k, v in arrays.items()})
        return info["epoch"] + info["step_in_epoch"] / self.steps_per_epoch

    # -- the end

    def final(self, folder) -> dict:
        """What the best model does on the test split, and how its trees agree with others."""
        line = {"best_epoch": self.load_best(folder)}
        loss, right, self.choices = self.evaluate("test")
        found = summary(loss, right, self.choices, self.sequences["test"], self.tokenizer, self.rng)
        return line | {f"test_{name}" if name in ("loss", "accuracy") else name: value for name, value in found.items()}

    def draw(self, folder) -> None:
        """The learning curves, and the trees that a latent-tree model chooses for the first test sequences."""
        c = self.config
        title = f"ListOps, {c.estimator if c.encoder == 'latent' else c.encoder}"
        learning_curves(folder.path / "curve.png", folder.metrics(), title)
        if self.choices is not None:
            words = [spelled(tokens, self.tokenizer) for tokens, _ in self.sequences["test"][:DRAWN]]
            lines = [trees.bracket(w, chosen) for w, chosen in zip(words, self.choices, strict=False)]
            (folder.path / "trees.txt").write_text("\n".join(lines) + "\n")
            forest(folder.path / "trees.png", words, self.choices[:DRAWN])

    def last_words(self, metrics) -> str:
        best = max(line["valid_accuracy"] for line in metrics if "valid_accuracy" in line)
        return f"final valid accuracy {best:.4f} test accuracy {metrics[-1]['test_accuracy']:.4f}"


@command
def main(argv=None) -> int:
    return run(ListOps, argv)


if __name__ == "__main__":
    sys.exit(main())
