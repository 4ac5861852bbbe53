"""Flags from a dataclass, and configurations from files: one description of what a setting is, and one check of it.

    @dataclass(frozen=True)
    class Config:
        lr: float = flag(1e-3, "learning rate")

`parse_flags` reads a command line, `read_values` what a TOML or JSON file says about the same settings.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn

from .errors import UserError, require

DTYPES = ("float32", "float64")
LARGEST = 10**30  # of a whole number: beyond, it is a mistake, and no longer a float everywhere


OUT_FLAG = ("--out", {"help": "the run folder to make, or an empty one (default: a new one below runs/)"})


def quiet_flag(text: str) -> tuple[str, dict[str, Any]]:
    """The flag --quiet, for `parse_flags`.   text: what it does"""
    return "--quiet", {"action": "store_true", "default": False, "help": text}


def flag(default: Any, text: str, **argparse_options: Any) -> Any:
    """A dataclass field that is also a command-line flag with this help text."""
    return dataclasses.field(default=default, metadata={"help": text, **argparse_options})


class Parser(argparse.ArgumentParser):
    """Says what is wrong as a UserError, and refuses an empty text, as it comes from an unset variable of the shell."""

    def parse_args(self, *arguments: Any, **options: Any) -> Any:
        found = super().parse_args(*arguments, **options)
        for name, value in vars(found).items():
            require(value != "", f"{name.replace('_', '-')} is empty: give it a value, or leave it out.")
        return found

    def error(self, message: str) -> NoReturn:
        message = re.sub(r"\S{100,}", lambda found: f"{found[0][:40]}…{found[0][-1]}", message)
        raise UserError(f"{message.rstrip('.')}; see --help.")


def parse_flags(config_class: type, description: str | None, argv: Sequence[str] | None, extra: Iterable = ()):
    """(the flags given, the others), two dicts. `extra`: (name, options) of flags that are not in the configuration.

    Flags that were not given are absent, so that a resumed run can tell "left out" from "given".
    """
    parser = Parser(description=description and description.split("\n\n")[0], allow_abbrev=False)
    fields = dataclasses.fields(config_class)
    for f in fields:
        options = dict(f.metadata)
        text = f"{options.pop('help')} (default: {shown(f.default)})"
        if type(f.default) is bool:
            options["action"] = "store_true"
        else:
            kind = options.setdefault("type", type(f.default))
            options["type"] = whole if kind is int else kind
        parser.add_argument(option(f.name), default=argparse.SUPPRESS, help=text, **options)
    for name, options in extra:
        parser.add_argument(name, **({"default": argparse.SUPPRESS} | options))
    given = vars(parser.parse_args(argv))
    names = {f.name for f in fields}
    return {k: v for k, v in given.items() if k in names}, {k: v for k, v in given.items() if k not in names}


def read_values(config_class: type, values: Mapping[str, Any], texts: bool = False) -> dict[str, Any]:
    """What a file says about some settings of a configuration, as values of the dataclass.

    A list is a tuple, and a whole number may stand for a float.   texts: a text may stand for what the flag makes of it
    UserError, one sentence that begins with the key, for an unknown one or a value of another kind.
    """
    fields, found = {f.name: f for f in dataclasses.fields(config_class)}, {}
    for key, value in values.items():
        if key not in fields:
            raise UserError(f"unknown key {key[:80]!r}; the flags are {', '.join(fields)}.")
        found[key] = _read_value(fields[key], value, texts)
    return found


def _read_value(field: dataclasses.Field, value: Any, texts: bool) -> Any:
    default, convert = field.default, field.metadata.get("type")
    kind = convert if default is None else type(default)
    if isinstance(value, list | tuple) and kind is tuple:
        element = type(default[0])
        if all(type(part) is element and (element is not int or abs(part) < LARGEST) for part in value):
            return tuple(value)
    elif value is None and default is None:
        return None
    elif type(value) is int and abs(value) >= LARGEST:
        pass
    elif type(value) is kind:
        return value
    elif kind is float and type(value) is int:
        return float(value)
    elif texts and isinstance(value, str) and kind is not bool:
        try:
            return (whole if kind is int else convert or kind)(value)
        except (ValueError, argparse.ArgumentTypeError):
            pass
    raise UserError(f"{field.name} cannot be {in_short(value)}.")


def shown(value: Any) -> Any:
    """A value as it would be given as a flag."""
    if value in (None, "", ()):
        return "none"
    return ",".join(map(str, value)) if isinstance(value, tuple) else value


def as_text(value: Any) -> str:
    """A value of a file as it is written there."""
    try:
        return json.dumps(value, default=str, ensure_ascii=False)
    except (ValueError, RecursionError):  # a number of thousands of digits, or lists in lists in lists
        return f"a {'whole number' if isinstance(value, int) else type(value).__name__} that is too large to show"


def in_short(value: Any) -> str:
    """A value for a message, however long it is."""
    text = as_text(value)
    return text if len(text) <= 80 else f"{text[:60]}…"


def whole(text: str) -> int:
    """The type of a flag that is a whole number."""
    try:
        number = int(text)
    except ValueError:  # no number, or one of thousands of digits
        number = LARGEST
    if abs(number) >= LARGEST:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at most 30 digits")
    return number


def sizes(text: str) -> tuple[int, ...]:
    """The type of a flag like --hidden 512,256; "none" is the empty list."""
    if text == "none":
        return ()
    try:
        return tuple(map(whole, text.split(",")))
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers like 512,256") from None


def option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


# ---- checks of single flags


def at_least(least: int, config: Any, *names: str) -> None:
    """UserError for a number below `least`, or not finite; None is left alone."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not least <= value < math.inf:
            range_ = f"at least {least}" + (" and finite" if isinstance(value, float) else "")
            raise UserError(f"{option(name)} must be {range_}, got {value}.")


def at_most(most: int, config: Any, *names: str) -> None:
    """UserError for a number above `most`."""
    for name in names:
        value = getattr(config, name)
        require(value is None or value <= most, f"{option(name)} must be at most {most:,}, got {value}.")


def check_lr(config: Any) -> None:
    require(0.0 < config.lr < math.inf, f"--lr, the learning rate, must be positive and finite, got {config.lr}.")


def check_seed(config: Any) -> None:
    require(0 <= config.seed < 2**64, f"--seed must be an integer from 0 to 2**64 - 1, got {config.seed}.")


def one_of(config: Any, **names: Iterable[str]) -> None:
    """UserError for a flag that is none of the known names.   names: {flag: those that it may be}"""
    for name, known in names.items():
        value = getattr(config, name)
        require(value in known, f"unknown {name} {value!r}; the known ones are {', '.join(filter(None, known))}.")


def check_read(given: Iterable[str], unread: Mapping[str, str]) -> None:
    """UserError for a flag that was given and has no effect.   unread: {flag: why, a clause}"""
    for name, why in unread.items():
        require(name not in given, f"{why}: leave {option(name)} out.")
