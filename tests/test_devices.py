"""What is assumed of a device array. The same assertions run on the stand-in, where they prove that it refuses what
CuPy refuses, and (marker `gpu`) on CuPy itself, where they prove that the stand-in is right about it."""

import sys
import types

import devsim
from devsim import DevsimBackend, ForbiddenTransfer, forbid
from minigrad import Rng
from minigrad.backend import BackendUnavailable, array_module, asarray_like, get_backend, load_cupy, to_host

import numpy as np
import pytest


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


@pytest.mark.parametrize(
    ("action", "error"),
    [
        (lambda d, xp: d[np.array([0, 1])], TypeError),
        (lambda d, xp: d[[0, 1]], TypeError),
        (lambda d, xp: d[xp.asarray(np.array([7]))], IndexError),
        (lambda d, xp: d.__setitem__(xp.asarray(np.array([0, 0])), xp.asarray(np.arange(2.0))), ValueError),
        (lambda d, xp: np.exp(d), TypeError),
        (lambda d, xp: np.concatenate([d, d]), TypeError),
    ],
)
def test_the_stand_in_refuses_what_cupy_would_do_silently_or_wrongly(action, error):
    backend = DevsimBackend()
    with pytest.raises(error):
        action(backend.to_device(HOST), backend.xp)


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
