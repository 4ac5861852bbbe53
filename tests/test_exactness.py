"""The exactness ladder: every registered estimator, both kinds of variables, one and three of them, K = 2, 3, 4, and a
linear, a quadratic, a cubic and an exponential cost. Every cell asserts "exact" or "biased", as `exact_for` claims:

    by enumeration, to 1e-10,     where the estimator is a function of discrete samples, or linear in uniform numbers
                                  between the places where they decide something;
    by quadrature, to 1e-7,       where one variable of two classes has continuous noise of one or two dimensions;
    by Monte Carlo,               in standard errors with a fixed seed, otherwise.
"""

import itertools

import numpy as np
import pytest

import ladder
from estimators import ESTIMATORS, create, facts
from estimators.categorical import conditional_gumbel
from estimators.enumeration import Given
from estimators.stick_breaking import sticks
from estimators.unordered_set import set_weights, unordered_set_gradient
from minigrad import Rng
from minigrad.fused import softmax_array

# the options with which a cell is decisive: several samples, but few; a bias that can be seen
OPTIONS = {
    "finite-differences": "step=0.8",
    "spsa": "width=2.5",
    "nvil": "normalise=0,lr=0.05",
    "vimco": "samples=2",
    "unordered-set": "samples=2",
    "st-decoupled": "tau_f=1.6,tau_b=0.8",
    "reinmax-rao": "tau=3",
    "reinmax-cv": "tau=0.5",
    "st-slope": "rate=0.05",
    "rebar": "tau=0.7,lr=0.05",
    "rebar-coupled": "tau=0.7,lr=0.05",
    "relax": "tau=0.7,lr=0.05,hidden=8",
    "lax": "lr=0.05,hidden=8",
    "double-cv": "lr=0.1",
    "rodeo": "lr=0.1",
}
EXACT_ON = {"all": set(ladder.COSTS), "quadratic": {"linear", "quadratic"}, "linear": {"linear"}, "none": set()}
DRAWS = 20_000


def made(name, family, problem):
    """The estimator with a past: state, networks and temperatures that are no longer what they were at the start."""
    estimator = create(f"{name}:{OPTIONS.get(name, '')}").of(family)
    if estimator.state or estimator.learned is not None:
        for step in range(4):
            ladder.run(problem, estimator, 40, Rng(9).at(step))
            estimator.update()
    return estimator


def enumerated(name, estimator, problem):
    """The exact mean of the gradient and of the value; None where there is no such sum."""
    if estimator.randomness == "none":
        return tuple(x[0] for x in ladder.run(problem, estimator, 1, Rng(0)))
    if estimator.randomness == "sample":
        return ladder.over_samples(problem, estimator)
    if name in ("rloo", "vimco", "double-cv", "rodeo"):
        return ladder.over_samples(problem, estimator, samples=2)
    if name == "sum-and-sample":
        return over_sum_and_sample(problem, estimator)
    if name == "measure-valued" and estimator.family.name == "bernoulli":
        return ladder.over_samples(problem, estimator)
    if name == "measure-valued":
        # linear in the classes drawn for the negative parts: the estimate at their mean is the mean of the estimate
        p = softmax_array(problem.logits)
        others = np.where(np.eye(p.shape[-1]) > 0, 0.0, p[:, None, :])
        outcomes, q = ladder.all_outcomes(problem, estimator)
        mean = np.broadcast_to(others / others.sum(axis=-1, keepdims=True), (len(q), *others.shape))
        value, g = ladder.run(problem, estimator, len(q), Given(samples=[outcomes, mean]))
        return q @ value, np.tensordot(q, g, axes=1)
    if name == "unordered-set":
        return over_sets(problem, estimator)
    if estimator.randomness == "uniform":
        return ladder.over_uniforms(problem, estimator, breaks(name, estimator, problem))
    return None


# continuous noise: is there also noise conditioned on the sample, and is the sample drawn first?
NOISE = {
    "gumbel-softmax": (False, False),
    "st-gs": (False, False),
    "st-gs-decoupled": (False, False),
    "noisy-rectifier": (False, False),
    "gumbel-rao": (True, True),
    "reinmax-rao": (True, True),
    "reinmax-cv": (True, False),
    "rebar": (True, False),
    "rebar-coupled": (False, False),
    "relax": (True, False),
    "lax": (False, False),
    "ars": (False, False),
    "arsm": (False, False),
}


def quadrature(name, estimator, problem):
    """The mean over one or two dimensions of noise; None if there are more. A network that sees both Gumbels has more,
    so LAX and RELAX have so few for a bit only."""
    bit = estimator.family.name == "bernoulli"
    known = name in NOISE and (bit or name not in ("lax", "relax"))
    if problem.logits.size > 2 or len(problem.logits) > 1 or not known:
        return None
    conditional, samples = NOISE[name]
    p = estimator.family.probability(estimator.logit_scale * problem.logits).ravel()[0]
    breaks = [p, 1 - p] if name in ("ars", "arsm") else [1 - p]  # b = [a + log u/(1 − u) > 0]
    return ladder.over_noise(problem, estimator, breaks, conditional, samples)


def over_sum_and_sample(problem, estimator):
    outcomes, q = ladder.all_outcomes(problem, estimator)
    p = softmax_array(problem.logits)
    top = np.eye(p.shape[-1])[p.argmax(axis=-1)]
    rest = p * (1 - top)
    weight_z = np.prod(((rest / rest.sum(axis=-1, keepdims=True)) * outcomes).sum(axis=-1), axis=-1)
    i, j = np.array(list(itertools.product(np.flatnonzero(weight_z), range(len(q))))).T
    value, g = ladder.run(problem, estimator, len(i), Given(samples=[outcomes[i], outcomes[j]]))
    weight = weight_z[i] * q[j]
    return weight @ value, np.tensordot(weight, g, axes=1)


def over_sets(problem, estimator, size=2):
    """All sets of different outcomes, with the probability of drawing each without replacement, in any order."""
    outcomes, q = ladder.all_outcomes(problem, estimator)
    sets = np.array(list(itertools.combinations(range(len(q)), size))).T
    probability = 0.0
    for order in itertools.permutations(range(size)):
        drawn, rest = 1.0, 1.0
        for place in order:
            drawn, rest = drawn * q[sets[place]] / rest, rest - q[sets[place]]
        probability = probability + drawn
    assert probability.sum() == pytest.approx(1.0)
    f = problem.values(outcomes)[sets]
    first, second = set_weights(np.log(q[sets]))
    p = np.broadcast_to(softmax_array(problem.logits), (sets.shape[1], *problem.logits.shape))
    g = unordered_set_gradient(p, outcomes[sets], f, first, second)
    return probability @ (first * f).sum(axis=0), np.tensordot(probability, g, axes=1)


def breaks(name, estimator, problem):
    """Where each uniform number changes what it decides."""
    if name == "disarm-sb":
        psi, _, _ = sticks(np.sort(problem.logits, axis=-1))
        p = 1 / (1 + np.exp(-psi))
    else:
        p = estimator.family.probability(problem.logits)
    return p[..., None] if name == "ar" else np.stack([p, 1 - p], axis=-1)


def objective(name, estimator, problem):
    """The gradient of what the estimator claims to estimate, and its value."""
    outcomes, q = ladder.all_outcomes(problem, estimator)
    if name == "vimco":  # −E log mean e^(−f) over pairs, by the score of both
        f = problem.values(outcomes)
        bound = -np.log(0.5 * (np.exp(-f[:, None]) + np.exp(-f)))
        score = outcomes - estimator.family.probability(problem.logits)
        weight = q[:, None] * q * bound
        return weight.sum(), np.tensordot(weight.sum(axis=1) + weight.sum(axis=0), score, axes=1)
    return q @ problem.values(outcomes), ladder.exact(problem, estimator)


def cells():
    for name in ESTIMATORS:
        for family in facts(name).families:
            for L, K in ladder.SIZES:
                if family.name == "categorical" or K == 2:
                    for cost in ladder.COSTS:
                        yield pytest.param(name, family.name, L, K, cost, id=f"{name}-{family.name}-{L}x{K}-{cost}")


OWN_NOISE = ("gumbel-softmax", "noisy-rectifier", "sts")  # another objective, with noise in it: below


@pytest.mark.parametrize(("name", "family", "L", "K", "cost"), [c for c in cells() if c.values[0] not in OWN_NOISE])
def test_exactness_ladder(name, family, L, K, cost):
    problem = ladder.Problem(family, L, K, cost)
    estimator = made(name, family, problem)
    claimed_value, claimed = objective(name, estimator, problem)
    exact = cost in EXACT_ON[estimator.exact_for]
    found = enumerated(name, estimator, problem)
    if found is not None:
        value, g = found
        assert value == pytest.approx(claimed_value, abs=1e-10)
        error = np.abs(g - claimed).max() / np.abs(claimed).max()
        assert error < 1e-10 if exact else error > 5e-3
    elif (found := quadrature(name, estimator, problem)) is not None:
        value, g = found
        assert value == pytest.approx(claimed_value, abs=1e-7)
        error = np.abs(g - claimed).max() / np.abs(claimed).max()
        assert error < 1e-7 if exact else error > 5e-3
    else:
        value, g = ladder.monte_carlo(problem, estimator, DRAWS)
        assert abs(ladder.z_scores(value, claimed_value)) < 4.5
        z = np.abs(ladder.z_scores(g, claimed)).max()
        assert z < 4.5 if exact else z > 6.0


@pytest.mark.parametrize(("name", "family", "L", "K", "cost"), [c for c in cells() if c.values[0] in OWN_NOISE])
def test_exactness_ladder_of_relaxed_objectives(name, family, L, K, cost):
    """Units that put out something between the discrete values estimate the gradient of their own E f(h): differences
    of its mean, with common noise, decide; and it is never the gradient of E f(D).

    The rectifier's output is not bounded, and the exponential cost has no mean then: it gets a bounded one."""
    unbounded = (name, cost) == ("noisy-rectifier", "exponential")
    problem = ladder.Problem(family, L, K, "bounded" if unbounded else cost)
    estimator = made(name, family, problem)
    if name == "sts":  # b depends on θ, too: sum over b
        mean_at = lambda: ladder.over_uniforms(
            problem, estimator, np.sqrt(estimator.family.probability(problem.logits))[..., None]
        )
    elif quadrature(name, estimator, problem) is not None:
        mean_at = lambda: quadrature(name, estimator, problem)
    else:
        mean_at = lambda: tuple(x.mean(axis=0) for x in ladder.monte_carlo(problem, estimator, DRAWS))
    _, g = mean_at()
    own, theta = np.empty_like(g), problem.logits
    for at in np.ndindex(theta.shape):
        values = []
        for h in (1e-5, -1e-5):
            problem.logits = theta.copy()
            problem.logits[at] += h
            values.append(mean_at()[0])
        own[at] = (values[0] - values[1]) / 2e-5
    problem.logits = theta
    scale = np.abs(own).max()
    if cost in EXACT_ON[estimator.exact_for]:
        assert np.abs(g - own).max() < 2e-3 * scale
    else:
        assert np.abs(g - own).max() > 2e-2 * scale
    assert np.abs(g - ladder.exact(problem, estimator)).max() > 2e-2 * np.abs(g).max()


@pytest.mark.parametrize("cost", ladder.COSTS)
@pytest.mark.parametrize(
    ("spec", "family"),
    [
        ("st:tau=2", "categorical"),
        ("reinmax:tau=2", "categorical"),
        ("st-slope:rate=1,surrogate=hard", "bernoulli"),
        ("darn:expand_at=half", "bernoulli"),
        ("gst:gap=0", "categorical"),
        ("gst:detached=0", "categorical"),
    ],
)
def test_options_that_cost_an_estimator_its_exactness(spec, family, cost):
    """Another temperature, another surrogate, another expansion point. (Without temperature, these are exact for
    linear or quadratic costs; DARN at ½ still is for linear ones.)"""
    problem, estimator = ladder.Problem(family, 3, 3 if family == "categorical" else 2, cost), create(spec)
    if spec.startswith("st-slope"):
        estimator.update()
    _, g = ladder.over_samples(problem, estimator)
    claimed = ladder.exact(problem, estimator)
    error = np.abs(g - claimed).max() / np.abs(claimed).max()
    still_exact = spec.startswith("darn") and cost == "linear"
    assert error < 1e-10 if still_exact else error > 5e-3
    assert (cost in EXACT_ON[estimator.exact_for]) == still_exact


def test_every_cell_is_there():
    assert {c.values[0] for c in cells()} == set(ESTIMATORS)
    seen = {(c.values[1], *c.values[2:4]) for c in cells()}
    assert seen == {("categorical", L, K) for L, K in ladder.SIZES} | {("bernoulli", 1, 2), ("bernoulli", 3, 2)}


def test_the_oracle_is_the_derivative_of_the_expectation():
    for family, K in (("categorical", 3), ("bernoulli", 2)):
        for cost in ladder.COSTS:
            problem = ladder.Problem(family, 3, K, cost)
            estimator = create("exact").of(family)
            found, numeric = ladder.exact(problem, estimator), np.zeros_like(problem.logits)
            theta = problem.logits
            for at in np.ndindex(theta.shape):
                values = []
                for h in (1e-6, -1e-6):
                    problem.logits = theta.copy()
                    problem.logits[at] += h
                    outcomes, q = ladder.all_outcomes(problem, estimator)
                    values.append(q @ problem.values(outcomes))
                numeric[at] = (values[0] - values[1]) / 2e-6
            np.testing.assert_allclose(found, numeric, rtol=1e-6, atol=1e-7)


def test_finite_differences_err_by_the_square_of_the_step():
    problem = ladder.Problem("categorical", 3, 3, "cubic")
    errors = []
    for step in (0.2, 0.1, 0.05):
        estimator = create(f"finite-differences:step={step}")
        errors.append(np.abs(ladder.run(problem, estimator, 1, Rng(0))[1][0] - ladder.exact(problem, estimator)).max())
    assert errors[0] / errors[1] == pytest.approx(4.0, rel=0.05)
    assert errors[1] / errors[2] == pytest.approx(4.0, rel=0.05)


def test_nvil_normalises_by_its_deviation_and_is_exact_up_to_that_factor():
    problem = ladder.Problem("categorical", 3, 3, "cubic")
    estimator = create("nvil")
    for step in range(30):
        ladder.run(problem, estimator, 100, Rng(1).at(step))
        estimator.update()
    deviation = np.sqrt(estimator.variance)
    assert deviation > 1.1
    _, g = ladder.over_samples(problem, estimator)
    np.testing.assert_allclose(g * deviation, ladder.exact(problem, estimator), atol=1e-10)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_unordered_sets_of_several_sizes_are_exact(size):
    problem = ladder.Problem("categorical", 2, 3, "cubic")
    _, g = over_sets(problem, create("unordered-set"), size)
    np.testing.assert_allclose(g, ladder.exact(problem, create("unordered-set")), atol=1e-10)


@pytest.mark.parametrize(
    "spec",
    [
        "unordered-set:samples=3",
        "sum-and-sample:summed=2",
        "sum-and-sample:baseline=0",
        "measure-valued",
        "arms:samples=3",
        "disarm-sb",
        "rloo:samples=4",
        "relax:coupled=1",
    ],
)
def test_other_options_and_what_was_enumerated_by_its_rule_are_unbiased_as_called(spec):
    estimator = create(spec)
    family = estimator.family.name
    problem = ladder.Problem(family, 3, 4 if family == "categorical" else 2, "cubic")
    value, g = ladder.monte_carlo(problem, estimator, 2 * DRAWS)
    outcomes, q = ladder.all_outcomes(problem, estimator)
    assert abs(ladder.z_scores(value, q @ problem.values(outcomes))) < 4.5
    assert np.abs(ladder.z_scores(g, ladder.exact(problem, estimator))).max() < 4.5


# ---- negative controls: what must not pass


@pytest.mark.parametrize("name", ["rebar", "rebar-coupled", "relax"])
@pytest.mark.parametrize(("family", "K"), [("categorical", 3), ("bernoulli", 2)])
def test_rebar_without_the_dependence_of_the_conditional_noise_on_theta_is_biased(monkeypatch, name, family, K):
    """The known bug of published code: z̃ differentiated as θ + noise, without ∂v'/∂θ."""
    problem = ladder.Problem(family, 3, K, "cubic")
    estimator = made(name, family, problem)
    monkeypatch.setattr(estimator.family, "conditional_vjp", lambda p, d, z, u: u)
    _, g = ladder.monte_carlo(problem, estimator, DRAWS)
    assert np.abs(ladder.z_scores(g, ladder.exact(problem, estimator))).max() > 20


def test_the_conditional_derivative_is_that_of_the_conditional_sample():
    """∂z̃/∂θ by differences, at fixed noise, for both kinds; and the forward product is its transpose."""
    from estimators import bernoulli, categorical

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


def test_double_control_variates_without_the_term_given_back_are_biased(monkeypatch):
    from estimators import double_cv

    problem = ladder.Problem("bernoulli", 3, 2, "cubic")
    estimator = made("double-cv", "bernoulli", problem)
    assert abs(estimator.learned["alpha"][0]) > 0.05
    monkeypatch.setattr(double_cv.bernoulli, "vjp", lambda p, g: 0.0 * g)
    _, g = ladder.over_samples(problem, estimator, samples=2)
    assert np.abs(g - ladder.exact(problem, estimator)).max() > 1e-3


def test_arms_without_its_correction_for_the_correlation_is_biased():
    from estimators.antithetic import antithetic_samples, dirichlet_copula

    problem = ladder.Problem("bernoulli", 3, 2, "cubic")
    p = 1 / (1 + np.exp(-np.broadcast_to(problem.logits, (DRAWS, 3))))
    bs = antithetic_samples(p, dirichlet_copula(np.random.default_rng(0).exponential(size=(4, DRAWS, 3))))
    f = np.stack([problem.values(b) for b in bs])
    g = (((f - f.mean(axis=0)) / 3)[..., None] * (bs - p)).sum(axis=0)
    assert np.abs(ladder.z_scores(g, ladder.exact(problem, create("arms")))).max() > 20


def test_the_published_formula_of_darn_at_one_half_has_mean_zero_on_quadratic_costs():
    """Jang et al. 2017, section 3.2, as printed: a baseline f(½) + f'(½)(b − ½) whose mean is not given back. It leaves
    nothing; what it must mean is exact for costs without products of two bits."""
    problem = ladder.Problem("bernoulli", 3, 2, "quadratic")
    problem.m = np.diag(np.diag(problem.m))
    estimator = create("darn:expand_at=half")
    outcomes, q = ladder.all_outcomes(problem, estimator)
    p = estimator.family.probability(problem.logits)
    half = np.full((1, 3), 0.5)
    df = problem.a + 2 * np.diag(problem.m) * 0.5
    residual = problem.values(outcomes) - problem.values(half) - (outcomes - 0.5) @ df
    np.testing.assert_allclose(np.tensordot(q * residual, outcomes - p, axes=1), 0.0, atol=1e-12)
    exact = ladder.exact(problem, estimator)
    np.testing.assert_allclose(ladder.over_samples(problem, estimator)[1], exact, atol=1e-12)
    assert np.abs(exact).max() > 0.1
    coupled = ladder.Problem("bernoulli", 3, 2, "quadratic")
    assert np.abs(ladder.over_samples(coupled, estimator)[1] - ladder.exact(coupled, estimator)).max() > 1e-2
