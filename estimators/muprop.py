"""MuProp: REINFORCE with a first-order Taylor expansion around the mean as its baseline.

The expansion's expectation is known, so what the baseline takes away is given back exactly.
"""

from __future__ import annotations

from minigrad import Tensor, no_grad
from minigrad.backend import Array

from . import categorical
from .base import Cost, Estimator, Family, attach_gradient, scale_per_example, value_and_grad
from .enumeration import Noise


def muprop_gradient(
    p: Array, d: Array, costs: Array, mean_costs: Array, mean_g: Array, family: Family = categorical
) -> Array:
    """MuProp (Gu, Levine, Sutskever & Mnih 2016, eq. 5).   D ~ Cat(p), p = softmax(θ), drawn by the caller.

    Estimates    ∇θ E f(D)
    Derivation   expand f around the mean field p:  f(D) ≈ h(D) = f(p) + ⟨f'(p), D − p⟩, the inner product running over
                 all variables.  Subtract h as a baseline and add its exact contribution ∇θ E h(D), which is
                 J(pₗ) f'(p)ₗ for variable l, back (p inside h is held fixed):
                 dθ = (f(D) − f(p) − ⟨f'(p), D − p⟩)(D − p) + J(p) f'(p)
    Exact when   always; for a linear f without variance, since f = h.
    Costs        two evaluations of f, at D and at p, and the gradient at p.
    Differs      from the code of Tucker et al. 2017 in having no learned scales on the two terms.

    p, d (B, ..., K), costs = f(D) (B,), mean_costs = f(p) (B,), mean_g = f'(p) (B, ..., K)   ->   dθ (B, ..., K)
    """
    score = d - p
    axes = tuple(range(1, p.ndim))
    residual = costs - mean_costs - (mean_g * score).sum(axis=axes)
    return scale_per_example(residual, score) + family.vjp(p, mean_g)


def simple_muprop_gradient(p: Array, d: Array, costs: Array, mean_costs: Array) -> Array:
    """MuProp without its linear term (Tucker et al. 2017): REINFORCE with the baseline f(p).

        dθ = (f(D) − f(p))(D − p)

    Exact when   always: p does not depend on the sample.
    Costs        two evaluations of f and no gradient.
    """
    return scale_per_example(costs - mean_costs, d - p)


class MuProp(Estimator):
    title = "MuProp"
    paper = "Gu, Levine, Sutskever & Mnih 2016"
    exact_for = "all"
    evaluations = "2"

    def count_evaluations(self, variables: int, categories: int, call: int = 0) -> int:
        return 2

    def estimate(self, logits: Tensor, cost: Cost, rng: Noise) -> Tensor:
        p, d = self.family.probability(logits.data), self.family.sample(rng, logits.data)
        f = cost(Tensor(d))
        g = muprop_gradient(p, d, f.data, *value_and_grad(cost, p), self.family)
        return attach_gradient(f, logits, g)


class SimpleMuProp(Estimator):
    title = "MuProp without its linear term"
    paper = "Tucker, Mnih, Maddison, Lawson & Sohl-Dickstein 2017"
    exact_for = "all"
    evaluations = "2"
    cost_gradient = False

    def count_evaluations(self, variables: int, categories: int, call: int = 0) -> int:
        return 2

    def estimate(self, logits: Tensor, cost: Cost, rng: Noise) -> Tensor:
        p, d = self.family.probability(logits.data), self.family.sample(rng, logits.data)
        f = cost(Tensor(d))
        with no_grad():
            mean_costs = cost(Tensor(p)).data
        return attach_gradient(f, logits, simple_muprop_gradient(p, d, f.data, mean_costs))
