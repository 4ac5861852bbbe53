"""Theories and their loss: by enumerating all assignments of small theories, by finite differences, by bad files."""

import itertools

import numpy as np
import pytest

from minigrad import Tensor
from minigrad.check import audit, check_rule
from models.cnf import (
    BINARISERS,
    Clauses,
    Given,
    Theory,
    TheoryError,
    binarise,
    clause_values,
    constraint_loss,
    satisfied,
    step_at,
)

# two inputs (atoms 4 and 5), three atoms of a network; clauses with and without inputs, and of one to four literals
SMALL = Theory(((1, -2, 3), (-1, 2, -4), (3, -4, -5), (-3, 1, 2, 5), (-2, -3)), 5)
FREE = Theory(((1, 2, 3), (-1, -2), (-1, -3), (-2, -3), (3,)), 3)
ASSIGNMENTS = np.array(list(itertools.product((0.0, 1.0), repeat=3)))
FACTS = [(), (3,), (4,), (3, 4), (0,), (1, 4), (0, 2, 3)]  # atoms that are true, from 0
PARTS = ("deduce", "unsat", "sat")


def padded(facts, theory, rows):
    """The same facts for each row, with places for four."""
    return np.tile(np.array([*facts, *[theory.atoms] * (4 - len(facts))]), (rows, 1))


def by_hand(theory, facts, v, first=0, count=3):
    """(g, [(literals that are open as (atom, sign), is the clause open?)]) with loops over the definitions."""
    truth = dict.fromkeys(facts, 1)
    truth |= {a: 0 for a in range(theory.atoms) if not first <= a < first + count and a not in truth}
    found = []
    for clause in theory.clauses:
        literals, is_open = [], True
        for literal in clause:
            atom, sign = abs(literal) - 1, 1 if literal > 0 else -1
            if atom not in truth:
                literals.append((atom - first, sign))
            elif truth[atom] == (sign > 0):
                is_open = False
        found.append((literals, is_open))
    return found


def expected(theory, facts, v, normalise):
    """The three losses and their gradients (B, n), B examples with the same facts, by loops."""
    losses, gradients = dict.fromkeys(PARTS, 0.0), {part: np.zeros_like(v) for part in PARTS}
    entries = {part: [] for part in PARTS}  # (example, value, {atom: derivative})
    for b, row in enumerate(v):
        clauses = by_hand(theory, facts, row)
        looked_at = [c for c in clauses if c[1] or normalise == "all"]
        for literals, is_open in looked_at:
            L = [row[a] if s > 0 else 1.0 - row[a] for a, s in literals]
            unsat = float(np.prod([1.0 - x for x in L]))
            d_unsat, d_keep = {}, {}
            for n, (a, s) in enumerate(literals):
                others = np.prod([1.0 - x for m, x in enumerate(L) if m != n])
                d_unsat[a], d_keep[a] = -s * others, s * (1.0 if L[n] == 0 else -1.0)
            if is_open and unsat == 1.0:
                entries["unsat"].append((b, unsat, d_unsat))
            else:
                entries["sat"].append((b, 0.0, d_keep))
            if is_open and len(literals) == 1:
                entries["deduce"].append((b, unsat, d_unsat))
    for part, found in entries.items():
        for b, value, slope in found:
            if normalise == "all":
                weight = 1.0 / (len(v) * len(theory.clauses))
            elif normalise == "batch":
                weight = 1.0 if part == "deduce" else 1.0 / len(found)
            else:
                alike = sum(other[0] == b for other in found)
                weight = (1.0 if part == "deduce" else 1.0 / alike) / len(v)
            losses[part] += weight * value
            for a, d in slope.items():
                gradients[part][b, a] += weight * d
    return losses, gradients


# ---- the loss, at every assignment


@pytest.mark.parametrize("normalise", ["sample", "batch", "all"])
@pytest.mark.parametrize("facts", FACTS)
def test_the_three_parts_and_their_gradients_are_those_of_the_definition_at_every_assignment(facts, normalise):
    given = Given(SMALL, 0, 3, everything=normalise == "all")
    clauses = given(padded(facts, SMALL, len(ASSIGNMENTS)))
    losses, gradients = expected(SMALL, facts, ASSIGNMENTS, normalise)
    for n, part in enumerate(PARTS):
        v = Tensor(ASSIGNMENTS, requires_grad=True)
        loss = constraint_loss(v, clauses, normalise)[n]
        loss.backward()
        assert loss.item() == pytest.approx(losses[part], abs=1e-15)
        np.testing.assert_allclose(v.grad, gradients[part], atol=1e-15, err_msg=part)


@pytest.mark.parametrize("normalise", ["sample", "batch"])
@pytest.mark.parametrize(("theory", "facts"), [(FREE, ()), *((SMALL, facts) for facts in FACTS)])
def test_the_loss_is_0_exactly_at_models(theory, facts, normalise):
    for v in ASSIGNMENTS:
        whole = np.concatenate([v, np.zeros(theory.atoms - 3)])
        whole[list(facts)] = 1.0
        is_model = theory.holds(whole[None]).all()
        clauses = Given(theory, 0, 3)(padded(facts, theory, 1))
        parts = constraint_loss(Tensor(v[None]), clauses, normalise)
        total = sum(part.item() for part in parts)
        assert (total == 0.0) == is_model == satisfied(v[None], clauses)[0]
        assert total >= 0.0


def test_a_step_against_the_gradient_raises_a_clause_that_fails_and_confirms_one_that_holds():
    """a ∨ b ∨ ¬c: the signs at each assignment, as the derivation says."""
    clauses = Given(Theory(((1, 2, -3),), 3), 0, 3)(np.zeros((8, 0), np.int64))
    v = Tensor(ASSIGNMENTS, requires_grad=True)
    sum(constraint_loss(v, clauses)).backward()
    for row, g in zip(ASSIGNMENTS, v.grad, strict=True):
        falsified = tuple(row) == (0.0, 0.0, 1.0)
        towards = np.array([1.0, 1.0, 0.0]) if falsified else row  # descent moves v there
        np.testing.assert_array_equal(np.sign(-g), np.where(towards == 1.0, 1.0, -1.0))


def test_a_true_clause_that_facts_leave_one_literal_is_pulled_twice_where_it_fails():
    clauses = Given(Theory(((1, -2),), 2), 0, 1)(np.array([[1], [1], [2]]))
    v = Tensor(np.array([[0.0], [1.0], [0.0]]), requires_grad=True)
    parts = constraint_loss(v, clauses)
    assert [part.item() for part in parts] == pytest.approx([1 / 3, 1 / 3, 0.0])
    sum(parts).backward()
    np.testing.assert_allclose(v.grad[:, 0], [-2 / 3, -2 / 3, 0.0])  # fails: deduce, unsat; holds: deduce, sat; closed


def test_a_mean_over_the_theory_has_closed_clauses_confirm_what_is_wrong():
    """19 clauses, one open: with "all", 18 of them keep both atoms where they are."""
    theory = Theory(tuple((1, 2, -n) for n in range(3, 22)), 21)
    v = Tensor(np.zeros((1, 2)), requires_grad=True)
    facts = np.array([[5]])
    sum(constraint_loss(v, Given(theory, 0, 2, everything=True)(facts), "all")).backward()
    np.testing.assert_allclose(v.grad, [[17 / 19, 17 / 19]])  # −1/19 of the open one, 18/19 of the others
    v = Tensor(np.zeros((1, 2)), requires_grad=True)
    sum(constraint_loss(v, Given(theory, 0, 2)(facts))).backward()
    np.testing.assert_allclose(v.grad, [[-1.0, -1.0]])


def test_examples_are_alone_with_sample_and_not_with_batch():
    """The gradient of an example, times the batch, does not depend on who else is in it."""
    found = {}
    for normalise in ("sample", "batch"):
        for others in (0, 5):
            v = Tensor(
                np.concatenate([ASSIGNMENTS[5:6], np.repeat(ASSIGNMENTS[:1], others, axis=0)]), requires_grad=True
            )
            sum(constraint_loss(v, Given(FREE, 0, 3)(np.zeros((len(v), 0), np.int64)), normalise)).backward()
            found[normalise, others] = v.grad[0] * len(v)
    np.testing.assert_allclose(found["sample", 0], found["sample", 5])
    assert np.abs(found["batch", 0] - found["batch", 5]).max() > 0.1


# ---- rules


def random_literals(rng, width, rows, clauses, atoms):
    atom = np.array([[rng.permutation(atoms)[:width] for _ in range(clauses)] for _ in range(rows)]).transpose(2, 0, 1)
    return np.ascontiguousarray(atom), rng.integers(-1, 2, atom.shape).astype(np.int8)


def test_the_rule_of_unsat_is_its_derivative_at_real_values():
    """Away from 0 and 1, where `keep` has no gradient."""
    rng = np.random.default_rng(0)
    v, literals = rng.uniform(0.2, 0.8, (3, 6)), random_literals(rng, 4, 3, 5, 6)
    check_rule(clause_values.rule, v, *literals, wrt=[0])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_rule_of_a_product_with_zeros_is_its_derivative(dtype):
    """Where none, one or several literals are true."""
    sign = np.ones((3, 1, 1), np.int8)
    atom = np.arange(3)[:, None, None]
    for v in itertools.product((0.0, 0.3, 1.0), repeat=3):
        x = np.array([v], dtype)
        (unsat, keep), backward = clause_values.rule(x, atom, sign)
        dv = backward(np.ones_like(unsat), np.zeros_like(keep))[0]
        others = [-np.prod([1.0 - v[m] for m in range(3) if m != n]) for n in range(3)]
        np.testing.assert_allclose(dv[0], others, rtol=1e-6)
        assert unsat[0, 0] == pytest.approx(np.prod([1.0 - a for a in v]))
        assert dv.dtype == unsat.dtype == keep.dtype == dtype


def test_the_ops_pass_the_audit_against_their_surrogates():
    rng = np.random.default_rng(1)
    x = Tensor(rng.uniform(-2.0, 2.0, (4, 6)), requires_grad=True)
    for kind in BINARISERS:
        atom, sign = random_literals(rng, 3, 4, 5, 6)
        clauses = Clauses(atom, sign, np.ones(atom.shape[1:], bool), 6)
        for normalise in ("sample", "batch"):
            result = audit(sum(constraint_loss(binarise(x, kind), clauses, normalise)))
            assert result.ok, str(result)
            assert {"step_at", "clause_values"} <= {row.op for row in result.rows}


@pytest.mark.parametrize(
    ("kind", "x", "y", "slope"),
    [
        ("probability", [0.0, 0.49, 0.5, 1.0], [0, 0, 1, 1], [1, 1, 1, 1]),
        ("identity", [-9.0, -1e-9, -0.0, 0.0, 9.0], [0, 0, 1, 1, 1], [1, 1, 1, 1, 1]),
        ("clipped", [-1.001, -1.0, -1e-9, 0.0, 1.0, 1.001], [0, 0, 0, 1, 1, 1], [0, 1, 1, 1, 1, 0]),
    ],
)
def test_a_binariser_is_1_at_its_threshold_and_its_slope_is_as_stated_at_the_kinks(kind, x, y, slope):
    x = Tensor(np.array(x), requires_grad=True)
    out = binarise(x, kind)
    out.sum().backward()
    np.testing.assert_array_equal(out.data, y)
    np.testing.assert_array_equal(x.grad, slope)
    check = Tensor(x.data.astype(np.float32), requires_grad=True)
    binarise(check, kind).sum().backward()
    assert check.grad.dtype == np.float32


# ---- theories


def test_the_matrix_and_the_clauses_that_hold_are_those_of_the_definition():
    np.testing.assert_array_equal(FREE.matrix, [[1, 1, 1], [-1, -1, 0], [-1, 0, -1], [0, -1, -1], [0, 0, 1]])
    C, v = SMALL.matrix, np.array(list(itertools.product((0, 1), repeat=5)))
    literal = (C == 1) * v[:, None] + (C == -1) * (1 - v[:, None])
    np.testing.assert_array_equal(SMALL.holds(v), literal.max(axis=2) == 1)


def test_the_loss_is_that_of_the_published_formulas_on_dense_matrices():
    """With C, g and v as (B, m, n) arrays, for a theory whose inputs are guards: ¬fact ∨ …, one for each example."""
    rng = np.random.default_rng(0)
    theory = Theory(((1, 2, -7), (-1, 3, -8), (4, -9), (-5, -6, 2, -10)), 10)
    told = rng.integers(0, 4, 12)
    g = np.zeros((12, 10))
    g[np.arange(12), 6 + told] = 1
    b = rng.integers(0, 2, (12, 6)).astype(float)
    v = g + (g == 0) * np.concatenate([b, np.zeros((12, 4))], axis=1)
    C = theory.matrix[told][:, None]  # the clauses whose fact is true
    L = (C == 1) * v[:, None] + (C == -1) * (1 - v[:, None])
    unsat = (1 - L).prod(axis=2)[:, 0]
    up = (np.abs(C).sum(axis=2) - (C * g[:, None] == -1).sum(axis=2) == 1)[:, 0]
    published = [unsat[up].sum(), unsat[unsat == 1].mean(), 0.0]
    parts = constraint_loss(Tensor(b), Given(theory, 0, 6)(6 + told[:, None]), "batch")
    assert [part.item() for part in parts] == pytest.approx(published)
    assert up.any()
    assert 0 < unsat.sum() < 12


def test_no_clause_is_gone_through_that_no_fact_asks_for():
    theory = Theory(tuple((1, -n) for n in range(2, 1002)), 1001)
    given = Given(theory, 0, 1)
    assert given(np.array([[5], [700]])).atom.shape == (2, 2, 1)


# ---- files


def test_a_theory_is_the_same_after_it_was_written_and_read(tmp_path):
    for theory in (SMALL, FREE, Theory(FREE.clauses, 3, ("a", "b(1,2)", "c"))):
        theory.save(tmp_path / "x.cnf")
        assert Theory.load(tmp_path / "x.cnf") == theory


def test_a_dimacs_file_of_others_is_read(tmp_path):
    text = "\ufeffc a comment\x0b1 0\u2028\nc 1 too many words\np  cnf 3   4 \n1 -2 0 3\n2\n\n-1 0 -3 -3 0\n3 0\n%\n0\n"
    for end in ("\n", "\r\n"):
        (tmp_path / "x.cnf").write_text(text, encoding="utf-8", newline=end)
        assert Theory.load(tmp_path / "x.cnf") == Theory(((1, -2), (3, 2, -1), (-3,), (3,)), 3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "there is no header 'p cnf ATOMS CLAUSES'."),
        ("p\0 \0c\0n\0f\0", "it is no text in ASCII or UTF-8."),
        ("1 2 0\n", "line 1: a clause before the header 'p cnf ATOMS CLAUSES'."),
        ("p cnf 2\n", "line 1: the header must be like 'p cnf ATOMS CLAUSES', got 'p cnf 2'."),
        ("p dnf 2 1\n1 0\n", "line 1: the header must be like 'p cnf ATOMS CLAUSES', got 'p dnf 2 1'."),
        ("p cnf -2 1\n1 0\n", "line 1: the header must be like 'p cnf ATOMS CLAUSES', got 'p cnf -2 1'."),
        ("p cnf 2 1\np cnf 2 1\n1 0\n", "line 2: a second line p, after the one in line 1."),
        ("p cnf 2 1\n1 two 0\n", "line 2: 'two' is not a whole number."),
        ("p cnf 2 1\n1 2.0 0\n", "line 2: '2.0' is not a whole number."),
        ("p cnf 2 1\n\xff\xfe 0\n", "line 2: 'ÿþ' is not a whole number."),
        ("p cnf 2 1\n" + "9" * 5000 + " 0\n", f"line 2: '{'9' * 40}' is not a whole number."),
        ("p cnf 2 2\n1 0\n-3 0\n", "line 3: the clause that ends here has an atom outside 1 to 2."),
        ("p cnf 2 1\n1 -1 0\n", "line 2: the clause that ends here has the atom 1 twice."),
        ("p cnf 2 2\n1 0 0\n", "line 2: the clause that ends here is empty: nothing can satisfy it."),
        ("p cnf 2 1\n1 2\n", "line 2: the file ends within a clause: its closing 0 is missing."),
        ("p cnf 2 2\n1 2 0\n", "line 1: the header says 2 clauses, and the file has 1."),
    ],
)
def test_a_bad_file_is_refused_with_line_and_reason(tmp_path, text, message):
    (tmp_path / "x.cnf").write_text(text, encoding="utf-8")
    with pytest.raises(TheoryError) as caught:
        Theory.load(tmp_path / "x.cnf")
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("clauses", "names", "message"),
    [
        (((1, 4),), (), "clause 1 has an atom outside 1 to 3."),
        (((1,), (0,)), (), "clause 2 has an atom outside 1 to 3."),
        (((),), (), "clause 1 is empty: nothing can satisfy it."),
        (((2, 3, -2),), (), "clause 1 has the atom 2 twice."),
        (((1,),), ("a",), "there are 1 names for 3 atoms: give one for each."),
    ],
)
def test_a_theory_that_is_none_is_refused(clauses, names, message):
    with pytest.raises(TheoryError) as caught:
        Theory(clauses, 3, names)
    assert str(caught.value) == message


def test_the_clauses_are_looked_up_on_the_device(backend):
    facts = padded((3, 4), SMALL, 2)
    here, there = Given(SMALL, 0, 3)(facts), Given(SMALL, 0, 3, backend)(backend.to_device(facts))
    for a, b in zip(here[:3], there[:3], strict=True):
        np.testing.assert_array_equal(a, backend.to_host(b))
    v = Tensor(backend.to_device(ASSIGNMENTS[3:5].copy()), requires_grad=True)
    sum(constraint_loss(v, there)).backward()
    expected_v = Tensor(ASSIGNMENTS[3:5].copy(), requires_grad=True)
    sum(constraint_loss(expected_v, here)).backward()
    np.testing.assert_array_equal(backend.to_host(v.grad), expected_v.grad)


def test_what_does_not_fit_is_refused():
    """Otherwise a clause would be given the values of another example."""
    clauses = Given(SMALL, 0, 3)(padded((3, 4), SMALL, 2))
    for shape in ((2, 2), (2, 4), (1, 3), (3, 3)):
        with pytest.raises(ValueError, match=r"there must be \(2, 3\) truth values, got"):
            constraint_loss(Tensor(np.ones(shape)), clauses)
        with pytest.raises(ValueError, match=r"there must be \(2, 3\) truth values, got"):
            satisfied(np.ones(shape), clauses)
    with pytest.raises(ValueError, match="unknown normalise 'mean'"):
        constraint_loss(Tensor(np.ones((2, 3))), clauses, "mean")
    with pytest.raises(ValueError, match=r"facts must be \(B, f\), got \(4,\)"):
        Given(SMALL, 0, 3)(np.array([3, 4, 3, 4]))
    for first, count in ((-1, 3), (0, 0), (3, 3)):
        with pytest.raises(ValueError, match="in a theory of 5"):
            Given(SMALL, first, count)


@pytest.mark.parametrize("kind", BINARISERS)
def test_what_is_not_a_number_is_no_truth_value(kind):
    np.testing.assert_array_equal(binarise(Tensor(np.array([np.nan, 1.0])), kind).data, [np.nan, 1.0])


def test_a_step_at_no_threshold_is_refused():
    with pytest.raises(TypeError):
        step_at(Tensor(np.zeros(2)))
