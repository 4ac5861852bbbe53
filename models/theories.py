"""Problems whose answers obey a theory: digits that are read from sums of their images, paths in a grid, small Sudokus.

Each problem knows its theory (`models.cnf.Theory`, its atoms in the order of the authors' files, so that those can take
its place), how the outputs of a network become truth values, and which facts go with an example (Yang, Lee & Park 2022,
with problems of Manhaeve et al. 2018, Tsamoura, Hospedales & Michael 2021 and Xu et al. 2018):

    add         two digits; told is their sum
    add2x2      four digits in a square; told are the sums of its rows and columns
    apply2x2    four operators + − × in a square; told are numbers a, b, c and, for each row and column, what
                (a ∘ b) ∘ c gives with its two operators. Published are handwritten operators, here they are drawn
    member3/5   three or five digits and a number; told is whether it is among them
    paths       the two ends of a path in a 4×4 grid that lacks 8 of its 24 edges; asked are the edges of a shortest one
    sudoku4     4×4 boards with a single solution; asked are all cells

Arrays on the host unless they come from a network; whatever is drawn is addressed noise.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from functools import cached_property, partial

import numpy as np

from minigrad import Rng, Tensor
from minigrad.backend import array_module
from minigrad.fused import bce_with_logits, cross_entropy, softmax
from minigrad.ops import concat, sigmoid, stack
from minigrad.random import argmax_one_hot, unchecked_one_hot

from .cnf import Theory, binarise

LINES = ((0, 1), (2, 3), (0, 2), (1, 3))  # the rows and columns of a 2×2 square
OPERATORS = (np.add, np.subtract, np.multiply)
OPERANDS = 11  # from 0 to 10
SIDE = 4  # of the grid and of the board
REMOVED = 8  # edges of the grid, as published
MOST_MORE = 3  # cells of a board that are given although the others would do


# ---- theories


class Atoms:
    """Numbers atoms by their names, from 1 in the order in which they are first asked for."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}

    def __call__(self, name: str) -> int:
        return self.numbers.setdefault(name, len(self.numbers) + 1)

    def theory(self, clauses) -> Theory:
        return Theory(tuple(map(tuple, clauses)), len(self.numbers), tuple(self.numbers))


def exactly_one(atoms) -> list[tuple[int, ...]]:
    """Existence and uniqueness: a₁ ∨ … ∨ aₙ, and ¬aᵢ ∨ ¬aⱼ for each pair."""
    return [tuple(atoms), *((-a, -b) for a, b in itertools.combinations(atoms, 2))]


def pair_theory(classes: int, lines, results, item: str, fact: str, unique: bool) -> Theory:
    """For each line, a pair of items, and each fact about it: ¬fact ∨ one of the pairs of classes that it follows from.

    results: {(numbers of a fact): pairs of classes};  unique: there are atoms of single items, each with exactly one
    """
    atom, items = Atoms(), sorted({i for line in lines for i in line})
    singles = [[atom(f"{item}({i},{c})") for c in range(classes)] for i in items] if unique else []
    pair = lambda i, j, a, b: atom(f"{item}s({i},{a},{j},{b})")
    for i, j in lines:
        for a, b in itertools.product(range(classes), repeat=2):
            pair(i, j, a, b)
    of_line = lambda i, j: f"{i},{j}," if len(lines) > 1 else ""
    clauses = [
        [*(pair(i, j, a, b) for a, b in pairs), -atom(f"{fact}({of_line(i, j)}{','.join(map(str, numbers))})")]
        for i, j in lines
        for numbers, pairs in results.items()
    ]
    return atom.theory(clauses + [clause for single in singles for clause in exactly_one(single)])


def sums() -> dict[tuple, list]:
    """{(sum,): the pairs of digits with it}"""
    pairs = list(itertools.product(range(10), repeat=2))
    return {(s,): [(a, b) for a, b in pairs if a + b == s] for s in range(19)}


def applications() -> dict[tuple, list]:
    """{(a, b, c, r): the pairs of operators for which (a ∘ b) ∘ c = r}"""
    found: dict[tuple, list] = {}
    cases = np.indices((OPERANDS,) * 3 + (len(OPERATORS),) * 2).reshape(5, -1)
    for a, b, c, first, second, r in np.vstack([cases, apply(*cases)]).T.tolist():
        found.setdefault((a, b, c, r), []).append((first, second))
    return found


def apply(a, b, c, first, second):
    """(a ∘ b) ∘ c for arrays of numbers and of operators' indices."""
    once = np.choose(first, [f(a, b) for f in OPERATORS])
    return np.choose(second, [f(once, c) for f in OPERATORS])


def member_theory(items: int, unique: bool) -> Theory:
    """¬in(d,1) ∨ digit(0,d) ∨ …  and  ¬in(d,0) ∨ ¬digit(i,d)"""
    atom = Atoms()
    digit = [[atom(f"digit({i},{d})") for d in range(10)] for i in range(items)]
    told = [[atom(f"in({d},{b})") for b in range(2)] for d in range(10)]
    clauses = []
    for d in range(10):
        clauses += [[*(digit[i][d] for i in range(items)), -told[d][1]]]
        clauses += [[-digit[i][d], -told[d][0]] for i in range(items)]
    return atom.theory(clauses + [clause for i in range(items) if unique for clause in exactly_one(digit[i])])


def grid_edges() -> list[tuple[int, int]]:
    """The 24 edges of the grid, pairs of its nodes 0 … 15: those along rows, then those along columns."""
    node = lambda i, j: SIDE * i + j
    rows = [(node(i, j), node(i, j + 1)) for i in range(SIDE) for j in range(SIDE - 1)]
    return rows + [(node(i, j), node(i + 1, j)) for j in range(SIDE) for i in range(SIDE - 1)]


def path_theory() -> Theory:
    """40 atoms, 68 clauses, as published: an end of the path has exactly one edge of it."""
    atom, nodes = Atoms(), range(SIDE * SIDE)
    ends = [atom(f"end({n})") for n in nodes]
    at = [[] for _ in nodes]
    for a, b in grid_edges():
        edge = atom(f"edge({a},{b})")
        at[a].append(edge)
        at[b].append(edge)
    exist = [(-ends[n], *at[n]) for n in nodes]
    return atom.theory(exist + [(-ends[n], *pair) for n in nodes for pair in exactly_one(at[n])[1:]])


def board_theory(unique: bool) -> Theory:
    """64 atoms; each digit is exactly once in each row, column and box and, if `unique`, each cell has exactly one."""
    atom, cells = Atoms(), list(itertools.product(range(SIDE), repeat=2))
    a = {(i, j, d): atom(f"cell({i},{j},{d})") for i, j in cells for d in range(SIDE)}
    groups = [[a[i, j, d] for i in range(SIDE)] for j in range(SIDE) for d in range(SIDE)]
    groups += [[a[i, j, d] for j in range(SIDE)] for i in range(SIDE) for d in range(SIDE)]
    corners = itertools.product(range(0, SIDE, 2), repeat=2)
    groups += [[a[i + k, j + l, d] for k in (0, 1) for l in (0, 1)] for i, j in corners for d in range(SIDE)]
    groups += [[a[i, j, d] for d in range(SIDE)] for i, j in cells] if unique else []
    return atom.theory([clause for group in groups for clause in exactly_one(group)])


# ---- several images are read by one network, and the answers together obey a theory


class Reading:
    """k images of K classes are read by one network. The theory's first atoms are those of the network: of single
    images, if it has any, then of the pairs of each line.

    kind: a binariser of `models.cnf`. Probabilities are multiplied and then become truth values, so that at most one
    class of an image, or one combination of a pair, is true. Logits become truth values first, any number of them,
    which are then multiplied: so the theory has clauses of existence and uniqueness.

    theory, first, count: as `models.cnf.Given` wants them.   copies: what it is applied to, one after the other,
    (images, lines of pairs of these)
    """

    classes = 10
    copies: tuple[tuple[tuple[int, ...], tuple[tuple[int, int], ...]], ...]
    first = 0

    def __init__(self, kind: str, to_device=np.asarray) -> None:
        self.kind, self.to_device = kind, to_device
        self.theory = self.make_theory(kind != "probability")
        (images, lines), *_ = self.copies
        self.of_images = kind != "probability" or not lines
        self.pairs_from = len(images) * self.classes if self.of_images else 0
        self.count = self.pairs_from + len(lines) * self.classes**2

    @property
    def items(self) -> int:
        """k"""
        return max(max(images) for images, _ in self.copies) + 1

    def make_theory(self, unique: bool) -> Theory:
        raise NotImplementedError

    def told(self, rng: Rng, values: np.ndarray) -> np.ndarray:
        """What is told beside the images of examples with these classes (N, k), drawn: (N, e) numbers."""
        return np.zeros((len(values), 0), np.int64)

    def facts(self, values: np.ndarray, told: np.ndarray) -> np.ndarray:
        """The facts (N, copies, f) of examples with these classes (N, k). Nothing else may know the classes."""
        raise NotImplementedError

    def truth(self, x: Tensor) -> Tensor:
        """x (B, k, K), logits  ->  (B·copies, count), truth values of the network's atoms."""
        if self.kind == "probability":
            return binarise(self.atoms(softmax(x)), self.kind)
        return self.atoms(binarise(x, self.kind))

    def answer(self, classes, like):
        """… of an answer, one class for each image, an array.   classes (B, k), an array of integers"""
        return self.atoms(Tensor(unchecked_one_hot(classes, self.classes, like))).data

    def atoms(self, v: Tensor) -> Tensor:
        """v (B, k, K) of single images  ->  (B·copies, count), products for the pairs; ValueError for others."""
        self.check_shape(v)
        found, B, K = [], len(v), self.classes
        for images, lines in self.copies:
            parts = [v[:, i] for i in images] if self.of_images else []
            parts += [(v[:, i].reshape(B, K, 1) * v[:, j].reshape(B, 1, K)).reshape(B, K * K) for i, j in lines]
            found.append(concat(*parts, axis=1) if len(parts) > 1 else parts[0])
        return stack(*found, axis=1).reshape(B * len(found), self.count) if len(found) > 1 else found[0]

    def holds(self, d: Tensor, facts) -> Tensor:
        """The probability (B,) that the facts (B, copies, f) are true, if the classes are independent with the
        probabilities d (B, k, K): the sum over all joint outcomes that agree with them. It is linear in the
        distribution of each image, and 0 or 1 for one-hots. ValueError for another shape of d."""
        self.check_shape(d)
        lines = [line for _, lines in self.copies for line in lines]
        k, B, K = self.items, len(d), self.classes
        along = lambda *axes: tuple(K if axis in axes else 1 for axis in range(k))
        allowed, joint = 1.0, d[:, 0].reshape(B, *along(0))
        for fact, (i, j) in zip(facts.reshape(B, -1).T, lines, strict=True):
            allowed = allowed * self.consistent[fact - self.count].reshape(B, *along(i, j)).astype(d.dtype)
        for i in range(1, k):
            joint = joint * d[:, i].reshape(B, *along(i))
        return (joint * allowed).reshape(B, -1).sum(axis=1)

    def check_shape(self, v: Tensor) -> None:
        if v.shape[1:] != (self.items, self.classes):
            raise ValueError(f"outputs must be (B, {self.items}, {self.classes}), got {v.shape}.")

    @cached_property
    def consistent(self):
        """Which pairs of classes agree with each fact: (n, K²) booleans on the device."""
        found = np.zeros((self.theory.atoms - self.count, self.classes**2), bool)
        for *pairs, fact in self.theory.clauses:
            if -fact > self.count:
                found[-fact - 1 - self.count, (np.array(pairs) - 1 - self.pairs_from) % self.classes**2] = True
        return self.to_device(found)


class Add(Reading):
    copies = (((0, 1), ((0, 1),)),)

    def make_theory(self, unique):
        return pair_theory(10, self.copies[0][1], sums(), "digit", "sum", unique)

    def facts(self, values, told):
        lines = self.copies[0][1]
        total = np.stack([values[:, i] + values[:, j] for i, j in lines], axis=1)
        return (self.count + 19 * np.arange(len(lines)) + total)[:, None]


class Add2x2(Add):
    copies = (((0, 1, 2, 3), LINES),)


class Apply2x2(Reading):
    classes = len(OPERATORS)
    copies = tuple((line, (line,)) for line in LINES)

    def make_theory(self, unique):
        results = applications()
        self.number = np.empty(
            (OPERANDS,) * 3 + (self.classes,) * 2, np.int64
        )  # of the fact, by a, b, c, two operators
        for n, ((a, b, c, _), pairs) in enumerate(results.items()):
            for first, second in pairs:
                self.number[a, b, c, first, second] = n
        return pair_theory(self.classes, ((0, 1),), results, "operator", "apply", unique)

    def told(self, rng, values):
        return whole_numbers(rng, (len(values), 3), OPERANDS)

    def facts(self, values, told):
        lines = [self.number[*told.T, values[:, i], values[:, j]] for i, j in LINES]
        return (self.count + np.stack(lines, axis=1))[:, :, None]


class Member(Reading):
    def __init__(self, kind: str, to_device=np.asarray, *, items: int) -> None:
        self.copies = ((tuple(range(items)), ()),)
        super().__init__(kind, to_device)

    def make_theory(self, unique):
        return member_theory(self.items, unique)

    def told(self, rng, values):
        """A number: for half of the examples that of an image, for the others one that is not among them."""
        among = (values[:, :, None] == np.arange(10)).any(axis=1)
        wanted = among == (rng.site("among").uniform((len(values), 1)) < 0.5)
        return np.where(wanted, rng.site("number").uniform(wanted.shape), 0.0).argmax(axis=1)[:, None]

    def facts(self, values, told):
        among = (values == told).any(axis=1)
        return (self.count + 2 * told[:, 0] + among)[:, None, None]

    def holds(self, d, facts):
        """Π (1 − dᵢ) if the number is not among them, else 1 − Π (1 − dᵢ); dᵢ is its probability at image i."""
        self.check_shape(d)
        fact = facts.reshape(-1) - self.count
        number = unchecked_one_hot(fact // 2, 10, d.data)
        absent = 1.0
        for i in range(self.items):
            absent = absent * (1.0 - (d[:, i] * number).sum(axis=1))
        return absent + (fact % 2).astype(d.dtype) * (1.0 - 2.0 * absent)


# ---- an input is completed, and what a network adds obeys a theory


class Paths:
    """x (B, 40), which edges are there and which nodes are ends  ->  logits (B, 24) of the edges of the path."""

    sizes = (40, 50, 50, 50, 50, 50, 24)  # of the network, as published
    first, count = SIDE * SIDE, 24

    def __init__(self, kind: str, to_device=np.asarray) -> None:
        self.kind, self.theory = kind, path_theory()

    def draw(self, rng: Rng, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """n examples (inputs (n, 40), facts (n, 1, 2), edges of a shortest path (n, 24)); of several shortest ones the
        first, by the numbers of its nodes. Ends that are not connected are drawn again."""
        inputs, paths, block = [], [], 0
        while len(inputs) < n:
            at = rng.site(block)
            there = at.site("edges").uniform((n, 24)).argsort(axis=1).argsort(axis=1) >= REMOVED
            ends = at.site("ends").uniform((n, SIDE * SIDE)).argsort(axis=1)[:, :2]
            for edges, (a, b) in zip(there, ends, strict=True):
                path = shortest_path(edges, int(a), int(b))
                if path is not None:
                    inputs.append(np.concatenate([edges, np.isin(np.arange(SIDE * SIDE), (a, b))]))
                    paths.append(path)
            block += 1
        inputs, paths = np.array(inputs[:n], np.float32), np.array(paths[:n], np.float32)
        return inputs, np.nonzero(inputs[:, 24:])[1].reshape(n, 1, 2), paths

    def splits(self, rng: Rng, *sizes: int) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Examples for each of these sizes."""
        return [self.draw(rng.site(n), size) for n, size in enumerate(sizes)]

    def truth(self, x: Tensor) -> Tensor:
        return binarise(sigmoid(x) if self.kind == "probability" else x, self.kind)

    def label_loss(self, x: Tensor, paths) -> Tensor:
        """−log of the labels' probability, for each edge: (B,)"""
        return bce_with_logits(x, paths) * (1.0 / 24)

    def answer(self, x, inputs):
        """The edges of the answer, (B, 24) zeros and ones; arrays."""
        return (x >= 0).astype(x.dtype)

    def right(self, answer, paths):
        """Which edges are those of the label, (B, 24) booleans."""
        return answer == paths

    def valid(self, answer: np.ndarray, inputs: np.ndarray) -> np.ndarray:
        """Whether an answer is one path between the ends over edges that are there, (B,) booleans; on the host."""
        return is_path(answer, inputs)


def shortest_path(edges: np.ndarray, start: int, end: int) -> np.ndarray | None:
    """Which edges (24,) a shortest path takes, by breadth-first search; None if there is none."""
    neighbours: list[list[tuple[int, int]]] = [[] for _ in range(SIDE * SIDE)]
    for n, (a, b) in enumerate(grid_edges()):
        if edges[n]:
            neighbours[a].append((b, n))
            neighbours[b].append((a, n))
    came, queue = {start: (start, -1)}, deque([start])
    while queue and end not in came:
        node = queue.popleft()
        for other, n in sorted(neighbours[node]):
            if other not in came:
                came[other] = node, n
                queue.append(other)
    if end not in came:
        return None
    path, node = np.zeros(24, bool), end
    while node != start:
        node, n = came[node]
        path[n] = True
    return path


def is_path(answer: np.ndarray, inputs: np.ndarray) -> np.ndarray:
    """Whether the edges (N, 24) of answers are one path between the ends, over edges that are there: (N,) booleans."""
    a, b = np.array(grid_edges()).T
    at = np.zeros((SIDE * SIDE, 24), int)
    at[a, np.arange(24)] = at[b, np.arange(24)] = 1
    degree, ends = answer @ at.T, inputs[:, 24:] > 0
    simple = np.where(ends, degree == 1, (degree == 0) | (degree == 2)).all(axis=1)
    # with such degrees, the edges are a path between the ends, and perhaps circles beside it: count what an end reaches
    reached = np.zeros_like(ends)
    reached[np.arange(len(ends)), ends.argmax(axis=1)] = True
    for _ in range(SIDE * SIDE - 1):
        touched = ((reached @ at) > 0) & (answer > 0)
        reached |= (touched @ at.T) > 0
    whole = (answer > 0).sum(axis=1) == reached.sum(axis=1) - 1
    return simple & whole & (answer <= inputs[:, :24]).all(axis=1)


class Sudoku4:
    """x (B, 64), the given cells, one-hot or 0  ->  logits (B, 64) of the digits of all cells."""

    sizes = (64, 128, 128, 64)
    first, count = 0, SIDE**3

    def __init__(self, kind: str, to_device=np.asarray) -> None:
        self.kind, self.theory = kind, board_theory(kind != "probability")

    def splits(self, rng: Rng, *sizes: int) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Examples (inputs (n, 64), facts (n, 1, 16), digits (n, 16)) for each of these sizes. Of the 288 boards, no
        two splits share one; all but the first have 48.

        As many cells as determine the board are given, in a random order, and up to three more.
        """
        boards = all_boards()
        boards = boards[rng.site("boards").permutation(len(boards))]
        cuts = [0, *(len(boards) - 48 * n for n in range(len(sizes) - 1, -1, -1))]
        return [self.draw(rng.site(n), size, boards[cuts[n] : cuts[n + 1]]) for n, size in enumerate(sizes)]

    def draw(self, rng: Rng, n: int, boards: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        digits = boards[whole_numbers(rng.site("board"), (n,), len(boards))]
        rank = rng.site("cells").uniform(digits.shape).argsort(axis=1).argsort(axis=1)
        more, given = whole_numbers(rng.site("more"), (n,), MOST_MORE + 1), np.zeros(digits.shape, bool)
        everything = all_boards()
        for row in range(n):
            fits = everything[:, rank[row].argsort()] == digits[row, rank[row].argsort()]
            needed = 1 + int((np.cumprod(fits, axis=1).sum(axis=0) == 1).argmax())
            given[row] = rank[row] < needed + more[row]
        inputs = (given[:, :, None] & (digits[:, :, None] == np.arange(SIDE))).reshape(n, -1)
        atoms = SIDE * np.arange(SIDE * SIDE) + digits
        return inputs.astype(np.float32), np.where(given, atoms, self.theory.atoms)[:, None], digits

    def truth(self, x: Tensor) -> Tensor:
        cells = x.reshape(len(x), SIDE * SIDE, SIDE)
        return binarise(softmax(cells) if self.kind == "probability" else cells, self.kind).reshape(x.shape)

    def label_loss(self, x: Tensor, digits) -> Tensor:
        """−log of the labels' probability, for each cell: (B,)"""
        return cross_entropy(x.reshape(len(x), SIDE * SIDE, SIDE), digits).mean(axis=1)

    def answer(self, x, inputs):
        """The board of the answer with the given cells as they are, (B, 64) zeros and ones; arrays."""
        cells, given = (a.reshape(len(x), SIDE * SIDE, SIDE) for a in (argmax_one_hot(x.reshape(-1, SIDE)), inputs))
        return array_module(x).where(given.any(axis=2, keepdims=True), given, cells).reshape(x.shape)

    def right(self, answer, digits):
        """Which cells are those of the label, (B, 16) booleans."""
        return answer.reshape(len(answer), SIDE * SIDE, SIDE).argmax(axis=2) == digits


def all_boards() -> np.ndarray:
    """The 288 boards that are filled by the rules, (288, 16) digits from 0."""
    rows = np.array(list(itertools.permutations(range(SIDE))))
    pairs = np.array([(a, b) for a in rows for b in rows if not (set(a[:2]) & set(b[:2]) or set(a[2:]) & set(b[2:]))])
    boards = np.array([np.concatenate([p, q]).reshape(-1) for p in pairs for q in pairs])
    columns = np.sort(boards.reshape(-1, SIDE, SIDE), axis=1)
    return boards[(columns == np.arange(SIDE)[:, None]).all(axis=(1, 2))]


READINGS = {
    "add": Add,
    "add2x2": Add2x2,
    "apply2x2": Apply2x2,
    "member3": partial(Member, items=3),
    "member5": partial(Member, items=5),
}
COMPLETIONS = {"paths": Paths, "sudoku4": Sudoku4}


# ---- images


def whole_numbers(rng: Rng, shape: tuple[int, ...], below: int) -> np.ndarray:
    """Uniform on 0 … below − 1."""
    return (rng.uniform(shape, like=np.empty(0)) * below).astype(np.int64)


def groups_of_images(images: int, n: int, k: int, rng: Rng) -> np.ndarray:
    """(n, k): which images are in each of n groups; every image is used as often as the others, but for one time."""
    rounds = -(-n * k // images)
    return np.concatenate([rng.site(r).permutation(images) for r in range(rounds)])[: n * k].reshape(n, k)


def operator_images(rng: Rng, n: int, side: int = 16) -> tuple[np.ndarray, np.ndarray]:
    """(n, side²) float32 in [0, 1] and (n,) labels: +, − and × (0, 1, 2) of bars somewhere near the middle, rotated by
    up to 0.25, of various lengths and widths, with noise of up to 0.3 in each pixel."""
    labels = np.arange(n) % len(OPERATORS)
    u = rng.site("shape").uniform((5, n, 1, 1), like=np.empty(0))
    grid = np.arange(side) - 0.5 * (side - 1)
    y, x = grid[:, None] + side * (0.2 * u[0] - 0.1), grid + side * (0.2 * u[1] - 0.1)
    angle = 0.5 * u[2] - 0.25 + np.where(labels == 2, 0.25 * math.pi, 0.0)[:, None, None]
    along, across = abs(x * np.cos(angle) + y * np.sin(angle)), abs(y * np.cos(angle) - x * np.sin(angle))
    length, width = side * (0.25 + 0.12 * u[3]), side * (0.04 + 0.05 * u[4])
    bar = lambda along, across: np.clip(np.minimum(length - along, width - across) + 0.5, 0.0, 1.0)
    ink = np.where((labels == 1)[:, None, None], 0.0, bar(across, along))
    ink = np.maximum(bar(along, across), ink) + 0.3 * rng.site("noise").uniform(ink.shape, like=ink)
    return np.clip(ink, 0.0, 1.0).reshape(n, -1).astype(np.float32), labels
