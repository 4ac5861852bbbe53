"""Stick-breaking coupled DisARM: a categorical variable as a chain of bits, with antithetic pairs of chains."""

from __future__ import annotations

from minigrad import Tensor
from minigrad.backend import Array, array_module
from minigrad.ops import stable_sigmoid

from . import categorical
from .base import Cost, Estimator, attach_gradient
from .enumeration import Noise


def sticks(theta: Array) -> tuple[Array, Array, Array]:
    """The chain's logits: ψ_c = θ_c − log Σ_{i>c} e^θᵢ, so that  P(class = c | class ≥ c) = σ(ψ_c).

    theta (..., K) in ascending order, so that the sum always has the largest term   ->   ψ (..., K−1), and for
    `sticks_vjp` e^θ (..., K) and Σ_{i>c} e^θᵢ (..., K−1), both relative to the largest e^θ
    """
    xp = array_module(theta)
    e = xp.exp(theta - theta[..., -1:])
    rest = xp.cumsum(e[..., :0:-1], axis=-1)[..., ::-1]
    return theta[..., :-1] - theta[..., -1:] - xp.log(rest), e, rest


def first_one(bits: Array) -> Array:
    """One-hot of the first bit that is 1; of the last class if there is none.   (..., K−1) -> (..., K)"""
    xp = array_module(bits)
    one = xp.ones((*bits.shape[:-1], 1), dtype=bits.dtype)
    before = xp.concatenate([one, xp.cumprod(1.0 - bits, axis=-1)], axis=-1)
    return before * xp.concatenate([bits, one], axis=-1)


def stick_breaking_gradient(psi: Array, b: Array, mirror: Array, costs: Array, mirror_costs: Array) -> Array:
    """Stick-breaking coupled DisARM (Dong, Mnih & Tucker 2021, section 4.1).   b = [u < σ(ψ)], b̃ = [1 − u < σ(ψ)].

    Estimates    ∇_ψ E f(z),   z the first c with b_c = 1
    Derivation   While both chains are alive (c ≤ min(z, z̃)), bit c is an antithetic pair like any other: DisARM,
                 ½ (f − f̃)(b − b̃) σ(|ψ|).   Afterwards only one of them is. Its bits are independent of the chain that
                 has ended, whose cost is therefore a baseline: half of REINFORCE, ½ (f − f̃)(b − σ(ψ)) for the first
                 one, ½ (f̃ − f)(b̃ − σ(ψ)) for its mirror image; and nothing when both have ended.
    Exact when   always.
    Costs        two evaluations of f.

    psi, b, mirror (B, L, K−1), costs, mirror_costs (B,)   ->   dψ (B, L, K−1)
    """
    xp = array_module(psi)
    alive, alive_mirror = (
        xp.concatenate([xp.ones_like(x[..., :1]), xp.cumprod(1.0 - x, axis=-1)[..., :-1]], axis=-1) for x in (b, mirror)
    )
    both = alive * alive_mirror
    p = stable_sigmoid(psi)
    paired = both * (b - mirror) * stable_sigmoid(abs(psi))
    alone = (alive - both) * (b - p) - (alive_mirror - both) * (mirror - p)
    return (0.5 * (costs - mirror_costs))[:, None, None] * (paired + alone)


def sticks_vjp(e: Array, rest: Array, dpsi: Array) -> Array:
    """From the chain back to the classes: ∂ψ_c/∂θ_c = 1, ∂ψ_c/∂θᵢ = −e^θᵢ/Σ_{i'>c} e^θᵢ' for i > c.

    dθ_c = dψ_c − e^θ_c Σ_{k<c} dψ_k / Σ_{i>k} e^θᵢ
    """
    xp = array_module(e)
    zero = xp.zeros_like(e[..., :1])
    earlier = xp.concatenate([zero, xp.cumsum(dpsi / rest, axis=-1)], axis=-1)
    return xp.concatenate([dpsi, zero], axis=-1) - e * earlier


def inverse(order: Array) -> Array:
    """The permutations that undo those along the last axis:  inverse[order[k]] = k.   (..., K) integers -> (..., K)"""
    xp, K = array_module(order), order.shape[-1]
    found = xp.empty_like(order)
    starts = xp.arange(0, order.size, K).reshape(*order.shape[:-1], 1)  # of the rows, in the flat array
    found.reshape(-1)[(starts + order).reshape(-1)] = xp.broadcast_to(xp.arange(K), order.shape).reshape(-1)
    return found


class StickBreakingDisARM(Estimator):
    """The chain runs from the least to the most probable class of each variable, as the authors advise."""

    title = "Stick-breaking coupled DisARM"
    paper = "Dong, Mnih & Tucker 2021"
    exact_for = "all"
    evaluations = "2"
    cost_gradient = False
    randomness = "uniform"
    sample_count = 2
    sample_first = False
    families = (categorical,)

    def thresholds(self, logits: Array) -> Array:
        xp = array_module(logits)
        psi, _, _ = sticks(xp.sort(logits, axis=-1))
        return stable_sigmoid(xp.stack([psi, -psi], axis=-1))

    def estimate(self, logits: Tensor, cost: Cost, rng: Noise) -> Tensor:
        xp = array_module(logits.data)
        L, K = categorical.sizes(logits.shape)
        theta = logits.data.reshape(-1, L, K)
        order = xp.argsort(theta, axis=-1, kind="stable")
        psi, e, rest = sticks(xp.take_along_axis(theta, order, axis=-1))
        u = rng.uniform(psi.shape, like=theta)
        p, back = stable_sigmoid(psi), inverse(order)
        bits = (u < p).astype(theta.dtype), (u > stable_sigmoid(-psi)).astype(theta.dtype)
        ds = [xp.take_along_axis(first_one(b), back, axis=-1).reshape(logits.shape) for b in bits]
        f, f_mirror = cost(Tensor(ds[0])), cost(Tensor(ds[1]))
        dpsi = stick_breaking_gradient(psi, *bits, f.data, f_mirror.data)
        g = xp.take_along_axis(sticks_vjp(e, rest, dpsi), back, axis=-1)
        return attach_gradient(0.5 * (f + f_mirror), logits, g.reshape(logits.shape))
