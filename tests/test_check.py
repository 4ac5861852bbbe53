"""The testers are tested: every planted error must be caught, every right rule must pass."""

import numpy as np
import pytest

from estimators import ESTIMATORS, create, facts
from minigrad import Rng, Tensor, op, ops
from minigrad.backend import Backend
from minigrad.check import CheckFailed, audit, check_rule, gradcheck
from minigrad.fused import bce_with_logits, cross_entropy, softmax_array, softmax_vjp
from models.vae import BernoulliVAE, CategoricalVAE

X = np.array([[0.3, -1.2, 0.7], [1.1, 0.2, -0.4]])


def right(x):
    p = softmax_array(x)
    return p, lambda g: softmax_vjp(p, g)


def wrong_sign(x):
    p = softmax_array(x)
    return p, lambda g: -softmax_vjp(p, g)


def wrong_factor(x):
    p = softmax_array(x)
    return p, lambda g: softmax_vjp(p, g) * 1.001


def missing_term(x):
    p = softmax_array(x)
    return p, lambda g: p * g


def upcast(x):
    p = softmax_array(x)
    return p, lambda g: softmax_vjp(p, g).astype(np.float64)


def upcast_output(x):
    p = softmax_array(x) * np.float64(1.0)
    return p, lambda g: softmax_vjp(p, g)


def writes_into_g(x):
    p = softmax_array(x)

    def backward(g):
        g *= p
        return g - p * g.sum(axis=-1, keepdims=True)

    return p, backward


def writes_into_input(x):
    x -= x.max(axis=-1, keepdims=True)
    return right(x)


def changes_what_it_saved(x):
    p = softmax_array(x)
    saved = p.copy()

    def backward(g):
        out = softmax_vjp(saved, g)
        saved[...] = 0.0
        return out

    return p, backward


def wrong_shape(x):
    p = softmax_array(x)
    return p, lambda g: softmax_vjp(p, g)[:1]


def no_gradient(x):
    return softmax_array(x), lambda g: None


def needs_contiguous(x):
    flat = np.frombuffer(np.asarray(x).data if x.flags.c_contiguous else bytes(x.nbytes), x.dtype).reshape(x.shape)
    p = softmax_array(x)
    return p, lambda g: softmax_vjp(softmax_array(flat), g)


PLANTED = [
    wrong_sign,
    wrong_factor,
    missing_term,
    upcast,
    upcast_output,
    writes_into_g,
    writes_into_input,
    changes_what_it_saved,
    wrong_shape,
    no_gradient,
    needs_contiguous,
]


def test_the_right_rule_passes():
    check_rule(right, X)
    gradcheck(lambda a, b: (a * b).sum(), [[1.0, 2.0], [3.0, 4.0]])


def test_the_arrays_of_a_case_can_be_written_afterwards():
    index = np.array([0, 1, 1])
    check_rule(ops.take.rule, X, index)
    index[0] = 1


@pytest.mark.parametrize("rule", PLANTED, ids=lambda rule: rule.__name__)
def test_a_planted_error_is_caught(rule):
    with pytest.raises(CheckFailed):
        check_rule(rule, X)


def test_a_seed_of_ones_would_have_missed_the_missing_sign():
    """Why the cotangent is random: with g = 1 the gradient of softmax is 0 whatever its sign."""
    _, backward = wrong_sign(X)
    np.testing.assert_allclose(backward(np.ones_like(X)), 0.0, atol=1e-15)


def test_a_case_whose_gradients_vanish_is_refused():
    with pytest.raises(CheckFailed, match="tests nothing"):
        check_rule(ops.relu.rule, -np.ones(3))
    with pytest.raises(CheckFailed, match="tests nothing"):
        check_rule(ops.exp.rule, np.ones((0, 3)))


def test_an_input_without_elements_may_stand_beside_others():
    check_rule(ops.concat.rule, np.ones((2, 3)), np.ones((0, 3)))
    x, nothing = (Tensor(np.ones((n, 3)), requires_grad=True) for n in (2, 0))
    result = audit(ops.concat(x, nothing).sum())
    assert result.ok, str(result)


def test_gradcheck_wants_a_list_of_inputs():
    with pytest.raises(TypeError, match="must be a list of arrays or Tensors, not one Tensor"):
        gradcheck(lambda x: x.sum(), Tensor(np.ones(2)))


def test_gradcheck_catches_a_wrong_op():
    bad = op(wrong_factor)
    with pytest.raises(CheckFailed):
        gradcheck(lambda x: (bad(x) * bad(x)).sum(), [X])
    gradcheck(lambda x: (bad(x) * bad(x)).sum(), [X], tolerance=1e-2)


def test_a_function_of_float64_constants_can_be_checked():
    gradcheck(lambda x: (x * np.ones(3)).sum(), [X])


def not_a_number(x):
    p = softmax_array(x)
    return p, lambda g: softmax_vjp(p, g) * np.nan


AUDITED = [wrong_sign, wrong_factor, missing_term, not_a_number]


@pytest.mark.parametrize("rule", AUDITED, ids=lambda rule: rule.__name__)
def test_audit_names_the_wrong_node_and_where_it_was_made(rule):
    x = Tensor(X, requires_grad=True)
    bad = op(rule)
    loss = ((bad(x * 2.0) + x.tanh()) ** 2.0).sum()
    result = audit(loss)
    assert not result.ok
    failed = [row for row in result.rows if not row.ok]
    assert [row.op for row in failed] == [rule.__name__]
    assert failed[0].created.startswith("test_check.py:")
    assert "FAILED" in str(result)
    loss.backward()  # an audit leaves the graph as it was


def test_audit_compares_the_live_closure_with_the_rule():
    @op
    def drifting(x):
        return x * 2.0, (lambda g: g * 2.0) if x.dtype == np.float64 else (lambda g: g * 3.0)

    @op
    def sometimes_nan(x):
        return x * 2.0, lambda g: g * (2.0 if x.dtype == np.float64 else np.nan)

    x = Tensor(X.astype(np.float32), requires_grad=True)
    for bad in (drifting, sometimes_nan):
        result = audit(bad(x).sum())
        assert "live closure" in result.rows[0].verdict
        assert not result.ok


def test_audit_does_not_mistake_a_kink_for_an_error_nor_call_it_ok_blindly():
    x = np.linspace(0.5, 2.0, 20)
    x[3] = 0.0
    assert audit(ops.relu(Tensor(x, requires_grad=True)).sum()).ok
    result = audit(ops.relu(Tensor(np.zeros(5), requires_grad=True)).sum())
    assert not result.ok
    assert "kink" in result.rows[0].verdict


def test_audit_does_not_mistake_the_edge_of_a_domain_for_an_error():
    """A step of 1e-6 from 1e-8 leaves the domain of the logarithm: what cannot be differenced is left out."""
    x = np.linspace(0.5, 2.0, 20)
    x[3] = 1e-8
    for f in (ops.log, ops.sqrt, lambda x: x**1.5):
        result = audit(f(Tensor(x, requires_grad=True)).sum())
        assert result.ok
        assert result.rows[0].verdict == "ok, 1 of 20 at a kink"
        assert "not decided" in audit(f(Tensor(x[3:4], requires_grad=True)).sum()).rows[0].verdict
    with np.errstate(divide="ignore"):
        loss = ops.log(Tensor(np.append(x, 0.0), requires_grad=True)).sum()
    assert "infinite" in audit(loss).rows[0].verdict


def test_audit_takes_a_step_that_fits_the_small_entries_beside_large_ones():
    for large in (900.0, 3e3, 1e8, 1e14):
        result = audit(ops.log(Tensor([0.1, large], requires_grad=True)).sum())
        assert result.ok, str(result)

    @op
    def wrong_where_small(x):
        return np.log(x), lambda g: np.where(x < 1.0, 1.001, 1.0) * g / x

    assert audit(wrong_where_small(Tensor([0.1, 3e3], requires_grad=True)).sum()).rows[0].verdict == "FAILED"


def test_audit_sees_every_kink_however_short_the_step_across_it():
    x = Tensor(np.random.default_rng(0).standard_normal(300), requires_grad=True)
    rows = audit(ops.relu(ops.relu(x)).sum()).rows
    assert rows[0].ok
    assert rows[1].verdict == f"not decided: {np.sum(x.data <= 0)} of 300 outputs at a kink"


def test_audit_does_not_decide_what_rounding_hides():
    x = Tensor(np.array([[34.0, 3.0], [36.0, 2.0]]), requires_grad=True)
    for y in (x + 1e9, cross_entropy(x, np.array([0, 0]))):  # large values; a loss that is zero but for 4e-14
        row = audit(y.sum()).rows[0]
        assert row.verdict == "not decided: the gradient is lost in the rounding of the outputs"
        assert not row.ok

    @op
    def wrong_and_small(x):
        return 1e-6 * x, lambda g: 2e-6 * g

    assert audit(wrong_and_small(x).sum()).rows[0].verdict == "FAILED"


def test_audit_says_when_a_rule_is_checked_elsewhere_or_has_none():
    @op(enumerated="test_ladder.py")
    def sampled(x):
        return x * 1.0, lambda g: g

    @op
    def constant(x):
        return x * 1.0, None

    x = Tensor(X, requires_grad=True)
    rows = audit((sampled(x) * constant(x)).sum()).rows
    assert rows[0].verdict == "checked by enumeration in tests (test_ladder.py)"
    assert rows[0].ok
    assert rows[1].verdict == "no derivative"
    assert not rows[1].ok


def test_audit_refuses_a_graph_that_was_used():
    x = Tensor(X, requires_grad=True)
    loss = (x * x).sum()
    loss.backward()
    with pytest.raises(RuntimeError, match="before backward"):
        audit(loss)
    for nothing in (x, Tensor(X), Tensor(X) * 2.0):
        with pytest.raises(RuntimeError, match="not computed from"):
            audit(nothing)


@pytest.mark.parametrize(("name", "family"), [(n, c.name) for n in ESTIMATORS for c in facts(n).families])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_every_node_of_a_training_step_passes_the_audit(name, family, dtype):
    rng, settings = Rng(1), {"hidden": (8, 6), "rng": Rng(1), "dtype": dtype}
    model = CategoricalVAE(12, 2, 3, **settings) if family == "categorical" else BernoulliVAE(12, 3, **settings)
    x = rng.uniform((5, 12), like=np.empty(0, dtype))
    reconstruction, kl = model.negative_elbo(x, create(name, family=family), rng.at(3))
    result = audit((reconstruction + kl).mean())
    assert result.ok, str(result)
    kl = {"kl_to_uniform"} if family == "categorical" else {"kl_to_fair_coin"}
    expected = {"linear_relu", "bce_with_logits"} | ({"logsumexp"} if facts(name).multi_sample else kl)
    assert expected <= {row.op for row in result.rows}


def test_an_op_with_several_outputs_was_made_where_it_was_called():
    def cut(x):
        return ops.split(x, sections=3, axis=1)

    (row, *_) = audit(cut(Tensor(X, requires_grad=True))[0].sum()).rows
    assert (row.op, row.created) == ("split", f"test_check.py:{cut.__code__.co_firstlineno + 1}")


def test_audit_takes_settings_and_constants_from_the_device(backend):
    x, rows = Tensor(backend.to_device(X), requires_grad=True), backend.to_device(np.array([1, 1, 0]))
    result = audit((2.0 * x[rows] * backend.to_device(np.array([1.0, 2.0, 3.0]))).sum())
    assert result.ok, str(result)


def test_audit_works_on_a_mixture_of_settings_and_several_outputs():
    x = Tensor(X, requires_grad=True)
    a, b, c = ops.split(x, sections=3, axis=1)
    loss = bce_with_logits(ops.concat(a * b, c, axis=1), Backend().to_device(np.full((2, 2), 0.3))).sum()
    assert audit(loss).ok
