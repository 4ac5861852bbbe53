"""Oracles: exact enumeration, which every other estimator is measured against, and finite differences of it."""

from __future__ import annotations

import itertools
import math

from minigrad import Tensor
from minigrad.backend import Array, array_module, asarray_like
from minigrad.ops import stack

from . import categorical
from .base import (
    LARGEST,
    SMALLEST,
    Cost,
    Estimator,
    Family,
    SettingError,
    attach_gradient,
    check_number,
    scale_per_example,
)
from .enumeration import Noise

LIMIT = 16384  # joint outcomes


def exact_gradient(p: Array, outcomes: Array, costs: Array, family: Family = categorical) -> tuple[Array, Array]:
    """The gradient of E f(D) by enumeration of all N joint outcomes z.

        E f = Σ_z q(z) f(z),   q(z) = Πₗ q(zₗ)           ∇θ log q(z) = z − p
        ∇θ E f = Σ_z q(z) f(z) (z − p)

    p (B, ...), outcomes (N, ...), costs (B, N)   ->   dθ (B, ...), q (B, N)

    Exact for every cost; no variance. For one variable of K classes it is J(p) F with Fₖ = f(eₖ).
    """
    q = family.outcome_probability(p, outcomes)
    weight = q * costs
    dtheta = (weight @ outcomes.reshape(len(outcomes), -1)).reshape(p.shape) - scale_per_example(weight.sum(axis=-1), p)
    return dtheta, q


def check_outcomes(variables: int, categories: int) -> None:
    """SettingError when there are more joint outcomes than can be enumerated."""
    if variables * math.log(max(categories, 1)) > math.log(LIMIT) + 1e-9:
        raise SettingError(
            f"exact enumeration of {categories}**{variables} outcomes: at most {LIMIT} are allowed, "
            "use fewer variables."
        )


def enumerate_costs(cost: Cost, logits: Tensor, family: Family) -> tuple[Array, list[Tensor]]:
    """(outcomes (N, ...), the costs of all outcomes as Tensors (B,)): each outcome for the whole batch at a time."""
    check_outcomes(*family.sizes(logits.shape))
    xp = array_module(logits.data)
    outcomes = asarray_like(family.outcomes(logits.shape).astype(logits.dtype), logits.data)
    return outcomes, [cost(Tensor(xp.broadcast_to(z, logits.shape))) for z in outcomes]


def finite_difference_gradient(
    logits: Array, outcomes: Array, costs: Array, step: float, family: Family = categorical
) -> Array:
    """Central differences of the exact expectation E(θ) = Σ_z q(z; θ) f(z), one logit at a time.

        dθⱼ = (E(θ + h eⱼ) − E(θ − h eⱼ)) / 2h = ∂E/∂θⱼ + O(h²)

    logits (B, ...), outcomes (N, ...), costs (B, N)   ->   dθ (B, ...).  The cost is not evaluated again: only q moves.
    """
    xp = array_module(logits)
    dtheta = xp.empty_like(logits)
    for at in itertools.product(*map(range, logits.shape[1:])):
        here = (slice(None), *at)
        values = []
        for h in (step, -step):
            moved = logits.copy()
            moved[here] += h
            values.append((family.outcome_probability(family.probability(moved), outcomes) * costs).sum(axis=1))
        dtheta[here] = (values[0] - values[1]) / (2.0 * step)
    return dtheta


class Exact(Estimator):
    """Evaluate the cost on all joint outcomes. ValueError when there are more than 16,384."""

    title = "Exact enumeration"
    paper = "the definition of the expectation"
    exact_for = "all"
    evaluations = "Kᴸ"
    cost_gradient = False
    randomness = "none"
    sample_count = 0
    sample_first = False
    enumerates_classes = True
    evaluates_masked = True

    def check_size(self, variables: int, categories: int) -> None:
        check_outcomes(variables, categories)

    def count_evaluations(self, variables: int, categories: int, call: int = 0) -> int:
        return categories**variables

    def estimate(self, logits: Tensor, cost: Cost, rng: Noise) -> Tensor:
        outcomes, costs = enumerate_costs(cost, logits, self.family)
        F = array_module(logits.data).stack([f.data for f in costs], axis=1)
        dtheta, q = self.gradient(logits.data, outcomes, F)
        return attach_gradient((stack(*costs, axis=1) * q).sum(axis=1), logits, dtheta)

    def gradient(self, logits: Array, outcomes: Array, costs: Array) -> tuple[Array, Array]:
        return exact_gradient(self.family.probability(logits), outcomes, costs, self.family)


class FiniteDifferences(Exact):
    """step: h, from 1e-6 to 1e6. ValueError when there are more than 16,384 joint outcomes."""

    title = "Finite differences of the expectation"
    paper = "the definition of the derivative"
    exact_for = "none"
    sums_to_zero = False  # but for its error

    def __init__(self, step: float = 1e-2) -> None:
        self.step = check_number("step", step, SMALLEST, LARGEST)

    def gradient(self, logits: Array, outcomes: Array, costs: Array) -> tuple[Array, Array]:
        q = self.family.outcome_probability(self.family.probability(logits), outcomes)
        return finite_difference_gradient(logits, outcomes, costs, self.step, self.family), q
