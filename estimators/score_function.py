"""Score functions: REINFORCE and its baselines.

∇θ E f(D) = E[f(D) ∇θ log q(D)], because ∇q = q ∇log q (Glynn 1990; Williams 1992). The cost is only evaluated, never
differentiated with respect to D. Since E[∇log q] = 0, any baseline that does not depend on D may be subtracted from
f without changing the expectation; a good one changes the variance a lot.
"""

from __future__ import annotations

from minigrad import Tensor
from minigrad.backend import array_module, to_host
from minigrad.fused import softmax_array
from minigrad.ops import stack

import numpy as np

from .base import Estimator, attach_gradient, check_samples, weigh


def reinforce_gradient(p, onehot, costs, baseline=0.0):
    """REINFORCE (Williams 1992).   D ~ Cat(p), p = softmax(θ), drawn by the caller.

    Estimates    ∇θ E f(D) = E[(f(D) − b) ∇θ log q(D)]
    Derivation   log q(D) = ⟨D, θ⟩ − log Σ eᶿ for each variable, so ∇θ log q(D) = D − p, and E[D − p] = 0
                 dθ = (f(D) − b) (D − p)
    Exact when   always, if b does not depend on this D.
    Costs        one evaluation of f.

    p, onehot (B, ..., K), costs (B,), baseline a number or (B,)   ->   dθ (B, ..., K)
    """
    return weigh(costs - baseline, onehot - p)


def rloo_gradient(p, onehots, costs):
    """REINFORCE with a leave-one-out baseline (Salimans & Knowles 2014; Kool, van Hoof & Welling 2019).

    Estimates    ∇θ E f(D) from S ≥ 2 independent samples, each with the mean cost of the others as its baseline
    Derivation   (1/S) Σₛ (fₛ − (1/(S−1)) Σ_{t≠s} fₜ)(Dₛ − p),  and  fₛ − (S f̄ − fₛ)/(S−1) = S/(S−1) (fₛ − f̄):
                 dθ = (1/(S−1)) Σₛ (fₛ − f̄)(Dₛ − p)
    Exact when   always: the baseline of a sample is independent of it.
    Costs        S evaluations of f.

    p (B, ..., K), onehots (S, B, ..., K), costs (S, B)   ->   dθ (B, ..., K)
    """
    advantage = (costs - costs.mean(axis=0)) / (costs.shape[0] - 1)
    return weigh(advantage, onehots - p).sum(axis=0)


class Reinforce(Estimator):
    title = "REINFORCE"
    paper = "Williams 1992"
    exact_for = "all"
    evaluations = "1"
    cost_gradient = False

    def baseline(self):
        return 0.0

    def estimate(self, logits, cost, rng):
        onehot = rng.one_hot(logits.data)
        f = cost(Tensor(onehot))
        self.observe(f.data)
        g = reinforce_gradient(softmax_array(logits.data), onehot, f.data, self.baseline())
        return attach_gradient(f, logits, g)

    def observe(self, costs) -> None:
        """Called with the costs of each batch, before the baseline is used."""


class ReinforceRunningMean(Reinforce):
    """The baseline is an exponential mean of the costs of earlier batches, m ← β m + (1−β) mean f, after m was used.

    decay: β, in [0, 1).  The first batch has no baseline; it sets the mean.
    """

    title = "REINFORCE, running mean"
    paper = "Williams 1992; Mnih & Gregor 2014"
    state = ("mean", "started")

    def __init__(self, decay: float = 0.9):
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"decay must be at least 0 and below 1, got {decay}.")
        self.decay, self.mean, self.started = float(decay), 0.0, False
        self._latest = None

    def baseline(self):
        return self.mean

    def observe(self, costs):
        self._latest = costs.mean()

    def update(self):
        if self._latest is not None:
            self.mean = self.decay * self.mean + (1.0 - self.decay) * self._latest if self.started else self._latest
            self.started, self._latest = True, None

    def state_dict(self):
        return {"mean": np.array(to_host(self.mean)), "started": np.array(self.started)}

    def load_state_dict(self, state):
        super().load_state_dict(state)
        self.started = bool(self.started)
        self.mean = self.mean[()] if self.started else 0.0  # in its dtype, to the bit


class Rloo(Estimator):
    title = "RLOO"
    paper = "Kool, van Hoof & Welling 2019"
    exact_for = "all"
    evaluations = "S"
    cost_gradient = False

    def __init__(self, samples: int = 2):
        self.samples = check_samples(samples, least=2)

    def estimate(self, logits, cost, rng):
        xp = array_module(logits.data)
        onehots = [rng.site(s).one_hot(logits.data) for s in range(self.samples)]
        fs = [cost(Tensor(d)) for d in onehots]
        costs = xp.stack([f.data for f in fs])
        g = rloo_gradient(softmax_array(logits.data), xp.stack(onehots), costs)
        return attach_gradient(stack(*fs).mean(axis=0), logits, g)
