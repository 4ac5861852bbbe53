"""A latent tree in linear time: all of `compose_plain`'s values and gradients from O(T) cells, for hard choices.

A merge leaves all pairs as they were except the two that touch the merged ones, so about 3T different pairs exist, not
T²/2. On the way back, a pair that is not chosen receives nothing but a multiple of the query; its cell is
differentiated once, and scaled. The gradient of the choices needs inner products of all nodes' gradients with their
neighbours at every step; they are kept up to date as numbers, never computed again from vectors. Derivation, with a
picture, and the meaning of A, B, D, E, α, G and P: models/README.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from minigrad import Tensor, grad, op
from minigrad.backend import array_module, asarray_like
from minigrad.fused import cell_forward, cell_slopes, cell_vjp, log_softmax, mask_logits

from .composition import candidates, check_lengths

BLOCK = 192  # pairs whose arrays are worked on together, so that they stay in a CPU's cache


@dataclass
class Merge:
    """Step k: the nodes x and y, at position `at`, become one. Nodes and pairs are row numbers, on the device of the
    states; what does not exist, at the ends of a sequence or once it is done, has the number of a row of zeros.

    nodes (B, 4): z, x, y, z', the merged ones with their neighbours;  new (B,): the merged node
    pairs (B, T−1−k): the candidates;   near (B, 5): those two before, one before, at, one and two behind the choice
    born (2, B): the pairs (z, new) and (new, z')
    """

    at: object
    nodes: object
    new: object
    pairs: object
    near: object
    born: object


@dataclass
class Trace:
    """What the forward pass leaves.

    Rows of nodes: the B T leaves, B merged ones for each step, and zeros. Rows of pairs: the B (T−1) of the leaves, at
    most 2 B for each step, of which `used` in all, and zeros.

    node (nodes, 2, H), pair (pairs, 2, H): h and c;   gates (pairs, 5, H), t (pairs, H): as in `cell_forward`
    left, right (pairs,): a pair's nodes;   beside (pairs,): its left neighbour when it was born
    root (B,): nodes;   merges: the steps
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


def forward(h, c, w, b, q, lengths, choose) -> Trace:
    """All merges. choose(k, v, mask) -> the positions chosen (B,), an array on the device."""
    xp, (B, T, H) = array_module(h), h.shape
    lengths = check_lengths(lengths, B, T)
    leaves, leaf_pairs = B * T, B * (T - 1)
    nodes, pairs = leaves + leaf_pairs + 1, leaf_pairs + 2 * B * max(T - 2, 0) + 1
    no_node, no_pair = nodes - 1, pairs - 1
    zeros = lambda *shape: xp.zeros(shape, dtype=h.dtype)
    numbers = lambda fill, *shape: xp.full(shape, fill, dtype=np.int64)

    node, pair, gates, t, v = zeros(nodes, 2, H), zeros(pairs, 2, H), zeros(pairs, 5, H), zeros(pairs, H), zeros(pairs)
    left, right, beside = numbers(no_node, pairs), numbers(no_node, pairs), numbers(no_pair, pairs)
    # [h_l, h_r] W = h_l W_l + h_r W_r: each node is multiplied once, not once for every pair that it is in
    as_left, as_right = zeros(nodes, 5 * H), zeros(nodes, 5 * H)
    w_l, w_r, query = w[:H], w[H:], q / math.sqrt(H)

    def multiply_nodes(rows):
        xp.matmul(node[rows, 0], w_l, out=as_left[rows])
        xp.matmul(node[rows, 0], w_r, out=as_right[rows])

    def compose_pairs(rows):
        l, r = left[rows], right[rows]
        a = as_left[l]
        a += as_right[r]
        a += b
        gates[rows], pair[rows, 0], pair[rows, 1], t[rows] = cell_forward(a, (node[l, 1], node[r, 1]))
        v[rows] = pair[rows, 0] @ query

    node[:leaves, 0], node[:leaves, 1] = h.reshape(leaves, H), c.reshape(leaves, H)
    multiply_nodes(slice(0, leaves))
    leaf = xp.where(asarray_like(np.arange(T) < lengths[:, None], h), xp.arange(leaves).reshape(B, T), no_node)
    here = xp.where(leaf[:, 1:] != no_node, xp.arange(leaf_pairs).reshape(B, T - 1), no_pair)
    left[:leaf_pairs], right[:leaf_pairs] = leaf[:, :-1].reshape(-1), leaf[:, 1:].reshape(-1)
    beside[:leaf_pairs].reshape(B, T - 1)[:, 1:] = here[:, :-1]
    for rows in blocks(leaf_pairs, xp):
        compose_pairs(rows)

    # the sequences, with one place on either side of the nodes and two of the pairs that hold nothing
    sequence, candidate = numbers(no_node, B, T + 2), numbers(no_pair, B, T + 3)
    sequence[:, 1:-1], candidate[:, 2:-2] = leaf, here
    row, used, merges = xp.arange(B)[:, None], leaf_pairs, []
    for k in range(T - 1):
        here, last = candidate[:, 2:-2], k == T - 2
        at = xp.zeros(B, dtype=np.int64) if last else choose(k, v[here], candidates(lengths, T, k))
        at = at[:, None]
        near, zxyz = candidate[row, at + xp.arange(5)], sequence[row, at + xp.arange(4)]
        going = near[:, 2] != no_pair
        made = slice(leaves + k * B, leaves + (k + 1) * B)
        node[made] = pair[near[:, 2]]
        new = xp.where(going, xp.arange(made.start, made.stop), no_node)
        sequence = xp.where(xp.arange(T + 1 - k) <= at, sequence[:, :-1], sequence[:, 1:])
        sequence[row, at + 1] = xp.where(going, new, zxyz[:, 1])[:, None]
        zxyz = xp.where(going[:, None], zxyz, no_node)
        born = numbers(no_pair, 2, B)
        merges.append(Merge(at[:, 0], zxyz, new, here, near, born))
        if last:
            break
        multiply_nodes(made)
        l, r = xp.stack([zxyz[:, 0], new]).reshape(-1), xp.stack([new, zxyz[:, 3]]).reshape(-1)
        exist = (l != no_node) & (r != no_node)
        # on a CPU only pairs that exist get a row; a device computes all 2 B, and need not tell how many exist
        some = xp.flatnonzero(exist) if xp is np else xp.arange(2 * B)
        rows = slice(used, used + len(some))
        used = rows.stop
        left[rows], right[rows] = l[some], r[some]
        born.reshape(-1)[some] = xp.where(exist[some], xp.arange(rows.start, rows.stop), no_pair)
        beside[rows] = xp.stack([near[:, 0], born[0]]).reshape(-1)[some]
        compose_pairs(rows)
        candidate = xp.where(xp.arange(T + 2 - k) <= at, candidate[:, :-1], candidate[:, 1:])
        candidate[row, at + xp.arange(1, 3)] = born.T
    return Trace(node, pair, gates, t, left, right, beside, used, sequence[:, 1], merges)


def blocks(count: int, xp) -> list[slice]:
    """0 to `count` in slices of `BLOCK` rows for NumPy, in one for a device."""
    size = BLOCK if xp is np else max(count, 1)
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def backward(trace: Trace, w, q, g_root, choice_vjp):
    """The gradients of (h, c, w, b, q), from that of the root's h.

    choice_vjp(k, ds) -> dv: the sampler's rule at step k, (B, T−1−k) -> (B, T−1−k), 0 where there is no candidate
    """
    xp, B = array_module(w), len(g_root)
    node, pair, left, right = trace.node, trace.pair, trace.left, trace.right
    nodes, pairs, used, H, steps = len(node), len(pair), trace.used, node.shape[-1], len(trace.merges)
    leaf_pairs, leaves = B * steps, B * (steps + 1)
    zeros = lambda *shape: xp.zeros(shape, dtype=w.dtype)
    G = zeros(nodes, 2 * H)  # what has arrived at a node from pairs that came into being after this step
    G[trace.root, :H] = g_root
    if not steps:
        dh, dc = G[:leaves].reshape(B, 1, 2, H).transpose(2, 0, 1, 3)
        return dh, dc, xp.zeros_like(w), zeros(5 * H), zeros(H)

    # 1. once for every pair:  A and B, what a gradient of 1 at its score sends to its left and to its right node;
    #    D = right − left and E = pair − right;  and the inner products by which a score changes P, the pair's own and
    #    those of its neighbour
    query = q / math.sqrt(H)
    slopes, dh_dc, AB, DE = (xp.empty((pairs, *shape), dtype=w.dtype) for shape in ((5, H), (H,), (2, 2, H), (2, 2, H)))
    slopes[-1], dh_dc[-1], AB[-1], DE[-1] = 0.0, 0.0, 0.0, 0.0  # the pair that does not exist
    for rows in blocks(used, xp):
        l, r, gates = left[rows], right[rows], trace.gates[rows]
        slopes[rows], dh_dc[rows] = cell_slopes(gates, trace.t[rows], (node[l, 1], node[r, 1]))
        da, g = cell_vjp(slopes[rows], dh_dc[rows], query, 0.0)
        AB[rows, :, 0] = (da.reshape(-1, 5 * H) @ w.T).reshape(-1, 2, H)
        xp.multiply(g[:, None], gates[:, 1:3], out=AB[rows, :, 1])
        xp.subtract(node[r], node[l], out=DE[rows, 0])
        xp.subtract(pair[rows], node[r], out=DE[rows, 1])
    AB, DE = AB.reshape(pairs, 2, 2 * H), DE.reshape(pairs, 2, 2 * H)
    products = lambda vectors, differences: xp.einsum("...x,...dx->...d", vectors, differences)

    def meeting(l, r):
        """Of neighbours l, r: what a score of l adds to r's P by way of their common node, and r's to l's."""
        return xp.stack([products(AB[l, 1], DE[r]), products(AB[r, 0], DE[l])], axis=1)

    own, neighbour = zeros(pairs, 2, 2), zeros(2, pairs, 2, 2)  # neighbour: its left, its right one when it was born
    for rows in blocks(used, xp):
        own[rows] = products(AB[rows], DE[rows, None])
        neighbour[0, rows] = meeting(trace.beside[rows], rows)
    born = [(merge.born[1], merge.near[:, 4]) for merge in trace.merges[:-1]]  # only (new, z') can have an elder right
    for u, r in born:
        neighbour[1, u] = meeting(u, r)
    neighbour = neighbour.reshape(2 * pairs, 2, 2)

    # 2. the merges, newest first
    alpha = zeros(pairs)  # Σ dv of a pair over the steps at which it was a candidate
    P = zeros(pairs, 2, 2)  # [⟨G_left, D⟩, ⟨G_left, E⟩], [⟨G_right, D⟩, ⟨G_right, E⟩] with all that has arrived by now
    arrived = zeros(steps, B, 2 * H)  # the gradients of the merged nodes
    for k in reversed(range(steps)):
        merge = trace.merges[k]
        (z, x, y, z_), (far_l, zx, xy, yz_, far_r), u = merge.nodes.T, merge.near.T, merge.pairs

        # the pairs (z, new) and (new, z') were candidates only after this step: their α is complete
        from_zn, from_nz = (alpha[p, None, None] * AB[p] for p in merge.born)
        g_new = arrived[k] = G[merge.new] + from_zn[:, 1] + from_nz[:, 0]
        G[z] += from_zn[:, 0]
        G[z_] += from_nz[:, 1]

        # the gradient of the choice: on its left the products with the left nodes count, on its right the others
        DE_near = DE[merge.near[:, 1:4]]  # of (z, x), (x, y), (y, z')
        g_z, g_z_ = G[z] + alpha[far_l, None] * AB[far_l, 1], G[z_] + alpha[far_r, None] * AB[far_r, 0]
        P[zx, 0], P[xy, 0], P[yz_, 1] = (products(g, DE_near[:, i]) for i, g in enumerate((g_z, g_new, g_z_)))
        dv = None
        if k < steps - 1:
            to_the_left = xp.arange(u.shape[1]) <= merge.at[:, None]
            P_now = xp.where(to_the_left[..., None], P[u, 0], P[u, 1])
            behind = xp.cumsum(P_now[:, ::-1, 0], axis=1)[:, ::-1]
            dv = choice_vjp(k, P_now[:, :, 1] + behind)

        # the chosen pair's cell, in full; before this step x and y were nodes of their own
        da, g = cell_vjp(slopes[xy], dh_dc[xy], g_new[:, :H], g_new[:, H:])
        dh = (w @ da.reshape(B, 5 * H).T).T  # this order is the faster one for a few rows
        for i, n in enumerate((x, y)):
            G[n, :H], G[n, H:] = dh[:, i * H : (i + 1) * H], g * trace.gates[xy, 1 + i]
        P[zx, 1], P[xy, 0] = products(G[x, None], DE_near[:, :2]).transpose(1, 0, 2)
        P[xy, 1], P[yz_, 0] = products(G[y, None], DE_near[:, 1:]).transpose(1, 0, 2)

        # the scores of this step reach all nodes
        if dv is not None:
            alpha[u] += dv
            dv = dv[:, :, None]
            changed = P[u] + dv[:, :, None] * own[u]
            l, r = u[:, :-1], u[:, 1:]
            meet = neighbour[xp.where(r > l, r, l + pairs)]  # the younger remembers: r its left one, or l its right one
            changed[:, 1:, 0] += dv[:, :-1] * meet[:, :, 0]
            changed[:, :-1, 1] += dv[:, 1:] * meet[:, :, 1]
            P[u] = changed

    # 3. the pairs of the leaves, and one product for all weights
    G = G[:leaves].reshape(B, steps + 1, 2, H)
    share = (alpha[:leaf_pairs, None, None] * AB[:leaf_pairs]).reshape(B, steps, 2, 2, H)
    G[:, :-1] += share[:, :, 0]
    G[:, 1:] += share[:, :, 1]
    total = zeros(pairs, 2, H)  # the cotangents of all pairs
    total[:, 0] = alpha[:, None] * query
    chosen = xp.concatenate([merge.near[:, 2] for merge in trace.merges])
    total[chosen] += arrived.reshape(leaf_pairs, 2, H)
    children = xp.empty((used, 2, H), dtype=w.dtype)
    for rows in blocks(used, xp):
        slopes[rows], _ = cell_vjp(slopes[rows], dh_dc[rows], total[rows, 0], total[rows, 1])
        children[rows, 0], children[rows, 1] = node[left[rows], 0], node[right[rows], 0]
    da = slopes[:used].reshape(used, 5 * H)  # written over the slopes, which have served
    dw = lambda out=None: xp.matmul(children.reshape(used, 2 * H).T, da, out=out)
    return G[:, :, 0], G[:, :, 1], dw, da.sum(axis=0), (alpha @ pair[:, 0]) / math.sqrt(H)


@op(enumerated="test_the_linear_time_gradient_is_that_of_the_tape")
def compose(h, c, w, b, q, *, lengths, sampler, rng, scored: bool = False):
    """`compose_plain`'s (h of the root (B, H), log-probability (B,)), for a sampler whose choices are one-hot
    (ValueError for a soft one)."""
    xp, log_p, steps = array_module(h), 0.0, []

    if getattr(sampler, "support", "hard") != "hard":
        raise ValueError("a choice between two trees has no tree: soft choices are for compose_plain")

    def choose(k, v, mask):
        nonlocal log_p
        v, score = Tensor(v, requires_grad=True), None
        s = sampler.sample(v, rng.site(k), mask)
        mask = asarray_like(mask, h)
        if scored:  # log p(s) and its gradient, s − p
            all_log_p, _ = log_softmax.rule(mask_logits.rule(v.data, mask)[0])
            log_p, score = log_p + (all_log_p * s.data).sum(axis=-1), s.data - xp.exp(all_log_p)
        steps.append((v, s, score, mask))
        return s.data.argmax(axis=-1)

    trace = forward(h, c, w, b, q, lengths, choose)

    def rule(g_root, g_log_p):
        def choice_vjp(k, ds):
            v, s, score, mask = steps[k]
            dv = grad(s, [v], ds, keep=True)[0] if s.requires_grad else 0.0
            if scored:
                dv = dv + g_log_p[:, None] * score
            return dv * mask.astype(ds.dtype)

        return backward(trace, w, q, g_root, choice_vjp)

    return (trace.node[trace.root, 0], xp.zeros(len(h), dtype=h.dtype) + log_p), rule


def compose_greedy(h, c, w, b, q, *, lengths):
    """Always the pair with the largest v. Arrays -> (h of the root (B, H), choices (B, T−1): 0 once a row is done)"""
    xp, T, chosen = array_module(h), h.shape[1], []

    def choose(k, v, mask):
        chosen.append(xp.where(asarray_like(mask, h), v, -xp.inf).argmax(axis=-1))
        return chosen[-1]

    trace = forward(h, c, w, b, q, lengths, choose)
    choices = xp.zeros((len(h), T - 1), dtype=np.int64)  # the last merge is no choice
    for k, at in enumerate(chosen):
        choices[:, k] = at
    return trace.node[trace.root, 0], choices
