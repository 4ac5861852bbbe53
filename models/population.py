"""The population problem of Yin, Lyu, Zhang, Osher, Qi & Xin (2019): where coarse gradients can be computed exactly.

    y(Z; v, w) = vᵀ 1[Zw > 0],  Z (m, n) with standard normal entries;  labels from (v*, w*), ‖w*‖ = 1
    f(v, w) = ½ E (y(Z; v, w) − y(Z; v*, w*))²

As a function of w the loss of one Z is piecewise constant, so that its gradient is 0 almost everywhere. Backward the
step gets the derivative μ′ of a proxy, and the gradient becomes a coarse one, Zᵀ(μ′(Zw) ⊙ v)(y − y*). This file has its
expectation over Z for three proxies, and the true gradient of f, which exists although that of a single Z says nothing.

Everywhere: v (…, m), w (…, n), v* (m,), w* (n,), float64 arrays, w ≠ 0; leading axes are problems beside each other.
ŵ = w/‖w‖;  θ = ∠(w, w*);  e = Pw*/‖Pw*‖ with P = I − ŵŵᵀ, so that w* = cos θ ŵ + sin θ e;  φ, Φ: the standard normal
density and distribution function;  A = I + 11ᵀ.

The loss, its gradients, the expectations for the identity and the ReLU and the spurious minimum are the paper's; those
for the clipped ReLU and `catches_the_identity` are derived here. All of them are derived in the docstrings.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from scipy.special import ndtr

ROOT_TWO_PI = math.sqrt(2.0 * math.pi)

PROXIES = ("identity", "relu", "clipped_relu")


class Geometry(NamedTuple):
    """Where w stands: ‖w‖ (…, 1), ŵ and e (…, n), cos θ and sin θ (…, 1). For θ = 0 or π there is no e: it is 0."""

    norm: np.ndarray
    unit: np.ndarray
    across: np.ndarray
    cosine: np.ndarray
    sine: np.ndarray


def geometry(w, w_star) -> Geometry:
    norm = np.linalg.norm(w, axis=-1, keepdims=True)
    unit = w / norm
    cosine = unit @ w_star[:, None]
    across = w_star - cosine * unit
    sine = np.linalg.norm(across, axis=-1, keepdims=True)  # accurate near 0, where √(1 − cos²) is not
    return Geometry(norm, unit, np.divide(across, sine, out=np.zeros_like(unit), where=sine > 0.0), cosine, sine)


def angle(w, w_star):
    """θ in [0, π].   -> (…)"""
    g = geometry(w, w_star)
    return np.arctan2(g.sine, g.cosine)[..., 0]


def _dot(a, b):
    return (a * b).sum(axis=-1, keepdims=True)


def _apply_A(v):
    return v + v.sum(axis=-1, keepdims=True)


def _agreement(w, v_star, w_star):
    """((1 − 2θ/π) I + 11ᵀ) v*"""
    return (1.0 - 2.0 / math.pi * angle(w, w_star)[..., None]) * v_star + v_star.sum()


def loss(v, w, v_star, w_star):
    """f(v, w) = ⅛ [vᵀAv − 2 vᵀ((1 − 2θ/π) I + 11ᵀ) v* + v*ᵀA v*]   -> (…)

    With the bits s = 1[Zw > 0] and s*, f = ½ [vᵀ E ssᵀ v − 2 vᵀ E ss*ᵀ v* + v*ᵀ E s*s*ᵀ v*]. A bit is 1 with
    probability ½, and different rows of Z are independent: E sᵢsⱼ = E sᵢs*ⱼ = ¼ for i ≠ j, and E sᵢ² = ½, so that
    E ssᵀ = ¼ A. In the same row s and s* differ with probability θ/π, as its direction in the plane of w and w* is
    uniform: E sᵢs*ᵢ = ½ (1 − θ/π) = ¼ (1 + (1 − 2θ/π)).
    """
    quadratic = _dot(v, _apply_A(v)) - 2.0 * _dot(v, _agreement(w, v_star, w_star))
    return 0.125 * (quadratic[..., 0] + v_star @ _apply_A(v_star))


def gradient_v(v, w, v_star, w_star):
    """∂f/∂v = ¼ Av − ¼ ((1 − 2θ/π) I + 11ᵀ) v*   -> (…, m)

    It is also the expectation of the gradient of one Z, s(y − y*): with respect to v nothing is coarse.
    """
    return 0.25 * (_apply_A(v) - _agreement(w, v_star, w_star))


def gradient_w(v, w, v_star, w_star):
    """∂f/∂w = −(vᵀv*)/(2π‖w‖) e   -> (…, n);  not defined at θ = 0 and π, where it is 0 here

    w enters through θ alone: ∂f/∂θ = vᵀv*/(2π), and from cos θ = ŵᵀw*, −sin θ ∂θ/∂w = Pw*/‖w‖ = sin θ e/‖w‖, hence
    ∂θ/∂w = −e/‖w‖.
    """
    g = geometry(w, w_star)
    return -_dot(v, v_star) / (2.0 * math.pi * g.norm) * g.across


def coarse_gradient(v, w, v_star, w_star, proxy: str):
    """E Zᵀ(μ′(Zw) ⊙ v)(y − y*), the expected coarse gradient with respect to w.   -> (…, n)

    Let z be a row of Z, s and s* its bits. In Σᵢⱼ zᵢ μ′(zᵢᵀw) vᵢ (sⱼvⱼ − s*ⱼv*ⱼ) the rows are independent, and all
    expectations that are left are those of one row, `moments`:

        i = j:    vᵢ² E z μ′ s − vᵢv*ᵢ E z μ′ s*  =  vᵢ² a₊ ŵ − vᵢv*ᵢ b
        i ≠ j:    E z μ′ · vᵢ (½vⱼ − ½v*ⱼ)        =  ½ a ŵ (vᵢvⱼ − vᵢv*ⱼ)

        sum:      [‖v‖² a₊ + ½ a ((1ᵀv)² − ‖v‖² − (1ᵀv)(1ᵀv*) + vᵀv*)] ŵ − (vᵀv*) b

    identity      a = 0, a₊ = 1/√(2π), b = w*/√(2π):    (‖v‖² ŵ − (vᵀv*) w*)/√(2π)
    the others    a₊ = a, as μ′ = 0 where z has s = 0:   ½ a h ŵ − (vᵀv*) b,   h = ‖v‖² + (1ᵀv)² − (1ᵀv)(1ᵀv*) + vᵀv*

    Its product with ∂f/∂w = −(vᵀv*)/(2π‖w‖) e sees only b, of which the part along e is `across` ≥ 0:

        ⟨·, ∂f/∂w⟩ = across (vᵀv*)²/(2π‖w‖),    across = sin θ/√(2π) for the identity, half of that for the ReLU
    """
    g = geometry(w, w_star)
    m = moments(g, proxy)
    along = g.unit * m.along + g.across * m.across  # b
    total, total_star, both, square = v.sum(axis=-1, keepdims=True), v_star.sum(), _dot(v, v_star), _dot(v, v)
    others = total**2 - square - total * total_star + both
    return (square * m.active + 0.5 * m.mean * others) * g.unit - both * along


class Moments(NamedTuple):
    """Of a row z, with s = 1[zᵀw > 0] and s* = 1[zᵀw* > 0], each (…, 1):

    E z μ′ = mean·ŵ,    E z μ′ s = active·ŵ,    b = E z μ′ s* = along·ŵ + across·e
    """

    mean: np.ndarray
    active: np.ndarray
    along: np.ndarray
    across: np.ndarray


def moments(g: Geometry, proxy: str) -> Moments:
    """What `coarse_gradient` needs of μ′(zᵀw).   ValueError for a proxy that is not in PROXIES.

    z = xŵ + ye + … with x, y, … standard normal, and s* = 1[x cos θ + y sin θ > 0] = 1[y > −kx], k = cot θ.

    identity, μ′ = 1:         E z = 0.  The mean of z on the half-space zᵀw* > 0 is w*φ(0), as ∫₀^∞ t φ(t) dt = φ(0):
                              b = φ(0)(cos θ ŵ + sin θ e).  φ(0) = 1/√(2π).
    clipped ReLU, μ′ = 1 on (0, 1]:  0 < x ≤ c, c = 1/‖w‖, derived here.  mean = active = ∫₀ᶜ xφ(x) dx = φ(0) − φ(c).
                              P(y > −kx) = Φ(kx) and E y 1[y > −kx] = φ(kx) give, the first integral by parts,

        across = ∫₀ᶜ φ(x)φ(kx) dx = (1/√2π) ∫₀ᶜ φ(x/sin θ) dx = sin θ/√(2π) · (Φ(c/sin θ) − ½)   as 1 + k² = 1/sin²θ
        along  = ∫₀ᶜ xφ(x)Φ(kx) dx = ½φ(0) − φ(c)Φ(kc) + k·across,   k·across = cos θ/√(2π) · (Φ(c/sin θ) − ½)

    ReLU, μ′ = 1 for x > 0:   the same with c → ∞:  mean = active = φ(0),  across = ½φ(0) sin θ,
                              along = ½φ(0)(1 + cos θ), so b = ½φ(0)(ŵ + w*) = φ(0) cos(θ/2) (ŵ + w*)/‖ŵ + w*‖.
    """
    peak = np.full_like(g.norm, 1.0 / ROOT_TWO_PI)
    if proxy == "identity":
        return Moments(np.zeros_like(peak), peak, peak * g.cosine, peak * g.sine)
    if proxy == "relu":
        return Moments(peak, peak, 0.5 * peak * (1.0 + g.cosine), 0.5 * peak * g.sine)
    if proxy == "clipped_relu":
        c = 1.0 / g.norm
        at_c = peak * np.exp(-0.5 * c**2)
        with np.errstate(divide="ignore", over="ignore"):  # at θ = 0 and π the quotients are ±∞, where Φ is 1 and 0
            half, below = ndtr(c / g.sine) - 0.5, ndtr(c * (g.cosine / g.sine))
        along = 0.5 * peak - at_c * below + peak * g.cosine * half
        return Moments(peak - at_c, peak - at_c, along, peak * g.sine * half)
    raise ValueError(f"unknown proxy {proxy!r}; the known ones are {', '.join(PROXIES)}.")


# ---- the spurious minimum


def has_spurious_minimum(v_star) -> bool:
    """0 < (1ᵀv*)² < ½ (m + 1)‖v*‖²: then `spurious_minimum` is a local minimum that is not global.

    There vᵀv* is negative, so that f grows as θ falls from π (∂f/∂θ = vᵀv*/(2π)): with A⁻¹ = I − 11ᵀ/(m + 1),

        vᵀv* = v*ᵀA⁻¹(11ᵀ − I) v* = (2/(m + 1)) (1ᵀv*)² − ‖v*‖²

    If 1ᵀv* = 0 its loss is 0, that of the global one: −v* and −w* give the same labels as v* and w*.
    """
    return bool(0.0 < v_star.sum() ** 2 < 0.5 * (len(v_star) + 1) * (v_star @ v_star))


def spurious_minimum(v_star, w_star) -> tuple[np.ndarray, np.ndarray]:
    """(v, w) with w = −w*, so θ = π, and v = A⁻¹(11ᵀ − I) v* = (2u/(m + 1)) 1 − v*, u = 1ᵀv*, where ∂f/∂v = 0.

    The loss there is, since 11ᵀ − I = A − 2I,  ⅛ v*ᵀ(A − (A − 2I)A⁻¹(A − 2I)) v* = ½ v*ᵀ(I − A⁻¹) v* = ½ u²/(m + 1).
    The coarse gradients of ReLU and clipped ReLU vanish: b = 0, and h = vᵀ(Av − (11ᵀ − I)v*) = 0. The identity's is
    (‖v‖² + vᵀv*) ŵ/√(2π) = 2(m − 1)u²/(√(2π)(m + 1)²) ŵ, as ‖v‖² + vᵀv* = vᵀ(v + v*) = (2u/(m + 1)) 1ᵀv and
    1ᵀv = u(m − 1)/(m + 1).
    """
    return 2.0 * v_star.sum() / (len(v_star) + 1) - v_star, -w_star


def catches_the_identity(v_star) -> bool:
    """Does descent with the identity and small steps stay near the spurious minimum? Derived here.

    There its coarse gradient is a multiple of w: it does not turn w, it makes it shorter, until w passes through 0 to
    the other side, θ = 0. From there it points back as long as vᵀv* < ‖v‖². So w stays at 0 and jumps from side to
    side; a fraction p of the steps is at θ = π. In balance,

        p (‖v‖² + vᵀv*) = (1 − p)(‖v‖² − vᵀv*),   so that the mean of 1 − 2θ/π is   c = 1 − 2p = vᵀv*/‖v‖²

    That mean is what v sees, and it rests at v = A⁻¹(cI + 11ᵀ) v* = cv* + (1 − c)u/(m + 1) 1. Both hold if, with
    s = ‖v*‖², u = 1ᵀv*, q = u²/(m + 1), k = m/(m + 1),

        vᵀv* − c‖v‖² = (1 − c)(c² (s − 2q + kq) + c (s − kq) + q) = 0

    Either c = 1, the global minimum, or the second factor has its roots in (−1, 0), which it has if its discriminant
    s² − 2(k + 2)qs + (k² − 4k + 8)q² is not negative and s is the larger one there:

        s ≥ q (k + 2 + 2√(2k − 1)),   for m = 4:   (1ᵀv*)² ≤ 1.15 ‖v*‖²   (the spurious minimum exists up to 2.5)
    """
    m = len(v_star)
    q, k = v_star.sum() ** 2 / (m + 1), m / (m + 1)
    return bool(v_star @ v_star >= q * (k + 2.0 + 2.0 * math.sqrt(2.0 * k - 1.0)))


# ---- descent


def descend(v, w, v_star, w_star, proxy: str, rate: float, steps: int):
    """Gradient descent, v along ∂f/∂v and w along the expected coarse gradient.

    Yields (v, w) before each of `steps` steps and after the last; v and w are new arrays every time.
    """
    yield v, w
    for _ in range(steps):
        dv, dw = gradient_v(v, w, v_star, w_star), coarse_gradient(v, w, v_star, w_star, proxy)
        v, w = v - rate * dv, w - rate * dw
        yield v, w
