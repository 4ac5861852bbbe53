"""Gumbel-Softmax and its straight-through forms: their options reach the rules."""

import pytest

from estimators import bernoulli, create
from estimators.gumbel_softmax import decoupled_st_gumbel_softmax, gumbel_softmax, st_gumbel_softmax
from small_problem import assert_draws_alike, gumbel, logistic


@pytest.mark.parametrize(
    ("spec", "family", "expected"),
    [
        ("gumbel-softmax:tau=2", "categorical", lambda x, r: gumbel_softmax(x, gumbel(x, r), tau=2.0)),
        (
            "gumbel-softmax:tau=2",
            "bernoulli",
            lambda x, r: gumbel_softmax(x, logistic(x, r), tau=2.0, family=bernoulli),
        ),
        ("st-gs:tau=2", "categorical", lambda x, r: st_gumbel_softmax(x, gumbel(x, r), tau=2.0)),
        ("st-gs:tau=2", "bernoulli", lambda x, r: st_gumbel_softmax(x, logistic(x, r), tau=2.0, family=bernoulli)),
        (
            "st-gs-decoupled:tau_f=2,tau_b=0.5",
            "categorical",
            lambda x, r: decoupled_st_gumbel_softmax(x, gumbel(x, r), tau_f=2.0, tau_b=0.5),
        ),
        (
            "st-gs-decoupled:tau_f=2,tau_b=0.5",
            "bernoulli",
            lambda x, r: decoupled_st_gumbel_softmax(x, logistic(x, r), tau_f=2.0, tau_b=0.5, family=bernoulli),
        ),
    ],
)
def test_the_options_of_a_sampler_reach_its_rule(spec, family, expected):
    assert_draws_alike(create(spec, family=family).sample, expected, family)
