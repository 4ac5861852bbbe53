"""The stochastic network: nested estimators against enumeration, its likelihood, and a step that never waits."""

import itertools

import numpy as np
import pytest

from devsim import DevsimBackend, forbid
from estimators import ESTIMATORS, create, facts
from minigrad import Rng, grad
from minigrad.backend import Backend
from minigrad.check import audit
from minigrad.fused import bce_with_logits
from minigrad.optim import Adam
from models.structured import StochasticNetwork
from registry import pairs

KINDS = ("bernoulli", "categorical")
NESTED = pairs(lambda e: not e.multi_sample)


def tiny(kind, layers=2, seed=1):
    """Two bits or one variable of three classes in each layer, far from uniform; x (1, 4) and y (1, 3)."""
    sizes = (2, None) if kind == "bernoulli" else (1, 3)
    model = StochasticNetwork(4, 3, *sizes, layers, rng=Rng(seed), dtype=np.float64)
    for n, p in enumerate(model.parameters()):
        p.data[...] = 1.5 * np.random.default_rng([seed, n]).standard_normal(p.shape)
    return model, np.array([[1.0, 0.0, 1.0, 1.0]]), np.array([[1.0, 0.0, 1.0]])


def estimators_of(model, spec):
    return [create(spec, family=model.family) for _ in range(model.depth)]


def layer_outcomes(kind):
    """All values of a layer, (N, width)."""
    return np.array(list(itertools.product((0.0, 1.0), repeat=2))) if kind == "bernoulli" else np.eye(3)


def probability(kind, theta, d):
    """p(d) from probabilities and not from logits.   theta, d (..., width) -> (...)"""
    if kind == "bernoulli":
        p = 1.0 / (1.0 + np.exp(-theta))
        return np.prod(np.where(d > 0, p, 1.0 - p), axis=-1)
    e = np.exp(theta)
    return (d * e).sum(axis=-1) / e.sum(axis=-1)


def joint(model, x, y, logit_scale=1.0):
    """(probability, −log p(y|d_last)) of every path through all layers: written down without the model's code."""
    paths = [(1.0, x[0])]
    for layer in model.layers[:-1]:
        theta = lambda below, layer=layer: logit_scale * (below @ layer.weight.data + layer.bias.data)
        paths = [
            (q * probability(model.family, theta(below), d), d)
            for q, below in paths
            for d in layer_outcomes(model.family)
        ]
    found = []
    for q, d in paths:
        a = d @ model.layers[-1].weight.data + model.layers[-1].bias.data
        found.append((q, float((np.logaddexp(0.0, a) - y[0] * a).sum())))
    return np.array(found).T


def expected_cost(model, x, y, logit_scale=1.0):
    q, f = joint(model, x, y, logit_scale)
    return float((q * f).sum())


def differences(model, objective, h=1e-5):
    """∂objective()/∂every parameter by central differences."""
    found = []
    for p in model.parameters():
        g = np.empty_like(p.data)
        for at in np.ndindex(p.shape):
            before, values = p.data[at], []
            for step in (h, -h):
                p.data[at] = before + step
                values.append(objective())
            p.data[at] = before
            g[at] = (values[0] - values[1]) / (2.0 * h)
        found.append(g)
    return found


def gradients(model, loss):
    for p in model.parameters():
        p.grad = None
    loss.backward()
    return [p.grad for p in model.parameters()]


def assert_equal(found, expected, tolerance=1e-7):
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)
        assert np.abs(b).max() > 1e-3


class Enumerated:
    """Stands in for an Rng: each draw of a step takes every value in turn, and `weight` is the probability of all."""

    def __init__(self, kind, draws):
        self.columns = iter(zip(*itertools.product(range(len(layer_outcomes(kind))), repeat=draws), strict=True))
        self.kind, self.rows, self.weight = kind, len(layer_outcomes(kind)) ** draws, 1.0

    def site(self, name):
        return self

    def one_hot(self, logits):
        d = layer_outcomes(self.kind)[list(next(self.columns))]
        self.weight = self.weight * probability(self.kind, logits.reshape(d.shape), d)
        return d.reshape(logits.shape)

    bernoulli = one_hot


# ---- nested estimators


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_nested_enumeration_gives_the_expected_cost_and_its_gradient(kind, layers):
    model, x, y = tiny(kind, layers)
    cost = model.cost(x, y, estimators_of(model, "exact"), Rng(0))
    np.testing.assert_allclose(cost.data, [expected_cost(model, x, y)], rtol=1e-12)
    assert_equal(gradients(model, cost.sum()), differences(model, lambda: expected_cost(model, x, y)))


def mean_gradient(model, x, y, estimators, draws):
    """The mean over all outcomes of value and gradients: every draw of a step takes every value."""
    rng = Enumerated(model.family, draws)
    many = [np.repeat(a, rng.rows, axis=0) for a in (x, y)]
    value = model.cost(*many, estimators, rng)
    assert next(rng.columns, None) is None  # the number of draws is what it was thought to be
    found = gradients(model, (value * rng.weight).sum())
    assert abs(rng.weight.sum() - 1.0) < 1e-12
    return float((value.data * rng.weight).sum()), found


@pytest.mark.parametrize("spec", ["reinforce", "rloo", "muprop", "muprop-simple", "nvil:normalise=0"])
@pytest.mark.parametrize("kind", KINDS)
def test_nested_score_functions_are_unbiased_for_every_weight(kind, spec, monkeypatch):
    model, x, y = tiny(kind)
    monkeypatch.setattr(Enumerated, "uniform", lambda self, shape, like: Rng(0).uniform(shape, like), raising=False)
    below, above = estimators = estimators_of(model, spec)
    evaluations = below.count_evaluations(*below.family.sizes((1, *model.latent_shape)))
    draws = below.sample_count + evaluations * above.sample_count
    value, found = mean_gradient(model, x, y, estimators, draws)
    assert value == pytest.approx(expected_cost(model, x, y), rel=1e-12)
    assert_equal(found, differences(model, lambda: expected_cost(model, x, y)))


@pytest.mark.parametrize("kind", KINDS)
def test_layers_may_have_different_estimators(kind):
    model, x, y = tiny(kind, layers=3)
    estimators = [create(spec, family=kind) for spec in ("reinforce", "exact", "muprop")]
    draws = 1 + len(layer_outcomes(kind))  # one of the first layer, and one above each outcome of the second
    assert_equal(
        mean_gradient(model, x, y, estimators, draws)[1], differences(model, lambda: expected_cost(model, x, y))
    )


@pytest.mark.parametrize("kind", KINDS)
def test_enumeration_shows_that_straight_through_is_biased_in_depth(kind):
    model, x, y = tiny(kind)
    _, found = mean_gradient(model, x, y, estimators_of(model, "st"), 2)
    exact = differences(model, lambda: expected_cost(model, x, y))
    np.testing.assert_allclose(found[-1], exact[-1], rtol=1e-6)  # the last layer's weights see no bias
    assert np.abs(found[0] - exact[0]).max() > 5e-3


UNBIASED = pairs(lambda e: e.unbiased and not e.multi_sample)


def rows_of_bias_gradients(model, x, y, spec, n):
    """The gradient of every layer's biases from each of n examples, (n, numbers): all evaluations that reach them."""
    seen, logits = [[] for _ in model.layers], model.logits
    model.logits = lambda l, below: seen[l].append(logits(l, below)) or seen[l][-1]
    try:
        many = [np.repeat(a, n, axis=0) for a in (x, y)]
        value = model.cost(*many, estimators_of(model, spec), Rng(5))
    finally:
        del model.logits
    found = []
    for thetas in seen:
        thetas = [t for t in thetas if t.requires_grad]
        found.append(sum(grad(value.sum(), thetas, keep=True)).reshape(n, -1))
    return np.concatenate(found, axis=1)


def standard_scores(model, x, y, spec, n=10_000):
    rows = rows_of_bias_gradients(model, x, y, spec, n)
    exact = differences(model, lambda: expected_cost(model, x, y))
    exact = np.concatenate([g for g, p in zip(exact, model.parameters(), strict=True) if p.ndim == 1])
    return (rows.mean(axis=0) - exact) / (rows.std(axis=0) / np.sqrt(n) + 1e-7)


@pytest.mark.parametrize(("name", "kind"), UNBIASED)
@pytest.mark.daily(12)
def test_what_is_unbiased_alone_is_unbiased_when_nested(name, kind):
    """With one address for a layer's noise, as the model uses it: all evaluations of a cost see the same function."""
    assert np.abs(standard_scores(*tiny(kind), name)).max() < 4.5


@pytest.mark.parametrize("name", ["st", "st-gs", "reinmax", "darn"])
def test_the_standard_scores_would_show_a_bias(name):
    assert np.abs(standard_scores(*tiny("bernoulli"), name)).max() > 6.0


SEVERAL = [  # they evaluate the cost at a sample and then elsewhere
    p.values[0]
    for p in pairs(lambda e: e.family.name == "bernoulli" and e.sample_count == 1 < e.count_evaluations(3, 2))
]


@pytest.mark.parametrize("outer", [*SEVERAL, "darn:expand_at=half"])
@pytest.mark.parametrize("inner", [n for n in ESTIMATORS if facts(n).state or facts(n).learned])
def test_an_estimator_learns_from_the_sample_however_often_the_layer_below_evaluates_it(outer, inner):
    """The first evaluation is the one that a plain REINFORCE below would have made."""
    states = []
    for below in ("reinforce", outer):
        model, x, y = tiny("bernoulli")
        many = [np.repeat(a, 6, axis=0) for a in (x, y)]
        estimators = [create(below, family="bernoulli"), create(inner, family="bernoulli")]
        for step in range(3):
            model.cost(*many, estimators, Rng(0).at(step))
            for estimator in estimators:
                estimator.update()
        states.append(estimators[1].state_dict())
    assert states[0].keys() == states[1].keys()
    for name in states[0]:
        np.testing.assert_array_equal(states[0][name], states[1][name], err_msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_a_learned_baseline_sees_what_the_layer_sees(kind):
    model, x, y = tiny(kind)
    estimators = estimators_of(model, "nvil")
    model.cost(x, y, estimators, Rng(0))
    assert [e.inputs.shape for e in estimators] == [(1, 4), (1, *model.latent_shape)]
    np.testing.assert_array_equal(estimators[0].inputs, x)
    assert set(np.unique(estimators[1].inputs)) <= {0.0, 1.0}


@pytest.mark.parametrize("spec", [*SEVERAL, "darn:expand_at=half", "reinforce-mean", "nvil"])
def test_weights_learn_from_the_sample_alone(spec):
    """Evaluations that serve a control variate leave nothing in the weights above: they have REINFORCE's gradient."""
    found = []
    for name in ("reinforce", spec):
        model, x, y = tiny("bernoulli")
        many = [np.repeat(a, 6, axis=0) for a in (x, y)]
        found.append(gradients(model, model.cost(*many, estimators_of(model, name), Rng(0)).sum())[-2:])
    assert_equal(found[1], found[0], 1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_a_bound_of_several_samples_trains_the_last_layer_and_no_other(kind):
    model, x, y = tiny(kind)

    def expected_bound():
        q, f = joint(model, x, y)
        N = len(layer_outcomes(kind))
        q, f = q.reshape(N, N), f[:N]  # p(d₁, d₂), and the cost of d₂
        first = q.sum(axis=1)
        above = q / first[:, None]
        pairs = -np.log(0.5 * (np.exp(-f[:, None]) + np.exp(-f)))
        return float((first * np.einsum("is,it,st->i", above, above, pairs)).sum())

    estimators = [create("reinforce", family=kind), create("vimco:samples=2", family=kind)]
    value, found = mean_gradient(model, x, y, estimators, 3)
    assert value == pytest.approx(expected_bound(), rel=1e-12)
    assert_equal(found, differences(model, expected_bound))
    with pytest.raises(ValueError, match="VIMCO is a bound of several samples and not linear in their costs"):
        model.cost(x, y, estimators_of(model, "vimco"), Rng(0))


@pytest.mark.parametrize(("name", "kind"), pairs(lambda e: e.logit_scale != 1.0))
def test_a_changed_forward_distribution_is_the_one_that_is_evaluated(name, kind):
    model, x, y = tiny(kind)
    check_forward(model, x, y, create(name, family=kind).logit_scale, estimators_of(model, name))


def test_the_slope_grows_and_evaluation_knows():
    model, x, y = tiny("bernoulli")
    estimators = estimators_of(model, "st-slope:rate=0.5")
    for _ in range(3):
        for estimator in estimators:
            estimator.update()
    assert estimators[0].logit_scale == 2.5
    check_forward(model, x, y, 2.5, estimators)


def check_forward(model, x, y, logit_scale, estimators, n=20_000):
    many = [np.repeat(a, n, axis=0) for a in (x, y)]
    q, f = joint(model, x, y, logit_scale)
    trained = model.cost(*many, estimators, Rng(3)).data  # from here on the network has their logit scale
    likelihood = np.exp(-model.nll(*many, Rng(4), samples=1))
    for values, exact in ((trained, (q * f).sum()), (likelihood, (q * np.exp(-f)).sum())):
        error = values.std() / np.sqrt(n)
        assert abs(values.mean() - exact) < 4.5 * error
    assert abs((joint(model, x, y)[0] * f).sum() - (q * f).sum()) > 4.5 * trained.std() / np.sqrt(n)


@pytest.mark.parametrize("specs", [("st", "st-gs"), ("gumbel-softmax", "zgr"), ("reinforce", "muprop"), ("rloo", "st")])
@pytest.mark.parametrize("kind", KINDS)
def test_nested_graphs_pass_the_audit(kind, specs):
    model, x, y = tiny(kind)
    result = audit(model.cost(x, y, [create(s, family=kind) for s in specs], Rng(1)).sum())
    assert result.ok, str(result)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: [create("st")], "needs as many estimators, each with a state of its own: got 1, 1 of them different"),
        (lambda: [create("st")] * 2, "got 2, 1 of them different"),
        (lambda: [create("st"), create("st", family="bernoulli")], "layer 1 got Straight-through for bernoulli ones"),
    ],
)
def test_estimators_that_do_not_fit_are_refused_in_one_sentence(make, message):
    model, x, y = tiny("categorical")
    with pytest.raises(ValueError, match=message):
        model.cost(x, y, make(), Rng(0))


def test_targets_that_would_be_compared_with_all_rows_or_all_pixels_are_refused():
    model, x, y = tiny("bernoulli")
    x, y = np.concatenate([x, x]), np.concatenate([y, y])
    for wrong in (y[:1], y[:, :1], y[0], y[None]):
        with pytest.raises(ValueError, match=r"y must be \(B, O\), which is"):
            model.cost(x, wrong, estimators_of(model, "st"), Rng(0))
        with pytest.raises(ValueError, match=r"y must be \(B, O\), which is"):
            model.nll(x, wrong, Rng(0))


@pytest.mark.parametrize("sizes", [(0, 3, 2), (4, 0, 2), (4, 3, 0), (4, 3, 2, 0), (4, 3, 2, 2, 0)])
def test_sizes_below_one_are_refused(sizes):
    with pytest.raises(ValueError, match="sizes must be at least 1, got inputs"):
        StochasticNetwork(*sizes, rng=Rng(0))


# ---- evaluation


@pytest.mark.parametrize("kind", KINDS)
def test_the_nll_is_exact_when_every_outcome_is_drawn_as_often_as_it_should(kind):
    """All paths are equally likely when the hidden logits are 0; drawn once each they leave no error at all."""
    model, x, y = tiny(kind)
    for p in model.parameters()[:4]:
        p.data[...] = 0.0
    outcomes, draws = layer_outcomes(kind), iter(())

    def every_outcome(logits, rng):
        index = list(next(draws))
        return outcomes[index].reshape(len(index), 1, *model.latent_shape)

    model.draw = every_outcome
    q, f = joint(model, x, y)
    draws = iter(zip(*itertools.product(range(len(outcomes)), repeat=2), strict=True))
    found = model.nll(x, y, Rng(0), samples=len(outcomes) ** 2)
    np.testing.assert_allclose(found, [-np.log((q * np.exp(-f)).sum())], rtol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_the_likelihood_of_an_evaluation_is_unbiased_for_any_number_of_samples(kind):
    model, x, y = tiny(kind)
    q, f = joint(model, x, y)
    exact, n = float((q * np.exp(-f)).sum()), 4000
    many = [np.repeat(a, n, axis=0) for a in (x, y)]
    means = []
    for samples, chunk in ((1, 1), (7, 3), (40, 100)):
        nll = model.nll(*many, Rng(2), samples, chunk)
        likelihood = np.exp(-nll)
        assert abs(likelihood.mean() - exact) < 4.5 * likelihood.std() / np.sqrt(n)
        means.append(nll.mean())
    assert means[0] > means[1] > means[2] > -np.log(exact)  # tighter with more samples
    assert abs(model.nll(x, y, Rng(0), samples=200_000, chunk=20_000)[0] + np.log(exact)) < 0.02
    for bad in ({"samples": 0}, {"chunk": 0}):
        with pytest.raises(ValueError, match="samples and chunk must be at least 1"):
            model.nll(x, y, Rng(0), **bad)


def test_chunks_and_layers_have_noise_of_their_own():
    model = StochasticNetwork(4, 3, 50, None, 2, rng=Rng(0))
    for p in model.parameters():
        p.data[...] = 0.0
    seen, draw = [], model.draw
    model.draw = lambda *a: seen.append(draw(*a)) or seen[-1]
    model.nll(np.zeros((1, 4), np.float32), np.zeros((1, 3), np.float32), Rng(0), samples=4, chunk=2)
    assert len({a.tobytes() for d in seen for a in d}) == 8


@pytest.mark.parametrize("kind", KINDS)
def test_the_mean_field_network_passes_probabilities_on(kind):
    model, x, y = tiny(kind)
    below = x
    for layer in model.layers[:-1]:
        theta = below @ layer.weight.data + layer.bias.data
        below = 1 / (1 + np.exp(-theta)) if kind == "bernoulli" else np.exp(theta) / np.exp(theta).sum()
    expected = below @ model.layers[-1].weight.data + model.layers[-1].bias.data
    np.testing.assert_allclose(model.mean_field(x).data, expected, rtol=1e-12)
    objective = lambda: float(bce_with_logits(model.mean_field(x), y).data[0])
    assert_equal(gradients(model, bce_with_logits(model.mean_field(x), y).sum()), differences(model, objective))


# ---- training


@pytest.mark.parametrize(("name", "kind"), NESTED)
def test_a_training_step_neither_waits_nor_copies_and_gives_numpy_s_bits(name, kind):
    results = []
    for backend in (Backend(), DevsimBackend()):
        model = StochasticNetwork(6, 6, *((2, None) if kind == "bernoulli" else (2, 3)), rng=Rng(0)).to(backend)
        images = backend.to_device((Rng(0).site("x").uniform((10, 12)) > 0.5).astype(np.float32))
        optimizer, estimators = Adam(model.parameters(), 1e-2), estimators_of(model, name)
        with forbid("sync", "d2h"):
            for step in range(2):
                x = images[step * 5 : step * 5 + 5]
                optimizer.zero_grad()
                model.cost(x[:, :6], x[:, 6:], estimators, Rng(0).at(step)).mean().backward()
                optimizer.step()
                for estimator in estimators:
                    estimator.update()
            nll = model.nll(x[:, :6], x[:, 6:], Rng(1), samples=3, chunk=2)
        results.append([backend.to_host(nll), *(backend.to_host(p.data) for p in model.parameters())])
    for a, b in zip(*results, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("spec", ["st", "gumbel-softmax"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_bound_of_several_samples_is_that_of_their_single_costs(kind, spec):
    model, x, y = tiny(kind)
    x, y = (np.concatenate([a, 1.0 - a]) for a in (x, y))
    for M in (2, 3):
        single = model.cost(*(np.concatenate([a] * M) for a in (x, y)), estimators_of(model, spec), Rng(0)).data
        bound = model.cost(x, y, estimators_of(model, spec), Rng(0), samples=M)
        np.testing.assert_allclose(bound.data, -np.log(np.exp(-single.reshape(M, 2)).mean(axis=0)), rtol=1e-12)
        assert audit(bound.sum()).ok
    for name in ("reinforce", "muprop", "exact", "rebar"):
        with pytest.raises(ValueError, match="no sample with a rule"):
            model.cost(x, y, estimators_of(model, name), Rng(0), samples=2)
    with pytest.raises(ValueError, match="samples must be at least 1, got 0"):
        model.cost(x, y, estimators_of(model, spec), Rng(0), samples=0)


SAMPLERS = [(n, k) for n in ("st", "gumbel-softmax", "st-gs") for k in KINDS]
SAMPLERS += [("darn", "bernoulli"), ("zgr", "categorical"), ("st-slope:rate=0.002", "bernoulli")]
JANG = [*SAMPLERS, *((n, k) for n in ("reinforce-mean", "nvil", "muprop") for k in KINDS)]


def trained(name, kind, x, y, steps, samples):
    model = StochasticNetwork(x.shape[1], 16, *((8, None) if kind == "bernoulli" else (4, 4)), rng=Rng(0))
    optimizer, estimators = Adam(model.parameters(), 3e-2), estimators_of(model, name)
    for step in range(steps):
        optimizer.zero_grad()
        model.cost(x, y, estimators, Rng(0).at(step), samples).mean().backward()
        optimizer.step()
        for estimator in estimators:
            estimator.update()
    model.logit_scale = [e.logit_scale for e in estimators]  # as they are after the last update
    return model


def patterns():
    """Forty images of four patterns, and −log p of the best guess without knowing which."""
    y = np.tile((Rng(0).site("pattern").uniform((4, 16)) > 0.5).astype(np.float32), (10, 1))
    p = np.clip(y.mean(axis=0), 1e-6, 1 - 1e-6)
    return y, -float((p * np.log(p) + (1 - p) * np.log(1 - p)).sum())


@pytest.mark.parametrize(("name", "kind"), JANG)
@pytest.mark.daily(4)
def test_each_of_the_published_estimators_learns_what_follows_from_what_is_seen(name, kind):
    y, blind = patterns()
    x = np.tile(np.eye(4, dtype=np.float32), (10, 1))
    model = trained(name, kind, x, y, steps=200, samples=1)
    assert model.nll(x, y, Rng(1), 100).mean() < 0.5 * blind


@pytest.mark.parametrize(("name", "kind"), SAMPLERS)
@pytest.mark.daily(3)
def test_a_network_trained_with_several_samples_chooses_and_one_trained_with_one_does_not(name, kind):
    """Four lower halves for the one upper half. No deterministic network is better than `blind`."""
    y, blind = patterns()
    x = np.ones((40, 1), np.float32)
    nll = {}
    for samples, sharper in ((1, False), (8, True)):
        model = trained(name, kind, x, y, steps=120, samples=samples)
        nll[samples] = model.nll(x, y, Rng(1), 100).mean()
        p = 1 / (1 + np.exp(-model.sample(x[:1], 500, Rng(2))))
        contrast = lambda p: np.abs(p - 0.5).mean()
        assert (contrast(p) > contrast(p.mean(axis=0)) + 0.1) == sharper
    assert nll[8] < 0.6 * blind
    assert nll[1] > 0.9 * blind
