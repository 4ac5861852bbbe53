"""Composite ops whose joint derivative is shorter than the chain of its parts.

Each docstring derives the rule; `tests/test_ops.py` holds the rule against finite differences and against the same
function composed of elementary ops. The field's one formula, J(p) g = p ⊙ (g − ⟨p, g⟩), lives here as `softmax_vjp`.
"""

from __future__ import annotations

import math

from . import kernels
from .backend import Array, array_module, check_index, check_unit_interval, on_host
from .ops import check_mask, gather, stable_sigmoid
from .random import unchecked_one_hot
from .tensor import op, unbroadcast

# Stands for −∞ where a class is masked: e^(MASKED/τ − m) is exactly 0 in float32 and float64 for every τ from 1e-3 to
# 1e3, and unlike −∞ it survives 0·x and x − x. Real logits must be larger, by far.
MASKED = -1e30

TINY = 1.2e-38  # the smallest normal float32: log of it is finite, and p log p below it is no more than 1e-36


def softmax_array(x: Array) -> Array:
    """softmax over the last axis, on arrays: pᵢ = e^(xᵢ−m) / Σ e^(xⱼ−m), m = max x."""
    xp, K = array_module(x), x.shape[-1]
    if K > 32:
        p = xp.exp(x - x.max(axis=-1, keepdims=True))
        p /= kernels.total(p)[..., None]
        return p
    # NumPy reduces a short last axis row by row, five times slower than the same work with the classes in front
    p = x.reshape(-1, K).T.copy()
    p -= p.max(axis=0)
    xp.exp(p, out=p)
    p /= p.sum(axis=0)
    return xp.ascontiguousarray(p.T).reshape(x.shape)


def inner(a: Array, b: Array) -> Array:
    """⟨a, b⟩ over the last axis, which stays with length 1:  (..., K), (..., K) -> (..., 1)."""
    return kernels.inner(a, b)[..., None]


def softmax_vjp(p: Array, g: Array) -> Array:
    """J(p) g = p ⊙ (g − ⟨p, g⟩) with J(p) = diag p − p pᵀ, the (symmetric) Jacobian of softmax at its value p.

    p, g (..., K) -> (..., K). The components sum to 0, and vanish where p does.
    """
    return p * (g - inner(p, g))


@op
def softmax(x):
    """p = softmax(x) over the last axis.        ∂pᵢ/∂xⱼ = pᵢ(δᵢⱼ − pⱼ), so dx = J(p) g"""
    p = softmax_array(x)
    return p, lambda g: softmax_vjp(p, g)


@op
def log_softmax(x):
    """y = x − log Σ eˣ over the last axis.      ∂yᵢ/∂xⱼ = δᵢⱼ − pⱼ, so dx = g − p Σᵢ gᵢ"""
    xp = array_module(x)
    y = x - x.max(axis=-1, keepdims=True)
    y -= xp.log(xp.exp(y).sum(axis=-1, keepdims=True))
    return y, lambda g: g - xp.exp(y) * g.sum(axis=-1, keepdims=True)


@op
def mask_logits(logits, mask):
    """The logits with every class outside the boolean mask at probability exactly 0 and gradient exactly 0.

    mask: booleans that broadcast with the logits (TypeError for others)
    """
    xp = array_module(logits)
    check_mask(mask)
    return xp.where(mask, logits, MASKED), lambda g: (unbroadcast(g * mask, logits.shape), None)


@op
def kl_to_uniform(logits):
    """KL(Cat(p) ‖ uniform) = log K + Σ pₖ log pₖ,  p = softmax(θ).     logits θ (..., K) -> (...), nats

    With log p = θ − log Σ eᶿ:   KL = log K + ⟨p, θ⟩ − log Σ eᶿ,  and the product rule leaves
        dθ = J(p) θ + p − p = J(p) log p        (J(p) ignores the constant log Σ eᶿ).
    """
    xp = array_module(logits)
    p = softmax_array(logits)
    log_p = xp.log(xp.maximum(p, TINY))
    kl = math.log(p.shape[-1]) + kernels.inner(p, log_p)
    return kl, lambda g: g[..., None] * softmax_vjp(p, log_p)


@op
def kl_to_fair_coin(logits):
    """KL(Bernoulli(p) ‖ Bernoulli(½)) = log 2 + p log p + (1 − p) log(1 − p),  p = σ(a).     a (...) -> (...), nats

    forward:   log p = −softplus(−a), log(1 − p) = −softplus(a), so that no logarithm of 0 appears
               with q = σ(−|a|), the smaller of p and 1 − p:      KL = log 2 − q|a| − log(1 + e^−|a|)
    backward:  ∂/∂p is log p − log(1 − p) = a, and ∂p/∂a = p(1 − p) = q(1 − q):      da = g q(1 − q) a

    An infinite logit is the bit that it stands for: KL = log 2, and the gradient is 0.
    """
    xp = array_module(logits)
    size = abs(logits)
    q = stable_sigmoid(-size)
    size = xp.where(q > 0, size, 0.0)  # q|a| is 0 where q is, also for an infinite a

    def backward(g):
        return g * (q * (1.0 - q) * xp.copysign(size, logits))

    return math.log(2.0) - q * size - xp.log1p(xp.exp(-abs(logits))), backward


@op
def kl_to_standard_normal(mean, log_variance):
    """KL(N(μ, diag σ²) ‖ N(0, I)) = ½ Σᵢ (μᵢ² + σᵢ² − 1 − log σᵢ²) over the last axis, in nats.

    μ, v = log σ² (..., M) -> (...);  they broadcast

    The expectation of log N(z; μ, σ²) − log N(z; 0, 1) under z ~ N(μ, σ²) is, for one component, with E (z − μ)² = σ²
    and E z² = μ² + σ²:     −½ log σ² − ½ + ½ (μ² + σ²).
    dμ = g μ       dv = ½ g (σ² − 1)
    """
    variance = array_module(log_variance).exp(1.0 * log_variance)  # of floats: e^x of small integers has few digits …
    terms = 0.5 * (mean**2.0 + variance - 1.0 - log_variance)  # … and their squares overflow
    if not terms.ndim:
        raise ValueError("kl_to_standard_normal needs an axis to sum over: reshape the mean to (1,).")

    def backward(g):
        g = g[..., None]
        # each term of the sum has this shape, of which a mean or a variance may have been repeated
        g = array_module(g).broadcast_to(g, terms.shape)
        dmean = lambda: unbroadcast(g * mean, mean.shape)
        return dmean, lambda: unbroadcast(0.5 * g * (variance - 1.0), variance.shape)

    return terms.sum(axis=-1), backward


@op
def cross_entropy(logits, labels):
    """ℓ = −log softmax(x)[label].     logits x (..., K), labels (...) of integers in [0, K) -> ℓ (...), nats

    ∂ℓ/∂xⱼ = pⱼ − [j = label]

    ValueError unless there is one label for each row of logits; TypeError for labels that are no integers; IndexError,
    on the host, for one that is out of range.
    """
    xp = array_module(logits)
    if not logits.ndim or labels.shape != logits.shape[:-1]:
        raise ValueError(
            f"there must be one label for each row of logits: they have the shapes {labels.shape} and {logits.shape}."
        )
    check_index(labels, logits.shape[-1])
    z = logits - logits.max(axis=-1, keepdims=True)
    e = xp.exp(z)
    total = e.sum(axis=-1, keepdims=True)
    chosen, _ = gather.rule(z, labels[..., None])  # not ⟨z, onehot⟩: a class may have the logit −∞

    def backward(g):
        return g[..., None] * (e / total - unchecked_one_hot(labels, logits.shape[-1], logits)), None

    return (xp.log(total) - chosen)[..., 0], backward


@op
def bce_with_logits(logits, x):
    """−log Πᵢ Bernoulli(xᵢ | σ(yᵢ)) = Σᵢ log(1 + e^yᵢ) − xᵢyᵢ over the last axis, in nats.

    logits y (..., D); x (..., D) in [0, 1], binary or gray, broadcast to the shape of y -> (...)

    With t = tanh ½y,  σ(y) = ½ + ½t  and  log(1 + e^y) = max(y, 0) − log σ(|y|) = ½|y| + ½y − log(½ + ½|t|),  so the
    terms are  ½|y| − log(½ + ½|t|) + (½ − x) y,  which never overflow; their small absolute error is all that counts.
    dy = g (σ(y) − x)       dx = −g y

    An infinite logit is the pixel that it stands for: it costs 0 where x is that, else ∞ (on the host).
    ValueError, on the host, for an x outside [0, 1]: no distribution has this density.
    """
    y, xp = logits, array_module(logits)
    check_unit_interval(x)
    if not y.ndim:
        raise ValueError("bce_with_logits needs an axis to sum over: reshape the logits to (1,).")
    nats = 0.5 * y
    t = xp.tanh(nats)
    xp.abs(nats, out=nats)
    log_sigmoid = xp.abs(t)
    log_sigmoid *= 0.5
    log_sigmoid += 0.5
    nats -= xp.log(log_sigmoid, out=log_sigmoid)
    nats += (0.5 - x) * y
    total = nats.sum(axis=-1)
    if on_host(total) and (total != total).any():  # ∞ − ∞, or there was a NaN
        infinite = (abs(y) == math.inf) & (x == x)
        nats[infinite] = math.inf
        nats[infinite & (x == (y > 0))] = 0.0
        total = nats.sum(axis=-1)

    def backward(g):
        g = g[..., None]

        def dy():
            s = 0.5 * t
            s += 0.5
            s -= x
            s *= g
            return s

        return dy, lambda: unbroadcast(-g * y, x.shape)

    return total, backward


@op
def linear(x, w, b):
    """y = x W + b          x (..., I)   w (I, O)   b (O,)   ->   y (..., O)

    With g = dL/dy as rows (N, O):     dx = g Wᵀ      dW = xᵀ g      db = Σₙ gₙ
    """
    return _linear_forward(x, w, b), lambda g: _linear_backward(x, w, g)


@op
def linear_relu(x, w, b):
    """y = max(x W + b, 0)  x (..., I)   w (I, O)   b (O,)   ->   y (..., O)

    As `linear`, after g has passed the ReLU: units that are off (y = 0) pass nothing back.
    """
    y = _linear_forward(x, w, b)
    array_module(y).maximum(y, 0.0, out=y)
    return y, lambda g: _linear_backward(x, w, g * (y > 0))


def _linear_forward(x, w, b):
    if w.ndim != 2 or x.shape[-1:] != w.shape[:1] or b.shape != w.shape[1:]:
        raise ValueError(f"x (..., I), w (I, O) and b (O,) must fit: they are {x.shape}, {w.shape} and {b.shape}.")
    y = x.reshape(-1, w.shape[0]) @ w
    y += b
    return y.reshape(*x.shape[:-1], w.shape[1])


def _linear_backward(x, w, g):
    xp = array_module(w)
    rows = x.reshape(-1, w.shape[0])
    g = g.reshape(rows.shape[0], w.shape[1])
    dx = lambda: (g @ w.T).reshape(x.shape)  # each a matrix product: computed only if that input asks for it
    dw = lambda out=None: xp.matmul(rows.T, g, out=out)
    db = lambda out=None: g.sum(axis=0, out=out)
    return dx, dw, db


@op
def embedding(table, ids):
    """y = the rows of `table` at the integers `ids`.     table (V, D), ids (...) -> y (..., D)

    Row v of the table is used wherever ids = v, so its gradient is the sum of those g: dtable = onehot(ids)ᵀ g. For
    a small vocabulary that product is both faster than scattered additions and, on a GPU, always the same to the bit.
    ValueError unless the table has two axes; TypeError for ids that are no integers; IndexError, on the host, for one
    that is out of range.
    """
    if table.ndim != 2:
        raise ValueError(f"the table must have two axes, (V, D): it has the shape {table.shape}.")
    V, D = table.shape
    check_index(ids, V)

    def backward(g):
        g, xp = g.reshape(ids.size, D), array_module(table)
        if V <= 1024:
            return unchecked_one_hot(ids.reshape(-1), V, table).T @ g, None
        dtable = xp.zeros_like(table)
        xp.add.at(dtable, ids.reshape(-1), g)
        return dtable, None

    return table[ids], backward


# ---- LSTM cells: one for n children, of which a sequence has one and a binary tree two


def cell_forward(a: Array, cells: tuple[Array, ...]) -> tuple[Array, Array, Array, Array]:
    """The LSTM equations for n children (Tai, Socher & Manning 2015, eqs. 9 to 14), on arrays.

    a (..., (3+n) H): the pre-activations of i, f₁ … fₙ, u, o side by side.     cells: the n children's c, (..., H) each

        i, f, o = σ(·)      u = tanh(·)      c = i⊙u + Σ f⊙cell      h = o⊙tanh c

    Returns gates (..., 3+n, H), h, c and t = tanh c.  σ(x) = ½ + ½ tanh ½x, so that one tanh serves all gates.
    ValueError unless the shapes are these.
    """
    for cell in cells:
        if not cell.ndim or a.shape != (*cell.shape[:-1], (3 + len(cells)) * cell.shape[-1]):
            raise ValueError(
                f"pre-activations (..., {3 + len(cells)}H) and cells (..., H) must fit: {a.shape}, {cell.shape}."
            )
    xp, H = array_module(a), cells[0].shape[-1]
    gates = 0.5 * a.reshape(*a.shape[:-1], 3 + len(cells), H)
    gates[..., -2, :] *= 2.0
    xp.tanh(gates, out=gates)
    for sigmoids in (gates[..., :-2, :], gates[..., -1:, :]):
        sigmoids *= 0.5
        sigmoids += 0.5
    c = gates[..., 0, :] * gates[..., -2, :]
    for n, cell in enumerate(cells, start=1):
        c += gates[..., n, :] * cell
    t = xp.tanh(c)
    return gates, gates[..., -1, :] * t, c, t


def cell_slopes(gates: Array, t: Array, cells: tuple[Array, ...]) -> tuple[Array, Array]:
    """What the backward pass multiplies by: one step of a cell is diagonal in H once a is known.

    slopes  ∂c/∂aᵢ = u⊙i(1−i)    ∂c/∂a_f = cell⊙f(1−f)    ∂c/∂a_u = i⊙(1−u²)    ∂h/∂a_o = t⊙o(1−o)
    dh_dc   ∂h/∂c = o⊙(1−t²)
    """
    u, o = gates[..., -2, :], gates[..., -1, :]
    slopes = gates * (1.0 - gates)
    slopes[..., 0, :] *= u
    for n, cell in enumerate(cells, start=1):
        slopes[..., n, :] *= cell
    slopes[..., -2, :] = gates[..., 0, :] * (1.0 - u * u)
    slopes[..., -1, :] *= t
    return slopes, o * (1.0 - t * t)


def cell_vjp(slopes: Array, dh_dc: Array, g_h: Array, g_c: Array | float) -> tuple[Array, Array]:
    """(da (..., 3+n, H), ḡ (..., H)), where ḡ = g_c + g_h ∂h/∂c is all that arrives at c. A child's dc is ḡ⊙f."""
    g = g_h * dh_dc
    g += g_c
    da = array_module(slopes).empty_like(slopes)
    da[..., :-1, :] = slopes[..., :-1, :] * g[..., None, :]
    da[..., -1, :] = slopes[..., -1, :] * g_h
    return da, g


@op
def lstm_cell(a, c):
    """One LSTM step (Hochreiter & Schmidhuber 1997, with forget gates).

    a (..., 4H): the pre-activations of i, f, u, o side by side.   c (..., H): the old cell.   -> h', c' (..., H) each

    forward:   i, f, o = σ(aᵢ), σ(a_f), σ(a_o)      u = tanh(a_u)
               c' = f⊙c + i⊙u                       h' = o⊙tanh c'
    backward:  with t = tanh c' and ḡ = g_c + g_h⊙o⊙(1 − t²), all that arrives at c':
               daᵢ = ḡ⊙u⊙i(1−i)   da_f = ḡ⊙c⊙f(1−f)   da_u = ḡ⊙i⊙(1−u²)   da_o = g_h⊙t⊙o(1−o)      dc = ḡ⊙f
    """
    gates, h_new, c_new, t = cell_forward(a, (c,))

    def backward(g_h, g_c):
        da, g = cell_vjp(*cell_slopes(gates, t, (c,)), g_h, g_c)
        return da.reshape(a.shape), g * gates[..., 1, :]

    return (h_new, c_new), backward


@op
def tree_lstm_cell(a, c_l, c_r):
    """One composition of a binary tree LSTM (Tai, Socher & Manning 2015; as Choi, Yoo & Lee 2018 order the gates).

    a (..., 5H): the pre-activations of i, f_l, f_r, u, o.   c_l, c_r (..., H): the children's.  -> h, c (..., H) each

    forward:   c = f_l⊙c_l + f_r⊙c_r + i⊙u          h = o⊙tanh c
    backward:  with t = tanh c and ḡ = g_c + g_h⊙o⊙(1 − t²):
               daᵢ = ḡ⊙u⊙i(1−i)   da_fl = ḡ⊙c_l⊙f_l(1−f_l)   da_fr = ḡ⊙c_r⊙f_r(1−f_r)   da_u = ḡ⊙i⊙(1−u²)
               da_o = g_h⊙t⊙o(1−o)      dc_l = ḡ⊙f_l      dc_r = ḡ⊙f_r
    """
    gates, h, c, t = cell_forward(a, (c_l, c_r))

    def backward(g_h, g_c):
        da, g = cell_vjp(*cell_slopes(gates, t, (c_l, c_r)), g_h, g_c)
        return da.reshape(a.shape), g * gates[..., 1, :], g * gates[..., 2, :]

    return (h, c), backward


@op
def lstm(x, w_x, w_h, b):
    """A whole LSTM, from zero states.   x (T, B, I)   w_x (I, 4H)   w_h (H, 4H)   b (4H,)   ->   h, c (T, B, H) each

    forward:   aₜ = xₜ W_x + hₜ₋₁ W_h + b,   then `lstm_cell`
    backward:  newest first, daₜ from `lstm_cell` with what arrives from outside and from the next step,
               g_h,t ← g_h,t + daₜ₊₁ W_hᵀ      g_c,t ← g_c,t + ḡₜ₊₁⊙fₜ₊₁
               and then, each one product for the whole sequence,
               dx = da W_xᵀ      dW_x = Σₜ xₜᵀ daₜ      dW_h = Σₜ hₜ₋₁ᵀ daₜ      db = Σₜ daₜ

    ValueError unless the shapes are these.
    """
    if x.ndim != 3 or w_h.ndim != 2:
        raise ValueError(f"x (T, B, I) and w_h (H, 4H) must have these axes: they are {x.shape} and {w_h.shape}.")
    xp, (T, B, inputs), H = array_module(x), x.shape, w_h.shape[0]
    if w_x.shape != (inputs, 4 * H) or w_h.shape != (H, 4 * H) or b.shape != (4 * H,):
        raise ValueError(
            "w_x (I, 4H), w_h (H, 4H) and b (4H,) must fit x (T, B, I): "
            f"they are {w_x.shape}, {w_h.shape}, {b.shape} and {x.shape}."
        )
    a = (x.reshape(T * B, inputs) @ w_x).reshape(T, B, 4 * H)
    a += b
    zeros = lambda *shape: xp.zeros((*shape, B, H), dtype=x.dtype)
    h, c = zeros(T + 1), zeros(T + 1)  # the first entries are the states before the sequence
    gates, t = xp.empty((T, B, 4, H), dtype=x.dtype), xp.empty((T, B, H), dtype=x.dtype)
    for n in range(T):
        gates[n], h[n + 1], c[n + 1], t[n] = cell_forward(a[n] + h[n] @ w_h, (c[n],))

    def backward(g_h, g_c):
        slopes, dh_dc = cell_slopes(gates, t, (c[:-1],))
        da, dh, dc = xp.empty_like(gates), zeros(), zeros()
        for n in reversed(range(T)):
            da[n], g = cell_vjp(slopes[n], dh_dc[n], g_h[n] + dh, g_c[n] + dc)
            dh, dc = (w_h @ da[n].reshape(B, 4 * H).T).T, g * gates[n, :, 1]
        da = da.reshape(T * B, 4 * H)
        dx = lambda: (da @ w_x.T).reshape(x.shape)
        dw_x = lambda out=None: xp.matmul(x.reshape(T * B, inputs).T, da, out=out)
        dw_h = lambda out=None: xp.matmul(h[:-1].reshape(T * B, H).T, da, out=out)
        db = lambda out=None: da.sum(axis=0, out=out)
        return dx, dw_x, dw_h, db

    return (h[1:], c[1:]), backward
