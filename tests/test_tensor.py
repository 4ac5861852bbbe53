"""The engine: accumulation, order, freeing, errors. Rules are tested in test_ops.py."""

import copy
import gc
import operator
import pickle
import re
import sys
import threading
import traceback
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from minigrad import Rng, Tensor, enable_grad, fused, grad, nn, no_grad, op, ops
from minigrad.check import audit
from minigrad.optim import OPTIMIZERS
from minigrad.tensor import nodes_of, unbroadcast


def leaf(*values):
    return Tensor(np.array(values), requires_grad=True)


def test_a_value_used_twice_gets_both_gradients():
    a = leaf(3.0)
    b = a + a
    c = b + b
    (c * b).sum().backward()  # 8a², so 16a
    np.testing.assert_array_equal(a.grad, [48.0])


def test_many_uses_accumulate_without_touching_shared_arrays():
    a, b = leaf(1.0, 2.0), leaf(5.0, 6.0)
    s = a + b  # the rule of add hands the same array g to both
    (s + a + a + b * 2.0).sum().backward()
    np.testing.assert_array_equal(a.grad, [3.0, 3.0])
    np.testing.assert_array_equal(b.grad, [3.0, 3.0])
    assert a.grad is not b.grad


def test_each_leaf_owns_its_gradient():
    a, b = leaf(1.0, 2.0), leaf(5.0, 6.0)
    (a + b).sum().backward()  # one array g, stretched from a scalar, reaches both
    a.grad += 1.0
    np.testing.assert_array_equal(b.grad, [1.0, 1.0])


def test_gradients_add_up_over_backward_calls():
    a = leaf(2.0)
    (a * a).sum().backward()
    (a * 3.0).sum().backward()
    np.testing.assert_array_equal(a.grad, [7.0])


def test_thirty_thousand_chained_ops_do_not_recurse():
    x = leaf(1.0)
    y = x
    for _ in range(30_000):
        y = y + 1.0
    assert sys.getrecursionlimit() < 30_000
    y.sum().backward()
    np.testing.assert_array_equal(x.grad, [1.0])
    y = x
    for _ in range(30_000):
        y = y + 1.0
    del y  # dropping a long graph does not recurse either


def test_a_dropped_graph_leaves_nothing_for_the_cyclic_collector():
    def build(run_backward):
        x = leaf(1.0, 2.0, 3.0, 4.0)
        a, b = ops.split((x * x).tanh(), sections=2)
        loss = (a * b + x[:2]).logsumexp()
        if run_backward:
            loss.backward()

    for run_backward in (False, True):
        build(run_backward)
        gc.collect()
        gc.disable()
        try:
            build(run_backward)
            assert gc.collect() == 0
        finally:
            gc.enable()


def test_closures_are_freed_as_they_are_used():
    class Marker:
        pass

    alive, marks = [], []

    @op
    def marked(x):
        mark = Marker()
        marks.append(weakref.ref(mark))

        def backward(g):
            alive.append(sum(m() is not None for m in marks))
            return g * (mark is not None)

        return x * 1.0, backward

    x = leaf(1.0)
    marked(marked(marked(x))).sum().backward()
    assert alive == [3, 2, 1]


def test_backward_twice_is_an_error():
    a = leaf(2.0)
    y = (a * a).sum()
    y.backward()
    with pytest.raises(RuntimeError, match="already differentiated"):
        y.backward()
    b = leaf(2.0)
    shared = b * b
    shared.sum().backward()
    with pytest.raises(RuntimeError, match="already differentiated"):
        (shared * 2.0).sum().backward()


def test_grad_visits_only_the_way_to_its_target():
    visited = []

    @op
    def noisy(x, *, name):
        def backward(g):
            visited.append(name)
            return g

        return x * 1.0, backward

    w, z = leaf(2.0), leaf(3.0)
    y = noisy(w, name="w") * noisy(z, name="z")
    (dz,) = grad(y.sum(), [z])
    np.testing.assert_array_equal(dz, [2.0])
    assert visited == ["z"]
    assert z.grad is None


def test_grad_skips_deferred_work_for_other_inputs():
    @op
    def product(a, b):
        def expensive():
            raise AssertionError("the gradient of b was computed although nobody asked for it")

        return a * b, lambda g: (lambda: g * b, expensive)

    a, b = leaf(2.0), leaf(3.0)
    (da,) = grad(product(a, b), [a])
    np.testing.assert_array_equal(da, [3.0])


def test_grad_of_an_inner_node_can_be_repeated_with_keep():
    x = leaf(2.0)
    h = x * x
    y = h * h
    for _ in range(2):
        dh, dx = grad(y, [h, x], keep=True)
        np.testing.assert_array_equal(dh, [8.0])
        np.testing.assert_array_equal(dx, [32.0])


def test_grad_of_something_unrelated_is_zero():
    x, z = leaf(2.0), leaf(1.0, 1.0)
    np.testing.assert_array_equal(grad(x * x, [z])[0], [0.0, 0.0])


def test_grad_through_what_was_freed_is_an_error_and_not_zero():
    x = leaf(2.0)
    h = x * x
    z = leaf(5.0)
    np.testing.assert_array_equal(grad(h.sum(), [x])[0], [4.0])
    y = (h * z).sum()
    np.testing.assert_array_equal(grad(y, [z], keep=True)[0], [4.0])  # h is older than z and cannot depend on it
    for targets in ([x], [x, h]):
        with pytest.raises(RuntimeError, match="already differentiated"):
            grad(y, targets)


def test_grad_leaves_what_lies_below_its_targets_usable():
    x = leaf(1.0, 2.0, 3.0, 4.0)
    first, second = ops.split(x * x, sections=2)
    targets = [first, second]
    gradients = grad((first * second).sum(), targets)
    ops.concat(*[t * g for t, g in zip(targets, gradients, strict=True)]).sum().backward()  # 2x·g
    np.testing.assert_array_equal(x.grad, [2.0 * 9.0, 4.0 * 16.0, 6.0 * 1.0, 8.0 * 4.0])


def test_grad_wants_a_list_of_inputs():
    x = leaf(1.0, 2.0)
    with pytest.raises(TypeError, match="list of Tensors"):
        grad((x * x).sum(), x)


@pytest.mark.parametrize("constant", [Tensor(np.ones(2)), np.ones(2)])
def test_grad_wants_inputs_that_require_one(constant):
    x = leaf(1.0, 2.0)
    with pytest.raises(TypeError, match="must be a Tensor that requires a gradient"):
        grad((x * constant).sum(), [x, constant])


def test_unused_outputs_of_a_rule_count_as_zero():
    x = leaf(1.0, 2.0, 3.0, 4.0)
    first, _ = ops.split(x, sections=2)
    (first * first).sum().backward()
    np.testing.assert_array_equal(x.grad, [2.0, 4.0, 0.0, 0.0])


def test_no_grad_builds_no_graph():
    x = leaf(1.0)
    with no_grad():
        y = x * x
    assert not y.requires_grad
    with pytest.raises(RuntimeError, match="does not depend"):
        y.backward()
    assert (x * x).requires_grad


def test_no_grad_can_be_nested_in_itself():
    x, quiet = leaf(1.0), no_grad()
    with quiet, enable_grad():
        with quiet, quiet:
            assert not (x * x).requires_grad
        assert (x * x).requires_grad
    assert (x * x).requires_grad


def test_no_grad_in_one_thread_does_not_reach_another():
    inside, checked = threading.Event(), threading.Event()

    def other():
        with no_grad():
            inside.set()
            checked.wait(10)

    thread, x = threading.Thread(target=other), leaf(1.0)
    thread.start()
    inside.wait(10)
    quiet = no_grad()
    assert (x * x).requires_grad
    with quiet:
        checked.set()
        thread.join()
        assert not (x * x).requires_grad
    assert (x * x).requires_grad  # whoever leaves last does not bring back what it found


def test_threads_differentiate_their_own_graphs():
    def work(n):
        for _ in range(50):
            with no_grad():
                assert not (leaf(1.0) * 2.0).requires_grad
            x = leaf(float(n))
            y = x
            for _ in range(20):
                y = y + x
            y.sum().backward()
            assert x.grad[0] == 21.0
        return n

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(work, range(8))) == list(range(8))


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_is_a_leaf_of_its_own(again):
    x = leaf(1.0, 2.0)
    z = again(x)
    (x * 2.0 + z * 3.0).sum().backward()
    np.testing.assert_array_equal(x.grad, [2.0, 2.0])
    np.testing.assert_array_equal(z.grad, [3.0, 3.0])
    np.testing.assert_array_equal(again(x).grad, [2.0, 2.0])
    with pytest.raises(TypeError, match="only a leaf can be copied or pickled, not what multiply made"):
        again(x * 2.0)


def test_an_op_without_a_rule_refuses_a_gradient():
    @op
    def rounded(x):
        return np.round(x), None

    y = rounded(leaf(1.2)).sum()
    with pytest.raises(
        RuntimeError, match=r"rounded has no derivative: (.|\n)*\nin the backward pass of rounded, called at"
    ):
        y.backward()


@pytest.mark.parametrize(
    ("gradient", "message"),
    [
        (
            lambda g: g[:1],
            r"wrong: the gradient of an input of float64\(2,\) came out as float64\(1,\): see the rule at "
            r"test_tensor\.py:\d+\.\nin the backward pass of wrong, called at test_tensor\.py:\d+: float64\(2,\)",
        ),
        (lambda g: g.astype(np.float32), "came out as float32"),
        (lambda g: (g, g), "has 1 inputs, its rule gave 2 gradients"),
    ],
)
def test_a_wrong_gradient_is_named(gradient, message):
    @op
    def wrong(x):
        return x * 1.0, gradient

    y = wrong(leaf(1.0, 2.0))
    with pytest.raises(RuntimeError, match=message):
        y.sum().backward()


def test_mixed_dtypes_are_an_error_and_constants_keep_the_dtype():
    a32 = Tensor(np.ones(2, np.float32), requires_grad=True)
    a64 = Tensor(np.ones(2), requires_grad=True)
    with pytest.raises(TypeError, match=r"multiply: float32.*float64.* mix dtypes"):
        a32 * a64
    with pytest.raises(TypeError, match=r"multiply: float64.*float32.* mix dtypes"):
        a64 * a32
    with pytest.raises(TypeError, match="add"):
        a32 + np.ones(2)
    for y in (a32 * 2.0, 2.0 / a32, a32**2, 1 - a32, a32.mean(), ops.where(np.array([True, False]), a32, 0.0)):
        assert y.dtype == np.float32
        y.sum().backward()
    assert a32.grad.dtype == np.float32


def test_an_op_with_several_outputs_keeps_the_dtype_as_well():
    c = Tensor(np.ones((2, 3), np.float32), requires_grad=True)
    with pytest.raises(TypeError, match=r"lstm_cell: float64\(2, 12\), float32\(2, 3\) give float64\(2, 3\), float64"):
        fused.lstm_cell(np.ones((2, 12)), c)


def test_arrays_and_numbers_on_the_left_reach_the_tensor():
    a = leaf(2.0, 4.0)
    for y, expected in [
        (np.ones(2) + a, [3, 5]),
        (np.ones(2) - a, [-1, -3]),
        (np.ones(2) * a, [2, 4]),
        (8.0 / a, [4, 2]),
        (2.0**a, [4, 16]),
        (np.eye(2) @ a, [2, 4]),
    ]:
        assert isinstance(y, Tensor)
        np.testing.assert_array_equal(y.data, expected)
    y = 2.0 ** Tensor(np.ones(2, np.float32), requires_grad=True)
    y.sum().backward()
    assert (a > 3.0).tolist() == [False, True]


@pytest.mark.parametrize("name", ["eq", "ne", "lt", "le", "gt", "ge"])
def test_comparisons_are_elementwise_and_give_plain_arrays(name):
    compare, a = getattr(operator, name), np.array([1.0, 2.0, 3.0])
    x = Tensor(a, requires_grad=True)
    for other in (2.0, a[::-1], Tensor(a[::-1])):
        plain = other.data if isinstance(other, Tensor) else other
        found = compare(x, other)
        assert type(found) is np.ndarray
        np.testing.assert_array_equal(found, compare(a, plain))
    np.testing.assert_array_equal(compare(a[::-1], x), compare(a[::-1], a))


def test_a_tensor_is_a_key_but_no_condition():
    """A Tensor's hash is its identity; its truth could only be its length, which nobody asks for."""
    x = Tensor(np.ones(2))
    assert {x: 1}[x] == 1
    with pytest.raises(TypeError, match=r"neither true nor false: compare its \.item"):
        bool(x)


def test_errors_name_the_op_and_its_inputs():
    with pytest.raises(ValueError, match=r"in matmul, called at test_tensor.py:\d+: float64\(1, 2\), float64\(3,\)"):
        leaf(1.0, 2.0).reshape(1, 2) @ leaf(1.0, 2.0, 3.0)
    with pytest.raises(TypeError, match="float32 or float64, got int64"):
        Tensor(np.arange(3))
    with pytest.raises(TypeError, match=r"use \.data"):
        np.asarray(leaf(1.0))
    with pytest.raises(RuntimeError, match="needs the gradient"):
        leaf(1.0, 2.0).backward()
    with pytest.raises(TypeError, match="must be alike"):
        (leaf(1.0, 2.0) * 2.0).backward(np.ones(3))
    with pytest.raises(TypeError, match="g is float, the Tensor is float64"):
        (leaf(1.0) * 2.0).backward(2.0)
    with pytest.raises(TypeError, match=r"g must be an array, not a Tensor: pass its \.data"):
        (leaf(1.0) * 2.0).backward(Tensor(np.ones(1)))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda x: x.transpose(3, 0), "transpose: axis 3 is out of bounds"),
        (lambda x: x.transpose(1, 1), "transpose: repeated axis"),
        (lambda x: x.sum().cumsum(), "cumsum: axis -1 is out of bounds"),
        (lambda x: ops.dropout(x, x.data > 0.0, rate=1.0), "dropout: rate must be at least 0 and below 1, got 1.0"),
        (lambda x: ops.dropout(x, x.data > 0.0, rate=-0.1), "dropout: rate must be at least 0 and below 1, got -0.1"),
        (lambda x: ops.gather(x, np.array([[0]])), "gather: the index must have the shape of x"),
        (lambda x: ops.gather(x, np.array([[0], [0]]), axis=3), "gather: axis 3 is out of bounds"),
        (lambda x: ops.take(x, np.array([0]), axis=2), "take: axis 2 is out of bounds"),
        (lambda x: ops.take(x.sum(), np.array([0])), "take: axis 0 is out of bounds"),
        (lambda x: fused.cross_entropy(x, np.zeros((2, 1), int)), "cross_entropy: there must be one label"),
        (lambda x: fused.linear(x, np.ones((3, 4)), np.ones(1)), "linear: x (..., I), w (I, O) and b (O,) must fit"),
        (
            lambda x: fused.linear_relu(x, np.ones((3, 4)), np.ones((2, 4))),
            "linear_relu: x (..., I), w (I, O) and b (O,) must fit",
        ),
    ],
)
def test_what_would_be_wrong_silently_or_only_on_the_way_back_is_refused(wrong, message):
    name, _, what = message.partition(": ")
    with pytest.raises(ValueError, match=f"{re.escape(what)}(.|\n)*\nin {name}, called at test_tensor.py:"), no_grad():
        wrong(Tensor(np.ones((2, 3)), requires_grad=True))


def line_with(text: str) -> int:
    """The number of the line of this file that ends with the text."""
    source = Path(__file__).read_text().splitlines()
    return next(n for n, line in enumerate(source, start=1) if line.endswith(text))


def lines_of(error) -> list[str]:
    """The lines of source that a traceback shows."""
    return [frame.line for frame in traceback.extract_tb(error.__traceback__)]


def test_an_error_in_a_rule_keeps_its_traceback_and_says_which_op_failed_where_on_what():
    @op
    def product(x, w):
        y = x @ w

        def backward(g):
            dx = lambda: g @ w  # it should be g @ w.T
            return dx, lambda: x.T @ g

        return y, backward

    x, w = Tensor(np.ones((4, 3)), requires_grad=True), Tensor(np.ones((3, 2)), requires_grad=True)
    loss = product(x, w).sum()  # the call
    with pytest.raises(ValueError, match="matmul") as caught:
        loss.backward()
    (note,) = caught.value.__notes__
    line = line_with("# the call")
    assert note == f"in the backward pass of product, called at test_tensor.py:{line}: float64(4, 3), float64(3, 2)"
    assert "dx = lambda: g @ w  # it should be g @ w.T" in lines_of(caught.value)
    with pytest.raises(ValueError, match="matmul") as caught:
        product(x, Tensor(np.ones((4, 2), np.float64)))
    (note,) = caught.value.__notes__
    assert note.startswith("in product, called at test_tensor.py:")
    assert note.endswith(": float64(4, 3), float64(4, 2)")
    assert "y = x @ w" in lines_of(caught.value)


@pytest.mark.parametrize("error", [KeyError("k"), ZeroDivisionError("z"), AttributeError("a"), IndexError("i")])
def test_errors_of_every_type_keep_their_type(error):
    @op
    def broken(x, *, forward):
        if forward:
            raise error

        def backward(g):
            raise error

        return x * 1.0, backward

    for forward, start in ((True, "in broken, called at"), (False, "in the backward pass of broken, called at")):
        with pytest.raises(type(error)) as caught:
            broken(leaf(1.0), forward=forward).sum().backward()
        assert caught.value is error
        assert error.__notes__.pop().startswith(start)


def test_the_place_of_a_call_is_the_user_s_line_and_not_one_of_the_library():
    layer = nn.MLP([2, 3, 1], Rng(0), dtype=np.float64)
    y = layer(Tensor(np.ones((4, 2))))  # here
    line = line_with("# here")
    assert {node.called_at for node in nodes_of(y)} == {f"test_tensor.py:{line}"}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_a_graph_whose_parameters_were_updated_since_cannot_be_differentiated(make):
    """Two losses with a step of one optimizer between: the closures share the arrays that the step has written into."""
    w, theta = leaf(2.0), leaf(3.0)
    optimizer = make([w], lr=1.0)
    fake = theta * 1.0
    critic, generator, other = (w * fake.detach()).sum(), (w * fake).sum(), (theta * theta).sum()
    again = grad(generator, [theta], keep=True)[0]
    np.testing.assert_array_equal(again, [2.0])
    critic.backward()
    optimizer.step()
    message = r"a parameter of multiply, called at test_tensor.py:\d+, was updated after this graph was built"
    with pytest.raises(RuntimeError, match=message):
        generator.backward()
    with pytest.raises(RuntimeError, match=message):
        grad(generator, [theta])
    with pytest.raises(RuntimeError, match=message):
        audit(generator)
    assert theta.grad is None
    other.backward()  # what did not use it is not concerned
    np.testing.assert_array_equal(theta.grad, [6.0])
    (w * theta).sum().backward()  # nor is what was built afterwards


def test_a_loaded_parameter_is_an_updated_one():
    layer = nn.Linear(2, 1, Rng(0), dtype=np.float64)
    loss = layer(np.ones((1, 2))).sum()
    layer.load_state_dict(layer.state_dict())
    with pytest.raises(RuntimeError, match="was updated after this graph was built"):
        loss.backward()


def test_a_tensor_is_what_a_node_has_put_out():
    x = leaf(1.0, 2.0, 3.0, 4.0)
    y = x * 2.0
    first, second = ops.split(y, sections=2)
    assert x.node is None
    assert (y.node.op.name, y.index) == ("multiply", None)
    assert y.node.inputs[0] is x
    assert (first.node, first.index, second.index) == (second.node, 0, 1)
    assert first.node.settings == {"sections": 2}
    assert [node.op.name for node in nodes_of((first * second).sum())] == ["multiply", "split", "multiply", "sum"]
    assert not y.node.freed
    (first * second).sum().backward()
    assert y.node.freed
    assert y.node.inputs == ()


@pytest.mark.parametrize("wrong", [None, "1", [None, 1.0], ["1"], [[1.0], ["x"]], 1j, [1j], {1.0}, object(), b"1"])
def test_what_is_no_number_is_no_tensor(wrong):
    """NumPy would make NaN of None, and the number 1 of its name."""
    with pytest.raises(TypeError, match="a Tensor holds numbers, got"):
        Tensor(wrong)


@pytest.mark.parametrize("numbers", [[], 2, True, [1, 2], [[0.5], [np.float32(2)]], [np.ones(2), np.zeros(2)], 2**40])
def test_lists_and_numbers_become_float64(numbers):
    x = Tensor(numbers)
    assert x.dtype == np.float64
    np.testing.assert_array_equal(x.data, numbers)


@pytest.mark.parametrize("f", [lambda x: x * x, lambda x: (x * np.ones(3)).sum(), lambda x: x + x, lambda x: x * 1.0])
def test_the_gradient_of_a_number_is_an_array(f):
    x = Tensor(np.array(2.0), requires_grad=True)
    f(x).backward()
    assert type(x.grad) is np.ndarray
    x.grad[...] = 0.0


def test_a_batch_without_examples_has_a_mean_for_each():
    x = Tensor(np.ones((0, 3)), requires_grad=True)
    x.mean(axis=1).sum().backward()
    assert x.grad.shape == (0, 3)


def test_an_axis_may_be_a_numpy_integer():
    x = Tensor(np.ones((2, 3)), requires_grad=True)
    for y in (x.sum(axis=np.int64(1)), x.mean(axis=np.int64(0)), x.logsumexp(axis=np.int64(-1))):
        y.sum().backward()
    np.testing.assert_allclose(x.grad, np.full((2, 3), 1.0 + 1.0 / 2.0 + 1.0 / 3.0))


def test_a_list_as_a_key_is_refused_because_duplicates_must_add_up():
    x = leaf(1.0, 2.0, 3.0)
    with pytest.raises(TypeError, match="an index is an integer"):
        x[[0, 0, 1]]
    x[np.array([0, 0, 1])].sum().backward()
    np.testing.assert_array_equal(x.grad, [2.0, 1.0, 0.0])


@pytest.mark.parametrize("zero", [0, 0.0, np.float64(0.0), np.array([0, 0]), np.zeros(2), Tensor(np.zeros(2))])
def test_power_zero_is_constant_also_at_zero(zero):
    x = leaf(0.0, 2.0)
    (x**zero).sum().backward()
    np.testing.assert_array_equal(x.grad, [0.0, 0.0])


@pytest.mark.parametrize("zero", [0, 0.0, np.zeros(2)])
def test_zero_to_a_power_is_constant(zero):
    x = leaf(0.5, 2.0)
    y = zero**x
    y.sum().backward()
    np.testing.assert_array_equal(y.data, [0.0, 0.0])
    np.testing.assert_array_equal(x.grad, [0.0, 0.0])


def test_a_power_of_small_integers_keeps_the_precision_of_its_exponent():
    x = leaf(0.5, 2.0)
    (np.array([2, 3], np.int8) ** x).sum().backward()  # NumPy's log of int8 is float16
    np.testing.assert_allclose(x.grad, [np.sqrt(2.0) * np.log(2.0), 9.0 * np.log(3.0)], rtol=1e-14)


def test_a_negative_number_to_a_power_has_no_slope():
    x = leaf(1.0, 2.0)
    y = (-2.0) ** x
    y.sum().backward()
    np.testing.assert_array_equal(y.data, [-2.0, 4.0])
    assert np.isnan(x.grad).all()


def test_unbroadcast_sums_what_was_repeated():
    g = np.arange(24.0).reshape(2, 3, 4)
    np.testing.assert_array_equal(unbroadcast(g, (3, 1)), g.sum(axis=0).sum(axis=1, keepdims=True))
    assert unbroadcast(g, g.shape) is g
    assert unbroadcast(g, ()).shape == ()


def test_tensor_methods_match_numpy(rng):
    x = rng.standard_normal((2, 3, 4))
    t = Tensor(x)
    np.testing.assert_array_equal(t.T.data, x.T)
    np.testing.assert_array_equal(t.reshape(6, 4).data, t.reshape((6, 4)).data)
    np.testing.assert_array_equal(t.transpose(1, 0, 2).data, x.transpose(1, 0, 2))
    np.testing.assert_array_equal(t.sum(axis=(0, 2)).data, x.sum(axis=(0, 2)))
    np.testing.assert_array_equal(t[1, :, ::2].data, x[1, :, ::2])
    assert len(t) == 2
    assert t.sum().item() == pytest.approx(x.sum())
    assert "Tensor" in repr(t)
