"""Every registered estimator with each kind of variables that it handles, and options for those that have them."""

import inspect

import pytest

from estimators import ESTIMATORS, facts

PAIRS = [pytest.param(n, family.name, id=f"{n}-{family.name}") for n in ESTIMATORS for family in facts(n).families]


def pairs(fact):
    """Those of the pairs whose estimator has the fact."""
    return [p for p in PAIRS if fact(facts(p.values[0]).of(p.values[1]))]


def quick(quickly, parameters):
    """The parameters; those whose first value is not in `quickly` are marked slow: one of a kind is enough daily."""
    values = [getattr(p, "values", (p,)) for p in parameters]
    return [pytest.param(*v, marks=() if v[0] in quickly else pytest.mark.slow) for v in values]


def with_options(name, **options):
    """The name, and those of the options that this estimator has: "rebar:lr=0.05"."""
    fixed = getattr(ESTIMATORS[name], "keywords", {})
    known = [key for key in inspect.signature(ESTIMATORS[name]).parameters if key not in fixed]
    return f"{name}:" + ",".join(f"{key}={value}" for key, value in options.items() if key in known)
