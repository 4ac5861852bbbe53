"""What is assumed of a device array. The same assertions run on the stand-in, where they prove that it refuses what
CuPy refuses, and (marker `gpu`) on CuPy itself, where they prove that the stand-in is right about it."""

import contextlib
import operator
import sys
import types

import numpy as np
import pytest

import devsim
from devsim import DevsimBackend, ForbiddenTransfer, forbid
from estimators import create
from minigrad import Rng, Tensor, grad, kernels
from minigrad.backend import Backend, BackendUnavailable, array_module, asarray_like, get_backend, load_cupy, to_host
from minigrad.check import gradcheck
from minigrad.fused import TINY
from models.tree_lstm import TreeLSTM
from models.vae import BernoulliVAE, CategoricalVAE


@pytest.fixture(params=["devsim", pytest.param("cupy", marks=pytest.mark.gpu)])
def device(request):
    if request.param == "devsim":
        return DevsimBackend()
    try:
        return get_backend("cupy")
    except BackendUnavailable as error:
        pytest.skip(f"GPU NOT RUN: {error}")


HOST = np.arange(6, dtype=np.float32).reshape(2, 3)

REFUSED = {
    "np.asarray(device)": (lambda d, xp: np.asarray(d), TypeError),
    "device + host": (lambda d, xp: d + HOST, TypeError),
    "host + device": (lambda d, xp: HOST + d, TypeError),
    "xp.exp(host)": (lambda d, xp: xp.exp(HOST), TypeError),
    "xp.exp(list)": (lambda d, xp: xp.exp([1.0, 2.0]), TypeError),
    "xp.maximum(device, host)": (lambda d, xp: xp.maximum(d, HOST), TypeError),
    "host[device]": (lambda d, xp: HOST[d.astype(np.int64)], (TypeError, IndexError)),
    "device[:] = host": (lambda d, xp: d.__setitem__(slice(None), HOST), (TypeError, ValueError)),
    "sum(where=)": (lambda d, xp: d.sum(where=d > 0), TypeError),
    "max(initial=)": (lambda d, xp: d.max(initial=0), TypeError),
    "xp.exp(where=)": (lambda d, xp: xp.exp(d, where=d > 0), TypeError),
    "xp.clip(min=)": (lambda d, xp: xp.clip(d, min=0, max=1), TypeError),
    "xp.unstack": (lambda d, xp: xp.unstack(d), AttributeError),
    "xp.errstate": (lambda d, xp: xp.errstate(), AttributeError),
    "xp.logaddexp.reduce": (lambda d, xp: xp.logaddexp.reduce(d), (AttributeError, NotImplementedError, TypeError)),
    "xp.multiply.at": (
        lambda d, xp: xp.multiply.at(d, xp.asarray(np.array([0])), 1.0),
        (AttributeError, NotImplementedError),
    ),
    "iteration of a 0-d array": (lambda d, xp: list(d.sum()), TypeError),
    "device.setflags": (lambda d, xp: d.setflags(write=False), AttributeError),
    "device == list": (lambda d, xp: d == [1.0], TypeError),
    "device += Tensor": (lambda d, xp: operator.iadd(d, Tensor(d)), TypeError),
    "device[0] = list": (lambda d, xp: d.__setitem__(0, [1.0, 2.0, 3.0]), (TypeError, ValueError)),
    "xp.where(bool, ...)": (lambda d, xp: xp.where(True, d, 0.0), (TypeError, AttributeError)),
    "xp.stack([device, number])": (lambda d, xp: xp.stack([d.sum(), 1.0]), TypeError),
    "xp.broadcast_to(number)": (lambda d, xp: xp.broadcast_to(1.0, (2,)), TypeError),
    "xp.asarray(None)": (lambda d, xp: xp.asarray(None), ValueError),
    "xp.asarray(str)": (lambda d, xp: xp.asarray("x"), ValueError),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_device_array_refuses(device, what):
    action, error = REFUSED[what]
    with pytest.raises(error):
        action(device.to_device(HOST), device.xp)


def test_a_device_array_offers_what_the_rules_use(device):
    d, xp = device.to_device(HOST), device.xp
    assert array_module(d) is xp
    assert d.dtype == np.float32
    total = d.sum()
    assert total.shape == ()
    assert array_module(total) is xp  # a 0-d array, where NumPy gives a scalar
    np.testing.assert_array_equal(device.to_host(d), HOST)
    np.testing.assert_allclose(to_host(xp.einsum("...k,...k->...", d, d)), (HOST * HOST).sum(axis=-1))
    np.testing.assert_allclose(to_host(xp.matmul(d, d.T, out=xp.empty((2, 2), dtype=np.float32))), HOST @ HOST.T)
    np.testing.assert_array_equal(to_host(asarray_like(HOST, d)), HOST)
    target = xp.zeros(3, dtype=np.float32)
    xp.add.at(target, xp.asarray(np.array([0, 0, 2])), d[0])
    np.testing.assert_array_equal(to_host(target), [1.0, 0.0, 2.0])
    assert (2.0 * d).dtype == np.float32
    assert (d > 1).dtype == bool
    moved = d[:, 1:]
    moved += 1.0  # views share memory
    np.testing.assert_array_equal(to_host(d)[:, 1:], HOST[:, 1:] + 1)
    zero = d.sum()
    alias = zero
    zero += 1.0  # …and 0-d arrays are mutable, which is why the engine never writes into one
    assert to_host(alias) == to_host(zero)
    np.testing.assert_allclose(to_host(d.mean(axis=0)), to_host(d).mean(axis=0))


def shifted(d):
    """d[1:] += d[:-1], which must read all of d before it writes."""
    a = d.reshape(-1).copy()
    a[1:] += a[:-1]
    return a


def product_into_rows(d, xp):
    rows = xp.zeros((4, 2), dtype=d.dtype)
    xp.matmul(d[:, :2].T, d[:, 1:], out=rows[1:3])
    return rows


# claim: (of the device array `HOST`, the same of NumPy's): equal in dtype, shape and, to rounding, value
ALIKE = {
    "a 0-d array has a dtype that counts": lambda d, xp: d * xp.asarray(np.array(2.0)),
    "a Python number has none": lambda d, xp: 1.0 - 2 * d,
    "booleans become zeros and ones": lambda d, xp: (d > 1) * d,
    "a sum of booleans is a count": lambda d, xp: (d > 1).sum(axis=1),
    "where takes the array's dtype": lambda d, xp: xp.where(d > 1, 0.0, d),
    "0-d arrays can be stacked": lambda d, xp: xp.stack([d.sum(), d.max()]),
    "einsum stretches missing axes": lambda d, xp: xp.einsum("...k,...k->...", xp.stack([d] * 4), d),
    "a copy is in the order of C": lambda d, xp: d.T.copy().reshape(-1),
    "sums along a reversed view": lambda d, xp: xp.cumsum(d[:, ::-1], axis=1)[:, ::-1],
    "a product into some rows": product_into_rows,
    "overlapping views": lambda d, xp: shifted(d),
    "a sum of nothing": lambda d, xp: d[:0].sum(axis=0),
    "sums along an axis of nothing": lambda d, xp: xp.cumsum(d[:, :0], axis=-1),
    "a product over nothing": lambda d, xp: d[:, :0] @ d[:, :0].T,
    "the first of several maxima": lambda d, xp: xp.zeros((3, 2000), dtype=d.dtype).argmax(axis=-1),
    "… along short rows": lambda d, xp: xp.zeros((2000, 3), dtype=d.dtype).argmax(axis=-1),
    "… and of all": lambda d, xp: xp.zeros(5000, dtype=d.dtype).argmax(),
    "TINY is no zero where subnormal numbers are": lambda d, xp: xp.log(xp.maximum(0.0 * d, TINY)),
}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_kernels_are_the_sums_of_numpy(device, dtype):
    a, b = Rng(0).normal((5, 1, 40), like=np.empty(0, dtype)), Rng(1).normal((1, 3, 40), like=np.empty(0, dtype))
    on_device = [device.to_device(x) for x in (a, b)]
    close = {"rtol": 1e-5 if dtype == np.float32 else 1e-12, "atol": 1e-5}
    np.testing.assert_allclose(to_host(kernels.inner(*on_device)), (a * b).sum(axis=-1), **close)
    np.testing.assert_allclose(to_host(kernels.total(on_device[0].T)), a.T.sum(axis=-1), **close)
    assert kernels.inner(*on_device).dtype == dtype
    assert to_host(kernels.inner(on_device[0][..., :0], on_device[1][..., :0])).sum() == 0.0
    with pytest.raises(TypeError, match="Type is mismatched"):
        kernels.inner(on_device[0], on_device[0].astype(np.float16))


@pytest.mark.parametrize("what", ALIKE)
def test_a_device_array_behaves_as_numpy_s_does(device, what):
    expected, found = ALIKE[what](HOST, np), ALIKE[what](device.to_device(HOST), device.xp)
    assert array_module(found) is device.xp
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    np.testing.assert_allclose(to_host(found), expected, rtol=1e-5)


def test_a_tensor_may_stand_right_of_a_device_array(device):
    d = device.to_device(HOST + 1.0)
    x = Tensor(d, requires_grad=True)
    for name in ("add", "sub", "mul", "truediv", "pow"):
        for left in (d, d.sum()):
            assert type(getattr(operator, name)(left, x)) is Tensor
    assert type(d @ x.T) is Tensor
    for name in ("lt", "le", "gt", "ge"):
        assert array_module(getattr(operator, name)(d, x)) is device.xp


@contextlib.contextmanager
def no_waiting(device):
    """Nothing inside may wait for the device or copy from it; on CuPy by its own detector."""
    if device.name == "cupy":
        import cupyx

        with cupyx.allow_synchronize(False):
            yield
    else:
        with forbid("sync", "d2h"):
            yield


PAIRS = [(name, "categorical") for name in ("st-gs", "gumbel-rao", "rebar", "unordered-set", "disarm-sb", "arsm")]
PAIRS += [(name, "bernoulli") for name in ("exact", "arms", "nvil", "rodeo", "reinforce-minvar")]


@pytest.mark.filterwarnings("ignore:cupyx.allow_synchronize")  # it says that it does not see every wait
@pytest.mark.parametrize(("name", "family"), PAIRS)
def test_an_estimated_gradient_stays_on_the_device(device, name, family):
    results = []
    for backend in (Backend(), device):
        make = CategoricalVAE if family == "categorical" else BernoulliVAE
        sizes = (12, 2, 3, (8,)) if family == "categorical" else (12, 3, (8,))
        model, x = make(*sizes, rng=Rng(0)).to(backend), backend.to_device(Rng(0).uniform((5, 12)))
        estimator = create(name, family=family)
        with no_waiting(backend):
            reconstruction, kl = model.negative_elbo(x, estimator, Rng(1))
            (reconstruction + kl).mean().backward()
            estimator.update()
        results.append([to_host(reconstruction.data), *(to_host(p.grad) for p in model.parameters())])
    for expected, found in zip(*results, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.filterwarnings("ignore:cupyx.allow_synchronize")  # it says that it does not see every wait
@pytest.mark.parametrize("encoder", ["latent", "tree", "lstm"])
def test_the_gradient_of_a_tree_stays_on_the_device(device, encoder):
    results, lengths = [], np.array([5, 3, 1])
    for backend in (Backend(), device):
        model = TreeLSTM(6, 3, dim=4, hidden=5, encoder=encoder, rng=Rng(0)).to(backend)
        ids, labels = (backend.to_device(x) for x in (np.arange(15).reshape(3, 5) % 6, np.array([0, 1, 2])))
        with no_waiting(backend):
            cost = model.cost(ids, lengths, labels, Rng(1), create("st-gs"), np.zeros((3, 4), np.int64))
            cost.mean().backward()
        results.append([to_host(cost.data), *(to_host(p.grad) for p in model.parameters())])
    for expected, found in zip(*results, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5)


def test_a_gradient_from_the_host_is_refused(device):
    """CuPy refuses it as an operand of a device array; times a number, it would become the gradient of a leaf."""
    x = Tensor(device.to_device(HOST), requires_grad=True)
    with pytest.raises(TypeError, match="same device"):
        (x * 2.0).backward(HOST)
    with pytest.raises(TypeError, match="same device"):
        grad(x * 2.0, [x], HOST)
    (x * 2.0).backward(device.to_device(HOST))
    np.testing.assert_array_equal(to_host(x.grad), 2.0 * HOST)


def test_gradients_of_a_function_are_checked_at_a_device_array(device):
    gradcheck(lambda a, b: a * b, [device.to_device(HOST), Tensor(device.to_device(HOST))])


def test_the_same_numbers_and_nearly_the_same_values(device):
    rng = Rng(1)
    d = rng.gumbel((4, 5), like=device.to_device(HOST))
    np.testing.assert_array_equal(device.to_host(d), rng.gumbel((4, 5)))


# ---- the stand-in alone: it is stricter than CuPy where CuPy is silently slow or wrong


@pytest.mark.parametrize(
    ("kind", "action"),
    [
        ("sync", lambda d: float(d.sum())),
        ("sync", lambda d: bool(d.sum() > 0)),
        ("sync", lambda d: d.sum().item()),
        ("sync", lambda d: d.tolist()),
        ("sync", lambda d: f"{d}"),
        ("sync", lambda d: d[d > 0]),
        ("sync", lambda d: d.__setitem__(d > 0, 0.0)),
        ("sync", lambda d: devsim.xp.flatnonzero(d)),
        ("sync", lambda d: devsim.xp.where(d > 0)),
        ("sync", lambda d: d.nonzero()),
        ("sync", lambda d: devsim.xp.unique(d)),
        ("sync", lambda d: devsim.xp.arange(d.sum())),
        ("sync", lambda d: bool(devsim.xp.allclose(d, d))),
        ("d2h", lambda d: d.get()),
        ("d2h", lambda d: to_host(d)),
        ("h2d", lambda d: devsim.xp.asarray(HOST)),
    ],
)
def test_forbid_catches_every_hidden_transfer(kind, action):
    d = DevsimBackend().to_device(HOST)
    before = devsim.stats[kind]
    action(d)
    assert devsim.stats[kind] == before + 1
    with forbid(kind), pytest.raises(ForbiddenTransfer):
        action(d)


LAUNCHES = {
    "a sum": (lambda d, xp: d + 1.0, 1),
    "a sum in place": (lambda d, xp: operator.iadd(d, 1.0), 1),
    "a sum into an array": (lambda d, xp: xp.add(d, 1.0, out=d), 1),
    "a reduction": (lambda d, xp: d.sum(), 1),
    "slices": (lambda d, xp: d[:, 1:], 0),
    "a number as an index": (lambda d, xp: d[0, 1], 0),
    "an array as an index": (lambda d, xp: d[xp.asarray(np.array([0, 1]))], 1),
    "an assignment": (lambda d, xp: d.__setitem__(slice(None), 1.0), 1),
    "transposed": (lambda d, xp: d.T, 0),
    "reshaped": (lambda d, xp: d.reshape(3, 2), 0),
    "reshaped, which needs a copy": (lambda d, xp: d.T.reshape(-1), 1),
    "stretched": (lambda d, xp: xp.broadcast_to(d, (4, 2, 3)), 0),
    "of the dtype it has": (lambda d, xp: d.astype(np.float32, copy=False), 0),
    "memory": (lambda d, xp: xp.empty((2, 3)), 0),
    "zeros": (lambda d, xp: xp.zeros((2, 3)), 1),
    "nothing": (lambda d, xp: d[:0] + 1.0, 0),
    "a product": (lambda d, xp: d @ d.T, 1),
    "a product of rows": (lambda d, xp: xp.matmul(d[:1], d.T), 1),
    "a product of columns, which are copied": (lambda d, xp: d[:, :2] @ d, 2),
    "products of transposed matrices, which are copied": (
        lambda d, xp: d.reshape(1, 2, 3) @ d.reshape(1, 2, 3).transpose(0, 2, 1),
        2,
    ),
}


@pytest.mark.parametrize("what", LAUNCHES)
def test_launches_are_counted_as_cupy_makes_them(what):
    (action, count), d = LAUNCHES[what], DevsimBackend().to_device(HOST)
    before = devsim.stats["launch"]
    action(d, devsim.xp)
    assert devsim.stats["launch"] - before == count


@pytest.mark.parametrize(
    ("action", "error"),
    [
        (lambda d, xp: d[np.array([0, 1])], TypeError),
        (lambda d, xp: d[[0, 1]], TypeError),
        (lambda d, xp: d[xp.asarray(np.array([7]))], IndexError),
        (lambda d, xp: d.__setitem__(xp.asarray(np.array([0, 0])), xp.asarray(np.arange(2.0))), ValueError),
        (lambda d, xp: np.exp(d), TypeError),
        (lambda d, xp: np.concatenate([d, d]), TypeError),
        (lambda d, xp: d == None, TypeError),  # noqa: E711 (CuPy compares each element with it)
    ],
)
def test_the_stand_in_refuses_what_cupy_would_do_silently_or_wrongly(action, error):
    backend = DevsimBackend()
    with pytest.raises(error):
        action(backend.to_device(HOST), backend.xp)


@pytest.mark.parametrize(("index", "error"), [([0, 7], IndexError), ([-1], IndexError), ([0.0], TypeError)])
def test_an_index_is_checked_before_it_is_sent(device, index, error):
    with pytest.raises(error, match="an index or label"):
        device.indices(index, 7)
    sent = device.indices(np.array([[0, 6]], np.uint8), 7)
    assert (sent.dtype, sent.shape) == (np.int64, (1, 2))


def test_a_mask_may_be_on_the_device_already(device):
    logits, mask = Tensor(device.to_device(HOST), requires_grad=True), HOST % 2 == 0
    with no_waiting(device):
        found = create("st").sample(logits, Rng(0), device.to_device(mask))
    np.testing.assert_array_equal(to_host(found.data), create("st").sample(Tensor(HOST), Rng(0), mask).data)
    with pytest.raises(TypeError, match="the mask must be booleans"):
        create("st").sample(logits, Rng(0), device.to_device(HOST))
    with pytest.raises(ValueError, match="does not fit logits"):
        create("st").sample(logits, Rng(0), device.to_device(mask[:, :2]))


def test_unknown_arrays_are_refused():
    for x in ([1.0], None, "x", 1.0):
        with pytest.raises(TypeError, match="known backend"):
            array_module(x)


def fake_cupy(version="14.2.0", devices=1):
    """A module that can be imported like CuPy on a machine without a driver, and fails where CuPy fails there."""

    def get_device_count():
        if devices is None:
            raise RuntimeError("cudaErrorInsufficientDriver: CUDA driver version is insufficient\nmore lines")
        return devices

    cupy = types.ModuleType("cupy")
    cupy.__version__ = version
    cupy.cuda = types.SimpleNamespace(runtime=types.SimpleNamespace(getDeviceCount=get_device_count))
    return cupy


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (None, "CuPy cannot be imported .*pip install 'cupy-cuda13x"),
        (fake_cupy(version="13.6.0"), "CuPy 13.6.0 is not version 14"),
        (fake_cupy(version="dev"), "CuPy dev is not version 14"),
        (fake_cupy(devices=None), "finds no usable GPU .cudaErrorInsufficientDriver.*nvidia-smi"),
        (fake_cupy(devices=0), "finds no usable GPU .no device is visible"),
        (fake_cupy(devices=1), "finds no usable GPU .*arange"),  # the driver is there, but nothing computes
    ],
)
def test_an_unusable_cupy_is_explained_in_one_sentence(monkeypatch, module, message):
    monkeypatch.setitem(sys.modules, "cupy", module)
    load_cupy.cache_clear()
    try:
        with pytest.raises(BackendUnavailable, match=message) as caught:
            get_backend("cupy")
        assert "\n" not in str(caught.value)
    finally:
        load_cupy.cache_clear()


def test_auto_falls_back_and_says_why(caplog):
    backend = get_backend("auto")
    if backend.name == "numpy":
        assert "using numpy, because CuPy" in caplog.text
        caplog.clear()
        assert get_backend("auto") is backend
        assert not caplog.text  # once
