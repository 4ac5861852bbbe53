"""Every op at inputs that nobody chose: shapes that broadcast or do not, axes, indices, masks, kinds of numbers.

An op either refuses what it is given when it is called, or its gradient is the one that finite differences give. A
failing trial is repeated by its op and number alone: `trial("getitem", 17)`.
"""

import array
import importlib
import inspect
import math
import pkgutil

import numpy as np
import pytest

import estimators
from minigrad import Tensor, convolution, fused, grad, hard, ops
from minigrad.tensor import op, unbroadcast
from models import spiking

TRIALS, MANY = 80, 3000
REFUSED = (TypeError, ValueError, IndexError)
_H = 1e-6
MODULES = (ops, fused, convolution, hard, spiking)

# ---- what is drawn. `r` is the trial's own numpy.random.Generator


def pick(r, *choices):
    return choices[r.integers(len(choices))]


def shape(r, least=0, most=3):
    return tuple(int(n) for n in r.choice([0, 1, 2, 3], p=[0.04, 0.26, 0.35, 0.35], size=r.integers(least, most + 1)))


def beside(r, of):
    """A shape that mostly broadcasts with `of`: leading axes left out, lengths of one; sometimes any other."""
    if r.random() < 0.12:
        return shape(r)
    ones = tuple(1 if r.random() < 0.3 else n for n in of)
    longer = (*shape(r, 0, 1), *ones) if r.random() < 0.15 else ones
    return longer[r.integers(len(longer) + 1) :] if r.random() < 0.4 else longer


def normal(r, *of):
    return r.standard_normal(of)


def operand(r, of):
    """A Tensor most of the time, else a constant: an array, an array of integers, or a number."""
    x = normal(r, *beside(r, of))
    return pick(r, Tensor(x, True), Tensor(x, True), Tensor(x, True), x, (3 * x).astype(int), 2, -0.5, np.float64(0.7))


def tensor(r, *of):
    return Tensor(normal(r, *of), True)


def axis_of(r, ndim):
    if r.random() < 0.7:
        return int(r.integers(-ndim, ndim or 1))
    return pick(r, int(r.integers(-4, 4)), np.int64(-1), True, None, 0.0, [0], (0,), "0")


def axes_of(r, ndim):
    several = tuple(int(a) for a in r.permutation(max(ndim, 1))[: r.integers(0, ndim + 1)])
    return pick(r, None, None, 0, -1, several, several, tuple(a - ndim for a in several), axis_of(r, ndim), (0, 0))


def integers(r, high, *of):
    """Integers in (and, rarely, outside of) [0, high), of any kind, and what NumPy might take for integers."""
    x = r.integers(-1 if r.random() < 0.1 else 0, max(high, 1) + (r.random() < 0.05), size=of)
    kind = pick(r, *"iiiiiiqIhB?fd")
    return x.astype(kind)


def mask(r, *of):
    return pick(r, *[r.random(of) < 0.7] * 6, (r.random(of) < 0.7).astype(int), r.random(of), True, [True])


def key_of(r, x):
    """An index for `x[key]`, in every form that NumPy knows and some that it does not."""
    n = max([1, *x.shape])
    duplicates = lambda: r.integers(-min([1, *x.shape]), min([1, *x.shape]) or 1, size=pick(r, (), (2,), (3,), (2, 2)))
    one = lambda: pick(
        r, 0, -1, 0, np.int64(0), np.uint8(0), True, np.True_, 0.0, slice(None), slice(None), slice(0, 2),
        slice(None, None, -1), slice(1, 1), None, ..., duplicates(), duplicates(), duplicates().astype(np.uint16),
        duplicates().tolist(),
        tuple(np.atleast_1d(duplicates()).ravel().tolist()), array.array("i", [0, 0]), range(1), "0", 0.5,
        r.random(x.shape[:1]) < 0.6, r.random(x.shape) < 0.6, r.random(n) < 0.5, duplicates() * 1.0, Tensor(0.0),
    )  # fmt: skip
    return one() if r.random() < 0.4 else tuple(one() for _ in range(r.integers(0, 4)))


# ---- one generator for each op: (inputs, settings)

CASES = {}


def case(*names):
    def register(make):
        CASES.update(dict.fromkeys(names, make))
        return make

    return register


@case("add", "subtract", "multiply", "maximum", "minimum")
def two(r):
    of = shape(r)
    return [operand(r, of), operand(r, of)], {}


@case("divide")
def quotient(r):
    of = shape(r)
    b = normal(r, *beside(r, of))
    return [operand(r, of), pick(r, Tensor(b + np.sign(b), True), b + np.sign(b), 3)], {}


@case("power")
def base_and_exponent(r):
    of = shape(r)
    base, exponent = np.exp(normal(r, *beside(r, of))), operand(r, of)
    return [pick(r, Tensor(base, True), Tensor(base, True), base, 2), exponent], {}


@case("negative", "exp", "tanh", "sigmoid", "softplus", "relu", "absolute")
def one(r):
    return [tensor(r, *shape(r))], {}


@case("log", "sqrt")
def positive(r):
    return [Tensor(np.exp(normal(r, *shape(r))), True)], {}


@case("leaky_relu")
def with_slope(r):
    return [tensor(r, *shape(r))], {
        "slope": pick(r, 0.01, 0, 1, -0.5, np.float32(0.1), np.ones(3), None, "0.1", math.nan)
    }


@case("clip")
def between(r):
    low, high = (
        pick(r, -0.3, -1, 0.5, None, np.zeros(3), math.nan),
        pick(r, 0.3, 1, -0.5, None, np.float64(2), np.ones((2, 1))),
    )
    return [tensor(r, *shape(r))], {"low": low, "high": high}


@case("where")
def either(r):
    of = shape(r)
    return [mask(r, *beside(r, of)), operand(r, of), operand(r, of)], {}


@case("dropout")
def dropped(r):
    of = shape(r)
    return [tensor(r, *of), mask(r, *pick(r, of, beside(r, of)))], {"rate": pick(r, 0.0, 0.5, 0, 1.0, -1)}


@case("mask_logits")
def masked(r):
    of = shape(r, 1)
    return [tensor(r, *of), mask(r, *pick(r, of, beside(r, of)))], {}


@case("sum", "mean", "max", "logsumexp")
def reduction(r):
    of = shape(r)
    return [tensor(r, *of)], {"axis": axes_of(r, len(of)), "keepdims": pick(r, False, True, 0, 1)}


@case("cumsum")
def along(r):
    of = shape(r)
    return [tensor(r, *of)], {"axis": axis_of(r, len(of))}


@case("matmul")
def product(r):
    n, batch = int(r.integers(1, 4)), shape(r, 0, 2)
    a, b = (*beside(r, batch), 2, n), (*beside(r, batch), n, 3)
    a, b = pick(r, a, a, a[-1:], shape(r)), pick(r, b, b, b[-2:-1], b[-2:], shape(r))
    a, b = normal(r, *a), normal(r, *b)
    return [
        pick(r, Tensor(a, True), Tensor(a, True), a, a.tolist()),
        pick(r, Tensor(b, True), Tensor(b, True), b, 2.0),
    ], {}


@case("reshape")
def reshaped(r):
    of = shape(r)
    n = math.prod(of)
    return [tensor(r, *of)], {
        "shape": pick(r, n, -1, (n,), (-1,), (1, n), (n, -1), of[::-1], [n, 1], (2, -1), None, (0, -1), 1.0)
    }


@case("transpose")
def transposed(r):
    of = shape(r)
    order = [int(i) for i in r.permutation(len(of))]
    return [tensor(r, *of)], {
        "axes": pick(r, None, tuple(order), order, tuple(i - len(of) for i in order), (0, 0), 0, (True, False))
    }


@case("concat")
def joined(r):
    of = shape(r, 1)
    axis = axis_of(r, len(of))
    change = lambda: tuple(int(r.integers(0, 3)) if i == 0 and r.random() < 0.5 else n for i, n in enumerate(of))
    parts = [normal(r, *pick(r, of, of, change(), shape(r))) for _ in range(r.integers(0, 4))]
    return [pick(r, Tensor(x, True), Tensor(x, True), x) for x in parts], {"axis": axis}


@case("stack")
def stacked(r):
    of = shape(r)
    parts = [normal(r, *pick(r, of, of, of, of, shape(r))) for _ in range(r.integers(0, 4))]
    return [pick(r, Tensor(x, True), Tensor(x, True), x) for x in parts], {"axis": axis_of(r, len(of) + 1)}


@case("split")
def cut(r):
    of = shape(r, 1)
    return [tensor(r, *of)], {
        "sections": pick(r, 1, 2, 3, 0, -1, [1], (1, 2), np.int64(1), True, 1.0),
        "axis": axis_of(r, len(of)),
    }


@case("getitem")
def picked(r):
    x = tensor(r, *shape(r))
    return [x], {"key": key_of(r, x)}


@case("gather")
def gathered(r):
    of = shape(r, 1)
    axis = axis_of(r, len(of))
    at = axis if type(axis) is int and -len(of) <= axis < len(of) else 0
    index = list(of)
    index[at] = int(r.integers(0, 4))
    return [tensor(r, *of), integers(r, of[at], *pick(r, index, index, index, shape(r)))], {"axis": axis}


@case("take")
def taken(r):
    of = shape(r, 1)
    axis = axis_of(r, len(of))
    at = axis if type(axis) is int and -len(of) <= axis < len(of) else 0
    index = integers(r, of[at], *shape(r, 0, 2))
    return [tensor(r, *of), pick(r, *[index] * 6, 0, -1, True, 0.5, [0, 0], (0,), "0", None, slice(0, 1))], {
        "axis": axis
    }


@case("softmax", "log_softmax", "kl_to_uniform")
def logits(r):
    return [tensor(r, *shape(r, 0))], {}


@case("kl_to_fair_coin")
def coins(r):
    return [tensor(r, *shape(r))], {}


@case("kl_to_standard_normal")
def moments(r):
    of = shape(r)
    return [operand(r, of), operand(r, of)], {}


@case("cross_entropy")
def labelled(r):
    of = shape(r, 1)
    return [tensor(r, *of), integers(r, of[-1], *pick(r, of[:-1], of[:-1], of[:-1], shape(r)))], {}


@case("bce_with_logits")
def pixels(r):
    of = shape(r)
    x = r.uniform(0.05, 0.95, size=beside(r, of))
    return [tensor(r, *of), pick(r, Tensor(x, True), x, (x > 0.5).astype(int), x > 0.5, 1, 0.5, 2.0, 3 * x)], {}


@case("linear", "linear_relu")
def layer(r):
    i, o = int(r.integers(1, 4)), int(r.integers(1, 4))
    x = pick(r, (*shape(r, 0, 2), i), (*shape(r, 0, 2), i), shape(r), (2, 2 * i))
    w, b = pick(r, (i, o), (i, o), (i, o), (i, o, o), shape(r)), pick(r, (o,), (o,), (o,), (1, o), (), (o, o), shape(r))
    return [pick(r, tensor(r, *x), normal(r, *x)), tensor(r, *w), tensor(r, *b)], {}


@case("embedding")
def rows(r):
    of = pick(r, shape(r, 2, 2), shape(r, 2, 2), shape(r))
    ids = integers(r, of[0] if of else 1, *shape(r, 0, 2))
    return [tensor(r, *of), pick(r, *[ids] * 6, 0, True, [0, 0], ids.tolist())], {}


@case("lstm_cell", "tree_lstm_cell")
def cell(r, children=1):
    H, batch = int(r.integers(1, 4)), shape(r, 0, 2)
    a = (*batch, (3 + children) * H)
    states = [(*pick(r, batch, batch, batch, batch, beside(r, batch)), H) for _ in range(children)]
    return [tensor(r, *pick(r, a, a, a, a, a, shape(r))), *(tensor(r, *c) for c in states)], {}


CASES["tree_lstm_cell"] = lambda r: cell(r, children=2)


@case("lstm")
def sequence(r):
    T, B, inputs, H = (int(n) for n in r.integers(1, 4, size=4))
    one = lambda of, *others: tensor(r, *pick(r, *[of] * 9, *others))
    b = (4 * H,)
    return [
        one((T, B, inputs), (B, inputs)),
        one((inputs, 4 * H), (4 * H,)),
        one((H, 4 * H), (H, H)),
        one(b, (1, *b), (B, *b), ()),
    ], {}


def image(r):
    return pick(r, *[tuple(int(n) for n in r.integers(1, [3, 3, 6, 6]))] * 6, shape(r), (2, 0, 3, 3))


@case("conv2d")
def convolved(r):
    of, O = image(r), int(r.integers(1, 4))
    C = of[1] if len(of) > 1 else 1
    window = tuple(int(n) for n in r.integers(1, 4, size=2))
    w = pick(r, *[(C, *window, O)] * 6, shape(r), (C + 1, *window, O))
    settings = {"stride": pick(r, 1, 1, 2, 3, 0, -1, 1.0, (1, 1)), "padding": pick(r, 0, 0, 0, 1, 2, -1, 0.5, "same")}
    return [tensor(r, *of), tensor(r, *w), tensor(r, *pick(r, *[(O,)] * 6, (1, O), ()))], settings


@case("max_pool2d", "avg_pool2d")
def pooled(r):
    size, stride = pick(r, 2, 2, 1, 3, 0, -1, (2, 2), 2.0), pick(r, None, None, 1, 2, 3, 0, True, 1.5)
    return [tensor(r, *image(r))], {"size": size, "stride": stride}


@case("hard_step", "sign")
def thresholded(r):
    return [tensor(r, *shape(r))], {
        "proxy": pick(r, *hard.STEP, *hard.SIGN, "sigmoids", None),
        "width": pick(r, 1, 1.0, 0.5, np.float32(2), 0, -1, math.inf, math.nan, np.ones(3), "1"),
    }


@case("quantised_relu")
def staircase(r):
    bits, step = pick(r, 1, 2, 4, 16, 0, 17, 2.0, True, None), pick(r, 0.3, 1, np.float64(0.1), 0, -1, math.nan, None)
    return [tensor(r, *shape(r))], {"bits": bits, "step": step, "proxy": pick(r, *hard.QUANTISED, "triangle")}


@case("integrate_and_fire")
def currents(r):
    return [tensor(r, *shape(r))], {
        "leak": pick(r, *[1, 0.5, 0.0, 1.0, np.float32(0.3)] * 3, -0.1, 2, math.nan, np.ones(3)),
        "reset": pick(r, *[*spiking.RESETS] * 4, "soft", None),
        "detach_reset": pick(r, True, False),
        "proxy": pick(r, *["rectangle", "triangle", "sigmoid", "arctan"] * 2, "clipped"),
        "threshold": pick(r, *[1.0, 1, 0.3, 2] * 4, 0, -1, math.inf, "1"),
    }


# ---- a trial


def function_of(name):
    return next(getattr(module, name) for module in MODULES if hasattr(module, name))


@np.errstate(all="ignore")  # a mean of nothing is not a number
def trial(name, number, function=None):
    """Whether the op accepted the inputs of this trial; AssertionError if its gradient is then a wrong one."""
    function = function or function_of(name)
    r = np.random.default_rng([number, *name.encode()])
    inputs, settings = CASES[name](r)
    about = f"trial({name!r}, {number}): {inputs} {settings}"
    tensors = [x for x in inputs if type(x) is Tensor]
    try:
        ys = as_tuple(function(*inputs, **settings))
    except REFUSED:
        return False
    if not tensors:
        return False
    gs = [r.standard_normal(y.shape) for y in ys]
    try:
        found = grad(weighed(ys, gs), tensors)
    except Exception as error:
        raise AssertionError(f"{about}: accepted, and then {type(error).__name__}: {error}") from error

    smooth = function
    if function.op.surrogate:  # a proxy is the derivative of another function than the one that is computed
        _, surrogate = function.op.surrogate(*(x.data for x in inputs), **settings)
        smooth = lambda x, **_: Tensor(surrogate(x.data))
    for x, dx in zip(tensors, found, strict=True):
        v = r.standard_normal(x.shape)
        move = lambda step: [Tensor(x.data + step * v) if each is x else each for each in inputs]  # noqa: B023
        value = lambda step: weighed(as_tuple(smooth(*move(step), **settings)), gs).item()  # noqa: B023
        up, down = value(_H), value(-_H)
        if math.isfinite(up):  # a mean of nothing is NaN
            true, rule = (up - down) / (2 * _H), float((dx * v).sum())
            assert abs(true - rule) <= 1e-6 * (1 + abs(true) + abs(up)), f"{about}: {rule:.8g}, differences {true:.8g}"

    check_float32(function, inputs, settings, gs, found, about)
    return True


def check_float32(function, inputs, settings, gs, expected, about):
    """The same in single precision, unless the op refuses it."""
    single = lambda a: a.astype(np.float32) if getattr(a, "dtype", None) == np.float64 else a
    inputs = [Tensor(single(x.data), True) if type(x) is Tensor else single(x) for x in inputs]
    try:
        ys = as_tuple(function(*inputs, **settings))
    except REFUSED:
        return
    tensors = [x for x in inputs if type(x) is Tensor]
    for x, dx, right in zip(tensors, grad(weighed(ys, map(single, gs)), tensors), expected, strict=True):
        assert dx.dtype == x.dtype == np.float32, about
        close = np.isclose(dx, right, rtol=1e-3, atol=1e-3 * np.abs(right).max(initial=1.0), equal_nan=True)
        assert close.all(), f"{about}: float32 gives {dx}, float64 {right}"


def as_tuple(y):
    return y if isinstance(y, tuple) else (y,)


def weighed(ys, gs):
    first, *others = [(y * g).sum() for y, g in zip(ys, gs, strict=True)]
    for y in others:
        first = first + y
    return first


# ---- tests


def test_every_op_has_a_generator():
    names = {f.__name__ for module in MODULES for f in vars(module).values() if hasattr(f, "rule")}
    assert names == CASES.keys()


@pytest.mark.filterwarnings("ignore:Mean of empty slice")
@pytest.mark.parametrize("name", CASES)
def test_an_op_refuses_its_inputs_or_has_the_right_gradient(name):
    accepted = [trial(name, number) for number in range(TRIALS)]
    assert np.sum(accepted) > 0.12 * TRIALS


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Mean of empty slice")
@pytest.mark.parametrize("name", CASES)
def test_an_op_refuses_its_inputs_or_has_the_right_gradient_in_many_trials(name):
    for number in range(TRIALS, MANY):
        trial(name, number)


@op
def multiply(a, b):
    """Does not undo broadcasting."""
    return a * b, lambda g: (g * b, g * a)


@op
def kl_to_standard_normal(mean, log_variance):
    """Does so for whole axes, but forgets that a mean may count several times along the last one."""
    variance = np.exp(log_variance)
    y = 0.5 * (mean * mean + variance - 1.0 - log_variance).sum(axis=-1)
    dmean = lambda g: unbroadcast(g[..., None] * mean, mean.shape)
    return y, lambda g: (dmean(g), unbroadcast(0.5 * g[..., None] * (variance - 1.0), variance.shape))


@op
def getitem(x, *, key):
    """Takes NumPy's word for what is an index, and writes instead of adding."""

    def backward(g):
        dx = np.zeros_like(x)
        dx[key] = g
        return dx

    return np.asarray(x[key]), backward


@op
def mask_logits(logits, mask):
    """Chooses by the truth of a number and weighs by its value."""
    return np.where(mask, logits, fused.MASKED), lambda g: (unbroadcast(g * mask, logits.shape), None)


@op
def gather(x, index, *, axis=-1):
    """Forgets that an element may be picked twice."""

    def backward(g):
        dx = np.zeros_like(x)
        np.put_along_axis(dx, index, g, axis)
        return dx, None

    return np.take_along_axis(x, index, axis), backward


@op
def logsumexp(x, *, axis=None, keepdims=False):
    """Right for float64 alone."""
    y, backward = ops.logsumexp.rule(x, axis=axis, keepdims=keepdims)
    return y, backward if x.dtype == np.float64 else lambda g: 1.01 * backward(g)


@pytest.mark.parametrize(
    "wrong", [multiply, kl_to_standard_normal, getitem, mask_logits, gather, logsumexp], ids=lambda f: f.__name__
)
def test_a_planted_error_is_found(wrong):
    with pytest.raises(AssertionError, match=r"trial\("):
        [trial(wrong.__name__, number, wrong) for number in range(TRIALS)]


ESTIMATOR_OPS = {
    f.__name__: f
    for found in pkgutil.iter_modules(estimators.__path__)
    for f in vars(importlib.import_module(f"estimators.{found.name}")).values()
    if hasattr(f, "rule") and f.__module__.startswith("estimators.")
}


@pytest.mark.parametrize("name", ESTIMATOR_OPS)
def test_what_was_drawn_for_other_logits_is_refused(name):
    """It would broadcast: the output has one shape, and the surrogate whose gradient is passed back has another."""
    function, logits = ESTIMATOR_OPS[name], (2, 3)
    shapes = {"exponential": (4, *logits), "value": (2,)}
    spec = inspect.getfullargspec(function.rule)
    shapes = {p: shapes.get(p, logits) for p in spec.args}
    settings = dict.fromkeys(spec.kwonlyargs, 0.5) if not spec.kwonlydefaults else {}
    call = lambda shapes: function(*(Tensor(np.full(of, 0.5), p == "logits") for p, of in shapes.items()), **settings)
    call(shapes)
    for other in shapes.keys() - {"logits"}:
        for of in [(3,), (1,), (2, 1), (1, 3), (3, 2), (6, 5, 2, 3)]:
            with pytest.raises(ValueError, match="logits"):
                call(shapes | {other: of})
