"""One line per op: its name, inputs and settings. Every op in minigrad and in the estimators has at least one."""

import numpy as np

import estimators.base
import estimators.darn
import estimators.gapped
import estimators.gumbel_rao
import estimators.gumbel_softmax
import estimators.reinmax
import estimators.reinmax_variants
import estimators.straight_through
import estimators.units
import estimators.zgr
from estimators import bernoulli
from minigrad import convolution, fused, hard, ops
from models.spiking import RESETS, integrate_and_fire

_rng = np.random.default_rng(20)


def normal(*shape):
    return _rng.standard_normal(shape)


def positive(*shape):
    return np.exp(_rng.standard_normal(shape) / 2)


def separated(*shape):
    """Values at least 0.1 apart and away from 0: no maximum, ReLU or absolute value is near its kink."""
    n = int(np.prod(shape))
    return (_rng.permutation(n) - n // 2 + 0.5).reshape(shape) * 0.2


def booleans(*shape):
    return _rng.random(shape) < 0.6


def integers(high, *shape):
    return _rng.integers(0, high, shape)


def onehots(*shape):
    return np.eye(shape[-1])[integers(shape[-1], *shape[:-1])]


def bits(*shape):
    return integers(2, *shape).astype(float)


def exponentials(*shape):
    return _rng.exponential(size=shape)


CASES = [
    (ops.add, (normal(2, 3), normal(3)), {}),
    (ops.add, (normal(2, 1, 3), normal(4, 1)), {}),
    (ops.subtract, (normal(3), normal(2, 3)), {}),
    (ops.subtract, (normal(2, 3), normal()), {}),
    (ops.multiply, (normal(2, 3), normal(2, 3)), {}),
    (ops.multiply, (normal(4, 1), normal(3)), {}),
    (ops.divide, (normal(2, 3), positive(2, 1)), {}),
    (ops.power, (positive(2, 3), normal(3)), {}),
    (ops.negative, (normal(3),), {}),
    (ops.exp, (normal(2, 3),), {}),
    (ops.log, (positive(2, 3),), {}),
    (ops.sqrt, (positive(2, 3),), {}),
    (ops.tanh, (normal(2, 3),), {}),
    (ops.sigmoid, (3 * normal(2, 3),), {}),
    (ops.softplus, (3 * normal(2, 3),), {}),
    (ops.relu, (separated(3, 4),), {}),
    (ops.leaky_relu, (separated(3, 4),), {"slope": 0.2}),
    (ops.absolute, (separated(3, 4),), {}),
    (ops.maximum, (separated(3, 4), separated(4) + 0.05), {}),
    (ops.minimum, (separated(3, 4), separated(4) + 0.05), {}),
    (ops.clip, (separated(3, 4),), {"low": -0.6, "high": 0.8}),
    (ops.where, (booleans(2, 3), normal(2, 3), normal(3)), {}),
    (ops.dropout, (normal(2, 5), booleans(2, 5)), {"rate": 0.4}),
    (ops.sum, (normal(2, 3),), {}),
    (ops.sum, (normal(2, 3, 4),), {"axis": (0, -1)}),
    (ops.sum, (normal(2, 3),), {"axis": 1, "keepdims": True}),
    (ops.mean, (normal(2, 3),), {}),
    (ops.mean, (normal(2, 3, 4),), {"axis": 1}),
    (ops.max, (separated(2, 3),), {}),
    (ops.max, (separated(2, 3, 4),), {"axis": -1}),
    (ops.max, (separated(2, 3),), {"axis": 0, "keepdims": True}),
    (ops.logsumexp, (normal(2, 3),), {}),
    (ops.logsumexp, (normal(2, 3, 4),), {"axis": (0, 2)}),
    (ops.logsumexp, (normal(2, 3),), {"axis": 1, "keepdims": True}),
    (ops.cumsum, (normal(2, 4),), {}),
    (ops.cumsum, (normal(3, 2),), {"axis": 0}),
    (ops.matmul, (normal(2, 3), normal(3, 4)), {}),
    (ops.matmul, (normal(5, 2, 3), normal(5, 3, 4)), {}),
    (ops.matmul, (normal(2, 1, 2, 3), normal(5, 3, 4)), {}),
    (ops.matmul, (normal(3), normal(3, 4)), {}),
    (ops.matmul, (normal(2, 3), normal(3)), {}),
    (ops.matmul, (normal(5, 2, 3), normal(3)), {}),
    (ops.matmul, (normal(3), normal(5, 3, 4)), {}),
    (ops.matmul, (normal(3), normal(3)), {}),
    (ops.reshape, (normal(2, 6),), {"shape": (3, -1)}),
    (ops.transpose, (normal(2, 3, 4),), {}),
    (ops.transpose, (normal(2, 3, 4),), {"axes": (1, 2, 0)}),
    (ops.concat, (normal(2, 3), normal(2, 1), normal(2, 2)), {"axis": 1}),
    (ops.stack, (normal(2, 3), normal(2, 3)), {"axis": 1}),
    (ops.stack, (normal(2, 3), normal(2, 3)), {"axis": -1}),
    (ops.split, (normal(2, 6),), {"sections": 3, "axis": 1}),
    (ops.getitem, (normal(4, 3, 2),), {"key": (slice(1, 3), 2)}),
    (ops.getitem, (normal(4, 3),), {"key": (Ellipsis, None, -1)}),
    (ops.getitem, (normal(4, 3),), {"key": np.array([1, 1, 3])}),
    (ops.gather, (normal(4, 3), integers(3, 4, 5)), {"axis": 1}),
    (ops.gather, (normal(4, 3), integers(4, 6, 3)), {"axis": 0}),
    (ops.take, (normal(4, 3), np.array([[0, 2], [2, 2]])), {"axis": 0}),
    (ops.take, (normal(2, 5), np.array([4, 4, 1])), {"axis": 1}),
    (fused.softmax, (normal(2, 3),), {}),
    (fused.softmax, (normal(2, 40),), {}),
    (fused.softmax, (normal(3),), {}),  # one row: its transpose is contiguous already, and must be copied all the same
    (fused.kl_to_uniform, (normal(1, 4),), {}),
    (fused.log_softmax, (normal(2, 3),), {}),
    (fused.mask_logits, (normal(2, 3), np.array([[True, False, True], [True, True, True]])), {}),
    (fused.kl_to_uniform, (normal(2, 3, 4),), {}),
    (fused.kl_to_fair_coin, (2 * normal(2, 3),), {}),
    (fused.kl_to_standard_normal, (normal(2, 3), normal(2, 3)), {}),
    (fused.cross_entropy, (normal(5, 3), integers(3, 5)), {}),
    (fused.bce_with_logits, (3 * normal(2, 4), _rng.random((2, 4))), {}),
    (fused.bce_with_logits, (normal(3, 2, 4), _rng.random((2, 4))), {}),
    (fused.linear, (normal(4, 3), normal(3, 2), normal(2)), {}),
    (fused.linear, (normal(2, 2, 3), normal(3, 2), normal(2)), {}),
    (fused.linear_relu, (normal(4, 3), normal(3, 5), normal(5)), {}),
    (fused.embedding, (normal(5, 3), np.array([[0, 4], [4, 2]])), {}),
    (fused.embedding, (normal(1030, 2), np.array([7, 7, 1029])), {}),
    (fused.lstm_cell, (normal(2, 12), normal(2, 3)), {}),
    (fused.tree_lstm_cell, (normal(2, 15), normal(2, 3), normal(2, 3)), {}),
    (fused.tree_lstm_cell, (normal(2, 4, 10), normal(2, 4, 2), normal(2, 4, 2)), {}),
    (fused.lstm, (normal(3, 2, 4), normal(4, 8), normal(2, 8), normal(8)), {}),
    (fused.lstm, (normal(1, 2, 3), normal(3, 4), normal(1, 4), normal(4)), {}),
    (convolution.conv2d, (normal(2, 3, 5, 4), normal(3, 3, 2, 4), normal(4)), {}),
    (convolution.conv2d, (normal(2, 1, 6, 5), normal(1, 2, 3, 2), normal(2)), {"stride": 2, "padding": 1}),
    (convolution.max_pool2d, (normal(2, 3, 4, 6),), {}),
    (convolution.max_pool2d, (normal(2, 1, 5, 6),), {"size": 3, "stride": 1}),
    (convolution.avg_pool2d, (normal(2, 3, 4, 7),), {}),
    (convolution.avg_pool2d, (normal(2, 1, 7, 6),), {"size": 3, "stride": 2}),
]

# estimators and hard functions: the rule is not the derivative of its own output, so it is held against the surrogate
# that it declares
ESTIMATOR_CASES = [
    (estimators.straight_through.straight_through, (normal(2, 3, 4), onehots(2, 3, 4)), {"tau": 0.7}),
    (estimators.gumbel_softmax.gumbel_softmax, (normal(2, 4), normal(2, 4)), {"tau": 0.7}),
    (estimators.gumbel_softmax.st_gumbel_softmax, (normal(2, 4), normal(2, 4)), {"tau": 0.7}),
    (estimators.gumbel_rao.gumbel_rao, (normal(2, 4), onehots(2, 4), exponentials(5, 2, 4)), {"tau": 0.7}),
    (estimators.gapped.gapped_straight_through, (normal(2, 4), onehots(2, 4)), {"tau": 0.7, "gap": 1.0}),
    (estimators.gapped.gapped_straight_through, (normal(2, 4), onehots(2, 4)), {"tau": 0.7, "gap": "p"}),
    (estimators.reinmax.reinmax, (normal(2, 4), onehots(2, 4)), {"tau": 1.3}),
    (estimators.zgr.zgr, (normal(2, 4), onehots(2, 4)), {}),
    (estimators.gapped.gapped_straight_through, (normal(2, 4), onehots(2, 4)), {"gap": 0.5, "detached": False}),
    (estimators.gapped.gapped_straight_through, (normal(2, 4), onehots(2, 4)), {"tau": 0.7, "consistent": False}),
    (estimators.straight_through.straight_through, (normal(2, 3), bits(2, 3)), {"tau": 0.7, "family": bernoulli}),
    (estimators.straight_through.identity_straight_through, (normal(2, 3), bits(2, 3)), {}),
    (estimators.straight_through.hard_sigmoid_straight_through, (0.3 * normal(2, 3), bits(2, 3)), {"slope": 1.5}),
    (estimators.gumbel_softmax.gumbel_softmax, (normal(2, 4), normal(2, 4)), {"tau": 0.7, "family": bernoulli}),
    (estimators.gumbel_softmax.st_gumbel_softmax, (normal(2, 4), normal(2, 4)), {"tau": 0.7, "family": bernoulli}),
    (estimators.gumbel_softmax.decoupled_st_gumbel_softmax, (normal(2, 4), normal(2, 4)), {"tau_f": 1.6, "tau_b": 0.7}),
    (estimators.reinmax.reinmax, (normal(2, 4), bits(2, 4)), {"tau": 1.3, "family": bernoulli}),
    (estimators.zgr.zgr, (normal(2, 4), bits(2, 4)), {"family": bernoulli}),
    (estimators.darn.darn, (normal(2, 4), bits(2, 4)), {}),
    (estimators.units.stochastic_times_smooth, (normal(2, 4), bits(2, 4)), {}),
    (estimators.units.noisy_rectifier, (separated(3, 4), 0.01 * normal(3, 4)), {}),
    (estimators.reinmax_variants.reinmax_rao, (normal(2, 4), onehots(2, 4), exponentials(5, 2, 4)), {"tau": 0.7}),
    (
        estimators.reinmax_variants.reinmax_cv,
        (normal(2, 4), onehots(2, 4), exponentials(5, 2, 4), normal(2, 4)),
        {"tau": 0.7, "scale": 0.8},
    ),
    (estimators.base.attach_gradient, (normal(3), normal(3, 2, 4), normal(3, 2, 4)), {}),
    *[(hard.hard_step, (separated(3, 4),), {"proxy": name, "width": 0.93}) for name in hard.STEP],
    *[(hard.sign, (separated(3, 4),), {"proxy": name, "width": 0.93}) for name in hard.SIGN],
    *[(hard.quantised_relu, (separated(3, 4),), {"bits": 2, "step": 0.21, "proxy": name}) for name in hard.QUANTISED],
    *[
        (
            integrate_and_fire,
            (normal(4, 2, 3),),
            {"leak": 0.8, "reset": reset, "detach_reset": detached, "proxy": "arctan", "threshold": 0.7},
        )
        for reset in RESETS
        for detached in (False, True)
    ],
]


def name(case) -> str:
    op, arrays, settings = case
    shapes = "_".join("x".join(map(str, a.shape)) or "scalar" for a in arrays)
    shown = (f"{k}={getattr(v, 'name', v)}".replace(" ", "") for k, v in settings.items())
    return "-".join([op.op.name, shapes, *shown])
