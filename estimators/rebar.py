"""REBAR, RELAX and LAX: score functions with a relaxed control variate, whose mean is estimated by reparametrisation.

REBAR and RELAX subtract c(z̃) from the cost, where z̃ is a relaxed sample that knows D, and give its expectation back
through ∂c(z)/∂θ − ∂c(z̃)/∂θ. REBAR's c is the cost itself on a softened sample, RELAX adds a network. LAX has the
network alone, and no conditioning: it works on the score of z. Whatever c is, the estimate stays unbiased, so its
parameters are trained on the only thing they can change, the variance.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from minigrad import Tensor
from minigrad.backend import Array, array_module
from minigrad.fused import MASKED
from minigrad.nn import xavier_uniform

from . import categorical
from .base import (
    SMALLEST,
    Cost,
    Estimator,
    Family,
    attach_gradient,
    check_count,
    check_number,
    check_tau,
    scale_per_example,
    value_and_grad,
)
from .enumeration import Noise
from .learned import Learned, dot, squared_norm_gradient


def relax_gradient(
    p: Array,
    d: Array,
    z_given: Array,
    costs: Array,
    c_given: Array,
    dc: Array,
    dc_given: Array,
    family: Family = categorical,
) -> Array:
    """RELAX (Grathwohl, Choi, Wu, Roeder & Duvenaud 2018, eq. 7), and REBAR with its choice of c (Tucker et al. 2017).

    Estimates    ∇θ E f(D),   D = harden(z), z = θ + G, and z̃ another draw of z given D
    Derivation   E[c(z̃)(D − p)] = E over D of the score times E[c(z) | D], which is what the law of total derivatives
                 leaves between the two reparametrised gradients:
                 ∇θ E c(z) = E[∂c(z)/∂θ] = E[c(z̃)(D − p)] + E[∂c(z̃)/∂θ]
                 so subtracting c(z̃) from the cost and adding the difference of the two changes no expectation:
                 dθ = (f(D) − c(z̃))(D − p) + ∂c(z)/∂θ − ∂c(z̃)/∂θ
                 z = θ + G passes ∇c(z) on as it is; z̃(θ; D, noise) depends on θ also through the conditioning:
                 `conditional_vjp` of `categorical` and `bernoulli`. Leaving that out is a well-known error.
    Exact when   always.
    Costs        one evaluation of f, and what c needs.

    p, d, z_given z̃ (B, ..., K); costs, c_given = c(z̃) (B,); dc = ∇c(z), dc_given = ∇c(z̃) (B, ..., K)
    """
    return scale_per_example(costs - c_given, d - p) + dc - family.conditional_vjp(p, d, z_given, dc_given)


def lax_gradient(score: Array, costs: Array, c: Array, dc: Array) -> Array:
    """LAX (Grathwohl et al. 2018, eq. 6) on the noisy logits z = θ + G, of which the sample is a function.

    Derivation   REINFORCE for the continuous z with the cost f(harden(z)), and c(z) as a baseline that knows z; its
                 mean is given back by reparametrisation, ∂z/∂θ = 1:
                 dθ = (f(D) − c(z)) ∂ log q(z)/∂θ + ∇c(z)
    Exact when   always.

    score = ∂ log q(z)/∂θ (B, ..., K), 1 − e^(−G) for Gumbel noise; costs, c (B,); dc (B, ..., K)   ->   dθ (B, ..., K)
    """
    return scale_per_example(costs - c, score) + dc


# ---- control variates: values c(z), gradients ∇c(z), and the mixed derivative that their training needs


class SoftenedCost:
    """c(z) = η f(softmax(z/λ)): the cost itself, softened.  η = 2σ(w), λ = e^w', both learned."""

    def __init__(self, cost: Cost, learned: Learned, family: Family) -> None:
        self.cost, self.family = cost, family
        self.eta, self.tau = 2.0 / (1.0 + array_module(learned["w"]).exp(-learned["w"])), learned["log_tau"]
        self.tau = array_module(self.tau).exp(self.tau)
        self.seen: list[tuple[Array, Array, Array]] = []  # (ζ, ψ(ζ), ψ'(ζ)) of every point, for the mixed derivative

    def _psi(self, zeta):
        """ψ(ζ) = f(softmax ζ) and ψ'(ζ) = J f'."""
        soft = self.family.probability(zeta)
        value, g = value_and_grad(self.cost, soft)
        return value, self.family.vjp(soft, g)

    def __call__(self, z: Array) -> tuple[Array, Array]:
        """c(z) = η ψ(z/λ), (B,), and ∇c(z) = η ψ'(z/λ)/λ."""
        zeta = z / self.tau
        value, slope = self._psi(zeta)
        self.seen.append((zeta, value, slope))
        return self.eta * value, self.eta * slope / self.tau

    def mixed(self, index: int, a: Array, v: Array, learn_tau: bool = True) -> dict[str, Array]:
        """The derivatives of  Σ_b a_b c(z_b) + ⟨v_b, ∇c(z_b)⟩  with respect to w and log λ, z the index-th point seen.

        with ζ = z/λ:   η [ a ψ(ζ) + ⟨v, ψ'(ζ)⟩/λ ],   and dζ/d log λ = −ζ, so
            ∂/∂η        = a ψ + ⟨v, ψ'⟩/λ
            ∂/∂ log λ   = −η [ a ⟨ζ, ψ'⟩ + ⟨v, ψ'⟩/λ + ⟨v, ψ'' ζ⟩/λ ]
        The engine has no second derivatives of the cost. ψ'' ζ is the change of ψ' along ζ, a central difference.
        """
        zeta, value, slope = self.seen[index]
        along = dot(v, slope) / self.tau
        d_eta = (a * value + along).sum()
        d_log_tau = 0.0 * d_eta
        if learn_tau:
            h = 1e-2 if zeta.dtype == np.float32 else 1e-4
            turn = (self._psi(zeta * (1.0 + h))[1] - self._psi(zeta * (1.0 - h))[1]) / (2.0 * h)
            d_log_tau = -(self.eta * (a * dot(zeta, slope) + along + dot(v, turn) / self.tau)).sum()
        return {"w": d_eta * self.eta * (1.0 - 0.5 * self.eta), "log_tau": d_log_tau}


class Network:
    """c(z) = w₂ᵀ tanh(W₁ᵀ z + b₁) + b₂, one hidden layer on all variables of an example."""

    def __init__(self, learned: Learned) -> None:
        self.W1, self.b1, self.w2, self.b2 = (learned[name] for name in ("W1", "b1", "w2", "b2"))
        self.seen: list[tuple[Array, Array]] = []

    @staticmethod
    def initial(rng: Noise, inputs: int, hidden: int) -> dict[str, np.ndarray]:
        W1 = xavier_uniform(rng, (inputs, hidden))
        return {"W1": W1, "b1": np.zeros(hidden), "w2": np.zeros(hidden), "b2": np.zeros(1)}

    def __call__(self, z: Array) -> tuple[Array, Array]:
        """c(z) (B,) and ∇c(z) = W₁ ((1 − h²) ⊙ w₂), h = tanh(W₁ᵀ z + b₁)."""
        flat = z.reshape(len(z), -1)
        exists = flat > 0.5 * MASKED  # a masked class is no input of the network
        flat = array_module(z).where(exists, flat, 0.0)
        h = array_module(z).tanh(flat @ self.W1 + self.b1)
        self.seen.append((flat, h))
        slope = exists * (((1.0 - h * h) * self.w2) @ self.W1.T)
        return h @ self.w2 + self.b2, slope.reshape(z.shape)

    def mixed(self, index: int, a: Array, v: Array, learn_tau: bool = True) -> dict[str, Array]:
        """The derivatives of  Σ_b a_b c(z_b) + ⟨v_b, ∇c(z_b)⟩  with respect to the weights, z the index-th point seen.

        With s = 1 − h², t = W₁ᵀ v and u the pre-activation, the second term is Σ_b ⟨s ⊙ w₂, t⟩, and ∂s/∂u = −2 h s:
            ∂/∂w₂ = Σ a h + s t         ∂/∂u = (a − 2 h t) s w₂        ∂/∂b₁ = Σ ∂/∂u
            ∂/∂W₁ = Σ z (∂/∂u)ᵀ + v (s w₂)ᵀ                            ∂/∂b₂ = Σ a
        """
        z, h = self.seen[index]
        v, a = v.reshape(len(v), -1), a[:, None]
        s, t = 1.0 - h * h, v @ self.W1
        du = (a - 2.0 * h * t) * s * self.w2
        return {
            "W1": z.T @ du + v.T @ (s * self.w2),
            "b1": du.sum(axis=0),
            "w2": (a * h + s * t).sum(axis=0),
            "b2": a.sum(axis=0),
        }


Control = SoftenedCost | Network

# ---- the estimators


class Rebar(Estimator):
    """tau: the initial λ.  eta: the initial η, between 0 and 2, 1e-6 away from both (ValueError).  coupled: 1 takes
    z̃ = z, the same value with the dependence on θ that z̃ has, and saves an evaluation.  lr: of the Adam that trains w
    and log λ.  tau_every: log λ has a gradient in every so many updates (0: never), since its mixed derivative needs
    four evaluations more, or two; in the others Adam gets a 0 for it.

    Tucker et al.'s own code is the coupled form, `rebar-coupled` here (with NVIL's baseline besides, which is left
    out); this one is the paper's text, with a z̃ that is drawn anew.
    """

    title = "REBAR"
    paper = "Tucker, Mnih, Maddison, Lawson & Sohl-Dickstein 2017"
    exact_for = "all"
    evaluations = "3, and 4 more every 10th call"
    randomness = "noise"
    sample_first = False
    state = ("updates",)
    learned_objective = "variance"
    learned: Learned

    def __init__(
        self, tau: float = 0.5, eta: float = 1.0, coupled: bool = False, lr: float = 1e-3, tau_every: int = 10
    ) -> None:
        self.tau, self.coupled = check_tau(tau), bool(coupled)
        self.eta = check_number("eta", eta, SMALLEST, 2.0 - SMALLEST)
        self.tau_every = check_count("tau_every", tau_every, 0, 2**63 - 1)
        self.learned, self.updates = Learned(lr), 0
        self.conditional_noise = not self.coupled
        self.cancels_constants = self.eta == 1.0
        if self.coupled:
            self.evaluations = "2, and 2 more every 10th call"

    def count_evaluations(self, variables: int, categories: int, call: int = 0) -> int:
        base, more = (2, 2) if self.coupled else (3, 4)
        return base + more * (self.tau_every > 0 and call % self.tau_every == 0)

    def initial(self, rng: Noise, inputs: int) -> dict[str, Any]:
        return {"w": math.log(self.eta / (2.0 - self.eta)), "log_tau": math.log(self.tau)}

    def controls(self, cost: Cost) -> list[Control]:
        return [SoftenedCost(cost, self.learned, self.family)]

    def estimate(self, logits: Tensor, cost: Cost, rng: Noise) -> Tensor:
        theta, family = logits.data, self.family
        self.learned.start(lambda: self.initial(rng.site("weights"), theta.size // len(theta)), like=theta)
        p = family.probability(theta)
        z = theta + family.noise(rng, theta)
        d = family.harden(z)
        z_given = z if self.coupled else family.conditional(rng.site("conditional"), theta, d)
        f = cost(Tensor(d))

        controls = self.controls(cost)
        at_z = [c(z) for c in controls]
        at_given = at_z if self.coupled else [c(z_given) for c in controls]
        (c_given, dc_given), dc = _total(at_given), _total(at_z)[1]
        g = relax_gradient(p, d, z_given, f.data, c_given, dc, dc_given, family)

        # ∂‖ĝ‖²/∂φ: ĝ is linear in c(z̃), ∇c(z) and ∇c(z̃), so u = 2ĝ/B reaches them as −⟨u, D − p⟩, u and −(∂z̃/∂θ) u
        u = squared_norm_gradient(g)
        a, v = -dot(u, d - p), -family.conditional_jvp(p, d, z_given, u)
        self.learned.learn(self.mixed(controls, [(0, 0.0 * a, u), (0 if self.coupled else 1, a, v)]))
        return attach_gradient(f, logits, g)

    def mixed(self, controls: list[Control], terms: list[tuple[int, Array, Array]]) -> dict[str, Array]:
        if self.coupled:  # one point serves both terms, and they are linear in a and v
            (_, a0, v0), (_, a1, v1) = terms
            terms = [(0, a0 + a1, v0 + v1)]
        learn_tau = self.tau_every > 0 and int(self.updates) % self.tau_every == 0
        gradients: dict[str, Array] = {}
        for control in controls:
            for index, a, v in terms:
                found = control.mixed(index, a, v, learn_tau)
                gradients |= {k: gradients[k] + x if k in gradients else x for k, x in found.items()}
        return gradients

    def update(self) -> None:
        super().update()
        self.updates = int(self.updates) + 1


class Relax(Rebar):
    """REBAR's control variate and a network's: hidden units, trained with the others.  As published, η starts at 1."""

    title = "RELAX"
    paper = "Grathwohl, Choi, Wu, Roeder & Duvenaud 2018"
    noise_differences = False

    def __init__(
        self,
        tau: float = 0.5,
        eta: float = 1.0,
        coupled: bool = False,
        lr: float = 1e-3,
        tau_every: int = 10,
        hidden: int = 64,
    ) -> None:
        super().__init__(tau, eta, coupled, lr, tau_every)
        self.hidden = check_count("hidden", hidden, 1)

    def initial(self, rng: Noise, inputs: int) -> dict[str, Any]:
        return super().initial(rng, inputs) | Network.initial(rng, inputs, self.hidden)

    def controls(self, cost: Cost) -> list[Control]:
        return [*super().controls(cost), Network(self.learned)]


class Lax(Estimator):
    """hidden: units of the network.  lr: of its Adam."""

    title = "LAX"
    paper = "Grathwohl, Choi, Wu, Roeder & Duvenaud 2018"
    exact_for = "all"
    evaluations = "1"
    cost_gradient = False
    randomness = "noise"
    sample_first = False
    noise_differences = False
    sums_to_zero = False
    cancels_constants = False
    learned_objective = "variance"
    learned: Learned

    def __init__(self, hidden: int = 64, lr: float = 1e-3) -> None:
        self.hidden, self.learned = check_count("hidden", hidden, 1), Learned(lr)

    def estimate(self, logits: Tensor, cost: Cost, rng: Noise) -> Tensor:
        theta = logits.data
        inputs = theta.size // len(theta)
        self.learned.start(lambda: Network.initial(rng.site("weights"), inputs, self.hidden), like=theta)
        noise = self.family.noise(rng, theta)
        z = theta + noise
        f, network = cost(Tensor(self.family.harden(z))), Network(self.learned)
        score = self.family.noise_score(noise) * (theta > 0.5 * MASKED)  # a masked class has no part in it
        c, dc = network(z)
        g = lax_gradient(score, f.data, c, dc)
        w = squared_norm_gradient(g)
        self.learned.learn(network.mixed(0, -dot(w, score), w))
        return attach_gradient(f, logits, g)


def _total(pairs):
    """The values and the gradients of several control variates, added up."""
    values, gradients = zip(*pairs, strict=True)
    return sum(values[1:], values[0]), sum(gradients[1:], gradients[0])
