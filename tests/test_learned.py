"""What estimators train by themselves: along the right derivatives, with less variance, and from a neutral start."""

import numpy as np
import pytest

import ladder
from estimators import create
from minigrad import Rng
from registry import pairs, with_options

LEARNERS = pairs(lambda e: e.learned_objective == "variance")


@pytest.mark.parametrize(("name", "family"), LEARNERS)
def test_what_is_learned_descends_on_the_mean_square_of_the_estimate(name, family):
    """The gradients handed to Adam are those of mean ‖ĝ‖² over the batch, at fixed noise: every parameter, by
    differences."""
    problem = ladder.Problem(family, 3, 3 if family == "categorical" else 2, "cubic")
    estimator = create(with_options(name, lr=0.05, hidden=4, samples=3), family=family)
    for step in range(3):  # away from the zeros at the start
        ladder.run(problem, estimator, 20, Rng(4).at(step))
        estimator.update()
    if hasattr(estimator, "updates"):
        estimator.updates = 0  # so that the temperature's turn has come

    def mean_square():
        _, g = ladder.run(problem, estimator, 20, Rng(5))
        return (g * g).sum() / 20

    mean_square()
    found = {k: np.array(v) for k, v in estimator.learned._gradients.items()}
    assert found.keys() == estimator.learned.parameters.keys()
    for key, p in estimator.learned.parameters.items():
        numeric = np.empty_like(p.data)
        for i in np.ndindex(p.shape):
            before, values = p.data[i], []
            for h in (1e-5, -1e-5):
                p.data[i] = before + h
                values.append(mean_square())
            p.data[i], numeric[i] = before, (values[0] - values[1]) / 2e-5
        scale = max(np.abs(numeric).max(), 1e-3)
        np.testing.assert_allclose(found[key].reshape(p.shape) / scale, numeric / scale, atol=1e-4, err_msg=key)


@pytest.mark.parametrize("name", list(dict.fromkeys(p.values[0] for p in LEARNERS)))
def test_learning_lowers_the_variance(name):
    problem = ladder.Problem("bernoulli", 3, 2, "quadratic")
    estimator = create(with_options(name, lr=0.02, tau=2, eta=0.2), family="bernoulli")
    variance = lambda: ladder.monte_carlo(problem, estimator, 5_000, seed=1)[1].var(axis=0).sum()
    before = variance()
    for step in range(150):
        ladder.run(problem, estimator, 100, Rng(2).at(step))
        estimator.update()
    assert variance() < 0.9 * before


@pytest.mark.parametrize(
    ("name", "reference", "family"),
    [
        ("double-cv", "rloo", "bernoulli"),
        ("rodeo", "rloo", "bernoulli"),
        ("relax", "rebar", "categorical"),
        ("relax", "rebar", "bernoulli"),
        ("nvil:normalise=0", "reinforce", "categorical"),
        ("nvil", "reinforce-mean", "bernoulli"),
    ],
)
def test_what_has_learned_nothing_yet_changes_nothing(name, reference, family):
    problem = ladder.Problem(family, 3, 2, "cubic")
    found, plain = (ladder.run(problem, create(n, family=family), 20, Rng(3))[1] for n in (name, reference))
    np.testing.assert_allclose(found, plain, atol=1e-12)
