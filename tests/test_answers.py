"""The answers to what is asked most, each held by one test. The field guide says the same in words."""

import itertools

import numpy as np
import pytest

import ladder
from estimators import ESTIMATORS, attach_gradient, categorical, create, facts
from estimators.base import Estimator, cost_and_gradient
from estimators.measure import EnumeratedCost, measure
from minigrad import Rng, Tensor, op
from minigrad.check import audit
from minigrad.fused import softmax_array, softmax_vjp
from models.vae import CategoricalVAE
from registry import PAIRS, quick
from small_problem import logits_of, one_cost

CATEGORICAL = [name for name in ESTIMATORS if facts(name).family is categorical]
DAILY = (
    "exact",
    "reinforce",
    "rloo",
    "muprop",
    "st",
    "st-gs",
    "gumbel-softmax",
    "reinmax",
    "arm",
    "arsm",
    "rebar",
    "lax",
)
LOGITS = np.array([[[1.0, 0.0, -1.0], [0.5, 0.0, 0.5]]])  # 1 example, 2 variables of 3 classes
TABLE = np.array([[1.0, 0.2, 0.0], [0.5, 1.0, 0.3]])


def cubic(d):
    return ((d * TABLE).sum(axis=(1, 2)) + 0.5) ** 3.0


def gradient_of(name, logits, cost, mask=None, rng=None):
    """(value, gradient) of one call."""
    x = Tensor(np.array(logits), requires_grad=True)
    value = create(name)(x, cost, Rng(0) if rng is None else rng, mask=mask)
    value.sum().backward()
    return value.data, x.grad


# ---- temperature


def test_temperature_trades_bias_for_variance():
    """… for the estimators that relax a sample with Gumbel noise. For those without that noise there is a best
    temperature: 1 for ReinMax, about 1 for straight-through, and below it they get worse in both or lose the gradient.
    To anneal is to set `tau` between steps."""
    problem = EnumeratedCost(LOGITS, cubic)
    at = lambda name, taus: [problem.measure(f"{name}:tau={tau}", samples=2000) for tau in taus]
    for name in ("gumbel-softmax", "st-gs", "gumbel-rao"):
        found = at(name, (4.0, 2.0, 1.0, 0.5, 0.1))
        for hotter, colder in itertools.pairwise(found):
            assert colder.bias < hotter.bias_interval[0]
            assert colder.deviation > hotter.deviation
    for name in ("st", "gst-1.0"):
        hot, one, cold, coldest = at(name, (4.0, 1.0, 0.25, 0.05))
        assert one.bias < min(hot.bias, cold.bias)
        assert cold.bias < coldest.bias
    one, hot = at("reinmax", (1.0, 2.0))
    assert one.bias < 0.1 * hot.bias

    annealed = create("st-gs:tau=1")
    annealed.tau = 0.5
    call = lambda estimator: estimator(Tensor(LOGITS), cubic, Rng(0)).data
    np.testing.assert_array_equal(call(annealed), call(create("st-gs:tau=0.5")))


# ---- logits


def test_logits_not_probabilities():
    """softmax of probabilities is another, flatter distribution. Their logarithms are logits; so is any shift of them.
    For a bit the logit is log p − log(1 − p)."""
    p = np.array([[[0.9, 0.08, 0.02], [0.2, 0.5, 0.3]]])
    for name in CATEGORICAL:
        found = create(name)
        if found.logit_scale == 1.0:
            np.testing.assert_allclose(found.forward_probability(np.log(p)), p, atol=1e-15)
            np.testing.assert_allclose(found.forward_probability(np.log(p) + 7.0), p, atol=1e-12)
            assert found.forward_probability(p)[0, 0, 0] < 0.55
    outcomes = categorical.outcomes(p.shape)
    expected = categorical.outcome_probability(p, outcomes)[0] @ cubic(Tensor(outcomes)).data
    assert gradient_of("exact", np.log(p), cubic)[0] == pytest.approx(expected, abs=1e-12)
    assert abs(gradient_of("exact", p, cubic)[0] - expected) > 0.3
    bits = np.array([[0.9, 0.2]])
    np.testing.assert_allclose(create("disarm").forward_probability(np.log(bits) - np.log1p(-bits)), bits)


@pytest.mark.parametrize("name", quick(DAILY, CATEGORICAL))
def test_masked_classes_get_no_probability_and_no_gradient(name):
    """Exactly none, whatever their logits are, NaN included; the other classes share what there is."""
    seen, mask = [], np.array([True, False, True])
    logits = np.repeat(LOGITS, 50, axis=0)
    logits[..., 1] = [np.nan, 50.0]
    value, g = gradient_of(name, logits, lambda d: (seen.append(d.data), cubic(d))[1], mask)
    assert np.isfinite(value).all()
    assert np.isfinite(g).all()
    assert (g[..., 1] == 0.0).all()
    assert np.abs(g[..., [0, 2]]).max() > 0.1
    assert (seen[0][..., 1] == 0.0).all()
    p = create(name).forward_probability(np.where(mask, logits, -1e30))
    assert (p[..., 1] == 0.0).all()


@pytest.mark.parametrize("name", quick(DAILY, CATEGORICAL))
def test_minus_infinity_as_a_logit(name):
    """It is a mask, to the last bit. A mask says so better: it is checked, and −∞ that an overflow has made is not a
    wish. A variable without any other class has no distribution, and gives NaN; a mask refuses to."""
    mask = np.array([True, False, True])
    logits = np.repeat(LOGITS, 20, axis=0)
    found = gradient_of(name, np.where(mask, logits, -np.inf), cubic)
    for a, b in zip(found, gradient_of(name, logits, cubic, mask), strict=True):
        np.testing.assert_array_equal(a, b)
    logits[3, 1] = -np.inf
    value, g = gradient_of(name, logits, cubic)
    assert np.isnan(value[3])
    assert np.isnan(g[3]).all()
    assert np.isfinite(np.delete(value, 3)).all()
    assert np.isfinite(np.delete(g, 3, axis=0)).all()
    with pytest.raises(ValueError, match="the mask leaves a row without any class"):
        gradient_of(name, logits, cubic, np.array([[True, True, True], [False, False, False]]))


@pytest.mark.parametrize(("name", "family"), quick(DAILY, PAIRS))
def test_equal_logits_have_a_gradient(name, family):
    """Noise breaks the tie: every class is drawn, and the gradient is that of the cost, not 0."""
    problem, seen = ladder.Problem(family, 1, 3 if family == "categorical" else 2, "quadratic"), []
    problem.logits = np.zeros_like(problem.logits)
    estimator, cost = create(name, family=family), problem.cost
    problem.cost = lambda d: (seen.append(d.data), cost(d))[1]
    _, g = ladder.monte_carlo(problem, estimator, 1000)
    problem.cost = cost
    assert np.abs(g.mean(axis=0)).max() > 0.05
    if estimator.unbiased and estimator.logit_scale == 1.0:
        assert np.abs(ladder.z_scores(g, ladder.exact(problem, estimator))).max() < 4.5
    if estimator.support == "hard" and estimator.sample_count:
        d = seen[0].reshape(len(seen[0]), -1)
        assert d.min() == 0.0
        assert (np.abs(d.mean(axis=0) - (1 / 3 if family == "categorical" else 1 / 2)) < 0.08).all()


@pytest.mark.parametrize("name", quick(DAILY, CATEGORICAL))
def test_one_class_gives_a_zero_gradient(name):
    """There is nothing to choose. LAX, whose score knows the noise, finds that out on average."""
    logits, cost = np.full((2000, 2, 1), 0.3), lambda d: (d * np.array([[1.0], [2.0]])).sum(axis=(1, 2)) ** 2.0
    value, g = gradient_of(name, logits, cost)
    np.testing.assert_allclose(value, 9.0)
    if name == "lax":
        assert np.abs(ladder.z_scores(g, 0.0)).max() < 4.0
    else:
        np.testing.assert_allclose(g, 0.0, atol=1e-12)


@pytest.mark.parametrize(("name", "family"), quick(DAILY, PAIRS))
def test_nan_stays_nan(name, family):
    """An example with a logit that is NaN has the value NaN and the gradient NaN, so that training stops where the
    fault is; a cost that is NaN does the same. The other examples are as ever."""
    expected = logits_of(family, 4)
    create(name, family=family)(expected, one_cost, Rng(0)).sum().backward()
    for poison in ("logit", "cost"):
        logits = logits_of(family, 4)
        factor = np.ones(4)
        if poison == "logit":
            logits = Tensor(logits.data.copy(), requires_grad=True)
            logits.data[2].reshape(-1)[0] = np.nan
        else:
            factor[2] = np.nan
        value = create(name, family=family)(logits, lambda d, factor=factor: one_cost(d) * factor, Rng(0))
        value.sum().backward()
        rest = [0, 1, 3]
        assert np.isnan(value.data[2])
        assert np.isnan(logits.grad[2]).all()
        assert np.isfinite(value.data[rest]).all()
        np.testing.assert_array_equal(logits.grad[rest], expected.grad[rest])


# ---- evaluation


def test_hard_or_soft_at_evaluation(monkeypatch):
    """Evaluate with hard samples: the model is one of discrete variables. The loss at soft samples is that of another
    model, which comes near as τ → 0; the loss at the mode is neither."""
    problem = ladder.Problem("categorical", 1, 2, "exponential")
    outcomes, q = ladder.all_outcomes(problem, create("st"))
    expected = q @ problem.values(outcomes)
    loss = lambda spec: ladder.quadrature(problem, create(spec))[0]
    assert loss("st-gs:tau=1") == pytest.approx(expected, abs=1e-7)  # hard, at every temperature
    soft = [abs(loss(f"gumbel-softmax:tau={tau}") - expected) / expected for tau in (1.0, 0.5, 0.1)]
    assert 0.02 < soft[0] > soft[1] > soft[2] > 1e-4
    mode = problem.values(np.eye(2)[[problem.logits.argmax(axis=-1)]])[0]
    assert abs(mode - expected) > 0.1 * expected

    model, seen = CategoricalVAE(6, 2, 3, hidden=(4,), rng=Rng(0), dtype=np.float64), []
    decode = model.decode
    monkeypatch.setattr(model, "decode", lambda d: (seen.append(d.data), decode(d))[1])
    model.evaluate(np.zeros((5, 6)), Rng(1))
    assert set(np.unique(seen[0])) == {0.0, 1.0}


# ---- an estimator of one's own


class Own(Estimator):
    """REINFORCE with the cost's linearisation at p for a baseline, whose mean J(p) f'(p) is given back."""

    title = "an estimator of one's own"
    exact_for = "all"
    families = (categorical,)

    def __init__(self, forgotten: bool = False) -> None:
        self.forgotten = forgotten

    def estimate(self, logits, cost, rng):
        p, d = softmax_array(logits.data), self.family.sample(rng, logits.data)
        f, (at_p, slope) = cost(Tensor(d)), cost_and_gradient(cost, p)
        residual = f.data - at_p.data - (slope * (d - p)).sum(axis=(1, 2))
        g = residual[:, None, None] * (d - p)
        return attach_gradient(f, logits, g if self.forgotten else g + softmax_vjp(p, slope))


def test_check_your_own_estimator():
    """An estimator of one sample is enumerated: its bias is exact, so that it is 1e-12 or there is one. A rule with a
    surrogate is held against its derivative by `audit`."""
    right, wrong = (measure(lambda f=f: Own(f), LOGITS, cubic) for f in (False, True))
    assert right.how == wrong.how == "enumerated"
    assert right.bias < 1e-12
    assert right.deviation < measure("reinforce", LOGITS, cubic).deviation
    assert wrong.bias > 0.1  # the mean of what was subtracted was not given back

    def own_straight_through(scale):
        @op(surrogate=lambda logits, d: ((0,), softmax_array))
        def own_rule(logits, d):
            return d, lambda g: (scale * softmax_vjp(softmax_array(logits), g), None)

        return own_rule

    for scale, fine in ((1.0, True), (0.5, False)):
        logits = Tensor(LOGITS, requires_grad=True)
        d = own_straight_through(scale)(logits, Rng(0).one_hot(LOGITS))
        assert audit((d * TABLE).sum()).ok == fine
