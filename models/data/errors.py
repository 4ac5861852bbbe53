"""Where data are, and the error of all data sets."""

from __future__ import annotations

import os
from pathlib import Path

VARIABLE = "MINIGRAD_DATA"


class DataError(ValueError):
    """A data file is missing, truncated or altered; the message is one sentence that says what to do."""


def data_folder(data_dir: str | Path | None = None) -> Path | None:
    """The folder with one folder per data set: `data_dir`, else MINIGRAD_DATA, else None. DataError if it is none."""
    path = data_dir or os.environ.get(VARIABLE)
    if not path:
        return None
    if not os.path.isdir(path):  # no error for a name that is too long
        source = "--data-dir" if data_dir else f"the environment variable {VARIABLE}"
        raise DataError(f"there is no folder {str(path)!r}: give {source} a folder with data, or leave it out.")
    return Path(path)
