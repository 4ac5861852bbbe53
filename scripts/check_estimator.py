"""Hold an estimator, yours or one of this repository, against the exact gradient.

    python scripts/check_estimator.py reinmax:tau=1.3                              # one of ours
    python scripts/check_estimator.py mine.py:sampler --framework torch            # sampler(logits) -> a sample
    python scripts/check_estimator.py mine.py:score --framework torch --exact-for all   # score(logits, cost) -> a loss
    python scripts/check_estimator.py mine.py:sampler --framework jax              # sampler(logits, key) -> a sample
    python scripts/check_estimator.py mine.py:estimate --exact-for quadratic --out report

A function has as many arguments as its kind: logits and cost, or logits alone, for PyTorch; logits, cost and key, or
logits and key, for JAX; logits, cost and seed for NumPy. `estimators/checks/adapters.py` says what each of them gets
and returns. The report is printed, and with --out written as text, JSON, Markdown and one page of HTML.

Exit code 0 where nothing fails, 1 where something does, 2 where there is nothing to judge: a function that raises, say,
or returns something else than samples and gradients.
"""

from __future__ import annotations

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))
from experiments.start import before_numpy

before_numpy()

import contextlib
import importlib.util
import inspect
import math
import traceback
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from estimators import create
from estimators.base import SettingError
from estimators.checks.ladder import EXACT_ON
from estimators.conformance import (
    ConformanceError,
    check_estimator,
    from_estimator,
    from_jax,
    from_jax_gradient,
    from_torch,
    from_torch_gradient,
)
from estimators.measure import FAMILIES
from experiments.errors import UserError, command, disk_errors, require, user_errors
from experiments.flags import at_least, check_read, check_seed, flag, one_of, parse_flags, quiet_flag

FRAMEWORKS = ("numpy", "torch", "jax")
BAR = "{percentage:3.0f}% |{bar}| {desc}"
KINDS = {  # (framework, number of arguments) -> adapter
    ("numpy", 3): lambda fn, title: fn,
    ("torch", 1): from_torch,
    ("torch", 2): from_torch_gradient,
    ("jax", 2): from_jax,
    ("jax", 3): from_jax_gradient,
}


@dataclass(frozen=True)
class Config:
    framework: str = flag("numpy", f"of a function in a file: {', '.join(FRAMEWORKS)}")
    family: str = flag("", f"the kind of variables: {', '.join(FAMILIES)}; else categorical, or what ours is for")
    exact_for: str = flag("", f"what is claimed: {', '.join(EXACT_ON)}; else nothing, or what is known of ours")
    same_as: str = flag("", "one of ours whose mean it claims to have, like st-gs:tau=0.5")
    budget: float = flag(45.0, "seconds for the ladder of costs; more for an estimator that varies much")
    level: float = flag(0.99, "the probability that nothing fails where nothing is wrong")
    seed: int = flag(0, "fixes all noise")

    def check(self) -> None:
        """UserError, one sentence, for the first value out of range."""
        one_of(self, framework=FRAMEWORKS, family=("", *FAMILIES), exact_for=("", *EXACT_ON))
        require(0.0 < self.budget < math.inf, f"--budget must be positive and finite, got {self.budget}.")
        require(0.5 <= self.level < 1.0, f"--level must be at least 0.5 and below 1, got {self.level}.")
        at_least(0, self, "seed")
        check_seed(self)


def load(path: Path, name: str):
    """The function `name` in a Python file. UserError if there is none; what the file raises goes its way."""
    require(path.is_file(), f"there is no file {path}.")
    sys.path.insert(0, str(path.resolve().parent))
    spec = importlib.util.spec_from_file_location(f"checked:{path.stem}", path)  # no name that another module has
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # where dataclasses look for it
    spec.loader.exec_module(module)
    known = [n for n, x in vars(module).items() if callable(x) and not n.startswith("_")]
    require(hasattr(module, name), f"{path} has no {name}; it has {', '.join(known) or 'no functions'}.")
    fn = getattr(module, name)
    require(callable(fn), f"{name} in {path} is no function.")
    return fn


def arguments(fn) -> int:
    """How many arguments it needs."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(getattr(fn, "forward", fn)).parameters.values()  # a module of PyTorch says it there
    return sum(p.kind in kinds and p.default is p.empty for p in parameters)


def adapted(config: Config, path: Path, name: str):
    """What an adapter makes of the function."""
    if config.framework != "numpy":
        wanted = importlib.util.find_spec(config.framework)
        require(wanted, f"--framework {config.framework} needs the package {config.framework}: install it.")
    if config.framework == "torch":
        import torch

        torch.set_num_threads(1)  # the arrays are small, and threads that wait for each other are slow
    fn = load(path, name)
    kind = config.framework, arguments(fn)
    known = " or ".join(str(n) for framework, n in KINDS if framework == config.framework)
    require(kind in KINDS, f"{name} needs {kind[1]} arguments, for {config.framework} it must be {known}; see --help.")
    return KINDS[kind](fn, name)


def inside(error: BaseException, what: str, framework: str):
    """(Is it the exception of somebody's file, or of its framework?  its traceback from that file on)"""
    file, tb = os.path.realpath(what.rpartition(":")[0]), error.__traceback__
    frames = [frame.f_code.co_filename for frame, _ in traceback.walk_tb(tb)]
    while tb is not None and os.path.realpath(tb.tb_frame.f_code.co_filename) != file:
        tb = tb.tb_next
    differentiating = framework != "numpy" and framework in Path(frames[-1]).parts
    return tb is not None or differentiating or isinstance(error, SyntaxError), tb


def subject(what: str, config: Config, given):
    """(an adapter or a function, the family)"""
    if ".py:" in what or what.endswith(".py"):
        file, _, name = what.rpartition(":")
        require(file.endswith(".py") and name, f"{what} names no function: write FILE.py:NAME.")
        return adapted(config, Path(file), name), config.family or "categorical"
    check_read(given, {"framework": f"{what} is one of ours"})
    with user_errors(SettingError):
        estimator = create(what, family=config.family or None)
    return from_estimator(what, estimator.family.name), estimator.family.name


@contextlib.contextmanager
def report_folder(path: Path | None):
    """Makes the folder before the work begins, so that it is known to be possible; one that stays empty goes again."""
    made = path is not None and not path.exists()
    if path is not None:
        with disk_errors(path):
            path.mkdir(parents=True, exist_ok=True)
            require(os.access(path, os.W_OK), f"{path} cannot be written: choose another --out.")
    try:
        yield
    finally:
        if made and not any(path.iterdir()):
            path.rmdir()


def write(report, folder: Path) -> None:
    with disk_errors(folder):
        forms = {"txt": f"{report}\n", "json": report.to_json(), "md": report.to_markdown(), "html": report.to_html()}
        for ending, text in forms.items():
            (folder / f"report.{ending}").write_text(text, encoding="utf-8")


@command
def main(argv=None) -> int:
    extra = (
        ("estimator", {"help": "one of ours, like reinmax:tau=1.3, or FILE.py:NAME, a function in a file"}),
        ("--out", {"help": "a folder for the report as text, JSON, Markdown and HTML"}),
        quiet_flag("no progress bar"),
    )
    given, other = parse_flags(Config, __doc__, argv, extra)
    config = Config(**given)
    config.check()
    out = Path(other["out"]) if "out" in other else None
    require(out is None or not out.exists() or out.is_dir(), f"--out {out} is no folder.")
    try:
        fn, family = subject(other["estimator"], config, given)
        if config.same_as:
            with user_errors(SettingError):
                create(config.same_as, family=family)
        with report_folder(out), tqdm(total=100, disable=other["quiet"], bar_format=BAR) as bar:

            def progress(done: float, what: str) -> None:
                bar.set_description_str(what, refresh=False)
                bar.update(100 * done - bar.n)

            chosen = {"exact_for": config.exact_for or None, "same_as": config.same_as or None}
            numbers = {"budget": config.budget, "level": config.level, "seed": config.seed}
            report = check_estimator(fn, family, **chosen, **numbers, progress=progress)
            if out is not None:
                write(report, out)
    except ConformanceError as error:
        raise UserError(str(error)) from error
    except (Exception, SystemExit) as error:
        found, tb = inside(error, other["estimator"], config.framework)
        if not found:
            raise
        traceback.print_exception(type(error), error, tb)
        raise UserError(f"{other['estimator']} raised {type(error).__name__}, see above.") from error
    print(report)
    return 1 if report.failures else 0


if __name__ == "__main__":
    sys.exit(main())
