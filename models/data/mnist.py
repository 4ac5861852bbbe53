"""MNIST from its original IDX files (LeCun, Cortes & Burges 1998), verified by SHA-256.

The files are looked for in the folder `mnist/` of a data directory, gzipped or not. Without a data directory they are
downloaded once into the user's cache.
"""

from __future__ import annotations

import gzip
import hashlib
import struct
import zlib
from pathlib import Path

import numpy as np

from .errors import DataError, data_folder

# of the uncompressed files
SHA256 = {
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}
MIRRORS = (
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
)


def load(data_dir=None):
    """((train images (60000, 28, 28) uint8, labels (60000,)), (test images (10000, 28, 28), labels (10000,)), 255)."""
    folder = data_folder(data_dir)
    read = (lambda name: read_verified(folder / "mnist", name)) if folder else download
    train, train_labels, test, test_labels = (parse_idx(name, read(name)) for name in SHA256)
    return (train, train_labels), (test, test_labels), 255


def read_verified(folder: Path, name: str) -> bytes:
    """The content of `folder/name` or `folder/name.gz`. DataError if missing, truncated or altered."""
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            content = _read(path)
            if hashlib.sha256(content).hexdigest() != SHA256[name]:
                raise DataError(f"{path} is not the original MNIST file (its SHA-256 differs): replace it.")
            return content
    raise DataError(
        f"{folder} has neither {name} nor {name}.gz: put the four MNIST files there, or leave out --data-dir and "
        "MINIGRAD_DATA to have them downloaded."
    )


def _read(path: Path) -> bytes:
    try:
        return gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} is truncated or unreadable ({error}): replace it.") from error


def download(name: str) -> bytes:
    """The file from the user's cache, or from the first mirror that has it whole. DataError if none has."""
    try:
        import pooch
    except ImportError:
        raise DataError(
            "the download of MNIST needs pooch: pip install pooch, or put the four files into DIR/mnist and give "
            "--data-dir DIR."
        ) from None
    folder = Path(pooch.os_cache("minigrad")) / "mnist"
    reasons = []
    for mirror in (None, *MIRRORS):
        try:
            if mirror:
                pooch.retrieve(mirror + name + ".gz", known_hash=None, fname=name + ".gz", path=folder)
            return read_verified(folder, name)
        except DataError as error:
            reasons.append(str(error))
            (folder / f"{name}.gz").unlink(missing_ok=True)  # a damaged download must not stay in the cache
        except Exception as error:  # a mirror can fail in many ways, none of which is the user's concern
            reasons.append(f"{mirror}: {type(error).__name__}")
    raise DataError(
        f"MNIST could not be downloaded ({'; '.join(reasons[1:])}): put its four files into DIR/mnist and give "
        "--data-dir DIR."
    )


def parse_idx(name: str, content: bytes) -> np.ndarray:
    """The array in an IDX file of unsigned bytes: 0 0 8 ndim, then ndim big-endian lengths, then the bytes.

    DataError for anything else.
    """
    if len(content) < 4 or content[:3] != b"\0\0\x08":
        raise DataError(f"{name} is not an IDX file of unsigned bytes.")
    ndim = content[3]
    if len(content) < 4 + 4 * ndim:
        raise DataError(f"{name} ends within its header.")
    shape = struct.unpack(f">{ndim}I", content[4 : 4 + 4 * ndim])
    values = np.frombuffer(content, np.uint8, offset=4 + 4 * ndim)
    if values.size != np.prod(shape):
        raise DataError(f"{name} holds {values.size} bytes of data where its header says {shape}.")
    return values.reshape(shape)
