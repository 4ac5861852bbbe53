"""Local derivatives: one variable moves, the others stay at one sample.

Local expectation gradients enumerate the variable that moves; the measure-valued derivative samples it.
"""

from __future__ import annotations

from minigrad import Tensor, no_grad
from minigrad.backend import Array, array_module
from minigrad.fused import MASKED, log_softmax

from . import bernoulli, categorical
from .base import Cost, Estimator, Family, attach_gradient
from .enumeration import Noise


def local_expectation_gradient(p: Array, local_costs: Array, family: Family = categorical) -> Array:
    """Local expectation gradients (Titsias & Lázaro-Gredilla 2015).   D ~ Cat(p), drawn by the caller.

    Estimates    ∇θ E f(D) for L variables
    Derivation   given all the others, the gradient for variable l is that of a single one, which is exact:
                 ∇θₗ E[f(D) | D₋ₗ] = J(pₗ) Fₗ,      Fₗₖ = f(D with variable l set to eₖ)
                 For a bit: p(1 − p)(F₁ − F₀).
    Exact when   always; for one variable without variance.
    Costs        L(K − 1) + 1 evaluations of f: D itself, and each variable at each of its other classes.

    p (B, ..., K), local_costs F (B, L, K)   ->   dθ (B, ..., K)
    """
    return family.local_vjp(p, local_costs)


def measure_valued_gradient(p: Array, local_costs: Array, others: Array) -> Array:
    """The measure-valued or weak derivative (Pflug 1989; Mohamed, Rosca, Figurnov & Mnih 2020, section 6).

    Estimates    ∇θ E f(D) for L variables
    Derivation   ∂p/∂θⱼ = pⱼ(eⱼ − p) is a difference of two probability measures times a constant: of the sure class j
                 and of the classes other than j in their proportions,  pⱼ(1 − pⱼ)(eⱼ − p₋ⱼ/(1 − pⱼ)).  With one class
                 cⱼ ≠ j drawn from the second measure for each parameter:
                 dθⱼ = pⱼ (1 − pⱼ) (Fⱼ − F_cⱼ)
    Exact when   always. When E over cⱼ is taken exactly, it is the local expectation gradient; so it is for a bit,
                 whose other class is a sure one.
    Costs        two evaluations of f for each logit; here they are all found among the L(K − 1) + 1 local ones.

    p, local_costs F (B, L, K), others (B, L, K, K) with others[..., j, :] = onehot(cⱼ)   ->   dθ (B, L, K)
    """
    drawn = (others * local_costs[..., None, :]).sum(axis=-1)
    return p * (1.0 - p) * (local_costs - drawn)


class LocalExpectation(Estimator):
    title = "Local expectation gradients"
    paper = "Titsias & Lázaro-Gredilla 2015"
    exact_for = "all"
    evaluations = "L·(K − 1) + 1"
    cost_gradient = False
    enumerates_classes = True
    evaluates_masked = True

    def count_evaluations(self, variables: int, categories: int, call: int = 0) -> int:
        return variables * (categories - 1) + 1

    def estimate(self, logits: Tensor, cost: Cost, rng: Noise) -> Tensor:
        xp, d = array_module(logits.data), self.family.sample(rng, logits.data)
        f = cost(Tensor(d))
        local_costs = xp.broadcast_to(f.data[:, None, None], (len(d), *self.family.sizes(d.shape))).copy()
        with no_grad():
            for l, other, moved in self.family.local_outcomes(d):
                local_costs[:, l] = xp.where(other, cost(Tensor(moved)).data[:, None], local_costs[:, l])
        return attach_gradient(f, logits, self.gradient(logits.data, local_costs, rng))

    def gradient(self, logits: Array, local_costs: Array, rng: Noise) -> Array:
        return local_expectation_gradient(self.family.probability(logits), local_costs, self.family)


class MeasureValued(LocalExpectation):
    """For bits it is the local expectation gradient: the other class is a sure one."""

    title = "Measure-valued derivative"
    paper = "Pflug 1989; Mohamed, Rosca, Figurnov & Mnih 2020"
    randomness = "samples"
    linear_draws = True
    sums_to_zero = False

    @property
    def enumerates_classes(self) -> bool:  # type: ignore[override]  # it follows from the family: nobody sets it
        return self.family is bernoulli

    def gradient(self, logits: Array, local_costs: Array, rng: Noise) -> Array:
        if self.family is bernoulli:
            return super().gradient(logits, local_costs, rng)
        xp, theta = array_module(logits), logits.reshape(local_costs.shape)
        K = theta.shape[-1]
        p = categorical.probability(theta)
        itself = xp.eye(K, dtype=bool)
        others = rng.site("others").one_hot(xp.where(itself, MASKED, log_softmax(theta).data[..., None, :]))
        return measure_valued_gradient(p, local_costs, others).reshape(logits.shape)
