"""Distributions over one-hot vectors: Gumbel noise given the outcome, log-probabilities.

All functions work on arrays, the classes in the last axis.
"""

from __future__ import annotations

from minigrad.backend import array_module


def log_probability(log_p, onehot):
    """log q(D) = Σ over all variables of log p[D].   log_p, onehot (B, ..., K) -> (B,)"""
    return (log_p * onehot).sum(axis=tuple(range(1, onehot.ndim)))


def conditional_gumbel(logits, onehot, exponential):
    """Q = θ + G given that argmax(θ + G) = D   (Paulus, Maddison & Krause 2021, eq. 7).

    logits θ, onehot D (..., K);  exponential E (S, ..., K), iid Exp(1)   ->   Q (S, ..., K)

    The maximum of θ + G is Gumbel at log Σ eᶿ whoever attains it, and the others are Gumbels cut off at it. With i
    the drawn class and Z = Σ eᶿ:
        Qᵢ = −log(Eᵢ/Z)                    Qⱼ = −log(Eⱼ e^(−θⱼ) + Eᵢ/Z)
    Both are computed from logarithms, log(eᵃ + eᵇ) = max(a, b) + log(1 + e^(−|a−b|)), so that no logit overflows.
    """
    xp = array_module(logits)
    m = logits.max(axis=-1, keepdims=True)
    log_z = m + xp.log(xp.exp(logits - m).sum(axis=-1, keepdims=True))
    log_e = xp.log(exponential)
    b = (log_e * onehot).sum(axis=-1, keepdims=True) - log_z  # log(Eᵢ/Z)
    a = log_e - logits
    others = xp.maximum(a, b) + xp.log1p(xp.exp(-abs(a - b)))
    return -xp.where(onehot > 0, b, others)
