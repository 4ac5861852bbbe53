"""The latent-tree LSTM of `train_listops.py`: its flags, how it is built from them, and how it is evaluated.

`evaluate_listops.py` evaluates it again.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass

import numpy as np

from estimators import ESTIMATORS, create, facts
from estimators.base import CANNOT_CHOOSE
from minigrad import Rng
from minigrad.optim import OPTIMIZERS
from models import trees
from models.data import listops
from models.tree_lstm import LEAVES, TreeLSTM

from . import loop
from .errors import require
from .flags import at_least, at_most, flag, one_of
from .memory import check_memory

log = logging.getLogger(__name__)

BRANCHING = {"left": trees.left_branching, "right": trees.right_branching, "balanced": trees.balanced}
ENCODERS = ("latent", "lstm", *BRANCHING, "gold")
CHOOSERS = [name for name in ESTIMATORS if facts(name).episodes and facts(name).family.name == "categorical"]
EVALUATION_BATCH, EVALUATION_TOKENS = 64, 64 * 100
BEST = "best.safetensors"
MOST = 2_000_000  # sequences that fit into a few gigabytes of memory
SHORTEST = 5  # tokens that --max-length has to allow: [ MIN 2 9 ]
LONGEST = 10_000  # tokens: the time and the memory for a sequence grow with their square
LENGTHS, DEPTHS = (10, 20, 30, 40, 50, 60, 70, 80, 90, 100), tuple(range(1, 21))


@dataclass(frozen=True)
class Config(loop.Config):
    data_dir: str = flag("", "a folder with listops/{train,valid,test}.tsv, else MINIGRAD_DATA; missing ones are made")
    generate: int = flag(
        20000, "N training sequences are generated, N/10 for validation, at most 1,000, and N/9 for test"
    )
    split: bool = flag(False, "the bracket and the name of an operator as two tokens, as published")
    max_length: int = flag(30, f"leave out sequences of more tokens, at most {LONGEST:,}; published: 99, with --split")
    encoder: str = flag("latent", f"one of {', '.join(ENCODERS)}")
    leaves: str = flag("lstm", f"one of {', '.join(LEAVES)}")
    estimator: str = flag("gst-1.0", f"of the latent tree: one of {', '.join(CHOOSERS)}; options as in rloo:samples=4")
    tau: float | None = flag(None, "temperature, for estimators that have one", type=float)
    dim: int = flag(64, "d, the size of word vectors and states; published: 300")
    hidden: int = flag(64, "the classifier's hidden units; published: 300")
    dropout: float = flag(0.1, "of word vectors and in the classifier; published: 0.5")
    epochs: int = flag(10, "passes over the training sequences; published: 20")
    batch: int = flag(16, "sequences in a batch")
    lr: float = flag(3e-3, "learning rate at first, halved when the validation accuracy stays; published: 0.001")
    patience: int = flag(4, "validations without an improvement before the learning rate is halved")
    optimizer: str = flag("adam", f"one of {', '.join(OPTIMIZERS)}")
    clip: float = flag(5.0, "the largest norm of the gradient")
    seed: int = flag(0, "fixes the generated data, the initial weights, the order of the sequences and all noise")

    def check(self) -> None:
        super().check()
        at_least(1, self, "generate", "dim", "hidden")
        at_least(SHORTEST, self, "max_length")
        at_most(LONGEST, self, "max_length")
        at_least(0, self, "patience")
        one_of(self, encoder=ENCODERS, optimizer=OPTIMIZERS, leaves=LEAVES)
        require(self.generate <= MOST, f"--generate must be at most {MOST:,}, got {self.generate}.")
        require(0.0 <= self.dropout < 1.0, f"--dropout must be at least 0 and below 1, got {self.dropout}.")
        require(self.clip > 0.0, f"--clip must be positive, got {self.clip}.")
        require(
            self.encoder != "lstm" or self.leaves == "lstm",
            "the encoder lstm is the leaf LSTM itself: it cannot have affine leaves; leave --leaves out.",
        )

    def unread(self, estimator) -> dict[str, str]:
        found = super().unread(estimator)
        if estimator is None:
            found |= dict.fromkeys(("estimator", "tau"), f"the encoder {self.encoder} chooses no tree")
        return found

    def create_estimator(self):
        if self.encoder != "latent":
            return None
        estimator = create(self.estimator, self.tau, "categorical")
        require(estimator.episodes, f"{estimator.title} {CANNOT_CHOOSE}")
        return estimator


def make_model(config: Config, tokenizer, rng: Rng) -> TreeLSTM:
    numbers = 10 * config.dim**2 + config.dim * config.hidden
    check_memory(numbers, config.dtype, "--dim or --hidden")
    encoder = config.encoder if config.encoder in ("latent", "lstm") else "tree"
    sizes = {"dim": config.dim, "hidden": config.hidden, "dropout": config.dropout}
    options = {"encoder": encoder, "leaves": config.leaves, "dtype": np.dtype(config.dtype)}
    return TreeLSTM(tokenizer.size, rng=rng, **sizes, **options)


def short_enough(splits: dict, tokenizer, longest: int | None) -> dict:
    """{name: its sequences of 2 to `longest` tokens (None: any number, up to LONGEST)} of {name: sequences}; how many
    others there are is logged. UserError if none is left of one, or if one is too long."""
    found = {name: listops.within(sequences, tokenizer, longest or math.inf) for name, sequences in splits.items()}
    size, advice = (f"2 to {longest} tokens", ": raise --max-length") if longest else ("2 tokens or more", "")
    for name, (kept, _) in found.items():
        require(kept, f"{name}: no sequence has {size}{advice}.")
        most = max(len(tokenizer(tokens)) for tokens, _ in kept)
        require(most <= LONGEST, f"{name} has a sequence of {most:,} tokens: give --max-length {LONGEST} or less.")
    why = f"more than {longest} tokens or only one" if longest else "only one token"
    for name, (_, left_out) in found.items():
        if left_out:
            log.warning("%s: %d of %d sequences are left out, which have %s.", name, left_out, len(splits[name]), why)
    return {name: kept for name, (kept, _) in found.items()}


def known_trees(encoder: str, sequences, batch, split: bool):
    """The trees of a batch (B, T−1) for an encoder that is given them, else None."""
    if encoder in ("latent", "lstm"):
        return None
    choices = np.zeros((len(batch.lengths), batch.ids.shape[1] - 1), np.int64)
    for row, i, n in zip(choices, batch.index, batch.lengths, strict=True):
        row[: n - 1] = trees.gold(sequences[i][0], split) if encoder == "gold" else BRANCHING[encoder](n)
    return choices


def evaluation_batches(sequences, tokenizer) -> list:
    """Batches of at most EVALUATION_BATCH sequences and, but for a single one, EVALUATION_TOKENS tokens with padding:
    lists of a thousand tokens exist, and 64 of them would need gigabytes."""
    found = []
    for batch in listops.batches(sequences, tokenizer, EVALUATION_BATCH):
        rows = max(1, EVALUATION_TOKENS // batch.ids.shape[1])
        for start in range(0, len(batch.index), rows):
            part = slice(start, start + rows)
            T = batch.lengths[part].max()
            arrays = (batch.ids[part, :T], batch.lengths[part], batch.labels[part], batch.index[part])
            found.append(listops.Batch(*arrays))
    return found


def evaluate(model, config: Config, sequences, tokenizer, backend):
    """(loss, right, choices): −log p(label) and whether the label was found (N,), and the trees that the model chose, a
    list of arrays (T−1,), or None. Greedy, without dropout."""
    loss, right = np.zeros(len(sequences)), np.zeros(len(sequences), bool)
    choices = [None] * len(sequences)
    for batch in evaluation_batches(sequences, tokenizer):
        given = known_trees(config.encoder, sequences, batch, config.split)
        logits, chosen = model.predict(backend.indices(batch.ids, tokenizer.size), batch.lengths, given)
        logits = backend.to_host(logits).astype(np.float64)
        logits -= logits.max(axis=1, keepdims=True)
        log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        loss[batch.index] = -log_p[np.arange(len(log_p)), batch.labels]
        right[batch.index] = log_p.argmax(axis=1) == batch.labels
        if chosen is not None:
            for i, n, row in zip(batch.index, batch.lengths, backend.to_host(chosen), strict=True):
                choices[i] = row[: n - 1]
    return loss, right, choices if config.encoder == "latent" else None


def breakdown(right, values, bounds) -> dict[str, list]:
    """{"upper bound": [accuracy, how many]} of the sequences whose value lies above the bound before and up to this
    one; the last entry, "more", is beyond all bounds."""
    found, place = {}, np.searchsorted(bounds, values)
    for i, name in enumerate([*map(str, bounds), "more"]):
        if (place == i).any():
            found[name] = [round(float(right[place == i].mean()), 4), int((place == i).sum())]
    return found


def agreement(choices, sequences, split: bool, rng: Rng) -> dict[str, float]:
    """The mean unlabelled F1 of the chosen trees with the gold ones and with left-branching, right-branching and random
    ones, and of random ones with the gold ones, for comparison."""
    scores: dict[str, list] = {"f1_gold": [], "f1_left": [], "f1_right": [], "f1_random": [], "random_gold": []}
    for i, (chosen, (tokens, _)) in enumerate(zip(choices, sequences, strict=True)):
        T = len(chosen) + 1
        if T < 3:
            continue
        gold, chance = trees.gold(tokens, split), trees.random(T, rng.at(i))
        others = {"gold": gold, "left": trees.left_branching(T), "right": trees.right_branching(T), "random": chance}
        for name, other in others.items():
            scores[f"f1_{name}"].append(trees.f1(chosen, other))
        scores["random_gold"].append(trees.f1(chance, gold))
    return {name: round(float(np.mean(values)), 4) for name, values in scores.items() if values}


def spelled(tokens: bytes, tokenizer) -> list[str]:
    """The tokens of one sequence as words."""
    return [tokenizer.tokens[i] for i in tokenizer(tokens)]


def summary(loss, right, choices, sequences, tokenizer, rng) -> dict:
    """The metrics of an evaluation, a dict that JSON can hold.   rng: the run's, from which the random trees come"""
    lengths = np.array([len(tokenizer(tokens)) for tokens, _ in sequences])
    depths = np.array([listops.depth(tokens) for tokens, _ in sequences])
    found = {
        "loss": round(float(loss.mean()), 4),
        "accuracy": round(float(right.mean()), 4),
        "sequences": len(sequences),
        "by_length": breakdown(right, lengths, LENGTHS),
        "by_depth": breakdown(right, depths, DEPTHS),
    }
    if choices is None:
        return found
    return found | agreement(choices, sequences, tokenizer.split, rng.site("random trees"))
