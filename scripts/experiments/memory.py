"""What a machine can hold: sizes that it cannot are refused before anything is made.

An array that is too large is an error of NumPy only if the system says so at once; most systems give out memory that
they do not have, and end a process in the middle of its work.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
from pathlib import Path
from typing import Any

import numpy as np

from .errors import require

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

MOST_EVALUATIONS = 100_000  # of the cost in one step: some seconds
LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")  # of a container


def machine_memory() -> int:
    """The bytes that this process can have, at most."""
    found = [2**63]
    with contextlib.suppress(AttributeError, ValueError, OSError):  # not on Windows
        found.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    if resource:  # as `ulimit -v` and the schedulers of clusters limit it
        limit, _ = resource.getrlimit(resource.RLIMIT_AS)
        found += [] if limit == resource.RLIM_INFINITY else [limit]
    for path in LIMITS:
        with contextlib.suppress(OSError, ValueError):  # "max" is no number
            found.append(int(Path(path).read_text()))
    return min(found)


def check_memory(numbers: int, dtype: Any, flags: str, backend: str = "numpy") -> None:
    """UserError if so many numbers do not fit into this machine.   numbers: at least so many are there at one time

    flags: what to make smaller.   backend: an accelerator says by itself, and at once, what it cannot hold
    """
    size, most = numbers * np.dtype(dtype).itemsize, machine_memory()
    require(
        backend != "numpy" or size <= most,
        f"this does not fit into memory (at least {size:.1e} bytes, and the machine has {most:.1e}): choose smaller "
        f"{flags}.",
    )


def check_evaluations(estimator: Any, variables: int, categories: int, layers: int = 1) -> None:
    """UserError if a step would draw samples, or evaluate the cost, so often that nobody waits for it.

    layers: so many of them, each within the cost of the one below
    """
    count = max(estimator.count_evaluations(variables, categories), draws(estimator))
    require(
        count**layers <= MOST_EVALUATIONS,
        f"a step would draw samples or evaluate the cost more than {MOST_EVALUATIONS:,} times: choose fewer samples, "
        "variables, categories or layers, or another estimator.",
    )


def draws(estimator: Any) -> int:
    """How many arrays of samples, or of noise, an estimator holds at one time."""
    return 1 if estimator is None else max(1, estimator.sample_count, getattr(estimator, "samples", 1))


def convolutions(shape: tuple[int, int], channels: Any, window: int, padding: int) -> int:
    """How many numbers the windows and the outputs of convolutions are for an image (H, W), pooled 2 × 2 behind each.

    channels: of the image, then of each convolution
    """
    numbers = 0
    for of, to in itertools.pairwise(channels):
        shape = tuple(n + 2 * padding - window + 1 for n in shape)
        numbers += math.prod(shape) * (of * window**2 + to)
        shape = tuple(n // 2 for n in shape)
    return numbers


def weights(*widths: int) -> int:
    """How many weights a network of these widths has."""
    return sum(n * m for n, m in itertools.pairwise(widths))
