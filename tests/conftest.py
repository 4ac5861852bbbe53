"""Fixtures: the backends under test, and floating-point errors as exceptions."""

import collections
import gc
import os

# before NumPy: the products of the tests are small, and where other programs run two threads wait for each other
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np
import pytest

from devsim import DevsimBackend
from minigrad import Rng
from minigrad.backend import Backend, BackendUnavailable, get_backend


@pytest.hookimpl(tryfirst=True)  # before -m looks
def pytest_collection_modifyitems(items):
    """`daily(n)`: of all cases of a test, n are in the quick suite, and the others are slow."""
    cases = collections.defaultdict(list)
    for item in items:
        if item.get_closest_marker("daily"):
            cases[item.path, item.originalname].append(item)
    for same in cases.values():
        n = same[0].get_closest_marker("daily").args[0]
        chosen = {len(same) * i // n for i in range(n)}
        for i, item in enumerate(same):
            if i not in chosen:
                item.add_marker("slow")


def pytest_collection_finish():
    gc.freeze()  # the collector need not go through six thousand tests again and again: a fifth of the time of some


@pytest.fixture(autouse=True)
def floating_point_errors_raise():
    with np.errstate(divide="raise", over="raise", invalid="raise"):
        yield


@pytest.fixture(autouse=True)
def files_need_not_survive_a_power_cut(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: None)  # thousands of them; the tests of durability watch their own


@pytest.fixture(params=["numpy", "devsim", pytest.param("cupy", marks=pytest.mark.gpu)])
def backend(request):
    if request.param == "cupy":
        try:
            return get_backend("cupy")
        except BackendUnavailable as error:
            pytest.skip(f"GPU NOT RUN: {error}")
    return {"numpy": Backend, "devsim": DevsimBackend}[request.param]()


@pytest.fixture
def rng():
    return np.random.default_rng(7)


@pytest.fixture
def addresses(monkeypatch):
    """The addresses of all noise drawn since the test began, in order. The same address gives the same numbers: what
    must be independent would not be, if one came twice."""
    drawn, bits = [], Rng.bits
    monkeypatch.setattr(Rng, "bits", lambda self, n: (drawn.append(repr(self)), bits(self, n))[1])
    return drawn
