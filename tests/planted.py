"""Estimators with one error each, small examples of our own: what `check_estimator` has to find.

Each is a function (logits, cost, seed) -> (samples, gradients) on NumPy arrays, as a stranger would write it.
"""

import numpy as np

from estimators import categorical, create
from estimators.base import value_and_grad
from minigrad import Rng, Tensor


def softmax(x):
    return categorical.probability(x)


def one_hot(rng, logits):
    return rng.one_hot(logits)


def slope(cost, d):
    """∇f at the points d."""
    return value_and_grad(cost, d)[1]


def values(cost, d):
    return cost(d)


def straight_through(logits, cost, seed):
    """Right, for comparison."""
    d = one_hot(Rng(seed), logits)
    return d, categorical.vjp(softmax(logits), slope(cost, d))


def reinforce(logits, cost, seed):
    """Right, for comparison."""
    d = one_hot(Rng(seed), logits)
    return d, values(cost, d)[:, None, None] * (d - softmax(logits))


def rloo(logits, cost, seed, samples=3, divide_by=None, own=False):
    """Right with the defaults."""
    rng, p = Rng(seed), softmax(logits)
    d = np.stack([one_hot(rng.site(s), logits) for s in range(samples)])
    f = np.stack([values(cost, x) for x in d])
    others = f.mean(axis=0) if own else (f.sum(axis=0) - f) / (divide_by or samples - 1)
    return d, ((f - others)[..., None, None] * (d - p)).mean(axis=0)


def relaxed(logits, cost, seed, tau=0.5, forward=1.0, backward=None):
    """Gumbel-Softmax, right with the defaults."""
    y = softmax((forward * logits + Rng(seed).gumbel(logits.shape, like=logits)) / tau)
    return y, categorical.vjp(y, slope(cost, y)) / (tau if backward is None else backward)


def st_gumbel_softmax(logits, cost, seed, tau=0.5):
    """Right, for comparison."""
    z = logits + Rng(seed).gumbel(logits.shape, like=logits)
    d = categorical.harden(z)
    return d, categorical.vjp(softmax(z / tau), slope(cost, d)) / tau


# ---- one error each


def probabilities_as_logits(logits, cost, seed):
    return straight_through(softmax(logits), cost, seed)


def forgotten_factor(logits, cost, seed):
    """A relaxed sample whose rule lacks 1/τ."""
    return relaxed(logits, cost, seed, backward=1.0)


def forgotten_factor_of_straight_through(logits, cost, seed, tau=2.0):
    d = one_hot(Rng(seed), logits)
    return d, categorical.vjp(softmax(logits / tau), slope(cost, d))


def temperature_twice(logits, cost, seed):
    """θ/τ is given to something that divides by τ."""
    return relaxed(logits, cost, seed, forward=2.0)


def not_detached(logits, cost, seed):
    """hard − soft + soft, with both softs differentiated: they cancel."""
    d, g = straight_through(logits, cost, seed)
    return d, g - g


def relax_without_the_conditional(logits, cost, seed):
    """RELAX with c(z) = f(softmax z), without the derivative of z̃ with respect to θ."""
    rng, p = Rng(seed), softmax(logits)
    noise = rng.gumbel(logits.shape, like=logits)
    z = logits + noise
    d = categorical.harden(z)
    z_tilde = categorical.conditional(rng.site("conditional"), logits, d)
    of = lambda z: (values(cost, softmax(z)), categorical.vjp(softmax(z), slope(cost, softmax(z))))
    (_, dz), (c_tilde, _) = of(z), of(z_tilde)
    return d, (values(cost, d) - c_tilde)[:, None, None] * (d - p) + dz


def rao_with_total_derivative(logits, cost, seed, tau=0.5):
    """Gumbel-Rao that also differentiates the conditional noise with respect to θ."""
    rng, p = Rng(seed), softmax(logits)
    d = one_hot(rng, logits)
    z = categorical.conditional(rng.site("conditional"), logits, d)
    dz = categorical.vjp(softmax(z / tau), slope(cost, d)) / tau
    return d, categorical.conditional_vjp(p, d, z, dz)


def gumbel_rao(logits, cost, seed, tau=0.5):
    """Right, for comparison."""
    rng = Rng(seed)
    d = one_hot(rng, logits)
    z = categorical.conditional(rng.site("conditional"), logits, d)
    return d, categorical.vjp(softmax(z / tau), slope(cost, d)) / tau


def ignores_its_noise(logits, cost, seed):
    d = categorical.harden(logits)
    return d, categorical.vjp(softmax(logits), slope(cost, d))


def differentiated_twice(logits, cost, seed):
    d, g = straight_through(logits, cost, seed)
    return d, 2.0 * g


def baseline_with_its_own_sample(logits, cost, seed):
    return rloo(logits, cost, seed, own=True)


def divided_by_all(logits, cost, seed):
    """Leave-one-out with S instead of S − 1: the baseline is too small, which costs no bias but …"""
    rng, p, S = Rng(seed), softmax(logits), 3
    d = np.stack([one_hot(rng.site(s), logits) for s in range(S)])
    f = np.stack([values(cost, x) for x in d])
    return d, ((f - f.mean(axis=0))[..., None, None] * (d - p)).sum(axis=0) / S


def independent_pairs(logits, cost, seed):
    """DisARM for bits whose two samples are independent."""
    rng = Rng(seed)
    u, v = (rng.site(i).uniform(logits.shape, like=logits) for i in (0, 1))
    p = 1.0 / (1.0 + np.exp(-logits))
    b, c = (u < p).astype(logits.dtype), (v < p).astype(logits.dtype)
    differ = (b != c) * np.where(b > c, 1.0, -1.0) * 1.0 / (1.0 + np.exp(-np.abs(logits)))
    return np.stack([b, c]), 0.5 * (values(cost, b) - values(cost, c))[:, None] * differ


def disarm(logits, cost, seed):
    """Right, for comparison."""
    rng = Rng(seed)
    u = rng.uniform(logits.shape, like=logits)
    p = 1.0 / (1.0 + np.exp(-logits))
    b, c = (u < p).astype(logits.dtype), (1.0 - u < p).astype(logits.dtype)
    differ = (b != c) * np.where(b > c, 1.0, -1.0) / (1.0 + np.exp(-np.abs(logits)))
    return np.stack([b, c]), 0.5 * (values(cost, b) - values(cost, c))[:, None] * differ


def zero_at_a_boundary(logits, cost, seed):
    """A clamp of θ at 0 from both sides: its derivative is 0 where θ is exactly 0."""
    d, g = straight_through(logits, cost, seed)
    return d, g * (logits != 0)


def shared_noise(logits, cost, seed):
    noise = Rng(seed).gumbel(logits.shape[1:], like=logits)
    d = categorical.harden(logits + noise)
    return d, categorical.vjp(softmax(logits), slope(cost, d))


def no_temperature(logits, cost, seed):
    """τ = 0."""
    with np.errstate(all="ignore"):
        return relaxed(logits, cost, seed, tau=0.0)


def breaks_at_fifty(logits, cost, seed):
    """exp(θ) without the maximum taken off, in a rule that clips it."""
    d = one_hot(Rng(seed), logits)
    e = np.exp(np.minimum(logits, 50.0))
    p = e / e.sum(axis=-1, keepdims=True)
    return d, categorical.vjp(p, slope(cost, d))


def constant_offset(logits, cost, seed):
    d, g = reinforce(logits, cost, seed)
    return d, g - 0.27


def batch_baseline(logits, cost, seed):
    """REINFORCE with the mean over the batch, which holds the example's own cost."""
    d = one_hot(Rng(seed), logits)
    f = values(cost, d)
    return d, (f - f.mean())[:, None, None] * (d - softmax(logits))


def leaking_estimator():
    """Ours, with the cost at the mean added to the value, so that the weights behind it learn from that, too."""
    made = create("st")
    inner = made.estimate

    def estimate(logits, cost, rng):
        value = inner(logits, cost, rng)
        other = cost(Tensor(softmax(logits.data)))
        return value + other - Tensor(other.data)

    made.estimate = estimate
    return made
