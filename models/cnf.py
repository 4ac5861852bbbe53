"""Logical constraints as a loss (Yang, Lee & Park, ICML 2022): a theory in conjunctive normal form, hard truth values,
and a gradient that satisfies clauses.

    outputs x  --binarise-->  truth values v of the atoms (B, n)  --`constraint_loss`-->  L_deduce, L_unsat, L_sat

Forward, everything is logic: the values are 0 or 1, and a clause holds or does not. Backward, the binariser passes the
gradient on, and each clause says in which direction its literals should move. With L the truth of a literal (v or
1 − v) and Π, Σ over the literals of a clause,

    unsat = Π (1 − L)                      1 if no literal is true, else 0
    keep  = Σ [L = 1](1 − L) + [L = 0] L   always 0; its gradient is −1 for a true literal and 1 for a false one

    ∂unsat/∂Lⱼ = −Π_{k≠j} (1 − L_k)        −1 for every literal of a clause that does not hold,
                                           −1 for the one true literal of a clause that holds by it alone, else 0

so descent on `unsat` makes a false clause true by raising all of its literals at once, and descent on `keep` confirms
the values that a true clause has. Which clauses get which is the loss, see `constraint_loss`.

What is known before the network answers are facts (a sum, a given cell). A literal that a fact contradicts is no way to
satisfy its clause, and drops out; a clause that a fact satisfies says nothing about the network, and is *closed*. The
clauses that stay open are those that are relevant to the example, and are all that is ever looked at: no array is
(B, m, n), and a theory may have thousands of clauses.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

from minigrad import Tensor, op
from minigrad.backend import array_module

BINARISERS = {"probability": (0.5, None), "identity": (0.0, None), "clipped": (0.0, 1.0)}  # threshold, width
NORMALISATIONS = ("sample", "batch", "all")
PARTS = ("deduce", "unsat", "sat")


# ---- theories


class TheoryError(ValueError):
    """A theory, or a DIMACS file, that cannot be used; one sentence, with the line where it applies."""


@dataclass(frozen=True)
class Theory:
    """A conjunction of clauses, as DIMACS has them.

    clauses: tuples of literals, +a for the atom a and −a for its negation, a from 1 to n;   atoms: n
    names: of the atoms, n texts, or none
    TheoryError for an empty clause, a literal outside ±1 … ±n, an atom twice in a clause, or another number of names.
    """

    clauses: tuple[tuple[int, ...], ...]
    atoms: int
    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.names and len(self.names) != self.atoms:
            raise TheoryError(f"there are {len(self.names)} names for {self.atoms} atoms: give one for each.")
        for n, clause in enumerate(self.clauses):
            fault = _fault(clause, self.atoms)
            if fault:
                raise TheoryError(f"clause {n + 1} {fault}.")

    @cached_property
    def matrix(self) -> np.ndarray:
        """C (m, n): 1 where the clause has the atom, −1 where it has its negation, else 0."""
        C = np.zeros((len(self.clauses), self.atoms), np.int8)
        for row, clause in zip(C, self.clauses, strict=True):
            row[np.abs(clause) - 1] = np.sign(clause)
        return C

    @cached_property
    def table(self) -> tuple[np.ndarray, np.ndarray]:
        """(atom, sign) of every literal, (w, m + 1) each, w the length of the longest clause.

        Short clauses end with literals of sign 0, which are none; so does the last column, an additional empty clause.
        """
        width = max(map(len, self.clauses), default=0)
        atom = np.zeros((width, len(self.clauses) + 1), np.int64)
        sign = np.zeros(atom.shape, np.int8)
        for n, clause in enumerate(self.clauses):
            atom[: len(clause), n], sign[: len(clause), n] = np.abs(clause) - 1, np.sign(clause)
        return atom, sign

    def holds(self, v: np.ndarray) -> np.ndarray:
        """Which clauses hold.   v (B, n) of 0 and 1  ->  (B, m) booleans"""
        atom, sign = (a[:, :-1, None] for a in self.table)
        return ((v.T[atom[:, :, 0]] == (sign > 0)) & (sign != 0)).any(axis=0).T

    def save(self, path: str | Path) -> None:
        """Write a DIMACS file; names stand in comments, "c 7 digit(0,6)"."""
        lines = [f"c {n} {name}" for n, name in enumerate(self.names, 1)]
        lines.append(f"p cnf {self.atoms} {len(self.clauses)}")
        lines += [" ".join(map(str, (*clause, 0))) for clause in self.clauses]
        Path(path).write_text("\n".join(lines) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Theory:
        """Read a DIMACS file: comments, "p cnf ATOMS CLAUSES", and clauses, numbers that end with a 0.

        Comments "c NUMBER NAME" name the atoms, if they name all of them. A line "%" ends the file, as in SATLIB's.
        A comment may have any encoding that has ASCII in it.
        TheoryError, with the line and the reason, for another file; OSError if it cannot be read.
        """
        atoms, expected, clauses, names, clause, header = None, 0, [], {}, [], 0
        text = Path(path).read_text(encoding="utf-8-sig", errors="replace").removesuffix("\n")
        if "\0" in text:
            raise TheoryError("it is no text in ASCII or UTF-8.")
        lines = text.split("\n")  # and not where else `splitlines` sees an end of a line
        for n, line in enumerate(lines, 1):
            words = line.split()
            if not words:
                continue
            if words[0].startswith("c"):
                if len(words) == 3 and words[0] == "c" and words[1].isascii() and words[1].isdigit():
                    names[words[1]] = words[2]
                continue
            if words[0] == "%":
                break
            if words[0] == "p":
                if atoms is not None:
                    raise TheoryError(f"line {n}: a second line p, after the one in line {header}.")
                if not re.fullmatch(r"p\s+cnf\s+\d{1,9}\s+\d{1,9}\s*", line.strip(), re.ASCII):
                    raise TheoryError(f"line {n}: the header must be like 'p cnf ATOMS CLAUSES', got {line[:40]!r}.")
                atoms, expected, header = int(words[2]), int(words[3]), n
                continue
            if atoms is None:
                raise TheoryError(f"line {n}: a clause before the header 'p cnf ATOMS CLAUSES'.")
            for word in words:
                if not re.fullmatch(r"[+-]?\d{1,18}", word, re.ASCII):
                    raise TheoryError(f"line {n}: {word[:40]!r} is not a whole number.")
                if int(word):
                    clause.append(int(word))
                    continue
                clause = list(dict.fromkeys(clause))  # a literal that stands there twice says nothing more
                fault = _fault(clause, atoms)
                if fault:
                    raise TheoryError(f"line {n}: the clause that ends here {fault}.")
                clauses.append(tuple(clause))
                clause = []
        if atoms is None:
            raise TheoryError("there is no header 'p cnf ATOMS CLAUSES'.")
        if clause:
            raise TheoryError(f"line {len(lines)}: the file ends within a clause: its closing 0 is missing.")
        if len(clauses) != expected:
            raise TheoryError(f"line {header}: the header says {expected} clauses, and the file has {len(clauses)}.")
        known = [names.get(str(a)) for a in range(1, atoms + 1)] if len(names) == atoms else [None]
        return cls(tuple(clauses), atoms, () if None in known else tuple(known))


def _fault(clause: Iterable[int], atoms: int) -> str:
    """What is wrong with a clause, "" if nothing is."""
    used = [abs(literal) for literal in clause]
    if not used:
        return "is empty: nothing can satisfy it"
    if not 1 <= min(used) <= max(used) <= atoms:
        return f"has an atom outside 1 to {atoms}"
    if len(set(used)) < len(used):
        twice = next(a for a in used if used.count(a) > 1)
        return f"has the atom {twice} twice"
    return ""


# ---- what the facts leave of a theory


class Clauses(NamedTuple):
    """The clauses of each example that are looked at, r at most, with w literals at most; arrays on the device.

    atom (w, B, r): which value of the network a literal has;   sign (w, B, r): 1, −1, or 0 for no literal
    open (B, r): no fact satisfies the clause, and it is one (there may be fewer than r)
    count: how many values the network has
    """

    atom: np.ndarray
    sign: np.ndarray
    open: np.ndarray
    count: int

    def check(self, v) -> None:
        """ValueError unless v has the shape (B, count)."""
        if v.shape != (len(self.open), self.count):
            raise ValueError(f"there must be {(len(self.open), self.count)} truth values, got {v.shape}.")


class Given:
    """A theory of which some atoms are told by facts and the others by a network.

    first, count: the network's atoms are those from first to first + count − 1, from 0; all others are *inputs*, and an
    input that is no fact is false.   backend: where the arrays shall be
    everything: look at all clauses of the theory, also at those that the facts satisfy, for "all" of `constraint_loss`
    """

    def __init__(self, theory: Theory, first: int, count: int, backend=None, everything: bool = False) -> None:
        if not (first >= 0 and count >= 1 and first + count <= theory.atoms):
            raise ValueError(f"there are no {count} atoms from {first} on in a theory of {theory.atoms}.")
        self.count = count
        atom, sign = theory.table
        is_input = np.ones(theory.atoms + 1, bool)  # the last one stands for no fact at all
        is_input[first : first + count] = False
        is_guard = (sign < 0) & is_input[atom]  # the clause is of interest if the input is a fact
        guarded, under = is_guard.any(axis=0), [[] for _ in range(theory.atoms + 1)]
        for n in np.flatnonzero(guarded):
            under[atom[is_guard[:, n].argmax(), n]].append(n)
        if everything:
            guarded[:], under = False, [[]] * len(under)
        width, none = max(map(len, under)), len(theory.clauses)
        lists = np.array([[*found, *[none] * (width - len(found))] for found in under], np.int64)
        unknown = np.where(is_input, -1, 0).astype(np.int8)
        arrays = (atom, sign, np.clip(atom - first, 0, count - 1), lists, np.flatnonzero(~guarded[:-1]), unknown)
        to_device = backend.to_device if backend else np.asarray
        self.atom, self.sign, self.place, self.under, self.always, self.unknown = map(to_device, arrays)

    def __call__(self, facts) -> Clauses:
        """facts (B, f): the atoms that are true, from 0, also of the network's; n, the number of atoms, for none.

        A clause with a negated input is looked up under the first one, so that its theory is never gone through.
        ValueError for facts of another shape.
        """
        if facts.ndim != 2:
            raise ValueError(f"facts must be (B, f), got {facts.shape}.")
        xp, rows = array_module(facts), len(facts)
        known = xp.repeat(self.unknown[None], rows, axis=0)
        known[xp.arange(rows)[:, None], facts] = 1
        always = xp.broadcast_to(self.always, (rows, len(self.always)))
        chosen = xp.concatenate([always, self.under[facts].reshape(rows, -1)], axis=1)
        sign = self.sign[:, chosen]
        truth = sign * known[xp.arange(rows)[:, None], self.atom[:, chosen]]  # 1 true, −1 contradicted, 0 open
        is_open = (truth < 1).all(axis=0) & (chosen < self.sign.shape[1] - 1)
        return Clauses(self.place[:, chosen], xp.where(truth == 0, sign, 0), is_open, self.count)


# ---- ops


def _surrogate_binariser(x, *, threshold, width=None):
    bound = lambda u: u if width is None else array_module(u).clip(u, -width, width)
    return (0,), lambda x: bound(x - threshold)


@op(surrogate=_surrogate_binariser)
def step_at(x, *, threshold: float, width: float | None = None):
    """y = 1[x ≥ threshold]       dx = g,  or, with a width,  g [|x − threshold| ≤ width]

    At the threshold y is 1, as in the paper and its code; `minigrad.hard.hard_step` is 0 there. NaN for NaN.
    """
    xp = array_module(x)
    y = xp.where(x == x, (x >= threshold).astype(x.dtype), x)
    return y, lambda g: g if width is None else xp.where(abs(x - threshold) <= width, g, 0.0)


def binarise(x: Tensor, kind: str) -> Tensor:
    """Truth values by one of `BINARISERS`: "probability" 1[p ≥ ½] of a probability, whose gradient it passes on;
    "identity" 1[x ≥ 0] of a logit, the same; "clipped" 1[x ≥ 0], the gradient only where |x| ≤ 1."""
    threshold, width = BINARISERS[kind]
    return step_at(x, threshold=threshold, width=width)


def _surrogate_clauses(v, atom, sign):
    slope = _keep_slope(_falsity(v, atom, sign)[0], sign)

    def unsat_and_keep(v):
        M, _ = _falsity(v, atom, sign)
        return M.prod(axis=0), -(slope * M).sum(axis=0)

    return (0,), unsat_and_keep


def _falsity(v, atom, sign):
    """(1 − L, the places of the literals in v.ravel()), (w, B, r) each: 1 where there is no literal."""
    xp = array_module(v)
    places = atom + v.shape[1] * xp.arange(len(v))[:, None]
    x = v.reshape(-1)[places]
    return xp.where(sign > 0, 1.0 - x, xp.where(sign < 0, x, 1.0)).astype(v.dtype, copy=False), places


def _keep_slope(M, sign):
    """∂keep/∂L: −1 for a literal that is true, 1 for one that is false."""
    return ((M == 1.0).astype(M.dtype) - (M == 0.0)) * (sign != 0)


@op(surrogate=_surrogate_clauses)
def clause_values(v, atom, sign):
    """unsat and keep of clauses, (B, r) each.     v (B, n) truth values;  atom, sign (w, B, r) as in `Clauses`

    With M = 1 − L for each literal, which is 1 − v or v, and 1 where there is none:
    forward:   unsat = Π M            keep = 0
    backward:  dMⱼ = g_unsat Π_{k≠j} Mₖ + g_keep ([Mⱼ = 0] − [Mⱼ = 1])
               dv = −dM for an atom, dM for its negation, added up over the literals of an atom

    The brackets of `keep` are constants: it is [L = 1](1 − L) + [L = 0] L, so 0 at every v. unsat is differentiated as
    it is, at any real v.
    """
    xp = array_module(v)
    M, places = _falsity(v, atom, sign)
    zero = M == 0.0
    nonzero = xp.where(zero, 1.0, M).astype(v.dtype)
    product, zeros = nonzero.prod(axis=0), zero.sum(axis=0)
    unsat = product * (zeros == 0)

    def backward(g_unsat, g_keep):
        dM = g_unsat * (product / nonzero) * (zeros == zero)  # not where there is a zero among the others
        dM -= g_keep * _keep_slope(M, sign)
        dv = xp.zeros(v.size, v.dtype)
        xp.add.at(dv, places.reshape(-1), (-sign * dM).astype(v.dtype).reshape(-1))
        return dv.reshape(v.shape), None, None

    return (unsat, xp.zeros_like(unsat)), backward


# ---- the loss


def constraint_loss(v: Tensor, clauses: Clauses, normalise: str = "sample") -> tuple[Tensor, Tensor, Tensor]:
    """(L_deduce, L_unsat, L_sat), whose sum is L_cnf.     v (B, n): truth values, zeros and ones

    L_unsat is the mean of `unsat` over the clauses that do not hold, L_sat the mean of `keep` over those that do, and
    L_deduce the sum of `unsat` over those which the facts leave a single literal, whose value they thus imply. All
    three are 0 where every clause holds, and only there.

    normalise: "sample"   for each example on its own, then the mean over the batch
               "batch"    for all clauses of the batch at once, as published: what a clause of one example counts
                          depends on how many of the others' hold
               "all"      for each example the mean over all clauses of the theory, with `unsat` or with `keep`, those
                          included that the facts satisfy (`Given(everything=True)`)
    """
    xp, dtype = array_module(v.data), v.dtype
    clauses.check(v)
    if normalise not in NORMALISATIONS:
        raise ValueError(f"unknown normalise {normalise!r}; the known ones are {', '.join(NORMALISATIONS)}.")
    unsat, keep = clause_values(v, clauses.atom, clauses.sign)
    B, r = clauses.open.shape
    broken = clauses.open & (unsat.data == 1.0)
    kept = ~broken if normalise == "all" else clauses.open & ~broken
    deducible = clauses.open & ((clauses.sign != 0).sum(axis=0) == 1)
    if normalise == "all":
        parts = deducible / (B * r), broken / (B * r), kept / (B * r)
    elif normalise == "batch":
        parts = deducible, broken / xp.maximum(broken.sum(), 1), kept / xp.maximum(kept.sum(), 1)
    else:
        many = lambda mask: B * xp.maximum(mask.sum(axis=1, keepdims=True), 1)
        parts = deducible / B, broken / many(broken), kept / many(kept)
    deduce, unsatisfied, satisfied = (weight.astype(dtype) for weight in parts)
    return (unsat * deduce).sum(), (unsat * unsatisfied).sum(), (keep * satisfied).sum()


def satisfied(v, clauses: Clauses):
    """Which examples satisfy all of their open clauses.   v (B, n) of 0 and 1, an array  ->  (B,) booleans"""
    clauses.check(v)
    unsat = clause_values.rule(v, clauses.atom, clauses.sign)[0][0]
    return ~(clauses.open & (unsat == 1.0)).any(axis=1)
