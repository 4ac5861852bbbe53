"""Evaluate a model that train_listops.py trained on a file of ListOps sequences.

    python scripts/evaluate_listops.py runs/NAME test.tsv                    # the run's best model
    python scripts/evaluate_listops.py runs/NAME/checkpoint.safetensors test.tsv --max-length 99 --trees 5

The file has the published format, lines of `label<TAB>sequence`. Choices are greedy and nothing is dropped, so that the
same model on the same sequences gives the same numbers as at the end of training. They are printed as one JSON line,
and with --trees the trees that a latent-tree model chose for the first sequences after it, a line each.
"""

from __future__ import annotations

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))
from experiments.start import before_numpy

before_numpy()

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from experiments.errors import UserError, command, disk_errors, require, size_errors, user_errors
from experiments.flags import at_least, at_most, flag, one_of, parse_flags, read_values
from experiments.listops import BEST, LONGEST, SHORTEST, Config, evaluate, make_model, short_enough, spelled, summary
from minigrad import Rng, checkpoint
from minigrad.backend import BACKENDS, BackendUnavailable, get_backend
from minigrad.checkpoint import CheckpointError, StateError
from models import trees
from models.data import DataError, listops

POSITIONAL = (
    ("checkpoint", {"help": f"a checkpoint of train_listops.py, or its run folder, for {BEST} in it"}),
    ("file", {"help": "a file of lines label<TAB>sequence"}),
)


@dataclass(frozen=True)
class Flags:
    max_length: int | None = flag(None, f"leave out sequences of more tokens, at most {LONGEST:,}", type=int)
    backend: str = flag("numpy", f"one of {', '.join(BACKENDS)}")
    trees: int = flag(0, "print the trees of the first N sequences", metavar="N")

    def check(self) -> None:
        """UserError, one sentence, for the first value out of range."""
        at_least(SHORTEST, self, "max_length")
        at_most(LONGEST, self, "max_length")
        at_least(0, self, "trees")
        one_of(self, backend=sorted(BACKENDS))


def restore(path: Path, backend):
    """(model, its configuration, its tokenizer) of a checkpoint. UserError if it is not one of train_listops.py."""
    with user_errors(CheckpointError), disk_errors():
        arrays, info = checkpoint.load(path)
    stored = info.get("config")
    require(isinstance(stored, dict), f"{path} is a checkpoint of another program: it has no configuration.")
    differ = sorted(stored.keys() ^ {f.name for f in dataclasses.fields(Config)})
    require(
        not differ,
        f"{path} is a checkpoint of another program or version: its configuration differs from that of "
        f"train_listops.py in {', '.join(differ)}.",
    )
    try:
        config = Config(**read_values(Config, stored))
        config.check()
        tokenizer = listops.Tokenizer(config.split)
        with size_errors():
            model = make_model(config, tokenizer, Rng(config.seed).site("weights"))
        prefix = "model."
        with user_errors(StateError):
            model.load_state_dict({k[len(prefix) :]: v for k, v in arrays.items() if k.startswith(prefix)})
    except UserError as error:
        raise UserError(f"{path} cannot be used: {str(error).rstrip('.')}.") from error
    model.to(backend)
    return model, config, tokenizer


@command
def main(argv=None) -> int:
    given, where = parse_flags(Flags, __doc__, argv, POSITIONAL)
    flags = Flags(**given)
    flags.check()
    path, file = Path(where["checkpoint"]), Path(where["file"])
    with disk_errors():
        path = path / BEST if path.is_dir() else path
    with user_errors(BackendUnavailable):
        backend = get_backend(flags.backend)
    model, config, tokenizer = restore(path, backend)
    require(
        not flags.trees or config.encoder == "latent",
        f"--trees is for a model that chooses trees: that of {path} has the encoder {config.encoder}.",
    )
    with user_errors(DataError):
        sequences = short_enough({file: listops.read(file)}, tokenizer, flags.max_length)[file]
    with np.errstate(all="ignore"):  # the loss is looked at instead
        loss, right, choices = evaluate(model, config, sequences, tokenizer, backend)
    require(np.isfinite(loss).all(), f"{path} gives a loss that is infinite or NaN: the model is not usable.")
    about = {"checkpoint": str(path), "file": str(file), "backend": backend.name}
    print(json.dumps(about | summary(loss, right, choices, sequences, tokenizer, Rng(config.seed))))
    for (tokens, _), chosen in zip(sequences[: flags.trees], choices or (), strict=False):
        print(trees.bracket(spelled(tokens, tokenizer), chosen))
    return 0


if __name__ == "__main__":
    sys.exit(main())
