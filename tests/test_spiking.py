"""Spiking networks: the gradient through time against differences of the surrogate network, the codes, the counts."""

import itertools

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from minigrad import Rng, Tensor
from minigrad.check import audit
from minigrad.hard import STEP
from minigrad.tensor import op
from models import spiking
from models.spiking import (
    CODES,
    RESETS,
    Continuous,
    Discontinuous,
    SpikingNetwork,
    integrate_and_fire,
    integrate_and_fire_plain,
    latency,
    rate,
    squared_hinge,
)

T, B, D, N, K = 4, 3, 5, 6, 3
BIAS = 0.1  # a membrane that is 0 would be on a kink of the rectangle's μ, where differences say nothing
SETTINGS = [
    {"leak": leak, "reset": reset, "detach_reset": detached, "proxy": proxy, "threshold": threshold}
    for leak, (reset, detached), (proxy, threshold) in itertools.product(
        (1.0, 0.8),
        (("subtract", False), ("subtract", True), ("zero", False), ("zero", True), ("none", False)),
        (("rectangle", 1.0), ("arctan", 0.7)),
    )
]
name = lambda settings: "-".join(map(str, settings.values()))
every_setting = pytest.mark.parametrize("settings", SETTINGS, ids=name)


# ---- the gradient through time, of a network of two spiking layers over four steps


def weights():
    r = np.random.default_rng(3)
    return [1.5 * r.standard_normal((D, N)) / np.sqrt(D), r.standard_normal((N, N)), r.standard_normal((N, K))]


X = (np.random.default_rng(4).random((T, B, D)) < 0.6).astype(np.float64)
G = np.random.default_rng(5).standard_normal((T, B, K))  # the loss is ⟨G, outputs⟩


def surrogate_network(ws, recorded, *, leak, reset, detach_reset, proxy, threshold):
    """The loss with s̃ = s + μ(u − c) − μ(u° − c) in place of each spike, written out in scalars.

    recorded: (s, u°) of each neuron, step by step, at the point where the gradient is taken; None records them
    """
    mu, record, x = STEP[proxy].function, [], X
    for w in ws[:-1]:
        out, left = np.zeros((T, B, w.shape[1])), np.zeros((B, w.shape[1]))
        for t in range(T):
            u = leak * left + x[t] @ w + BIAS
            if recorded is None:
                hard, s = (u > threshold) * 1.0, (u > threshold) * 1.0
                record.append((hard, u))
            else:
                hard, u0 = recorded[len(record)]
                s = hard + mu(u - threshold, np) - mu(u0 - threshold, np)
                record.append((hard, u0))
            fired = hard if detach_reset else s
            left = {"subtract": u - threshold * fired, "zero": u - u * fired, "none": u}[reset]
            out[t] = s
        x = out
    return float((G * (x @ ws[-1])).sum()), record


def check_gradient_through_time(neurons, settings):
    """AssertionError unless the tape's gradient is that of the surrogate network, and there is one to speak of.

    neurons: integrate_and_fire, or what claims to be
    """
    ws = [Tensor(w, requires_grad=True) for w in weights()]
    x = X
    for w in ws[:-1]:
        x = neurons(x @ w + BIAS, **settings)
    loss = (x @ ws[-1] * G).sum()
    value, recorded = surrogate_network(weights(), None, **settings)
    assert_allclose(loss.item(), value, rtol=1e-12)
    loss.backward()
    for n, w in enumerate(ws):
        true = np.empty(w.shape)
        for at in np.ndindex(w.shape):
            values = []
            for h in (1e-5, -1e-5):
                moved = weights()
                moved[n][at] += h
                values.append(surrogate_network(moved, recorded, **settings)[0])
            true[at] = (values[0] - values[1]) / 2e-5
        assert abs(true).max() > 0.1
        assert_allclose(w.grad, true, atol=1e-7)


@every_setting
def test_the_gradient_through_time_is_that_of_the_surrogate_network(settings):
    check_gradient_through_time(integrate_and_fire, settings)


@every_setting
def test_the_fused_rule_is_the_tape_s_to_the_last_bit(settings):
    I, g, found = np.random.default_rng(0).standard_normal((T, B, N)), np.random.default_rng(1), []
    g = g.standard_normal(I.shape)
    for neurons in (integrate_and_fire, integrate_and_fire_plain):
        x = Tensor(I, requires_grad=True)
        s = neurons(x, **settings)
        (s * g).sum().backward()
        found.append((s.data, x.grad))
    assert_array_equal(found[0], found[1])
    assert 0.05 < found[0][0].mean() < 0.95


def planted(*, by_s=lambda R: R.by_s, left=lambda R: R.left, slope=lambda proxy: STEP[proxy].derivative, detach=None):
    """`integrate_and_fire` with an error."""

    @op
    def neurons(currents, *, leak, reset, detach_reset, proxy, threshold):
        R, u, s, r = RESETS[reset], np.empty_like(currents), np.empty_like(currents), 0.0
        for t in range(len(currents)):
            u[t] = leak * r + currents[t]
            s[t] = u[t] > threshold
            r = left(R)(u[t], s[t], threshold)

        def backward(g):
            mu, du, dr = slope(proxy)(u - threshold, np), np.empty_like(u), 0.0
            for t in reversed(range(len(u))):
                ds = (
                    g[t] if (detach_reset if detach is None else detach) else g[t] + dr * by_s(R)(u[t], s[t], threshold)
                )
                du[t] = ds * mu[t] + dr * R.by_u(u[t], s[t], threshold)
                dr = leak * du[t]
            return du

        return s, backward

    return neurons


SUBTRACT = {"leak": 1.0, "reset": "subtract", "detach_reset": False, "proxy": "rectangle", "threshold": 0.7}
MISTAKES = {
    "the reset ignores the threshold": planted(left=lambda R: lambda u, s, c: u - s),
    "its derivative ignores the threshold": planted(by_s=lambda R: lambda u, s, c: -1.0),
    "the surrogate is silently zero": planted(slope=lambda proxy: lambda u, xp: np.zeros_like(u)),
    "the reset is detached and said to be differentiated": planted(detach=True),
    "the proxy is not at the threshold": planted(slope=lambda proxy: lambda u, xp: STEP[proxy].derivative(u + 0.7, xp)),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_check_finds_the_classical_mistakes(mistake):
    check_gradient_through_time(planted(), SUBTRACT)
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        check_gradient_through_time(MISTAKES[mistake], SUBTRACT)


def test_a_reset_that_is_differentiated_is_found_where_it_is_said_to_be_detached():
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        check_gradient_through_time(planted(detach=False), SUBTRACT | {"detach_reset": True})


# ---- the neurons


def test_the_soft_reset_is_the_published_sum():
    """u_t = Σ_{i≤t} I_i − Σ_{j<t} s_j."""
    I = np.random.default_rng(0).normal(0.4, 1.0, (9, 20))
    u, s = spiking.membranes(I, leak=1.0, reset="subtract")
    before = np.concatenate([np.zeros((1, 20)), np.cumsum(s, axis=0)[:-1]])
    assert_allclose(u, np.cumsum(I, axis=0) - before, atol=1e-12)
    assert_array_equal(s, u > 1.0)
    assert s.mean() > 0.2


def test_by_hand():
    u, s = spiking.membranes(np.array([0.75, 0.5, 0.5, 2.5]), leak=0.5, reset="subtract")
    assert_array_equal(u, [0.75, 0.875, 0.9375, 2.96875])
    assert_array_equal(s, [0, 0, 0, 1])
    u, s = spiking.membranes(np.array([1.5, 0.5, 0.5, 0.25]), leak=1.0, reset="zero")
    assert_array_equal(u, [1.5, 0.5, 1.0, 1.25])  # 1 is not above the threshold
    assert_array_equal(s, [1, 0, 0, 1])


def test_without_memory_continuous_integration_is_the_discontinuous_one():
    I = Tensor(np.random.default_rng(0).normal(0.5, 1.0, (T, B, N)), requires_grad=True)
    for neurons in (Discontinuous(), Continuous(leak=0.0), Continuous(leak=0.0, reset="none")):
        s = neurons(I)
        assert_array_equal(s.data, I.data > 1.0)
        (s * s.data).sum().backward()
        assert_array_equal(I.grad, s.data * 0.5 * (abs(I.data - 1.0) < 1.0))  # the published ½ [0 < u < 2]
        I.grad = None


def test_a_current_that_is_not_a_number_does_not_vanish_in_a_spike():
    _, s = spiking.membranes(np.array([0.5, np.nan, 2.0]), leak=1.0, reset="subtract")
    assert_array_equal(s, [0, np.nan, np.nan])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"leak": 1.5}, "leak must be from 0 to 1, got 1.5"),
        ({"leak": -0.1}, "leak must be from 0 to 1, got -0.1"),
        ({"threshold": 0.0}, "threshold must be positive and finite, got 0"),
        ({"reset": "hard"}, "unknown reset 'hard'; the known ones are subtract, zero, none"),
        ({"proxy": "box"}, "unknown proxy 'box'; the known ones are identity"),
    ],
)
def test_what_is_no_neuron_is_refused(wrong, message):
    for neurons in (integrate_and_fire, integrate_and_fire_plain):
        with pytest.raises(ValueError, match=message):
            neurons(Tensor(np.ones((2, 3))), **(SUBTRACT | wrong))
    for shape in ((), (0, 3)):
        with pytest.raises(ValueError, match="need an axis of at least one step"):
            integrate_and_fire(np.ones(shape), **SUBTRACT)
    with pytest.raises(TypeError, match="currents must be floating-point numbers, got int64"):
        integrate_and_fire(np.ones((2, 3), np.int64), **SUBTRACT)


# ---- codes


@pytest.mark.parametrize("code", [rate, latency])
def test_gray_values_that_are_no_probabilities_are_refused(code):
    for x in (-0.1, 255.0):
        with pytest.raises(ValueError, match=r"must lie in \[0, 1\]"):
            code(np.array([[0.5, x]]), 4, Rng(0))


def test_a_rate_code_spikes_as_often_as_the_gray_value_says():
    x = np.tile(np.array([0.0, 0.1, 0.5, 0.9, 1.0], np.float32), (40, 1))
    spikes = rate(x, 500, Rng(0))
    assert (spikes.shape, spikes.dtype, set(np.unique(spikes))) == ((500, 40, 5), np.float32, {0.0, 1.0})
    assert_array_equal(spikes[..., [0, 4]].mean(axis=(0, 1)), [0, 1])
    n, p = 500 * 40, x[0, 1:4]
    assert (abs(spikes[..., 1:4].mean(axis=(0, 1)) - p) < 4.0 * np.sqrt(p * (1 - p) / n)).all()
    # the steps are independent: the variance of an image's count is that of a binomial
    assert_allclose(spikes[..., 2].sum(axis=0).var(), 125.0, rtol=0.6)
    assert_array_equal(spikes, rate(x, 500, Rng(0)))
    assert (spikes != rate(x, 500, Rng(1))).any()


def test_a_latency_code_has_one_spike_a_pixel_and_the_brighter_one_is_the_earlier():
    x = np.array([[1.0, 0.76, 0.75, 0.5, 0.2, 1e-3, 0.0]], np.float32)
    spikes = latency(x, 4)
    assert spikes.dtype == np.float32
    assert_array_equal(spikes.sum(axis=0)[0], [1, 1, 1, 1, 1, 1, 0])
    assert_array_equal(spikes.argmax(axis=0)[0, :6], [0, 0, 1, 2, 3, 3])
    assert CODES["latency"](x, 1).sum() == 6


# ---- the network


def network(neurons=None, shape=(4, 4), rng=None, **sizes):
    options = {"hidden": (7, 6), "dtype": np.float64} | sizes
    return SpikingNetwork(shape, 3, neurons=neurons or Continuous(), rng=rng or Rng(0), **options)


@pytest.mark.parametrize("channels", [(), (2,)], ids=["dense", "conv"])
@pytest.mark.parametrize("neurons", [Discontinuous(), Continuous(0.9, "zero")], ids=["discontinuous", "continuous"])
def test_the_network_passes_the_audit(neurons, channels):
    model = network(neurons, channels=channels, dropout=0.2, input_dropout=0.1)
    x = rate(np.random.default_rng(0).random((5, 16)), 4, Rng(1))
    outputs, hidden = model(x, Rng(2))
    loss = squared_hinge(outputs, np.array([0, 1, 2, 0, 1])).mean() + 0.1 * (hidden[0][1] * hidden[0][1]).mean()
    report = audit(loss)
    assert report.ok, str(report)
    assert "(surrogate)" in str(report)
    loss.backward()
    assert all(abs(p.grad).max() > 1e-6 for p in model.parameters())


def test_the_steps_of_discontinuous_integration_are_a_batch():
    model, x = network(Discontinuous()), rate(np.random.default_rng(0).random((5, 16)), 4, Rng(1))
    outputs, _ = model(x)
    together, _ = model(x.reshape(1, 20, 16))
    assert_array_equal(outputs.data.reshape(20, 3), together.data[0])
    W, b, V, c, U, d = (p.data for p in model.parameters())
    s = lambda current: (current > 1.0) * 1.0
    assert_allclose(outputs.data[2], s(s(x[2] @ W + b) @ V + c) @ U + d, rtol=1e-12)


def test_dropout_leaves_out_the_same_spikes_in_all_steps_of_an_image():
    x = np.ones((3, 200, 16))
    for options in ({"dropout": 0.5}, {"input_dropout": 0.5}):
        model = network(Discontinuous(), **options)
        for layer in model.layers:
            layer.bias.data += 0.5
        (dropped, _), (same, _), (whole, _) = (model(x, rng) for rng in (Rng(3), Rng(3), None))
        assert_array_equal(dropped.data[0], dropped.data[2])
        assert_array_equal(dropped.data, same.data)
        assert np.ptp(whole.data, axis=1).max() == 0.0
        assert np.ptp(dropped.data, axis=1).min() > 0.1  # images do not share theirs
    model = network(hidden=(), input_dropout=0.25)
    assert_allclose(model(x, Rng(0))[0].data.mean(), model(x)[0].data.mean(), atol=0.1)


def test_squared_hinge_by_hand():
    outputs = np.array([[[2.0, -2.0, 0.0], [0.5, 1.0, -1.0]]])
    assert_allclose(
        squared_hinge(Tensor(outputs), np.array([0, 2])).data, [[1.0 / 3.0, (1.5**2 + 2.0**2 + 2.0**2) / 3.0]]
    )


def test_labels_of_no_class_or_of_other_rows_are_refused():
    outputs = Tensor(np.zeros((2, 3, 4)))
    for label in (-1, 4):
        with pytest.raises(IndexError, match="outside 0 to 3"):
            squared_hinge(outputs, np.array([0, label, 1]))
    with pytest.raises(ValueError, match=r"one label for each row of outputs: \(1,\) and \(2, 3, 4\)"):
        squared_hinge(outputs, np.array([0]))


def test_spikes_and_additions_are_counted_by_hand():
    """Two steps, one image: 3 spikes enter 7 neurons, 4 enter 6, and 1 enters the 3 outputs."""
    model = network()
    entering = [np.zeros((2, 1, n)) for n in (16, 7, 6)]
    entering[0][0, 0, :2] = entering[0][1, 0, 5] = 1.0
    entering[1][:, 0, [1, 4]] = 1.0
    entering[2][1, 0, 0] = 1.0
    spikes, additions = model.count(entering)
    assert_array_equal(spikes[:, 0], [3, 4, 1])
    assert_array_equal(additions[:, 0], [3 * 7, 4 * 6, 1 * 3])
    assert model.dense_multiply_adds() == 16 * 7 + 7 * 6 + 6 * 3


def test_a_spike_into_a_convolution_is_added_wherever_a_window_sees_it():
    """Counted from the product itself: with weights of 1 and no bias, the currents add up to the additions."""
    model = network(channels=(2,), shape=(8, 6))
    assert model.inputs == [(1, 8, 6), (2 * 4 * 3,), (7,), (6,)]
    layer = model.layers[0]
    layer.weight.data[...], layer.bias.data[...] = 1.0, 0.0
    for at in np.ndindex(8, 6):
        x = np.zeros((1, 1, 8, 6))
        x[(0, 0, *at)] = 1.0
        assert layer(x).data.sum() == model.fan_out(0)[at]
    assert model.fan_out(0)[3, 3] == 2 * 5 * 5
    assert layer(np.ones((1, 1, 8, 6))).data.sum() + 24 * 7 + 7 * 6 + 6 * 3 == model.dense_multiply_adds()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1, got 1"),
        ({"input_dropout": -0.1}, "input_dropout must be at least 0 and below 1, got -0.1"),
        ({"channels": (2, 2, 2)}, "images of 4 × 4 cannot be halved 3 times"),
        ({"hidden": (0,)}, "must be an integer of at least 1, got 0"),
    ],
)
def test_what_is_no_network_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        network(**wrong)
