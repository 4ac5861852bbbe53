"""VIMCO: a score function for the bound that is a logarithm of a mean over several samples."""

from __future__ import annotations

import math

from minigrad import Tensor
from minigrad.backend import Array, array_module
from minigrad.ops import logsumexp, stack

from .base import Cost, Estimator, attach_gradient, check_count, leave_one_out_mean, scale_per_example
from .enumeration import Noise


def log_mean_exp(x: Array) -> Array:
    """log (1/S) Σₛ e^xₛ over the first axis, on arrays, without overflow."""
    return logsumexp.rule(x, axis=0)[0] - math.log(len(x))


def vimco_gradient(p: Array, ds: Array, costs: Array) -> Array:
    """VIMCO, variational inference for Monte Carlo objectives (Mnih & Rezende 2016, eqs. 8 to 10).

    Estimates    ∇θ E[−L̂],   L̂ = log (1/S) Σₛ e^(−fₛ): the part of it that comes from the distribution of the samples
    Derivation   the score function of all S samples has the weight L̂ for each; L̂₋ₛ, in which the geometric mean of the
                 others takes the place of e^(−fₛ), does not depend on Dₛ and may be subtracted:
                 L̂₋ₛ = log (1/S) (Σ_{t≠s} e^(−fₜ) + exp(−(1/(S−1)) Σ_{t≠s} fₜ))
                 dθ = −Σₛ (L̂ − L̂₋ₛ)(Dₛ − p)
    Exact when   always, for this objective. With f = −log p(x, D)/q(D|x) it is the bound of Burda et al. 2016. (The
                 other part, Σₛ w̃ₛ ∂fₛ/∂θ where f depends on θ itself, is the tape's: w̃ is the derivative of −L̂.)
    Costs        S ≥ 2 evaluations of f.

    p (B, ..., K), ds (S, B, ..., K), costs f (S, B)   ->   dθ (B, ..., K)
    """
    xp, bound = array_module(p), log_mean_exp(-costs)
    others = leave_one_out_mean(costs)
    signals = []
    for s in range(len(costs)):
        swapped = -costs
        swapped[s] = -others[s]
        signals.append(bound - log_mean_exp(swapped))
    return -scale_per_example(xp.stack(signals), ds - p).sum(axis=0)


class Vimco(Estimator):
    """samples: S from 2 to 10,000.  The value is −L̂, no sum of single costs: a model has to put everything that
    depends on the sample into the cost (see `models.vae`), because the KL divergence has no place of its own in this
    bound."""

    title = "VIMCO"
    paper = "Mnih & Rezende 2016"
    objective = "−E log mean e^(−f)"
    exact_for = "all"
    evaluations = "S"
    cost_gradient = False
    multi_sample = True
    randomness = "samples"

    def __init__(self, samples: int = 5) -> None:
        self.samples = self.sample_count = check_count("samples", samples, 2)

    def estimate(self, logits: Tensor, cost: Cost, rng: Noise) -> Tensor:
        xp = array_module(logits.data)
        ds = [self.family.sample(rng.site(s), logits.data) for s in range(self.samples)]
        fs = [cost(Tensor(d)) for d in ds]
        g = vimco_gradient(self.family.probability(logits.data), xp.stack(ds), xp.stack([f.data for f in fs]))
        value = -logsumexp(stack(*[-f for f in fs]), axis=0) + math.log(self.samples)
        return attach_gradient(value, logits, g)
