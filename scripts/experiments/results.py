"""What a sweep leaves: the folders of its runs, and in each finished one a result."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

from .errors import UserError, require
from .run_folder import CHECKPOINT, CONFIG, read_file
from .specification import without_path_flags

RESULT = "result.json"
MANIFEST = ".sweep.json"  # RUNS/NAME.sweep.json tells report.py which runs a sweep has


def read_result(folder: Path) -> dict | None:
    """What a finished run left, None where there is no result. UserError if it is damaged."""
    path = folder / RESULT
    try:
        result = json.loads(read_file(path))
        if not (isinstance(result["config"], dict) and isinstance(result["metrics"], dict)):
            raise TypeError("it has no configuration or no metrics")
        return result
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}).") from error


def check_folder(folder: Path, config: dict[str, Any]) -> str:
    """What a folder holds: "" nothing usable, "checkpoint" or "result". UserError, and nothing is touched, if it is of
    another configuration or no run folder."""
    if not folder.exists():
        return ""
    try:
        stored = json.loads(read_file(folder / CONFIG))["config"]
        differ = sorted(k for k in stored.keys() | config.keys() if stored.get(k) != config.get(k))
    except FileNotFoundError:
        rest = [p.name for p in folder.iterdir() if p.suffix != ".part"]  # a run was killed while it made the folder
        require(not rest, f"{folder} is no run folder, since it has no {CONFIG}: move it, or choose another --out.")
        return ""
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{folder} is no run folder: its {CONFIG} is damaged ({error}): move it, or choose another --out."
        ) from error
    differ = without_path_flags(dict.fromkeys(differ))
    require(
        not differ,
        f"{folder} has a run of another configuration ({', '.join(differ)} differ): move it, or choose another --out.",
    )
    with contextlib.suppress(UserError):
        result = read_result(folder)
        if result and without_path_flags(result["config"]) == without_path_flags(
            config
        ):  # else it was copied from elsewhere
            return "result"
    return "checkpoint" if (folder / CHECKPOINT).exists() else ""
