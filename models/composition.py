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
from minigrad.backend import array_module, asarray_like
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

from .trees import levels


class Draw:
    """Choices drawn from softmax(v), without a derivative: what a score function asks for."""

    @staticmethod
    def sample(logits, rng, mask):
        return Tensor(rng.one_hot(mask_logits(logits.detach(), asarray_like(mask, logits.data)).data))


def check_lengths(lengths, B: int, T: int) -> np.ndarray:
    """The lengths as an array; ValueError unless they are B integers from 1 to T."""
    lengths = np.asarray(lengths)
    fits = lengths.shape == (B,) and lengths.dtype.kind in "iu"
    if not fits or not np.all((lengths >= 1) & (lengths <= T)):
        raise ValueError(f"lengths must be integers from 1 to {T}, one for each of {B} sequences")
    return lengths.astype(np.int64)  # unsigned ones would wrap around where steps are counted down


def candidate_mask(lengths, T: int, k: int):
    """Which pairs exist at step k, (B, T−1−k) booleans on the host; a row that is done keeps its first one, since a
    sampler needs something to draw from."""
    exist = np.arange(T - 1 - k) < (lengths - 1 - k)[:, None]
    exist[:, 0] = True
    return exist


def compose_plain(h, c, w, b, q, *, lengths, sampler, rng, scored: bool = False):
    """(h of the root (B, H), log-probability of the choices (B,), or zeros unless `scored`), by O(T²) cells."""
    (B, T, H), xp = h.shape, array_module(h.data)
    lengths = check_lengths(lengths, B, T)
    log_p = Tensor(xp.zeros(B, dtype=h.dtype))
    for k in range(T - 1):
        h_l, h_r, c_l, c_r = h[:, :-1], h[:, 1:], c[:, :-1], c[:, 1:]
        h_pair, c_pair = tree_lstm_cell(linear(concat(h_l, h_r, axis=-1), w, b), c_l, c_r)
        if k < T - 2:
            mask = candidate_mask(lengths, T, k)
            v = (h_pair @ q) / math.sqrt(H)
            s = sampler.sample(v, rng.site(k), mask)
            if scored:
                log_p = log_p + (log_softmax(mask_logits(v, asarray_like(mask, h.data))) * s.detach()).sum(axis=-1)
        else:
            s = Tensor(xp.ones((B, 1), dtype=h.dtype))  # one pair is left: nothing to choose
        s = s.reshape(B, T - 1 - k, 1)
        up_to = s.cumsum(axis=1)
        merge = lambda pair, left, right: s * pair + (1.0 - up_to) * left + (up_to - s) * right  # noqa: B023
        going = asarray_like((lengths > k + 1)[:, None, None], h.data)
        h, c = where(going, merge(h_pair, h_l, h_r), h_l), where(going, merge(c_pair, c_l, c_r), c_l)
    return h[:, 0], log_p


@op
def compose_given(h, c, w, b, *, lengths, choices):
    """The states of trees that are known: T − 1 cells each, level by level from below, all rows at once.

    choices (B, T−1): integers on the host, see `models.trees`.  -> h of the root (B, H)

    backward:  from the root down, each node once, since it has one parent:
               da from `tree_lstm_cell`,   [dh_l, dh_r] = da Wᵀ,   and at the end dW = Σ [h_l, h_r]ᵀ da in one product
    """
    xp, (B, T, H) = array_module(h), h.shape
    left, right, starts, root = levels(choices, check_lengths(lengths, B, T), T)
    left, right, root = (asarray_like(i, h) for i in (left, right, root))
    (n,), leaves = left.shape, B * T
    empty = lambda *shape: xp.empty(shape, dtype=h.dtype)
    node, children, gates, t = empty(leaves + n, 2, H), empty(n, 2, H), empty(n, 5, H), empty(n, H)
    node[:leaves, 0], node[:leaves, 1] = h.reshape(leaves, H), c.reshape(leaves, H)
    rows = [(slice(i, j), slice(leaves + i, leaves + j)) for i, j in pairwise(starts)]
    for here, new in rows:
        l, r = left[here], right[here]
        children[here, 0], children[here, 1] = node[l, 0], node[r, 0]
        a = children[here].reshape(-1, 2 * H) @ w
        a += b
        gates[here], node[new, 0], node[new, 1], t[here] = cell_forward(a, (node[l, 1], node[r, 1]))

    def backward(g):
        slopes, dh_dc = cell_slopes(gates, t, (node[left, 1], node[right, 1]))
        G, da = xp.zeros_like(node), empty(n, 5, H)
        G[root, 0] = g
        for here, new in reversed(rows):
            l, r = left[here], right[here]
            da[here], g_c = cell_vjp(slopes[here], dh_dc[here], G[new, 0], G[new, 1])
            dh = (da[here].reshape(-1, 5 * H) @ w.T).reshape(-1, 2, H)
            G[l, 0], G[r, 0] = dh[:, 0], dh[:, 1]
            G[l, 1], G[r, 1] = g_c * gates[here, 1], g_c * gates[here, 2]
        da = da.reshape(n, 5 * H)
        dw = lambda out=None: xp.matmul(children.reshape(n, 2 * H).T, da, out=out)
        db = lambda out=None: da.sum(axis=0, out=out)
        return G[:leaves, 0].reshape(h.shape), G[:leaves, 1].reshape(c.shape), dw, db

    return node[root, 0], backward
