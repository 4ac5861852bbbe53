"""Gradient estimators for discrete latent variables: one call for all, each rule derived where it stands.

    from estimators import create
    estimator = create("reinmax", tau=1.3)
    value = estimator(logits, cost, rng)          # (B,), with the estimated gradient attached

`ESTIMATORS` is the one list that scripts, README and tests read. An option can be given in the name: "rloo:samples=4".
"""

from __future__ import annotations

import functools
import inspect

from .base import Estimator, Sampler, attach_gradient
from .exact import Exact
from .gapped import GappedStraightThrough
from .gumbel_rao import GumbelRao
from .gumbel_softmax import GumbelSoftmax, STGumbelSoftmax
from .local_expectation import LocalExpectation
from .muprop import MuProp, SimpleMuProp
from .reinmax import ReinMax
from .score_function import Reinforce, ReinforceRunningMean, Rloo
from .straight_through import StraightThrough
from .zgr import Zgr

ESTIMATORS = {
    "exact": Exact,
    "reinforce": Reinforce,
    "reinforce-mean": ReinforceRunningMean,
    "rloo": Rloo,
    "muprop": MuProp,
    "muprop-simple": SimpleMuProp,
    "local-expectation": LocalExpectation,
    "st": StraightThrough,
    "gumbel-softmax": GumbelSoftmax,
    "st-gs": STGumbelSoftmax,
    "gumbel-rao": GumbelRao,
    "gst-1.0": functools.partial(GappedStraightThrough, gap=1.0),
    "gst-p": functools.partial(GappedStraightThrough, gap="p"),
    "gst": GappedStraightThrough,
    "reinmax": ReinMax,
    "zgr": Zgr,
}

__all__ = ["ESTIMATORS", "Estimator", "Sampler", "attach_gradient", "create", "facts"]


def facts(name: str) -> type[Estimator]:
    """The class behind a registered name; its attributes are the estimator's facts."""
    factory = ESTIMATORS[name]
    return factory.func if isinstance(factory, functools.partial) else factory


def create(spec: str, tau: float | None = None) -> Estimator:
    """The estimator called `spec`: a registered name, or "name:option=value,option=value".

    tau: the temperature, for those that have one.  ValueError, in one sentence, for an unknown name or option, a
    value out of range, or a temperature given to an estimator without one.
    """
    name, _, text = spec.partition(":")
    if name not in ESTIMATORS:
        raise ValueError(f"unknown estimator {name!r}; the known ones are {', '.join(ESTIMATORS)}.")
    fixed = getattr(ESTIMATORS[name], "keywords", {})
    known = [p for p in inspect.signature(ESTIMATORS[name]).parameters if p not in fixed]
    options: dict[str, object] = {} if tau is None else {"tau": tau}
    for item in filter(None, text.split(",")):
        key, _, value = (part.strip() for part in item.partition("="))
        if key in options:
            raise ValueError(f"the option {key!r} of the estimator {name} is given twice.")
        options[key] = _number(value)
    for key in options:
        if key not in known:
            has = f"its options are {', '.join(known)}" if known else "it has no options"
            raise ValueError(f"the estimator {name} has no option {key!r}; {has}.")
    try:
        return ESTIMATORS[name](**options)
    except TypeError as error:
        raise ValueError(f"the estimator {name} cannot take {text!r}: {error}.") from error


def _number(text: str):
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
