"""Sum and sample: the most probable classes exactly, one sample for all the rest."""

from __future__ import annotations

from minigrad import Tensor, no_grad
from minigrad.backend import Array, array_module
from minigrad.fused import MASKED

from . import categorical
from .base import Cost, Estimator, attach_gradient, check_count
from .enumeration import Noise


def sum_and_sample_gradient(p: Array, classes: Array, weights: Array, costs: Array) -> Array:
    """Sum and sample, the Rao-Blackwellised score function (Liu, Regier, Tripuraneni, Jordan & McAuliffe 2019, eq. 4).

    Estimates    ∇θ E f(D), each variable given the others
    Derivation   split the expectation at a fixed set T of classes, here the C most probable ones:
                 E[f(D)(D − p)] = Σ_{k∈T} pₖ fₖ (eₖ − p) + (1 − p(T)) E[f(D)(D − p) | D ∉ T]
                 and draw z from what is left:
                 dθ = Σ_{k∈T} pₖ fₖ (eₖ − p) + (1 − p(T)) f_z (e_z − p)
                 Subtracting the same number from all costs leaves the expectation as it is, if it does not depend
                 on z; the cost of the most probable class comes for free.
    Exact when   always; for one variable without variance when T leaves no more than one class.
    Costs        C + 1 evaluations of f for each variable.

    p (B, L, K), classes (C+1, B, L, K) one-hots, T and then z; weights (C+1, B, L); costs (C+1, B, L)  ->  dθ (B, L, K)
    """
    return ((weights * costs)[..., None] * (classes - p)).sum(axis=0)


class SumAndSample(Estimator):
    """summed: C ≥ 1, how many classes of each variable are summed exactly.  baseline: subtract the cost of the first?

    With several variables, each is treated in turn while the others stay at one joint sample, as in local expectation
    gradients.
    """

    title = "Sum and sample"
    paper = "Liu, Regier, Tripuraneni, Jordan & McAuliffe 2019"
    exact_for = "all"
    evaluations = "L·(C + 1) + 1"
    cost_gradient = False
    randomness = "samples"
    evaluates_masked = True  # where no other class is left
    families = (categorical,)

    def __init__(self, summed: int = 1, baseline: bool = True) -> None:
        self.summed, self.baseline = check_count("summed", summed, 1), bool(baseline)
        self.cancels_constants = self.baseline

    def count_evaluations(self, variables: int, categories: int, call: int = 0) -> int:
        return variables * (min(self.summed, categories - 1) + 1) + 1

    def estimate(self, logits: Tensor, cost: Cost, rng: Noise) -> Tensor:
        xp = array_module(logits.data)
        L, K = categorical.sizes(logits.shape)
        theta = logits.data.reshape(-1, L, K)
        p, left, classes, weights = categorical.probability(theta), theta, [], []
        for _ in range(min(self.summed, K - 1)):
            classes.append(categorical.harden(left))
            weights.append((p * classes[-1] * (left > MASKED)).sum(axis=-1))  # 0 where no class is left to be summed
            left = xp.where(classes[-1] > 0, MASKED, left)
        weights.append((p * (left > MASKED)).sum(axis=-1))
        classes.append(rng.site("rest").one_hot(left))

        d = categorical.sample(rng, logits.data)
        f = cost(Tensor(d))
        costs = []
        with no_grad():
            for c in classes:
                at = xp.empty(p.shape[:2], dtype=p.dtype)
                for l in range(L):
                    moved = d.reshape(p.shape).copy()
                    moved[:, l] = c[:, l]
                    at[:, l] = cost(Tensor(moved.reshape(logits.shape))).data
                costs.append(at)
        costs = xp.stack(costs)
        if self.baseline:
            costs = costs - costs[0]
        g = sum_and_sample_gradient(p, xp.stack(classes), xp.stack(weights), costs)
        return attach_gradient(f, logits, g.reshape(logits.shape))
