"""Binary trees over a sequence of T tokens, written as the T − 1 merges that build them.

A tree is an array of integers (T − 1,): at step k the neighbours at positions choices[k] and choices[k] + 1 of what is
left, T − k nodes, become one. It is what a latent-tree LSTM chooses. Different orders of merging can build one tree;
`spans` tells trees apart.
"""

from __future__ import annotations

import numpy as np

from .data.listops import CLOSE


def left_branching(T: int) -> np.ndarray:
    """((a b) c) d"""
    return np.zeros(T - 1, np.int64)


def right_branching(T: int) -> np.ndarray:
    """a (b (c d))"""
    return np.arange(T - 2, -1, -1)


def balanced(T: int) -> np.ndarray:
    """Both halves of every span have the same length, or the left one is one token longer."""
    choices: list[int] = []

    def build(offset, size):
        if size > 1:
            build(offset, size - size // 2)
            build(offset + 1, size // 2)
            choices.append(offset)

    build(0, T)
    return np.array(choices, np.int64)


def random(T: int, rng) -> np.ndarray:
    """At every step any pair with the same probability.   rng: a `minigrad.Rng`"""
    remaining = np.arange(T - 1, 0, -1)
    return (rng.uniform((T - 1,), like=np.empty(0, np.float64)) * remaining).astype(np.int64)


def gold(tokens: bytes, split: bool = False) -> np.ndarray:
    """The parse of a ListOps sequence, (((op a) b) ]): every list is left-branching, as in the published files.

    split: the bracket and the name of an operator are two tokens, which are merged first.
    """
    choices: list[int] = []
    size = nesting = 0  # of a shift-reduce parser: how many nodes are on its stack, and how many lists are open

    def reduce():
        nonlocal size
        choices.append(size - 2)
        size -= 1

    for token in tokens:
        size += 1
        if 10 <= token < CLOSE:  # a bracket with its operator
            nesting += 1
            if split:
                size += 1
                reduce()
        else:
            if nesting:
                reduce()
            if token == CLOSE:
                nesting -= 1
                if nesting:
                    reduce()
    return np.array(choices, np.int64)


def spans(choices) -> list[tuple[int, int]]:
    """The (start, end) of every merge, in order; the end is exclusive, the last one is the whole sequence."""
    nodes, merged = [(i, i + 1) for i in range(len(choices) + 1)], []
    for at in choices:
        nodes[at : at + 2] = [(nodes[at][0], nodes[at + 1][1])]
        merged.append(nodes[at])
    return merged


def f1(choices, other) -> float:
    """Unlabelled F1 of two binary trees over one sequence of T ≥ 3 tokens: the share of common spans.

    Single tokens and the whole sequence, which any two trees have in common, do not count. Both trees have T − 2 spans
    left, so precision, recall and F1 are one number in [0, 1]. ValueError for trees of different or smaller size.
    """
    if len(choices) != len(other) or len(choices) < 2:
        raise ValueError(f"two trees of at least 3 tokens each are needed, got {len(choices) + 1}, {len(other) + 1}.")
    return len(set(spans(choices)[:-1]) & set(spans(other)[:-1])) / (len(choices) - 1)


def bracket(tokens, choices) -> str:
    """The tree as text, ( ( a b ) c ).   tokens: T words"""
    nodes = list(tokens)
    for at in choices:
        nodes[at : at + 2] = [f"( {nodes[at]} {nodes[at + 1]} )"]
    return nodes[0]


def levels(choices, lengths, T: int):
    """How to build the trees of a batch from below, as many merges at a time as possible.

    choices (B, T−1), of which row b uses the first lengths[b] − 1.   Nodes are numbered: leaf t of row b is b T + t,
    and the n-th merge of all, in the order of the levels, is B T + n.
    -> (left, right (n,): the nodes merged;  starts: where each level begins, and n;  root (B,)), all on the
    host.  ValueError for choices that are no tree.
    """
    leaves, merges, roots = len(lengths) * T, [], []
    for b, (row, n) in enumerate(zip(choices, lengths, strict=True)):
        if len(row) < n - 1 or any(not 0 <= at < n - 1 - k for k, at in enumerate(row[: n - 1])):
            raise ValueError(
                f"row {b} has {n} tokens, but its choices are not a tree over them: "
                f"choice k must be at least 0 and below {n - 1} − k."
            )
        # (level, number); the merges are numbered in the order of the choices at first
        nodes = [(0, b * T + t) for t in range(n)]
        for at in row[: n - 1]:
            (level_l, l), (level_r, r) = nodes[at : at + 2]
            new_level = max(level_l, level_r) + 1
            nodes[at : at + 2] = [(new_level, leaves + len(merges))]
            merges.append((new_level, l, r))
        roots.append(nodes[0][1])
    depth = max((level for level, _, _ in merges), default=0)
    level, left, right = np.array(merges, np.int64).reshape(-1, 3).T
    order = np.argsort(level, kind="stable")
    number = np.arange(leaves + len(order))  # from the order of the choices to the order of the levels
    number[leaves + order] = leaves + np.arange(len(order))
    starts = np.searchsorted(level[order], np.arange(1, depth + 2)).tolist()
    return number[left[order]], number[right[order]], starts, number[np.array(roots, np.int64)]
