"""Trees as merges: each kind is valid, the gold ones are what the brackets say, and levels build what merges build."""

from itertools import pairwise

import numpy as np
import pytest

from minigrad import Rng
from models import trees
from models.data import listops

KINDS = {
    "left": trees.left_branching,
    "right": trees.right_branching,
    "balanced": trees.balanced,
    "random": lambda T: trees.random(T, Rng(T)),
}


@pytest.fixture(scope="module")
def sequences():
    return [tokens for tokens, _ in listops.generate(300, seed=5) if len(tokens) <= 120]


def check(choices, T):
    """T − 1 merges of neighbours that exist, T − 1 different spans, the last of them the whole sequence."""
    assert choices.shape == (T - 1,)
    assert choices.dtype == np.int64
    assert (choices >= 0).all()
    assert (choices < np.arange(T - 1, 0, -1)).all()
    found = trees.spans(choices)
    assert len(set(found)) == T - 1
    assert all(end - start >= 2 for start, end in found)
    if T > 1:
        assert found[-1] == (0, T)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("T", [1, 2, 3, 4, 7, 8, 33])
def test_every_kind_of_tree_is_a_series_of_valid_merges(kind, T):
    check(KINDS[kind](T), T)


def test_the_fixed_trees_have_the_shapes_of_their_names():
    words = list("abcde")
    assert trees.bracket(words, trees.left_branching(5)) == "( ( ( ( a b ) c ) d ) e )"
    assert trees.bracket(words, trees.right_branching(5)) == "( a ( b ( c ( d e ) ) ) )"
    assert trees.bracket(words, trees.balanced(5)) == "( ( ( a b ) c ) ( d e ) )"
    assert trees.bracket(words[:4], trees.balanced(4)) == "( ( a b ) ( c d ) )"
    assert trees.bracket(words[:1], trees.balanced(1)) == "a"


def test_random_trees_choose_every_pair_with_the_same_probability():
    drawn = np.array([trees.random(4, Rng(1).at(i)) for i in range(1500)])
    for column, choices in enumerate((3, 2, 1)):
        share = np.bincount(drawn[:, column], minlength=choices) / len(drawn)
        np.testing.assert_allclose(share, 1.0 / choices, atol=4.0 * np.sqrt(0.25 / len(drawn)))
    np.testing.assert_array_equal(trees.random(9, Rng(1).at(3)), trees.random(9, Rng(1).at(3)))


# ---- gold trees


def published_spans(text):
    """The spans of all parentheses of a line in the published notation, and its tokens, by a parser of its own."""
    found, opened, words = set(), [], []
    for word in text.split():
        if word == "(":
            opened.append(len(words))
        elif word == ")":
            found.add((opened.pop(), len(words)))
        else:
            words.append(word)
    assert not opened
    return found, words


def test_gold_trees_are_the_parentheses_of_the_published_notation(sequences):
    for tokens in sequences:
        choices = trees.gold(tokens)
        check(choices, len(tokens))
        found, words = published_spans(listops.render(tokens))
        assert set(trees.spans(choices)) == found
        assert trees.bracket(words, choices) == listops.render(tokens)


def test_gold_trees_of_split_operators_merge_the_bracket_and_its_operator_first(sequences):
    tokenizer = listops.Tokenizer(split=True)
    for tokens in sequences:
        ids, choices = tokenizer(tokens), trees.gold(tokens, split=True)
        check(choices, len(ids))
        heads = {(i, i + 2) for i in np.flatnonzero(ids == tokenizer.tokens.index("["))}
        found = trees.spans(choices)
        assert heads <= set(found)
        # with brackets and operators joined again it is the tree of one-token operators
        place = np.cumsum(np.concatenate([[True], ids[:-1] != tokenizer.tokens.index("[")])) - 1
        place = np.append(place, len(tokens))
        joined = {(place[start], place[end]) for start, end in found if (start, end) not in heads}
        assert joined == set(trees.spans(trees.gold(tokens)))
        for start, end in heads:  # nothing else is built from a bracket before its operator is
            assert found.index((start, end)) == min(i for i, (s, e) in enumerate(found) if s <= start < e)


# ---- comparisons


def test_spans_and_f1():
    assert trees.spans([0, 1, 0]) == [(0, 2), (2, 4), (0, 4)]
    assert trees.spans([2, 0, 0]) == [(2, 4), (0, 2), (0, 4)]
    assert trees.f1([0, 1, 0], [2, 0, 0]) == 1.0  # one tree, built in two orders
    assert trees.f1(trees.left_branching(4), trees.balanced(4)) == 0.5
    for T in (3, 4, 5, 9, 30):
        left, right, chance = trees.left_branching(T), trees.right_branching(T), trees.random(T, Rng(T))
        for tree in (left, right, chance, trees.balanced(T)):
            assert trees.f1(tree, tree) == 1.0
        assert trees.f1(left, right) == 0.0
        assert trees.f1(left, chance) == trees.f1(chance, left)


@pytest.mark.parametrize(("T", "other"), [(4, 5), (5, 4), (2, 2), (1, 1)])
def test_trees_that_cannot_be_compared_are_an_error(T, other):
    with pytest.raises(ValueError, match=f"of at least 3 tokens each are needed, got {T}, {other}"):
        trees.f1(trees.left_branching(T), trees.left_branching(other))


# ---- levels


def batch_of(lengths, T, rng):
    choices = np.full((len(lengths), T - 1), 99, np.int64)  # what is behind a row's merges must not matter
    for row, n in enumerate(lengths):
        choices[row, : n - 1] = trees.random(n, rng.at(row))
    return choices


def check_levels(choices, lengths, T):
    left, right, starts, root = trees.levels(choices, np.array(lengths), T)
    span = {b * T + t: (b, t, t + 1) for b, n in enumerate(lengths) for t in range(n)}
    height = dict.fromkeys(span, 0)
    assert starts[0] == 0
    assert starts[-1] == len(left) == len(right) == sum(n - 1 for n in lengths)
    for level, (start, end) in enumerate(pairwise(starts), start=1):
        assert start < end
        for n in range(start, end):
            new, l, r = len(lengths) * T + n, int(left[n]), int(right[n])
            # both parts are there before the level begins, and one of them not before: no merge could come earlier
            assert max(height[l], height[r]) == level - 1
            (b, begin, middle), (same, again, stop) = span[l], span[r]
            assert (b, middle) == (same, again)
            span[new], height[new] = (b, begin, stop), level
    for b, n in enumerate(lengths):
        built = {(s, e) for node, (row, s, e) in span.items() if row == b and height[node]}
        assert built == set(trees.spans(choices[b][: n - 1]))
        assert span[int(root[b])] == (b, 0, n)


@pytest.mark.parametrize("lengths", [[1], [2], [1, 1], [5], [9, 1, 2, 7, 9, 3], [4, 30, 17, 2, 29]])
@pytest.mark.parametrize("seed", range(4))
def test_levels_build_the_same_spans(lengths, seed):
    T = max(lengths)
    check_levels(batch_of(lengths, T, Rng(seed)), lengths, T)
    check_levels(batch_of(lengths, T + 3, Rng(seed)), lengths, T + 3)  # more padding than the longest needs


@pytest.mark.parametrize("row", [[], [0], [2, 0], [0, 1], [-1, 0]])
def test_choices_that_are_no_tree_are_refused(row):
    with pytest.raises(ValueError, match="row 1 has 3 tokens, but its choices are not a tree over them"):
        trees.levels([[0, 0], row], np.array([3, 3]), 3)


def test_a_level_holds_as_many_merges_as_possible():
    starts = lambda choices: trees.levels(choices[None], np.array([len(choices) + 1]), len(choices) + 1)[2]
    assert starts(trees.balanced(8)) == [0, 4, 6, 7]
    assert starts(trees.left_branching(5)) == [0, 1, 2, 3, 4]
    assert starts(trees.right_branching(5)) == [0, 1, 2, 3, 4]


# ---- long and deep


@pytest.mark.parametrize("kind", KINDS)
def test_long_sequences(kind):
    T = 1200  # above the interpreter's limit on recursion, which a tree as deep as it is long would hit
    choices = KINDS[kind](T)
    check(choices, T)
    assert trees.f1(choices, choices) == 1.0
    assert trees.bracket(["x"] * T, choices).count("(") == T - 1
    assert trees.levels(choices[None], np.array([T]), T)[3] == [2 * T - 2]


@pytest.mark.parametrize("split", [False, True])
def test_deeply_nested_lists(split):
    depth, (least, close) = 600, (listops.TOKENS.index("[MIN"), listops.CLOSE)
    for tokens in (
        bytes([least, 1] * depth + [2] + [close] * depth),
        bytes([least] * depth + [2] + [1, close] * depth),
    ):
        assert listops.depth(tokens) == depth
        choices = trees.gold(tokens, split)
        check(choices, len(listops.Tokenizer(split)(tokens)))
        if not split:
            assert set(trees.spans(choices)) == published_spans(listops.render(tokens))[0]
