"""Every rule of minigrad.ops and minigrad.fused against finite differences, on every backend."""

import inspect
import pkgutil
from decimal import Decimal

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from scipy.special import expit, xlogy

import cases
import estimators
from devsim import forbid
from minigrad import Tensor, convolution, fused, hard, ops
from minigrad.check import audit, check_rule
from minigrad.random import one_hot
from models import spiking


@pytest.mark.parametrize("case", cases.CASES, ids=cases.name)
def test_rule_is_the_derivative_of_its_output(case):
    op, arrays, settings = case
    wrt = [0] if op in (fused.mask_logits,) else None
    check_rule(op.rule, *arrays, wrt=wrt, **settings)


def all_ops(module):
    return {f.op.name: f for f in vars(module).values() if hasattr(f, "op")}


def test_every_op_has_a_case():
    tested = {op.op.name for op, _, _ in cases.CASES + cases.ESTIMATOR_CASES}
    modules = [ops, fused, convolution, hard, spiking]
    for info in pkgutil.iter_modules(estimators.__path__):
        modules.append(__import__(f"estimators.{info.name}", fromlist=["_"]))
    missing = {name for module in modules for name in all_ops(module)} - tested
    assert not missing, f"no case in tests/cases.py for {sorted(missing)}"


def on(backend, arrays, dtype=np.float32):
    return [backend.to_device(a, dtype if a.dtype.kind == "f" else None) for a in arrays]


def device_settings(backend, settings):
    return {k: backend.to_device(v) if isinstance(v, np.ndarray) else v for k, v in settings.items()}


@pytest.mark.parametrize("case", cases.CASES + cases.ESTIMATOR_CASES, ids=cases.name)
def test_rule_is_the_same_on_every_backend_and_never_leaves_it(backend, case):
    op, arrays, settings = case

    def run(xs, settings, g_of):
        outs, backward = op.rule(*xs, **settings)
        gs = [g_of(o) for o in (outs if type(outs) is tuple else (outs,))]
        gradients = backward(*gs)
        gradients = gradients if type(gradients) is tuple else (gradients,)
        floating = [x.dtype.kind == "f" for x in xs]
        dxs = [(d() if inspect.isfunction(d) else d) if f else None for d, f in zip(gradients, floating, strict=True)]
        return [*(outs if type(outs) is tuple else (outs,)), *(d for d in dxs if d is not None)]

    cotangents = lambda to: lambda o: to(np.sin(np.arange(o.size, dtype=np.float32)).reshape(o.shape))
    expected = run(
        [a.astype(np.float32) if a.dtype.kind == "f" else a for a in arrays], settings, cotangents(lambda a: a)
    )
    xs, dev = on(backend, arrays), device_settings(backend, settings)
    with forbid("sync", "d2h"):
        found = run(xs, dev, cotangents(backend.to_device))
    for a, b in zip(expected, found, strict=True):
        assert b.dtype == np.float32
        if backend.name == "cupy":
            np.testing.assert_allclose(backend.to_host(b), a, rtol=2e-5, atol=2e-5)
        else:
            assert_array_equal(backend.to_host(b), a)


@pytest.mark.parametrize("case", cases.ESTIMATOR_CASES, ids=cases.name)
def test_estimator_rule_is_the_derivative_of_its_surrogate(case):
    op, (first, *rest), settings = case
    if op.op.name == "attach_gradient":
        rest[0] = Tensor(rest[0], requires_grad=True)
    result = audit(op(Tensor(first, requires_grad=True), *rest, **settings))
    assert result.ok, str(result)


def test_softmax_gradients_sum_to_zero_and_vanish_with_the_probability(rng):
    p = np.array([[0.5, 0.5, 0.0], [0.2, 0.3, 0.5]])
    g = rng.standard_normal((2, 3))
    d = fused.softmax_vjp(p, g)
    np.testing.assert_allclose(d.sum(axis=-1), 0.0, atol=1e-15)
    assert d[0, 2] == 0.0


@pytest.mark.parametrize(
    ("fused_op", "composed", "arrays"),
    [
        (fused.softmax, lambda x: ops.exp(x) / ops.exp(x).sum(axis=-1, keepdims=True), [cases.normal(3, 4)]),
        (fused.log_softmax, lambda x: x - x.logsumexp(axis=-1, keepdims=True), [cases.normal(3, 4)]),
        (
            fused.kl_to_uniform,
            lambda x: (fused.softmax(x) * (fused.log_softmax(x) + np.log(4.0).item())).sum(axis=-1),
            [cases.normal(3, 4)],
        ),
        (
            lambda x: fused.cross_entropy(x, np.array([1, 0, 3])),
            lambda x: -fused.log_softmax(x)[np.arange(3), np.array([1, 0, 3])],
            [cases.normal(3, 4)],
        ),
        (
            fused.bce_with_logits,
            lambda y, x: (ops.softplus(y) - x * y).sum(axis=-1),
            [cases.normal(3, 4), np.abs(cases.normal(3, 4)) % 1],
        ),
        (fused.linear, lambda x, w, b: x @ w + b, [cases.normal(3, 4), cases.normal(4, 2), cases.normal(2)]),
        (
            fused.linear_relu,
            lambda x, w, b: ops.relu(x @ w + b),
            [cases.normal(3, 4), cases.normal(4, 2), cases.normal(2)],
        ),
        (
            lambda a, c: weighed(*fused.lstm_cell(a, c)),
            lambda a, c: composed_lstm(a, c),
            [cases.normal(2, 12), cases.normal(2, 3)],
        ),
        (
            lambda a, c_l, c_r: weighed(*fused.tree_lstm_cell(a, c_l, c_r)),
            lambda a, c_l, c_r: composed_tree_lstm(a, c_l, c_r),
            [cases.normal(2, 15), cases.normal(2, 3), cases.normal(2, 3)],
        ),
        (
            lambda *inputs: weighed(*fused.lstm(*inputs)),
            lambda *inputs: composed_sequence(*inputs),
            [cases.normal(4, 2, 5), cases.normal(5, 12), cases.normal(3, 12), cases.normal(12)],
        ),
    ],
    ids=[
        "softmax",
        "log_softmax",
        "kl",
        "cross_entropy",
        "bce",
        "linear",
        "linear_relu",
        "lstm_cell",
        "tree_lstm_cell",
        "lstm",
    ],
)
def test_fused_equals_the_composed_formula(fused_op, composed, arrays):
    results = []
    for f in (fused_op, composed):
        tensors = [Tensor(a, requires_grad=True) for a in arrays]
        y = f(*tensors)
        y.backward(np.cos(np.arange(y.size, dtype=float)).reshape(y.shape))
        results.append([y.data, *(t.grad for t in tensors)])
    for a, b in zip(*results, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-13)


def weighed(h, c):
    """One function of both outputs."""
    return h + 2.0 * c


def composed_lstm(a, c):
    i, f, u, o = ops.split(a, sections=4, axis=1)
    c_new = f.sigmoid() * c + i.sigmoid() * u.tanh()
    return weighed(o.sigmoid() * c_new.tanh(), c_new)


def composed_tree_lstm(a, c_l, c_r):
    i, f_l, f_r, u, o = ops.split(a, sections=5, axis=1)
    c = f_l.sigmoid() * c_l + f_r.sigmoid() * c_r + i.sigmoid() * u.tanh()
    return weighed(o.sigmoid() * c.tanh(), c)


def composed_sequence(x, w_x, w_h, b):
    h, c, outputs = Tensor(np.zeros((2, 3))), Tensor(np.zeros((2, 3))), []
    for t in range(x.shape[0]):
        h, c = fused.lstm_cell(x[t] @ w_x + h @ w_h + b, c)
        outputs.append(weighed(h, c))
    return ops.stack(*outputs)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("scale", [1e2, 1e4])
def test_exponentials_do_not_overflow(dtype, scale):
    x = np.array([[-scale, 0.0, scale], [scale, scale, -scale]], dtype)
    for op in (
        ops.sigmoid,
        ops.softplus,
        ops.tanh,
        ops.logsumexp,
        fused.softmax,
        fused.log_softmax,
        fused.kl_to_uniform,
    ):
        y, backward = op.rule(x)
        assert np.isfinite(y).all(), op.op.name
        assert np.isfinite(backward(np.ones_like(y))).all(), op.op.name
    loss, backward = fused.bce_with_logits.rule(x, np.full_like(x, 0.5))
    assert np.isfinite(loss).all()
    assert np.isfinite(backward(np.ones_like(loss))[0]()).all()


def test_sigmoid_keeps_the_digits_of_small_values():
    y, _ = ops.sigmoid.rule(np.array([-30.0, -80.0], np.float32))
    np.testing.assert_allclose(y, np.exp([-30.0, -80.0]), rtol=1e-5)


def test_a_class_with_the_logit_minus_infinity_does_not_spoil_the_cross_entropy():
    logits = np.array([[0.0, -np.inf, 1.0], [-np.inf, -np.inf, 2.0]])
    loss, backward = fused.cross_entropy.rule(logits, np.array([0, 2]))
    np.testing.assert_allclose(loss, [np.log(1.0 + np.e), 0.0])
    p = 1.0 / (1.0 + np.e)
    np.testing.assert_allclose(backward(np.ones(2))[0], [[p - 1.0, 0.0, 1.0 - p], [0.0, 0.0, 0.0]])


@pytest.mark.parametrize(
    ("op", "shapes"),
    [(fused.linear, [(2, 3), (3, 0), (0,)]), (fused.linear_relu, [(0, 3), (3, 2), (2,)])],
)
def test_a_layer_without_outputs_or_examples_has_gradients(op, shapes):
    tensors = [Tensor(np.ones(shape), requires_grad=True) for shape in shapes]
    op(*tensors).sum().backward()
    for t in tensors:
        assert_array_equal(t.grad, np.zeros(t.shape))


def test_an_embedding_without_width_has_a_gradient():
    table = Tensor(np.ones((3, 0)), requires_grad=True)
    fused.embedding(table, np.array([0, 2])).sum().backward()
    assert table.grad.shape == (3, 0)


@pytest.mark.parametrize("bad", [-1, 3])
def test_labels_and_ids_out_of_range_are_refused(bad):
    index = np.array([0, bad])
    with pytest.raises(IndexError, match="outside 0 to 2"):
        one_hot(index, 3, np.zeros(1))
    with pytest.raises(IndexError, match="outside 0 to 2"):
        fused.cross_entropy(np.zeros((2, 3)), index)
    with pytest.raises(IndexError, match="outside 0 to 2"):
        fused.embedding(np.zeros((3, 4)), index)


@pytest.mark.parametrize("keepdims", [False, True])
@pytest.mark.parametrize("axis", [None, 0, -1, (0, 2), (-1, 1)])
def test_reductions_have_the_values_and_the_shapes_of_numpy(axis, keepdims):
    x = np.random.default_rng(0).standard_normal((2, 3, 4))
    settings = {"axis": axis, "keepdims": keepdims}
    for op, numpy_s in ((ops.sum, np.sum), (ops.mean, np.mean), (ops.max, np.max)):
        assert_array_equal(op(x, **settings).data, numpy_s(x, **settings), strict=True)
    expected = np.log(np.exp(x).sum(**settings))
    np.testing.assert_allclose(ops.logsumexp(x, **settings).data, expected, rtol=1e-14, strict=True)


@pytest.mark.parametrize("op", [ops.sum, ops.max, ops.logsumexp])
@pytest.mark.parametrize("axis", [None, 0, -1])
def test_a_single_number_is_its_own_reduction(op, axis):
    """NumPy lets it have a last axis."""
    x = Tensor(2.0, requires_grad=True)
    y = op(x, axis=axis)
    y.backward()
    assert_array_equal([y.data, x.grad], [2.0, 1.0])


@pytest.mark.parametrize(
    ("op", "inputs", "settings", "slopes"),
    [
        (ops.relu, [0.0], {}, [0.0]),
        (ops.leaky_relu, [0.0], {"slope": 0.2}, [0.2]),
        (ops.absolute, [0.0], {}, [0.0]),
        (ops.maximum, [0.5, 0.5], {}, [1.0, 0.0]),
        (ops.minimum, [0.5, 0.5], {}, [1.0, 0.0]),
        (ops.clip, [-1.0], {"low": -1.0, "high": 2.0}, [1.0]),
        (ops.clip, [2.0], {"low": -1.0, "high": 2.0}, [1.0]),
        (ops.power, [0.0, 2.0], {}, [0.0, 0.0]),
        (ops.power, [0.0, 0.0], {}, [0.0, 0.0]),
    ],
)
def test_the_slope_at_a_kink_is_the_stated_one(op, inputs, settings, slopes):
    xs = [Tensor(x, requires_grad=True) for x in inputs]
    op(*xs, **settings).backward()
    assert_array_equal([x.grad for x in xs], slopes)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_divergence_from_a_fair_coin_at_every_size_of_a_logit(dtype):
    """An infinite logit is a bit: log 2 nats from a coin, and no longer changed by the logit."""
    a = np.array([np.inf, -np.inf, 1e30, -1e30, 800.0, -100.0, 30.0, 0.0], dtype)
    x = Tensor(a, requires_grad=True)
    kl = fused.kl_to_fair_coin(x)
    kl.sum().backward()
    p, rest = expit(a.astype(float)), expit(-a.astype(float))
    np.testing.assert_allclose(kl.data, np.log(2) + xlogy(p, p) + xlogy(rest, rest), atol=1e-7)
    np.testing.assert_allclose(x.grad, [0.0] * 5 + list(p[5:] * rest[5:] * a[5:]), rtol=1e-5, atol=1e-40)


@pytest.mark.parametrize(
    ("x", "y", "gradient"),
    [
        ([-np.inf, -np.inf], -np.inf, [0.5, 0.5]),  # as of two equal logits
        ([-np.inf, 0.0], 0.0, [0.0, 1.0]),
        ([np.inf, 0.0, -np.inf], np.inf, [1.0, 0.0, 0.0]),
        ([np.inf, 3.0, np.inf], np.inf, [0.5, 0.0, 0.5]),
        ([np.nan, 0.0], np.nan, [np.nan, np.nan]),
        ([1e30, -1e30], 1e30, [1.0, 0.0]),
    ],
)
def test_the_logarithm_of_a_sum_of_exponentials_with_infinite_terms(x, y, gradient):
    x = Tensor([x, [1.0] * len(x)], requires_grad=True)
    with np.errstate(divide="raise", over="raise"):
        lse = x.logsumexp(axis=1)
    lse.backward(np.array([1.0, 0.0]))
    assert_array_equal(lse.data[0], y)
    assert_array_equal(x.grad, [gradient, [0.0] * len(gradient)])


@np.errstate(invalid="ignore")
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_pixel_with_an_infinite_logit_costs_nothing_if_it_is_that(dtype):
    y = Tensor(np.array([[np.inf, -np.inf], [-np.inf, 0.0], [np.inf, 0.0], [np.inf, np.nan]], dtype), True)
    x = np.array([[1.0, 0.0], [1.0, 0.0], [0.5, 0.0], [1.0, 0.0]], dtype)
    nats = fused.bce_with_logits(y, x)
    nats.backward(np.ones(4, dtype))
    assert nats.dtype == dtype
    assert_array_equal(nats.data, [0.0, np.inf, np.inf, np.nan])
    assert_array_equal(y.grad, [[0.0, 0.0], [-1.0, 0.5], [0.5, 0.5], [0.0, np.nan]])


def test_the_divergence_of_small_integers_is_that_of_their_values():
    """uint8 squares overflow, and NumPy's e^x of int8 has half precision."""
    for mean, log_variance in ((200, 3), (-7, 5)):
        found = [
            fused.kl_to_standard_normal(Tensor([1.0 * mean]), np.array([log_variance], np.int8)).item(),
            fused.kl_to_standard_normal(np.array([mean], np.int16), Tensor([1.0 * log_variance])).item(),
        ]
        np.testing.assert_allclose(found, 0.5 * (mean**2 + np.exp(log_variance) - 1 - log_variance), rtol=1e-12)


@pytest.mark.parametrize("bad", [-0.1, 1.5, 255.0])
def test_targets_that_are_no_probabilities_are_refused(bad):
    with pytest.raises(ValueError, match="images must lie in"):
        fused.bce_with_logits(np.zeros((2, 2)), np.array([[0.0, 1.0], [0.5, bad]]))


NO_OPERANDS = [[1.0, 2.0], (1.0, 2.0), None, "1", {1.0}, range(2), Decimal(1), np.ma.ones(2), object()]


@pytest.mark.parametrize("wrong", NO_OPERANDS, ids=lambda x: type(x).__name__)
@pytest.mark.parametrize("use", [
    lambda x, wrong: x + wrong, lambda x, wrong: wrong * x, lambda x, wrong: x @ wrong, lambda x, wrong: x / wrong,
    lambda x, wrong: x**wrong, ops.maximum, lambda x, wrong: ops.where(x.data > 0, x, wrong),
    lambda x, wrong: ops.concat(x, wrong), fused.bce_with_logits, lambda x, wrong: fused.linear(x, wrong, x),
])  # fmt: skip
def test_an_operand_is_a_tensor_an_array_or_a_number(use, wrong):
    with pytest.raises(TypeError, match=rf": an input is a {type(wrong).__name__}: make it an array or a Tensor first"):
        use(Tensor([1.0, 2.0], requires_grad=True), wrong)


def test_dropout_at_rate_zero_drops_nothing():
    y, backward = ops.dropout.rule(np.array([1.0, 2.0]), np.array([True, True]), rate=0.0)
    assert_array_equal([y, backward(np.ones(2))[0]], [[1.0, 2.0], [1.0, 1.0]])


def test_ties_of_max_share_the_gradient():
    _, backward = ops.max.rule(np.array([2.0, 2.0, 1.0]))
    assert_array_equal(backward(np.float64(1.0)), [0.5, 0.5, 0.0])
