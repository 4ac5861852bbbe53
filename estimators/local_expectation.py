"""Local expectation gradients: each variable is enumerated, the others stay at one sample."""

from __future__ import annotations

from minigrad import Tensor, no_grad
from minigrad.backend import array_module
from minigrad.fused import softmax_array, softmax_vjp

from .base import Estimator, attach_gradient


def local_expectation_gradient(p, local_costs):
    """Local expectation gradients (Titsias & Lázaro-Gredilla 2015).   D ~ Cat(p), drawn by the caller.

    Estimates    ∇θ E f(D) for L variables
    Derivation   given all the others, the gradient for variable l is that of a single one, which is exact:
                 ∇θₗ E[f(D) | D₋ₗ] = J(pₗ) Fₗ,      Fₗₖ = f(D with variable l set to eₖ)
    Exact when   always; for one variable without variance.
    Costs        L·K evaluations of f (K of them are the sample itself, L times).

    The measure-valued (weak) derivative, pⱼ(1 − pⱼ)(f(eⱼ) − E[f(e_c) | c ≠ j]), gives the same numbers when its
    conditional expectation is enumerated.

    p (B, L, K), local_costs F (B, L, K)   ->   dθ (B, L, K)
    """
    return softmax_vjp(p, local_costs)


class LocalExpectation(Estimator):
    title = "Local expectation gradients"
    paper = "Titsias & Lázaro-Gredilla 2015"
    exact_for = "all"
    evaluations = "L·K + 1"
    cost_gradient = False

    def estimate(self, logits, cost, rng):
        xp, B, K = array_module(logits.data), logits.shape[0], logits.shape[-1]
        onehot = rng.one_hot(logits.data)
        f = cost(Tensor(onehot))
        flat = onehot.reshape(B, -1, K)
        local_costs = xp.empty_like(flat)
        with no_grad():
            for l in range(flat.shape[1]):
                for k in range(K):
                    moved = flat.copy()
                    moved[:, l] = 0.0
                    moved[:, l, k] = 1.0
                    local_costs[:, l, k] = cost(Tensor(moved.reshape(logits.shape))).data
        g = local_expectation_gradient(softmax_array(logits.data).reshape(flat.shape), local_costs)
        return attach_gradient(f, logits, g.reshape(logits.shape))
