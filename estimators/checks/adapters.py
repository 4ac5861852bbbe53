"""Estimators of any framework as functions of arrays, so that `conformance.check_estimator` can judge them.

    fn(logits, cost, seed) -> (samples, gradients)

logits (N, L, K), or (N, L) for bits, float32 or float64; cost, a `ladder.Rung`, is called with d of the framework and
gives one value for each example; seed, an integer below 2³¹, fixes all noise. gradients are shaped like the logits: an
estimate of ∇θ E f(D) for each example. samples are what the cost was evaluated at, (N, L, K), or (S, N, L, K) for S
samples of each example.

The adapters make such functions of what people have:

    from_torch(sampler)             sampler(logits) -> a differentiable sample; noise from PyTorch's global generator
    from_torch_gradient(fn)         fn(logits, cost) -> a surrogate loss, (N,) or a scalar, which is differentiated;
                                    or the gradient itself, shaped like the logits; or a pair (samples, either of them)
    from_jax(sampler)               sampler(logits, key) -> a differentiable sample
    from_jax_gradient(fn)           fn(logits, cost, key) -> (samples, gradient)
    from_estimator("reinmax")       one of this repository, by its name, or an instance

Only the adapter that is called imports its framework.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np

from minigrad import Rng, Tensor

from .. import create
from ..base import Estimator
from ..enumeration import Given
from ..exact import check_outcomes
from .ladder import Rung

__all__ = [
    "Adapter",
    "ConformanceError",
    "described",
    "from_estimator",
    "from_jax",
    "from_jax_gradient",
    "from_torch",
    "from_torch_gradient",
]


class ConformanceError(ValueError):
    """What was handed over is no estimator: it returns something else than samples and gradients."""


class Adapter:
    """A function (logits, cost, seed) -> (samples, gradients), and what is known of it besides.

    title: its name in the report.  framework: what its arrays are made with.  exact_for: what its author claims, a key
    of `ladder.EXACT_ON`, or None.  logit_scale: its samples are to have the logits logit_scale · θ.
    """

    framework = "numpy"
    exact_for: str | None = None
    logit_scale = 1.0

    def __init__(self, fn: Callable, title: str | None = None) -> None:
        self.fn = fn
        self.title = title or str(getattr(fn, "__name__", type(fn).__name__))

    def __call__(self, logits: np.ndarray, cost: Rung, seed: int) -> Any:
        return self.fn(logits, cost, seed)

    def run(self, logits: np.ndarray, cost: Rung, seed: int, weights: bool = False) -> tuple[Any, Any, Any]:
        """(samples, gradients, the gradient at the coefficients `cost.a`, (L·K,), or None if none arrives there).

        weights: is that gradient wanted?
        """
        return *self(logits, cost, seed), None

    def exact(self, rung: Rung) -> np.ndarray:
        """The gradient that it is to have on average, shaped like the rung's logits."""
        return rung.exact(scale=self.logit_scale)


class Differentiating(Adapter):
    """One that differentiates the cost by itself: `run` is where it does."""

    def __call__(self, logits: np.ndarray, cost: Rung, seed: int) -> Any:
        return self.run(logits, cost, seed)[:2]


class FromTorch(Differentiating):
    framework = "torch"

    def run(self, logits: np.ndarray, cost: Rung, seed: int, weights: bool = False) -> tuple[Any, Any, Any]:
        import torch

        torch.manual_seed(seed)
        theta = torch.tensor(logits, requires_grad=True)
        a = theta.new_tensor(cost.a).requires_grad_() if weights else None
        with cost.watched(a) as points:
            samples, g = self.gradient(theta, cost)
            samples = points[0] if samples is None and points else samples
        if g is not None:
            return _array(samples), _array(g), None
        return _array(samples), _array(theta.grad), None if a is None else _array(a.grad)

    def gradient(self, theta: Any, cost: Rung) -> tuple[Any, Any]:
        """(the samples or None, the gradient or None if `backward` has left it in `theta.grad`)"""
        d = self.fn(theta)
        _check_sample(self.title, d, theta)
        if not getattr(d, "requires_grad", False):
            raise ConformanceError(
                f"the sample of {self.title} carries no gradient: return a tensor that depends on the logits, or give "
                "a score function to from_torch_gradient."
            )
        cost(d.to(theta.dtype)).sum().backward()
        return d, None


class FromTorchGradient(FromTorch):
    def gradient(self, theta: Any, cost: Rung) -> tuple[Any, Any]:
        found = self.fn(theta, cost)
        samples, found = found if isinstance(found, tuple) and len(found) == 2 else (None, found)
        shape = getattr(found, "shape", None)
        if shape == theta.shape:
            return samples, found
        if shape not in ((), theta.shape[:1]) or not getattr(found, "requires_grad", False):
            raise ConformanceError(
                f"{self.title} must return a loss that depends on the logits, a scalar or {tuple(theta.shape[:1])}, or "
                f"a gradient, {tuple(theta.shape)}, got {described(found)}."
            )
        found.sum().backward()
        return samples, None


class FromJax(Differentiating):
    framework = "jax"

    def run(self, logits: np.ndarray, cost: Rung, seed: int, weights: bool = False) -> tuple[Any, Any, Any]:
        import jax

        def value(theta: Any, a: Any) -> tuple[Any, Any]:
            d = self.fn(theta, key)
            _check_sample(self.title, d, theta)
            with cost.watched(a):
                return cost(d).sum(), d

        with _double(jax):
            key, theta = jax.random.PRNGKey(seed), jax.numpy.asarray(logits)
            a = jax.numpy.asarray(cost.a.astype(logits.dtype))
            (_, d), (g, da) = jax.value_and_grad(value, (0, 1), has_aux=True)(theta, a)
        return np.asarray(d), np.asarray(g), np.asarray(da)


class FromJaxGradient(Differentiating):
    framework = "jax"

    def run(self, logits: np.ndarray, cost: Rung, seed: int, weights: bool = False) -> tuple[Any, Any, Any]:
        import jax

        with _double(jax):
            found = self.fn(jax.numpy.asarray(logits), cost, jax.random.PRNGKey(seed))
        if not isinstance(found, tuple) or len(found) != 2:
            raise ConformanceError(f"{self.title} must return (samples, gradient), got {described(found)}.")
        samples, g = found
        return samples, g, None


class FromEstimator(Differentiating):
    """One of ours. Each call begins with the state in which it was handed over."""

    framework = "minigrad"

    def __init__(self, estimator: Estimator, title: str) -> None:
        super().__init__(estimator, title)
        self.estimator, self.logit_scale = estimator, estimator.logit_scale
        self.exact_for = estimator.exact_for if estimator.support == "hard" else None  # else for its own relaxed cost

    def run(
        self, logits: np.ndarray, cost: Rung, seed: int, weights: bool = False, noise: Given | None = None
    ) -> tuple[Any, Any, Any]:
        """noise: in place of what the seed gives"""
        theta, estimator = Tensor(logits, requires_grad=True), copy.deepcopy(self.estimator)
        a = Tensor(cost.a.astype(logits.dtype), requires_grad=True) if weights else None
        with cost.watched(a) as points:
            value = estimator(theta, cost, Rng(seed) if noise is None else noise)
            if value.requires_grad:
                value.sum().backward()
        g = np.zeros_like(logits) if theta.grad is None else np.array(theta.grad)
        return self._samples(points, logits.shape), g, None if a is None else a.grad

    def exact(self, rung: Rung) -> np.ndarray:
        """Of a bound of several samples, −E log mean e^(−f), by enumeration of all S-tuples."""
        if not self.estimator.multi_sample:
            return super().exact(rung)
        S, outcomes = self.estimator.sample_count, rung.family.outcomes((1, *rung.shape))
        check_outcomes(S, len(outcomes))
        p = rung.family.probability(rung.logits[None])
        q, f = rung.family.outcome_probability(p, outcomes)[0], rung.values(outcomes)
        tuples = np.array(list(itertools.product(range(len(q)), repeat=S)))
        weight = q[tuples].prod(axis=1) * -np.log(np.exp(-f[tuples]).mean(axis=1))
        score = (outcomes - p)[tuples].sum(axis=1)
        return np.tensordot(weight, score, axes=1)

    def _samples(self, points: list[Tensor], shape: tuple[int, ...]) -> np.ndarray | None:
        """It evaluates the cost at its samples before it does elsewhere."""
        if self.estimator.randomness == "none":
            return None
        rows = np.concatenate([p.data for p in points])[: self.estimator.sample_count * shape[0]]
        return rows.reshape(-1, *shape) if self.estimator.sample_count > 1 else rows


def _double(jax: Any) -> Any:
    """float64 while it lasts; releases before 0.8 have it elsewhere."""
    return jax.enable_x64(True) if hasattr(jax, "enable_x64") else jax.experimental.enable_x64(True)


def _array(x: Any) -> Any:
    return x.detach().cpu().numpy() if hasattr(x, "detach") else x


def _check_sample(title: str, d: Any, theta: Any) -> None:
    if getattr(d, "shape", None) != theta.shape:
        raise ConformanceError(
            f"{title} must return a sample shaped like the logits, {tuple(theta.shape)}, got {described(d)}."
        )


def described(x: Any) -> str:
    """What somebody returned, in a sentence."""
    shape = getattr(x, "shape", None)
    return "None" if x is None else f"a {type(x).__name__}" if shape is None else f"{x.dtype} {tuple(shape)}"


def from_torch(sampler: Callable, title: str | None = None) -> Adapter:
    """sampler(logits) -> a sample shaped like the logits, through which gradients go back to them. Its noise is that of
    PyTorch's global generator, which gets a seed before each call. ConformanceError, when called, for anything else."""
    return FromTorch(sampler, title)


def from_torch_gradient(fn: Callable, title: str | None = None) -> Adapter:
    """fn(logits, cost) -> a surrogate loss, (N,) or a scalar, or a gradient shaped like the logits; or (samples, one of
    these). Without samples, they are what the cost was first evaluated at."""
    return FromTorchGradient(fn, title)


def from_jax(sampler: Callable, title: str | None = None) -> Adapter:
    """sampler(logits, key) -> a sample shaped like the logits, through which gradients go back to them."""
    return FromJax(sampler, title)


def from_jax_gradient(fn: Callable, title: str | None = None) -> Adapter:
    """fn(logits, cost, key) -> (samples, gradient), arrays shaped like the logits."""
    return FromJaxGradient(fn, title)


def from_estimator(estimator: str | Estimator, family: str | None = None) -> FromEstimator:
    """One of this repository: its name with options, as for `create`, or an instance. SettingError for others."""
    if isinstance(estimator, str):
        return FromEstimator(create(estimator, family=family), estimator)
    return FromEstimator(estimator, estimator.title or type(estimator).__name__)
