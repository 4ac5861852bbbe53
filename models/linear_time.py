"""A latent tree in linear time: all of `compose_plain`'s values and gradients from O(T) cells, for hard choices.

A merge changes only the pairs that touch the merged nodes, so about 3T different pairs exist, not T²/2. On the way
back, a pair that is not chosen receives a multiple of the query and nothing else: its cell is differentiated once, and
the result is scaled. The gradient of the choices needs inner products of all nodes' gradients with their neighbours at
every step. They are kept up to date as numbers, and never computed again from vectors.

models/README.md derives this, with a picture. The docstrings quote its sections, and its letters are here:

    x, y, z, z'   left, right: the nodes that are merged;   node_before, node_after: their neighbours
    D, E          differences: right node − left node, and pair − right node
    A, B          score_gradients: of a pair's score, with respect to the pair's left and to its right node
    α             total_dv: the gradient at a pair's score, summed over the steps at which it was a candidate
    G, G_new      node_gradients, new_node_gradients
    P             inner_products: of the gradients at a pair's two nodes with the pair's D and E
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from minigrad import Tensor, grad, op
from minigrad.backend import array_module
from minigrad.fused import cell_forward, cell_slopes, cell_vjp, log_softmax, mask_logits
from minigrad.kernels import inner

from .composition import candidate_mask, check_lengths, check_states, choice_noise, existing_tokens

BLOCK = 192  # pairs whose arrays are worked on together, so that they stay in a CPU's cache


def blocks(count: int, xp) -> list[slice]:
    """0 to `count` in slices of `BLOCK` rows for NumPy, in one for a device."""
    size = BLOCK if xp is np else max(count, 1)
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


# ---- what the forward pass leaves


@dataclass
class Merge:
    """One step: the nodes x and y, with the neighbours z and z', become one node.

    All fields are arrays on the device of the states. Nodes and pairs are row numbers of the `Trace`.

    position (B,): where the chosen pair (x, y) is among the candidates
    nodes (B, 4): z, x, y, z';   new_node (B,): what x and y become
    candidates (B, T−1−k): all pairs of step k
    neighbourhood (B, 5): two pairs before the chosen one, the chosen one, two pairs after it
    new_pairs (2, B): (z, new node) and (new node, z'), which come into being with this merge
    """

    position: object
    nodes: object
    new_node: object
    candidates: object
    neighbourhood: object
    new_pairs: object


@dataclass
class Trace:
    """All nodes and pairs of a batch, each in a row of its own.

    Rows of nodes: the B T leaves, and B new nodes for each step. Rows of pairs: the B (T−1) pairs of leaves, and at
    most 2 B new pairs for each step, `pair_count` in all. The last row of both is zeros. It stands for what does not
    exist: a neighbour beyond an end of the sequence, or a merge in a sequence that is done.

    node_states (nodes, 2, H), pair_states (pairs, 2, H): h and c
    gates (pairs, 5, H), tanh_c (pairs, H): as in `cell_forward`;   scores (pairs,): v
    left_node, right_node (pairs,): a pair's nodes
    left_neighbour (pairs,): the pair to its left at the time when it came into being
    root (B,): nodes;   merges: one for each step
    """

    node_states: object
    pair_states: object
    gates: object
    tanh_c: object
    scores: object
    left_node: object
    right_node: object
    left_neighbour: object
    pair_count: int = 0
    root: object = None
    merges: list[Merge] = field(default_factory=list)

    @property
    def no_node(self) -> int:
        return len(self.node_states) - 1

    @property
    def no_pair(self) -> int:
        return len(self.pair_states) - 1


def empty_trace(h) -> Trace:
    """A trace with room for all nodes and pairs.   h (B, T, H)"""
    xp, (B, T, H) = array_module(h), h.shape
    nodes, pairs = B * T + B * (T - 1) + 1, B * (T - 1) + 2 * B * max(T - 2, 0) + 1
    zeros = lambda *shape: xp.zeros(shape, dtype=h.dtype)
    fill = lambda row: xp.full(pairs, row, dtype=np.int64)
    states = zeros(nodes, 2, H), zeros(pairs, 2, H), zeros(pairs, 5, H), zeros(pairs, H), zeros(pairs)
    return Trace(*states, fill(nodes - 1), fill(nodes - 1), fill(pairs - 1))


# ---- forward: "Forward: about 3T pairs"


@dataclass
class Remaining:
    """The nodes and pairs that are left in each sequence, from left to right, as row numbers of the trace.

    Places that hold nothing lie around them, so that a choice at an end has neighbours like any other.

    nodes (B, T−k+2): one such place at either end;   pairs (B, T−1−k+4): two at either end
    sequence (B, 1): the number of each sequence, to index with
    """

    nodes: object
    pairs: object
    sequence: object

    @property
    def candidates(self):
        return self.pairs[:, 2:-2]


class Cell:
    """The tree-LSTM cell and its score, for rows of a trace ("The model").

    [h_l, h_r] W = h_l W_l + h_r W_r: each node is multiplied once, not once for every pair that it is in.
    """

    def __init__(self, trace: Trace, w, b, q):
        xp, (nodes, _, H) = array_module(w), trace.node_states.shape
        self.trace, self.b, self.query = trace, b, q / math.sqrt(H)
        self.w_left, self.w_right = w[:H], w[H:]
        zeros = lambda: xp.zeros((nodes, 5 * H), dtype=trace.node_states.dtype)
        self.left_products, self.right_products = zeros(), zeros()  # h W_l and h W_r of each node

    def multiply_nodes(self, rows: slice) -> None:
        xp, h = array_module(self.b), self.trace.node_states[rows, 0]
        xp.matmul(h, self.w_left, out=self.left_products[rows])
        xp.matmul(h, self.w_right, out=self.right_products[rows])

    def compose_pairs(self, rows: slice) -> None:
        trace, pair_states = self.trace, self.trace.pair_states
        left, right = trace.left_node[rows], trace.right_node[rows]
        a = self.left_products[left]
        a += self.right_products[right]
        a += self.b
        cells = trace.node_states[left, 1], trace.node_states[right, 1]
        trace.gates[rows], pair_states[rows, 0], pair_states[rows, 1], trace.tanh_c[rows] = cell_forward(a, cells)
        trace.scores[rows] = pair_states[rows, 0] @ self.query


def forward(h, c, w, b, q, lengths, choose) -> Trace:
    """All merges. choose(k, v, mask) -> the positions chosen (B,), an array on the device."""
    check_states(h, c, w, b)
    xp, (B, T, _) = array_module(h), h.shape
    lengths = check_lengths(lengths, B, T)
    trace = empty_trace(h)
    cell = Cell(trace, w, b, q)
    exist = existing_tokens(lengths, T, h)
    remaining = place_leaves(trace, h, c, exist)
    cell.multiply_nodes(slice(0, B * T))
    for rows in blocks(trace.pair_count, xp):
        cell.compose_pairs(rows)

    for k in range(T - 1):
        last = k == T - 2
        if last:
            position = xp.zeros(B, dtype=np.int64)  # one pair is left: nothing to choose
        else:
            position = choose(k, trace.scores[remaining.candidates], candidate_mask(exist, k))
        new_rows = slice(B * (T + k), B * (T + k + 1))
        merge = merge_chosen_pairs(trace, remaining, position, new_rows)
        trace.merges.append(merge)
        if not last:
            cell.multiply_nodes(new_rows)
            cell.compose_pairs(add_new_pairs(trace, remaining, merge))
    trace.root = remaining.nodes[:, 1]
    return trace


def place_leaves(trace: Trace, h, c, exist) -> Remaining:
    """Before the first step the leaves are the nodes, and each two neighbours among them are a pair."""
    xp, (B, T, H) = array_module(h), h.shape
    leaf_count, trace.pair_count = B * T, B * (T - 1)
    leaves, leaf_pairs = slice(0, leaf_count), slice(0, trace.pair_count)
    trace.node_states[leaves, 0], trace.node_states[leaves, 1] = h.reshape(-1, H), c.reshape(-1, H)
    nodes = xp.where(exist, xp.arange(leaf_count).reshape(B, T), trace.no_node)
    left, right = nodes[:, :-1], nodes[:, 1:]
    pairs = xp.where(right != trace.no_node, xp.arange(trace.pair_count).reshape(B, T - 1), trace.no_pair)
    trace.left_node[leaf_pairs], trace.right_node[leaf_pairs] = left.reshape(-1), right.reshape(-1)
    trace.left_neighbour[leaf_pairs].reshape(B, T - 1)[:, 1:] = pairs[:, :-1]

    fill = lambda row, places: xp.full((B, places), row, dtype=np.int64)
    remaining = Remaining(fill(trace.no_node, T + 2), fill(trace.no_pair, T + 3), xp.arange(B)[:, None])
    remaining.nodes[:, 1:-1], remaining.pairs[:, 2:-2] = nodes, pairs
    return remaining


def merge_chosen_pairs(trace: Trace, remaining: Remaining, position, new_rows: slice) -> Merge:
    """The chosen pair of each sequence becomes a node, in the place of its two parts.

    A sequence that is done stays as it is.   new_rows: the B rows of the new nodes
    """
    xp, at = array_module(position), position[:, None]
    nodes = remaining.nodes[remaining.sequence, at + xp.arange(4)]
    neighbourhood = remaining.pairs[remaining.sequence, at + xp.arange(5)]
    chosen = neighbourhood[:, 2]
    unfinished = chosen != trace.no_pair
    trace.node_states[new_rows] = trace.pair_states[chosen]
    new_node = xp.where(unfinished, xp.arange(new_rows.start, new_rows.stop), trace.no_node)
    remaining.nodes = remove_after(remaining.nodes, at)
    remaining.nodes[remaining.sequence, at + 1] = xp.where(unfinished, new_node, nodes[:, 1])[:, None]
    nodes = xp.where(unfinished[:, None], nodes, trace.no_node)
    new_pairs = xp.full((2, len(position)), trace.no_pair, dtype=np.int64)  # until `add_new_pairs` knows them
    return Merge(position, nodes, new_node, remaining.candidates, neighbourhood, new_pairs)


def add_new_pairs(trace: Trace, remaining: Remaining, merge: Merge) -> slice:
    """The pairs (z, new node) and (new node, z') take the places of the chosen pair and its two neighbours.

    -> their rows in the trace, for `Cell.compose_pairs`
    """
    xp, new_node, at = array_module(merge.new_node), merge.new_node, merge.position[:, None]
    left = xp.stack([merge.nodes[:, 0], new_node]).reshape(-1)
    right = xp.stack([new_node, merge.nodes[:, 3]]).reshape(-1)
    exist = (left != trace.no_node) & (right != trace.no_node)
    # On a CPU only the pairs that exist get a row. On a device all 2 B do: their number is not known to the host.
    kept = xp.flatnonzero(exist) if xp is np else xp.arange(len(exist))
    rows = slice(trace.pair_count, trace.pair_count + len(kept))
    trace.pair_count = rows.stop
    trace.left_node[rows], trace.right_node[rows] = left[kept], right[kept]
    merge.new_pairs.reshape(-1)[kept] = xp.where(exist[kept], xp.arange(rows.start, rows.stop), trace.no_pair)
    left_neighbour = xp.stack([merge.neighbourhood[:, 0], merge.new_pairs[0]]).reshape(-1)
    trace.left_neighbour[rows] = left_neighbour[kept]
    remaining.pairs = remove_after(remaining.pairs, at)  # three pairs go, two come
    remaining.pairs[remaining.sequence, at + xp.arange(1, 3)] = merge.new_pairs.T
    return rows


def remove_after(places, at):
    """Each sequence without the place after `at`.   places (B, n), at (B, 1) -> (B, n−1)"""
    xp = array_module(places)
    return xp.where(xp.arange(places.shape[1] - 1) <= at, places[:, :-1], places[:, 1:])


# ---- backward


@dataclass
class PairDerivatives:
    """What is computed once for every pair. The row of the pair that does not exist holds zeros.

    slopes (pairs, 5, H), dh_dc (pairs, H): the derivatives of the pair's cell, as in `cell_slopes`
    score_gradients (pairs, 2, 2H): A and B, what a gradient of 1 at the pair's score sends to its left and right node
    differences (pairs, 2, 2H): D = right − left and E = pair − right
    own_products (pairs, 2, 2): what a gradient of 1 at the pair's score adds to the pair's P
    cross_products (2 · pairs, 2, 2): what a gradient of 1 at the score of one of two neighbours adds to P of the other,
        as `products_across` gives it. It is stored with the pair that came later: row u has the pair u and its left
        neighbour of that time, row u + pairs the pair u and its right neighbour
    """

    slopes: object
    dh_dc: object
    score_gradients: object
    differences: object
    own_products: object
    cross_products: object


@dataclass
class Arrived:
    """What has come back from the steps after the one at hand. Each step of `backward` brings it up to date.

    node_gradients (nodes, 2H): G without what the candidates have sent so far: their α is not complete
    new_node_gradients (T−1, B, 2H): G_new of each step
    total_dv (pairs,): α
    inner_products (pairs, 2, 2): P = [⟨G_left, D⟩, ⟨G_left, E⟩], [⟨G_right, D⟩, ⟨G_right, E⟩]; here G includes what
        the candidates have sent so far
    """

    node_gradients: object
    new_node_gradients: object
    total_dv: object
    inner_products: object


def backward(trace: Trace, w, q, g_root, choice_vjp):
    """The gradients of (h, c, w, b, q), from that of the root's h.

    choice_vjp(k, ds) -> dv: the sampler's rule at step k, (B, T−1−k) -> (B, T−1−k), 0 where there is no candidate
    """
    xp, (B, H), steps = array_module(w), g_root.shape, len(trace.merges)
    nodes, pairs = len(trace.node_states), len(trace.pair_states)
    zeros = lambda *shape: xp.zeros(shape, dtype=w.dtype)
    node_gradients = zeros(nodes, 2 * H)
    node_gradients[trace.root, :H] = g_root
    if not steps:  # one token: the leaf is the root
        dh, dc = node_gradients[:B].reshape(B, 1, 2, H).transpose(2, 0, 1, 3)
        return dh, dc, xp.zeros_like(w), zeros(5 * H), zeros(H)

    query = q / math.sqrt(H)
    derivatives = differentiate_pairs(trace, w, query)
    arrived = Arrived(node_gradients, zeros(steps, B, 2 * H), zeros(pairs), zeros(pairs, 2, 2))
    for k in reversed(range(steps)):
        merge, choice = trace.merges[k], k < steps - 1  # the last merge was no choice
        g_new = arrived.new_node_gradients[k] = gradient_of_new_node(merge, derivatives, arrived)
        differences = derivatives.differences[merge.neighbourhood[:, 1:4]]  # of (z, x), (x, y), (y, z')
        if choice:
            ds = gradient_of_choice(merge, g_new, differences, derivatives, arrived)
            dv = choice_vjp(k, ds)
        differentiate_chosen_pair(trace, merge, w, g_new, differences, derivatives, arrived)
        if choice:
            send_score_gradients(merge, dv, derivatives, arrived)
    dh, dc = gradients_of_leaves(derivatives, arrived)
    dw, db, dq = gradients_of_weights(trace, query, derivatives, arrived)
    return dh, dc, dw, db, dq


def differentiate_pairs(trace: Trace, w, query) -> PairDerivatives:
    """A, B, D and E of every pair ("A pair that is not chosen is differentiated once"), and their inner products."""
    xp, states, pairs, H = array_module(w), trace.node_states, len(trace.pair_states), len(query)
    shapes = (5, H), (H,), (2, 2, H), (2, 2, H)
    slopes, dh_dc, score_gradients, differences = (xp.empty((pairs, *shape), dtype=w.dtype) for shape in shapes)
    for array in (slopes, dh_dc, score_gradients, differences):
        array[trace.no_pair] = 0.0
    for rows in blocks(trace.pair_count, xp):
        left, right, gates = trace.left_node[rows], trace.right_node[rows], trace.gates[rows]
        slopes[rows], dh_dc[rows] = cell_slopes(gates, trace.tanh_c[rows], (states[left, 1], states[right, 1]))
        da, g = cell_vjp(slopes[rows], dh_dc[rows], query, 0.0)
        score_gradients[rows, :, 0] = (da.reshape(-1, 5 * H) @ w.T).reshape(-1, 2, H)
        xp.multiply(g[:, None], gates[:, 1:3], out=score_gradients[rows, :, 1])
        xp.subtract(states[right], states[left], out=differences[rows, 0])
        xp.subtract(trace.pair_states[rows], states[right], out=differences[rows, 1])
    score_gradients, differences = (x.reshape(pairs, 2, 2 * H) for x in (score_gradients, differences))
    products = products_of_pairs(trace, score_gradients, differences)
    return PairDerivatives(slopes, dh_dc, score_gradients, differences, *products)


def products_of_pairs(trace: Trace, score_gradients, differences):
    """own_products and cross_products: the constants of "The inner products are numbers that are kept up to date"."""
    xp, pairs, dtype = array_module(differences), len(differences), differences.dtype
    own, cross = xp.zeros((pairs, 2, 2), dtype=dtype), xp.zeros((2, pairs, 2, 2), dtype=dtype)
    for rows in blocks(trace.pair_count, xp):
        own[rows] = dot(score_gradients[rows], differences[rows, None])
        cross[0, rows] = products_across(trace.left_neighbour[rows], rows, score_gradients, differences)
    for merge in trace.merges[:-1]:  # only (new node, z') can have a right neighbour that was there before it
        pair, right_neighbour = merge.new_pairs[1], merge.neighbourhood[:, 4]
        cross[1, pair] = products_across(pair, right_neighbour, score_gradients, differences)
    return own, cross.reshape(2 * pairs, 2, 2)


def products_across(left, right, score_gradients, differences):
    """What a gradient of 1 at the score of a pair adds to P of its neighbour, through the node that both have.

    left, right (n,): the pairs   -> (n, 2, 2), [for the right one, for the left one]:
    [⟨B_left, D_right⟩, ⟨B_left, E_right⟩], [⟨A_right, D_left⟩, ⟨A_right, E_left⟩]
    """
    to_right = dot(score_gradients[left, 1], differences[right])
    to_left = dot(score_gradients[right, 0], differences[left])
    return array_module(differences).stack([to_right, to_left], axis=1)


def dot(vectors, differences):
    """⟨vector, D⟩ and ⟨vector, E⟩.   vectors (..., 2H), differences (..., 2, 2H) -> (..., 2)"""
    return inner(vectors[..., None, :], differences)


# ---- backward, one step: "Which vectors are needed"


def gradient_of_new_node(merge: Merge, derivatives: PairDerivatives, arrived: Arrived):
    """G_new (B, 2H): what has arrived at the new node, α B of the pair (z, new node) and α A of (new node, z').

    These pairs were candidates only after this step, so their α is complete. The first one also sends α A to z, and the
    second one α B to z'.
    """
    node_gradients, node_before, node_after = arrived.node_gradients, merge.nodes[:, 0], merge.nodes[:, 3]
    first, second = (arrived.total_dv[p, None, None] * derivatives.score_gradients[p] for p in merge.new_pairs)
    g_new = node_gradients[merge.new_node] + first[:, 1] + second[:, 0]
    node_gradients[node_before] += first[:, 0]
    node_gradients[node_after] += second[:, 1]
    return g_new


def gradient_of_choice(merge: Merge, g_new, differences, derivatives: PairDerivatives, arrived: Arrived):
    """∂L/∂s (B, T−1−k): at each candidate ⟨G', E⟩, plus the sum of ⟨G', D⟩ from there on ("Backward, one step").

    G' is the gradient at a candidate's left node before the choice, at its right node after the choice, and G_new at
    the choice. P has these products, but for the three pairs around the choice: theirs are computed here.

    differences (B, 3, 2, 2H): D and E of these three, (z, x), (x, y) and (y, z')
    """
    xp, candidates, inner_products = array_module(g_new), merge.candidates, arrived.inner_products
    far_before, pair_before, chosen, pair_after, far_after = merge.neighbourhood.T
    # z and z' are in one more pair each, which is a candidate now: what it sends is not in `node_gradients` yet
    sent = lambda pair, side: arrived.total_dv[pair, None] * derivatives.score_gradients[pair, side]
    g_before = arrived.node_gradients[merge.nodes[:, 0]] + sent(far_before, 1)
    g_after = arrived.node_gradients[merge.nodes[:, 3]] + sent(far_after, 0)
    inner_products[pair_before, 0] = dot(g_before, differences[:, 0])
    inner_products[chosen, 0] = dot(g_new, differences[:, 1])
    inner_products[pair_after, 1] = dot(g_after, differences[:, 2])

    up_to_choice = xp.arange(candidates.shape[1]) <= merge.position[:, None]
    products = xp.where(up_to_choice[..., None], inner_products[candidates, 0], inner_products[candidates, 1])
    from_here_on = xp.cumsum(products[:, ::-1, 0], axis=1)[:, ::-1]
    return products[:, :, 1] + from_here_on


def differentiate_chosen_pair(
    trace: Trace, merge: Merge, w, g_new, differences, derivatives: PairDerivatives, arrived: Arrived
) -> None:
    """G_x and G_y from G_new, by the chosen pair's cell in full, and their products with D and E of the three pairs.

    Before this step x and y were nodes of their own: nothing else has arrived at them yet.
    """
    H, node_gradients, inner_products = g_new.shape[1] // 2, arrived.node_gradients, arrived.inner_products
    _, left, right, _ = merge.nodes.T
    _, pair_before, chosen, pair_after, _ = merge.neighbourhood.T
    da, g = cell_vjp(derivatives.slopes[chosen], derivatives.dh_dc[chosen], g_new[:, :H], g_new[:, H:])
    dh = (w @ da.reshape(-1, 5 * H).T).T  # this order is the faster one for a few rows
    node_gradients[left, :H], node_gradients[left, H:] = dh[:, :H], g * trace.gates[chosen, 1]
    node_gradients[right, :H], node_gradients[right, H:] = dh[:, H:], g * trace.gates[chosen, 2]
    with_left = dot(node_gradients[left, None], differences[:, :2])
    with_right = dot(node_gradients[right, None], differences[:, 1:])
    inner_products[pair_before, 1], inner_products[chosen, 0] = with_left[:, 0], with_left[:, 1]
    inner_products[chosen, 1], inner_products[pair_after, 0] = with_right[:, 0], with_right[:, 1]


def send_score_gradients(merge: Merge, dv, derivatives: PairDerivatives, arrived: Arrived) -> None:
    """Each candidate's dv sends dv A and dv B to its nodes. Only numbers change, α and P, and no vector ("The inner
    products are numbers that are kept up to date")."""
    xp, candidates, inner_products = array_module(dv), merge.candidates, arrived.inner_products
    arrived.total_dv[candidates] += dv
    dv = dv[:, :, None]
    changed = inner_products[candidates] + dv[:, :, None] * derivatives.own_products[candidates]
    left, right = candidates[:, :-1], candidates[:, 1:]
    # the products of two neighbours are stored with the one that came later, which has the larger number
    row = xp.where(right > left, right, left + len(inner_products))
    across = derivatives.cross_products[row]
    changed[:, 1:, 0] += dv[:, :-1] * across[:, :, 0]
    changed[:, :-1, 1] += dv[:, 1:] * across[:, :, 1]
    inner_products[candidates] = changed


# ---- backward, at the end


def gradients_of_leaves(derivatives: PairDerivatives, arrived: Arrived):
    """dh and dc (B, T, H): G of the leaves, complete with α A and α B of the pairs of leaves."""
    steps, B, width = arrived.new_node_gradients.shape
    leaf_pairs, h_and_c = B * steps, (2, width // 2)
    node_gradients = arrived.node_gradients[: B * (steps + 1)].reshape(B, steps + 1, *h_and_c)
    sent = arrived.total_dv[:leaf_pairs, None, None] * derivatives.score_gradients[:leaf_pairs]
    sent = sent.reshape(B, steps, 2, *h_and_c)
    node_gradients[:, :-1] += sent[:, :, 0]
    node_gradients[:, 1:] += sent[:, :, 1]
    return node_gradients[:, :, 0], node_gradients[:, :, 1]


def gradients_of_weights(trace: Trace, query, derivatives: PairDerivatives, arrived: Arrived):
    """dW, db and dq, each in one product over all pairs (end of "A pair that is not chosen is differentiated once").

    The cotangent of a pair is α q/√d on h, and G_new besides if it was chosen.
    """
    xp, H, count = array_module(query), len(query), trace.pair_count
    total_dv, slopes = arrived.total_dv, derivatives.slopes
    cotangents = xp.zeros((len(slopes), 2, H), dtype=slopes.dtype)
    cotangents[:, 0] = total_dv[:, None] * query
    chosen = xp.concatenate([merge.neighbourhood[:, 2] for merge in trace.merges])
    cotangents[chosen] += arrived.new_node_gradients.reshape(-1, 2, H)
    children = xp.empty((count, 2, H), dtype=slopes.dtype)
    for rows in blocks(count, xp):
        g_h, g_c = cotangents[rows, 0], cotangents[rows, 1]
        slopes[rows], _ = cell_vjp(slopes[rows], derivatives.dh_dc[rows], g_h, g_c)
        children[rows, 0] = trace.node_states[trace.left_node[rows], 0]
        children[rows, 1] = trace.node_states[trace.right_node[rows], 0]
    da = slopes[:count].reshape(count, 5 * H)  # written over the slopes, which are not needed again
    dw = lambda out=None: xp.matmul(children.reshape(count, 2 * H).T, da, out=out)
    return dw, da.sum(axis=0), (total_dv @ trace.pair_states[:, 0]) / math.sqrt(H)


# ---- the op, and greedy evaluation


@op(enumerated="test_the_linear_time_gradient_is_that_of_the_tape")
def compose(h, c, w, b, q, *, lengths, sampler, rng, scored: bool = False):
    """`compose_plain`'s (h of the root (B, H), log-probability (B,)), for a sampler whose choices are one-hot
    (ValueError for a soft one)."""
    xp, log_p, draws = array_module(h), 0.0, []

    if getattr(sampler, "support", "hard") != "hard":
        raise ValueError("compose needs choices that are one-hot: for soft ones call compose_plain.")
    rng = choice_noise(rng, h.shape[1], h)

    def choose(k, v, mask):
        nonlocal log_p
        v, d_log_p = Tensor(v, requires_grad=True), None
        s = sampler.sample(v, rng.site(k), mask)
        if scored:  # log p(s) and its gradient, s − p
            all_log_p, _ = log_softmax.rule(mask_logits.rule(v.data, mask)[0])
            log_p, d_log_p = log_p + (all_log_p * s.data).sum(axis=-1), s.data - xp.exp(all_log_p)
        draws.append((v, s, d_log_p, mask))
        return s.data.argmax(axis=-1)

    trace = forward(h, c, w, b, q, lengths, choose)

    def rule(g_root, g_log_p):
        def choice_vjp(k, ds):
            v, s, d_log_p, mask = draws[k]
            dv = grad(s, [v], ds, keep=True)[0] if s.requires_grad else 0.0
            if scored:
                dv = dv + g_log_p[:, None] * d_log_p
            return dv * mask.astype(ds.dtype)

        return backward(trace, w, q, g_root, choice_vjp)

    return (trace.node_states[trace.root, 0], xp.zeros(len(h), dtype=h.dtype) + log_p), rule


def compose_greedy(h, c, w, b, q, *, lengths):
    """Always the pair with the largest v. Arrays -> (h of the root (B, H), choices (B, T−1): 0 once a row is done)"""
    xp, T, positions = array_module(h), h.shape[1], []

    def choose(k, v, mask):
        positions.append(xp.where(mask, v, -xp.inf).argmax(axis=-1))
        return positions[-1]

    trace = forward(h, c, w, b, q, lengths, choose)
    choices = xp.zeros((len(h), T - 1), dtype=np.int64)  # the last merge is no choice
    for k, position in enumerate(positions):
        choices[:, k] = position
    return trace.node_states[trace.root, 0], choices
