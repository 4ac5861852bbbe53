"""ReinMax with its first term averaged, or corrected, by Gumbel noise: ReinMax-Rao and ReinMax-CV.

The first term of ReinMax, 2 J(q) g, is twice straight-through at the point q = ½(p + D). ReinMax-Rao replaces it by
what Gumbel-Rao makes of the logits θ_D = log q, ReinMax-CV adds a multiple of Gumbel-Rao minus ST Gumbel-Softmax there.
"""

from __future__ import annotations

from minigrad import Tensor, op
from minigrad.fused import softmax_array, softmax_vjp

from . import categorical
from .base import LARGEST, AveragedSampler, SettingError, check_draws, check_number
from .categorical import conditional_gumbel
from .enumeration import Noise


def _middle(logits, onehot):
    """θ_D = log ½(p + D)"""
    return categorical.log_odds(0.5 * (softmax_array(logits) + onehot))


def _relaxed_at(perturbed, shift, tau):
    """Σ over the draws of softmax((θ + const)/τ) / S, a function of θ whose value at the present θ has Q for logits."""
    return lambda logits: softmax_array((logits + (perturbed - shift)) / tau).mean(axis=0)


def _rao_surrogate(logits, onehot, exponential, *, tau=1.0):
    rao = _relaxed_at(conditional_gumbel(_middle(logits, onehot), onehot, exponential), logits, tau)
    return (0,), lambda logits: 2.0 * rao(logits) - 0.5 * softmax_array(logits)


@op(surrogate=_rao_surrogate)
def reinmax_rao(logits, onehot, exponential, *, tau=1.0):
    """ReinMax-Rao (Wang & Bui 2026).   D ~ Cat(softmax(θ)), drawn by the caller; E (S, ..., K) iid Exp(1).

    Estimates    ∇θ E f(D)
    Derivation   ReinMax's  2 J(½(p + D)) g − ½ J(p) g,  its first Jacobian smoothed by Gumbel-Rao at
                 θ_D = log ½(p + D):
                 dθ = 2 · (1/S) Σₛ (1/τ) J(yₛ) g − ½ J(p) g,      yₛ = softmax(Qₛ/τ),   Qₛ ~ (θ_D + G | argmax = D)
    Exact when   never in general: the smoothing moves the Jacobian away from the point for which Heun's rule is exact.
    Misprints    eq. 17 is said to have its second term at θ_D, and eq. 18 to lack a factor 2; neither would leave
                 ReinMax where the noise is averaged out completely.
    Costs        one evaluation of f and its gradient; S cheap softmaxes.
    Note         Rao & Blackwell do not promise anything here: given D, ReinMax is a constant, so there is no noise to
                 average out. What changes is the bias.

    logits, onehot (..., K), exponential (S, ..., K)   ->   onehot, with gradients towards the logits
    """
    check_draws(logits, onehot, averaged=exponential)

    def backward(g):
        def dlogits():
            y = softmax_array(conditional_gumbel(_middle(logits, onehot), onehot, exponential) / tau)
            return (2.0 / tau) * softmax_vjp(y, g).mean(axis=0) - 0.5 * softmax_vjp(softmax_array(logits), g)

        return dlogits, None, None

    return onehot, backward


def _cv_surrogate(logits, onehot, exponential, gumbel, *, tau=1.0, scale=1.0):
    middle = _middle(logits, onehot)
    rao = _relaxed_at(conditional_gumbel(middle, onehot, exponential), logits, tau)
    single = _relaxed_at((middle + gumbel)[None], logits, tau)
    heun = _relaxed_at(middle[None], logits, 1.0)
    return (0,), lambda theta: 2.0 * heun(theta) - 0.5 * softmax_array(theta) + scale * (rao(theta) - single(theta))


@op(surrogate=_cv_surrogate)
def reinmax_cv(logits, onehot, exponential, gumbel, *, tau=1.0, scale=1.0):
    """ReinMax-CV (Wang & Bui 2026).   D ~ Cat(softmax(θ)); E (S, ..., K) iid Exp(1), G (..., K) standard Gumbel.

    Estimates    ∇θ E f(D)
    Derivation   ReinMax plus η times (Gumbel-Rao − ST Gumbel-Softmax), both at θ_D = log ½(p + D):
                 dθ = 2 J(½(p + D)) g − ½ J(p) g + η ( (1/S) Σₛ (1/τ) J(yₛ) g − (1/τ) J(softmax((θ_D + G)/τ)) g )
    Exact when   never for η ≠ 0.  The published name says control variate, but ReinMax is a function of D alone, so
                 adding anything with conditional mean 0 given D can only raise its variance (law of total variance).
                 Given D, the mean of the bracket is not 0, whether G is the noise that drew D (its law is conditioned
                 on argmax(θ + G) = D, not on θ_D) or fresh. That changes the bias; and since this mean varies with D,
                 it moves the variance, too, up or down.
    Costs        one evaluation of f and its gradient; S + 1 cheap softmaxes.
    Differs      from the authors' early code, which hands the soft sample softmax(θ + G) on in the place of G, without
                 the division by τ inside.

    logits, onehot, gumbel (..., K), exponential (S, ..., K)   ->   onehot, with gradients towards the logits
    """
    check_draws(logits, onehot, gumbel, averaged=exponential)

    def backward(g):
        def dlogits():
            p, middle = softmax_array(logits), _middle(logits, onehot)
            rao = softmax_vjp(softmax_array(conditional_gumbel(middle, onehot, exponential) / tau), g).mean(axis=0)
            single = softmax_vjp(softmax_array((middle + gumbel) / tau), g)
            heun = 2.0 * softmax_vjp(0.5 * (p + onehot), g) - 0.5 * softmax_vjp(p, g)
            return heun + (scale / tau) * (rao - single)

        return dlogits, None, None, None

    return onehot, backward


class ReinMaxRao(AveragedSampler):
    """tau: of the smoothing (θ_D itself has none).  samples: S ≥ 1."""

    title = "ReinMax-Rao"
    paper = "Wang & Bui 2026"
    exact_for = "none"

    def draw(self, logits: Tensor, rng: Noise) -> Tensor:
        onehot = rng.one_hot(logits.data)
        return reinmax_rao(logits, onehot, self.exponential(logits, rng), tau=self.tau)


class ReinMaxCV(ReinMaxRao):
    """scale: η, at most 1e6 in size.  gs_noise: "forward" (the G that drew D) or "fresh".  ValueError otherwise."""

    title = "ReinMax-CV"
    sample_first = False

    def __init__(self, tau: float = 1.0, samples: int = 10, scale: float = 1.0, gs_noise: str = "forward") -> None:
        super().__init__(tau, samples)
        if gs_noise not in ("forward", "fresh"):
            raise SettingError(f"gs_noise must be forward or fresh, got {gs_noise!r}.")
        self.scale, self.gs_noise = check_number("scale", scale, -LARGEST, LARGEST), gs_noise

    def draw(self, logits: Tensor, rng: Noise) -> Tensor:
        gumbel = rng.gumbel(logits.shape, like=logits.data)
        onehot = categorical.harden(logits.data + gumbel)
        if self.gs_noise == "fresh":
            gumbel = rng.site("fresh").gumbel(logits.shape, like=logits.data)
        noise = self.exponential(logits, rng)
        return reinmax_cv(logits, onehot, noise, gumbel, tau=self.tau, scale=self.scale)
