"""One variable of four classes, or two bits: their logits, a cost, samples, and what a rule makes of them."""

import numpy as np

from minigrad import Rng, Tensor
from minigrad.fused import softmax_array, softmax_vjp

N = 200_000
THETA = np.array([0.4, -0.6, 0.9, 0.1])
WEIGHT = np.array([1.0, -2.0, 0.5, 0.3])


def one_cost(d):
    """A cubic cost for one-hots of four classes or for bits."""
    weight = WEIGHT[: d.shape[-1]]
    return ((d * weight).sum(axis=tuple(range(1, d.ndim))) + 0.5) ** 3.0


def dcost(d):
    """∇f of f(d) = (d·w + ½)³, which differs from sample to sample."""
    return 3 * ((d @ WEIGHT + 0.5) ** 2)[:, None] * WEIGHT


def true_gradient():
    return softmax_vjp(softmax_array(THETA), (WEIGHT + 0.5) ** 3)


def logits_of(family, batch, dtype=np.float64):
    theta = THETA if family == "categorical" else THETA[:2]
    shape = (batch, 1, 4) if family == "categorical" else (batch, 2)
    return Tensor(np.broadcast_to(theta, shape).astype(dtype), requires_grad=True)


def drawn(rng):
    """The logits N times, Gumbel noise and the classes that it draws."""
    logits = np.broadcast_to(THETA, (N, 4))
    gumbel = rng.gumbel(size=(N, 4))
    return logits, gumbel, np.eye(4)[(logits + gumbel).argmax(axis=-1)]


def samples(n=500, k=4, seed=0):
    """A generator, and n different logits, classes drawn from them, and cotangents."""
    rng = np.random.default_rng(seed)
    logits = 1.5 * rng.standard_normal((n, k))
    d = np.eye(k)[(logits + rng.gumbel(size=(n, k))).argmax(axis=-1)]
    return rng, logits, d, rng.standard_normal((n, k))


def rule(op, *arrays, g, **settings):
    """What an estimator's rule passes back to the logits."""
    _, backward = op.rule(*arrays, **settings)
    d = backward(g)
    d = d[0] if isinstance(d, tuple) else d
    return d() if callable(d) else d


# ---- what a rule is given by its estimator: a sample, or noise

hard = lambda x, r: r.one_hot(x.data)
bit = lambda x, r: r.bernoulli(x.data)
gumbel = lambda x, r: r.gumbel(x.shape, like=x.data)
logistic = lambda x, r: r.logistic(x.shape, like=x.data)
three = lambda x, r: r.site("conditional").exponential((3, *x.shape), like=x.data)


def assert_draws_alike(sample, expected, family):
    """Both give the same sample at the same address, and pass the same gradients back."""
    found = []
    for draw in (sample, expected):
        logits = logits_of(family, 20)
        d = draw(logits, Rng(3))
        d.backward(np.sin(np.arange(d.size, dtype=float)).reshape(d.shape))
        found.append([d.data, logits.grad])
    np.testing.assert_array_equal(found[0], found[1])
