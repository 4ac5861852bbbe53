"""Gradient estimators for discrete latent variables: one call for all, each rule derived where it stands.

    from estimators import create
    estimator = create("reinmax", tau=1.3)
    value = estimator(logits, cost, rng)          # (B,), with the estimated gradient attached

`ESTIMATORS` is the one list that scripts, README and tests read. An option can be given in the name: "rloo:samples=4".
"""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable

from .antithetic import AR, ARM, ARMS, DisARM
from .arsm import ARS, ARSM
from .base import Estimator, Sampler, SettingError, attach_gradient
from .darn import Darn
from .double_cv import DoubleCV
from .exact import Exact, FiniteDifferences
from .gapped import GappedStraightThrough
from .gumbel_rao import GumbelRao
from .gumbel_softmax import DecoupledSTGumbelSoftmax, GumbelSoftmax, STGumbelSoftmax
from .local_expectation import LocalExpectation, MeasureValued
from .muprop import MuProp, SimpleMuProp
from .nvil import Nvil
from .rebar import Lax, Rebar, Relax
from .reinmax import ReinMax
from .reinmax_variants import ReinMaxCV, ReinMaxRao
from .rodeo import Rodeo
from .score_function import Reinforce, ReinforceMinimumVariance, ReinforceRunningMean, Rloo
from .spsa import Spsa
from .stick_breaking import StickBreakingDisARM
from .straight_through import (
    DecoupledStraightThrough,
    IdentityStraightThrough,
    SlopeAnnealedStraightThrough,
    StraightThrough,
)
from .sum_and_sample import SumAndSample
from .units import NoisyRectifier, StochasticTimesSmooth
from .unordered_set import UnorderedSet
from .vimco import Vimco
from .zgr import Zgr

ESTIMATORS: dict[str, Callable[..., Estimator]] = {
    "exact": Exact,
    "finite-differences": FiniteDifferences,
    "spsa": Spsa,
    "reinforce": Reinforce,
    "reinforce-mean": ReinforceRunningMean,
    "reinforce-minvar": ReinforceMinimumVariance,
    "nvil": Nvil,
    "rloo": Rloo,
    "vimco": Vimco,
    "muprop": MuProp,
    "muprop-simple": SimpleMuProp,
    "sum-and-sample": SumAndSample,
    "unordered-set": UnorderedSet,
    "local-expectation": LocalExpectation,
    "measure-valued": MeasureValued,
    "st": StraightThrough,
    "st-identity": IdentityStraightThrough,
    "st-slope": SlopeAnnealedStraightThrough,
    "st-decoupled": DecoupledStraightThrough,
    "sts": StochasticTimesSmooth,
    "noisy-rectifier": NoisyRectifier,
    "gumbel-softmax": GumbelSoftmax,
    "st-gs": STGumbelSoftmax,
    "st-gs-decoupled": DecoupledSTGumbelSoftmax,
    "gumbel-rao": GumbelRao,
    "gst-1.0": functools.partial(GappedStraightThrough, gap=1.0),
    "gst-p": functools.partial(GappedStraightThrough, gap="p"),
    "gst": GappedStraightThrough,
    "darn": Darn,
    "reinmax": ReinMax,
    "zgr": Zgr,
    "reinmax-rao": ReinMaxRao,
    "reinmax-cv": ReinMaxCV,
    "ar": AR,
    "arm": ARM,
    "disarm": DisARM,
    "arms": ARMS,
    "ars": ARS,
    "arsm": ARSM,
    "disarm-sb": StickBreakingDisARM,
    "rebar": Rebar,
    "rebar-coupled": functools.partial(Rebar, coupled=True),
    "relax": Relax,
    "lax": Lax,
    "double-cv": DoubleCV,
    "rodeo": Rodeo,
}

__all__ = ["ESTIMATORS", "Estimator", "Sampler", "attach_gradient", "create", "facts"]


def facts(name: str) -> Estimator:
    """The estimator called `name` with its default options; its attributes are the facts about it."""
    return create(name)


def create(spec: str, tau: float | None = None, family: str | None = None, *, code: str | None = None) -> Estimator:
    """The estimator called `spec`: a registered name, or "name:option=value,option=value".

    tau: the temperature, for those that have one.  family: "categorical" or "bernoulli", the kind of its variables
    (default: the first that it handles; `code` is the former name of this argument).  Temperatures lie between 1e-6 and
    1e6, which both dtypes can divide by; numbers of samples and of hidden units go up to 10,000.

    SettingError, a ValueError of one sentence, for an unknown name or option, a value out of range, a temperature given
    to an estimator without one, or variables that it does not handle. TypeError for a name that is no string.
    """
    if not isinstance(spec, str):
        raise TypeError(f"an estimator is created by its name, like 'reinmax' or 'rloo:samples=4', got {spec!r}.")
    name, _, text = spec.partition(":")
    if name not in ESTIMATORS:
        close = difflib.get_close_matches(name.lower().replace("_", "-"), ESTIMATORS, n=1)
        meant = f", did you mean {close[0]!r}?" if close else ";"
        raise SettingError(f"unknown estimator {name!r}{meant} the known ones are {', '.join(ESTIMATORS)}.")
    if code is not None and family not in (None, code):
        raise SettingError(f"family is {family!r} and code, its former name, {code!r}: leave code out.")
    known = _options(ESTIMATORS[name])
    options: dict[str, float | str] = {} if tau is None else {"tau": tau}
    for item in filter(None, text.split(",")):
        key, _, written = (part.strip() for part in item.partition("="))
        if not (key and written):
            raise SettingError(f"{item!r} is no option of the estimator {name}: write option=value.")
        if key in options:
            raise SettingError(f"the option {key!r} of the estimator {name} is given twice: leave one out.")
        options[key] = _number(written)
    for key, value in options.items():
        if key not in known:
            has = f"its options are {', '.join(known)}" if known else "it has no options"
            raise SettingError(f"the estimator {name} has no option {key!r}; {has}.")
        if type(known[key].default) is bool and value not in (0, 1):  # "False" would count as true
            raise SettingError(f"the option {key!r} of the estimator {name} must be 0 or 1, got {value!r}.")
    try:
        estimator = ESTIMATORS[name](**options)
        family = code if family is None else family
        return estimator if family is None else estimator.of(family)
    except TypeError as error:
        if not any(isinstance(value, str) and "str" not in known[key].annotation for key, value in options.items()):
            raise  # every option has the kind that it wants: this is an error of the estimator
        raise SettingError(f"the estimator {name} cannot take {text!r}: {error}.") from error


@functools.cache
def _options(make: Callable[..., Estimator]) -> dict[str, inspect.Parameter]:
    """The options that are free, with their defaults and annotations."""
    fixed = getattr(make, "keywords", {})
    return {k: p for k, p in inspect.signature(make).parameters.items() if k not in fixed}


def _number(text: str) -> float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
