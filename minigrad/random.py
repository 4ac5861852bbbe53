"""Counter-based noise: every number has an address, (seed, step, site), and no generator has a state.

A Philox generator (Salmon et al. 2011) is a keyed bijection of a counter, so the noise of step 1,000 can be computed
without the 999 steps before it. A resumed run, a reordered one, one on the CPU and one on a GPU all see the same
numbers, and a checkpoint has nothing to save. Numbers are made on the host, to the last bit alike for every backend,
and sent to the device of the array they are `like`.

    rng = Rng(seed=0).at(step=7).site("code")
    rng.gumbel((100, 30, 10), like=logits)       # pure: the same call gives the same numbers
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Sequence

import numpy as np
from numpy.typing import DTypeLike

from .backend import Array, array_module, asarray_like, check_index, on_host

__all__ = ["Ahead", "Rng", "argmax_one_hot", "gumbel_from_uniform", "one_hot", "uniform_from_bits"]


Shape = tuple[int, ...]

_LAYOUT = 5  # the second word of the key; another value would give every seed other numbers
_FLOATS = (np.dtype(np.float32), np.dtype(np.float64))
_thread = threading.local()
_EMPTY_BUFFER = {
    "bit_generator": "Philox",
    "buffer": np.zeros(4, np.uint64),
    "buffer_pos": 4,
    "has_uint32": 0,
    "uinteger": 0,
}


class Rng:
    """An address in the noise. Immutable: `at` and `site` return new addresses, draws change nothing.

    Drawing twice from one address gives the same numbers twice (common random numbers); name another site for
    independent ones.

    seed: 0 ≤ seed < 2⁶⁴.  step: 0 ≤ step < 2⁶⁴, the training step or epoch.  ValueError outside.
    """

    __slots__ = ("_seed", "_site", "_step")

    def __init__(self, seed: int = 0, step: int = 0, _site: int = 0) -> None:
        for name, value in (("seed", seed), ("step", step)):
            if not (hasattr(value, "__index__") and 0 <= value < 2**64):
                raise ValueError(f"{name} must be an integer from 0 to 2**64 - 1, got {value}.")
        self._seed, self._step, self._site = int(seed), int(step), _site

    def at(self, step: int) -> Rng:
        """The same site at another step."""
        return Rng(self._seed, step, self._site)

    def site(self, name: str | int) -> Rng:
        """A site below this one. Names are hashed to 64 bits together with the path that leads to them."""
        digest = hashlib.blake2b(f"{self._site}/{name}".encode(), digest_size=8).digest()
        return Rng(self._seed, self._step, int.from_bytes(digest, "little"))

    def __repr__(self) -> str:
        return f"Rng(seed={self._seed}, step={self._step}, site={self._site:#x})"

    # -- draws: shape, and optionally an array whose dtype and device the result gets (default: float32 on the host)

    def bits(self, n: int) -> np.ndarray:
        """(n,) uint64, uniformly distributed."""
        _check_size(n)
        # Making a Philox asks the operating system for entropy, which costs more than the numbers: each thread keeps
        # one and moves it to the address.
        if not hasattr(_thread, "philox"):
            _thread.philox = np.random.Philox()
        address = {
            "counter": np.array([0, self._step, self._site, 0], np.uint64),
            "key": np.array([self._seed, _LAYOUT], np.uint64),
        }
        _thread.philox.state = {"state": address} | _EMPTY_BUFFER
        return _thread.philox.random_raw((n + 3) // 4 * 4)[:n]

    def _uniform(self, shape, like):
        dtype = np.dtype(np.float32 if like is None else like.dtype)
        if dtype not in _FLOATS:
            raise TypeError(f"noise is float32 or float64, not {dtype}: give a `like` of one of these.")
        n = int(np.prod(shape, dtype=np.int64))
        _check_size(n)
        words = self.bits(-(-n * dtype.itemsize // 8))
        return uniform_from_bits(words, dtype)[:n].reshape(shape)

    def uniform(self, shape: Shape, like: Array | None = None) -> Array:
        """Uniform on the open interval (0, 1): never 0, never 1."""
        return _send(self._uniform(shape, like), like)

    def exponential(self, shape: Shape, like: Array | None = None) -> Array:
        """Exp(1), strictly positive: E = −log U."""
        u = self._uniform(shape, like)
        return _send(np.negative(np.log(u, out=u), out=u), like)

    def gumbel(self, shape: Shape, like: Array | None = None) -> Array:
        """Standard Gumbel, always finite: G = −log(−log U)."""
        return _send(gumbel_from_uniform(self._uniform(shape, like)), like)

    def logistic(self, shape: Shape, like: Array | None = None) -> Array:
        """Standard logistic, always finite: log U − log(1 − U), the difference of two Gumbels."""
        u = self._uniform(shape, like)
        return _send(np.log(u) - np.log1p(-u), like)

    def normal(self, shape: Shape, like: Array | None = None) -> Array:
        """Standard normal (Box & Muller 1958): √(−2 log U₁) · cos 2πU₂."""
        u = self._uniform((2, *shape), like)
        return _send(np.sqrt(-2.0 * np.log(u[0])) * np.cos((2.0 * np.pi) * u[1]), like)

    def one_hot(self, logits: Array) -> Array:
        """D ~ Cat(softmax(logits)), one-hot in the last axis, by the Gumbel-max trick. logits (..., K) -> (..., K).

        Here and below a logit that is NaN gives a sample all the same; estimators make NaN of it.
        """
        return argmax_one_hot(logits + self.gumbel(logits.shape, like=logits))

    def bernoulli(self, logits: Array) -> Array:
        """b ~ Bernoulli(σ(logits)), zeros and ones: b = [a + logistic noise > 0]. Any shape."""
        return (logits + self.logistic(logits.shape, like=logits) > 0).astype(logits.dtype)

    def permutation(self, n: int) -> np.ndarray:
        """A uniformly random order of 0 … n−1, (n,) int64, on the host."""
        return np.argsort(self.bits(n), kind="stable")


class Ahead:
    """The sites 0, 1, … of an address, whose noise is drawn ahead and sent to a device in one piece.

    The numbers are those of `rng.site(k)`, bit for bit. What is drawn at site k with a last axis of widths[k] is drawn
    at the sites after it, too, with theirs: as far as it takes no more than `MOST` numbers.
    """

    MOST = 1 << 22

    def __init__(self, rng: Rng, widths: Sequence[int]) -> None:
        self._rng, self.widths = rng, widths
        self._sent: dict[tuple, dict[int, Array]] = {}

    def site(self, k: int) -> AheadSite:
        return AheadSite(self._rng.site(k), self, k, ())

    def draw(self, k: int, path: tuple, kind: str, shape: Shape, like: Array) -> Array:
        """The noise called `kind` at the site below k to which the names in `path` lead."""
        pieces = self._sent.setdefault((path, kind, shape[:-1], like.dtype), {})
        if k not in pieces:
            pieces.clear()
            pieces |= self._send(k, path, kind, shape[:-1], like)
        return pieces[k].copy()  # one draw is not another one's memory

    def _send(self, first: int, path, kind, rows, like):
        """{k: its numbers} from `first` on."""
        ends = int(np.prod(rows, dtype=np.int64)) * np.cumsum(self.widths[first:])
        ends = ends[: max(1, np.searchsorted(ends, self.MOST, side="right"))]
        sites = range(first, first + len(ends))
        host = []
        for k in sites:
            rng = self._rng.site(k)
            for name in path:
                rng = rng.site(name)
            draw = getattr(rng, kind)
            host.append(draw((*rows, self.widths[k]), like=np.empty(0, like.dtype)).reshape(-1))
        sent, starts = asarray_like(np.concatenate(host), like), [0, *ends[:-1]]
        parts = zip(sites, starts, ends, strict=True)
        return {k: sent[start:end].reshape(*rows, self.widths[k]) for k, start, end in parts}


class AheadSite(Rng):
    """One site of an `Ahead`, or one below it: an `Rng` whose draws for a device have been sent before."""

    __slots__ = ("_ahead", "_k", "_path")

    def __init__(self, rng: Rng, ahead: Ahead, k: int, path: tuple) -> None:
        super().__init__(rng._seed, rng._step, rng._site)
        self._ahead, self._k, self._path = ahead, k, path

    def site(self, name: str | int) -> AheadSite:
        return AheadSite(super().site(name), self._ahead, self._k, (*self._path, name))

    def _draw(self, kind: str, shape: Shape, like: Array | None) -> Array:
        if like is None or on_host(like) or tuple(shape[-1:]) != (self._ahead.widths[self._k],):
            return getattr(super(), kind)(shape, like)
        return self._ahead.draw(self._k, self._path, kind, tuple(shape), like)

    def uniform(self, shape: Shape, like: Array | None = None) -> Array:
        return self._draw("uniform", shape, like)

    def exponential(self, shape: Shape, like: Array | None = None) -> Array:
        return self._draw("exponential", shape, like)

    def gumbel(self, shape: Shape, like: Array | None = None) -> Array:
        return self._draw("gumbel", shape, like)

    def logistic(self, shape: Shape, like: Array | None = None) -> Array:
        return self._draw("logistic", shape, like)

    def normal(self, shape: Shape, like: Array | None = None) -> Array:
        return self._draw("normal", shape, like)


def uniform_from_bits(words: np.ndarray, dtype: DTypeLike) -> np.ndarray:
    """uint64 words -> uniforms in the open interval (0, 1): u = (k + ½) / 2ᵇ with b bits, exact in the dtype.

    float32 takes the upper b = 23 bits of each half word, float64 the upper 52 of each word: as many as the fraction
    of a float has. Set beside the exponent of 1 they read 1 + k/2ᵇ, and subtracting 1 − 2⁻ᵇ⁻¹ leaves u without
    rounding. One bit more and the largest value would round to 1.0; without the ½ the smallest would be 0.0, and
    −log(−log u) would be infinite once in a few million draws.
    """
    if np.dtype(dtype) == np.float32:
        k, shift, one, bits = words.astype("<u8").view("<u4"), 9, 0x3F800000, 23
    else:
        k, shift, one, bits = words.copy(), 12, 0x3FF0000000000000, 52
    k >>= k.dtype.type(shift)
    k |= k.dtype.type(one)
    u = k.view(dtype)
    u -= 1.0 - 2.0 ** (-bits - 1)
    return u


def gumbel_from_uniform(u: np.ndarray) -> np.ndarray:
    """−log(−log u) in place, for u strictly between 0 and 1. float32 results lie in [−2.82, 16.64]."""
    for _ in range(2):
        np.log(u, out=u)
        np.negative(u, out=u)
    return u


def one_hot(index: Array, classes: int, like: Array) -> Array:
    """index (...,) of integers in [0, classes) -> (..., classes) with the dtype of `like`, on its device.

    TypeError for an index that is no array of integers; IndexError, on the host, for one that is out of range.
    """
    check_index(index, classes)
    return unchecked_one_hot(index, classes, like)


def unchecked_one_hot(index: Array, classes: int, like: Array) -> Array:
    """… for whoever knows that every index is in range: one outside would be written into another row."""
    xp = array_module(like)
    d = xp.zeros((index.size, classes), dtype=like.dtype)
    rows = classes * xp.arange(index.size)
    d.reshape(-1)[rows + index.reshape(-1).astype(rows.dtype, copy=False)] = 1.0  # int64 + uint64 would be floats
    return d.reshape(*index.shape, classes)


def argmax_one_hot(z: Array) -> Array:
    """The one-hot of argmax over the last axis, (..., K) -> (..., K). A tie goes to the first: never two ones."""
    return unchecked_one_hot(z.argmax(axis=-1), z.shape[-1], z)


def _check_size(n: int) -> None:
    """ValueError for a negative one: a slice up to it would quietly hold other numbers."""
    if n < 0:
        raise ValueError(f"cannot draw {n} numbers: a shape or a length is negative.")


def _send(host: np.ndarray, like):
    return host if like is None else asarray_like(host, like)
