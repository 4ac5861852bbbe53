"""First-order optimizers over one flat buffer.

All parameters of a model are moved into one array and become views of it, and so do their gradients: the rules of
`linear` write their matrix products straight into it. An update is then a dozen passes over two long arrays, whatever
the number of layers. On NumPy the passes run over blocks that fit the second-level cache; on a GPU over everything.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from .backend import Array, array_module, asarray_like, to_host
from .checkpoint import StateError
from .tensor import Tensor, mark_updated

_BLOCK = 65536  # elements: the two or three arrays of a pass stay in a second-level cache, and the calls are few


class FlatBuffer:
    """`data` and `grad` (n,): the parameters side by side. Each parameter's `.data` becomes a view of `data`, and its
    gradient is written into a view of `grad`. The parameters must be leaves that require a gradient, of one dtype and
    on one device (ValueError)."""

    def __init__(self, parameters: list[Tensor]) -> None:
        if not parameters:
            raise ValueError("an optimizer needs at least one parameter: pass model.parameters().")
        if not all(isinstance(p, Tensor) and p.requires_grad and p.node is None for p in parameters):
            raise ValueError("an optimizer trains leaf Tensors that require a gradient: make them with nn.parameter.")
        if len({(p.data.dtype.str, type(p.data)) for p in parameters}) > 1:
            raise ValueError("the parameters have different dtypes or devices: convert them to one first.")
        first = parameters[0].data
        self.parameters = parameters
        self.data = array_module(first).concatenate([p.data.reshape(-1) for p in parameters])
        self.grad = array_module(first).zeros_like(self.data)
        start = 0
        for p in parameters:
            part = slice(start, start + p.size)
            p.data, p.grad_buffer, p.grad = self.data[part].reshape(p.shape), self.grad[part].reshape(p.shape), None
            start = part.stop
        self._views: list[tuple[Any, Any]] = [(p.data, p.grad_buffer) for p in parameters]

    def __reduce__(self) -> tuple:
        """For `copy.deepcopy` and `pickle`: made anew from the copies of the parameters, whose arrays become views."""
        return FlatBuffer, (self.parameters,), [p.grad for p in self.parameters]

    def __setstate__(self, grads: list[Array | None]) -> None:
        for p, g in zip(self.parameters, grads, strict=True):
            p.grad = g

    def zero_grad(self) -> None:
        """Forget the gradients. Nothing is cleared: the next backward pass overwrites."""
        for p in self.parameters:
            p.grad = None

    def collect_gradients(self) -> None:
        """A parameter that no gradient reached has gradient 0; one that was set by hand is copied to its place.
        ValueError if that has another shape. RuntimeError if another optimizer was made for these parameters since, or
        one was given another array."""
        for p, (data, buffer) in zip(self.parameters, self._views, strict=True):
            if p.grad_buffer is not None and id(p.grad_buffer) != id(buffer):  # `Module.to` leaves none
                raise RuntimeError("a parameter has gone over to an optimizer that was made later: step that one.")
            if p.data is not data:
                raise RuntimeError("a parameter's .data was replaced: write into it, or make the optimizer afterwards.")
            if p.grad is not buffer:
                if p.grad is not None and p.grad.shape != p.shape:
                    raise ValueError(f"a gradient that was set has the shape {p.grad.shape}, its parameter {p.shape}.")
                buffer[...] = 0.0 if p.grad is None else p.grad
                p.grad = buffer


class Optimizer:
    """Base class: `zero_grad()`, a backward pass, `step()`.

    lr: positive and finite (ValueError).  `steps` counts the updates; `state` names the arrays that belong to the
    optimizer (each of the flat length).

    A subclass names its arrays with `_add_state`, and defines `coefficients()`, the numbers of this step, and
    `update(parameters, gradients, *state, scratch, *coefficients)`, which updates one block in place.
    """

    def __init__(self, parameters: Iterable[Tensor], lr: float) -> None:
        if not (math.isfinite(lr) and lr > 0):
            raise ValueError(f"the learning rate must be positive and finite, got {lr}.")
        self.flat = FlatBuffer(list(parameters))
        self.lr, self.steps = lr, 0
        self.state: dict[str, Array] = {}
        on_cpu = array_module(self.flat.data) is np
        self._block = max(1, min(_BLOCK, self.flat.data.size) if on_cpu else self.flat.data.size)
        self._scratch = array_module(self.flat.data).empty_like(self.flat.data[: self._block])

    def _add_state(self, name: str) -> None:
        self.state[name] = array_module(self.flat.data).zeros_like(self.flat.data)

    def zero_grad(self) -> None:
        """Forget the gradients; to be called before each backward pass, which adds to what it finds."""
        self.flat.zero_grad()

    def step(self) -> None:
        """Update all parameters from their gradients. Graphs that were built before cannot be differentiated then."""
        self.flat.collect_gradients()
        self.steps += 1
        coefficients = self.coefficients()
        n, arrays = self.flat.data.size, (self.flat.data, self.flat.grad, *self.state.values())
        for start in range(0, n, self._block):
            part = slice(start, min(start + self._block, n))
            self.update(*(a[part] for a in arrays), self._scratch[: part.stop - start], *coefficients)
        mark_updated(self.flat.parameters)

    def coefficients(self) -> tuple:
        """The numbers that all blocks of this step share."""
        raise NotImplementedError

    def update(self, *arrays: Any) -> None:
        """Update one block in place."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, np.ndarray]:
        """The state on the host, with the step count as an array of one integer."""
        return {"steps": np.array([self.steps])} | {k: np.array(to_host(v)) for k, v in self.state.items()}

    def load_state_dict(self, state: dict[str, np.ndarray]) -> None:
        """StateError if the state belongs to another optimizer or model."""
        if state.keys() != self.state.keys() | {"steps"}:
            raise StateError(
                "the saved optimizer state belongs to another optimizer: make the one that it was saved from."
            )
        for name, array in self.state.items():
            if state[name].shape != array.shape or state[name].dtype != array.dtype:
                raise StateError(
                    "the saved optimizer state belongs to another model: build the one that it was saved from."
                )
        if state["steps"].shape != (1,):
            raise StateError(
                "the saved optimizer state has no count of steps: load one that was saved by state_dict()."
            )
        for name, array in self.state.items():
            array[...] = asarray_like(state[name], array)
        self.steps = int(state["steps"][0])


class SGD(Optimizer):
    """v ← μ v + g,  θ ← θ − α v  (μ = momentum; Sutskever et al. 2013 in PyTorch's form).   0 ≤ μ < 1 (ValueError)."""

    def __init__(self, parameters: Iterable[Tensor], lr: float, momentum: float = 0.0) -> None:
        super().__init__(parameters, lr)
        if not 0.0 <= momentum < 1.0:
            raise ValueError(f"momentum must be at least 0 and below 1, got {momentum}.")
        self.momentum = momentum
        if momentum:
            self._add_state("velocity")

    def coefficients(self) -> tuple:
        return ()

    def update(self, theta: Array, g: Array, *arrays: Array) -> None:
        *velocity, scratch = arrays
        for v in velocity:  # one, or none without momentum
            v *= self.momentum
            v += g
            g = v
        array_module(theta).multiply(g, self.lr, out=scratch)
        theta -= scratch


class Adam(Optimizer):
    """Kingma & Ba 2015, algorithm 1.

        m ← β₁ m + (1−β₁) g      v ← β₂ v + (1−β₂) g²      θ ← θ − α m̂ / (√v̂ + ε)
        m̂ = m / (1−β₁ᵗ)          v̂ = v / (1−β₂ᵗ)

    The state holds M = m/(1−β₁) and V = v/(1−β₂), whose updates M ← β₁M + g, V ← β₂V + g² need fewer passes. With
    s² = (1−β₂)/(1−β₂ᵗ), so that √v̂ = s√V, the step is  ρ M / (√V + ε/s),  ρ = α (1−β₁)/((1−β₁ᵗ) s):  ten passes.

    0 ≤ β < 1, ε > 0 and finite (ValueError).
    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        super().__init__(parameters, lr)
        if len(betas) != 2 or not all(0.0 <= beta < 1.0 for beta in betas):
            raise ValueError(f"betas must be two numbers from 0 to below 1, got {betas}.")
        if not (math.isfinite(eps) and eps > 0):
            raise ValueError(f"eps must be positive and finite, got {eps}.")
        self.betas, self.eps = betas, eps
        self._add_state("M")
        self._add_state("V")

    def coefficients(self) -> tuple:
        """ρ and ε/s."""
        return self._rate_and_eps(self.lr)

    def _rate_and_eps(self, lr: float) -> tuple[float, float]:
        beta1, beta2 = self.betas
        s = math.sqrt((1.0 - beta2) / (1.0 - beta2**self.steps))
        return lr * (1.0 - beta1) / (1.0 - beta1**self.steps) / s, self.eps / s

    def update(self, theta: Array, g: Array, M: Array, V: Array, scratch: Array, rate: float, eps: float) -> None:
        xp = array_module(theta)
        self._add_to_moments(g, M, V, scratch)
        xp.sqrt(V, out=scratch)
        scratch += eps
        xp.divide(M, scratch, out=scratch)
        scratch *= rate
        theta -= scratch

    def _add_to_moments(self, g: Array, M: Array, V: Array, scratch: Array) -> None:
        beta1, beta2 = self.betas
        M *= beta1
        M += g
        array_module(g).multiply(g, g, out=scratch)
        V *= beta2
        V += scratch


class RAdam(Adam):
    """Rectified Adam (Liu et al. 2020, algorithm 2): Adam's step times the rectification rₜ once the variance of the
    adaptive rate is tractable (ρₜ > 5, as in PyTorch; the paper says 4), and momentum alone before.
    ε is added to √v̂, as in Adam; PyTorch's RAdam adds it to √v.

        ρ∞ = 2/(1−β₂) − 1      ρₜ = ρ∞ − 2tβ₂ᵗ/(1−β₂ᵗ)      rₜ² = (ρₜ−4)(ρₜ−2)ρ∞ / ((ρ∞−4)(ρ∞−2)ρₜ)
    """

    def coefficients(self) -> tuple:
        """As Adam's; ε/s is None for a step of momentum alone."""
        (beta1, beta2), t = self.betas, self.steps
        rho_inf = 2.0 / (1.0 - beta2) - 1.0
        rho = rho_inf - 2.0 * t * beta2**t / (1.0 - beta2**t)
        if rho <= 5.0:
            return self.lr * (1.0 - beta1) / (1.0 - beta1**t), None
        r = math.sqrt((rho - 4.0) * (rho - 2.0) * rho_inf / ((rho_inf - 4.0) * (rho_inf - 2.0) * rho))
        return self._rate_and_eps(self.lr * r)

    def update(
        self, theta: Array, g: Array, M: Array, V: Array, scratch: Array, rate: float, eps: float | None
    ) -> None:
        if eps is not None:
            super().update(theta, g, M, V, scratch, rate, eps)
        else:
            self._add_to_moments(g, M, V, scratch)
            array_module(theta).multiply(M, rate, out=scratch)
            theta -= scratch


OPTIMIZERS: dict[str, type[Optimizer]] = {"sgd": SGD, "adam": Adam, "radam": RAdam}


def clip_grad_norm(optimizer: Optimizer, max_norm: float) -> Array:
    """Scale all gradients so that their joint Euclidean norm is at most `max_norm`; returns the norm before.

    Call it between backward() and step(). The norm is a 0-d array: nothing is sent to the host (Pascanu et al. 2013).
    ValueError unless `max_norm` is positive.
    """
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"clip_grad_norm takes the optimizer, got {type(optimizer).__name__}.")
    if not max_norm > 0:
        raise ValueError(f"max_norm must be positive, got {max_norm}.")
    flat = optimizer.flat
    flat.collect_gradients()
    xp = array_module(flat.grad)
    norm = xp.sqrt(flat.grad @ flat.grad)
    flat.grad *= xp.minimum(max_norm / (norm + 1e-6), 1.0).astype(flat.grad.dtype)
    return norm


class Plateau:
    """Multiply the learning rate by `factor` when a metric has not improved for more than `patience` reports.

    `step(metric)` after each report; larger is better.  An improvement exceeds the best one by 1e-4 of it, as in
    PyTorch's ReduceLROnPlateau.   0 < factor < 1, patience ≥ 0 (ValueError)
    """

    def __init__(self, optimizer: Optimizer, factor: float = 0.5, patience: int = 4) -> None:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"Plateau changes the learning rate of an optimizer, got {type(optimizer).__name__}.")
        if not (0.0 < factor < 1.0 and patience >= 0):
            raise ValueError(f"factor must be in (0, 1) and patience at least 0, got {factor} and {patience}.")
        self.optimizer, self.factor, self.patience = optimizer, factor, patience
        self.best, self.waited = -math.inf, 0

    def step(self, metric: float) -> bool:
        """Whether the metric is the best so far; NaN never is."""
        metric = float(metric)
        if metric > self.best + (1e-4 * abs(self.best) if math.isfinite(self.best) else 0.0):
            self.best, self.waited = metric, 0
            return True
        self.waited += 1
        if self.waited > self.patience:
            self.optimizer.lr, self.waited = self.optimizer.lr * self.factor, 0
        return False

    def state_dict(self) -> dict[str, np.ndarray]:
        """As arrays on the host, the learning rate among them."""
        return {"plateau": np.array([self.best, self.waited, self.optimizer.lr])}

    def load_state_dict(self, state: dict[str, np.ndarray]) -> None:
        """StateError if the state is not that of a plateau schedule."""
        if state.keys() != {"plateau"} or state["plateau"].shape != (3,):
            raise StateError(
                "the saved schedule is not a plateau schedule: load one that was saved by its state_dict()."
            )
        self.best, waited, self.optimizer.lr = map(float, state["plateau"])
        self.waited = int(waited)
