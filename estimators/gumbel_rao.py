"""Gumbel-Rao: the straight-through Gumbel-Softmax with its noise averaged out, given the outcome."""

from __future__ import annotations

from minigrad import Tensor, op
from minigrad.fused import inner, softmax_array

from .base import AveragedSampler, check_draws
from .categorical import conditional_gumbel
from .enumeration import Noise


def _averaged_relaxation(logits, onehot, exponential, *, tau=1.0):
    shift = conditional_gumbel(logits, onehot, exponential) - logits  # a constant: see "Differs" below
    return (0,), lambda logits: softmax_array((logits + shift) / tau).mean(axis=0)


@op(surrogate=_averaged_relaxation)
def gumbel_rao(logits, onehot, exponential, *, tau=1.0):
    """Gumbel-Rao, GR-MCS (Paulus, Maddison & Krause 2021).   D ~ Cat(softmax(θ)); E (S, ..., K) iid Exp(1).

    Estimates    ∇θ E f(D) with the mean of the ST Gumbel-Softmax and less variance
    Derivation   Rao & Blackwell: ST Gumbel-Softmax's dθ is (1/τ) J(y) g with g = ∇f(D) a function of D alone, so its
                 conditional mean given D, here over S draws, has the same expectation and no larger variance:
                 dθ = (1/S) Σₛ (1/τ) J(yₛ) g,      yₛ = softmax(Qₛ/τ),   Qₛ ~ (θ + G | argmax(θ + G) = D)
    Exact when   never; as τ → 0 its mean given D becomes ReinMax, which is exact for quadratic f.
    Costs        one evaluation of f and its gradient; S cheap softmaxes.
    Differs      from the paper's sentence that the gradient flows through Qₛ: it must not. The estimator averaged is
                 (1/τ) J(yₛ) g with θ + G differentiated at fixed G. (N. Shepperd's code and that of Fan et al. 2022
                 do the same.)

    logits, onehot (..., K), exponential (S, ..., K)   ->   onehot, with gradients towards the logits
    """
    check_draws(logits, onehot, averaged=exponential)

    def backward(g):
        def dlogits():
            y = softmax_array(conditional_gumbel(logits, onehot, exponential) / tau)
            return (y * (g - inner(y, g))).mean(axis=0) / tau

        return dlogits, None, None

    return onehot, backward


class GumbelRao(AveragedSampler):
    """samples: the number S of conditional Gumbel draws averaged for each outcome."""

    title = "Gumbel-Rao"
    paper = "Paulus, Maddison & Krause 2021"
    exact_for = "none"

    def draw(self, logits: Tensor, rng: Noise) -> Tensor:
        onehot = rng.one_hot(logits.data)
        return gumbel_rao(logits, onehot, self.exponential(logits, rng), tau=self.tau)
