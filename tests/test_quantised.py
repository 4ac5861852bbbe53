"""Networks of quantised activations: their values against plain loops, their gradients against the proxies'."""

import numpy as np
import pytest
import scipy.integrate
import scipy.optimize
import scipy.stats

from devsim import DevsimBackend, forbid
from minigrad import Rng, Tensor
from minigrad.backend import Backend
from minigrad.check import audit
from minigrad.optim import SGD
from models.data import subspaces
from models.quantised import PROXIES, STEPS, Activation, DenseNetwork, LeNet, TwoLinearLayers, hinge

RNG = np.random.default_rng(0)
IMAGES, LABELS = RNG.random((3, 64)), np.array([2, 0, 1])
ACTIVATIONS = [(0, "identity"), *((bits, proxy) for bits in (1, 2) for proxy in PROXIES)]
each_activation = pytest.mark.parametrize(("bits", "proxy"), ACTIVATIONS)


def staircase(x, bits, step):
    """The definition, number by number."""
    levels = step * np.arange(2**bits)
    return np.array([next((level for level in levels if a <= level), levels[-1]) for a in x.ravel()]).reshape(x.shape)


def activate(x, activation):
    bits, step = activation.bits, activation.settings["step"]
    return staircase(x, bits, step) if bits else np.maximum(x, 0.0)


def networks(activation):
    rng, common = Rng(3), {"dtype": np.float64}
    return {
        "dense": DenseNetwork((64, 7, 5, 3), activation, rng=rng.site("dense"), **common),
        "lenet": LeNet((8, 8), (6,), 3, activation, rng=rng.site("lenet"), **common),
        "two layers": TwoLinearLayers(64, 9, 3, activation, fixed=False, rng=rng.site("two"), **common),
        "two layers, one fixed": TwoLinearLayers(64, 9, 3, activation, fixed=True, rng=rng.site("fixed"), **common),
    }


# ---- values


@pytest.mark.parametrize("bits", [0, 1, 2, 4])
def test_a_dense_network_is_the_written_formula(bits):
    activation = Activation(bits)
    network, x = networks(activation)["dense"], IMAGES
    for n, layer in enumerate(network.layers):
        x = x @ layer.weight.data + layer.bias.data
        x = activate(x, activation) if n < 2 else x
    np.testing.assert_allclose(network.evaluate(IMAGES), x, rtol=1e-12)


def convolved(x, w, b, padding):
    """x (C, H, W), w (C, 5, 5, O), one number after the other."""
    x = np.pad(x, ((0, 0), (padding, padding), (padding, padding)))
    H, W = (n - 4 for n in x.shape[1:])
    return np.array(
        [
            [[(x[:, i : i + 5, j : j + 5] * w[..., o]).sum() + b[o] for j in range(W)] for i in range(H)]
            for o in range(len(b))
        ]
    )


def pooled(x):
    C, H, W = x.shape
    return np.array(
        [
            [[x[c, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].max() for j in range(W // 2)] for i in range(H // 2)]
            for c in range(C)
        ]
    )


@pytest.mark.parametrize(("shape", "padding", "inputs"), [((8, 8), 2, 64), ((17, 16), 0, 16), ((28, 28), 0, 256)])
@pytest.mark.parametrize("bits", [0, 2])
def test_lenet_is_the_written_formula_with_the_activation_on_either_side_of_the_pool(shape, padding, inputs, bits):
    activation = Activation(bits)
    network = LeNet(shape, (6,), 3, activation, rng=Rng(1), dtype=np.float64)
    assert network.dense.layers[0].weight.shape == (inputs, 6)
    image = np.random.default_rng(2).random(shape)
    behind = before = image[None]
    for layer in network.convolutions:
        w, b = layer.weight.data, layer.bias.data
        behind = activate(pooled(convolved(behind, w, b, padding)), activation)
        before = pooled(activate(convolved(before, w, b, padding), activation))
    np.testing.assert_array_equal(behind, before)
    expected = network.dense.evaluate(behind.reshape(1, -1))
    np.testing.assert_allclose(network.evaluate(image.reshape(1, -1)), expected, rtol=1e-10)


def test_two_linear_layers_are_the_written_formula():
    activation = Activation(2, 0.25, "relu")
    for name in ("two layers", "two layers, one fixed"):
        network = networks(activation)[name]
        expected = staircase(IMAGES @ network.first.data, 2, 0.25) @ network.second.data
        np.testing.assert_allclose(network.evaluate(IMAGES), expected, rtol=1e-12)


def test_a_fixed_second_layer_is_a_vote_and_no_parameter():
    network = networks(Activation(1))["two layers, one fixed"]
    assert list(network.named_parameters()) == ["first"]
    np.testing.assert_array_equal(
        network.second.data[:4], np.array([[1, -0.5, -0.5], [-0.5, 1, -0.5], [-0.5, -0.5, 1], [1, -0.5, -0.5]])
    )
    with pytest.raises(ValueError, match="a multiple of 3 units, got 10"):
        TwoLinearLayers(4, 10, 3, Activation(1), fixed=True, rng=Rng(0))


def test_weights_begin_as_he_normal():
    network = LeNet((28, 28), (400,), 10, Activation(1), rng=Rng(0))
    for layer in (*network.convolutions, *network.dense.layers):
        w = layer.weight.data.reshape(-1, layer.weight.shape[-1])
        assert w.std() == pytest.approx((2.0 / len(w)) ** 0.5, rel=0.15)


# ---- gradients


@each_activation
def test_every_rule_of_a_network_has_the_derivative_of_its_surrogate(bits, proxy):
    for network in networks(Activation(bits, None, proxy)).values():
        assert audit(network.cost(IMAGES, LABELS).sum()).ok


SLOPES = {
    "identity": lambda x, top: np.ones_like(x),
    "relu": lambda x, top: (x > 0) * 1.0,
    "clipped_relu": lambda x, top: ((x > 0) & (x <= top)) * 1.0,
    "sigmoid": lambda x, top: np.cosh(2.0 * x / top - 1.0) ** -2.0,  # 4 σ(a)(1 − σ(a)), a = 4x/top − 2
}


@pytest.mark.parametrize("proxy", PROXIES)
@pytest.mark.parametrize("bits", [1, 2])
def test_backward_a_layer_has_the_slope_of_its_proxy(bits, proxy):
    """The gradient of the first weights by hand: Xᵀ((dL/do Vᵀ) ⊙ μ′(XW))."""
    network = networks(Activation(bits, 0.4, proxy))["two layers"]
    a = IMAGES @ network.first.data
    g = RNG.standard_normal((3, 3))
    (network(IMAGES) * g).sum().backward()
    slope = SLOPES[proxy](a, 0.4 * (2**bits - 1))
    np.testing.assert_allclose(network.first.grad, IMAGES.T @ ((g @ network.second.data.T) * slope), atol=1e-13)
    np.testing.assert_allclose(network.second.grad, staircase(a, bits, 0.4).T @ g, atol=1e-13)


def test_the_hinge_is_the_written_formula_and_has_its_gradient():
    logits, labels = RNG.standard_normal((20, 4)), RNG.integers(0, 4, 20)
    logits[0, labels[0]] = 9.0  # beyond the margin
    expected = [
        max(0.0, 1.0 - o[y] + max(o[k] for k in range(4) if k != y)) for o, y in zip(logits, labels, strict=True)
    ]
    loss = hinge(Tensor(logits, requires_grad=True), labels)
    np.testing.assert_allclose(loss.data, expected, rtol=1e-13)
    assert loss.data[0] == 0.0
    h, w = 1e-6, Tensor(logits, requires_grad=True)
    hinge(w, labels).sum().backward()
    for at in ((0, 0), (3, 1), (7, int(labels[7])), (8, 2)):
        moved = np.zeros_like(logits)
        moved[at] = h
        up, down = (float(hinge(Tensor(logits + s * moved), labels).sum().data) for s in (1, -1))
        assert w.grad[at] == pytest.approx((up - down) / (2 * h), abs=1e-6)


@each_activation
def test_a_step_on_the_device_is_numpy_s_to_the_bit(bits, proxy):
    """The stand-in device refuses any wait and any copy to the host."""
    results = []
    for backend in (Backend(), DevsimBackend()):
        found = []
        for network in networks(Activation(bits, None, proxy)).values():
            network.to(backend)
            x, labels = backend.to_device(IMAGES), backend.to_device(LABELS)
            optimizer = SGD(network.parameters(), 0.1)
            if len(network.parameters()) == 1:  # a constant does not move with the parameters
                network.second = Tensor(backend.to_device(network.second.data))
            with forbid("sync", "d2h"):
                cost = network.cost(x, labels)
                cost.mean().backward()
                optimizer.step()
            found += [backend.to_host(cost.data), *network.state_dict().values()]
        results.append(found)
    for a, b in zip(*results, strict=True):
        np.testing.assert_array_equal(a, b)


# ---- one bit


def accuracy(network, x, labels):
    return float((network.evaluate(x).argmax(axis=1) == labels).mean())


def test_with_one_bit_a_point_and_its_negative_are_both_right_in_one_class_at_most():
    """Trained or not: of 4 classes ½ (1 + ¼) = 62.5 % is the most. Two bits go beyond."""
    x, labels = subspaces.generate(4, 6, 30, "two", Rng(0))
    x, labels = np.concatenate([x, -x]), np.concatenate([labels, labels])
    best = {}
    for bits in (1, 2):
        network = TwoLinearLayers(24, 64, 4, Activation(bits, 0.25), fixed=False, rng=Rng(1), dtype=np.float64)
        optimizer, found = SGD(network.parameters(), 0.1), []
        for _ in range(300):
            found.append(accuracy(network, x, labels))
            optimizer.zero_grad()
            network.cost(x, labels).mean().backward()
            optimizer.step()
        best[bits] = max(found)
        o = network.evaluate(x)
        constant = abs(o[:120] + o[120:] - (o[:1] + o[120:121])).max() < 1e-12
        assert constant == (bits == 1)
    assert 0.3 < best[1] <= 0.625
    assert best[2] > 0.8


# ---- settings


def test_the_published_steps_are_near_those_of_the_least_squared_error():
    """Rounding |z|, z ~ N(0, 1), to the nearest of 0, α, …, (2ᵇ − 1)α."""
    z = scipy.stats.norm.ppf(0.5 + 0.5 * (np.arange(100_000) + 0.5) / 100_000)
    for bits, step in STEPS.items():
        error = lambda a, top=2**bits - 1: ((z - a * np.clip(np.round(z / a), 0, top)) ** 2).mean()
        best = scipy.optimize.minimize_scalar(error, bounds=(0.8 * step, 1.25 * step), method="bounded").x
        assert step == pytest.approx(best, rel=0.01)


def test_what_is_no_activation_is_refused():
    with pytest.raises(ValueError, match="no step is known for 3 bits, only for 1, 2, 4: give one"):
        Activation(3)
    for settings, why in (((3, -1.0), "positive"), ((17, 1.0), "from 1 to 16"), ((2, None, "hat"), "unknown proxy")):
        with pytest.raises(ValueError, match=why):
            Activation(*settings)
    with pytest.raises(ValueError, match="input and its output"):
        DenseNetwork((3,), Activation(1), rng=Rng(0))
    with pytest.raises(ValueError, match="at least 4 rows and columns"):
        LeNet((3, 8), (6,), 3, Activation(1), rng=Rng(0))


def test_what_does_not_fit_is_no_other_batch_and_no_other_class():
    with pytest.raises(ValueError, match="reshape"):
        LeNet((8, 8), (6,), 3, Activation(1), rng=Rng(0)).evaluate(np.zeros((2, 128), np.float32))
    for label in (-1, 3):
        with pytest.raises(IndexError, match="outside 0 to 2"):
            hinge(Tensor(np.zeros((1, 3))), np.array([label]))


# ---- data in subspaces


@pytest.mark.parametrize("sided", subspaces.SIDES)
def test_each_class_lies_in_a_subspace_of_its_own(sided):
    x, labels = subspaces.generate(3, 4, 20, sided, Rng(7))
    assert x.shape == (60, 12)
    np.testing.assert_array_equal(labels, np.repeat([0, 1, 2], 20))
    np.testing.assert_allclose(np.linalg.norm(x, axis=1), 1.0, rtol=1e-12)
    ranks = [np.linalg.matrix_rank(x[labels == k]) for k in range(3)]
    assert (ranks, np.linalg.matrix_rank(x)) == ([4, 4, 4], 12)


def test_one_sided_data_are_positive_combinations_and_two_sided_are_not():
    for sided in subspaces.SIDES:
        x, labels = subspaces.generate(2, 3, 200, sided, Rng(1))
        bases = Rng(1).site("bases").normal((2, 3, 6), like=np.empty(0, np.float64))
        coefficients = np.linalg.solve(bases.reshape(6, 6).T, x.T).T.reshape(400, 2, 3)
        own, other = (coefficients[np.arange(400), c] for c in (labels, 1 - labels))
        assert abs(other).max() < 1e-9
        assert (own > 0).mean() == (1.0 if sided == "one" else pytest.approx(0.5, abs=0.06))


def test_subspace_data_are_a_function_of_the_seed_and_the_sides_are_two():
    a, b, c = (subspaces.generate(2, 3, 5, "two", Rng(seed))[0] for seed in (1, 1, 2))
    np.testing.assert_array_equal(a, b)
    assert abs(a - c).max() > 0.1
    with pytest.raises(ValueError, match="one- or two-sided, got 'both'"):
        subspaces.generate(2, 3, 5, "both", Rng(0))
