"""How a latent-tree LSTM composes a sequence: T − 1 merges of two neighbours, each chosen by a sampler.

(Choi, Yoo & Lee 2018, with the choice as Fan et al. 2022 make it.)  At every step each pair of neighbours is composed by
one tree-LSTM cell, the composed state h is scored by a learned query, v = ⟨q, h⟩/√d, a sampler draws a one-hot s from
these logits, and the pair so chosen takes the place of its two parts:

    h' = s ⊙ h_pair + (1 − cumsum s) ⊙ h_left + (cumsum s − s) ⊙ h_right        (and the same for c)

Three evaluations with the same results:

    compose_plain    every pair anew at every step, on the tape: O(T²) cells. Readable, for soft choices too, the oracle.
    compose          for hard choices: about 3T different cells, and a backward pass as exact and as linear. See README.md.
    compose_greedy   the most probable choice at each step, no gradient; also gives the tree.

and `compose_given` for trees that are not chosen but known.

Common arguments: h, c (B, T, H), the states of the leaves, padded behind;  w (2H, 5H) and b (5H,), the cell's product
[h_l, h_r] W + b;  q (H,), the query;  lengths (B,), integers on the host, from 1 to T.  A sampler is anything with
`sample(logits, rng, mask)`, see `estimators.base`; step k draws at rng.site(k).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

from minigrad import Tensor, grad, op
from minigrad.backend import array_module, asarray_like
from minigrad.fused import (
    cell_forward,
    cell_slopes,
    cell_vjp,
    linear,
    log_softmax,
    mask_logits,
    softmax_array,
    tree_lstm_cell,
)
from minigrad.ops import concat, where

import numpy as np

from .trees import levels

BLOCK = 256  # pairs whose arrays are worked on together, so that they stay in a CPU's cache


class Draw:
    """Choices drawn from softmax(v), without a derivative: what a score function asks for."""

    @staticmethod
    def sample(logits, rng, mask):
        return Tensor(rng.one_hot(mask_logits(logits.detach(), asarray_like(mask, logits.data)).data))


def candidates(lengths, T: int, k: int):
    """Which pairs exist at step k, (B, T−1−k) booleans on the host; a row that is done keeps its first one, since a
    sampler needs something to draw from."""
    exist = np.arange(T - 1 - k) < (lengths - 1 - k)[:, None]
    exist[:, 0] = True
    return exist


def compose_plain(h, c, w, b, q, *, lengths, sampler, rng, scored: bool = False):
    """(h of the root (B, H), log-probability of the choices (B,), or zeros unless `scored`), by O(T²) cells."""
    (B, T, H), xp = h.shape, array_module(h.data)
    log_p = Tensor(xp.zeros(B, dtype=h.dtype))
    for k in range(T - 1):
        h_l, h_r, c_l, c_r = h[:, :-1], h[:, 1:], c[:, :-1], c[:, 1:]
        h_pair, c_pair = tree_lstm_cell(linear(concat(h_l, h_r, axis=-1), w, b), c_l, c_r)
        if k < T - 2:
            mask = candidates(lengths, T, k)
            v = (h_pair @ q) / math.sqrt(H)
            s = sampler.sample(v, rng.site(k), mask)
            if scored:
                log_p = log_p + (log_softmax(mask_logits(v, asarray_like(mask, h.data))) * s).sum(axis=-1)
        else:
            s = Tensor(xp.ones((B, 1), dtype=h.dtype))  # one pair is left: nothing to choose
        s = s.reshape(B, T - 1 - k, 1)
        up_to = s.cumsum(axis=1)
        merge = lambda pair, left, right: s * pair + (1.0 - up_to) * left + (up_to - s) * right  # noqa: B023
        going = asarray_like((lengths > k + 1)[:, None, None], h.data)
        h, c = where(going, merge(h_pair, h_l, h_r), h_l), where(going, merge(c_pair, c_l, c_r), c_l)
    return h[:, 0], log_p


# ---- linear time: nodes and pairs are rows of tables, and the sequence is a list of row numbers


@dataclass
class _Merge:
    """Step k. Row numbers (on the device of the states); a place that does not exist has the number of a row of zeros.

    around: the nodes z, x, y, z' (B, 4), of which x and y are merged;  pairs (B, T−1−k);  near: the pairs two to the
    left, one to the left, the chosen one (x, y), one and two to the right (B, 5);  at: the choice (B,);  new: the node
    that replaces x and y (B,);  born: the pairs (z, new) and (new, z') (2, B)
    """

    around: object
    pairs: object
    near: object
    at: object
    new: object
    born: object


@dataclass
class _Tables:
    """What the forward pass leaves. Nodes: the B T leaves, then B merged ones per step, then zeros. Pairs: the B (T−1)
    of the leaves, then 2 B per step, then zeros.

    node (nodes, 2, H) and pair (pairs, 2, H) hold h and c;  gates (pairs, 5, H), t (pairs, H) as in `cell_forward`;
    left, right (pairs,): the nodes of a pair;  beside (2, pairs): its left and right neighbour when it was born;
    used: how many rows for pairs are taken
    """

    node: object
    pair: object
    gates: object
    t: object
    left: object
    right: object
    beside: object
    used: int
    root: object
    merges: list


def _forward(h, c, w, b, q, lengths, choose) -> _Tables:
    """All merges. choose(k, v, mask) -> the positions chosen (B,), an array on the device."""
    xp, (B, T, H) = array_module(h), h.shape
    leaves, first = B * T, B * (T - 1)
    nodes, pairs = leaves + B * (T - 1) + 1, first + 2 * B * max(T - 2, 0) + 1
    no_node, no_pair = nodes - 1, pairs - 1
    zeros = lambda *shape: xp.zeros(shape, dtype=h.dtype)
    numbers = lambda fill, *shape: xp.full(shape, fill, dtype=np.int64)

    node, pair, gates, t, v = zeros(nodes, 2, H), zeros(pairs, 2, H), zeros(pairs, 5, H), zeros(pairs, H), zeros(pairs)
    left, right, beside = numbers(no_node, pairs), numbers(no_node, pairs), numbers(no_pair, 2, pairs)
    node[:leaves, 0], node[:leaves, 1] = h.reshape(leaves, H), c.reshape(leaves, H)
    # a pair's pre-activation is the sum of what its two nodes give, so each node is multiplied once, not once per pair
    as_left, as_right = zeros(nodes, 5 * H), zeros(nodes, 5 * H)
    w_l, w_r, scale = w[:H], w[H:], q / math.sqrt(H)

    def compose_pairs(rows):
        l, r = left[rows], right[rows]
        a = as_left[l]
        a += as_right[r]
        a += b
        gates[rows], pair[rows, 0], pair[rows, 1], t[rows] = cell_forward(a, (node[l, 1], node[r, 1]))
        v[rows] = pair[rows, 0] @ scale

    xp.matmul(node[:leaves, 0], w_l, out=as_left[:leaves])
    xp.matmul(node[:leaves, 0], w_r, out=as_right[:leaves])
    exist = asarray_like(np.arange(T) < lengths[:, None], h)
    leaf = xp.where(exist, xp.arange(leaves).reshape(B, T), no_node)
    here = xp.where(exist[:, 1:], xp.arange(first).reshape(B, T - 1), no_pair)
    left[:first], right[:first] = leaf[:, :-1].reshape(-1), leaf[:, 1:].reshape(-1)
    beside[0, :first].reshape(B, T - 1)[:, 1:] = here[:, :-1]
    block = BLOCK if xp is np else max(first, 1)
    for start in range(0, first, block):
        compose_pairs(slice(start, min(start + block, first)))

    # the sequences, with one place on either side of the nodes and two of the pairs that hold nothing
    sequence, candidate = numbers(no_node, B, T + 2), numbers(no_pair, B, T + 3)
    sequence[:, 1:-1], candidate[:, 2:-2] = leaf, here
    row, everything, used, merges = xp.arange(B), xp.arange(2 * B), first, []
    for k in range(T - 1):
        here, last = candidate[:, 2:-2], k == T - 2
        at = xp.zeros(B, dtype=np.int64) if last else choose(k, v[here], candidates(lengths, T, k))
        around = sequence[row[:, None], at[:, None] + xp.arange(4)]
        near = candidate[row[:, None], at[:, None] + xp.arange(5)]
        going = near[:, 2] != no_pair
        own = slice(leaves + k * B, leaves + (k + 1) * B)
        node[own] = pair[near[:, 2]]
        new = xp.where(going, xp.arange(own.start, own.stop), no_node)
        sequence = xp.where(xp.arange(T + 1 - k) <= at[:, None], sequence[:, :-1], sequence[:, 1:])
        sequence[row, at + 1] = xp.where(going, new, around[:, 1])
        around = xp.where(going[:, None], around, no_node)
        born = numbers(no_pair, 2, B)
        merges.append(_Merge(around, here, near, at, new, born))
        if last:
            break
        xp.matmul(node[own, 0], w_l, out=as_left[own])
        xp.matmul(node[own, 0], w_r, out=as_right[own])
        l, r = xp.stack([around[:, 0], new]).reshape(-1), xp.stack([new, around[:, 3]]).reshape(-1)
        exist = (l != no_node) & (r != no_node)
        # on a CPU only pairs that exist get a row; a device computes all 2 B, and need not tell how many exist
        some = xp.flatnonzero(exist) if xp is np else everything
        rows = slice(used, used + len(some))
        used = rows.stop
        left[rows], right[rows] = l[some], r[some]
        born.reshape(-1)[some] = xp.where(exist[some], xp.arange(rows.start, rows.stop), no_pair)
        beside[0, rows] = xp.stack([near[:, 0], born[0]]).reshape(-1)[some]
        beside[1, rows] = xp.stack([born[1], near[:, 4]]).reshape(-1)[some]
        compose_pairs(rows)
        candidate = xp.where(xp.arange(T + 2 - k) <= at[:, None] + 1, candidate[:, :-1], candidate[:, 1:])
        candidate[row, at + 1], candidate[row, at + 2] = born
    return _Tables(node, pair, gates, t, left, right, beside, used, sequence[:, 1], merges)


def _backward(saved: _Tables, w, q, g_root, choice_vjp):
    """The gradients with respect to (h, c, w, b, q). Derivation, terms and picture: models/README.md.

    choice_vjp(k, ds) -> dv: the sampler's rule at step k, (B, T−1−k) -> (B, T−1−k)
    """
    xp = array_module(w)
    node, pair, left, right = saved.node, saved.pair, saved.left, saved.right
    nodes, pairs, H = len(node), len(pair), node.shape[-1]
    (B, first), steps = saved.merges[0].pairs.shape if saved.merges else (len(g_root), 0), len(saved.merges)
    leaves = B * (first + 1)
    empty = lambda *shape: xp.empty(shape, dtype=w.dtype)
    zeros = lambda *shape: xp.zeros(shape, dtype=w.dtype)
    block, used = BLOCK if xp is np else pairs, saved.used
    blocks = [slice(start, min(start + block, used)) for start in range(0, used, block)]

    # 1. once for every pair: the slopes of its cell; `toward`, what a gradient of 1 at its score v sends to its left and
    #    to its right node; `differ`, the vectors D = right − left and E = pair − right; and their inner products
    scale = q / math.sqrt(H)
    slopes, dh_dc = zeros(pairs, 5, H), zeros(pairs, H)
    toward, differ, own = zeros(pairs, 2, 2, H), zeros(pairs, 2, 2, H), zeros(pairs, 2, 2)
    for rows in blocks:
        l, r, gates = left[rows], right[rows], saved.gates[rows]
        slopes[rows], dh_dc[rows] = cell_slopes(gates, saved.t[rows], (node[l, 1], node[r, 1]))
        da, g = cell_vjp(slopes[rows], dh_dc[rows], scale, 0.0)
        toward[rows, :, 0] = (da.reshape(-1, 5 * H) @ w.T).reshape(-1, 2, H)
        xp.multiply(g[:, None], gates[:, 1:3], out=toward[rows, :, 1])
        xp.subtract(node[r], node[l], out=differ[rows, 0])
        xp.subtract(pair[rows], node[r], out=differ[rows, 1])
    toward, differ = toward.reshape(pairs, 2, 2 * H), differ.reshape(pairs, 2, 2 * H)
    own[:used] = xp.einsum("nsx,ndx->nsd", toward[:used], differ[:used])

    def between(w, u):
        """For neighbours w, u with the node x between them: what a score of w changes in u's products with the gradient
        of x, and what a score of u changes in w's.  (n,), (n,) -> (n, 2, 2)"""
        return xp.stack(
            [xp.einsum("nx,ndx->nd", toward[w, 1], differ[u]), xp.einsum("nx,ndx->nd", toward[u, 0], differ[w])], axis=1
        )

    younger_right, younger_left = zeros(pairs, 2, 2), zeros(pairs, 2, 2)
    for rows in blocks:
        younger_right[rows] = between(saved.beside[0, rows], xp.arange(rows.start, rows.stop))
    for merge in saved.merges[:-1]:
        younger_left[merge.born[1]] = between(merge.born[1], saved.beside[1, merge.born[1]])

    # 2. the merges, newest first
    G = zeros(nodes, 2 * H)  # what has arrived at a node, but for the pairs that are candidates at this step
    G[saved.root, :H] = g_root
    alpha = zeros(pairs)  # Σ dv of a pair over the steps at which it was a candidate
    products = zeros(pairs, 2, 2)  # ⟨gradient of the left or of the right node, D or E⟩ of a pair
    arrived = zeros(pairs, 2, 2 * H)[:0] if not steps else empty(steps, B, 2 * H)
    for k in reversed(range(steps)):
        merge = saved.merges[k]
        z, x, y, z2 = merge.around.T
        (zx, xy, yz), ids = merge.near[:, 1:4].T, merge.pairs

        # the pairs (z, new) and (new, z') are complete: they were candidates only after this step
        g_new = G[merge.new]
        for p, mine, other, at in zip(merge.born, (1, 0), (0, 1), (z, z2), strict=True):
            g_new += alpha[p, None] * toward[p, mine]
            G[at] += alpha[p, None] * toward[p, other]
        g_z = G[z] + alpha[merge.near[:, 0], None] * toward[merge.near[:, 0], 1]
        g_z2 = G[z2] + alpha[merge.near[:, 4], None] * toward[merge.near[:, 4], 0]

        # the gradient of the choice
        around = differ[merge.near[:, 1:4]]  # (B, 3, 2, 2H)
        start = xp.einsum("bpx,bpdx->bpd", xp.stack([g_z, g_new, g_z2], axis=1), around)
        products[zx, 0], products[xy, 0], products[yz, 1] = start[:, 0], start[:, 1], start[:, 2]
        dv = None
        if k < steps - 1:
            place = xp.arange(ids.shape[1])
            at_step = products[ids]
            chosen_side = xp.where((place <= merge.at[:, None])[..., None], at_step[:, :, 0], at_step[:, :, 1])
            later = xp.cumsum(chosen_side[:, ::-1, 0], axis=1)[:, ::-1]
            dv = choice_vjp(k, chosen_side[:, :, 1] + later)

        # the chosen pair is differentiated in full, and its nodes come into being
        da, g = cell_vjp(slopes[xy], dh_dc[xy], g_new[:, :H], g_new[:, H:])
        to_nodes = empty(B, 2, 2, H)
        to_nodes[:, :, 0] = (w @ da.reshape(B, 5 * H).T).T.reshape(B, 2, H)
        to_nodes[:, :, 1] = g[:, None] * saved.gates[xy, 1:3]
        to_nodes = to_nodes.reshape(B, 2, 2 * H)
        G[x], G[y], arrived[k] = to_nodes[:, 0], to_nodes[:, 1], g_new
        g_x = xp.einsum("bx,bpdx->bpd", to_nodes[:, 0], around[:, :2])
        g_y = xp.einsum("bx,bpdx->bpd", to_nodes[:, 1], around[:, 1:])
        products[zx, 1], products[xy, 0], products[xy, 1], products[yz, 0] = g_x[:, 0], g_x[:, 1], g_y[:, 0], g_y[:, 1]

        # and this step's dv changes the gradients of all nodes, and so all inner products
        if dv is not None:
            alpha[ids] += dv
            dv = dv[..., None]
            at_step = products[ids] + dv[..., None] * own[ids]
            l, r = ids[:, :-1], ids[:, 1:]
            meet = xp.where((r > l)[..., None, None], younger_right[r], younger_left[l])
            at_step[:, 1:, 0] += dv[:, :-1] * meet[:, :, 0]
            at_step[:, :-1, 1] += dv[:, 1:] * meet[:, :, 1]
            products[ids] = at_step

    # 3. the leaves' own pairs, and one product for all weights
    G = G[:leaves].reshape(B, first + 1, 2, H)
    if not steps:
        return G[:, :, 0], G[:, :, 1], xp.zeros_like(w), zeros(5 * H), zeros(H)
    share = toward[: B * first] * alpha[: B * first, None, None]
    share = share.reshape(B, first, 2, 2, H)
    G[:, :-1] += share[:, :, 0]
    G[:, 1:] += share[:, :, 1]
    g = zeros(pairs, 2, H)
    g[:used, 0] = alpha[:used, None] * scale
    for merge, g_new in zip(saved.merges, arrived, strict=True):
        g[merge.near[:, 2]] += g_new.reshape(B, 2, H)
    children = empty(used, 2, H)
    for rows in blocks:
        slopes[rows], _ = cell_vjp(slopes[rows], dh_dc[rows], g[rows, 0], g[rows, 1])
        children[rows, 0], children[rows, 1] = node[left[rows], 0], node[right[rows], 0]
    da = slopes[:used].reshape(used, 5 * H)
    dw = children.reshape(used, 2 * H).T @ da
    return G[:, :, 0], G[:, :, 1], dw, da.sum(axis=0), (alpha[:used] @ pair[:used, 0]) / math.sqrt(H)


@op(enumerated="test_the_linear_time_gradient_is_that_of_the_tape")
def compose(h, c, w, b, q, *, lengths, sampler, rng, scored: bool = False):
    """As `compose_plain`, for a sampler of one-hots: O(T) cells, and O(T) vectors on the way back."""
    xp, B = array_module(h), len(h)
    steps, log_p = [], xp.zeros(B, dtype=h.dtype)

    def choose(k, v, mask):
        v = Tensor(v, requires_grad=True)
        s = sampler.sample(v, rng.site(k), mask)
        score = None
        if scored:
            p = softmax_array(mask_logits.rule(v.data, asarray_like(mask, h))[0])
            log_p[...] += xp.log((p * s.data).sum(axis=-1))
            score = s.data - p
        steps.append((v, s, score, asarray_like(mask, h)))
        return s.data.argmax(axis=-1)

    saved = _forward(h, c, w, b, q, lengths, choose)

    def backward(g_root, g_log_p):
        def choice_vjp(k, ds):
            v, s, score, mask = steps[k]
            dv = grad(s, [v], ds, keep=True)[0] if s.requires_grad else xp.zeros_like(ds)
            if scored:
                dv = dv + g_log_p[:, None] * score
            return dv * mask

        return _backward(saved, w, q, g_root, choice_vjp)

    return (saved.node[saved.root, 0], log_p), backward


def compose_greedy(h, c, w, b, q, *, lengths):
    """Always the pair with the largest v. Arrays -> (h of the root (B, H), the choices (B, T−1), 0 once a row is done)."""
    xp, chosen = array_module(h), []

    def choose(k, v, mask):
        chosen.append(xp.where(asarray_like(mask, h), v, -xp.inf).argmax(axis=-1))
        return chosen[-1]

    saved = _forward(h, c, w, b, q, lengths, choose)
    chosen += [xp.zeros(len(h), dtype=np.int64)] * (h.shape[1] > 1)
    return saved.node[saved.root, 0], xp.stack(chosen, axis=1) if chosen else xp.zeros((len(h), 0), dtype=np.int64)


@op
def compose_given(h, c, w, b, *, lengths, choices):
    """The states of trees that are known: T − 1 cells each, level by level from below, all rows at once.

    choices (B, T−1): integers on the host, see `models.trees`.  -> h of the root (B, H)

    backward:  from the root down, each node once, since it has one parent:
               da from `tree_lstm_cell`,   [dh_l, dh_r] = da Wᵀ,   and at the end dW = Σ [h_l, h_r]ᵀ da in one product
    """
    xp, (B, T, H) = array_module(h), h.shape
    left, right, starts, root = levels(choices, lengths, T)
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
