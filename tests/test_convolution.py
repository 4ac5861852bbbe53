"""Convolution and pooling: their values, their ties, and the order in memory that makes them quick."""

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from scipy.signal import correlate

from minigrad import Rng, Tensor, nn
from minigrad.convolution import avg_pool2d, conv2d, max_pool2d


@pytest.mark.parametrize(("stride", "padding"), [(1, 0), (2, 0), (1, 2), (3, 1)])
def test_a_convolution_is_a_sum_of_correlations(rng, stride, padding):
    x, w, b = rng.standard_normal((2, 3, 9, 8)), rng.standard_normal((3, 4, 3, 5)), rng.standard_normal(5)
    padded = np.pad(x, [(0, 0), (0, 0), (padding, padding), (padding, padding)])
    y = conv2d(x, w, b, stride=stride, padding=padding).data
    for n in range(2):
        for o in range(5):
            full = sum(correlate(padded[n, c], w[c, :, :, o], mode="valid") for c in range(3))
            assert_allclose(y[n, o], full[::stride, ::stride] + b[o], rtol=1e-12, atol=1e-12)


def test_a_convolution_with_a_window_of_one_is_a_linear_layer_at_each_place(rng):
    x, w, b = (rng.standard_normal(shape) for shape in ((2, 3, 4, 5), (3, 1, 1, 6), (6,)))
    y = np.moveaxis(x, 1, -1) @ w[:, 0, 0] + b
    assert_allclose(np.moveaxis(conv2d(x, w, b).data, 1, -1), y, rtol=1e-12)


@pytest.mark.parametrize(("size", "stride"), [(2, None), (3, None), (2, 1), (3, 2), (1, 2)])
def test_pools_look_at_their_windows(rng, size, stride):
    x = rng.standard_normal((2, 3, 7, 6))
    step = stride or size
    P, Q = (7 - size) // step + 1, (6 - size) // step + 1
    for pool, numpy_s in ((max_pool2d, np.max), (avg_pool2d, np.mean)):
        y = pool(x, size=size, stride=stride).data
        assert y.shape == (2, 3, P, Q)
        for p, q in np.ndindex(P, Q):
            window = x[:, :, p * step : p * step + size, q * step : q * step + size]
            assert_allclose(y[:, :, p, q], numpy_s(window, axis=(2, 3)), rtol=1e-14)


def test_of_equal_elements_the_first_gets_the_gradient():
    x = Tensor(np.array([[[[1.0, 3.0, 3.0], [3.0, 0.0, 3.0]]]]), requires_grad=True)
    max_pool2d(x, size=2, stride=1).sum().backward()
    assert_array_equal(x.grad[0, 0], [[0, 2, 0], [0, 0, 0]])  # of both windows it is the first, row by row
    x = Tensor(np.zeros((1, 1, 4, 4)), requires_grad=True)
    max_pool2d(x).sum().backward()
    assert_array_equal(x.grad[0, 0], [[1, 0, 1, 0], [0, 0, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0]])


def test_the_batch_stays_last_in_memory_from_the_first_convolution_on(rng):
    """Else every layer would rearrange its images."""
    images = rng.standard_normal((5, 1, 12, 12)).astype(np.float32)
    first, second = nn.Conv2d(1, 2, 3, Rng(0)), nn.Conv2d(2, 3, 2, Rng(1))
    x = max_pool2d(first(images).relu())
    y = second(x)
    for z in (x, y, avg_pool2d(y)):
        assert z.data.transpose(1, 2, 3, 0).flags.c_contiguous


def test_a_layer_has_the_weights_of_pytorch_s_in_another_order():
    layer = nn.Conv2d(4, 600, 5, Rng(0), stride=2, padding=1)
    assert layer(np.zeros((2, 4, 8, 9), np.float32)).shape == (2, 600, 3, 4)
    bound = 1 / 10  # of the square root of 4·25 inputs
    for p in layer.parameters():
        assert p.dtype == np.float32
        assert 0.98 * bound < np.abs(p.data).max() <= bound
        assert abs(p.data.std() / (bound / np.sqrt(3)) - 1) < 0.06


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda x, w, b: conv2d(x[0], w, b), r"x \(N, C, H, W\), w \(C, I, J, O\) and b \(O,\) must fit"),
        (lambda x, w, b: conv2d(x, w.T, b), "must fit"),
        (lambda x, w, b: conv2d(x, w, b[:1]), "must fit"),
        (lambda x, w, b: conv2d(x[:, :, :2], w, b), "a window of 3 × 3 does not fit into images of 2 × 6"),
        (lambda x, w, b: conv2d(x, w, b, stride=0), "windows and strides must be at least 1"),
        (lambda x, w, b: conv2d(x, w, b, padding=-1), "the padding must be at least 0, got -1"),
        (lambda x, w, b: max_pool2d(x[0]), r"images must be \(N, C, H, W\), got \(2, 5, 6\)"),
        (lambda x, w, b: avg_pool2d(x, size=7), "a window of 7 × 7 does not fit"),
        (lambda x, w, b: nn.Conv2d(1, 0, 3, Rng(0)), "outputs must be an integer of at least 1"),
    ],
)
def test_what_does_not_fit_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        wrong(np.ones((3, 2, 5, 6)), np.ones((2, 3, 3, 4)), np.ones(4))
