"""Hard functions with a proxy derivative: exact forward, and the stated slope at every kink."""

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from minigrad import Tensor
from minigrad.hard import QUANTISED, SIGN, STEP, hard_step, quantised_relu, sign


def slopes(op, x, **settings):
    x = Tensor(np.array(x), requires_grad=True)
    op(x, **settings).sum().backward()
    return x.grad


def test_a_step_and_a_sign_are_exact():
    tiny = np.float32(1e-45)
    x = np.array([-np.inf, -1, -tiny, -0.0, 0.0, tiny, 1, np.inf, np.nan], np.float32)
    for proxy in STEP:
        assert_array_equal(hard_step(x, proxy=proxy).data, np.float32([0, 0, 0, 0, 0, 1, 1, 1, np.nan]), strict=True)
    for proxy in SIGN:
        assert_array_equal(sign(x, proxy=proxy).data, np.float32([-1, -1, -1, 1, 1, 1, 1, 1, np.nan]), strict=True)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_every_level_of_a_quantiser_ends_on_the_grid_whatever_the_rounding(bits, dtype):
    """A quotient x/step that is rounded across a whole number would give every twentieth point another level."""
    for step in np.random.default_rng(0).uniform(0.01, 3.0, size=60).tolist():
        grid = np.arange(2**bits).astype(dtype) * dtype(step)
        above, below = np.nextafter(grid, dtype(np.inf)), np.nextafter(grid, -dtype(np.inf))
        q = lambda x: quantised_relu(x, bits=bits, step=step, proxy="relu").data  # noqa: B023
        assert_array_equal(q(grid), grid, strict=True)
        assert_array_equal(q(below[1:]), grid[1:])
        assert_array_equal(q(above), [*grid[1:], grid[-1]])
        far = np.array([-np.inf, -1.0, 1e30, np.inf, np.nan], dtype)
        assert_array_equal(q(far), np.array([0, 0, grid[-1], grid[-1], np.nan], dtype))


def test_a_quantiser_of_many_bits_is_a_clipped_relu():
    x = np.linspace(-1.0, 1.5, 101)
    y = quantised_relu(x, bits=16, step=2.0**-16, proxy="clipped_relu").data
    assert_allclose(y, np.clip(x, 0, 1 - 2.0**-16), atol=2.0**-16)


@pytest.mark.parametrize(
    ("proxy", "kinks"),
    [
        ("identity", {-2: 1, 0: 1, 2: 1}),
        ("relu", {-1: 0, 0: 0, 1e-9: 1, 5: 1}),
        ("clipped_relu", {-1: 0, 0: 0, 1e-9: 1, 1: 1, 1 + 1e-9: 0}),
        ("rectangle", {-1: 0, -1 + 1e-9: 0.5, 0: 0.5, 1 - 1e-9: 0.5, 1: 0}),
        ("triangle", {-1: 0, -0.5: 0.5, 0: 1, 0.5: 0.5, 1: 0, 7: 0}),
        ("sigmoid", {0: 0.25, 800: 0, -800: 0}),
        ("arctan", {0: 1, 1: 1 / (1 + np.pi**2)}),
        ("fast_sigmoid", {0: 1, 1: 0.25, -3: 1 / 16}),
        ("exponential", {0: 1, np.log(2): 0.5, -np.log(2): 0.5}),
    ],
)
def test_the_slope_of_a_step_at_every_kink(proxy, kinks):
    for width in (1.0, 0.5, 4.0):  # powers of 2, so that u has no rounding
        x = width * np.array(list(kinks))
        assert_allclose(slopes(hard_step, x, proxy=proxy, width=width), np.array(list(kinks.values())) / width)
    assert len(STEP) == 9


@pytest.mark.parametrize(
    ("proxy", "kinks"),
    [
        ("identity", {-3: 1, 0: 1}),
        ("clipped", {-1 - 1e-9: 0, -1: 1, 0: 1, 1: 1, 1 + 1e-9: 0}),
        ("triangle", {-1: 0, -0.5: 1, 0: 2, 0.75: 0.5, 1: 0}),
        ("tanh", {0: 1, np.arctanh(0.5): 0.75}),
        ("fast_sigmoid", {0: 1, 1: 0.25}),
    ],
)
def test_the_slope_of_a_sign_at_every_kink(proxy, kinks):
    assert_allclose(slopes(sign, [float(x) for x in kinks], proxy=proxy), list(kinks.values()))
    assert len(SIGN) == 5


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("bits", [1, 2, 4])
def test_the_slope_of_a_quantiser_on_the_grid(bits, dtype):
    """A proxy that is 1 just on the clamp's edge, or just off it, trains another network."""
    for step in (1.2221, 0.6511, 0.1946, 1 / 3):
        grid = np.arange(2**bits).astype(dtype) * dtype(step)
        x = [-dtype(step), *grid, np.nextafter(grid[-1], dtype(np.inf)), dtype(1e3)]
        inside, n = [1] * (2**bits - 1), len(x)
        expected = {
            "identity": [1] * n,
            "relu": [0, 0, *inside, 1, 1],
            "clipped_relu": [0, 0, *inside, 0, 0],
        }
        for proxy, slope in expected.items():
            assert_array_equal(slopes(quantised_relu, x, bits=bits, step=step, proxy=proxy), np.array(slope, dtype))
    middle = slopes(quantised_relu, [0.75], bits=2, step=0.5, proxy="sigmoid")
    assert_allclose(middle, [1.0])
    assert set(QUANTISED) == {*expected, "sigmoid"}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda x: hard_step(x, proxy="box"), "unknown proxy 'box'; the known ones are identity, relu"),
        (lambda x: sign(x, proxy="clipped_relu"), "unknown proxy 'clipped_relu'; the known ones are identity, clipped"),
        (lambda x: hard_step(x, proxy="relu", width=0.0), "width or step must be positive and finite, got 0"),
        (lambda x: quantised_relu(x, bits=2, step=-1.0, proxy="relu"), "positive and finite, got -1"),
        (lambda x: quantised_relu(x, bits=0, step=1.0, proxy="relu"), "bits must be from 1 to 16, got 0"),
    ],
)
def test_what_is_no_proxy_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        wrong(np.ones(3))
