"""Hold published code against the exact gradient, and write estimators/conformance.md.

    python scripts/tools/conformance_page.py --write
    python scripts/tools/conformance_page.py --checkout gst=DIR --budget 20

What is installed is judged: PyTorch, the packages reinmax, pyro-ppl, pydrobert-pytorch and storchastic, TensorFlow
Probability on JAX. Code that is no package is judged from a checkout that somebody names: gst is that of Fan et al.
Whatever cannot be imported is named as not tried, with the reason.
"""

from __future__ import annotations

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
from experiments.start import before_numpy

before_numpy()

import importlib.metadata
import importlib.util
import subprocess
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from estimators.conformance import (
    ConformanceError,
    Report,
    check_estimator,
    from_jax,
    from_torch,
    from_torch_gradient,
)
from experiments.errors import UserError, command, require
from experiments.flags import Parser

PAGE = Path(__file__).parents[2] / "estimators" / "conformance.md"
BEGIN, END = "<!-- table -->", "<!-- end of the table -->"


@dataclass(frozen=True)
class Published:
    """A function of a package or of a checkout.   package: its distribution, or the name of the checkout"""

    package: str
    name: str
    make: Callable  # () -> an adapter;  (folder) for a checkout
    family: str = "categorical"
    claim: str | None = None
    same_as: str | None = None
    checkout: bool = False


# ---- PyTorch


def gumbel_softmax(hard: bool, tau: float):
    from torch.nn import functional

    return from_torch(lambda logits: functional.gumbel_softmax(logits, tau=tau, hard=hard))


def one_hot_straight_through():
    from torch.distributions import OneHotCategoricalStraightThrough as Law

    return from_torch(lambda logits: Law(logits=logits).rsample())


def relaxed_one_hot(tau: float):
    from torch.distributions import RelaxedOneHotCategorical as Law

    return from_torch(lambda logits: Law(tau, logits=logits).rsample())


def relaxed_bernoulli(tau: float):
    from torch.distributions import RelaxedBernoulli as Law

    return from_torch(lambda logits: Law(tau, logits=logits).rsample())


# ---- other packages


def reinmax(tau: float):
    from reinmax import reinmax as published

    return from_torch(lambda logits: published(logits, tau)[0])


def pyro_straight_through(tau: float, bits: bool):
    import pyro.distributions as laws
    import torch

    Law = laws.RelaxedBernoulliStraightThrough if bits else laws.RelaxedOneHotCategoricalStraightThrough
    return from_torch(lambda logits: Law(torch.tensor(tau, dtype=logits.dtype), logits=logits).rsample())


def pydrobert_reinforce(kind: str):
    from pydrobert.torch.estimators import reinforce, to_b, to_z

    def gradient(logits, cost):
        b = to_b(to_z(logits, kind), kind).detach()
        f = cost(b)[:, None].expand(logits.shape[:2])  # one cost for all variables of an example
        return b, reinforce(f, b, logits, kind)

    return from_torch_gradient(gradient)


def pydrobert_relax(kind: str):
    """With a control variate for each variable by itself: a linear function of its relaxation."""
    import torch
    from pydrobert.torch.estimators import relax, to_b, to_z

    weights = torch.tensor([1.0, -0.5, 0.2, 0.4], dtype=torch.float64)
    part = {
        "bern": lambda z: 0.7 * torch.sigmoid(z),
        "onehot": lambda z: (torch.softmax(z, -1) * weights[: z.shape[-1]].to(z.dtype)).sum(-1),
    }[kind]

    def gradient(logits, cost):
        z = to_z(logits, kind)
        b = to_b(z, kind).detach()
        f = cost(b)[:, None].expand(logits.shape[:2])
        return b, relax(f, b, logits, z, part, kind)

    return from_torch_gradient(gradient)


def storch_method(name: str, **options):
    import storch
    import torch

    def gradient(logits, cost):
        storch.reset()
        theta = storch.denote_independent(logits, 0, "batch")
        law = torch.distributions.Independent(torch.distributions.OneHotCategorical(logits=theta), 1)
        d = getattr(storch.method, name)("sample", **options)(law)
        seen = []

        def of(x):
            seen.append(x.detach())
            return cost(x)

        storch.add_cost(storch.deterministic(of)(d), "cost")
        storch.backward()
        # its loss is a mean over the batch
        return seen[0].reshape(-1, *logits.shape), logits.grad * len(logits)

    return from_torch_gradient(gradient)


def tfp_relaxed(tau: float):
    from tensorflow_probability.substrates import jax as tfp

    law = tfp.distributions.RelaxedOneHotCategorical
    return from_jax(lambda logits, key: law(tau, logits=logits).sample(seed=key))


# ---- checkouts


def from_gst(folder: Path, call: Callable):
    spec = importlib.util.spec_from_file_location("gst_basic", folder / "model" / "basic.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return from_torch(lambda logits: call(module, logits))


TORCH = [
    Published("torch", "gumbel_softmax(tau=1)", lambda: gumbel_softmax(False, 1.0)),
    Published(
        "torch", "gumbel_softmax(tau=0.5, hard=True)", lambda: gumbel_softmax(True, 0.5), same_as="st-gs:tau=0.5"
    ),
    Published("torch", "gumbel_softmax(tau=1, hard=True)", lambda: gumbel_softmax(True, 1.0), same_as="st-gs"),
    Published("torch", "gumbel_softmax(tau=0, hard=True)", lambda: gumbel_softmax(True, 0.0)),
    Published("torch", "OneHotCategoricalStraightThrough", one_hot_straight_through, claim="linear"),
    Published("torch", "RelaxedOneHotCategorical(0.5)", lambda: relaxed_one_hot(0.5)),
    Published("torch", "RelaxedBernoulli(0.5)", lambda: relaxed_bernoulli(0.5), "bernoulli"),
]
PACKAGES = [
    Published("reinmax", "reinmax(tau=1)", lambda: reinmax(1.0), claim="quadratic", same_as="reinmax"),
    Published("reinmax", "reinmax(tau=1.3)", lambda: reinmax(1.3), same_as="reinmax:tau=1.3"),
    Published("pyro-ppl", "RelaxedOneHotCategoricalStraightThrough(0.5)", lambda: pyro_straight_through(0.5, False)),
    Published(
        "pyro-ppl", "RelaxedBernoulliStraightThrough(0.5)", lambda: pyro_straight_through(0.5, True), "bernoulli"
    ),
    Published("pydrobert-pytorch", "reinforce, onehot", lambda: pydrobert_reinforce("onehot"), claim="all"),
    Published("pydrobert-pytorch", "reinforce, bern", lambda: pydrobert_reinforce("bern"), "bernoulli", "all"),
    Published("pydrobert-pytorch", "relax, onehot", lambda: pydrobert_relax("onehot"), claim="all"),
    Published("pydrobert-pytorch", "relax, bern", lambda: pydrobert_relax("bern"), "bernoulli", "all"),
    Published("storchastic", "ScoreFunction", lambda: storch_method("ScoreFunction"), claim="all"),
    Published(
        "storchastic",
        "ScoreFunction, 2 samples, batch_average",
        lambda: storch_method("ScoreFunction", n_samples=2, baseline_factory="batch_average"),
        claim="all",
    ),
    Published(
        "storchastic", "UnorderedSetEstimator(k=2)", lambda: storch_method("UnorderedSetEstimator", k=2), claim="all"
    ),
    Published("tensorflow-probability", "RelaxedOneHotCategorical(0.5), on JAX", lambda: tfp_relaxed(0.5)),
]
CHECKOUTS = [
    Published(
        "gst",
        "gst_mover(gap=1.0)",
        lambda folder: from_gst(folder, lambda module, x: module.gst_mover(x)),
        same_as="gst-1.0",
        checkout=True,
    ),
    Published(
        "gst",
        "gst_mover(gap='p')",
        lambda folder: from_gst(folder, lambda module, x: module.gst_mover(x, gap="p")),
        same_as="gst-p",
        checkout=True,
    ),
    Published(
        "gst",
        "rao_gumbel(repeats=10)",
        lambda folder: from_gst(folder, lambda module, x: module.rao_gumbel(x, repeats=10)),
        same_as="st-gs",
        checkout=True,
    ),
]
ALL = [*TORCH, *PACKAGES, *CHECKOUTS]
NOT_TRIED = {  # published, and runs in nothing that can be installed beside the rest
    "DisARM": "the authors' code is for TensorFlow, for which there is no adapter",
    "CARMS": "the authors' code is for TensorFlow, for which there is no adapter",
    "RELAX": "the authors' code is for TensorFlow 1",
    "SIMPLE": "the authors' code is for subsets, which are no family here",
}


def version(entry: Published, checkouts: dict[str, Path]) -> str:
    """The version of a package, or the commit of a checkout."""
    if not entry.checkout:
        return importlib.metadata.version(entry.package)
    line = ["git", "-C", str(checkouts[entry.package]), "rev-parse", "--short=7", "HEAD"]
    found = subprocess.run(line, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "a checkout"


def judge(entry: Published, checkouts: dict[str, Path], budget: float) -> Report | str:
    """A report, or why there is none."""
    if entry.checkout and entry.package not in checkouts:
        return f"not tried: no checkout was given (--checkout {entry.package}=DIR)"
    try:
        adapter = entry.make(checkouts[entry.package]) if entry.checkout else entry.make()
        adapter.title = entry.name
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return check_estimator(adapter, entry.family, entry.claim, same_as=entry.same_as, budget=budget)
    except ConformanceError as error:
        return f"nothing to judge: {error}"
    except Exception as error:  # of somebody else's code, whatever it is: the page says it
        return f"not tried: {type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''}"


def row(entry: Published, found: Report | str, checkouts) -> list[str]:
    """The cells of the table."""
    try:
        where = f"{entry.package} {version(entry, checkouts)}"
    except importlib.metadata.PackageNotFoundError:
        where = f"{entry.package}, not installed"
    except KeyError:
        where = entry.package
    if isinstance(found, str):
        return [where, f"`{entry.name}`", "", "", "", "", found]
    size = "2 bits" if entry.family == "bernoulli" else "2 × 3"
    cells = [bias_cell(found, f"{kind}, {size}") for kind in ("linear", "quadratic", "cubic")]
    known = next((f.sentence for f in found.findings if f.chapter == "identity"), "")
    return [where, f"`{entry.name}`", *cells, known, what_to_know(found, size)]


def what_to_know(report: Report, size: str) -> str:
    """What a user of it should read."""
    biased = [k for k in ("linear", "quadratic", "cubic", "exponential") if is_biased(report.find(f"{k}, {size}"))]
    first = {
        "linear": "Biased even for linear costs.",
        "quadratic": "No bias was seen for linear costs; biased for quadratic ones.",
        "cubic": "No bias was seen for quadratic costs; biased beyond.",
    }.get(biased[0] if biased else "", "No bias was seen.")
    failures = [f"{f.name[0].upper()}{f.name[1:]}: {f.sentence[0].lower()}{f.sentence[1:]}" for f in report.failures]
    return " ".join([first, *(failures or ["Nothing fails."])])


def is_biased(finding) -> bool:
    return finding.sentence.startswith("biased")


def bias_cell(report: Report, name: str) -> str:
    f = report.find(name)
    if is_biased(f):
        return f"{f.data['bias']:.3f} ± {f.data['error']:.3f}"
    return "rounding" if f.data["most"] < 1e-7 else f"< {f.data['most']:.3f}"


HEAD = ("package", "function", "linear", "quadratic", "cubic", "which one", "what to know")


def table(rows: list[list[str]]) -> str:
    lines = [HEAD, ["---"] * len(HEAD), *rows]
    return "\n".join("| " + " | ".join(c.replace("|", "\\|") for c in line) + " |" for line in lines)


@command
def main(argv=None) -> int:
    parser = Parser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--checkout", action="append", default=[], metavar="NAME=DIR", help="the code of a paper: gst")
    parser.add_argument("--only", default=None, metavar="TEXT", help="judge those with this text in their names")
    parser.add_argument("--budget", type=float, default=45.0, help="seconds for the ladder of each")
    parser.add_argument("--write", action="store_true", help=f"put the table into {PAGE.name}")
    parser.add_argument("--reports", default=None, metavar="DIR", help="a folder for the report of each, as text")
    flags = parser.parse_args(argv)
    require(flags.budget > 0, f"--budget must be positive, got {flags.budget}.")
    checkouts = {}
    for text in flags.checkout:
        name, _, folder = text.partition("=")
        known = sorted({e.package for e in CHECKOUTS})
        require(name in known and folder, f"--checkout is NAME=DIR with NAME in {', '.join(known)}, got {text!r}.")
        require(Path(folder).is_dir(), f"there is no folder {folder}.")
        checkouts[name] = Path(folder)
    chosen = [e for e in ALL if (flags.only or "") in f"{e.package} {e.name}"]
    require(chosen, f"nothing has {flags.only!r} in its name.")
    if importlib.util.find_spec("torch"):
        import torch

        torch.set_num_threads(1)  # small arrays
    rows = []
    for entry in tqdm(chosen, unit="estimator"):
        found = judge(entry, checkouts, flags.budget)
        rows.append(row(entry, found, checkouts))
        if flags.reports is not None:
            folder = Path(flags.reports)
            folder.mkdir(parents=True, exist_ok=True)
            name = "".join(c if c.isalnum() else "-" for c in f"{entry.package} {entry.name}")
            (folder / f"{name}.txt").write_text(f"{found}\n", encoding="utf-8")
    rows += [[name, "", "", "", "", "", f"not tried: {why}"] for name, why in NOT_TRIED.items() if not flags.only]
    text = table(rows)
    print(text)
    if flags.write:
        page = PAGE.read_text(encoding="utf-8")
        if BEGIN not in page or END not in page:
            raise UserError(f"{PAGE} has no lines {BEGIN} and {END} to put the table between.")
        before, after = page[: page.index(BEGIN) + len(BEGIN)], page[page.index(END) :]
        PAGE.write_text(f"{before}\n{text}\n{after}", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
