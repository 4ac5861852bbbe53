"""Checkpoints that a power cut cannot spoil: arrays in a safetensors file, everything else as JSON in its header,
behind a checksum of both.

The file is written beside its final name, flushed to the disk, and renamed over the old one in a single step of the
file system. Whoever reads finds either the old checkpoint or the new one, whole.
"""

from __future__ import annotations

import json
import os
import zlib
from pathlib import Path
from typing import Any

import numpy as np


class CheckpointError(ValueError):
    """The checkpoint is missing, damaged or not one; the message is one sentence with the file's name."""


class StateError(ValueError):
    """A saved state does not fit what it is loaded into; the message says how they differ."""


def write_atomically(path: str | os.PathLike, data: bytes) -> None:
    """Write `data` to `path` so that a reader sees the old content or the new, never a part."""
    path = Path(path)
    part = path.with_name(path.name + ".part")
    try:
        part.unlink(missing_ok=True)  # what is left there may be a link, or without permission to write
        with open(part, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError:  # on a full disk, what was written is in the way of the next try
        part.unlink(missing_ok=True)
        raise


def save(path: str | os.PathLike, arrays: dict[str, np.ndarray], info: dict[str, Any]) -> None:
    """Save named arrays and `info` (a dictionary that JSON can hold; floats survive to the last bit).

    arrays: NumPy, of any shape, strides and byte order: booleans, integers or floats of up to 64 bits.
    What could not be read again is refused: ValueError for arrays of other kinds and for the one name that the format
    keeps for itself, TypeError for names that are no strings and for an `info` that is no dictionary.
    """
    from safetensors.numpy import save as to_bytes

    if "__metadata__" in arrays:
        raise ValueError("an array in a checkpoint cannot be called '__metadata__': choose another name.")
    if not isinstance(info, dict) or not isinstance(arrays, dict):
        raise TypeError("the arrays and the info of a checkpoint are dictionaries: give their names.")
    if not all(isinstance(name, str) for name in arrays):
        raise TypeError(f"the arrays of a checkpoint have strings as names, got {list(arrays)}.")
    contiguous = {name: _storable(name, a) for name, a in arrays.items()}
    text = json.dumps(info)
    # one entry: safetensors writes several in any order, and equal checkpoints would not be equal files
    write_atomically(path, to_bytes(contiguous, metadata={"info": f"{_crc32(contiguous, text)} {text}"}))


def load(path: str | os.PathLike) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """(arrays, info) as they were saved. CheckpointError if the file is missing, damaged or something else."""
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint {path}: give another one, or begin anew.")
    try:
        open(path, "rb").close()  # of a file without permission safetensors says that there is none
        with safe_open(path, framework="numpy") as file:
            checksum, text = (file.metadata() or {})["info"].split(" ", 1)
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            if checksum not in (_crc32(arrays, text), _crc32_of_values(arrays, text)):
                raise ValueError("its checksum is wrong")
            info = json.loads(text)
            if not isinstance(info, dict):
                raise ValueError("its info is no dictionary")
            return arrays, info
    except (SafetensorError, KeyError, ValueError, OSError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is damaged or not a checkpoint of this project ({error}): give another one, or begin anew."
        ) from error


def _storable(name: str, array: np.ndarray) -> np.ndarray:
    """The array in C order and in the byte order of this machine, which is what safetensors writes and names."""
    array = np.asarray(array)
    if array.dtype.kind not in "biuf" or array.dtype.itemsize > 8:
        raise ValueError(f"the array {name!r} is {array.dtype}: a checkpoint holds booleans, integers and floats.")
    return np.asarray(array, dtype=array.dtype.newbyteorder("="), order="C")


def _crc32(arrays: dict[str, np.ndarray], text: str) -> str:
    """A checksum of everything in a checkpoint: a disk can change a bit without an error."""
    kinds = {name: (a.dtype.str, a.shape) for name, a in sorted(arrays.items())}
    return _crc32_of_values(arrays, f"{text} {kinds}")


def _crc32_of_values(arrays: dict[str, np.ndarray], text: str) -> str:
    """The checksum of earlier versions, which did not see a changed dtype or shape."""
    crc = zlib.crc32(text.encode())
    for name in sorted(arrays):
        crc = zlib.crc32(arrays[name].reshape(-1).view(np.uint8).data, zlib.crc32(name.encode(), crc))
    return f"{crc:08x}"
