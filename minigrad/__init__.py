"""minigrad: a small reverse-mode automatic differentiation engine in which every rule can be read and checked.

    from minigrad import Tensor
    x = Tensor([1.0, 2.0], requires_grad=True)
    (x * x).sum().backward()
    x.grad                                        # array([2., 4.])

`minigrad.ops`, `minigrad.fused`, `minigrad.convolution` and `minigrad.hard` hold the rules, `minigrad.check` verifies
them, `minigrad.nn` and `minigrad.optim` train with them. The engine itself is `minigrad.tensor`.
"""

from . import backend, check, checkpoint, convolution, fused, hard, nn, ops, optim, random
from .backend import get_backend
from .random import Rng
from .tensor import Tensor, enable_grad, grad, no_grad, op

__version__ = "0.1.0"
__all__ = [
    "Rng",
    "Tensor",
    "backend",
    "check",
    "checkpoint",
    "convolution",
    "enable_grad",
    "fused",
    "get_backend",
    "grad",
    "hard",
    "nn",
    "no_grad",
    "op",
    "ops",
    "optim",
    "random",
]
