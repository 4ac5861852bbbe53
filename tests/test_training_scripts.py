"""What every training script promises: resume bit for bit, one step on the device, and one sentence for every error."""

import dataclasses
import importlib
import inspect
import json
import linecache
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import traceback
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import train_conditional
import train_constraints
import train_listops
import train_quantised
import train_semi_supervised
import train_spiking
import train_structured
import train_vae
from devsim import DevsimBackend, forbid, stats
from estimators import categorical, reinmax, score_function
from experiments import loop, memory
from experiments.loop import Loop
from experiments.run_folder import RunFolder
from experiments.specification import load_experiment
from minigrad import Rng, checkpoint, fused
from minigrad.backend import Backend, BackendUnavailable, get_backend
from minigrad.tensor import RuleError
from models.data import binarise, load_images

SCRIPTS = Path(__file__).parents[1] / "scripts"
TIMES = ("images_per_second", "sequences_per_second", "ms_per_step", "microseconds")  # metrics that no two runs share


@dataclass(frozen=True)
class Script:
    """One line is enough for a new experiment: Script(train_new, "the flags of a tiny run").

    tiny: the flags of a run of less than a second with two epochs.   spoil: makes a parameter of a model useless
    resumed: flags with which a run is interrupted and resumed, after the steps in `stops`
    moved: settings whose steps are compared between devices;   misfits: folders that are not resumed;   bad: flags
    """

    module: object
    tiny: str
    spoil: Callable = lambda model: weights(model.parameters()[-1])
    resumed: tuple = ("",)
    stops: tuple = (1, 4)
    misfits: tuple = ()
    bad: tuple = ()
    moved: tuple = ()
    sizes: dict = field(default_factory=dict)  # for `moved`

    @property
    def experiment(self):
        return load_experiment(self.module.__name__)

    @property
    def config_class(self):
        return self.experiment.config_class

    def loop(self, **settings) -> Loop:
        """The loop of a run with these settings that has not begun, without a folder."""
        return Loop(self.experiment(self.config_class(**settings)), None, quiet=True)

    def main(self, *flags) -> int:
        return self.module.main([*map(str, flags), "--quiet"])

    def run(self, out, *flags) -> int:
        return self.main(*self.tiny.split(), "--out", out, *flags)

    def resume(self, folder, *flags) -> int:
        return self.main("--resume", folder, *flags)


def weights(array):
    """Makes the weights behind it useless."""
    array.data[0] = np.inf


def edit(folder, **changes):
    about = json.loads((folder / "config.json").read_text())
    about["config"] |= changes
    (folder / "config.json").write_text(json.dumps(about))


def truncate(path, fraction):
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * fraction)])


def garble(path):
    path.write_bytes(b"x" * path.stat().st_size)


def another_number(folder):
    """A digit of the first line is another one, and all is JSON."""
    first, rest = (folder / "metrics.jsonl").read_text().split("\n", 1)
    digit = first[first.index("train") :].translate(str.maketrans("123456789", "912345678"))
    (folder / "metrics.jsonl").write_text(f"{first[: first.index('train')]}{digit}\n{rest}")


def nested(path):
    path.write_text(100_000 * "[" + "\n")


def a_pipe(path):
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def a_folder(path):
    path.unlink(missing_ok=True)
    path.mkdir()


def changed(**changes):
    return lambda folder: edit(folder, **changes)


def rewritten(part, name="checkpoint.safetensors", **changes):
    """Spoils a checkpoint that stays one.   part: 0 for its arrays, 1 for the rest"""

    def spoil(folder):
        found = checkpoint.load(folder / name)
        found[part].update(changes)
        checkpoint.save(folder / name, *found)

    return spoil


def another_line(folder):
    """The same metrics, but for the first line, which is as long."""
    first, *rest = (folder / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_bytes(b"".join([b"7".ljust(len(first) - 1) + b"\n", *rest]))


# ---- what each script adds to the common tables below

VAE = Script(
    train_vae,
    "--epochs 2 --hidden 16 --variables 2 --batch 20",
    spoil=lambda model: weights(model.decoder.layers[0].weight),
    resumed=(
        "--estimator reinmax --pixels dynamic",
        "--estimator reinforce-mean",
        "--estimator gumbel-softmax --anneal 0.02 --anneal-every 4",
        "--estimator rebar:tau_every=3 --pixels dynamic",
        "--estimator nvil --pixels fixed --optimizer sgd",
    ),
    stops=(6, 20),  # in the middle of each epoch
    misfits=(
        (None, "--estimator st", "another configuration (--estimator reinmax, not st)"),
        (None, "--hidden 8", "another configuration (--hidden 16, not 8)"),
        (changed(variables=3), "", "belongs to another model"),
        (changed(optimizer="sgd"), "", "belongs to another optimizer"),
        (changed(tau="warm"), "", 'config.json is missing or damaged (tau cannot be "warm")'),
        (changed(tau="1.0"), "", 'config.json is missing or damaged (tau cannot be "1.0")'),
        (changed(hidden=["wide"]), "", 'config.json is missing or damaged (hidden cannot be ["wide"])'),
        (changed(variables=2.5), "", "config.json is missing or damaged (variables cannot be 2.5)"),
    ),
    bad=(
        ("--prior flat", "unknown prior 'flat'; the known ones are uniform, learned"),
        ("--code ternary", "unknown code 'ternary'; the known ones are categorical, bernoulli"),
        ("--slope 0.2 --hidden none", "a network without hidden layers has no ReLU: leave --slope out"),
        ("--slope 1", "--slope must be at least 0 and below 1, got 1.0"),
        ("--gradient-draws -1", "--gradient-draws must be at least 0, got -1"),
        ("--gradient-draws 1", "--gradient-draws must be 0 or at least 2, got 1"),
        ("--bound-samples -1", "--bound-samples must be at least 0, got -1"),
        ("--estimator magic", "unknown estimator 'magic'; the known ones are exact"),
        ("--estimator rloo --tau 1", "rloo has no option 'tau'"),
        ("--variables 0", "--variables must be at least 1, got 0"),
        ("--categories 0", "--categories must be at least 1"),
        ("--hidden 0", "--hidden needs widths of at least 1"),
        ("--hidden a,b", "not a list of whole numbers"),
        ("--estimator exact --variables 30", "outcomes: at most 16384 are allowed"),
        ("--variables 1000000000000", "does not fit into memory"),
        ("--variables 1000000000 --estimator reinforce", "does not fit into memory"),
        ("--hidden 100000000000000000000", "does not fit into memory"),
        ("--code bernoulli --estimator st --categories 8", "bits have no categories: leave --categories out"),
        ("--estimator rloo:samples=999999999", "samples must be an integer of at least 2 and at most 10000"),
        (
            "--estimator local-expectation --variables 1000 --categories 102",
            "a step would draw samples or evaluate the cost more than 100,000 times",
        ),
        ("--categories 99999999999", "this does not fit into memory (at least"),
        ("--batch " + "9" * 5000, "is not a whole number of at most 30 digits"),
        ("--lr " + "x" * 5000, "invalid float value: 'xxx"),
        ("--gradient-draws 1000001", "--gradient-draws must be at most 1,000,000, got 1000001"),
        ("--anneal 0.1", "reinmax needs a temperature of at least 1: give --tau-least 1 or more"),
    ),
    moved=({"pixels": "dynamic"}, {"pixels": "fixed", "optimizer": "sgd"}, {"optimizer": "radam", "anneal": 0.1}),
    sizes={"hidden": (16,), "variables": 2, "categories": 3, "lr": 1e-2, "estimator": "st-gs"},
)

STRUCTURED = Script(
    train_structured,
    "--epochs 2 --variables 4 --samples 5 --estimator reinforce-mean --batch 20",
    spoil=lambda model: weights(model.layers[-1].weight),
    resumed=(
        "--estimator nvil",
        "--estimator st-slope:rate=0.05 --optimizer sgd",
        "--estimator gumbel-softmax --anneal 0.02 --anneal-every 4 --code categorical",
        "--estimator st --train-samples 3 --pixels dynamic",
        "--estimator rebar",
    ),
    stops=(6, 20),
    misfits=(
        (None, "--estimator st", "another configuration (--estimator reinforce-mean, not st)"),
        (changed(variables=3), "", "belongs to another model"),
        (changed(layers=3), "", "belongs to another model"),
        (changed(estimator="nvil"), "", "belongs to another estimator"),
        (changed(estimator="none"), "", "another configuration (estimator differ)"),
        (changed(anneal="slow"), "", 'config.json is missing or damaged (anneal cannot be "slow")'),
    ),
    bad=(
        ("--estimator magic", "unknown estimator 'magic'; the known ones are exact"),
        ("--code ternary", "unknown code 'ternary'; the known ones are bernoulli, categorical"),
        ("--estimator gst-1.0", "Gapped straight-through is for categorical variables, not 'bernoulli'"),
        ("--estimator darn --code categorical", "DARN(½) is for bernoulli variables, not 'categorical'"),
        ("--estimator rloo --tau 1", "rloo has no option 'tau'"),
        ("--estimator none --tau 1", "without an estimator has no temperature: leave --tau out"),
        ("--estimator none --anneal 0.1", "without an estimator has no temperature: leave --anneal out"),
        ("--variables 0", "--variables must be at least 1, got 0"),
        ("--categories 0", "--categories must be at least 1"),
        ("--layers 0", "--layers must be at least 1"),
        ("--layers 200", "--layers must be at most 100, got 200"),
        ("--layers 10 --estimator rloo:samples=4", "a step would draw samples or evaluate the cost more than 100,000"),
        ("--categories 10", "bits have no categories: leave --categories out"),
        ("--samples 0", "--samples must be at least 1"),
        ("--train-samples 0", "--train-samples must be at least 1"),
        ("--estimator nvil --train-samples 2", "NVIL is no sample with a rule"),
        ("--estimator reinforce --train-samples 2", "REINFORCE is no sample with a rule"),
        ("--estimator darn:expand_at=half --train-samples 2", "DARN(½) is no sample with a rule"),
        ("--estimator none --train-samples 2", "a network without an estimator has no samples"),
        ("--estimator vimco", "VIMCO is a bound of several samples"),
        ("--estimator exact --variables 30", "outcomes: at most 16384 are allowed"),
        ("--variables 1000000000000", "does not fit into memory"),
    ),
    moved=(
        {"pixels": "dynamic", "estimator": "st"},
        {"estimator": "none"},
        {"train_samples": 2},
        {"anneal": 0.1, "code": "categorical"},
    ),
    sizes={"variables": 3},
)

SEMI_SUPERVISED = Script(
    train_semi_supervised,
    "--epochs 2 --hidden 8 --latent 2 --images 250 --labels 20",
    spoil=lambda model: weights(model.decoder.of_class),
    resumed=(
        "",
        "--method sample --anneal 0.1 --anneal-every 2",
        "--method sample --estimator reinforce-mean --pixels gray",
        "--labelled-only",
        "--batch 15 --pixels fixed",  # fewer images in a batch than there are labels
    ),
    stops=(1, 4),
    misfits=(
        (None, "--alpha 2", "another configuration (--alpha 1.0, not 2.0)"),
        (None, "--method sample", "another configuration (--method marginal, not sample)"),
        (changed(latent=3), "", "belongs to another model"),
    ),
    bad=(
        ("--labels 9", "--labels must be at least 10, one for each class, got 9"),
        ("--labels 0", "--labels must be at least 1, got 0"),
        ("--labels 301", "--labels must be at most 250, the number of training images, got 301"),
        ("--labels 245", "class 0 has "),
        ("--images 1438", "--images must be at most 288, got 1438"),
        ("--images -1", "--images must be at least 0"),
        ("--images 10 --labels 10", "take fewer --labels"),
        ("--alpha -0.1", "--alpha must be at least 0 and finite, got -0.1"),
        ("--alpha nan", "--alpha must be at least 0 and finite, got nan"),
        ("--alpha inf", "--alpha must be at least 0 and finite"),
        ("--method magic", "unknown method 'magic'; the known ones are marginal, sample"),
        ("--estimator st", "without --method sample the class is summed over: leave --estimator out"),
        ("--tau 1", "without --method sample the class is summed over: leave --tau out"),
        ("--anneal 0.1", "without --method sample the class is summed over: leave --anneal out"),
        ("--momentum 0.5", "adam takes no momentum: leave --momentum out"),
        ("--momentum 0.9", "adam takes no momentum: leave --momentum out"),  # said, though it is the default
        ("--labelled-only --method sample", "with --labelled-only no class is unknown: leave --method out"),
        ("--method sample --estimator magic", "unknown estimator 'magic'; the known ones are exact"),
        ("--method sample --estimator vimco", "is a bound of several samples, which needs the density of each z"),
        ("--method sample --estimator st-identity", "is for bernoulli variables, not 'categorical'"),
        ("--method sample --estimator rloo --tau 1", "rloo has no option 'tau'"),
        ("--latent 0", "--latent must be at least 1"),
        ("--hidden 0", "--hidden needs widths of at least 1"),
        ("--hidden none", "--hidden needs widths of at least 1, got none"),
        ("--hidden a,b", "not a list of whole numbers"),
        ("--latent 100000000000000000000", "does not fit into memory"),
    ),
    moved=tuple(
        {"pixels": pixels} | chosen
        for pixels in ("gray", "dynamic")
        for chosen in ({}, {"method": "sample"}, {"method": "sample", "estimator": "rloo"})
    ),
    sizes={"hidden": (8,), "latent": 2, "images": 200, "labels": 20, "batch": 50},
)

CONDITIONAL = Script(
    train_conditional,
    "--epochs 2 --experts 20 --gater 8 --batch 20",
    spoil=lambda model: weights(model.experts.weight),
    resumed=(
        "--gate noisy-rectifier:noise=normal --momentum 0.5",
        "--gate sts --pixels dynamic",
        "--gate st-identity --momentum 0.5",
        "--gate reinforce-minvar",
        "--gate nvil",
        "--gate sigmoid-noise",
    ),
    stops=(5, 15),
    misfits=(
        (None, "--gate sts", "another configuration (--gate st, not sts)"),
        (changed(gate="st-identity"), "", "checkpoint of another configuration (gate differ)"),
        (changed(experts=30), "", "belongs to another model"),
    ),
    bad=(
        ("--gate door", "unknown estimator 'door'; the known ones are exact"),
        ("--gate gst-1.0", "is for categorical variables, not 'bernoulli'"),
        ("--gate exact --experts 400", "outcomes: at most 16384 are allowed"),
        ("--gate sigmoid --tau 1", "the baseline sigmoid has no temperature: leave --tau out"),
        ("--gate rectifier --sparsity 1", "the baseline rectifier has no sparsity cost: leave --sparsity out"),
        ("--gate rectifier --beta 2", "the baseline rectifier has no Beta noise: leave --beta out"),
        ("--gate sigmoid --target 0.2", "the baseline sigmoid has --experts 20, all of them on: leave --target out"),
        ("--gate sigmoid:x=1", "the baseline sigmoid has no options: give --gate sigmoid"),
        ("--beta 1", "--beta must be 0, or above 1 and at most 1e9, got 1.0"),
        ("--beta nan", "--beta must be 0, or above 1 and at most 1e9, got nan"),
        ("--beta 1e20", "--beta must be 0, or above 1 and at most 1e9, got 1e+20"),
        ("--gate noisy-rectifier:noise=pink", "noise must be logistic or normal, got 'pink'"),
        ("--tau 0", "tau must be a number from 1e-06 to 1e+06, got 0"),
        ("--experts 0", "--experts must be at least 1, got 0"),
        ("--gater 0", "--gater must be at least 1"),
        ("--target 0", "--target must lie between 0 and 1, got 0.0"),
        ("--target nan", "--target must lie between 0 and 1"),
        ("--sparsity -1", "--sparsity must be at least 0 and finite"),
        ("--gater-lr inf", "--gater-lr must be at least 0 and finite"),
        ("--momentum 1", "--momentum must be at least 0 and below 1, got 1.0"),
        ("--experts 1000000000000", "does not fit into memory"),
    ),
    moved=(
        *({"gate": gate} for gate in ("noisy-rectifier:noise=normal", "sts", "st-identity", "reinforce-minvar")),
        {"gate": "sigmoid-noise", "pixels": "dynamic"},
        {"gate": "rectifier"},
    ),
    sizes={"experts": 20, "gater": 8, "batch": 100},
)

CONSTRAINTS = Script(
    train_constraints,  # 3 steps an epoch
    "--epochs 2 --examples 60 --batch 20",
    resumed=(
        "--hidden 8 --pixels dynamic",
        "--problem member3 --normalise batch --binariser clipped",
        "--problem apply2x2 --without deduce,sat --optimizer sgd",
        "--normalise all --h0 0.5",
        "--method exact",
        "--method reinforce-mean",
        "--method gumbel-softmax --tau 0.5 --hidden none",
        "--problem paths",
        "--problem sudoku4 --without labels",
    ),
    misfits=(
        (None, "--h1 1", "another configuration (--h1 0.1, not 1.0)"),
        (None, "--problem paths", "another configuration (--problem add, not paths)"),
        (changed(hidden=[9]), "", "belongs to another model"),
        (changed(method="exact"), "", "checkpoint of another configuration (method differ)"),
        (changed(cnf="a\0b"), "", r"there is no file 'a\x00b': give one to --cnf that can be read again"),
    ),
    bad=(
        (
            "--problem subtract",
            "unknown problem 'subtract'; the known ones are add, add2x2, apply2x2, member3, member5",
        ),
        ("--method magic", "unknown estimator 'magic'; the known ones are exact"),
        ("--method vimco", "VIMCO is a bound of several samples, which the probability of a constraint is not"),
        ("--method darn", "is for bernoulli variables, not 'categorical'"),
        ("--method rloo --tau 1", "rloo has no option 'tau'"),
        ("--tau 1", "--method constraint has no estimator: leave --tau out"),
        ("--method exact --normalise batch", "--method exact has no theory: leave --normalise out"),
        ("--method rloo --without sat", "--method rloo has no theory: leave --without out"),
        ("--normalise mean", "unknown normalise 'mean'; the known ones are sample, batch, all"),
        ("--binariser sign", "unknown binariser 'sign'; the known ones are probability, identity, clipped"),
        ("--without sit", "--without has no part 'sit': the known ones are deduce, unsat, sat, labels"),
        ("--without labels", "add has no labels: leave them out of --without"),
        ("--problem paths --method exact", "paths has the method constraint alone: leave --method out"),
        ("--problem paths --data digits", "paths reads no images: leave --data out"),
        ("--problem sudoku4 --hidden 3", "sudoku4 has a network of its own: leave --hidden out"),
        ("--problem apply2x2 --pixels gray", "apply2x2 draws its images: leave --pixels out"),
        ("--problem apply2x2 --network cnn --hidden 4", "the cnn has the published widths: leave --hidden out"),
        ("--network cnn", "a cnn needs images of at least 16 × 16: give --data mnist or --network mlp"),
        ("--network rnn", "unknown network 'rnn'; the known ones are mlp, cnn"),
        ("--examples 0", "--examples must be at least 1, got 0"),
        ("--examples 1000001", "--examples must be at most 1,000,000, got 1000001"),
        ("--h0 -1", "--h0 must be at least 0 and finite"),
        ("--h1 nan", "--h1 must be at least 0 and finite"),
        ("--hidden 0", "--hidden needs widths of at least 1"),
        ("--hidden 100000000000000000000", "does not fit into memory"),
        ("--cnf /nonexistent", "there is no file '/nonexistent': give one to --cnf that can be read again"),
        ("--cnf /", "there is no file '/'"),
        ("--cnf /dev/zero", "there is no file '/dev/zero'"),
        ("--without deduce,", "--without has no part '': the known ones are"),
    ),
    moved=(
        {},
        {"problem": "add2x2", "normalise": "batch", "pixels": "dynamic"},
        {"problem": "apply2x2", "binariser": "identity"},
        {"problem": "member3", "method": "exact"},
        {"method": "reinmax", "hidden": ()},
        {"method": "rloo", "problem": "apply2x2"},
        {"problem": "paths", "normalise": "all"},
        {"problem": "sudoku4", "without": "labels"},
    ),
    sizes={"hidden": (8,), "examples": 60, "batch": 20},
)

LISTOPS = Script(
    train_listops,  # 35 training sequences: 5 steps an epoch, reports after 3 and 5
    "--epochs 2 --generate 60 --dim 8 --hidden 8 --max-length 15 --batch 8 --patience 0",
    spoil=lambda model: weights(model.output.weight),
    resumed=(
        "--estimator gst-1.0",
        "--estimator gumbel-softmax",
        "--estimator reinforce-mean",
        "--estimator rloo",
        "--encoder gold",
        "--encoder lstm --split",
    ),
    stops=(1, 4, 6, 8),  # within a half of an epoch, at the end of the epoch, within both halves
    misfits=(
        (None, "--estimator st", "another configuration (--estimator gst-1.0, not st)"),
        (None, "--encoder gold", "another configuration (--encoder latent, not gold)"),
        (None, "--split", "another configuration (--split False, not True)"),
        (lambda f: (f / "best.safetensors").unlink(), "", "there is no checkpoint"),
        (rewritten(0, "best.safetensors", **{"model.query": np.zeros(3)}), "", "belongs to another model"),
        (changed(dim=9), "", "belongs to another model"),
        (changed(encoder="gold"), "", "belongs to another model"),
        (changed(optimizer="sgd"), "", "belongs to another optimizer"),
        (changed(estimator="reinforce-mean"), "", "belongs to another estimator"),
        (changed(seed=1), "", "the sequences are not those that the run began with"),
        (changed(patience="four"), "", 'config.json is missing or damaged (patience cannot be "four")'),
    ),
    bad=(
        ("--generate 0", "--generate must be at least 1, got 0"),
        ("--generate 1000000000000", "--generate must be at most 2,000,000, got 1000000000000"),
        ("--generate 1 --max-length 5", ": no sequence has 2 to 5 tokens: raise --max-length."),
        ("--data-dir /nonexistent", "there is no folder '/nonexistent': give --data-dir a folder with data"),
        ("--data-dir /", "/ has no listops/train.tsv, valid.tsv or test.tsv"),
        ("--dim 0", "--dim must be at least 1, got 0"),
        ("--hidden -1", "--hidden must be at least 1, got -1"),
        ("--max-length 4", "--max-length must be at least 5, got 4"),
        ("--patience -1", "--patience must be at least 0, got -1"),
        ("--dropout 1", "--dropout must be at least 0 and below 1, got 1.0"),
        ("--dropout -0.1", "--dropout must be at least 0 and below 1, got -0.1"),
        ("--dropout nan", "--dropout must be at least 0 and below 1, got nan"),
        ("--clip 0", "--clip must be positive, got 0.0"),
        ("--clip nan", "--clip must be positive, got nan"),
        ("--encoder lstm --estimator st", "the encoder lstm chooses no tree: leave --estimator out"),
        ("--encoder gold --tau 1", "the encoder gold chooses no tree: leave --tau out"),
        ("--encoder tree", "unknown encoder 'tree'; the known ones are latent, lstm, left, right, balanced, gold"),
        ("--leaves gru", "unknown leaves 'gru'; the known ones are lstm, affine"),
        ("--encoder lstm --leaves affine", "it cannot have affine leaves"),
        ("--estimator magic", "unknown estimator 'magic'; the known ones are exact"),
        ("--estimator rloo:samples=1", "samples"),
        ("--estimator disarm-sb", "Stick-breaking coupled DisARM needs all choices and their costs in one call"),
        ("--estimator rebar", "REBAR needs all choices and their costs in one call"),
        ("--estimator exact", "and cannot choose step by step: take an estimator that is a sample with a rule"),
        ("--estimator st-identity", "Straight-through, identity is for bernoulli variables, not 'categorical'"),
        ("--estimator rloo --tau 1", "rloo has no option 'tau'"),
        ("--dim 1000000000000", "does not fit into memory"),
        ("--max-length 10001", "--max-length must be at most 10,000, got 10001"),
    ),
)

QUANTISED = Script(
    train_quantised,
    "--epochs 2 --hidden 8 --batch 50 --schedule constant",
    resumed=(
        "",
        "--schedule cosine --pixels dynamic",
        "--network lenet --bits 1 --proxy identity",
        "--bits 0 --optimizer sgd --schedule exponential --lr-last 1e-4",
    ),
    misfits=(
        (None, "--bits 1", "another configuration (--bits 2, not 1)"),
        (changed(proxy="relu"), "", "checkpoint of another configuration (proxy differ)"),
        (changed(hidden=[9]), "", "belongs to another model"),
        (changed(network="lenet"), "", "belongs to another model"),
    ),
    bad=(
        ("--network resnet", "unknown network 'resnet'; the known ones are dense, lenet"),
        ("--proxy triangle", "unknown proxy 'triangle'; the known ones are identity, relu, clipped_relu, sigmoid"),
        ("--bits 3", "--bits 3 needs --alpha, the distance of two levels: it is known for 1, 2, 4 bits only"),
        ("--bits 17 --alpha 1", "--bits must be from 0 to 16, got 17"),
        ("--bits -1", "--bits must be from 0 to 16, got -1"),
        ("--alpha 0", "--alpha must be positive and finite, got 0.0"),
        ("--alpha nan", "--alpha must be positive and finite, got nan"),
        ("--bits 0 --proxy relu", "in full precision, with --bits 0, nothing is quantised: leave --proxy out"),
        ("--bits 0 --alpha 1", "in full precision, with --bits 0, nothing is quantised: leave --alpha out"),
        ("--lr-last 1e-4", "the learning rate is constant: leave --lr-last out"),
        ("--schedule cosine --lr-last 1", "--lr-last must be above 0 and at most --lr 0.002, got 1.0"),
        ("--hidden none", "has nothing to quantise: give --hidden widths"),
        ("--hidden 0", "--hidden needs widths of at least 1"),
        ("--hidden 1000000000000", "does not fit into memory"),
        ("--hidden 1000000000000 --network lenet", "does not fit into memory"),
    ),
    moved=(
        *({"bits": 2, "proxy": proxy} for proxy in ("identity", "relu", "sigmoid")),
        {"network": "lenet", "pixels": "dynamic"},
        {"bits": 0, "optimizer": "sgd"},
        {"bits": 3, "alpha": 0.3},
    ),
    sizes={"hidden": (8,), "batch": 100},
)

SPIKING = Script(
    train_spiking,
    "--epochs 2 --hidden 8 --steps 3 --batch 50 --schedule constant",
    spoil=lambda model: weights(model.layers[-1].weight),
    resumed=(
        "--schedule exponential",
        "--coding latency --reset zero --leak 0.8 --detach-reset --loss-at every --optimizer sgd",
        "--integration discontinuous --steps 1 --test-steps 4 --pixels dynamic",
        "--network conv --channels 2,3 --sparsity 0.1",
    ),
    stops=(1, 6),
    misfits=(
        (None, "--reset zero", "another configuration (--reset subtract, not zero)"),
        (None, "--steps 4", "another configuration (--steps 3, not 4)"),
        (changed(hidden=[9]), "", "belongs to another model"),
        (changed(coding="latency"), "", "another configuration (coding differ)"),
        (changed(leak="some"), "", 'config.json is missing or damaged (leak cannot be "some")'),
    ),
    bad=(
        ("--integration slow", "unknown integration 'slow'; the known ones are discontinuous, continuous"),
        ("--coding phase", "unknown coding 'phase'; the known ones are rate, latency"),
        ("--reset hard", "unknown reset 'hard'; the known ones are subtract, zero, none"),
        ("--proxy box", "unknown proxy 'box'; the known ones are identity"),
        ("--network recurrent", "unknown network 'recurrent'; the known ones are dense, conv"),
        ("--loss-at end", "--loss-at must be every or mean, got 'end'"),
        ("--steps 0", "--steps must be at least 1, got 0"),
        ("--steps 1001", "--steps and --test-steps must be at most 1,000, got 1001"),
        ("--test-steps 0", "--test-steps must be at least 1, got 0"),
        ("--leak 1.1", "--leak must be from 0 to 1, got 1.1"),
        ("--leak nan", "--leak must be from 0 to 1, got nan"),
        ("--dropout 1", "--dropout must be at least 0 and below 1, got 1.0"),
        ("--input-dropout -0.1", "--input-dropout must be at least 0 and below 1, got -0.1"),
        ("--sparsity -1", "--sparsity must be at least 0 and finite, got -1.0"),
        ("--hidden 0", "--hidden needs widths of at least 1, got 0"),
        ("--network conv --channels 0", "--channels needs widths of at least 1, got 0"),
        ("--network conv --channels none", "--network conv needs --channels: give at least one number"),
        ("--network conv --channels 2,2,2,2", "halves the images of 8 × 8: give fewer than 4"),
        ("--channels 2", "--network dense has no convolutions: leave --channels out"),
        ("--integration discontinuous --leak 0.5", "empties the membranes after every step: leave --leak out"),
        ("--integration discontinuous --reset zero", "empties the membranes after every step: leave --reset out"),
        ("--integration discontinuous --detach-reset", "after every step: leave --detach-reset out"),
        ("--reset none --detach-reset", "with --reset none there is no reset: leave --detach-reset out"),
        ("--leak 0 --reset zero", "with --leak 0 a membrane keeps nothing that is reset: leave --reset out"),
        ("--leak 0 --detach-reset", "with --leak 0 a membrane keeps nothing that is reset: leave --detach-reset out"),
        ("--steps 1 --leak 0.5", "with --steps 1 no step comes before another: leave --leak out"),
        ("--steps 1 --test-steps 1 --reset zero", "with --steps 1 no step comes before another: leave --reset out"),
        ("--steps 1 --test-steps 4 --detach-reset", "with --steps 1 nothing comes after a reset: leave --detach-reset"),
        ("--hidden none --proxy arctan", "without --hidden layers there are no neurons: leave --proxy out"),
        ("--hidden none --sparsity 0.1", "without --hidden layers there are no neurons: leave --sparsity out"),
        ("--steps 1 --loss-at every", "with --steps 1 there is one output: leave --loss-at out"),
        ("--coding latency --test-steps 9", "the code of --coding latency has --steps steps: leave --test-steps out"),
        ("--lr-last 1e-4", "the learning rate is constant: leave --lr-last out"),
        ("--schedule cosine --lr-last 1", "--lr-last must be above 0 and at most --lr 0.002, got 1.0"),
        ("--momentum 0.5", "adam takes no momentum: leave --momentum out"),
        ("--hidden 100000000000000000000", "does not fit into memory"),
        ("--network conv --channels 1,10000000000", "does not fit into memory"),
    ),
    moved=(
        {},
        {"coding": "latency", "reset": "zero", "detach_reset": True, "loss_at": "every"},
        {"integration": "discontinuous", "pixels": "dynamic", "sparsity": 0.1},
        {"network": "conv", "channels": (2, 3), "proxy": "arctan"},
    ),
    sizes={"hidden": (8,), "steps": 3},
)

ALL = {
    s.module.__name__: s
    for s in (VAE, STRUCTURED, SEMI_SUPERVISED, CONDITIONAL, QUANTISED, SPIKING, CONSTRAINTS, LISTOPS)
}
IMAGES = {name: s for name, s in ALL.items() if s is not LISTOPS}
NAMED_BY_AN_ESTIMATOR = {name: s for name, s in ALL.items() if s not in (QUANTISED, SPIKING)}
every_script = pytest.mark.parametrize("script", ALL.values(), ids=ALL)


def cases(of_script, scripts=ALL):
    """Parameters (script, case) for all cases of each script, named after the texts in them."""
    found = [(name, script, case) for name, script in scripts.items() for case in of_script(script)]
    parts = lambda case: [case] if isinstance(case, str) else case.values() if isinstance(case, dict) else case
    text = lambda case: ", ".join(str(part)[:60] for part in parts(case) if part and not callable(part))
    names = [f"{name}: {text(case)}" for name, _, case in found]
    return pytest.mark.parametrize(("script", "case"), [(script, case) for _, script, case in found], ids=names)


@pytest.fixture(autouse=True)
def generated_data_and_no_pictures(monkeypatch):
    """Drawing and evaluating are most of a tiny run; the tests of each script draw, and have all images."""
    monkeypatch.delenv("MINIGRAD_DATA", raising=False)
    monkeypatch.setattr(loop, "load_images", lambda *args: few(load_images(*args)))
    for script in ALL.values():
        monkeypatch.setattr(script.experiment, "draw", lambda *_: None)
    monkeypatch.setattr(train_conditional, "SECONDS", 0.0)


def few(images):
    """A fifth of them."""
    parts = ("train", "train_labels", "test", "test_labels")
    return dataclasses.replace(images, **{name: getattr(images, name)[::5] for name in parts})


def metrics(folder):
    return [{k: v for k, v in line.items() if k not in TIMES} for line in RunFolder(folder).metrics()]


def assert_same_run(a, b):
    """The same metrics but for the times, and the same checkpoints to the bit."""
    assert metrics(a) == metrics(b)
    names = sorted(path.name for path in a.glob("*.safetensors"))
    assert names == sorted(path.name for path in b.glob("*.safetensors"))
    for name in names:
        x, y = load_file(a / name), load_file(b / name)
        assert x.keys() == y.keys()
        for key in x:
            np.testing.assert_array_equal(x[key], y[key], err_msg=f"{name} {key}")


def one_sentence(capsys) -> str:
    """What was said of an error, which is one sentence; nothing was printed as a result."""
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.endswith((".\n", "help.\n"))
    return captured.err


# ---- resume


@cases(lambda script: script.resumed)
@pytest.mark.daily(22)
def test_resume_continues_bit_for_bit_after_ctrl_c(tmp_path, capsys, monkeypatch, script, case):
    flags, whole, stopped = case.split(), tmp_path / "whole", tmp_path / "stopped"
    assert script.run(whole, *flags) == 0
    step, count = Loop.step, iter(range(1000))

    def interrupted_step(self, argument):
        step(self, argument)
        if next(count) in script.stops:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(Loop, "step", interrupted_step)
        assert script.run(stopped, *flags) == 130
        err = capsys.readouterr().err
        assert f"stopped at epoch 1, step {script.stops[0] + 1}; go on with: " in err
        assert f"--resume {stopped}" in err
        for _ in script.stops[1:]:
            assert script.resume(stopped) == 130
    assert script.resume(stopped) == 0
    assert next(count) == script.stops[-1] + 1  # all of them happened
    assert_same_run(whole, stopped)


@every_script
def test_a_finished_run_can_be_continued_to_more_epochs(tmp_path, capsys, script):
    long, short = tmp_path / "long", tmp_path / "short"
    assert script.run(long, "--epochs", 3) == 0
    assert script.run(short, "--epochs", 1) == 0
    with open(short / "metrics.jsonl", "a") as file:
        file.write('{"epoch": 3, "train": 1e9')  # as if the program had been killed while it wrote
    capsys.readouterr()
    assert script.resume(short, "--epochs", 3) == 0
    last = lambda folder: metrics(folder)[-1]
    assert last(long) == last(short)
    reports = lambda folder: {line.get("epoch"): line for line in metrics(folder)}
    assert reports(long) == reports(short)
    assert script.resume(short) == 0  # the folder knows its epochs
    assert last(long) == last(short)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """folder_of(script): a finished run."""
    made = {}

    def folder_of(script):
        if script.module not in made:
            out = tmp_path_factory.mktemp("finished") / "run"
            assert script.run(out) == 0
            made[script.module] = out
        return made[script.module]

    return folder_of


MISFITS = (
    (lambda f: (f / "checkpoint.safetensors").unlink(), "", "there is no checkpoint"),
    (lambda f: truncate(f / "checkpoint.safetensors", 0.6), "", "damaged or not a checkpoint"),
    (lambda f: (f / "checkpoint.safetensors").write_bytes(b"PK"), "", "damaged or not a checkpoint"),
    (lambda f: (f / "config.json").unlink(), "", "config.json is missing or damaged"),
    (lambda f: truncate(f / "config.json", 0.5), "", "config.json is missing or damaged"),
    (lambda f: (f / "metrics.jsonl").unlink(), "", "metrics.jsonl is shorter than when the checkpoint was made"),
    (lambda f: truncate(f / "metrics.jsonl", 0.3), "", "metrics.jsonl is shorter than when the checkpoint was made"),
    (lambda f: garble(f / "metrics.jsonl"), "", "metrics.jsonl is shorter than when the checkpoint was made"),
    (another_line, "", "metrics.jsonl is damaged"),
    (another_number, "", "metrics.jsonl is not as it was when the checkpoint was made"),
    (lambda f: nested(f / "metrics.jsonl"), "", "metrics.jsonl is damaged"),
    (lambda f: nested(f / "config.json"), "", "config.json is missing or damaged"),
    (lambda f: a_folder(f / "metrics.jsonl"), "", "metrics.jsonl is no file, where the run needs one"),
    (lambda f: a_folder(f / "checkpoint.safetensors.part"), "", "checkpoint.safetensors.part is no file"),
    (lambda f: a_pipe(f / "metrics.jsonl"), "", "metrics.jsonl is no file, where the run needs one"),
    (lambda f: a_pipe(f / "config.json"), "", "config.json is missing or damaged (config.json is no file)"),
    (lambda f: a_pipe(f / "picture.png"), "", "picture.png is no file, where the run needs one"),
    (rewritten(1, epoch="2"), "", "checkpoint.safetensors is damaged"),
    (rewritten(1, epoch=1.5), "", "checkpoint.safetensors is damaged"),
    (rewritten(1, step_in_epoch=10**6), "", "checkpoint.safetensors is damaged (step 1000000 of "),
    (rewritten(1, metrics_lines=[]), "", "checkpoint.safetensors is damaged (its counts are no counts)"),
    (rewritten(1, metrics_bytes=-1), "", "checkpoint.safetensors is damaged (its counts are no counts)"),
    (rewritten(1, epoch=float("inf")), "", "checkpoint.safetensors is damaged (its counts are no counts)"),
    (rewritten(1, metrics_crc32="7"), "", "metrics.jsonl is not as it was when the checkpoint was made"),
    (lambda f: checkpoint.save(f / "checkpoint.safetensors", {}, {}), "", "has a checkpoint of another program"),
    (changed(lr=10**400), "", "config.json is missing or damaged ("),
    (rewritten(1, config=[]), "", "checkpoint.safetensors is damaged"),
    (
        rewritten(0, **{"optimizer.steps": np.zeros(0)}),
        "",
        "checkpoint.safetensors cannot be used: the saved optimizer",
    ),
    (rewritten(0, losses=np.zeros(3)), "", "checkpoint.safetensors is damaged (its losses have the shape (3,))"),
    (changed(lr=0.5), "", "checkpoint of another configuration (lr differ)"),
    (changed(epochs="ten"), "", 'config.json is missing or damaged (epochs cannot be "ten")'),
    (changed(batch=True), "", "config.json is missing or damaged (batch cannot be true)"),
    (None, "--lr 0.7", "another configuration (--lr "),
    (None, "--seed 1", "another configuration (--seed 0, not 1)"),
    (None, "--epochs 1", "--epochs must not be less"),
    (None, "--out elsewhere", "--out and --resume exclude each other"),
)


@cases(lambda script: [(spoil, flags, message) for spoil, flags, message in (*MISFITS, *script.misfits)])
def test_a_resume_folder_that_does_not_fit_is_left_as_it_is(tmp_path, capsys, finished, script, case):
    spoil, flags, message = case
    folder = tmp_path / "run"
    shutil.copytree(finished(script), folder)
    if spoil:
        spoil(folder)
    content = lambda: {p.name: p.read_bytes() if p.is_file() else None for p in folder.iterdir()}
    before = content()
    capsys.readouterr()
    assert script.resume(folder, *flags.split()) == 2
    assert message in one_sentence(capsys)
    assert before == content()


# ---- the device


@cases(lambda script: script.moved, IMAGES)
@pytest.mark.daily(16)
def test_the_script_s_own_step_stays_on_the_device(monkeypatch, script, case):
    """The stand-in device refuses any wait and any copy to the host; its losses and weights are NumPy's to the bit."""
    results = []
    for backend in (Backend(), DevsimBackend()):
        monkeypatch.setattr(loop, "get_backend", lambda _, backend=backend: backend)
        run = script.loop(**(script.sizes | case))
        steps = [index[:50] for index in run.experiment.epoch_steps()]
        with forbid("sync", "d2h"):
            for index in steps[:-1][:7]:  # with RAdam, before and after its rectification begins
                run.step(index)
        arrays, info = run.state()
        run.load_state(arrays, info)
        run.step(steps[-1])
        line = run.checked(run.experiment.report(run.losses_so_far(), 1.0))
        results.append((run.state()[0], {k: v for k, v in line.items() if k not in TIMES}))
    assert results[0][1] == results[1][1]
    for name, array in results[0][0].items():
        np.testing.assert_array_equal(array, results[1][0][name], err_msg=name)


@pytest.mark.parametrize("script", IMAGES.values(), ids=IMAGES)
def test_a_look_at_the_losses_costs_the_same_after_one_step_and_after_a_hundred(monkeypatch, script):
    """It comes every hundred steps and takes all of an epoch: on a GPU its launches would cost as much as a step."""
    monkeypatch.setattr(loop, "get_backend", lambda _: DevsimBackend())
    run = script.loop(**script.sizes)
    run.step(run.experiment.epoch_steps()[0])
    before = stats["launch"], stats["d2h"]
    one = run.losses_so_far()
    first = stats["launch"], stats["d2h"]
    run.losses *= 100
    np.testing.assert_array_equal(run.losses_so_far(), np.repeat(one, 100, axis=0))
    assert (stats["launch"] - first[0], stats["d2h"] - first[1]) == (first[0] - before[0], first[1] - before[1])
    assert first[1] - before[1] == 1


# ---- images


@pytest.mark.parametrize("script", IMAGES.values(), ids=IMAGES)
def test_dynamic_pixels_are_drawn_once_for_tests_and_anew_for_every_step(monkeypatch, script):
    seen = []
    monkeypatch.setattr(loop, "binarise", lambda x, rng: seen.append(binarise(x, rng)) or seen[-1])
    run = script.loop(**(script.sizes | {"pixels": "dynamic"}))
    images = run.experiment
    for x in (images.test, getattr(images, "valid", images.test)):
        assert set(np.unique(x)) == {0.0, 1.0}
    assert len(np.unique(images.train)) > 2
    seen.clear()
    for _ in range(2):
        run.step(np.arange(20))
    first, second = seen[: len(seen) // 2], seen[len(seen) // 2 :]
    assert first
    for a, b in zip(first, second, strict=True):
        assert a.shape == b.shape
        assert (a != b).any()
    seen.clear()
    script.loop(**(script.sizes | {"pixels": "gray"})).step(np.arange(20))
    assert not seen


@pytest.mark.parametrize("script", IMAGES.values(), ids=IMAGES)
def test_every_epoch_has_all_training_images_in_an_order_of_its_own(script):
    run = script.loop(**script.sizes).experiment
    orders = []
    for run.epoch in (0, 1):
        steps = run.epoch_steps()
        assert len(steps) == run.steps_per_epoch
        orders.append(np.concatenate(steps))
        np.testing.assert_array_equal(np.sort(orders[-1]), np.arange(len(run.train)))
    assert (orders[0] != orders[1]).any()


@pytest.mark.parametrize("name", ["train_vae", "train_structured", "train_semi_supervised"])
def test_an_estimator_that_may_not_train_the_model_says_so(caplog, name):
    script = ALL[name]
    settings = {"method": "sample"} if script is SEMI_SUPERVISED else {}
    script.loop(**(script.sizes | settings | {"estimator": "reinforce"}))
    assert "reinforce may not train the model: without a baseline" in caplog.text


# ---- what a programmer did wrong is a traceback


def planted(tmp_path, monkeypatch, target, name, function):
    """Run train_vae.py with an error planted in place of target.name; the exception, and the lines of its traceback."""
    monkeypatch.setattr(target, name, function)
    with pytest.raises(Exception) as caught:  # noqa: PT011 (of any type)
        VAE.run(tmp_path / "run")
    frames = traceback.extract_tb(caught.value.__traceback__)
    return caught.value, [frame.line for frame in frames]


def test_a_wrong_product_in_linear_shows_its_line_the_op_and_the_line_of_the_model(tmp_path, monkeypatch):
    source = textwrap.dedent(inspect.getsource(fused._linear_backward)).replace("g @ w.T", "g @ w")
    assert "g @ w)" in source
    compiled = dict(vars(fused))
    linecache.cache["planted.py"] = (len(source), None, source.splitlines(keepends=True), "planted.py")
    exec(compile(source, "planted.py", "exec"), compiled)
    error, lines = planted(tmp_path, monkeypatch, fused, "_linear_backward", compiled["_linear_backward"])
    assert isinstance(error, ValueError)
    assert any("g @ w)" in line for line in lines), lines
    (note,) = error.__notes__
    assert re.match(r"in the backward pass of linear(_relu)?, called at vae.py:\d+: float32\(\d+, \d+\), float32", note)
    number = int(re.search(r"vae.py:(\d+)", note).group(1))
    called = (SCRIPTS.parent / "models" / "vae.py").read_text().splitlines()[number - 1]
    assert "self.encoder(x)" in called or "self.decoder(" in called


def test_a_gradient_of_a_wrong_shape_shows_the_rule_the_op_and_the_line_of_the_model(tmp_path, monkeypatch):
    def wrong(x, w, g):
        dx, dw, db = right(x, w, g)
        return dx, lambda: dw(None).T, db  # planted

    right = fused._linear_backward
    error, _ = planted(tmp_path, monkeypatch, fused, "_linear_backward", wrong)
    assert isinstance(error, RuleError)
    assert re.search(r"linear(_relu)?: the gradient of an input of float32\(\d+, \d+\) came out as float32", str(error))
    lines, start = inspect.getsourcelines(wrong)  # the line that gave it, also when it was deferred
    number = start + next(n for n, line in enumerate(lines) if "# planted" in line)
    assert f"see the rule at test_training_scripts.py:{number}." in str(error)
    assert re.match(r"in the backward pass of linear(_relu)?, called at vae.py:\d+", error.__notes__[0])


@pytest.mark.parametrize("estimator", ["reinmax", "reinforce-mean", "rebar"])
def test_an_error_in_an_estimator_s_rule_shows_its_line(tmp_path, monkeypatch, estimator):
    """For a sample with a rule the op and the line that called it are said; the others stand in the traceback."""
    target, name = {
        "reinmax": (categorical, "vjp"),
        "reinforce-mean": (score_function, "scale_per_example"),
        "rebar": (categorical, "conditional_vjp"),
    }[estimator]

    def broken(*_):
        return np.zeros(3) + np.zeros(4)  # planted

    monkeypatch.setattr(target, name, broken)
    with pytest.raises(ValueError, match="could not be broadcast") as caught:
        VAE.run(tmp_path / "run", "--estimator", estimator)
    lines = [frame.line for frame in traceback.extract_tb(caught.value.__traceback__)]
    assert "return np.zeros(3) + np.zeros(4)  # planted" in lines
    if estimator == "reinmax":
        assert re.match(r"in the backward pass of reinmax, called at reinmax.py:\d+", caught.value.__notes__[0])
    else:
        assert any("_gradient(" in line for line in lines)


@pytest.mark.parametrize("error", [ValueError("shapes"), TypeError("t"), OverflowError()])
def test_an_error_in_the_constructor_of_an_estimator_is_no_sentence(tmp_path, monkeypatch, error):
    """What a flag says about it is one (`SettingError`)."""

    def broken(*_, **__):
        raise error

    monkeypatch.setattr(reinmax.ReinMax, "__init__", broken)
    for run, flags in ((VAE.run, []), (STRUCTURED.run, ["--estimator", "reinmax"])):
        with pytest.raises(type(error)) as caught:
            run(tmp_path / "run", *flags)
        assert caught.value is error


@pytest.mark.parametrize("error", [ValueError("shapes"), MemoryError(), OSError("no"), KeyError("k"), TypeError("t")])
@every_script
@pytest.mark.daily(20)
def test_no_error_of_a_step_or_a_measurement_becomes_a_sentence(tmp_path, monkeypatch, script, error):
    for name in ("step", "report", "final"):

        def broken(*_):
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(script.experiment, name, broken)
            with pytest.raises(type(error)) as caught:
                script.run(tmp_path / name)
        assert caught.value is error


def test_a_script_with_a_wrong_rule_ends_with_its_traceback(tmp_path):
    """As a user meets it: the traceback, the note below it, exit code 1."""
    code = (
        "import sys; sys.path.insert(0, sys.argv.pop(1)); import train_vae; from minigrad import fused\n"
        "right = fused._linear_backward\n"
        "fused._linear_backward = lambda x, w, g: (lambda: g @ w, *right(x, w, g)[1:])\n"
        "sys.exit(train_vae.main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, SCRIPTS, *VAE.tiny.split(), "--out", tmp_path / "run", "--quiet"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout) == (1, "")
    assert ran.stderr.startswith("Traceback (most recent call last):")
    assert "in the backward pass of linear" in ran.stderr.splitlines()[-1]
    assert "called at vae.py:" in ran.stderr.splitlines()[-1]


# ---- bad input: one sentence on standard error, exit code 2, no traceback, nothing lost

BAD = (
    ("--backend tpu", "unknown backend 'tpu'; the known ones are auto, cupy, numpy"),
    ("--dtype float16", "unknown dtype 'float16'; the known ones are float32, float64"),
    ("--batch 0", "--batch must be at least 1, got 0"),
    ("--epochs -3", "--epochs must be at least 1, got -3"),
    ("--lr 0", "--lr, the learning rate, must be positive and finite, got 0.0"),
    ("--lr nan", "--lr, the learning rate, must be positive and finite, got nan"),
    ("--lr fast", "argument --lr: invalid float value: 'fast'"),
    ("--seed -1", "--seed must be an integer from 0 to 2**64 - 1, got -1"),
    (f"--seed {2**64}", "--seed must be an integer from 0 to 2**64 - 1"),
    ("--learning-rate 1", "unrecognized arguments: --learning-rate"),
    ("--out " + "x" * 300, "File name too long"),
    ("--resume " + "x" * 300, "File name too long"),
    ("--backend=", "backend is empty: give it a value, or leave it out"),  # as from --backend=$UNSET
    ("--data-dir=", "data-dir is empty: give it a value, or leave it out"),
    ("--resume /nonexistent/run", "there is no run folder /nonexistent/run"),
)
BAD_IMAGES = (
    ("--data cifar", "unknown data set 'cifar'; the known ones are digits, mnist"),
    ("--data mnist --data-dir /", "has neither train-images-idx3-ubyte nor"),
    ("--data-dir /", "the digits are embedded: leave --data-dir out"),
    ("--data mnist --data-dir /nonexistent", "there is no folder '/nonexistent': give --data-dir a folder"),
    ("--pixels red", "unknown pixels 'red'; the known ones are gray, dynamic, fixed"),
)
BAD_OPTIMIZER = (("--optimizer lion", "unknown optimizer 'lion'; the known ones are sgd, adam, radam"),)
BAD_TAU = tuple((f"--tau {tau}", "tau must be a number from 1e-06 to 1e+06, got") for tau in ("0", "-1", "inf", "nan"))
BAD_ANNEALING = (
    ("--anneal -1", "--anneal must be at least 0 and finite, got -1.0"),
    ("--anneal nan", "--anneal must be at least 0 and finite, got nan"),
    ("--anneal-every 0", "--anneal-every must be at least 1, got 0"),
    ("--anneal-every 5", "without --anneal the temperature stays: leave --anneal-every out"),
    ("--tau-least 0.4", "without --anneal the temperature stays: leave --tau-least out"),
    ("--tau-least 0", "--tau-least must be positive and finite, got 0.0"),
    ("--anneal 0.1 --estimator rloo", "rloo has no temperature: leave --anneal out"),
    ("--anneal 0.1 --estimator rebar", "rebar learns its temperature: leave --anneal out"),
    ("--anneal 0.1 --estimator st --tau 0.3", "--tau-least must be at most the first temperature 0.3, got 0.5"),
)


def bad_flags(script):
    fields = script.config_class.__dataclass_fields__
    found = [*BAD, *script.bad]
    found += BAD_IMAGES if "pixels" in fields else ()
    found += BAD_OPTIMIZER if "optimizer" in fields else ()
    extra = [*(BAD_TAU if "estimator" in fields else ()), *(BAD_ANNEALING if "anneal" in fields else ())]
    prefix = "--method sample " if script is SEMI_SUPERVISED else "--estimator st-gs " if script is STRUCTURED else ""
    return found + [(prefix + flags, message) for flags, message in extra]


@cases(bad_flags)
def test_a_bad_flag_is_one_sentence_and_exit_code_2(tmp_path, capsys, caplog, script, case):
    flags, message = case
    if "--resume" in flags:
        assert script.main(*flags.split()) == 2
    else:
        assert script.run(tmp_path / "run", *flags.split()) == 2
    assert message in one_sentence(capsys)
    assert caplog.text == ""  # nor a warning beside it
    assert list(tmp_path.iterdir()) == []


@every_script
def test_an_output_folder_that_exists_or_cannot_be_written(tmp_path, capsys, monkeypatch, script):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "keep.txt").write_text("mine")
    assert script.run(tmp_path / "run") == 2
    assert "exists already" in one_sentence(capsys)
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["keep.txt"]
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(script.experiment, "build", None)  # it is said before any data is made or read
    assert script.run(tmp_path / "file" / "run") == 2
    assert "cannot be written" in one_sentence(capsys)


@every_script
def test_cupy_without_a_usable_gpu(tmp_path, capsys, script):
    try:
        get_backend("cupy")
    except BackendUnavailable:
        assert script.run(tmp_path / "run", "--backend", "cupy") == 2
        err = one_sentence(capsys)
        assert "CuPy" in err
        assert "--backend numpy" in err
    else:
        pytest.skip("this machine has a usable GPU")


@every_script
def test_two_processes_do_not_work_in_one_folder(tmp_path, capsys, finished, script):
    shutil.copytree(finished(script), tmp_path / "run")
    before = {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()}
    capsys.readouterr()
    with RunFolder(tmp_path / "run").locked():
        assert script.resume(tmp_path / "run", "--epochs", 3) == 2
    assert f"another process is at work in {tmp_path / 'run'}: wait until it has ended" in one_sentence(capsys)
    assert before == {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()}
    assert script.resume(tmp_path / "run") == 0


@pytest.mark.parametrize("at", ["the first step", "the last step of an epoch", "the second epoch"])
@every_script
@pytest.mark.daily(12)
def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint(
    tmp_path, capsys, monkeypatch, caplog, script, at
):
    whole, out = tmp_path / "whole", tmp_path / "run"
    assert script.run(whole) == 0
    capsys.readouterr()
    step, count = Loop.step, iter(range(1000))
    wanted = {
        "the first step": lambda n: 0,
        "the last step of an epoch": lambda n: n - 1,
        "the second epoch": lambda n: n,
    }

    def spoiled_step(self, argument):
        step(self, argument)
        if next(count) == wanted[at](self.experiment.steps_per_epoch):
            script.spoil(self.experiment.model)

    with monkeypatch.context() as patch:
        patch.setattr(Loop, "step", spoiled_step)
        assert script.run(out) == 2
    err = one_sentence(capsys)
    assert ("(epoch 2)" if at == "the second epoch" else "(epoch 1)") in err
    assert "training stopped, the last good checkpoint is kept" in err
    assert script.resume(out) == 0
    assert_same_run(whole, out)  # which started again from the checkpoint, and the checkpoint was good


@every_script
def test_a_full_disk_is_one_sentence_and_the_old_checkpoint_stays(tmp_path, capsys, monkeypatch, script):
    out, write, count = tmp_path / "run", checkpoint.write_atomically, iter(range(100))

    def full(path, data):
        if next(count) == 3:  # after the configuration, the first checkpoint, and what the first report writes
            raise OSError(28, "No space left on device", str(path))
        write(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_atomically", full)
        assert script.run(out) == 2
    assert "No space left on device" in one_sentence(capsys)
    assert script.resume(out) == 0


@every_script
def test_metrics_are_on_the_disk_before_the_checkpoint_that_counts_on_them(tmp_path, monkeypatch, script):
    """Else a power cut between the two would leave a run that cannot be resumed."""
    on_disk, counted, fsync, save = {}, [], os.fsync, checkpoint.save

    def note(descriptor):
        fsync(descriptor)
        about = os.fstat(descriptor)
        on_disk[about.st_ino] = about.st_size

    def look(path, arrays, info):
        if info.get("metrics_lines"):  # a best model counts on none
            metrics = path.parent / "metrics.jsonl"
            assert metrics.read_bytes().count(b"\n") == info["metrics_lines"]
            counted.append((metrics.stat().st_size, on_disk.get(metrics.stat().st_ino)))
        save(path, arrays, info)

    monkeypatch.setattr(os, "fsync", note)
    monkeypatch.setattr(checkpoint, "save", look)
    assert script.run(tmp_path / "run") == 0
    assert counted
    assert all(size == flushed for size, flushed in counted)


@every_script
def test_the_script_itself_exits_with_2_without_a_traceback(tmp_path, script):
    name = f"{script.module.__name__}.py"
    command = [sys.executable, str(SCRIPTS / name), "--epochs", "0"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == f"{name}: error: --epochs must be at least 1, got 0.\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("script", NAMED_BY_AN_ESTIMATOR.values(), ids=NAMED_BY_AN_ESTIMATOR)
def test_a_default_folder_whose_name_is_too_long_is_a_sentence(tmp_path, capsys, monkeypatch, script):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    name = "--gate" if script is CONDITIONAL else "--method" if script is CONSTRAINTS else "--estimator"
    others = ("--method", "sample") if script is SEMI_SUPERVISED else ()
    assert script.main(name, f"reinforce-mean:decay=0.5{'0' * 300}", *others) == 2
    assert "File name too long" in one_sentence(capsys)


@pytest.mark.parametrize(
    ("script", "flags"),
    [
        (QUANTISED, {"hidden": (300, 300)}),
        (QUANTISED, {"network": "lenet"}),
        (SPIKING, {"steps": 20}),
        (SPIKING, {"steps": 20, "integration": "discontinuous", "hidden": (100,)}),
        (SPIKING, {"network": "conv", "channels": (8, 16), "hidden": ()}),
        (CONSTRAINTS, {}),
        (CONSTRAINTS, {"problem": "apply2x2", "network": "cnn", "h1": 0.0}),
        (CONSTRAINTS, {"problem": "apply2x2", "normalise": "all", "batch": 5}),
        (CONSTRAINTS, {"problem": "add2x2", "method": "rloo:samples=20", "batch": 20}),
    ],
)
def test_what_is_said_to_be_needed_is_about_what_a_step_takes(monkeypatch, script, flags):
    """Never more, so that nothing is refused that fits; and a third or more, since an estimate that is far too low lets
    the system end a run."""
    said = []
    count = lambda numbers, dtype, *_: said.append(numbers * np.dtype(dtype).itemsize)
    monkeypatch.setattr(script.module, "check_memory", count)
    monkeypatch.setattr(script.experiment, "EVALUATION_BATCH", 10)
    run = script.experiment(script.module.Config(**{"batch": 200} | flags))
    index = run.epoch_steps()[0]
    tracemalloc.start()
    try:
        run.step(index, Rng(0))
        taken = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert max(said) <= taken + 2 * sum(p.data.nbytes for p in run.model.parameters())  # made before the step
    assert taken <= 3 * max(said)


@pytest.mark.skipif(not memory.resource, reason="RESOURCE LIMITS NOT TESTED: this system has none")
def test_a_limit_of_the_process_is_one_of_its_memory(monkeypatch):
    monkeypatch.setattr(memory.resource, "getrlimit", lambda _: (12345, memory.resource.RLIM_INFINITY))
    assert memory.machine_memory() == 12345
    monkeypatch.setattr(memory.resource, "getrlimit", lambda _: (memory.resource.RLIM_INFINITY,) * 2)
    assert memory.machine_memory() > 12345


@pytest.mark.parametrize("script", IMAGES.values(), ids=IMAGES)
def test_a_batch_of_any_size_is_one_step(script):
    run = script.loop(**(script.sizes | {"batch": 10**400})).experiment
    assert (run.steps_per_epoch, len(run.epoch_steps())) == (1, 1)


def test_final_numbers_that_are_not_finite_are_not_written(tmp_path, capsys):
    """The loss of so large a step is finite, and the square of its gradient is not."""
    flags = "--epochs 1 --hidden 16 --variables 2 --batch 2000 --lr 1e12 --estimator st-identity --gradient-draws 2"
    assert VAE.main(*flags.split(), "--out", tmp_path / "run") == 2
    assert "the evaluation became infinite or NaN" in one_sentence(capsys)
    assert len(metrics(tmp_path / "run")) == 1


@pytest.mark.parametrize(("flags", "unbuffered"), [("--epochs 1000", ""), ("--epochs 1 --quiet", "1")])
def test_an_output_that_nobody_reads_is_one_sentence(tmp_path, flags, unbuffered):
    command = [sys.executable, str(SCRIPTS / "train_vae.py"), "--hidden", "4", "--variables", "2", *flags.split()]
    settings = {"env": os.environ | {"PYTHONUNBUFFERED": unbuffered}, "cwd": tmp_path, "text": True}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **settings) as ran:
        if "--quiet" not in flags:
            ran.stdout.readline()
        ran.stdout.close()
        assert ran.stderr.read().endswith("train_vae.py: error: the standard output was closed.\n")
    assert ran.returncode == 2


def test_help_can_be_read_where_there_is_only_ascii():
    command, ascii_only = [sys.executable, str(SCRIPTS / "train_vae.py")], os.environ | {"PYTHONIOENCODING": "ascii"}
    ran = subprocess.run([*command, "--help"], capture_output=True, text=True, env=ascii_only, check=False)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert "--estimator" in ran.stdout


# ---- the temperature


def test_the_temperature_falls_in_steps_to_its_least_value():
    """τ = max(least, start · e^(−rate·t)) with t rounded down to a multiple of `every`."""
    tau = lambda step: loop.annealed(step, 2.0, 0.1, 0.5, 5)
    for step, t in ((0, 0), (4, 0), (5, 5), (9, 5), (10, 10), (14, 10)):
        assert tau(step) == pytest.approx(2.0 / np.e ** (0.1 * t), rel=1e-12)
    assert tau(15) == tau(10**9) == 0.5  # 2 e^−1.5 = 0.446 is below
    assert loop.annealed(10**9, start=0.3, rate=0.0, least=0.5, every=5) == 0.3  # fixed
    published = lambda step: loop.annealed(step, 1.0, 3e-5, 0.5, 2000)
    assert [published(n) for n in (1999, 2000, 22_000, 24_000)] == [1.0, np.exp(-0.06), np.exp(-0.66), 0.5]


@pytest.mark.parametrize(
    ("script", "flags", "message"),
    [
        ("bench.py", "nothing", "argument benchmark: invalid choice: 'nothing'"),
        ("bench.py", "vae --rounds 0", "--rounds must be at least 1, got 0."),
        ("bench.py", "vae --seconds 0", "--seconds must be positive and finite, got 0.0."),
        ("bench.py", "vae --seconds nan", "--seconds must be positive and finite, got nan."),
        ("bench.py", "vae --data-dir DIR", "--data-dir is for listops: leave it out."),
        ("bench.py", "listops --figure x.nope", "x.nope: no picture ends in .nope, choose one of "),
        ("bench.py", "listops --figure no/x.png", "there is no folder no for the picture: make it, or choose another"),
        ("bench.py", "listops --figure=", "figure is empty: give it a value, or leave it out."),
        ("draw_curves.py", "", "the following arguments are required: runs; see --help."),
        ("draw_curves.py", "DIR --out x.nope", "x.nope: no picture ends in .nope, choose one of "),
        ("bench.py", "classes --figure x.nope", "x.nope: no picture ends in .nope, choose one of "),
        ("tools/draw_merges.py", "--out x.nope", "x.nope: no picture ends in .nope, choose one of "),
        ("tools/draw_merges.py", "--width 3", "unrecognized arguments: --width 3; see --help."),
    ],
)
def test_a_script_without_a_run_says_what_is_wrong_in_one_sentence(
    tmp_path, monkeypatch, capsys, script, flags, message
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [script])
    module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    assert module.main(flags.split()) == 2
    out, error = capsys.readouterr()
    assert (out, error.count("\n")) == ("", 1), error
    assert error.startswith(f"{Path(script).name}: error: {message}")
    assert list(tmp_path.iterdir()) == []


PROGRAMS = sorted(str(p.relative_to(SCRIPTS)) for p in SCRIPTS.rglob("*.py") if '"__main__"' in p.read_text())
PROGRAMS.remove("minimal_vae.py")  # it has no flags


@pytest.mark.parametrize("script", PROGRAMS)
def test_a_script_without_its_libraries_says_what_to_install(script):
    code = (
        "import sys, runpy; folder, script = sys.argv[1:]; sys.path.insert(0, folder); sys.argv = [script, '--help']; "
        "sys.modules['tqdm'] = sys.modules['matplotlib'] = None; runpy.run_path(script, run_name='__main__')"
    )
    command = [sys.executable, "-c", code, SCRIPTS, SCRIPTS / script]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    message = f"{Path(script).name}: error: matplotlib, tqdm not found: pip install -e '.[scripts]'.\n"
    needs_none = Path(script).name in ("estimator_table.py", "snapshot_cupy_api.py", "sweep_run.py")
    assert (ran.returncode, ran.stderr) == ((0, "") if needs_none else (2, message))
