"""ARS and ARSM: ARM for several classes, where swapping two components of the noise takes the place of 1 − u."""

from __future__ import annotations

from collections.abc import Callable

from minigrad import Tensor, no_grad
from minigrad.backend import Array, array_module
from minigrad.kernels import inner

from . import categorical
from .base import Cost, Estimator, attach_gradient
from .enumeration import Noise

SwapCost = Callable[[int, int], Array]  # F_mj, for two components of the noise


def swapped(pi: Array, m: int, j: int) -> Array:
    """π with its components m and j exchanged.   (..., K) -> (..., K)"""
    if m == j:
        return pi
    pi = pi.copy()
    pi[..., m], pi[..., j] = pi[..., j].copy(), pi[..., m].copy()
    return pi


def classes_of(logits: Array, pi: Array) -> Array:
    """z = argminₖ (log πₖ − θₖ), one-hot, which is Cat(softmax(θ)) for π uniform on the simplex."""
    return categorical.harden(logits - array_module(pi).log(pi))


def ars_gradient(pi: Array, swap_costs: Array, reference: int) -> Array:
    """ARS, augment, REINFORCE and swap (Yin, Yue & Zhou 2019, eq. 10).   π ~ Dirichlet(1, …, 1), drawn by the caller.

    Estimates    ∇θ E f(D)
    Derivation   AR: REINFORCE on the K exponentials behind π gives  ∂/∂θₘ E f = E[f(z(π)) (1 − K πₘ)].  Exchanging two
                 components of π leaves its law as it is, so f may be taken at the swapped noise with 1 − K πⱼ for one
                 reference j, and the mean over m of the same quantity, which is that of Σₘ ∂/∂θₘ E f = 0, subtracted:
                 dθₘ = (F_mj − (1/K) Σₙ F_nj)(1 − K πⱼ),      F_mj = f(z(π with m and j exchanged))
    Exact when   always.
    Costs        K evaluations of f.

    With several variables, all of them swap the same two components at once; their noises are independent.

    pi (B, ..., K), swap_costs F_mj for the reference j (B, K)   ->   dθ (B, ..., K)
    """
    K = pi.shape[-1]
    advantage = swap_costs - swap_costs.mean(axis=-1, keepdims=True)
    ones = (1,) * (pi.ndim - 2)
    return advantage.reshape(len(pi), *ones, K) * (1.0 - K * pi[..., reference, None])


def arsm_gradient(pi: Array, swap_costs: Array) -> Array:
    """ARSM, ARS merged over all references (Yin, Yue & Zhou 2019, eq. 14).

        dθₘ = Σⱼ (F_mj − (1/K) Σₙ F_nj)(1/K − πⱼ)

    Exact when   always; without any cost difference between the swaps it is exactly 0.
    Costs        K(K − 1)/2 + 1 evaluations of f, since F is symmetric and its diagonal is f(z).

    pi (B, ..., K), swap_costs F (B, K, K)   ->   dθ (B, ..., K)
    """
    K = pi.shape[-1]
    advantage = swap_costs - swap_costs.mean(axis=1, keepdims=True)
    advantage = advantage.reshape(len(pi), *(1,) * (pi.ndim - 2), K, K)
    return inner(advantage, (1.0 / K - pi)[..., None, :])


class ARS(Estimator):
    """The reference class is drawn anew at every call."""

    title = "ARS, augment, REINFORCE and swap"
    paper = "Yin, Yue & Zhou 2019"
    exact_for = "all"
    evaluations = "K"
    cost_gradient = False
    randomness = "noise"
    sample_first = False
    families = (categorical,)

    def count_evaluations(self, variables: int, categories: int, call: int = 0) -> int:
        return categories

    def estimate(self, logits: Tensor, cost: Cost, rng: Noise) -> Tensor:
        theta, K = logits.data, logits.shape[-1]
        e = rng.exponential(theta.shape, like=theta)
        pi = e / e.sum(axis=-1, keepdims=True)
        f = cost(Tensor(classes_of(theta, pi)))
        with no_grad():
            swap_cost = lambda m, j: f.data if m == j else cost(Tensor(classes_of(theta, swapped(pi, m, j)))).data
            g = self.gradient(pi, swap_cost, int(rng.site("reference").permutation(K)[0]))
        return attach_gradient(f, logits, g)

    def gradient(self, pi: Array, swap_cost: SwapCost, reference: int) -> Array:
        F = array_module(pi).stack([swap_cost(m, reference) for m in range(pi.shape[-1])], axis=1)
        return ars_gradient(pi, F, reference)


class ARSM(ARS):
    title = "ARSM, augment, REINFORCE, swap and merge"
    evaluations = "K(K−1)/2 + 1"

    def count_evaluations(self, variables: int, categories: int, call: int = 0) -> int:
        return categories * (categories - 1) // 2 + 1

    def gradient(self, pi: Array, swap_cost: SwapCost, reference: int) -> Array:
        xp, K = array_module(pi), pi.shape[-1]
        upper = {(m, j): swap_cost(m, j) for m in range(K) for j in range(m, K) if m != j}
        own = swap_cost(0, 0)
        rows = [[own if m == j else upper[min(m, j), max(m, j)] for j in range(K)] for m in range(K)]
        return arsm_gradient(pi, xp.stack([xp.stack(row, axis=1) for row in rows], axis=1))
