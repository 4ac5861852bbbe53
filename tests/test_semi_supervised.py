"""The semi-supervised VAE: its bounds and gradients against the formulas, and its step on the stand-in device."""

import itertools

import numpy as np
import pytest

from devsim import DevsimBackend, forbid
from estimators import ESTIMATORS, create, facts
from minigrad import Rng, fused
from minigrad.backend import Backend
from minigrad.check import audit
from minigrad.nn import Linear
from minigrad.optim import Adam
from models.semi_supervised import SemiSupervisedVAE, WithClass

B, D, K, M, H = 3, 5, 4, 2, (6, 3)


def small(hidden=H, dtype=np.float64):
    model = SemiSupervisedVAE(D, K, M, hidden, rng=Rng(1), dtype=dtype)
    for p in model.parameters():
        p.data *= 2.0  # far from the uniform start
    return model, Rng(1).site("x").uniform((B, D), like=np.empty(0, dtype))


# ---- the objective once more, in plain NumPy, on concatenated inputs


def network(state, name, a, y=None):
    """A network that is given [a, y]: W over V is one matrix."""
    if y is not None:
        w = np.concatenate([state[f"{name}.first.weight"], state[f"{name}.of_class"]])
        a = np.maximum(np.concatenate([a, y], axis=1) @ w + state[f"{name}.first.bias"], 0.0)
    layers = f"{name}.rest.layers" if y is not None else f"{name}.layers"
    n = sum(key.startswith(layers) for key in state) // 2
    for i in range(n):
        a = a @ state[f"{layers}.{i}.weight"] + state[f"{layers}.{i}.bias"]
        a = np.maximum(a, 0.0) if i < n - 1 else a
    return a


def bound_with_label(state, x, y, noise):
    """L(x, y), with the densities written out: KL(q ‖ p) = Σ over components of KL(N(μ, σ²) ‖ N(0, 1))."""
    mean, log_variance = np.split(network(state, "encoder", x, y), 2, axis=1)
    sigma = np.sqrt(np.exp(log_variance))
    p = 1.0 / (1.0 + np.exp(-network(state, "decoder", mean + sigma * noise, y)))
    log_likelihood = (x * np.log(p) + (1.0 - x) * np.log(1.0 - p)).sum(axis=1)
    kl = (-np.log(sigma) + (sigma**2 + mean**2) / 2.0 - 0.5).sum(axis=1)
    return -log_likelihood + kl - np.log(1.0 / y.shape[1])


def q_of_class(state, x, logit_scale=1.0):
    e = np.exp(logit_scale * network(state, "classifier", x))
    return e / e.sum(axis=1, keepdims=True)


def bound_without_label(state, x, noise, logit_scale=1.0):
    """U(x) = Σ_y q(y|x) L(x, y) − H(q(y|x))"""
    q = q_of_class(state, x, logit_scale)
    costs = [bound_with_label(state, x, np.tile(np.eye(K)[k], (len(x), 1)), noise) for k in range(K)]
    return (q * np.stack(costs, axis=1)).sum(axis=1) + (q * np.log(q)).sum(axis=1)


def noise_of(rng, n=B):
    return rng.normal((n, M), like=np.empty(0))


LABELS = np.array([2, 0, 2])


@pytest.mark.parametrize("hidden", [(6,), H])
def test_both_bounds_are_the_formulas(hidden):
    model, x = small(hidden)
    state, rng = model.state_dict(), Rng(3)
    expected = bound_with_label(state, x, np.eye(K)[LABELS], noise_of(rng))
    np.testing.assert_allclose(model.labelled(x, LABELS, rng, alpha=0.0).data, expected, rtol=1e-12)
    expected -= 0.7 * np.log(q_of_class(state, x, 1.5)[np.arange(B), LABELS])
    model.logit_scale = 1.5
    np.testing.assert_allclose(model.labelled(x, LABELS, rng, 0.7).data, expected, rtol=1e-12)
    model.logit_scale = 1.0
    expected = bound_without_label(state, x, noise_of(rng.site("style")))
    np.testing.assert_allclose(model.unlabelled(x, rng).data, expected, rtol=1e-12)
    np.testing.assert_allclose(model.bound(x, rng), expected, rtol=1e-12)
    np.testing.assert_array_equal(model.predict(x), q_of_class(state, x).argmax(axis=1))


def objective(model, x, rng, estimator=None):
    labelled = model.labelled(x, LABELS, rng.site("labelled"), alpha=0.7)
    return (labelled + model.unlabelled(x, rng, estimator)).sum()


def test_the_gradient_of_the_objective_is_right_for_every_parameter():
    """Central differences of the formulas in NumPy, at three entries of each parameter."""
    model, x = small()
    rng = Rng(3)
    objective(model, x, rng).backward()

    def formula():
        state = {name: p.data for name, p in model.named_parameters().items()}
        labelled = bound_with_label(state, x, np.eye(K)[LABELS], noise_of(rng.site("labelled")))
        log_q = np.log(q_of_class(state, x)[np.arange(B), LABELS])
        return (labelled - 0.7 * log_q + bound_without_label(state, x, noise_of(rng.site("style")))).sum()

    pick = np.random.default_rng(0)
    for name, p in model.named_parameters().items():
        assert np.abs(p.grad).max() > 1e-6, name
        for _ in range(3):
            at = tuple(pick.integers(n) for n in p.shape)
            before, values = p.data[at], []
            for h in (1e-6, -1e-6):
                p.data[at] = before + h
                values.append(formula())
            p.data[at] = before
            assert p.grad[at] == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-5, abs=1e-7), name


@pytest.mark.parametrize("name", [None, "exact", "gumbel-softmax", "st-gs", "reinforce"])
def test_the_whole_loss_passes_the_audit(name):
    model, x = small()
    result = audit(objective(model, x, Rng(3), name and create(name)))
    assert result.ok, str(result)
    assert "kl_to_standard_normal" in str(result)


def gradients(model, loss):
    for p in model.parameters():
        p.grad = None
    loss.backward()
    return [0.0 * p.data if p.grad is None else p.grad.copy() for p in model.parameters()]


def test_enumeration_with_the_estimator_is_marginalisation():
    model, x = small()
    marginal, exact = model.unlabelled(x, Rng(3)), model.unlabelled(x, Rng(3), create("exact"))
    np.testing.assert_allclose(exact.data, marginal.data, rtol=1e-12)
    for a, b in zip(gradients(model, exact.sum()), gradients(model, marginal.sum()), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)


class Outcome:
    """An address at which the class of the one image is y, and the noise of the style that of another address."""

    def __init__(self, y, rng):
        self.y, self.rng = y, rng

    def site(self, name):
        return self if name == "class" else self.rng.site(name)

    def one_hot(self, logits):
        return np.eye(logits.shape[-1])[[self.y]]


def mean_over_classes(spec, state=None):
    """E over y ~ q(y|x) of value and gradients of one image, and the same of the marginalisation."""
    model, x = small()
    x, rng = x[:1], Rng(3)
    q, total = q_of_class(model.state_dict(), x)[0], 0.0
    means = [0.0 * p.data for p in model.parameters()]
    for y in range(K):
        estimator = create(spec)
        estimator.load_state_dict(state or {})
        value = model.unlabelled(x, Outcome(y, rng), estimator)
        total = total + q[y] * value.data
        means = [m + q[y] * g for m, g in zip(means, gradients(model, value.sum()), strict=True)]
    marginal = model.unlabelled(x, rng)
    return [total, *means], [marginal.data, *gradients(model, marginal.sum())]


@pytest.mark.parametrize(
    ("spec", "state"), [("reinforce", None), ("reinforce-mean", {"mean": np.array(2.0), "started": np.array(True)})]
)
def test_the_mean_of_an_unbiased_estimator_over_all_classes_is_marginalisation(spec, state):
    for a, b in zip(*mean_over_classes(spec, state), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11)


def test_straight_through_has_the_right_value_and_a_biased_gradient_for_the_classifier_only():
    (value, *found), (expected, *exact) = mean_over_classes("st")
    np.testing.assert_allclose(value, expected, rtol=1e-12)
    names = list(small()[0].named_parameters())
    for name, a, b in zip(names, found, exact, strict=True):
        biased = np.abs(a - b).max() > 1e-3 * np.abs(b).max()
        assert biased == name.startswith("classifier"), name


def test_a_relaxed_estimator_gives_the_networks_a_class_between_the_classes():
    model, x = small()
    seen, cost = [], model.cost
    model.cost = lambda x, y, rng: seen.append(y.data) or cost(x, y, rng)
    model.unlabelled(x, Rng(3), create("gumbel-softmax", tau=2.0))
    assert seen[0].shape == (B, K)
    assert (seen[0] > 0).all()
    np.testing.assert_allclose(seen[0].sum(axis=1), 1.0)


def test_a_changed_forward_distribution_is_the_one_that_the_bound_is_about():
    """With many copies of an image, the mean over samples is U for the q(y|x) with the logits θ/τ_f."""
    model, x = small()
    n, rng, estimator = 20_000, Rng(3), create("st-decoupled:tau_f=2.5")
    many = np.repeat(x[:1], n, axis=0)
    values = model.unlabelled(many, rng, estimator).data
    expected = bound_without_label(model.state_dict(), many, noise_of(rng.site("style"), n), 0.4)
    difference = values - expected
    assert abs(difference.mean()) < 4.5 * difference.std() / np.sqrt(n)
    np.testing.assert_allclose(model.bound(many, rng), expected, rtol=1e-12)


def test_the_kl_of_a_normal_is_that_of_the_densities():
    """By quadrature of q log(q/p) for one component."""
    mean, log_variance = np.array([[0.7], [-1.2]]), np.array([[0.4], [-0.9]])
    z = np.linspace(-12.0, 12.0, 20_001)
    sigma2 = np.exp(log_variance)
    log_q = -0.5 * (np.log(2.0 * np.pi * sigma2) + (z - mean) ** 2 / sigma2)
    log_p = -0.5 * (np.log(2.0 * np.pi) + z**2)
    expected = np.trapezoid(np.exp(log_q) * (log_q - log_p), z, axis=1)
    np.testing.assert_allclose(fused.kl_to_standard_normal.rule(mean, log_variance)[0], expected, rtol=1e-9)


def test_the_product_with_the_image_is_made_once_for_all_classes(monkeypatch):
    model, x = small()
    rows, first = [], {id(m.first): name for name, m in vars(model).items() if isinstance(m, WithClass)}
    call = Linear.__call__

    def counted(layer, a):
        if id(layer) in first:
            rows.append((first[id(layer)], int(np.prod(a.shape[:-1]))))
        return call(layer, a)

    monkeypatch.setattr(Linear, "__call__", counted)
    model.unlabelled(x, Rng(3))
    assert rows == [("encoder", B), ("decoder", K * B)]  # x is the same for all classes; z is not


def test_analogies_keep_the_style_and_change_the_class():
    model, x = small()
    images, state = model.analogies(x), model.state_dict()
    assert images.shape == (B, K, D)
    best = np.eye(K)[q_of_class(state, x).argmax(axis=1)]
    mean = np.split(network(state, "encoder", x, best), 2, axis=1)[0]
    for b, k in itertools.product(range(B), range(K)):
        y = network(state, "decoder", mean[b : b + 1], np.eye(K)[[k]])[0]
        np.testing.assert_allclose(images[b, k], 1.0 / (1.0 + np.exp(-y)), rtol=1e-10)


HANDLED = [n for n in ESTIMATORS if facts(n).families[0].name == "categorical" and not facts(n).multi_sample]


@pytest.mark.parametrize("name", [None, *HANDLED])
def test_a_training_step_neither_waits_nor_copies_and_gives_numpy_s_bits(name):
    """With every estimator of one-hot variables, on the stand-in device: nothing comes out until the loss is read."""
    results = []
    for backend in (Backend(), DevsimBackend()):
        model = SemiSupervisedVAE(8, 3, 2, (6,), rng=Rng(0)).to(backend)
        optimizer, estimator = Adam(model.parameters(), 1e-2), name and create(name)
        if estimator is not None:
            estimator.of("categorical").check_size(1, 3)
        images = backend.to_device(Rng(0).site("x").uniform((10, 8)))
        labels = backend.to_device(np.array([0, 2, 1, 1]))
        with forbid("sync", "d2h"):
            for step in range(3):
                rng = Rng(0).at(step)
                optimizer.zero_grad()
                labelled = model.labelled(images[:4], labels, rng.site("labelled"))
                unlabelled = model.unlabelled(images[4:], rng, estimator)
                assert unlabelled.shape == (6,)
                (labelled.mean() + unlabelled.mean()).backward()
                optimizer.step()
                if estimator is not None:
                    estimator.update()
        results.append([backend.to_host(p.data) for p in model.parameters()])
        assert all(p.data.dtype == np.float32 for p in model.parameters())
    for a, b in zip(*results, strict=True):
        assert np.isfinite(a).all()
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", [None, "gumbel-softmax", "rloo"])
@pytest.mark.daily(1)
def test_images_without_labels_teach_the_classifier(name):
    """Two kinds of noisy images and one label for each kind: the others say what the kinds are like."""
    kinds = np.kron(np.eye(2), np.ones(4))
    truth = Rng(0).permutation(80) % 2
    x = (Rng(0).site("x").uniform((80, 8)) < 0.2 + 0.6 * kinds[truth]).astype(np.float32)
    known = np.array([(truth == k).argmax() for k in (0, 1)])
    accuracy = {}
    for unlabelled in (False, True):
        model, estimator = SemiSupervisedVAE(8, 2, 1, (8,), rng=Rng(4)), name and create(name)
        optimizer = Adam(model.parameters(), 1e-2)
        for step in range(150):
            rng = Rng(0).at(step)
            optimizer.zero_grad()
            loss = model.labelled(x[known], np.array([0, 1]), rng.site("labelled")).mean()
            if unlabelled:
                loss = loss + model.unlabelled(x, rng, estimator).mean()
            loss.backward()
            optimizer.step()
        accuracy[unlabelled] = (model.predict(x) == truth).mean()
    assert accuracy[False] < 0.75
    assert accuracy[True] > 0.85


def test_bad_settings_are_refused_in_one_sentence():
    for sizes in ((0, 3, 2, (4,)), (5, 0, 2, (4,)), (5, 3, 0, (4,)), (5, 3, 2, (4, 0)), (5, 3, 2, ())):
        with pytest.raises(ValueError, match="sizes must be at least 1, got pixels"):
            SemiSupervisedVAE(*sizes, rng=Rng(0))
    model, x = small()
    with pytest.raises(ValueError, match="VIMCO is a bound of several samples, which needs the density of each z"):
        model.unlabelled(x, Rng(0), create("vimco"))
