"""Noise by address: the same everywhere, never infinite, and distributed as it says."""

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

import devsim
from devsim import DevsimBackend
from minigrad import Rng
from minigrad.backend import to_host
from minigrad.random import Ahead, argmax_one_hot, gumbel_from_uniform, one_hot, uniform_from_bits

ADVERSARIAL = np.array([0, 2**64 - 1, 0xFFFFFFFF, 0xFFFFFFFF << 32, 0x1FF, 0xFFFFFFFFFFFFFE00, 1 << 63], np.uint64)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_no_bit_pattern_gives_an_infinite_gumbel(dtype):
    u = uniform_from_bits(ADVERSARIAL, dtype)
    assert u.dtype == dtype
    assert u.min() > 0.0
    assert u.max() < 1.0
    assert np.isfinite(gumbel_from_uniform(u.copy())).all()
    assert (-np.log(u) > 0).all()  # exponentials are positive, so their logarithm is finite


@given(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=20))
def test_uniforms_are_the_midpoints_of_their_bins(words):
    words = np.array(words, np.uint64)
    k = words.view("<u4") >> 9
    assert np.array_equal(uniform_from_bits(words, np.float32).astype(float), (k + 0.5) / 2**23)
    u64 = uniform_from_bits(words, np.float64)
    assert np.array_equal(u64, ((words >> np.uint64(12)).astype(np.float64) + 0.5) / 2.0**52)


def test_words_are_philox_at_the_address():
    rng = Rng(3, 5).site("a")
    site = int.from_bytes(hashlib.blake2b(b"0/a", digest_size=8).digest(), "little")
    philox = np.random.Philox(key=np.array([3, 5], np.uint64), counter=np.array([0, 5, site, 0], np.uint64))
    np.testing.assert_array_equal(rng.bits(10), philox.random_raw(12)[:10])


def test_numbers_depend_on_the_address_and_on_nothing_else():
    a = Rng(1).at(2).site("code").gumbel((3, 4))
    Rng(9).uniform((100,))
    np.testing.assert_array_equal(a, Rng(1).site("code").at(2).gumbel((3, 4)))
    others = [Rng(0).at(2).site("code"), Rng(1).at(3).site("code"), Rng(1).at(2).site("edoc"), Rng(1).at(2)]
    others.append(Rng(1).at(2).site("code").site("code"))
    for other in others:
        assert not np.array_equal(a, other.gumbel((3, 4)))


def test_published_numbers_do_not_change():
    """A golden value: changing the generator would silently break every resume and every number in the README."""
    np.testing.assert_array_equal(Rng(0).bits(2), np.array([10838992762465911255, 10360012934973440186], np.uint64))


@pytest.mark.parametrize("kind", ["uniform", "exponential", "gumbel", "logistic", "normal"])
def test_noise_that_is_sent_ahead_is_that_of_each_site(monkeypatch, kind):
    monkeypatch.setattr(Ahead, "MOST", 2 * 3 * (6 + 5 + 4) + 1)  # three sites in the first piece, two in the second
    rng, like, before = Rng(3).at(2).site("tree"), DevsimBackend().to_device(np.zeros(1)), devsim.stats["h2d"]
    ahead, draw = Ahead(rng, range(6, 1, -1)), lambda at, *given: getattr(at.site("x").site(1), kind)(*given)
    for k, width in enumerate(range(6, 1, -1)):
        expected, found = draw(rng.site(k), (2, 3, width), np.zeros(1)), draw(ahead.site(k), (2, 3, width), like)
        np.testing.assert_array_equal(to_host(found), expected)
        found += 1.0
        np.testing.assert_array_equal(to_host(draw(ahead.site(k), (2, 3, width), like)), expected)
    assert devsim.stats["h2d"] - before == 2
    np.testing.assert_array_equal(to_host(draw(ahead.site(2), (7,), like)), draw(rng.site(2), (7,), np.zeros(1)))


def test_the_same_numbers_on_every_backend(backend):
    rng = Rng(4).at(1)
    for dtype in (np.float32, np.float64):
        like = backend.to_device(np.zeros(1, dtype))
        for draw in ("uniform", "exponential", "gumbel", "normal"):
            host = getattr(rng, draw)((5, 3), like=np.zeros(1, dtype))
            device = getattr(rng, draw)((5, 3), like=like)
            assert device.dtype == dtype
            np.testing.assert_array_equal(backend.to_host(device), host)
    logits = np.linspace(-1, 1, 12).reshape(3, 4).astype(np.float32)
    np.testing.assert_array_equal(backend.to_host(rng.one_hot(backend.to_device(logits))), rng.one_hot(logits))


@pytest.mark.parametrize(
    ("draw", "distribution"),
    [("uniform", stats.uniform), ("exponential", stats.expon), ("gumbel", stats.gumbel_r), ("normal", stats.norm)],
)
def test_draws_have_their_distribution(draw, distribution):
    for dtype in (np.float32, np.float64):
        x = getattr(Rng(11), draw)((20_000,), like=np.zeros(1, dtype))
        assert stats.kstest(x.astype(float), distribution.cdf).pvalue > 1e-3


def test_one_hot_samples_have_probability_softmax():
    logits = np.log(np.array([0.05, 0.2, 0.3, 0.45]))
    d = Rng(2).one_hot(np.broadcast_to(logits, (20_000, 4)))
    assert stats.chisquare(d.sum(axis=0), 20_000 * np.exp(logits)).pvalue > 1e-3


def test_a_tie_gives_one_one():
    d = argmax_one_hot(np.array([[1.0, 1.0, 0.0], [2.0, 2.0, 2.0]]))
    np.testing.assert_array_equal(d, [[1, 0, 0], [1, 0, 0]])
    for dtype in "bBhHiIlLqQ":
        np.testing.assert_array_equal(one_hot(np.array([[2], [0]], dtype), 3, d), [[[0, 0, 1]], [[1, 0, 0]]])


def test_permutation_is_one():
    order = Rng(5).permutation(1000)
    np.testing.assert_array_equal(np.sort(order), np.arange(1000))
    assert not np.array_equal(order, np.arange(1000))


@pytest.mark.parametrize("bad", [-1, 2**64, 1.5, 1.0, "1", None])
def test_a_seed_out_of_range_is_refused(bad):
    with pytest.raises(ValueError, match="seed must be an integer"):
        Rng(bad)
    with pytest.raises(ValueError, match="step must be an integer"):
        Rng(0).at(bad)


def test_a_negative_size_is_refused():
    for draw in (
        lambda: Rng(0).uniform((-1,)),
        lambda: Rng(0).normal((2, -1)),
        lambda: Rng(0).gumbel((2, -3)),
        lambda: Rng(0).permutation(-1),
    ):
        with pytest.raises(ValueError, match="a shape or a length is negative"):
            draw()


def test_only_floats_have_noise():
    for dtype in (np.float16, np.int64):
        with pytest.raises(TypeError, match=f"noise is float32 or float64, not {np.dtype(dtype)}"):
            Rng(0).uniform((3,), like=np.zeros(3, dtype))
