"""Write what CuPy offers to tests/cupy_api.json: names, parameters, and which ufunc methods exist.

    pip install cupy-cuda13x && python scripts/tools/snapshot_cupy_api.py

No GPU is needed: signatures can be read without one. Run it once for each new CuPy release. The tests hold all code
against this file (`tests/test_cupy_api.py`) and drive the stand-in device array with it (`tests/devsim.py`).
"""

from __future__ import annotations

import inspect
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from experiments.errors import UserError, command, disk_errors
from experiments.flags import Parser

TARGET = Path(__file__).resolve().parents[2] / "tests" / "cupy_api.json"

# read in CuPy's source (cupy/_core/_kernel.pyx, _routines_indexing.pyx): not visible to inspect
UFUNC_METHODS = {
    "at": ["add", "subtract", "maximum", "minimum", "bitwise_and", "bitwise_or", "bitwise_xor"],
    "reduce": ["add", "multiply"],
    "accumulate": ["add", "multiply"],
    "reduceat": ["add"],
}
# methods written in Cython, whose parameters inspect cannot read (cupy/_core/core.pyx)
METHOD_PARAMETERS = {
    "argmax": ["axis", "out", "dtype", "keepdims"],
    "argmin": ["axis", "out", "dtype", "keepdims"],
    "astype": ["dtype", "order", "casting", "subok", "copy"],
    "max": ["axis", "out", "keepdims"],
    "mean": ["axis", "dtype", "out", "keepdims"],
    "min": ["axis", "out", "keepdims"],
    "prod": ["axis", "dtype", "out", "keepdims"],
    "sum": ["axis", "dtype", "out", "keepdims"],
}
UFUNC_KEYWORDS = ["out", "dtype", "casting"]


def parameters(function):
    """The names of a function's parameters, or None where they cannot be read."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return None
    if any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values()):
        return None
    return [name for name in signature.parameters if name != "self"]


@command
def main(argv=None) -> int:
    Parser(description=__doc__ and __doc__.split("\n\n")[0]).parse_args(argv)
    try:
        import cupy
    except ImportError as error:
        raise UserError(
            f"CuPy cannot be imported ({error}): pip install cupy-cuda13x first, no GPU is needed."
        ) from error

    functions, ufuncs = {}, []
    for name in sorted(dir(cupy)):
        value = getattr(cupy, name)
        if name.startswith("_") or inspect.ismodule(value):
            continue
        if isinstance(value, cupy.ufunc):
            ufuncs.append(name)
        elif callable(value):
            functions[name] = parameters(value)
    methods = {
        name: METHOD_PARAMETERS.get(name) or parameters(getattr(cupy.ndarray, name))
        for name in sorted(dir(cupy.ndarray))
        if not (name.startswith("_") and not name.startswith("__"))
    }
    snapshot = {
        "cupy": cupy.__version__,
        "functions": functions,
        "ufuncs": ufuncs,
        "ufunc_keywords": UFUNC_KEYWORDS,
        "ufunc_methods": UFUNC_METHODS,
        "constants": [n for n in ("e", "inf", "nan", "newaxis", "pi") if hasattr(cupy, n)],
        "ndarray": methods,
    }
    with disk_errors():
        TARGET.write_text(json.dumps(snapshot, indent=0, sort_keys=True) + "\n")
    print(
        f"{TARGET}: {len(functions)} functions, {len(ufuncs)} ufuncs, {len(methods)} methods of CuPy {cupy.__version__}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
