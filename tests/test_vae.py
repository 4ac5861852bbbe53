"""The model: its bound, its evaluation, and a training step that neither waits nor copies."""

import itertools

import numpy as np
import pytest

from devsim import DevsimBackend, forbid, stats
from estimators import create
from minigrad import Rng, Tensor, grad, no_grad
from minigrad.backend import Backend
from minigrad.optim import Adam
from models.conditional import BetaNoise, ConditionalNetwork
from models.semi_supervised import SemiSupervisedVAE
from models.structured import StochasticNetwork
from models.tree_lstm import TreeLSTM
from models.vae import BernoulliVAE, CategoricalVAE
from registry import PAIRS, pairs, quick

KINDS = ("categorical", "bernoulli")
PRIORS = [(kind, learned) for kind in KINDS for learned in (False, True)]


def small(kind, dtype=np.float64, seed=1, learned=False, hidden=(5, 4)):
    settings = {"hidden": hidden, "rng": Rng(seed), "dtype": dtype, "learned_prior": learned}
    model = CategoricalVAE(6, 2, 3, **settings) if kind == "categorical" else BernoulliVAE(6, 3, **settings)
    for p in model.parameters():
        p.data *= 3.0  # far from the uniform start, so that KL and bounds mean something
    if learned:
        model.prior.data[...] = Rng(seed).site("prior").normal(model.prior.shape, like=model.prior.data)
    return model, Rng(seed).site("x").uniform((4, 6), like=np.empty(0, dtype))


def codes_of(model):
    """All codes (N, ...), and log p(d) (N,)."""
    prior = np.zeros(model.latent_shape) if model.prior is None else model.prior.data
    if isinstance(model, CategoricalVAE):
        outcomes = np.stack([np.eye(3)[list(family)] for family in itertools.product(range(3), repeat=2)])
        p = np.exp(prior) / np.exp(prior).sum(axis=-1, keepdims=True)
        return outcomes, np.log((outcomes * p).sum(axis=-1)).sum(axis=-1)
    outcomes = np.array(list(itertools.product((0.0, 1.0), repeat=3)))
    p = 1 / (1 + np.exp(-prior))
    return outcomes, np.log(np.where(outcomes > 0, p, 1 - p)).sum(axis=-1)


def probabilities(model, theta):
    """q(d|x) for every code, (B, N), from probabilities and not from logits."""
    outcomes, _ = codes_of(model)
    if isinstance(model, CategoricalVAE):
        p = np.exp(theta) / np.exp(theta).sum(axis=-1, keepdims=True)
        return np.prod((p[:, None] * outcomes).sum(axis=-1), axis=-1)
    p = 1 / (1 + np.exp(-theta))
    return np.prod(np.where(outcomes > 0, p[:, None], 1 - p[:, None]), axis=-1)


def by_enumeration(model, x, logit_scale=1.0):
    """−log p(x), and −ELBO without noise, by summing over all codes."""
    outcomes, log_prior = codes_of(model)
    q = probabilities(model, logit_scale * model.theta(x).data)
    y = model.decode(Tensor(outcomes)).data
    log_joint = log_prior + (x[:, None] * y - np.logaddexp(0, y)).sum(axis=-1)
    return -np.logaddexp.reduce(log_joint, axis=1), -(q * (log_joint - np.log(q))).sum(axis=1)


@pytest.mark.parametrize(("kind", "learned"), PRIORS)
def test_the_exact_estimator_gives_the_exact_bound(kind, learned):
    model, x = small(kind, learned=learned)
    reconstruction, kl = model.negative_elbo(x, create("exact", family=kind), Rng(0))
    np.testing.assert_allclose((reconstruction + kl).data, by_enumeration(model, x)[1], rtol=1e-12)


@pytest.mark.parametrize(("kind", "learned"), PRIORS)
@pytest.mark.parametrize("hidden", [(5, 4), ()])
def test_the_gradient_of_the_exact_bound_is_right_for_every_parameter(kind, learned, hidden):
    model, x = small(kind, learned=learned, hidden=hidden)
    assert len(model.parameters()) == 4 * (len(hidden) + 1) + learned
    loss = lambda: float(by_enumeration(model, x)[1].sum())
    reconstruction, kl = model.negative_elbo(x, create("exact", family=kind), Rng(0))
    (reconstruction + kl).sum().backward()
    rng = np.random.default_rng(0)
    for name, p in model.named_parameters().items():
        at = tuple(rng.integers(n) for n in p.shape)
        before, values = p.data[at], []
        for h in (1e-6, -1e-6):
            p.data[at] = before + h
            values.append(loss())
        p.data[at] = before
        assert p.grad[at] == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-5, abs=1e-7), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("logit_scale", [1.0, 0.4])
def test_evaluation_estimates_the_bound_with_hard_samples(kind, logit_scale):
    model, x = small(kind)
    many = np.repeat(x, 5000, axis=0)
    model.logit_scale = logit_scale
    reconstruction, kl = model.evaluate(many, Rng(3))
    values = (reconstruction + kl).reshape(4, 5000)
    error = values.std(axis=1) / np.sqrt(5000)
    assert (np.abs(values.mean(axis=1) - by_enumeration(model, x, logit_scale)[1]) < 4.5 * error + 1e-12).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_changed_forward_distribution_is_the_one_that_the_bound_is_about(kind):
    """An estimator that samples from the logits θ/τ_f: reconstruction and KL are both those of q with these logits."""
    model, x = small(kind)
    many = np.repeat(x, 5000, axis=0)
    with no_grad():
        reconstruction, kl = model.negative_elbo(many, create("st-decoupled:tau_f=2.5", family=kind), Rng(3))
    values = (reconstruction + kl).data.reshape(4, 5000)
    error = values.std(axis=1) / np.sqrt(5000)
    assert (np.abs(values.mean(axis=1) - by_enumeration(model, x, 0.4)[1]) < 4.5 * error).all()
    assert (np.abs(by_enumeration(model, x, 0.4)[1] - by_enumeration(model, x)[1]) > 10 * error).any()


@pytest.mark.parametrize(("kind", "learned"), PRIORS)
def test_the_importance_bound_lies_between_elbo_and_likelihood_and_reaches_it(kind, learned):
    model, x = small(kind, learned=learned)
    exact, elbo = by_enumeration(model, x)
    many = np.repeat(x, 2000, axis=0)
    five = model.importance_bound(many, Rng(1), samples=5, chunk=2).reshape(4, 2000).mean(axis=1)
    assert (exact < five).all()
    assert (five < elbo).all()
    for logit_scale in (1.0, 0.4):  # unbiased for p(x), whatever q is
        model.logit_scale = logit_scale
        bound = model.importance_bound(many, Rng(2), samples=50)
        likelihood = np.exp(-bound).reshape(4, 2000)
        error = likelihood.std(axis=1) / np.sqrt(2000)
        assert (np.abs(likelihood.mean(axis=1) - np.exp(-exact)) < 4.5 * error).all()
    with pytest.raises(ValueError, match="at least 1"):
        model.importance_bound(x, Rng(1), samples=0)
    with pytest.raises(ValueError, match="at least 1"):
        model.importance_bound(x, Rng(1), samples=5, chunk=0)


@pytest.mark.parametrize(("kind", "learned"), PRIORS)
def test_an_importance_weight_is_that_of_the_distribution_which_drew_the_sample(kind, learned):
    """With one sample. (The mean over many does not tell: it is right for every q.)"""
    model, x = small(kind, learned=learned)
    outcomes, log_prior = codes_of(model)
    model.logit_scale = 0.4
    theta, y = model.encode(x).data, model.decode(Tensor(outcomes)).data
    np.testing.assert_array_equal(theta, 0.4 * model.theta(x).data)
    log_joint = log_prior + (x[:, None] * y - np.logaddexp(0, y)).sum(axis=-1)
    d = model.draw(theta, Rng(1).site(0)).reshape(4, 1, -1)
    drawn = (outcomes.reshape(len(outcomes), -1) == d).all(axis=-1)
    expected = -(log_joint - np.log(probabilities(model, theta)))[drawn]
    np.testing.assert_allclose(model.importance_bound(x, Rng(1), 1, 1), expected, rtol=1e-12)


@pytest.mark.parametrize(("kind", "learned"), PRIORS)
def test_vimco_trains_the_importance_bound_and_its_gradient_is_right(kind, learned):
    """Its value is the bound with S samples; the mean of its gradient for the encoder is that of the bound's mean, by
    differences of the enumerated expectation over pairs of codes."""
    model, x = small(kind, learned=learned)
    x, n = x[:1], 60_000
    estimator = create("vimco:samples=2", family=kind)
    weight = model.encoder.layers[-1].bias
    bound, kl = model.negative_elbo(np.repeat(x, n, axis=0), estimator, Rng(0))
    assert (kl.data == 0).all()

    def mean_bound():
        outcomes, log_prior = codes_of(model)
        q = probabilities(model, model.encode(x).data)[0]
        y = model.decode(Tensor(outcomes)).data
        w = np.exp(log_prior + (x * y - np.logaddexp(0, y)).sum(axis=-1)) / q
        return -(q[:, None] * q * np.log(0.5 * (w[:, None] + w))).sum()

    assert abs(bound.data.mean() - mean_bound()) < 4.5 * bound.data.std() / np.sqrt(n)
    theta = []
    model.theta, usual = lambda x: theta.append(usual(x)) or theta[0], model.theta
    bound, _ = model.negative_elbo(np.repeat(x, n, axis=0), estimator, Rng(1))
    g = grad(bound.sum(), [theta[0]])[0].reshape(n, -1)
    model.theta = usual
    for i in range(weight.size):
        before, values = weight.data[i], []
        for h in (1e-5, -1e-5):
            weight.data[i] = before + h
            values.append(mean_bound())
        weight.data[i] = before
        error = g[:, i].std() / np.sqrt(n)
        assert abs(g[:, i].mean() - (values[0] - values[1]) / 2e-5) < 4.5 * error + 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_samples_and_reconstructions_are_probabilities(kind):
    model, x = small(kind)
    for images, n in ((model.sample(7, Rng(0)), 7), (model.reconstruct(x, Rng(0)), 4)):
        assert images.shape == (n, 6)
        assert (images > 0).all()
        assert (images < 1).all()


@pytest.mark.parametrize(("kind", "learned"), PRIORS)
def test_samples_come_from_the_prior(kind, learned):
    model, _ = small(kind, learned=learned)
    model.decode = lambda d: d
    means = model.sample(20_000, Rng(0)).mean(axis=0)  # of σ(d), which is ½ for 0 and σ(1) for 1
    outcomes, log_prior = codes_of(model)
    p = np.tensordot(np.exp(log_prior), outcomes, axes=1)
    np.testing.assert_allclose((means - 0.5) / (1 / (1 + np.exp(-1)) - 0.5), p, atol=0.02)


def network(kind, pixels, variables, categories, hidden, rng):
    if kind == "categorical":
        return CategoricalVAE(pixels, variables, categories, hidden, rng=rng)
    return BernoulliVAE(pixels, variables, hidden, rng=rng)


@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_a_training_step_neither_waits_nor_copies_and_gives_numpy_s_bits(name, kind):
    """On the stand-in device: noise and the batch go in, nothing comes out until the loss is read."""
    results = []
    for backend in (Backend(), DevsimBackend()):
        model = network(kind, 12, 3, 3, (8, 6), Rng(0)).to(backend)
        images = backend.to_device(Rng(0).site("x").uniform((20, 12)))
        order = backend.to_device(Rng(0).permutation(20))
        optimizer, estimator = Adam(model.parameters(), 1e-2), create(name, family=kind)
        with forbid("sync", "d2h"):
            for step in range(4):
                x = images[order[step * 5 : step * 5 + 5]]
                optimizer.zero_grad()
                reconstruction, kl = model.negative_elbo(x, estimator, Rng(0).at(step).site("family"))
                loss = (reconstruction + kl).mean()
                loss.backward()
                optimizer.step()
                estimator.update()
        results.append([backend.to_host(loss.data), *(backend.to_host(p.data) for p in model.parameters())])
    for a, b in zip(*results, strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_training_step_needs_few_launches():
    """On a GPU a step of this size costs its launches. The budget is what the step needs today: 17 products, and
    99 kernels and fillings of memory."""
    backend = DevsimBackend()
    model = CategoricalVAE(12, 3, 4, (8, 6), rng=Rng(0)).to(backend)
    optimizer, x = Adam(model.parameters(), 1e-2), backend.to_device(Rng(0).uniform((5, 12)))
    before = stats["launch"]
    reconstruction, kl = model.negative_elbo(x, create("st-gs"), Rng(0))
    (reconstruction + kl).mean().backward()
    optimizer.step()
    assert stats["launch"] - before <= 116


def patterns():
    """Forty images of four patterns (two bits to encode), and −log p of the best model without a code."""
    images = (Rng(0).site("means").uniform((4, 12)) > 0.5).astype(np.float32)
    p = images.mean(axis=0)
    return images[np.arange(40) % 4], -np.sum(p * np.log(p + 1e-9) + (1 - p) * np.log(1 - p + 1e-9))


def trained(name, kind, x, steps, enough=lambda model, estimator: False):
    """(model, estimator, the objective at every step); every 25 steps it may be `enough`."""
    model, curve = network(kind, 12, 2, 4, (16,), Rng(0)), []
    optimizer, estimator = Adam(model.parameters(), 1e-2), create(name, family=kind)
    for step in range(steps):
        optimizer.zero_grad()
        reconstruction, kl = model.negative_elbo(x, estimator, Rng(0).at(step))
        (reconstruction + kl).mean().backward()
        optimizer.step()
        estimator.update()
        curve.append((reconstruction + kl).data.mean())
        if step % 25 == 24 and enough(model, estimator):
            break
    return model, estimator, curve


DAILY = ("st", "st-gs", "reinmax", "gst-1.0", "reinforce-mean", "rloo", "muprop", "rebar", "disarm", "exact")


@pytest.mark.parametrize(("name", "kind"), quick(DAILY, pairs(lambda e: e.support == "hard")))
def test_training_lowers_the_bound(name, kind):
    x, without_code = patterns()

    def bound(model, estimator):
        model.logit_scale = estimator.logit_scale  # as it is after the last update
        reconstruction, kl = model.evaluate(x, Rng(1))
        return (reconstruction + kl).mean()

    model, estimator, _ = trained(name, kind, x, 300, enough=lambda *best: bound(*best) < 0.7 * without_code)
    assert bound(model, estimator) < 0.75 * without_code


@pytest.mark.parametrize(("name", "kind"), pairs(lambda e: e.support == "soft"))
def test_training_on_soft_codes_lowers_their_own_objective(name, kind):
    x, without_code = patterns()
    _, _, curve = trained(name, kind, x, steps=200)
    assert np.mean(curve[-10:]) < 0.75 * without_code < 0.9 * np.mean(curve[:10])


WIDE = np.full((3, 7), 0.5, np.float32)
X, LABELS = np.full((3, 4), 0.5, np.float32), np.array([0, 1, 1])
IDS, LENGTHS = np.zeros((3, 4), np.int64), np.array([4, 3, 2])
MADE = Rng(0).site("model")

STEPS = {  # each model made and asked for its cost, with all noise from Rng(0)
    "vae": lambda: CategoricalVAE(4, 3, 2, (3,), rng=MADE).negative_elbo(X, create("st"), Rng(0)),
    "bits": lambda: BernoulliVAE(4, 3, (3,), rng=MADE).negative_elbo(X, create("darn"), Rng(0)),
    "semi-supervised": lambda: SemiSupervisedVAE(4, 2, 3, (3,), rng=MADE).unlabelled(X, Rng(0), create("st")),
    "conditional": lambda: ConditionalNetwork(
        4, 2, experts=3, gater=2, unit="rectifier", noise=BetaNoise(0.1, 40.1), rng=MADE
    ).cost(X, LABELS, create("noisy-rectifier"), Rng(0)),
    "structured": lambda: StochasticNetwork(4, 4, 3, rng=MADE).cost(X, X, [create("darn"), create("darn")], Rng(0)),
    "tree": lambda: tree().cost(IDS, LENGTHS, LABELS, Rng(0), create("st")),
    "tree with affine leaves": lambda: tree(leaves="affine").cost(IDS, LENGTHS, LABELS, Rng(0), create("st")),
    "tree on the tape": lambda: tree().cost(IDS, LENGTHS, LABELS, Rng(0), create("st"), plain=True),
}


def tree(**options):
    return TreeLSTM(5, 2, dim=3, hidden=3, rng=MADE, **options)


@pytest.mark.parametrize("model", STEPS)
def test_no_two_draws_of_a_model_have_one_address(addresses, model):
    """Neither of its initial weights, nor of a step."""
    STEPS[model]()
    assert len(addresses) > 1
    assert len(addresses) == len(set(addresses))


@pytest.mark.parametrize(
    ("family", "call"),
    [
        ("categorical", lambda e: CategoricalVAE(7, 3, 2, (), rng=Rng(0)).negative_elbo(WIDE, e, Rng(0))),
        ("bernoulli", lambda e: BernoulliVAE(7, 3, (), rng=Rng(0)).negative_elbo(WIDE, e, Rng(0))),
        ("categorical", lambda e: SemiSupervisedVAE(7, 2, 3, (3,), rng=Rng(0)).unlabelled(WIDE, Rng(0), e)),
        ("bernoulli", lambda e: ConditionalNetwork(7, 2, experts=3, rng=Rng(0)).cost(WIDE, LABELS, e, Rng(0))),
        ("bernoulli", lambda e: StochasticNetwork(7, 7, 3, layers=1, rng=Rng(0)).cost(WIDE, WIDE, [e], Rng(0))),
    ],
)
def test_a_learned_baseline_looks_at_the_images(family, call):
    """And not at the logits, which an estimator takes where it is given nothing else."""
    estimator = create("nvil", family=family)
    call(estimator)
    assert estimator.learned["W1"].shape[0] == 7


@pytest.mark.parametrize(
    ("family", "call"),
    [
        ("categorical", lambda e: CategoricalVAE(4, 3, 2, (), rng=Rng(0)).negative_elbo(X, e, Rng(0))),
        ("bernoulli", lambda e: BernoulliVAE(4, 3, (), rng=Rng(0)).negative_elbo(X, e, Rng(0))),
        ("categorical", lambda e: SemiSupervisedVAE(4, 2, 3, (3,), rng=Rng(0)).unlabelled(X, Rng(0), e)),
        ("bernoulli", lambda e: ConditionalNetwork(4, 2, experts=3, gater=2, rng=Rng(0)).cost(X, LABELS, e, Rng(0))),
        ("categorical", lambda e: TreeLSTM(5, 2, dim=3, hidden=3, rng=Rng(0)).cost(IDS, LENGTHS, LABELS, Rng(0), e)),
    ],
)
def test_every_model_refuses_an_estimator_for_the_other_kind_of_variables(family, call):
    """L bits and one choice of L classes have logits of the same shape: it would train, and train something else."""
    call(create("st", family=family))
    (other,) = {"categorical", "bernoulli"} - {family}
    with pytest.raises(
        ValueError, match=f"has {family} variables, but it got Straight-through for {other} ones: create"
    ):
        call(create("st", family=other))
