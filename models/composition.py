"""How a latent-tree LSTM composes a sequence: T − 1 merges of two neighbours, each chosen by a sampler.

(Choi, Yoo & Lee 2018, with the choice made as in Fan et al. 2022.)  At every step each pair of neighbours is composed
by one tree-LSTM cell, the composed state h is scored by a learned query, v = ⟨q, h⟩/√d, a sampler draws a one-hot s
from these logits, and the pair so chosen takes the place of its two parts:

    h' = s ⊙ h_pair + (1 − cumsum s) ⊙ h_left + (cumsum s − s) ⊙ h_right        (and the same for c)

Three evaluations have the same results:

    compose_plain    here: every pair anew at every step, on the tape. O(T²) cells; readable, the oracle of the tests,
                     and the one for soft choices
    compose          in `models.linear_time`, for hard choices: about 3T cells, and a backward pass that is as exact
    compose_greedy   there, too: always the most probable choice, no gradient; it also tells the tree

and `compose_given` is for trees that are not chosen but known.

Common arguments: h, c (B, T, H), the states of the leaves, padded behind;  w (2H, 5H) and b (5H,), the cell's product
[h_l, h_r] W + b;  q (H,), the query;  lengths (B,), integers on the host, from 1 to T (else ValueError).  A sampler is
anything with `sample(logits, rng, mask)`, see `estimators.base`; step k draws at rng.site(k).
"""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np

from minigrad import Tensor, op
from minigrad.backend import array_module, asarray_like, on_host
from minigrad.fused import (
    cell_forward,
    cell_slopes,
    cell_vjp,
    linear,
    log_softmax,
    mask_logits,
    tree_lstm_cell,
)
from minigrad.ops import concat, where
from minigrad.random import Ahead

from .trees import levels


class Draw:
    """Choices drawn from softmax(v), without a derivative: what a score function asks for."""

    @staticmethod
    def sample(logits, rng, mask):
        return Tensor(rng.one_hot(mask_logits(logits.detach(), mask).data))


def check_lengths(lengths, B: int, T: int) -> np.ndarray:
    """The lengths as an array; ValueError unless they are B integers from 1 to T."""
    lengths = np.asarray(lengths)
    fits = lengths.shape == (B,) and lengths.dtype.kind in "iu"
    if not fits or not np.all((lengths >= 1) & (lengths <= T)):
        raise ValueError(f"lengths must be integers from 1 to {T}, one for each of {B} sequences, got {lengths}.")
    return lengths.astype(np.int64)  # unsigned ones would wrap around where steps are counted down


def check_states(h, c, w, b) -> None:
    """ValueError unless the states and the cell's weights have the shapes above: some others would broadcast."""
    H = h.shape[-1]
    if h.ndim != 3 or c.shape != h.shape or w.shape != (2 * H, 5 * H) or b.shape != (5 * H,):
        raise ValueError(
            f"h, c (B, T, H), w (2H, 5H) and b (5H,) must fit: they are {h.shape}, {c.shape}, {w.shape} and {b.shape}."
        )


def existing_tokens(lengths, T: int, like):
    """Which tokens exist, (B, T) booleans where `like` lives: one array is sent there for all steps."""
    return asarray_like(np.arange(T) < lengths[:, None], like)


def candidate_mask(exist, k: int):
    """Which pairs exist at step k, (B, T−1−k) booleans where `exist` lives. A sequence that is done keeps its first
    pair, since a sampler needs something to draw from."""
    pairs = exist[:, k + 1 :].copy()  # as many as there are tokens behind the first k + 1
    pairs[:, 0] = True
    return pairs


def choice_noise(rng, T: int, like):
    """The noise of all choices: step k draws at site k, for T−1−k pairs. A device gets it in one piece."""
    return rng if on_host(like) else Ahead(rng, range(T - 1, 1, -1))


def compose_plain(h, c, w, b, q, *, lengths, sampler, rng, scored: bool = False):
    """(h of the root (B, H), log-probability of the choices (B,), or zeros unless `scored`), by O(T²) cells."""
    (B, T, H), xp = h.shape, array_module(h.data)
    lengths = check_lengths(lengths, B, T)
    log_p = Tensor(xp.zeros(B, dtype=h.dtype))
    exist, rng = existing_tokens(lengths, T, h.data), choice_noise(rng, T, h.data)
    for k in range(T - 1):
        h_l, h_r, c_l, c_r = h[:, :-1], h[:, 1:], c[:, :-1], c[:, 1:]
        h_pair, c_pair = tree_lstm_cell(linear(concat(h_l, h_r, axis=-1), w, b), c_l, c_r)
        if k < T - 2:
            mask = candidate_mask(exist, k)
            v = (h_pair @ q) / math.sqrt(H)
            s = sampler.sample(v, rng.site(k), mask)
            if scored:
                log_p = log_p + (log_softmax(mask_logits(v, mask)) * s.detach()).sum(axis=-1)
        else:
            s = Tensor(xp.ones((B, 1), dtype=h.dtype))  # one pair is left: nothing to choose
        s = s.reshape(B, T - 1 - k, 1)
        cumulative = s.cumsum(axis=1)
        merge = lambda pair, left, right: s * pair + (1.0 - cumulative) * left + (cumulative - s) * right  # noqa: B023
        unfinished = exist[:, k + 1, None, None]
        h, c = where(unfinished, merge(h_pair, h_l, h_r), h_l), where(unfinished, merge(c_pair, c_l, c_r), c_l)
    return h[:, 0], log_p


@op
def compose_given(h, c, w, b, *, lengths, choices):
    """The states of trees that are known: T − 1 cells each, level by level from below, all rows at once.

    choices (B, T−1): integers on the host, see `models.trees`.  -> h of the root (B, H)

    backward:  from the root down, each node once, since it has one parent:
               da from `tree_lstm_cell`,   [dh_l, dh_r] = da Wᵀ,   and at the end dW = Σ [h_l, h_r]ᵀ da in one product
    """
    check_states(h, c, w, b)
    xp, (B, T, H) = array_module(h), h.shape
    left, right, level_starts, root = levels(choices, check_lengths(lengths, B, T), T)
    left, right, root = (asarray_like(i, h) for i in (left, right, root))
    (n,), leaves = left.shape, B * T
    empty = lambda *shape: xp.empty(shape, dtype=h.dtype)
    node_states, children, gates, tanh_c = empty(leaves + n, 2, H), empty(n, 2, H), empty(n, 5, H), empty(n, H)
    node_states[:leaves, 0], node_states[:leaves, 1] = h.reshape(leaves, H), c.reshape(leaves, H)
    # of each level, the rows of its merges and of the nodes that they make
    rows = [(slice(i, j), slice(leaves + i, leaves + j)) for i, j in pairwise(level_starts)]
    for merges, new in rows:
        l, r = left[merges], right[merges]
        children[merges, 0], children[merges, 1] = node_states[l, 0], node_states[r, 0]
        a = children[merges].reshape(-1, 2 * H) @ w
        a += b
        cells = node_states[l, 1], node_states[r, 1]
        gates[merges], node_states[new, 0], node_states[new, 1], tanh_c[merges] = cell_forward(a, cells)

    def backward(g):
        slopes, dh_dc = cell_slopes(gates, tanh_c, (node_states[left, 1], node_states[right, 1]))
        node_gradients, da = xp.zeros_like(node_states), empty(n, 5, H)
        node_gradients[root, 0] = g
        for merges, new in reversed(rows):
            l, r = left[merges], right[merges]
            g_h, g_c = node_gradients[new, 0], node_gradients[new, 1]
            da[merges], g_cell = cell_vjp(slopes[merges], dh_dc[merges], g_h, g_c)
            dh = (da[merges].reshape(-1, 5 * H) @ w.T).reshape(-1, 2, H)
            node_gradients[l, 0], node_gradients[r, 0] = dh[:, 0], dh[:, 1]
            node_gradients[l, 1], node_gradients[r, 1] = g_cell * gates[merges, 1], g_cell * gates[merges, 2]
        da = da.reshape(n, 5 * H)
        dw = lambda out=None: xp.matmul(children.reshape(n, 2 * H).T, da, out=out)
        db = lambda out=None: da.sum(axis=0, out=out)
        dh, dc = node_gradients[:leaves, 0].reshape(h.shape), node_gradients[:leaves, 1].reshape(c.shape)
        return dh, dc, dw, db

    return node_states[root, 0], backward
