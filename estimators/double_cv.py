"""Double control variates: RLOO, with the linearised cost as a second control variate for both of its parts."""

from __future__ import annotations

from minigrad import Tensor
from minigrad.backend import Array, array_module
from minigrad.ops import stack

from . import bernoulli
from .base import (
    Cost,
    Estimator,
    attach_gradient,
    check_count,
    cost_and_gradient,
    leave_one_out_mean,
    scale_per_example,
)
from .enumeration import Noise
from .learned import Learned, squared_norm_gradient


def double_cv_gradient(p: Array, bs: Array, costs: Array, gs: Array, alpha: Array) -> tuple[Array, Array]:
    """Double control variates (Titsias & Shi 2022, eq. 9).   b₁ … b_S independent, fₛ = f(bₛ), gₛ = ∇f(bₛ).

    Estimates    ∇ₐ E f(b)
    Derivation   g₋ₛ, the mean gradient at the other samples, does not depend on bₛ, so cₛ = α⟨g₋ₛ, bₛ − p⟩, the inner
                 product running over all bits, has mean 0 and E[cₛ (bₛ − p)] = α p(1 − p) g₋ₛ exactly. With
                 vₛ = fₛ + cₛ in RLOO, and that mean given back (ḡ is the mean of all gₛ):
                 da = (1/S) Σₛ (vₛ − (1/(S−1)) Σ_{t≠s} vₜ)(bₛ − p) − α p(1 − p) ḡ
    Exact when   always; α = 0 is RLOO. For a linear f and α = −1 it has no variance.
    Costs        S evaluations of f and their gradients.

    p (B, ...), bs, gs (S, B, ...), costs (S, B), alpha a number   ->   da (B, ...), ∂da/∂α (B, ...)
    """
    score = bs - p
    c = (leave_one_out_mean(gs) * score).sum(axis=tuple(range(2, bs.ndim)))
    rloo = lambda v: scale_per_example(v - leave_one_out_mean(v), score).mean(axis=0)
    slope = rloo(c) - bernoulli.vjp(p, gs.mean(axis=0))
    return rloo(costs) + alpha * slope, slope


class DoubleCV(Estimator):
    """samples: S from 2 to 10,000.  lr: of the Adam that trains α, from 0, to lower the variance."""

    title = "Double control variates"
    paper = "Titsias & Shi 2022"
    exact_for = "all"
    evaluations = "S"
    randomness = "samples"
    families = (bernoulli,)
    learned_objective = "variance"
    learned: Learned

    def __init__(self, samples: int = 2, lr: float = 1e-2) -> None:
        self.samples = self.sample_count = check_count("samples", samples, 2)
        self.learned = Learned(lr)

    def estimate(self, logits: Tensor, cost: Cost, rng: Noise) -> Tensor:
        xp, p = array_module(logits.data), self.family.probability(logits.data)
        self.learned.start(lambda: {"alpha": 0.0}, like=p)
        bs = [self.family.sample(rng.site(s), logits.data) for s in range(self.samples)]
        fs, gs = zip(*(cost_and_gradient(cost, b) for b in bs), strict=True)
        costs = xp.stack([f.data for f in fs])
        g, slope = double_cv_gradient(p, xp.stack(bs), costs, xp.stack(gs), self.learned["alpha"])
        self.learned.learn({"alpha": (squared_norm_gradient(g) * slope).sum()})
        return attach_gradient(stack(*fs).mean(axis=0), logits, g)
