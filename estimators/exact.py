"""Exact enumeration: the oracle that every other estimator is measured against."""

from __future__ import annotations

import itertools
import math

from minigrad import Tensor
from minigrad.backend import array_module, asarray_like
from minigrad.fused import softmax_array
from minigrad.ops import stack

import numpy as np

from .base import Estimator, attach_gradient, weigh

LIMIT = 16384  # joint outcomes


def enumerate_codes(variables: int, categories: int) -> np.ndarray:
    """Every joint outcome as one-hots, (Kᴸ, L, K) float64, the last variable running fastest."""
    index = np.array(list(itertools.product(range(categories), repeat=variables))).reshape(-1, variables)
    return np.eye(categories)[index]


def exact_gradient(p, codes, costs):
    """The gradient of E f(D) by enumeration of all N joint outcomes z.

        E f = Σ_z q(z) f(z),   q(z) = Πₗ ⟨pₗ, zₗ⟩        ∇θₗ log q(z) = zₗ − pₗ
        ∇θₗ E f = Σ_z q(z) f(z) (zₗ − pₗ)

    p (B, L, K), codes (N, L, K) one-hot, costs (B, N)   ->   dθ (B, L, K), q (B, N)

    Exact for every cost; no variance. For one variable it is J(p) F with Fₖ = f(eₖ).
    """
    xp = array_module(p)
    q = xp.ones_like(costs)
    for l in range(p.shape[1]):
        q = q * (p[:, l] @ codes[:, l].T)
    weight = q * costs
    N, L, K = codes.shape
    dtheta = (weight @ codes.reshape(N, L * K)).reshape(p.shape) - weigh(weight.sum(axis=-1), p)
    return dtheta, q


class Exact(Estimator):
    """Evaluate the cost on all Kᴸ joint outcomes. ValueError when there are more than 16,384."""

    title = "Exact enumeration"
    paper = "the definition of the expectation"
    exact_for = "all"
    evaluations = "Kᴸ"
    cost_gradient = False

    def check_size(self, variables, categories):
        if variables * math.log(max(categories, 1)) > math.log(LIMIT) + 1e-9:
            raise ValueError(
                f"exact enumeration of {categories}**{variables} outcomes: at most {LIMIT} are allowed, "
                "use fewer variables."
            )

    def estimate(self, logits, cost, rng):
        B, K = logits.shape[0], logits.shape[-1]
        L = logits.size // max(B * K, 1)
        self.check_size(L, K)
        p = softmax_array(logits.data).reshape(B, L, K)
        codes = asarray_like(enumerate_codes(L, K).astype(logits.dtype), p)
        xp = array_module(p)
        outcomes = [xp.broadcast_to(z.reshape(logits.shape[1:]), logits.shape) for z in codes]
        costs = [cost(Tensor(d)) for d in outcomes]
        dtheta, q = exact_gradient(p, codes, xp.stack([f.data for f in costs], axis=1))
        value = (stack(*costs, axis=1) * q).sum(axis=1)
        return attach_gradient(value, logits, dtheta.reshape(logits.shape))
