"""Experts behind gates: the sparse prediction against the dense one, the sparsity costs, the gates' gradients."""

import math

import numpy as np
import pytest
import scipy.special
import scipy.stats

from devsim import DevsimBackend, stats
from estimators import create
from estimators.enumeration import Given
from minigrad import Rng, Tensor
from minigrad.check import audit, gradcheck
from minigrad.checkpoint import StateError
from minigrad.optim import SGD
from models.conditional import UNITS, BetaNoise, ConditionalNetwork, Controller, DenseGate, activity_cost, root_sigmoid

GATES = {"noisy-rectifier": "rectifier", "sts": "smooth", "st-identity": "bit", "st": "bit", "reinforce-minvar": "bit"}
X = np.random.default_rng(0).random((6, 7))
LABELS = np.array([0, 2, 1, 0, 2, 1])


def network(unit="bit", experts=12, dtype=np.float64, **sizes):
    """With biases that are not 0."""
    model = ConditionalNetwork(7, 3, experts=experts, **({"gater": 4} | sizes), unit=unit, rng=Rng(1), dtype=dtype)
    for n, p in enumerate(model.parameters()):
        p.data += 0.3 * Rng(2).site(n).normal(p.shape, like=p.data)
    return model


def logits_of(model, x=X):
    return model.gate_logits(x).data


# ---- test time: what is off is not computed


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("target", [0.1, 0.4, 1.0])
def test_the_sparse_prediction_is_the_dense_gated_one(unit, target):
    model = network(unit, experts=40)
    predict = model.predictor(model.threshold(logits_of(model), target))
    y, active = predict(X)
    expected, on = model.evaluate(X, predict.threshold)
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-10)
    np.testing.assert_allclose(predict.all_experts(X), expected, rtol=0, atol=1e-10)
    np.testing.assert_array_equal(active, on)
    np.testing.assert_array_equal(active, (logits_of(model) > predict.threshold).sum(axis=1))


def test_with_all_gates_on_the_network_is_the_one_without_gates():
    predict = network("bit").predictor(-math.inf)
    np.testing.assert_allclose(predict.without_gates(X), predict.all_experts(X), rtol=1e-12)


def test_the_dense_gated_prediction_is_the_written_formula():
    model, c = network("smooth"), 0.2
    W_0, b_0, W_1, b_1, W_2, b_2, W_3, b_3 = (p.data for p in model.parameters())
    a = np.tanh(X @ W_1 + b_1) @ W_2 + b_2
    h = np.where(a > c, 1.0 / np.sqrt(1.0 + np.exp(-a)), 0.0)
    np.testing.assert_allclose(model.evaluate(X, c)[0], ((X @ W_0 + b_0) * h) @ W_3 + b_3, rtol=1e-12)


@pytest.mark.parametrize("unit", ["bit", "smooth", "rectifier"])
def test_an_expert_that_is_off_is_not_touched(unit):
    """Its weights are NaN, for each example those of other experts; computing it, even times 0, would show."""
    model = network(unit, experts=40)
    threshold = model.threshold(logits_of(model), 0.2)
    expected, active = model.predictor(threshold)(X)
    assert active.max() < 40
    for n in range(len(X)):
        off = np.flatnonzero(logits_of(model)[n] <= threshold)
        spoiled = network(unit, experts=40)
        for weights in (spoiled.experts.weight.data.T, spoiled.experts.bias.data, spoiled.output.weight.data):
            weights[off] = np.nan
        predict = spoiled.predictor(threshold)
        np.testing.assert_allclose(predict(X[n : n + 1])[0], expected[n : n + 1], rtol=1e-12)
        assert np.isnan(predict.all_experts(X[n : n + 1])).all()


def test_a_predictor_stays_what_it_is_while_training_goes_on():
    model = network()
    predict = model.predictor(0.0)
    before = predict(X)[0], predict.all_experts(X)
    for p in model.parameters():
        p.data += 1.0
    np.testing.assert_array_equal(predict(X)[0], before[0])
    np.testing.assert_array_equal(predict.all_experts(X), before[1])


def test_no_expert_on_leaves_the_output_s_bias():
    model = network()
    y, active = model.predictor(1e9)(X)
    assert not active.any()
    np.testing.assert_array_equal(y, np.tile(model.output.bias.data, (6, 1)))


def test_multiply_adds_are_those_counted_one_by_one():
    model = network(experts=5, gater=2)
    predict = model.predictor(0.0)
    gater, experts, dense = 0, 0, 0
    for x in X:
        a = predict.gate_logits(x)
        gater += sum(1 for _ in range(7) for _ in range(2)) + sum(1 for _ in range(2) for _ in range(5))
        for i in range(5):
            dense += 7 + 3  # a column of W₀, a row of W₃
            experts += 7 + 3 if a[i] > 0.0 else 0
    assert 0 < experts < dense
    count = model.multiply_adds(predict(X)[1].mean())
    assert count == {"gater": gater / 6, "experts": pytest.approx(experts / 6), "dense": dense / 6}


def test_the_threshold_leaves_the_target_on():
    model, a = network(), np.random.default_rng(0).permutation(200).reshape(10, 20) / 100.0 - 1.0
    for target in (0.005, 0.1, 0.25, 0.995):
        assert (a > model.threshold(a, target)).mean() == pytest.approx(target)
    assert model.threshold(a, 1.0) == -math.inf
    rectifier = network("rectifier")
    assert rectifier.threshold(a, 0.1) == model.threshold(a, 0.1)
    assert rectifier.threshold(a, 0.9) == rectifier.threshold(a, 1.0) == 0.0  # max(0, a) is off below 0


# ---- the sparsity costs


def test_the_activity_cost_is_the_cross_entropy_with_the_target():
    p = np.random.default_rng(0).uniform(0.05, 0.95, (4, 3))
    mean = p.mean(axis=0)
    expected = -sum(0.1 * math.log(m) + 0.9 * math.log(1.0 - m) for m in mean)
    assert activity_cost(Tensor(p), 0.1).item() == pytest.approx(expected, rel=1e-4)  # 1e-6 is inside the logarithms
    gradcheck(lambda p: activity_cost(p, 0.1), [p])
    at_target = Tensor(np.array([[0.05, 0.1], [0.15, 0.1]]), requires_grad=True)
    activity_cost(at_target, 0.1).backward()
    assert np.abs(at_target.grad).max() < 1e-4


@pytest.mark.parametrize("unit", ["bit", "smooth"])
def test_the_sparsity_cost_and_its_gradient_in_the_logits(unit):
    model, a = network(unit), np.random.default_rng(0).standard_normal((4, 3))
    p = 1.0 / (1.0 + np.exp(-a))
    expected = activity_cost(Tensor(p if unit == "bit" else np.sqrt(p)), 0.1).item()
    assert model.sparsity_cost(Tensor(a), None, 0.1).item() == pytest.approx(expected, rel=1e-12)
    gradcheck(lambda a: model.sparsity_cost(a, None, 0.1), [a])


def test_the_root_of_sigma_has_a_finite_derivative_where_sigma_underflows():
    for dtype in (np.float32, np.float64):
        a = Tensor(np.array([-5000.0, -200.0, 0.0, 200.0], dtype), requires_grad=True)
        y = root_sigmoid(a)
        y.sum().backward()
        np.testing.assert_allclose(y.data, [0.0, np.exp(-100.0), np.sqrt(0.5), 1.0], rtol=1e-3, atol=1e-40)
        np.testing.assert_allclose(a.grad, [0.0, 0.5 * np.exp(-100.0), 0.25 * np.sqrt(0.5), 0.0], rtol=1e-3, atol=1e-40)


def test_the_rectifiers_cost_is_a_sum_over_experts_and_batch_through_their_rule():
    model = network("rectifier")
    _, a, h = model.cost(X, LABELS, create("noisy-rectifier"), Rng(0))
    penalty = model.sparsity_cost(a, h, 0.1)
    assert penalty.item() == pytest.approx(h.data.sum())
    penalty.backward()
    np.testing.assert_allclose(model.gates.bias.grad, (h.data > 0).sum(axis=0))
    assert 0.0 < (h.data > 0).mean() < 1.0


def test_the_controller_follows_the_written_rule_step_by_step():
    weight, s, controller = 0.3, 0.1, Controller(0.1, 0.3, X, decay=0.2)
    plain, rng, seen = weight, np.random.default_rng(0), set()
    for n in range(400):
        active = rng.uniform(0.0, 0.2) if n < 50 else 0.5 if n < 90 else 0.02 if n < 300 else rng.uniform(0.0, 0.3)
        controller.update(np.array(active))
        change = -0.2 * plain if s - active > 0.01 else 0.2 * plain if s - active < -0.01 else 0.0
        plain = min(max(plain + change, 1e-13), 1.0)
        seen.add("low" if plain == 1e-13 else "high" if plain == 1.0 else np.sign(change))
        assert float(controller.weight) == pytest.approx(plain, rel=1e-12)
    assert seen == {"low", "high", -1.0, 0.0, 1.0}
    other = Controller(0.1, 0.5, X, decay=0.2)
    other.load_state_dict(controller.state_dict())
    for c in (controller, other):
        c.update(np.array(0.9))
    assert float(controller.weight) == float(other.weight)


def test_the_state_of_a_controller_is_on_the_host(backend):
    controller = Controller(0.1, 0.5, backend.to_device(X))
    state = controller.state_dict()
    assert type(state["weight"]) is np.ndarray
    controller.load_state_dict({"weight": np.array(0.25)})
    controller.update(backend.to_device(np.array(0.3)))
    assert float(backend.to_host(controller.weight)) == pytest.approx(0.25 * 1.1)


# ---- the noise in the logits


@pytest.mark.parametrize(("target", "beta"), [(0.1, 40.1), (0.3, 2.5), (0.8, 2.5)])
def test_the_noise_is_a_beta_distribution_with_its_mode_at_the_target(target, beta):
    noise = BetaNoise(target, beta)
    alpha = (target * (beta - 2.0) + 1.0) / (1.0 - target)
    assert (alpha - 1.0) / (alpha + beta - 2.0) == pytest.approx(target)
    z, scale = scipy.stats.beta(alpha, beta), abs(scipy.special.logit(target**2))
    assert noise.mean == pytest.approx(scale * (z.mean() - 0.5), rel=1e-4)
    quantile = (np.arange(BetaNoise.QUANTILES) + 0.5) / BetaNoise.QUANTILES
    np.testing.assert_allclose(noise.table, scale * (z.ppf(quantile) - z.mean()), atol=1e-5)
    drawn = noise.draw(Rng(0), (200, 300), X.astype(np.float32))
    assert drawn.dtype == np.float32
    assert abs(drawn.mean()) < 4.0 * scale * z.std() / math.sqrt(drawn.size)
    assert drawn.std() == pytest.approx(scale * z.std(), rel=0.02)
    assert np.unique(drawn).size > 4000  # all quantiles are drawn


def test_the_noise_is_in_the_logits_in_training_only_and_its_mean_is_where_the_bias_begins():
    noise = BetaNoise(0.1, 40.1)
    plain, noisy = (
        ConditionalNetwork(7, 3, experts=12, gater=4, unit="smooth", noise=n, rng=Rng(1)) for n in (None, noise)
    )
    np.testing.assert_array_equal(noisy.gates.bias.data, np.full(12, noise.mean, np.float32))
    np.testing.assert_array_equal(plain.gates.bias.data, np.zeros(12))
    x = X.astype(np.float32)
    np.testing.assert_allclose(logits_of(noisy, x), logits_of(plain, x) + noise.mean, rtol=1e-5)
    _, a, _ = noisy.cost(x, LABELS, create("sts"), Rng(3))
    added = noise.draw(Rng(3).site("noise"), (6, 12), x)
    np.testing.assert_allclose(a.data, logits_of(noisy, x) + added, rtol=1e-6)
    logits, _ = noisy.evaluate(x, -1.0)
    predicted, _ = noisy.predictor(-1.0)(x)
    np.testing.assert_allclose(predicted, logits, rtol=1e-4, atol=1e-6)


def test_the_table_of_the_noise_is_sent_to_a_device_once():
    noise, x = BetaNoise(0.1, 40.1), DevsimBackend().to_device(X)
    before, drawn = stats["h2d"], [noise.draw(Rng(0).at(step), (6, 12), x) for step in range(5)]
    assert stats["h2d"] - before == 1 + 5  # and the uniform numbers of each draw
    np.testing.assert_array_equal(DevsimBackend().to_host(drawn[3]), noise.draw(Rng(0).at(3), (6, 12), X))
    assert noise.draw(Rng(0), (6, 12), X.astype(np.float32)).dtype == np.float32


@pytest.mark.parametrize(("target", "beta"), [(0.0, 2.0), (1.0, 2.0), (0.1, 1.0), (0.1, math.inf), (0.1, math.nan)])
def test_noise_without_a_mode_is_a_sentence(target, beta):
    with pytest.raises(ValueError, match=r"needs a target between 0 and 1 and a finite β > 1, got"):
        BetaNoise(target, beta)


# ---- training


@pytest.mark.parametrize("gate", GATES)
def test_every_family_of_gates_trains(gate):
    """A hundred steps on six examples make them better known, and move all weights."""
    model, estimator = network(GATES[gate], dtype=np.float32), create(gate, family="bernoulli")
    before, x = model.state_dict(), X.astype(np.float32)
    optimizer, values = SGD(model.parameters(), 0.1), []
    for step in range(100):
        optimizer.zero_grad()
        cost, a, h = model.cost(x, LABELS, estimator, Rng(0).at(step))
        assert cost.shape == (6,)
        assert a.shape == h.shape == (6, 12)
        (cost.mean() + 1e-3 * model.sparsity_cost(a, h, 0.5)).backward()
        assert all(np.isfinite(p.grad).all() and p.grad.any() for p in model.parameters())
        optimizer.step()
        estimator.update()
        values.append(float(cost.data.mean()))
    assert np.mean(values[-20:]) < 0.7 * np.mean(values[:20])
    assert all((before[name] != p.data).any() for name, p in model.named_parameters().items())


@pytest.mark.parametrize(("gate", "exact"), [("reinforce-minvar", True), ("st-identity", False), ("st", False)])
def test_the_score_function_is_unbiased_for_three_experts(gate, exact):
    """All 8 joint gates of each example, weighed by their probabilities, against exact enumeration: every weight."""

    def gradients(run):
        model = network(experts=3)
        run(model)
        return {name: p.grad for name, p in model.named_parameters().items()}

    def by_enumeration(model):
        outcomes = np.array([[i >> 2 & 1, i >> 1 & 1, i & 1] for i in range(8)], float)
        rows = np.repeat(np.arange(len(X)), 8)
        p = 1.0 / (1.0 + np.exp(-logits_of(model)[rows]))
        h = np.tile(outcomes, (len(X), 1))
        q = (p * h + (1.0 - p) * (1.0 - h)).prod(axis=1)
        estimator = create(gate, family="bernoulli")
        if exact:  # baselines that are not 0
            estimator.load_state_dict({"weighted_cost": np.array([0.3, 0.1, 0.2]), "weight": np.array([0.2, 0.3, 0.1])})
        model.cost(X[rows], LABELS[rows], estimator, Given(samples=[h]))[0].backward(q)

    found = gradients(by_enumeration)
    expected = gradients(lambda m: m.cost(X, LABELS, create("exact", family="bernoulli"), Rng(0))[0].sum().backward())
    for name in expected:
        if exact or name.startswith(("experts", "output")):
            np.testing.assert_allclose(found[name], expected[name], rtol=1e-10, atol=1e-12, err_msg=name)
        else:
            assert np.abs(found[name] - expected[name]).max() > 0.01 * np.abs(expected[name]).max(), name


@pytest.mark.parametrize("gate", ["sts", "st-identity", "noisy-rectifier", "noisy-rectifier:noise=normal"])
def test_the_whole_loss_passes_the_audit(gate):
    model = network(GATES[gate.partition(":")[0]])
    cost, a, h = model.cost(X, LABELS, create(gate, family="bernoulli"), Rng(3))
    result = audit(cost.mean() + 0.01 * model.sparsity_cost(a, h, 0.1))
    assert result.ok, str(result)
    rule = {"sts": "stochastic_times_smooth", "st-identity": "identity_straight_through"}
    assert rule.get(gate, "noisy_rectifier") in str(result)


@pytest.mark.parametrize("unit", ["sigmoid", "rectifier"])
@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_dense_gates_are_differentiated_as_they_stand(unit, noise):
    model, rng = network(unit), Rng(5)
    z = noise * rng.normal((6, 12), like=X)
    _, a, h = model.cost(X, LABELS, DenseGate(unit, noise), rng)
    expected = 1.0 / (1.0 + np.exp(-(a.data + z))) if unit == "sigmoid" else np.maximum(a.data + z, 0.0)
    np.testing.assert_allclose(h.data, expected, rtol=1e-12)
    assert audit(model.cost(X, LABELS, DenseGate(unit, noise), rng)[0].sum()).ok
    if not noise:
        y, _ = model.evaluate(X, 0.0 if unit == "rectifier" else -math.inf)
        np.testing.assert_allclose(y, model.output(model.experts(X) * h).data, rtol=1e-12)


def test_logits_are_sharpened_as_the_estimator_says():
    class Sharp(DenseGate):
        logit_scale = 3.0

    model = network()
    np.testing.assert_allclose(model.cost(X, LABELS, Sharp("sigmoid"), Rng(0))[1].data, 3.0 * logits_of(model))


# ---- parameters


def test_the_initial_values_are_the_published_ones():
    for unit in ("bit", "rectifier"):
        model = ConditionalNetwork(784, 10, experts=300, gater=100, unit=unit, rng=Rng(0))
        layers = (model.experts, model.gater, model.gates, model.output)
        assert not any(layer.bias.data.any() for layer in layers)
        for layer, factor in zip(layers, (1.0, 1.0, 4.0, 1.0), strict=True):
            if unit == "rectifier" and layer is model.gates:
                w = layer.weight.data
                assert ((w != 0).sum(axis=0) == 15).all()
                assert 0.95 < w[w != 0].std() < 1.05
                assert len(np.unique(np.argmax(w != 0, axis=0))) > 10  # not the same places in each column
            else:
                bound = factor * math.sqrt(6.0 / sum(layer.weight.shape))
                assert 0.99 * bound < np.abs(layer.weight.data).max() <= bound * (1.0 + 1e-6)


def test_columns_are_limited_to_the_largest_norm_and_no_further():
    model = network()
    model.gater.weight.data *= 10.0
    before = model.state_dict()
    model.limit_columns(2.1)
    for name, p in model.named_parameters().items():
        norms = np.sqrt((before[name] ** 2).sum(axis=0))
        if name in ("experts.weight", "gater.weight", "gates.weight"):
            np.testing.assert_allclose(np.sqrt((p.data**2).sum(axis=0)), np.minimum(norms, 2.1), rtol=1e-12)
            np.testing.assert_array_equal(p.data[:, norms <= 2.1], before[name][:, norms <= 2.1])
        else:
            np.testing.assert_array_equal(p.data, before[name])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"unit": "door"}, "unknown unit 'door'; the known ones are bit, smooth, rectifier, sigmoid"),
        ({"experts": 0}, "sizes must be at least 1"),
        ({"gater": 0}, "sizes must be at least 1"),
    ],
)
def test_bad_settings_are_refused_in_one_sentence(settings, message):
    with pytest.raises(ValueError, match=message):
        ConditionalNetwork(7, 3, rng=Rng(0), **settings)


@pytest.mark.parametrize("state", [{}, {"weight": np.ones(2)}, {"weight": np.array(0.1), "more": np.array(0.1)}])
def test_a_state_that_is_not_a_controller_s_is_refused(state):
    controller = Controller(0.1, 0.5, X)
    with pytest.raises(StateError, match="not that of a controller"):
        controller.load_state_dict(state)
    assert controller.weight == 0.5
