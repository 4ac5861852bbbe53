"""The unordered set estimator: S different outcomes, drawn without replacement, and the order of drawing averaged out.

Drawing without replacement is done on joint outcomes of all variables by a stochastic beam search (Kool, van Hoof &
Welling 2019): perturb the log-probability of every joint outcome with Gumbel noise and keep the S largest, without
ever enumerating them.
"""

from __future__ import annotations

from minigrad import Tensor
from minigrad.backend import Array, array_module
from minigrad.fused import TINY, log_softmax
from minigrad.ops import stack
from minigrad.random import one_hot

from . import categorical
from .base import Cost, Estimator, attach_gradient, check_count, scale_per_example
from .enumeration import Noise

_FLOOR = -1e6  # a joint outcome with a lower log-probability is masked


def stochastic_beam_search(log_p: Array, gumbel: Array, samples: int) -> tuple[Array, Array]:
    """The `samples` largest of all Kᴸ log-probabilities perturbed by Gumbel noise (Kool et al. 2019, algorithm 1).

    log_p (B, L, K); gumbel (L, B, S, K)   ->   classes (B, S', L) of integers, log-probabilities (B, S'), largest
    first; S' = min(S, Kᴸ).

    Derivation   the maximum of Gumbels at φᵢ is a Gumbel at log Σ e^φᵢ, so a partial outcome's perturbed value G is the
                 maximum over its completions. Given G, its children are Gumbels G̃ᵢ at φᵢ, conditioned on their maximum
                 Z to be G instead:  Gᵢ = −log(e^−G − e^−Z + e^−G̃ᵢ), computed from v = G − G̃ᵢ + log(1 − e^(G̃ᵢ−Z)) as
                 Gᵢ = G − max(v, 0) − log(1 + e^−|v|).
                 The set of the largest does not depend on the overall maximum, so that is fixed at G = 0.
    """
    xp, (B, L, K) = array_module(log_p), log_p.shape
    phi = xp.zeros((B, 1), dtype=log_p.dtype)
    top = xp.zeros((B, 1), dtype=log_p.dtype)
    classes = xp.zeros((B, 1, 0), dtype=xp.int64)
    for l in range(L):
        beams = phi.shape[1]
        child_phi = phi[:, :, None] + log_p[:, l, None, :]
        perturbed = child_phi + gumbel[l, :, :beams]
        below = perturbed - perturbed.max(axis=-1, keepdims=True)
        v = top[:, :, None] - perturbed + xp.log(xp.maximum(-xp.expm1(below), TINY))
        child = top[:, :, None] - xp.maximum(v, 0.0) - xp.log1p(xp.exp(-abs(v)))
        child = xp.where(below == 0, top[:, :, None], child).reshape(B, -1)
        # NumPy's stable order takes several times as long, and continuous numbers are as good as never equal
        best = xp.argsort(-child, axis=-1, kind=None)[:, : min(samples, beams * K)]
        top = xp.take_along_axis(child, best, axis=1)
        phi = xp.take_along_axis(child_phi.reshape(B, -1), best, axis=1)
        parents = xp.take_along_axis(classes, (best // K)[:, :, None], axis=1)
        classes = xp.concatenate([parents, (best % K)[:, :, None]], axis=2)
    return classes, phi


def set_weights(log_p: Array) -> tuple[Array, Array]:
    """Given the set, which of its members came first, and which second?

    log_p (S, B), the log-probabilities of the members   ->   first (S, B), second (S, S, B)

    Derivation   An ordered draw has the probability Π pₜ/(1 − Σ of those before). Let W(U) be the sum of these products
                 over all orders in which the rest of the set can follow the members U, and p(U) their probability:
                 W(set) = 1,     W(U) = Σ_{t∉U} pₜ/(1 − p(U)) W(U ∪ t)
                 so P(set) = W(∅), and the first one was s with probability
                 firstₛ = pₛ W({s}) / W(∅)  = pₛ R(set, s) in the paper, with its leave-one-out ratio R.
                 An independent second draw is s again with probability pₛ, else the second of the order:
                 secondₛₛ = pₛ,    secondₛₜ = pₜ W({s, t}) / W({s})
                 Both sum to 1. All in logarithms and in float64: P(set) can be tiny, the ratios are not.
    """
    xp, S = array_module(log_p), len(log_p)
    log_p = xp.maximum(log_p.astype(xp.float64), _FLOOR)
    p = xp.exp(log_p)
    full = (1 << S) - 1
    log_w = {full: xp.zeros_like(log_p[0])}
    for used in range(full - 1, -1, -1):
        members = [t for t in range(S) if used >> t & 1]
        rest = 1.0 - sum(p[t] for t in members) if members else xp.ones_like(p[0])
        follow = xp.stack([log_p[t] + log_w[used | 1 << t] for t in range(S) if not used >> t & 1])
        m = follow.max(axis=0)
        log_w[used] = m + xp.log(xp.exp(follow - m).sum(axis=0)) - xp.log(xp.maximum(rest, 1e-30))
    first = xp.stack([xp.exp(log_p[s] + log_w[1 << s] - log_w[0]) for s in range(S)])
    second = [
        [p[s] if s == t else xp.exp(log_p[t] + log_w[1 << s | 1 << t] - log_w[1 << s]) for t in range(S)]
        for s in range(S)
    ]
    return first, xp.stack([xp.stack(row) for row in second])


def unordered_set_gradient(p: Array, ds: Array, costs: Array, first: Array, second: Array) -> Array:
    """The unordered set policy gradient with its built-in baseline (Kool, van Hoof & Welling 2020, eqs. 9 and 15).

    Estimates    ∇θ E f(D) from S different outcomes, drawn without replacement
    Derivation   the first draw s alone gives (f(s) − f(t))(s − p) with an independent second draw t as its baseline.
                 Averaged over all orders in which this very set could have been drawn (Rao & Blackwell):
                 dθ = Σₛ firstₛ (fₛ − Σₜ secondₛₜ fₜ)(Dₛ − p)
    Exact when   always; without variance when the set has all outcomes.
    Costs        S evaluations of f, none of them twice.

    p (B, ..., K), ds (S, B, ..., K), costs (S, B), first (S, B), second (S, S, B)   ->   dθ (B, ..., K)
    """
    advantage = costs - (second * costs).sum(axis=1)
    return scale_per_example(first * advantage, ds - p).sum(axis=0)


class UnorderedSet(Estimator):
    """samples: S from 2 to 8 (ValueError), fewer when there are not so many joint outcomes."""

    title = "Unordered set without replacement"
    paper = "Kool, van Hoof & Welling 2020"
    exact_for = "all"
    evaluations = "S"
    cost_gradient = False
    randomness = "set"
    sample_count = 1  # the first one drawn; the others are none, since they must differ from those before
    sample_first = False
    families = (categorical,)

    def __init__(self, samples: int = 4) -> None:
        self.samples = check_count("samples", samples, 2, 8)  # all orders of the set are summed

    def count_evaluations(self, variables: int, categories: int, call: int = 0) -> int:
        return min(self.samples, categories**variables)

    def estimate(self, logits: Tensor, cost: Cost, rng: Noise) -> Tensor:
        xp = array_module(logits.data)
        L, K = categorical.sizes(logits.shape)
        theta = logits.data.reshape(-1, L, K)
        gumbel = rng.gumbel((L, len(theta), self.samples, K), like=theta)
        classes, log_p = stochastic_beam_search(log_softmax(theta).data, gumbel, self.samples)
        S, log_p = log_p.shape[1], log_p.T
        ds = one_hot(classes, K, theta).transpose(1, 0, 2, 3)
        ds = xp.where((log_p > _FLOOR)[:, :, None, None], ds, ds[:1])  # a masked outcome has no weight, nor a cost
        first, second = (w.astype(theta.dtype) for w in set_weights(log_p))
        fs = [cost(Tensor(ds[s].reshape(logits.shape))) for s in range(S)]
        costs = xp.stack([f.data for f in fs])
        g = unordered_set_gradient(categorical.probability(theta), ds, costs, first, second)
        value = (stack(*fs) * first).sum(axis=0)
        return attach_gradient(value, logits, g.reshape(logits.shape))
