"""ListOps (Nangia & Bowman 2018): nested operations on lists of digits, [MAX 2 9 [MIN 4 7 ] 0 ] -> 9.

The operators are MIN, MAX, MED (the median, rounded down) and SM (the sum modulo 10). A sequence is held as its tokens
in one byte each, an operator being one token with its bracket. The published files also show how the list is built up
as a binary tree, which adds nothing to the tokens:

    9	( ( ( ( ( [MAX 2 ) 9 ) ( ( ( [MIN 4 ) 7 ) ] ) ) 0 ) ] )
"""

from __future__ import annotations

import logging
import random
import reprlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .errors import DataError, data_folder

log = logging.getLogger(__name__)

OPERATORS = ("[MIN", "[MAX", "[MED", "[SM")
TOKENS = (*"0123456789", *OPERATORS, "]")
CLOSE = len(TOKENS) - 1
_CODE = {token: i for i, token in enumerate(TOKENS)}

# the constants of the published generator; what it calls VALUE_P is the probability that a node is an operation
EXPANSION, LEAST_ARGUMENTS, MOST_ARGUMENTS, MOST_DEPTH = 0.25, 2, 5, 20
DRAWS_PER_SEQUENCE = 10  # the published set took 100,000 sequences from a million draws without duplicates
SPLITS = ("train", "valid", "test")


def apply(operator: int, arguments: list[int]) -> int:
    """The value of one operation; the operator as its token."""
    name = TOKENS[operator]
    if name == "[MIN":
        return min(arguments)
    if name == "[MAX":
        return max(arguments)
    if name == "[SM":
        return sum(arguments) % 10
    ordered, half = sorted(arguments), len(arguments) // 2
    return ordered[half] if len(arguments) % 2 else (ordered[half - 1] + ordered[half]) // 2


# ---- generate


def generate(count: int, seed: int = 0) -> list[tuple[bytes, int]]:
    """`count` different sequences with their values, [(tokens, value)], in random order; the same for the same seed.

    As published: a node is an operation with probability 0.25, down to depth 20, and otherwise a digit; operations and
    the number of arguments, 2 to 5, are uniform; duplicates and single digits are left out. Ten draws are made for each
    sequence wanted, since duplicates are short and leaving them out of more draws makes the rest longer.
    ValueError for a count below 1.
    """
    if count < 1:
        raise ValueError(f"the number of sequences must be at least 1, got {count}.")
    uniform, seen = random.Random(seed).random, {}
    while len(seen) < count:
        for _ in range(DRAWS_PER_SEQUENCE * count):
            tokens = bytearray()
            value = _grow(tokens, uniform, 1)
            if len(tokens) > 1:
                seen[bytes(tokens)] = value
    found = list(seen.items())
    for i in range(count):  # the first steps of a shuffle, with nothing but `random`, which is stable across versions
        j = i + int(uniform() * (len(found) - i))
        found[i], found[j] = found[j], found[i]
    return found[:count]


def _grow(tokens: bytearray, uniform, depth: int) -> int:
    """Append one random node and return its value."""
    if depth == MOST_DEPTH or uniform() > EXPANSION:
        value = int(10 * uniform())
        tokens.append(value)
        return value
    operator = 10 + int(len(OPERATORS) * uniform())
    tokens.append(operator)
    size = LEAST_ARGUMENTS + int((MOST_ARGUMENTS - LEAST_ARGUMENTS + 1) * uniform())
    value = apply(operator, [_grow(tokens, uniform, depth + 1) for _ in range(size)])
    tokens.append(CLOSE)
    return value


# ---- one sequence: its value, its depth, its binary tree, its line


class Malformed(ValueError):
    """What is wrong with a sequence, without the place."""


def evaluate(tokens: bytes) -> int:
    """The value. Malformed for brackets that do not match, or an operator without arguments."""
    stack: list[list[int]] = [[]]
    for token in tokens:
        if token < 10:
            stack[-1].append(token)
        elif token < CLOSE:
            stack.append([token])
        else:
            if len(stack) == 1:
                raise Malformed("a ] without its operator")
            operator, *arguments = stack.pop()
            if not arguments:
                raise Malformed(f"the operator {TOKENS[operator]} has no arguments")
            stack[-1].append(apply(operator, arguments))
    if len(stack) > 1:
        raise Malformed(f"the operator {TOKENS[stack[-1][0]]} is not closed by a ]")
    if len(stack[0]) != 1:
        raise Malformed("it is empty" if not stack[0] else "there is more than one list")
    return stack[0][0]


def depth(tokens: bytes) -> int:
    """How deep operations are nested: 1 for a list of digits."""
    level = deepest = 0
    for token in tokens:
        level += 0 if token < 10 else 1 if token < CLOSE else -1
        deepest = max(deepest, level)
    return deepest


def render(tokens: bytes) -> str:
    """The published notation: every list is a left-branching binary tree, ( ( ( [MIN 2 ) 9 ) ] )."""
    stack: list[list[str]] = [[]]
    for token in tokens:
        if token < 10:
            stack[-1].append(TOKENS[token])
        elif token < CLOSE:
            stack.append([TOKENS[token]])
        else:
            parts = stack.pop()
            stack[-1].append("( " * len(parts) + parts[0] + "".join(f" {part} )" for part in [*parts[1:], "]"]))
    return stack[0][0]


def parse(text: str) -> bytes:
    """The tokens of one line's sequence, with or without its parentheses. Malformed, if it is not a sequence."""
    words = text.split()
    try:
        tokens = bytes(_CODE[word] for word in words if word not in ("(", ")"))
    except KeyError as error:
        raise Malformed(f"unknown token {reprlib.repr(error.args[0])}") from None
    evaluate(tokens)
    if ("(" in words or ")" in words) and render(tokens) != " ".join(words):
        raise Malformed("its parentheses are not balanced, or do not build each list from the left")
    return tokens


# ---- files


def read(path) -> list[tuple[bytes, int]]:
    """[(tokens, value)] from a file of lines `label<TAB>sequence`, as published. Single digits are kept.

    DataError, with the line's number and what is wrong, for a line that is not of that form, or whose label is not the
    value of its sequence.
    """
    path, found = Path(path), []
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read ({getattr(error, 'strerror', None) or 'it is not text'}).") from error
    if lines and lines[-1] == "":
        lines.pop()
    if not lines:
        raise DataError(f"{path} is empty: it needs lines of the form label<TAB>sequence.")
    for number, line in enumerate(lines, start=1):
        label, tab, text = line.partition("\t")
        try:
            if not tab:
                raise Malformed("an empty line" if not line.strip() else "no tab between a label and a sequence")
            tokens = parse(text)
            value = evaluate(tokens)
            if label != str(value):
                raise Malformed(f"the label is {reprlib.repr(label)}, but the sequence has the value {value}")
        except Malformed as error:
            raise DataError(f"{path}, line {number}: {error}.") from error
        found.append((tokens, value))
    return found


def write(path, sequences) -> None:
    """The published format, byte for byte."""
    text = "".join(f"{value}\t{render(tokens)}\n" for tokens, value in sequences)
    Path(path).write_bytes(text.encode())


def files(data_dir=None) -> dict[str, Path]:
    """The files listops/{train,valid,test}.tsv that exist in `data_dir`, else in MINIGRAD_DATA, by split.

    DataError if that is no folder.
    """
    folder = data_folder(data_dir)
    paths = {name: folder / "listops" / f"{name}.tsv" for name in SPLITS} if folder else {}
    return {name: path for name, path in paths.items() if path.is_file()}


def sources(data_dir=None) -> str:
    """Which splits `load` reads and which it generates, a clause."""
    found, folder = files(data_dir), data_folder(data_dir)
    parts = {f"read from {folder and folder / 'listops'}": [*found], "generated": [n for n in SPLITS if n not in found]}
    return "; ".join(f"{what}: {', '.join(names)}" for what, names in parts.items() if names)


def load(data_dir=None, counts=(90_000, 1_000, 10_000), seed: int = 0) -> dict[str, list[tuple[bytes, int]]]:
    """{"train", "valid", "test"}: from `listops/{train,valid,test}.tsv` of a data directory, where they exist.

    data_dir: else the environment variable MINIGRAD_DATA, else everything is generated.  Splits without a file are
    generated, `counts` sequences each, and share no sequence with each other or with a file; if a data directory lacks
    some, that is logged.
    """
    paths = files(data_dir)
    splits = {name: read(path) for name, path in paths.items()}
    missing = [(name, count) for name, count in zip(SPLITS, counts, strict=True) if name not in splits]
    if missing:
        if data_folder(data_dir):
            log.warning("%s.", sources(data_dir))
        taken = {tokens for sequences in splits.values() for tokens, _ in sequences}
        wanted = sum(count for _, count in missing)
        fresh = [item for item in generate(wanted + len(taken), seed) if item[0] not in taken]
        for name, count in missing:
            splits[name], fresh = fresh[:count], fresh[count:]
    return {name: splits[name] for name in SPLITS}


# ---- batches


@dataclass(frozen=True)
class Batch:
    """ids (B, T) of integers, padded with `padding`; lengths and labels (B,); index (B,), which sequences they are."""

    ids: np.ndarray
    lengths: np.ndarray
    labels: np.ndarray
    index: np.ndarray


class Tokenizer:
    """Integers for the tokens. split: as the code of Fan et al. (2022) has it, the bracket and the operator of [MIN as
    two tokens; otherwise they are one."""

    def __init__(self, split: bool = False):
        self.split = split
        self.tokens = (*"0123456789", "[", *(name[1:] for name in OPERATORS), "]") if split else TOKENS
        self.size = len(self.tokens) + 1
        self.padding = len(self.tokens)

    def __call__(self, tokens: bytes) -> np.ndarray:
        """The ids of one sequence, (T,) int64."""
        ids = np.frombuffer(tokens, np.uint8).astype(np.int64)
        if not self.split:
            return ids
        operator = (ids >= 10) & (ids < CLOSE)
        out = np.repeat(ids + (ids >= 10), 1 + operator)  # behind the digits, [ shifts everything by one
        ends = np.cumsum(1 + operator)
        out[ends[operator] - 2] = 10
        return out


def within(sequences, tokenizer: Tokenizer, longest: int):
    """(those of 2 to `longest` tokens, how many are left out)."""
    kept = [item for item in sequences if 2 <= len(tokenizer(item[0])) <= longest]
    return kept, len(sequences) - len(kept)


def batches(sequences, tokenizer: Tokenizer, size: int, rng=None) -> list[Batch]:
    """All sequences in batches of similar length. rng: a `minigrad.Rng` for the order, at an epoch's step; without it,
    from short to long.

    The sequences are put in a random order, sorted by length (so that the order among equals is random), cut into
    batches, and the batches put in a random order.
    """
    ids = [tokenizer(tokens) for tokens, _ in sequences]
    lengths = np.array([len(x) for x in ids])
    order = np.arange(len(ids)) if rng is None else rng.site("sequences").permutation(len(ids))
    order = order[np.argsort(lengths[order], kind="stable")]
    parts = [order[start : start + size] for start in range(0, len(order), size)]
    if rng is not None:
        parts = [parts[i] for i in rng.site("batches").permutation(len(parts))]
    labels, found = np.array([value for _, value in sequences]), []
    for index in parts:
        table = np.full((len(index), lengths[index].max()), tokenizer.padding)
        for row, i in zip(table, index, strict=True):
            row[: lengths[i]] = ids[i]
        found.append(Batch(table, lengths[index], labels[index], index))
    return found
