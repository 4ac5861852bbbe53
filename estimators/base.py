"""What every estimator is: one call, `estimator(logits, cost, rng) -> per-example value`.

The value is an unbiased estimate of E f(D) (or of the `objective` that the estimator states instead; NVIL divides the
gradient only), and its backward pass leaves an estimate of ∇θ E f(D) in the logits θ and of the cost's own gradient in
whatever the cost depends on (a decoder's weights, say).

    logits θ  (B, ..., K)   a Tensor; the axes between the batch B and the K classes hold independent variables.
              (B, ...)      for bits (an estimator with family="bernoulli"): each place is one bit, p = σ(θ)
    cost      d -> (B,)     a function of a Tensor d shaped like the logits (one-hot in the last axis, zeros and ones
                            for bits, or a relaxed point where an estimator says so), one value per example
    rng                     a `minigrad.Rng`; the same address gives the same sample
    mask                    optional booleans, broadcastable to the logits: False means probability exactly 0 and
                            gradient exactly 0. ValueError if a row has no class left (a mask that is on a device
                            already is not asked). Categorical only.
    inputs    (B, ...)      optional, an array: what the logits were computed from, for a learned baseline to look at

NaN stays NaN: an example with such a logit gets the value NaN, and all gradients of its value are NaN. So does one with
a variable that has a logit of +∞, or none above −∞. Single classes at −∞ are masked, but on a device, which would have
to be waited for: say by a mask what cannot be.

Symbols of the rules: p = softmax(θ) or σ(θ), g = ∇f(D), J(q) v = q ⊙ (v − ⟨q, v⟩), S samples with the costs fₛ = f(Dₛ).
J and ⟨·,·⟩ act within each variable by itself, unless a rule says that they run over all.

A score function weighs every variable's D − p by the one cost of its example.
"""

from __future__ import annotations

from collections.abc import Callable
from numbers import Integral, Real
from types import ModuleType
from typing import Any, Protocol, Self

import numpy as np

from minigrad import Tensor, enable_grad, grad, op
from minigrad.backend import Array, array_module, asarray_like, on_host, to_host
from minigrad.checkpoint import StateError
from minigrad.fused import MASKED, mask_logits

from . import bernoulli, categorical
from .enumeration import Noise

Cost = Callable[[Tensor], Tensor]  # d -> (B,)
Family = ModuleType  # `categorical` or `bernoulli`

NO_BASELINE = "without a baseline the noise is that of the whole cost, and all samples can become equally likely"

SMALLEST, LARGEST = 1e-6, 1e6  # the settings that both dtypes can divide by and multiply with
MOST_SAMPLES = 10_000

LEARNED = "learned."  # how the names of an estimator's own parameters begin in its state

CANNOT_CHOOSE = (
    "needs all choices and their costs in one call, and cannot choose step by step: take an estimator that is a sample "
    "with a rule (st, st-gs, gst-1.0, reinmax, …), or reinforce, reinforce-mean or rloo."
)


class SettingError(ValueError):
    """What somebody asked of an estimator (a name, an option, a temperature, a size) cannot be. One sentence."""


class Trainable(Protocol):
    """What an estimator asks of the parameters that it trains by itself: `learned.Learned` has it."""

    def step(self) -> None: ...

    def state_dict(self) -> dict[str, np.ndarray]: ...

    def load_state_dict(self, state: dict[str, np.ndarray]) -> None: ...


class Estimator:
    """Base class. A subclass states its facts as class attributes and implements `estimate`.

    State (a running baseline, for example) lives in the attributes named by `state`, or in `learned`. `update()` is the
    only method that changes it. It learns from the first call since the previous `update()`: that call is at a sample
    (for hard `support`), while later calls may come from the control variates of a lower layer, at other points.
    """

    title = ""  # its name in words
    paper = ""  # where it was published
    objective = "E f(D)"  # what it estimates the gradient of
    exact_for = ""  # the costs for which its expectation is that gradient: "all", "none", those that are "quadratic" or
    # "linear" in each variable, the others fixed, or "separable": sums of quadratic functions of one variable each
    families: tuple[Family, ...] = (categorical, bernoulli)  # the variables it handles; the first is the default
    warning = ""  # why it may not train a model with discrete variables, if so

    # what it asks of the cost
    evaluations = ""  # how often it evaluates the cost in a call, in words; in numbers, see `count_evaluations`
    cost_gradient = True  # does it differentiate the cost with respect to d?
    support = "hard"  # what the cost is evaluated on: "hard" samples, or "soft" points between them
    bounded = True  # do its samples lie between 0 and 1?
    threshold = 0.5  # a bit counts as 1 above this value
    enumerates_classes = False  # does it sum over the classes of a variable, so that a single one has no variance?
    evaluates_masked = False  # may it evaluate the cost at masked classes? (Their weight is 0.)

    # what it draws
    randomness = "sample"  # one joint "sample" D, several "samples", a "set" of different ones, "uniform" or other
    # "noise", or "none", because it enumerates all joint outcomes
    sample_count = 1  # how many samples it draws in a call; it evaluates the cost there before it does elsewhere
    sample_first = True  # are they drawn from their probabilities, and not made of noise that the rule sees?
    conditional_noise = False  # is noise drawn given the sample?
    noise_differences = True  # does it see nothing of the noise but differences between classes?
    linear_draws = False  # is it linear in what it draws beside the samples, so that the mean may take its place?
    perturbs_logits = False  # does it draw at other logits, too?
    logit_scale = 1.0  # its samples have the logits logit_scale · θ: not 1 where the forward distribution is changed

    # what its value and a single estimate are like
    single_sample = False  # is its value the cost at one sample, whose gradient follows from a rule?
    multi_sample = False  # is its value −log mean e^(−f), a bound of several samples, instead of a mean of costs?
    sums_to_zero = True  # does each estimate sum to 0 over the classes, as long as nothing is learned?
    cancels_constants = True  # does a constant in the cost change no estimate, as long as nothing is learned?

    # what else it can do, and what it keeps
    episodes = False  # can it choose step by step (`episode`)?
    state: tuple[str, ...] = ()
    learned: Trainable | None = None  # parameters that it trains by itself, a `Learned`
    learned_objective = ""  # what they lower: the "variance" of the estimate, or the "squared error" of a baseline
    _family: str | None = None  # which of `families`, see `of`
    _latest: Any = None  # what `update` shall learn from

    @property
    def unbiased(self) -> bool:
        """Is its expectation ∇θ E f(D) for every f?"""
        return self.exact_for == "all" and self.objective == "E f(D)"

    @property
    def family(self) -> Family:
        """The kind of variables that it is for: one of `families`, the first unless `of` has chosen another."""
        if self._family is None:
            return self.families[0]
        return next(family for family in self.families if family.name == self._family)

    @property
    def code(self) -> Family:
        """The former name of `family`."""
        return self.family

    def of(self, family: str) -> Self:
        """This estimator for the variables called `family`, "categorical" or "bernoulli"; ValueError if it has none."""
        known = [module.name for module in self.families]
        if family not in known:
            own = f"{self.title} is for {' or '.join(known)} variables"
            raise SettingError(f"{own}, not {family!r}: choose another family or estimator.")
        self._family = family  # the name, since a module can be neither copied nor pickled
        return self

    def check_family(self, family: str, place: str = "it") -> None:
        """ValueError unless it is for the variables called `family`: K logits of one choice look like K bits.

        place: what in the model got it, for the message.
        """
        if self.family.name != family:
            found = f"the model has {family} variables, but {place} got {self.title} for {self.family.name} ones"
            raise ValueError(f"{found}: create the estimator with family={family!r}.")

    def __call__(
        self, logits: Tensor, cost: Cost, rng: Noise, mask: np.ndarray | None = None, inputs: Array | None = None
    ) -> Tensor:
        """cost's value for each example, (B,), with the estimator's gradient attached.

        ValueError if the cost's result has another shape: (B, 1), say, would broadcast silently against (B,).
        TypeError if it is no Tensor, or has another dtype than the logits. Both, too, for inputs of other examples, and
        for logits, a mask or noise that are something else.
        """

        def per_example(d: Tensor) -> Tensor:
            return checked_cost(cost(d), logits.shape[:1], logits.dtype)

        logits = self._masked(logits, mask, rng)
        check_inputs(inputs, len(logits))
        if not logits.size:  # no examples, or none with a variable: nothing to draw, and nothing to learn from
            return attach_gradient(per_example(Tensor(logits.data)), logits, logits.data)
        self.inputs, seen = inputs, self._latest
        value = self.estimate(logits, per_example, rng)
        if seen is not None:
            self._latest = seen
        return self._undefined(logits, value)

    def estimate(self, logits: Tensor, cost: Cost, rng: Noise) -> Tensor:
        """What a subclass defines: as `__call__`, (B,) with the gradient attached, after the checks and the mask."""
        raise NotImplementedError

    def episode(self, play: Play, rng: Noise) -> Tensor:
        """For a model that makes one choice after the other, each from logits that depend on the choices before it.

        play(sampler, rng) -> (cost (B,), log-probability of the choices (B,)), one run of the model with the choices of
        `sampler`; with None, choices are plain draws and the log-probability carries gradients. -> the cost (B,), with
        the estimator's gradient attached.  ValueError for an estimator that needs more than runs of the model.
        """
        raise ValueError(f"{self.title} {CANNOT_CHOOSE}")

    def _masked(self, logits: Tensor, mask: np.ndarray | None, rng: Noise) -> Tensor:
        if not isinstance(logits, Tensor):
            got = type(logits).__name__
            raise TypeError(f"the logits must be a Tensor, got {got}: pass Tensor(logits, requires_grad=True).")
        if not hasattr(rng, "site"):
            raise TypeError(f"the noise must come from a minigrad.Rng, got {type(rng).__name__}: pass Rng(seed).")
        if self.family is categorical:
            logits = masked(logits, mask)
        elif mask is not None:
            raise ValueError("a mask takes classes away; a bit has none to spare: leave the mask out.")
        if logits.ndim < (2 if self.family is categorical else 1):
            raise ValueError(f"logits need a first axis, for the examples, got the shape {logits.shape}.")
        return logits

    def _undefined(self, logits: Tensor, x: Tensor) -> Tensor:
        """x (B, ...), times NaN for each example of which a variable has no distribution: its gradients are NaN, too.

        The sample, and half of the rules, would hide it: 0 > NaN is false, and so is 1 > NaN.
        """
        theta, xp = logits.data, array_module(logits.data)
        if not theta.size or (on_host(theta) and theta.min() > 0.5 * MASKED and theta.max() < np.inf):
            return x  # a device would have to be waited for
        defined = self.family.defined(theta).reshape(len(theta), -1).all(axis=1)
        factor = xp.where(defined, 1.0, np.nan).astype(x.dtype)
        return x * factor.reshape(len(theta), *(1,) * (x.ndim - 1))

    def check_size(self, variables: int, categories: int) -> None:
        """SettingError if the estimator cannot handle so many variables of so many categories."""

    def count_evaluations(self, variables: int, categories: int, call: int = 0) -> int:
        """How often it evaluates the cost in a call, for so many variables of so many categories (2 for bits).

        call: 0 for the first one, with an `update` after each.
        """
        return self.sample_count

    def forward_probability(self, logits: Array) -> Array:
        """The probabilities of its samples' classes, or of a bit to be 1, at these logits, an array."""
        return self.family.probability(self.logit_scale * logits)

    def thresholds(self, logits: Array) -> Array:
        """For `randomness` "uniform": where each uniform number changes what it decides, (..., n) numbers in (0, 1).

        Between them the estimate is linear in it.  logits (..., K), or (...) for bits: an array, without the batch.
        """
        raise NotImplementedError

    def update(self) -> None:
        """Learn from the costs of the first call since the last update; to be called once after each training step."""
        if self.learned is not None:
            self.learned.step()

    def state_dict(self) -> dict[str, np.ndarray]:
        """After an `update`: everything that later calls depend on, as arrays on the host."""
        state = {name: np.array(to_host(getattr(self, name))) for name in self.state}
        return state | (self.learned.state_dict() if self.learned else {})

    def load_state_dict(self, state: dict[str, np.ndarray]) -> None:
        """StateError if the state belongs to another estimator."""
        own = {name: value for name, value in state.items() if not name.startswith(LEARNED)}
        if own.keys() != set(self.state) or (len(own) < len(state) and self.learned is None):
            raise StateError(f"the saved state belongs to another estimator than {self.title}: load it into that one.")
        for name, value in own.items():
            setattr(self, name, value[()] if value.ndim == 0 else value)
        self._latest = None
        if self.learned is not None:
            self.learned.load_state_dict({name: value for name, value in state.items() if name not in own})


class Sampler(Estimator):
    """An estimator that is a sample D(θ) with a gradient rule, so that a model may draw it step by step."""

    evaluations = "1"
    episodes = True
    single_sample = True

    def sample(self, logits: Tensor, rng: Noise, mask: np.ndarray | None = None) -> Tensor:
        """A sample shaped like the logits; gradients that arrive at it continue to the logits by the rule."""
        logits = self._masked(logits, mask, rng)
        return self._undefined(logits, self.draw(logits, rng))

    def draw(self, logits: Tensor, rng: Noise) -> Tensor:
        """What a subclass defines: as `sample`, shaped like the logits, after the mask."""
        raise NotImplementedError

    def estimate(self, logits: Tensor, cost: Cost, rng: Noise) -> Tensor:
        return cost(self.draw(logits, rng))

    def episode(self, play: Play, rng: Noise) -> Tensor:
        return play(self, rng)[0]


Play = Callable[[Sampler | None, Noise], tuple[Tensor, Tensor]]  # one run of a model: see `Estimator.episode`


def value_and_grad(cost: Cost, point: Array) -> tuple[Array, Array]:
    """cost's values (B,) and its gradient (B, ..., K) at the array `point` (B, ..., K), both as arrays.

    Only the way from the point to the cost is differentiated: a decoder's weights get no gradient from an evaluation
    that serves a control variate, and their matrix products are not computed.
    """
    f, g = cost_and_gradient(cost, point)
    return f.data, g


def cost_and_gradient(cost: Cost, point: Array) -> tuple[Tensor, Array]:
    """cost as a Tensor (B,), for weights to learn from, and its gradient at the array `point`, an array like it."""
    with enable_grad():
        z = Tensor(point, requires_grad=True)
        f = cost(z)
        if not f.requires_grad:  # a cost that does not depend on the point
            return f, array_module(point).zeros_like(point)
        return f, grad(f.sum(), [z], keep=True)[0]


def checked_cost(f: object, shape: tuple[int, ...], dtype: np.dtype) -> Tensor:
    """What a cost gave. TypeError unless it is a Tensor of this dtype, ValueError unless it has this shape, (B,)."""
    if not isinstance(f, Tensor):
        raise TypeError(f"the cost must give a Tensor, but it gave {type(f).__name__}: compute it from d by ops.")
    if f.shape != shape:
        raise ValueError(
            f"the cost must give one value per example, {shape}, but it gave {f.shape}: sum over the other axes of d."
        )
    if f.dtype != dtype:
        raise TypeError(f"the cost must give {dtype}, as the logits are, but it gave {f.dtype}: convert what is in it.")
    return f


class TemperedSampler(Sampler):
    """A sampler with a temperature. tau: from 1e-6 to 1e6 (ValueError)."""

    min_tau = SMALLEST  # no temperature may be below this one

    def __init__(self, tau: float = 1.0) -> None:
        self.tau = tau
        if tau != 1.0 and self.support == "hard":
            self.exact_for = "none"  # a temperature trades what exactness there is for less variance

    @property
    def tau(self) -> float:
        return self._tau

    @tau.setter
    def tau(self, tau: float) -> None:
        self._tau = check_tau(tau)
        if self._tau < self.min_tau:
            raise SettingError(f"{self.title} needs a temperature of at least {self.min_tau:g}, got {tau}.")


def check_inputs(inputs: Array | None, examples: int) -> None:
    """What learned baselines look at: TypeError unless it is an array, ValueError unless it has a row for each."""
    if isinstance(inputs, Tensor):
        raise TypeError("the inputs must be an array, not a Tensor: pass its .data.")
    if inputs is not None and not getattr(inputs, "ndim", 0):
        raise TypeError(f"the inputs must be an array (B, ...), got {type(inputs).__name__}: make it one first.")
    if inputs is not None and len(inputs) != examples:
        raise ValueError(f"the inputs need a row for each of the {examples} examples, got {len(inputs)}.")


def masked(logits: Tensor, mask: np.ndarray | None) -> Tensor:
    """The logits with the classes outside the mask at probability 0; the mask is checked where it is, on the host.

    So are classes at −∞, on the host: 0 · ∞ is NaN in some of the rules.
    TypeError for a mask that is not of booleans, ValueError for one that does not fit, or leaves a row without a class.
    """
    if logits.ndim < 1 or logits.shape[-1] < 1:
        raise ValueError(f"logits need a last axis with at least one class: (B, ..., K), got the shape {logits.shape}.")
    theta = logits.data
    if on_host(theta) and theta.size and not theta.min() > -np.inf:  # a device would have to be waited for
        logits = mask_logits(logits, theta != -np.inf)
    if mask is None:
        return logits
    sent = not on_host(theta) and type(mask) is type(theta)  # its values cannot be asked, its shape can
    mask = mask if sent else np.asarray(mask)
    if mask.dtype != bool:
        raise TypeError(f"the mask must be booleans, True where the class exists, got {mask.dtype}: use mask != 0.")
    try:
        spread = np.broadcast_to(np.broadcast_to(True, mask.shape) if sent else mask, logits.shape)
    except ValueError:
        found = f"a mask of shape {mask.shape} does not fit logits of shape {logits.shape}"
        raise ValueError(f"{found}: give it that shape, or one that broadcasts to it.") from None
    if not spread.any(axis=-1).all():
        raise ValueError("the mask leaves a row without any class; every row needs at least one True.")
    return mask_logits(logits, asarray_like(mask, logits.data))


class AveragedSampler(TemperedSampler):
    """A tempered sampler of one-hots that averages over S ≥ 1 draws of the noise, given the sample (ValueError)."""

    randomness = "noise"
    conditional_noise = True
    families = (categorical,)

    def __init__(self, tau: float = 1.0, samples: int = 10) -> None:
        super().__init__(tau)
        self.samples = check_count("samples", samples, 1)

    def exponential(self, logits: Tensor, rng: Noise) -> Array:
        """Exp(1), (S, ..., K), what `conditional_gumbel` makes its draws of."""
        return rng.site("conditional").exponential((self.samples, *logits.shape), like=logits.data)


class DecoupledSampler(Sampler):
    """A sampler with one temperature for the sample and another one for its derivative.

    D ~ Cat(softmax(θ/τ_f)): **the forward distribution changes**, so whatever else depends on it (a KL term, an
    evaluation) must use the logits `logit_scale`·θ, logit_scale = 1/τ_f.

    tau_f, tau_b: from 1e-6 to 1e6 (ValueError).
    """

    objective = "E f(D), D ~ softmax(θ/τ_f)"
    exact_for = "none"

    def __init__(self, tau_f: float, tau_b: float) -> None:
        self.tau_f, self.tau_b = check_tau(tau_f, "tau_f"), check_tau(tau_b, "tau_b")
        self.logit_scale = 1.0 / self.tau_f


def on_device(x: Array, like: Array) -> Array:
    """A number or an array that may still be on the host, restored from a state, as an array where `like` lives."""
    return asarray_like(np.asarray(x, like.dtype), like) if isinstance(x, float | np.generic | np.ndarray) else x


def exponential_mean(decay: float, old: Array, new: Array) -> Array:
    """β old + (1 − β) new; the old mean may still be on the host."""
    return decay * on_device(old, new) + (1.0 - decay) * new


def check_tau(tau: float, name: str = "tau") -> float:
    """A temperature as a float; SettingError unless it is from 1e-6 to 1e6, what every dtype can divide by."""
    return check_number(f"the temperature {name}", tau, SMALLEST, LARGEST)


def check_number(name: str, value: float | str, least: float, most: float) -> float:
    """The value as a float; SettingError, with its name, unless it is a number from `least` to `most`."""
    if not (isinstance(value, Real) and least <= value <= most):  # not so for NaN
        raise SettingError(f"{name} must be a number from {least:g} to {most:g}, got {value!r}.")
    return float(value)


def check_decay(decay: float) -> float:
    """The factor of an exponential mean; SettingError outside [0, 1)."""
    if not (isinstance(decay, Real) and 0.0 <= decay < 1.0):
        raise SettingError(f"decay must be a number of at least 0 and below 1, got {decay!r}.")
    return float(decay)


def check_count(name: str, value: int, least: int, most: int = MOST_SAMPLES) -> int:
    """A count; SettingError, with its name, unless it is an integer from `least` to `most`."""
    if not isinstance(value, Integral) or not least <= value <= most:
        raise SettingError(f"{name} must be an integer of at least {least} and at most {most}, got {value!r}.")
    return int(value)


def check_draws(logits: Array, *draws: Array, averaged: Array | None = None, family: Family = categorical) -> None:
    """ValueError unless what was drawn for the logits has their shape, and `averaged` an axis for its draws before it.

    What does not would broadcast, with the gradient of another function.
    """
    shape = logits.shape
    if family is categorical and not shape:
        raise ValueError("logits need a last axis for the classes: for bits pass family=bernoulli.")
    if any(d.shape != shape for d in draws):
        raise ValueError(f"samples and noise must have the shape of the logits, {shape}: draw them for these.")
    if averaged is not None and averaged.shape[1:] != shape:
        raise ValueError(
            f"noise to be averaged over must be (S, ...) for logits (...): got {averaged.shape} for {shape}."
        )


def leave_one_out_mean(x: Array) -> Array:
    """(1/(S−1)) Σ_{t≠s} xₜ for each s along the first axis."""
    return (x.sum(axis=0) - x) / (len(x) - 1)


def scale_per_example(weights: Array, g: Array) -> Array:
    """wᵢ gᵢ for each example i: a score function weighs every variable of an example by one number.

    weights (B,), g (B, ..., K)   ->   (B, ..., K);  leading axes for samples, (S, B) and (S, B, ..., K), may be added
    """
    missing = (1,) * (g.ndim - weights.ndim)
    return weights.reshape(weights.shape + missing) * g


def _linear_in_logits(value, logits, g):
    """The surrogate of attach_gradient: value + ⟨g, θ⟩ with a constant g."""
    axes = tuple(range(value.ndim, logits.ndim))
    return (0, 1), lambda value, logits: value + (g * logits).sum(axis=axes)


@op(surrogate=_linear_in_logits)
def attach_gradient(value, logits, g):
    """`value` (B,), unchanged, now also carrying the gradient g (B, ..., K) towards `logits` (B, ..., K).

    Backwards, the weight w (B,) of each example's value passes on to `value`, and w·g is added to the logits. What is
    logged, tested and applied is the same array g. ValueError unless the shapes are these.
    """
    if g.shape != logits.shape or value.shape != logits.shape[: value.ndim]:
        raise ValueError(
            f"value (B,) and g (B, ...) must fit logits (B, ...): they are {value.shape}, {g.shape} and {logits.shape}."
        )

    def backward(w):
        return w, lambda: scale_per_example(w, g), None

    return value, backward
