"""REBAR, RELAX and LAX: the derivatives that they learn by, their noise given the sample, scale and temperature."""

import math

import numpy as np
import pytest

import ladder
from estimators import bernoulli, categorical, create
from estimators.categorical import conditional_gumbel
from estimators.learned import Learned
from estimators.rebar import Network, SoftenedCost
from estimators.score_function import reinforce_gradient
from minigrad import Rng, Tensor
from registry import with_options
from small_problem import logits_of, one_cost


def test_the_conditional_derivative_is_that_of_the_conditional_sample():
    """∂z̃/∂θ by differences, at fixed noise, for both kinds; and the forward product is its transpose."""
    rng = np.random.default_rng(0)
    theta = rng.standard_normal((50, 4))
    d = np.eye(4)[rng.integers(0, 4, 50)]
    e, u, v = rng.exponential(size=(50, 4)), rng.standard_normal((50, 4)), rng.standard_normal((50, 4))
    bits, uniform = (rng.random((50, 4)) < 0.5).astype(float), rng.random((50, 4))
    for family, sample, at in (
        (categorical, d, lambda t: conditional_gumbel(t, d, e[None])[0]),
        (bernoulli, bits, lambda t: bernoulli.conditional_logistic(t, bits, uniform)),
    ):
        p, z = family.probability(theta), at(theta)
        np.testing.assert_array_equal(family.harden(z), sample)
        forward = (at(theta + 1e-6 * v) - at(theta - 1e-6 * v)) / 2e-6
        np.testing.assert_allclose(family.conditional_jvp(p, sample, z, v), forward, rtol=1e-6, atol=1e-8)
        backward = family.conditional_vjp(p, sample, z, u)
        np.testing.assert_allclose((backward * v).sum(), (u * forward).sum(), rtol=1e-7)


@pytest.mark.parametrize("name", ["rebar", "rebar-coupled", "relax"])
@pytest.mark.parametrize(("family", "K"), [("categorical", 3), ("bernoulli", 2)])
def test_rebar_without_the_dependence_of_the_conditional_noise_on_theta_is_biased(monkeypatch, name, family, K):
    """The known bug of published code: z̃ differentiated as θ + noise, without ∂v'/∂θ."""
    problem = ladder.Problem(family, 3, K, "cubic")
    estimator = ladder.made(name, family, problem)
    monkeypatch.setattr(estimator.family, "conditional_vjp", lambda p, d, z, u: u)
    _, g = ladder.monte_carlo(problem, estimator, ladder.DRAWS)
    assert np.abs(ladder.z_scores(g, ladder.exact(problem, estimator))).max() > 20


@pytest.mark.parametrize("family", ["categorical", "bernoulli"])
def test_rebar_with_eta_zero_is_reinforce(family):
    problem = ladder.Problem(family, 3, 2, "cubic")
    estimator = create("rebar").of(family)
    _, before = ladder.run(problem, estimator, 50, Rng(3))
    estimator.learned["w"][:] = -60.0
    _, g = ladder.run(problem, estimator, 50, Rng(3))
    d = estimator.family.harden(problem.rows(50).data + estimator.family.noise(Rng(3), problem.rows(50).data))
    p = estimator.family.probability(problem.rows(50).data)
    np.testing.assert_allclose(g, reinforce_gradient(p, d, problem.values(d)), atol=1e-12)
    assert np.abs(before - g).max() > 0.1


def test_rebar_starts_with_the_stated_scale_and_temperature():
    estimator = create("rebar:eta=0.7,tau=0.6")
    ladder.run(ladder.Problem("categorical", 3, 2, "cubic"), estimator, 5, Rng(0))
    control = SoftenedCost(one_cost, estimator.learned, categorical)
    np.testing.assert_allclose([control.eta[0], control.tau[0]], [0.7, 0.6])


@pytest.mark.parametrize(
    ("spec", "counts"),
    [
        ("rebar:tau_every=0", [3, 3, 3]),
        ("rebar:tau_every=1", [7, 7, 7]),
        ("rebar:tau_every=2", [7, 3, 7]),
        ("rebar-coupled:tau_every=1", [4, 4, 4]),
    ],
)
def test_the_temperature_of_rebar_is_trained_as_often_as_stated(spec, counts):
    estimator, found = create(spec), []
    for step in range(3):
        seen = []
        estimator(logits_of("categorical", 3), lambda d, seen=seen: (seen.append(d), one_cost(d))[1], Rng(0).at(step))
        estimator.update()
        found.append(len(seen))
    assert found == counts
    assert (estimator.learned["log_tau"][0] == math.log(0.5)) == spec.endswith("=0")


@pytest.mark.parametrize("family", [categorical, bernoulli])
@pytest.mark.parametrize("variate", ["cost", "network"])
def test_the_mixed_derivative_of_a_control_variate(family, variate):
    """Σ a c(z) + ⟨v, ∇c(z)⟩ by differences with respect to every parameter, and ∇c(z) itself."""
    rng = np.random.default_rng(0)
    z, v, a = rng.standard_normal((5, 2, 3)), rng.standard_normal((5, 2, 3)), rng.standard_normal(5)
    w = rng.standard_normal((2, 3))
    cost = lambda d: ((d * w).sum(axis=(1, 2)) + 0.4) ** 3.0
    learned = Learned(1e-3)
    initial = {"w": 0.3, "log_tau": -0.4} if variate == "cost" else Network.initial(Rng(0), 6, 7)
    if variate == "network":
        initial |= {"w2": rng.standard_normal(7), "b1": rng.standard_normal(7), "b2": 0.2}
    learned.start(lambda: initial, like=z)

    def control():
        return SoftenedCost(cost, learned, family) if variate == "cost" else Network(learned)

    def total():
        value, g = control()(z)
        return float((a * value).sum() + (v * g).sum())

    at = control()
    _, g = at(z)
    step = 1e-6 * v
    slope = (control()(z + step)[0] - control()(z - step)[0]) / 2e-6
    np.testing.assert_allclose((g * v).sum(axis=(1, 2)), slope, rtol=1e-6)
    found = at.mixed(0, a, v)
    for name, p in learned.parameters.items():
        numeric = np.empty_like(p.data)
        for i in np.ndindex(p.shape):
            before, values = p.data[i], []
            for h in (1e-6, -1e-6):
                p.data[i] = before + h
                values.append(total())
            p.data[i], numeric[i] = before, (values[0] - values[1]) / 2e-6
        np.testing.assert_allclose(np.reshape(found[name], p.shape), numeric, rtol=2e-5, atol=1e-7, err_msg=name)


@pytest.mark.parametrize("name", ["rebar", "relax", "lax"])
def test_a_masked_class_has_no_part_in_what_is_learned(name):
    """The gradients handed to Adam are those of ‖ĝ‖² of the classes that exist."""
    mask = np.array([True, False, True])
    estimator = create(with_options(name, lr=0.05, hidden=4))

    def mean_square():
        logits = Tensor(np.broadcast_to([[0.3, 2.0, -0.4]], (20, 2, 3)).copy(), requires_grad=True)
        cost = lambda d: ((d * np.array([1.0, 50.0, -2.0])).sum(axis=(1, 2)) + 0.5) ** 2.0
        estimator(logits, cost, Rng(5), mask=mask).sum().backward()
        return (logits.grad**2).sum() / 20

    mean_square()
    if "w2" in estimator.learned.parameters:
        estimator.learned["w2"][...] = [3.0, -2.0, 1.0, 4.0]
        estimator.learned._gradients = None  # those of the first call are kept until `update`
        mean_square()
    found = {k: np.array(v) for k, v in estimator.learned._gradients.items()}
    for key, p in estimator.learned.parameters.items():
        at = (0,) * p.ndim
        before, values = p.data[at], []
        for h in (1e-5, -1e-5):
            p.data[at] = before + h
            values.append(mean_square())
        p.data[at] = before
        numeric = (values[0] - values[1]) / 2e-5
        assert np.reshape(found[key], p.shape)[at] == pytest.approx(numeric, rel=1e-3, abs=1e-3), key
