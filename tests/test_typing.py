"""The public names of `minigrad` and `estimators` are annotated, and a type checker is told so."""

import functools
import importlib
import inspect
import pkgutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import estimators
import minigrad

ROOT = Path(__file__).parents[1]
PACKAGES = (minigrad, estimators)
MODULES = [p.__name__ for p in PACKAGES]
MODULES += [f"{p.__name__}.{module.name}" for p in PACKAGES for module in pkgutil.iter_modules(p.__path__)]
CALLS = {"__init__", "__call__", "__getitem__", "__enter__", "__exit__"}  # methods that are public by what they do


def bare(value):
    """The function inside a property, a method or a cache."""
    inner = {property: "fget", functools.cached_property: "func", staticmethod: "__func__", classmethod: "__func__"}
    value = getattr(value, inner[type(value)]) if type(value) in inner else value
    return value if hasattr(value, "rule") else inspect.unwrap(value) if callable(value) else value


def public_functions(module):
    """The public functions and methods that are written in this module, but not what `@op` has lifted: it has types."""
    found = []
    for name, value in vars(module).items():
        if not name.startswith("_") and getattr(value, "__module__", None) == module.__name__:
            found.append(value)
            if inspect.isclass(value):  # with what it inherits: a base class may be private
                names = [n for n in dir(value) if n in CALLS or not n.startswith("_")]
                found += [inspect.getattr_static(value, n) for n in names]
    functions = [f for f in map(bare, found) if inspect.isfunction(f) and not hasattr(f, "rule")]
    return [f for f in dict.fromkeys(functions) if f.__module__ == module.__name__]


def not_annotated(module) -> list[str]:
    """What is missing in the module: "function(parameter)", or "function ->" for what it returns."""
    found = []
    for function in public_functions(module):
        signature = inspect.signature(function)
        parameters = [p for p in signature.parameters.values() if p.name not in ("self", "cls")]
        found += [f"{function.__qualname__}({p.name})" for p in parameters if p.annotation is p.empty]
        found += [f"{function.__qualname__} ->"] if signature.return_annotation is signature.empty else []
    return found


@pytest.mark.parametrize("name", MODULES)
def test_public_names_are_annotated(name):
    assert not_annotated(importlib.import_module(name)) == []


def test_what_is_not_annotated_is_found(monkeypatch):
    monkeypatch.delitem(estimators.Estimator.update.__annotations__, "return")
    monkeypatch.delitem(estimators.Estimator.family.fget.__annotations__, "return")
    monkeypatch.delitem(estimators.base.masked.__annotations__, "mask")
    assert sorted(not_annotated(estimators.base)) == ["Estimator.family ->", "Estimator.update ->", "masked(mask)"]


def test_all_kinds_of_functions_are_looked_at():
    names = [f.__qualname__ for module in MODULES for f in public_functions(importlib.import_module(module))]
    assert {
        "create",
        "load_cupy",  # has a cache
        "Tensor.__init__",
        "Tensor.shape",  # a property
        "EnumeratedCost.slopes",  # a cached one
        "Network.initial",  # static
        "_Antithetic.thresholds",  # inherited from a private class
    } <= set(names)
    assert "reinmax" not in names  # an op


@pytest.mark.parametrize("package", PACKAGES, ids=lambda p: p.__name__)
def test_the_package_ships_its_types(package):
    data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    assert "py.typed" in data[package.__name__]
    assert (Path(package.__file__).parent / "py.typed").is_file()


RIGHT = """
import numpy as np

from estimators import Estimator, Sampler, create
from estimators.base import Cost, Noise
from estimators.measure import measure
from minigrad import Rng, Tensor
from minigrad.check import check_rule
from minigrad.nn import MLP
from minigrad.ops import multiply
from minigrad.optim import Adam

w = np.ones((2, 3))
x = Tensor([1.0, 2.0], requires_grad=True)
y: Tensor = (2.0 * x - x / 3.0 + abs(x) ** 2.0).sum()
y.backward()
value: float = y.item()

model = MLP([4, 3], Rng(0))
optimizer = Adam(model.parameters(), lr=1e-3)


def cost(d: Tensor) -> Tensor:
    return (d * w).sum(axis=(1, 2))


estimator: Estimator = create("reinmax", tau=1.3)
logits = Tensor(np.zeros((5, 2, 3)), requires_grad=True)
estimator(logits, cost, Rng(0).at(1).site("code")).mean().backward()
optimizer.step()

bias: float = measure("rloo:samples=4", np.zeros((1, 2, 3)), cost, samples=100, rng=1).bias
check_rule(multiply.rule, w, w, tolerance=1e-6)


class Own(Sampler):
    families = (create("reinmax").family,)

    def draw(self, logits: Tensor, rng: Noise) -> Tensor:
        return Tensor(self.family.sample(rng, logits.data))

    def estimate(self, logits: Tensor, cost: Cost, rng: Noise) -> Tensor:
        return super().estimate(logits, lambda d: cost(d) + 1.0, rng)
"""

WRONG = """
import numpy as np

from estimators import create
from estimators.measure import measure
from minigrad import Rng, Tensor
from minigrad.check import check_rule
from minigrad.nn import MLP
from minigrad.optim import Adam

logits, cost = Tensor(np.zeros((5, 3))), lambda d: d.sum(axis=1)
number: float = logits * 2.0
logits.backwards()
Tensor([1.0], require_grad=True)
create("reinmax", tau="1.3")
create("reinmax")(logits, cost)
create("reinmax")(logits, cost, 0)
create("reinmax")(logits.data.size, cost, Rng("0"))
create("reinmax").sample(logits, Rng(0))
measure("reinmax", np.zeros((1, 3)), cost, sample=100)
measure("reinmax", np.zeros((1, 3)), cost).biased
Adam(MLP([4, 3], Rng(0)), lr=1e-3)
check_rule("multiply", np.ones(3))
"""


@pytest.mark.slow
def test_a_type_checker_tells_right_from_wrong(tmp_path):
    pytest.importorskip("mypy")
    for name, program in (("right", RIGHT), ("wrong", WRONG)):
        (tmp_path / f"{name}.py").write_text(program)
    options = ["--config-file", ROOT / "pyproject.toml", "--cache-dir", tmp_path / "cache"]
    files = [tmp_path / "right.py", tmp_path / "wrong.py"]
    found = subprocess.run(
        [sys.executable, "-m", "mypy", *options, *files], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert not found.stderr
    errors = [line for line in found.stdout.splitlines() if ": error: " in line]
    first = WRONG[: WRONG.index("number: float")].count("\n") + 1  # the lines above are right
    lines = [int(line.split("wrong.py:")[1].split(":")[0]) for line in errors]  # IndexError for an error elsewhere
    assert sorted(set(lines)) == list(range(first, WRONG.count("\n") + 1)), found.stdout
