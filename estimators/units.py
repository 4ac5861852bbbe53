"""Units that are stochastic and have a derivative: the gates of Bengio, Léonard & Courville (2013, section 2).

Both put out 0 with a probability of their own, and otherwise a number that depends smoothly on the logit. They are not
bits, so the expectation whose gradient they estimate is that of their own output h.
"""

from __future__ import annotations

from minigrad import Tensor, op
from minigrad.backend import Array, array_module
from minigrad.ops import stable_sigmoid

from . import bernoulli
from .base import Sampler, SettingError, check_draws
from .enumeration import Noise

NO_BIT = "its output is no bit, so that what it trains is another model than the one that is evaluated with bits"


@op
def stochastic_times_smooth(logits, b):
    """STS (Bengio, Léonard & Courville 2013, section 2.2).   p = σ(a), b ~ Bernoulli(√p), drawn by the caller.

    forward:     h = b √p,  so that E[h] = p and P(h > 0) = √p
    Estimates    ∇ₐ E f(h), with b taken for a constant:
                 dh/da = b · ½ √p (1 − p)
    Exact when   never, not even for a linear f: the mean of dh/da is ½ p(1 − p), half the derivative of E[h], because
                 half of it comes from the probability of b.
    Costs        one evaluation of f and its gradient.
    Differs      from the authors' code, which draws b ~ Bernoulli(p) there, so that E[h] = p^(3/2); this follows the
                 paper.

    logits, b (...)   ->   h (...) in [0, 1)
    """
    check_draws(logits, b, family=bernoulli)
    p = stable_sigmoid(logits)
    root = array_module(p).sqrt(p)
    return b * root, lambda g: (g * b * (0.5 * root * (1.0 - p)), None)


@op
def noisy_rectifier(logits, noise):
    """The noisy rectifier (Bengio, Léonard & Courville 2013, section 2.1).   z noise, drawn by the caller.

    forward:     h = max(0, a + z).  With logistic z, P(h > 0) = σ(a) and E[h] = softplus(a)
    Estimates    ∇ₐ E f(h) by reparametrisation:  dh/da = [a + z > 0]
    Exact when   always, for its own output h: h is continuous in a for every z.
    Costs        one evaluation of f and its gradient.

    logits, noise (...)   ->   h (...) ≥ 0
    """
    check_draws(logits, noise, family=bernoulli)
    h = array_module(logits).maximum(logits + noise, 0.0)
    return h, lambda g: (g * (h > 0), None)


class StochasticTimesSmooth(Sampler):
    title = "Stochastic times smooth"
    warning = NO_BIT
    paper = "Bengio, Léonard & Courville 2013"
    objective = "E f(h), h = b·√p"
    exact_for = "none"
    support = "soft"
    randomness = "uniform"
    sample_first = False
    threshold = 0.0
    families = (bernoulli,)

    def forward_probability(self, logits: Array) -> Array:
        return super().forward_probability(logits) ** 0.5

    def thresholds(self, logits: Array) -> Array:
        return self.forward_probability(logits)[..., None]

    def draw(self, logits: Tensor, rng: Noise) -> Tensor:
        xp, p = array_module(logits.data), self.family.probability(logits.data)
        b = (rng.uniform(logits.shape, like=logits.data) < xp.sqrt(p)).astype(p.dtype)
        return stochastic_times_smooth(logits, b)


class NoisyRectifier(Sampler):
    """noise: "logistic", with P(h > 0) = σ(a), or "normal", as in the paper's experiments; else ValueError."""

    title = "Noisy rectifier"
    warning = NO_BIT
    paper = "Bengio, Léonard & Courville 2013"
    objective = "E f(h), h = max(0, a + z)"
    exact_for = "all"
    support = "soft"
    randomness = "noise"
    sample_first = False
    bounded = False
    threshold = 0.0
    families = (bernoulli,)

    def __init__(self, noise: str = "logistic") -> None:
        if noise not in ("logistic", "normal"):
            raise SettingError(f"noise must be logistic or normal, got {noise!r}.")
        self.noise = noise

    def draw(self, logits: Tensor, rng: Noise) -> Tensor:
        draw = rng.logistic if self.noise == "logistic" else rng.normal
        return noisy_rectifier(logits, draw(logits.shape, like=logits.data))
