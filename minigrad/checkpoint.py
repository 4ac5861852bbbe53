"""Checkpoints that a power cut cannot spoil: arrays in a safetensors file, everything else as JSON in its header.

The file is written beside its final name, flushed to the disk, and renamed over the old one in a single step of the
file system. Whoever reads finds either the old checkpoint or the new one, whole.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np


class CheckpointError(ValueError):
    """The checkpoint is missing, truncated or not one; the message is one sentence with the file's name."""


def write_atomically(path, data: bytes) -> None:
    """Write `data` to `path` so that a reader sees the old content or the new, never a part."""
    path = Path(path)
    part = path.with_name(path.name + ".part")
    with open(part, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def save(path, arrays: dict[str, np.ndarray], info: dict) -> None:
    """Save named arrays (any shape; NumPy) and `info` (anything JSON can hold; floats survive to the last bit).

    ValueError for the one name that the format keeps for itself: the file could not be read again.
    """
    from safetensors.numpy import save as to_bytes

    if "__metadata__" in arrays:
        raise ValueError("an array in a checkpoint cannot be called '__metadata__': choose another name.")
    contiguous = {name: np.asarray(a, order="C") for name, a in arrays.items()}
    write_atomically(path, to_bytes(contiguous, metadata={"info": json.dumps(info)}))


def load(path) -> tuple[dict[str, np.ndarray], dict]:
    """(arrays, info) as they were saved. CheckpointError if the file is missing, truncated or something else."""
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint {path}: give another one, or begin anew.")
    try:
        with safe_open(path, framework="numpy") as file:
            info = json.loads((file.metadata() or {})["info"])
            return {name: file.get_tensor(name) for name in file.keys()}, info  # noqa: SIM118 (not a dict)
    except (SafetensorError, KeyError, ValueError, OSError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path} is truncated or not a checkpoint of this project ({error}): give another one, or begin anew."
        ) from error
