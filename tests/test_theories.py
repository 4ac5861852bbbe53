"""The problems under constraints: their theories mean what they say, examples are drawn as described."""

import functools
from collections import Counter

import numpy as np
import pytest

from minigrad import Rng, Tensor
from minigrad.check import gradcheck
from minigrad.fused import softmax
from minigrad.ops import log
from minigrad.optim import Adam
from models.cnf import BINARISERS, Given, constraint_loss, satisfied
from models.constraints import ConvNet
from models.theories import (
    COMPLETIONS,
    READINGS,
    Paths,
    Sudoku4,
    all_boards,
    apply,
    grid_edges,
    groups_of_images,
    is_path,
    operator_images,
    shortest_path,
)

READS = pytest.mark.parametrize("name", READINGS)
made = functools.cache(lambda name, kind="probability": (READINGS | COMPLETIONS)[name](kind))
SIZES = {  # (atoms, clauses) with probabilities, as published, and with logits
    "add": ((119, 19), (139, 111)),
    "add2x2": ((476, 76), (516, 260)),
    "apply2x2": ((10606, 10597), (10612, 10605)),
    "member3": ((50, 40), (50, 178)),
    "member5": ((70, 60), (70, 290)),
    "paths": ((40, 68), (40, 68)),
    "sudoku4": ((64, 336), (64, 448)),
}


def examples(problem, n=300, seed=0):
    """(classes (n, k), facts of others, which are sometimes true of them)"""
    rng = np.random.default_rng(seed)
    values, others = rng.integers(0, problem.classes, (2, n, problem.items))
    others[::3] = values[::3]
    others[1::3, 0] = values[1::3, 0]
    told = problem.told(Rng(seed), others)
    return values, told, problem.facts(others, told)


def meant(values, told, facts, problem):
    """Whether the facts are true of the classes, in words."""
    return (problem.facts(values, told) == facts).all(axis=(1, 2))


@pytest.mark.parametrize("name", SIZES)
def test_a_theory_has_the_published_size(name):
    for kind, size in zip(("probability", "clipped"), SIZES[name], strict=True):
        theory = made(name, kind).theory
        assert (theory.atoms, len(theory.clauses)) == size
        assert len(set(theory.names)) == theory.atoms


def test_the_clauses_are_those_of_the_authors_files():
    add = made("add").theory.clauses
    assert add[:3] == ((1, -101), (2, 11, -102), (3, 12, 21, -103))
    assert add[-2:] == ((90, 99, -118), (100, -119))
    of_apply = {frozenset(clause) for clause in made("apply2x2").theory.clauses}
    assert {frozenset((*range(1, 10), -10)), frozenset((3, 6, 7, 8, 9, -42)), frozenset((2, 4, 9, -45))} <= of_apply
    ends = Paths("probability").theory.clauses
    assert ends[0] == (-1, 17, 29)  # the corner (0, 0), with its edges along the first row and the first column
    assert ends[16] == (-1, -17, -29)


@READS
@pytest.mark.parametrize("kind", BINARISERS)
@pytest.mark.daily(8)
def test_an_answer_satisfies_the_theory_exactly_if_the_facts_are_true_of_it(name, kind):
    problem = made(name, kind)
    values, told, facts = examples(problem)
    given = Given(problem.theory, problem.first, problem.count)(facts.reshape(-1, facts.shape[2]))
    v = problem.answer(values, np.zeros(0))
    good = satisfied(v, given).reshape(len(values), -1).all(axis=1)
    true = meant(values, told, facts, problem)
    np.testing.assert_array_equal(good, true)
    assert 0.1 < true.mean() < 0.9
    total = sum(part.item() for part in constraint_loss(Tensor(v), given))
    assert total > 0.0
    of_true = problem.facts(values, told)
    clauses = Given(problem.theory, problem.first, problem.count)(of_true.reshape(-1, of_true.shape[2]))
    assert sum(part.item() for part in constraint_loss(Tensor(v), clauses)) == 0.0


def test_the_facts_are_what_their_names_say():
    for name in READINGS:
        problem = made(name)
        values, told, _ = examples(problem, 20)
        facts, names = problem.facts(values, told), problem.theory.names
        for v, t, fact in zip(values.tolist(), told.tolist(), facts, strict=True):
            said = [names[n] for n in fact.reshape(-1)]
            if name == "add":
                assert said == [f"sum({v[0] + v[1]})"]
            elif name == "add2x2":
                lines = ((0, 1), (2, 3), (0, 2), (1, 3))
                assert said == [f"sum({i},{j},{v[i] + v[j]})" for i, j in lines]
            elif name == "apply2x2":
                signs = [("+", "-", "*")[c] for c in v]
                lines = ((0, 1), (2, 3), (0, 2), (1, 3))
                results = [eval(f"({t[0]}{signs[i]}{t[1]}){signs[j]}{t[2]}") for i, j in lines]
                assert said == [f"apply({t[0]},{t[1]},{t[2]},{r})" for r in results]
            else:
                assert said == [f"in({t[0]},{int(t[0] in v)})"]


@pytest.mark.parametrize("name", ["add", "add2x2", "apply2x2", "member3"])
def test_the_probability_of_the_facts_is_the_sum_over_all_outcomes(name):
    problem = made(name)
    values, told, facts = examples(problem, 4)
    p = np.random.default_rng(1).dirichlet(np.ones(problem.classes), (4, problem.items))
    outcomes, total = np.indices((problem.classes,) * problem.items).reshape(problem.items, -1).T, []
    for row, t, fact in zip(p, told, facts, strict=True):
        true = meant(outcomes, np.tile(t, (len(outcomes), 1)), fact, problem)
        total.append((true * np.prod([row[i, outcomes[:, i]] for i in range(problem.items)], axis=0)).sum())
    np.testing.assert_allclose(problem.holds(Tensor(p), facts).data, total, rtol=1e-12)
    gradcheck(lambda d: 1e3 * problem.holds(d, facts).sum(), [p])
    onehots = np.eye(problem.classes)[values]
    true = meant(values, told, facts, problem)
    np.testing.assert_array_equal(problem.holds(Tensor(onehots), facts).data, true.astype(float))


def test_probabilities_are_multiplied_before_they_become_truth_values_and_logits_after():
    x = np.zeros((1, 2, 10))
    x[0, 0, 3], x[0, 1, 5] = 3.0, 3.0  # 0.69 each, 0.48 together
    assert not made("add").truth(Tensor(x)).data.any()
    x[0, 1, 5] = 9.0
    (pair,) = np.flatnonzero(made("add").truth(Tensor(x)).data[0])
    assert made("add").theory.names[pair] == "digits(0,3,1,5)"
    x -= 1.0
    problem = made("add", "identity")
    names = {problem.theory.names[n] for n in np.flatnonzero(problem.truth(Tensor(x)).data[0])}
    assert names == {"digit(0,3)", "digit(1,5)", "digits(0,3,1,5)"}


def test_half_of_the_numbers_are_among_the_images():
    problem = made("member5")
    values = np.random.default_rng(0).integers(0, 10, (4000, 5))
    told = problem.told(Rng(0), values)
    among = (values == told).any(axis=1)
    assert among.mean() == pytest.approx(0.5, abs=0.03)
    assert min(Counter(told[:, 0].tolist()).values()) > 300


@READS
def test_a_reading_stays_on_the_device(name, backend):
    for kind in ("probability", "clipped"):
        problem, moved = made(name, kind), READINGS[name](kind, backend.to_device)
        values, _, facts = examples(problem, 6)
        x = np.random.default_rng(0).standard_normal((6, problem.items, problem.classes))
        there = Tensor(backend.to_device(x)), backend.to_device(facts), backend.to_device(values)
        same = lambda a, b: np.testing.assert_array_equal(a, backend.to_host(b))
        same(problem.truth(Tensor(x)).data, moved.truth(there[0]).data)
        same(problem.holds(Tensor(x), facts).data, moved.holds(there[0], there[1]).data)
        same(problem.answer(values, x), moved.answer(there[2], there[0].data))


# ---- paths


def distances(edges):
    """All distances in the grid with these edges, by relaxing them 16 times."""
    d = np.where(np.eye(16, dtype=bool), 0, 99)
    for _ in range(16):
        for n, (a, b) in enumerate(grid_edges()):
            if edges[n]:
                for s, t in ((a, b), (b, a)):
                    d[:, t] = np.minimum(d[:, t], d[:, s] + 1)
    return d


def test_labels_are_shortest_paths_and_none_where_the_ends_are_not_connected():
    rng = np.random.default_rng(0)
    lost = 0
    for _ in range(200):
        edges = rng.random(24) < 0.6
        a, b = rng.permutation(16)[:2]
        path, length = shortest_path(edges, a, b), distances(edges)[a, b]
        lost += path is None
        assert (path is None) == (length == 99)
        if path is not None:
            inputs = np.concatenate([edges, np.isin(np.arange(16), (a, b))])
            assert path.sum() == length
            assert is_path(path[None].astype(int), inputs[None].astype(int)).all()
    assert 0 < lost < 100


def test_what_is_no_path_is_seen():
    edges = grid_edges()
    inputs = np.concatenate([np.ones(24), np.isin(np.arange(16), (0, 2))])
    inputs[edges.index((4, 5))] = 0
    which = lambda *pairs: np.isin(np.arange(24), [edges.index(pair) for pair in pairs]).astype(float)
    detour = ((0, 4), (4, 8), (8, 9), (5, 9), (1, 5), (1, 2))
    circle = ((10, 11), (14, 15), (10, 14), (11, 15))
    answers = {
        "straight": (which((0, 1), (1, 2)), True),
        "a detour": (which(*detour), True),
        "over an edge that is gone": (which((0, 4), (4, 5), (1, 5), (1, 2)), False),
        "not to its end": (which((0, 1)), False),
        "a branch": (which((0, 1), (1, 2), (1, 5)), False),
        "a circle beside it": (which((0, 1), (1, 2), *circle), False),
        "two ends, each with an edge": (which((0, 4), (2, 6)), False),
        "nothing": (which(), False),
    }
    for name, (answer, good) in answers.items():
        assert is_path(answer[None], inputs[None])[0] == good, name


@pytest.mark.parametrize("problem", COMPLETIONS)
def test_labels_satisfy_the_theory_and_examples_are_fixed_by_the_seed(problem):
    problem = COMPLETIONS[problem]("probability")
    train, valid = problem.splits(Rng(3), 200, 60)
    again, _ = problem.splits(Rng(3), 200, 60)
    other, _ = problem.splits(Rng(4), 200, 60)
    for a, b, c in zip(train, again, other, strict=True):
        np.testing.assert_array_equal(a, b)
        assert (a != c).any()
    for inputs, facts, labels in (train, valid):
        v = labels if labels.shape[1] == 24 else np.eye(4)[labels].reshape(len(labels), -1)
        given = Given(problem.theory, problem.first, problem.count)(facts[:, 0])
        assert satisfied(v.astype(float), given).all()
        assert problem.right(v, labels).all()
        logits = (2.0 * v - 1.0).astype(np.float32)
        np.testing.assert_array_equal(problem.answer(logits, inputs), v)
        np.testing.assert_array_equal(problem.truth(Tensor(9.0 * logits)).data, v)
        assert problem.label_loss(Tensor(9.0 * logits), labels).data.max() < 1e-3
        assert problem.label_loss(Tensor(-9.0 * logits), labels).data.min() > 1.0


def test_eight_edges_are_gone_and_two_nodes_are_ends():
    (inputs, facts, paths), *_ = Paths("probability").splits(Rng(0), 100)
    assert set(inputs[:, :24].sum(axis=1)) == {16.0}
    for row, fact, path in zip(inputs, facts[:, 0], paths, strict=True):
        np.testing.assert_array_equal(np.flatnonzero(row[24:]), fact)
        assert (path <= row[:24]).all()


# ---- Sudokus


def test_there_are_288_boards_and_the_theory_has_these_models_alone():
    boards = all_boards()
    assert len(boards) == len(np.unique(boards, axis=0)) == 288
    for kind in ("probability", "identity"):
        theory = Sudoku4(kind).theory
        v = np.eye(4)[boards].reshape(288, 64)
        assert theory.holds(v).all()
        for cell in range(16):  # another digit in one cell
            wrong = boards.copy()
            wrong[:, cell] = (wrong[:, cell] + 1) % 4
            assert not theory.holds(np.eye(4)[wrong].reshape(288, 64)).all(axis=1).any()
        assert not theory.holds(np.zeros((1, 64))).all()


def test_a_puzzle_has_one_solution_and_its_board_is_in_one_split():
    boards, found = all_boards(), []
    for inputs, facts, digits in Sudoku4("probability").splits(Rng(0), 300, 60, 60):
        cells = inputs.reshape(-1, 16, 4)
        for row, fact, label in zip(cells, facts[:, 0], digits, strict=True):
            given = row.any(axis=1)
            fits = (boards[:, given] == label[given]).all(axis=1)
            assert fits.sum() == 1
            np.testing.assert_array_equal(boards[fits][0], label)
            np.testing.assert_array_equal(np.sort(fact[fact < 64]), np.flatnonzero(row.reshape(-1)))
        found.append({tuple(label) for label in digits})
    assert not found[0] & found[1]
    assert not found[0] & found[2]
    assert not found[1] & found[2]


def test_a_given_cell_of_an_answer_is_as_given():
    problem = Sudoku4("probability")
    (inputs, _, digits), *_ = problem.splits(Rng(0), 50, 1)
    x = Rng(1).normal((50, 64))
    cells = problem.answer(x, inputs).reshape(50, 16, 4)
    given = inputs.reshape(50, 16, 4).any(axis=2)
    np.testing.assert_array_equal(cells.argmax(axis=2)[given], digits[given])
    np.testing.assert_array_equal(cells.argmax(axis=2)[~given], x.reshape(50, 16, 4).argmax(axis=2)[~given])


def test_a_given_cell_makes_its_neighbours_deducible():
    problem = Sudoku4("probability")
    given = Given(problem.theory, 0, 64)(np.array([[0, *[64] * 15]]))  # the corner is 1
    single = given.open & ((given.sign != 0).sum(axis=0) == 1)
    atoms = {int(given.atom[n, 0, r]) for r in np.flatnonzero(single[0]) for n in np.flatnonzero(given.sign[:, 0, r])}
    assert atoms == {4 * cell for cell in (1, 2, 3, 4, 8, 12, 5)}  # no 1 in its row, column and box


# ---- images


@READS
def test_outputs_for_another_number_of_images_are_refused(name):
    """An image too many would not be looked at."""
    problem = made(name)
    for more in ((1, 0), (-1, 0), (0, 1), (0, -1)):
        x = Tensor(np.zeros((2, problem.items + more[0], problem.classes + more[1])))
        for used in (problem.truth, lambda x: problem.holds(x, None)):
            with pytest.raises(ValueError, match=r"outputs must be \(B, "):
                used(x)


def test_every_image_is_used_as_often_as_the_others():
    for n, k, images in ((10, 2, 40), (100, 3, 7), (5, 2, 10)):
        groups = groups_of_images(images, n, k, Rng(0))
        assert groups.shape == (n, k)
        counts = np.bincount(groups.reshape(-1), minlength=images)
        assert counts.max() - counts.min() <= 1
    assert (groups_of_images(40, 10, 2, Rng(0)) != groups_of_images(40, 10, 2, Rng(1))).any()


def test_drawn_operators_are_images_of_their_labels():
    images, labels = operator_images(Rng(0), 300)
    assert images.dtype == np.float32
    assert (images.min() >= 0.0, images.max() <= 1.0, images.max() > 0.9) == (True, True, True)
    assert Counter(labels.tolist()) == {0: 100, 1: 100, 2: 100}
    ink = np.clip(images - 0.3, 0.0, 1.0).sum(axis=1)
    assert ink[labels == 1].mean() < 0.7 * ink[labels == 0].mean()  # one bar, and two
    assert ink[labels == 2].mean() == pytest.approx(ink[labels == 0].mean(), rel=0.1)
    mean = [images[labels == c].mean(axis=0).reshape(16, 16) for c in (0, 1, 2)]
    assert mean[0][8, 4] > 0.5 > mean[2][8, 3]  # along an axis, and along a diagonal
    assert mean[2][5, 5] > mean[0][4, 4] + 0.1
    np.testing.assert_array_equal(images, operator_images(Rng(0), 300)[0])


def test_an_operation_is_applied_from_left_to_right():
    assert apply(2, 3, 4, 0, 2) == 20  # (2 + 3) · 4
    np.testing.assert_array_equal(apply(np.array([5, 1]), 7, 3, np.array([1, 2]), np.array([2, 1])), [-6, 4])


def test_the_network_has_the_published_layers():
    model = ConvNet((28, 28), 10, rng=Rng(0))
    shapes = [p.shape for p in model.parameters()]
    assert shapes[::2] == [(1, 5, 5, 6), (6, 5, 5, 16), (256, 120), (120, 84), (84, 10)]
    assert model(np.zeros((3, 784), np.float32)).shape == (3, 10)
    gradcheck(lambda w: (model_with(w)(X) ** 2).sum(), [SMALL_WEIGHT], tolerance=1e-4)
    with pytest.raises(ValueError, match="16 × 16"):
        ConvNet((8, 8), 10, rng=Rng(0))


X = Rng(5).uniform((2, 256), like=np.empty(0))
SMALL_WEIGHT = 0.1 * Rng(6).normal((84, 2), like=np.empty(0))


def model_with(w):
    model = ConvNet((16, 16), 2, rng=Rng(0), dtype=np.float64)
    model.dense.layers[-1].weight = w
    return model


WRONG = {  # digits that are all wrong, and keep the sum of two if one is of the first kind and the other of the second
    "even and odd": np.arange(10) ^ 1,
    "small and large": np.where(np.arange(10) < 5, np.arange(10) + 3, np.arange(10) - 3),
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_wrong_digits_can_satisfy_half_of_the_sums(wrong):
    problem = made("add")
    values = np.stack(np.divmod(np.arange(100), 10), axis=1)
    true = problem.holds(Tensor(np.eye(10)[wrong[values]]), problem.facts(values, values[:, :0])).data
    raised = wrong > np.arange(10)
    np.testing.assert_array_equal(true, (raised[values].sum(axis=1) == 1).astype(float))
    assert true.sum() == 50
    assert (wrong != np.arange(10)).all()


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("method", ["exact", "constraint"])
def test_logits_that_start_at_such_digits_stay_there(method, wrong):
    """A table of logits for each digit, all pairs in each step. The least loss would be 0."""
    problem = made("add")
    values = np.stack(np.divmod(np.arange(100), 10), axis=1)
    facts = problem.facts(values, values[:, :0])
    given = Given(problem.theory, 0, 100)(facts[:, 0])
    table = Tensor(4.0 * np.eye(10)[wrong] + 0.2 * Rng(0).normal((10, 10), like=np.empty(0)), requires_grad=True)
    optimizer, losses = Adam([table], 0.02), []
    for _ in range(300):
        optimizer.zero_grad()
        x = table[values]
        if method == "exact":
            loss = -log(problem.holds(softmax(x), facts)).mean()
        else:
            loss = sum(constraint_loss(problem.truth(x), given))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    np.testing.assert_array_equal(table.data.argmax(axis=1), wrong)
    assert losses[-1] > 0.4
