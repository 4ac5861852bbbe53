"""Parameters that an estimator trains by itself: a baseline's weights, the scale of a control variate, a temperature.

An estimator works out the gradient of its own objective (its variance, or the error of its baseline) while it
estimates, and hands it over; the step is taken in `update`. Nothing of this touches the model's parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from minigrad import Tensor
from minigrad.backend import Array, asarray_like
from minigrad.checkpoint import StateError
from minigrad.kernels import inner
from minigrad.optim import Adam

from .base import LEARNED, check_number


class Learned:
    """Named arrays with an Adam of their own. They are made at the first use, when sizes, dtype and device are known.

    lr: the learning rate, from 1e-12 to 1 (ValueError).
    """

    _optimizer: Adam  # made together with the parameters

    def __init__(self, lr: float) -> None:
        self.lr = check_number("the estimator's own learning rate lr", lr, 1e-12, 1.0)
        self.parameters: dict[str, Tensor] = {}
        self._gradients: dict[str, Array] | None = None
        self._loaded: dict[str, np.ndarray] | None = None

    def start(self, initial: Callable[[], dict[str, Any]], like: Array) -> None:
        """Make the parameters, if there are none yet: `initial()` names host arrays or numbers; `like` has the dtype
        and the device."""
        if self.parameters:
            return
        for name, value in initial().items():
            host = np.array(value, dtype=like.dtype, ndmin=1)
            self.parameters[name] = Tensor(asarray_like(host, like), requires_grad=True)
        self._optimizer = Adam(self.parameters.values(), self.lr)
        if self._loaded is not None:
            loaded, self._loaded = self._loaded, None
            self.load_state_dict(loaded)

    def __getitem__(self, name: str) -> Array:
        return self.parameters[name].data

    def learn(self, gradients: dict[str, Array]) -> None:
        """Gradients of the estimator's own objective, arrays shaped like the parameters, for the next `step`; what
        comes after the first ones is not taken."""
        if self._gradients is None:
            self._gradients = gradients

    def step(self) -> None:
        """Descend once along the gradients; without new ones nothing happens."""
        if self._gradients is None:
            return
        for name, p in self.parameters.items():
            p.grad = self._gradients[name].reshape(p.shape)
        self._optimizer.step()
        self._gradients = None

    def __getstate__(self) -> tuple[Any, ...]:
        """For `copy` and `pickle`: the arrays, from which the optimizer is made anew, since it owns what it updates."""
        like = next((p.data for p in self.parameters.values()), None)
        return self.lr, like, self.state_dict(), self._gradients

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        lr, like, saved, gradients = state
        Learned.__init__(self, lr)
        self._loaded = saved or None
        if like is not None:
            names = [name.removeprefix(LEARNED) for name in saved if not name.startswith(LEARNED + "optimizer.")]
            self.start(lambda: {name: saved[LEARNED + name] for name in names}, like)
        self._gradients = gradients

    def state_dict(self) -> dict[str, np.ndarray]:
        """The parameters and their optimizer's state, on the host; empty before the first use."""
        if not self.parameters:
            return dict(self._loaded or {})
        state = {name: np.array(p.numpy()) for name, p in self.parameters.items()}
        state |= {f"optimizer.{name}": value for name, value in self._optimizer.state_dict().items()}
        return {LEARNED + name: value for name, value in state.items()}

    def load_state_dict(self, state: dict[str, np.ndarray]) -> None:
        """What waits for the next `step` is forgotten. Before the first use the state is kept until then.

        StateError if it belongs to another estimator.
        """
        self._gradients = None
        if not state:  # saved before the first use: as if nothing had been learned
            self.parameters, self._loaded = {}, None
            return
        if not self.parameters:
            self._loaded = dict(state)
            return
        state = {name.removeprefix(LEARNED): value for name, value in state.items()}
        if {name: value.shape for name, value in state.items() if "optimizer." not in name} != {
            name: p.shape for name, p in self.parameters.items()
        }:
            raise StateError("the saved state belongs to another estimator: load it into one made as that was.")
        for name, p in self.parameters.items():
            p.data[...] = asarray_like(state[name], p.data)
        self._optimizer.load_state_dict(
            {name.removeprefix("optimizer."): value for name, value in state.items() if name.startswith("optimizer.")}
        )


def squared_norm_gradient(g: Array) -> Array:
    """2 g / B: the cotangent with which every parameter learns to lower the mean over the batch of ‖g‖².

    The estimate is unbiased whatever a control variate's parameters are, so E‖g‖² and its variance have the same
    derivative, and one sample's ‖g‖² is an unbiased estimate of it (Tucker et al. 2017; Grathwohl et al. 2018).
    """
    return g * (2.0 / len(g))


def dot(a: Array, b: Array) -> Array:
    """Σ a b for each example: (B, ...), (B, ...) -> (B,)"""
    return inner(a.reshape(len(a), -1), b.reshape(len(b), -1))
