"""Static checks: the code uses nothing that CuPy lacks, and the layers import only from below."""

import ast
import functools
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
API = json.loads((ROOT / "tests" / "cupy_api.json").read_text())
SOURCES = sorted(p for d in ("minigrad", "estimators", "models", "scripts") for p in (ROOT / d).rglob("*.py"))


@functools.cache
def tree(path):
    return ast.parse(path.read_text())


def is_module_of_arrays(node):
    """`xp`, `self.xp`, `backend.xp` or `array_module(…)`."""
    if isinstance(node, ast.Name):
        return node.id in ("xp", "cp")
    if isinstance(node, ast.Attribute):
        return node.attr == "xp"
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "array_module"


def problems_in(source: ast.AST) -> list[str]:
    """What CuPy would refuse, as far as it is written as xp.name(…), xp.name.method(…) or getattr(xp, …)."""
    found = []
    for node in ast.walk(source):
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.Attribute) and is_module_of_arrays(node.value):
            known = node.attr in API["functions"] or node.attr in API["ufuncs"] or node.attr in API["constants"]
            if not known and node.attr not in ("cuda", "ndarray", "__version__", "asarray"):
                found.append(f"line {line}: CuPy has no {node.attr}")
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Attribute):
            inner = node.value
            of_ufunc = is_module_of_arrays(inner.value) and inner.attr in API["ufuncs"]
            if of_ufunc and inner.attr not in API["ufunc_methods"].get(node.attr, ()):
                found.append(f"line {line}: CuPy has no {inner.attr}.{node.attr}")
        if isinstance(node, ast.Call):
            f = node.func
            if isinstance(f, ast.Attribute) and is_module_of_arrays(f.value):
                allowed = API["ufunc_keywords"] if f.attr in API["ufuncs"] else API["functions"].get(f.attr)
                for keyword in node.keywords:
                    if allowed is not None and keyword.arg not in allowed:
                        found.append(f"line {line}: CuPy's {f.attr} has no parameter {keyword.arg}")
                if f.attr == "argsort" and not any(keyword.arg == "kind" for keyword in node.keywords):
                    found.append(
                        f"line {line}: CuPy's argsort orders ties otherwise: say kind, 'stable' if they matter"
                    )
            elif isinstance(f, ast.Attribute) and f.attr in ("sum", "mean", "max", "min", "argmax", "astype"):
                for keyword in node.keywords:
                    if keyword.arg in ("where", "initial", "correction"):
                        found.append(f"line {line}: CuPy's ndarray.{f.attr} has no parameter {keyword.arg}")
            if isinstance(f, ast.Name) and f.id == "getattr" and is_module_of_arrays(node.args[0]):
                found.append(f"line {line}: getattr on the array module hides a name from this check")
        if isinstance(node, ast.ImportFrom) and node.module == "numpy":
            found.append(f"line {line}: from numpy import … hides a name from this check")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_nothing_is_used_that_cupy_lacks(path):
    if module_of(path) not in ("scripts.snapshot_cupy_api", "minigrad.check"):  # the latter works on the host alone
        assert problems_in(tree(path)) == []


@pytest.mark.parametrize(
    "line",
    [
        "xp.unstack(x)",
        "xp.clip(x, min=0)",
        "xp.exp(x, where=m)",
        "xp.argsort(x, axis=-1)",
        "xp.logaddexp.reduce(x)",
        "xp.divide.at(x, i, y)",
        "array_module(x).geomspace(1, 2)",
        "self.xp.errstate()",
        "getattr(xp, name)",
        "from numpy import exp",
        "x.sum(axis=0, where=m)",
    ],
)
def test_the_check_finds_planted_errors(line):
    assert len(problems_in(ast.parse(line))) == 1


def is_rule(function: ast.FunctionDef) -> bool:
    names = {n.id for d in function.decorator_list for n in ast.walk(d) if isinstance(n, ast.Name)}
    return "op" in names or function.name.endswith("_gradient")


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_rules_never_say_np(path):
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.FunctionDef) and is_rule(node):
            used = [n.lineno for part in node.body for n in ast.walk(part) if isinstance(n, ast.Name) and n.id == "np"]
            assert not used, f"{path.name}: {node.name} says np. on line {used}: use array_module(x)"


def test_only_the_backend_imports_cupy():
    for path in SOURCES:
        imported = {name.split(".")[0] for name in imports(path)}
        if path.name not in ("backend.py", "snapshot_cupy_api.py"):
            assert "cupy" not in imported, path


# ---- the floors of the house

FLOOR = {
    "minigrad.backend": 0,
    "minigrad.checkpoint": 0,
    "minigrad.random": 0.5,  # sends its numbers through the backend
    "minigrad.kernels": 0.5,
    "minigrad.tensor": 1,
    "minigrad.ops": 2,
    "minigrad.fused": 3,
    "minigrad.convolution": 3,
    "minigrad.hard": 3,
    "minigrad.nn": 4,
    "minigrad.optim": 4,
    "minigrad.check": 4,
    "minigrad": 4.5,
    "estimators.enumeration": 4.9,
    "estimators.bernoulli": 5,
    "estimators.categorical": 5,
    "estimators.base": 5.5,
    "estimators.learned": 5.6,
    "estimators": 6.5,
    "estimators.measure": 6.6,  # on the registry
    "models": 6,
    "models.data.errors": 5.9,  # what a data set and a latent tree are made of, from below
    "models.cnf": 5.9,
    "models.data.listops": 6,
    "models.trees": 6.1,
    "models.composition": 6.2,
    "models.linear_time": 6.3,
    "models.tree_lstm": 6.4,
    "estimators.checks": 6.71,
    "estimators.checks.ladder": 6.71,
    "estimators.checks.means": 6.71,
    "estimators.checks.report": 6.71,
    "estimators.checks.adapters": 6.72,
    "estimators.checks.subject": 6.73,
    "estimators.checks.samples": 6.74,
    "estimators.checks.bias": 6.74,
    "estimators.checks.costs": 6.74,
    "estimators.checks.invariances": 6.74,
    "estimators.checks.identity": 6.75,
    "estimators.conformance": 6.8,
    "scripts.experiments.signals": 6.9,
    "scripts.experiments.environment": 7,
    "scripts.experiments.start": 7,
    "scripts.experiments.errors": 7.01,
    "scripts.experiments": 7.05,
    "scripts.experiments.pictures": 7.05,
    "scripts.experiments.flags": 7.1,
    "scripts.experiments.run_folder": 7.2,
    "scripts.experiments.memory": 7.2,
    "scripts.experiments.loop": 7.3,
    "scripts.experiments.vae": 7.4,
    "scripts.experiments.listops": 7.4,
    "scripts.experiments.specification": 7.4,
    "scripts.experiments.results": 7.5,
    "scripts.experiments.executors": 7.5,
    "scripts.experiments.sweeps": 7.6,
    "scripts.experiments.sweep_run": 8,  # a program
}
COMMANDS = 8


def module_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(p for p in parts if p != "__init__")


def imports(path) -> set[str]:
    """The absolute names of the modules that a file imports, wherever in the file."""
    package = module_of(path).split(".")
    package = package if path.name == "__init__.py" else package[:-1]
    found = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found |= {f"{module}.{a.name}" if f"{module}.{a.name}" in MODULES else module for a in node.names}
    return found


MODULES = {module_of(p) for p in SOURCES}


def floor(module: str) -> float:
    if module in FLOOR:
        return FLOOR[module]
    return {"estimators": 6, "models": 6, "scripts": COMMANDS}.get(module.split(".")[0], -1)


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_file_imports_only_from_floors_below(path):
    """And so no command imports another one, and nothing imports a command."""
    me = module_of(path)
    for other in imports(path):
        other = f"scripts.{other}" if f"scripts.{other}" in MODULES else other  # a command stands in that folder
        if other not in MODULES or (me == "models.data" and other.startswith("models.data.")):
            continue
        assert floor(other) < floor(me), f"{me} must not import {other}"
        if me.startswith("models"):
            assert not other.startswith("estimators"), "models are handed an estimator"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_private_names_are_used_where_they_are_at_home(path):
    """`x._name` stands for self and cls only, or for a name that the file itself defines. `os._exit` is documented."""
    own = {n.name for n in ast.walk(tree(path)) if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    own |= {n.attr for n in ast.walk(tree(path)) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store)}
    own |= {n.id for n in ast.walk(tree(path)) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
            at_home = isinstance(node.value, ast.Name) and node.value.id in (
                "self",
                "cls",
                "sys",
                "os",
            )  # of the latter two they are documented
            assert at_home or node.attr in own, f"{path.name}:{node.lineno} reaches for the private name {node.attr}"
        if isinstance(node, ast.ImportFrom):
            private = [a.name for a in node.names if a.name.startswith("_") and not a.name.startswith("__")]
            assert not private, f"{path.name}:{node.lineno} imports {', '.join(private)}"


def test_importing_the_library_needs_neither_cupy_nor_matplotlib():
    code = (
        "import sys, minigrad, estimators, models, models.vae, models.data\n"
        "heavy = {'cupy', 'matplotlib', 'tqdm', 'pooch', 'safetensors', 'scipy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
