"""The model: its bound, its evaluation, and a training step that neither waits nor copies."""

import itertools

from devsim import DevsimBackend, forbid, stats
from estimators import ESTIMATORS, create
from minigrad import Rng
from minigrad.backend import Backend
from minigrad.optim import Adam
from models.vae import CategoricalVAE

import numpy as np
import pytest


def small(dtype=np.float64, seed=1):
    rng = Rng(seed)
    model = CategoricalVAE(6, 2, 3, (5, 4), rng=rng, dtype=dtype)
    for p in model.parameters():
        p.data *= 3.0  # far from the uniform start, so that KL and bounds mean something
    return model, Rng(seed).site("x").uniform((4, 6), like=np.empty(0, dtype))


def by_enumeration(model, x):
    """−log p(x), and −ELBO without noise, by summing over all codes."""
    logits = model.encode(x).data
    q = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    log_joint, elbo = [], 0.0
    for code in itertools.product(range(3), repeat=2):
        d = np.eye(3)[list(code)]
        y = model.decode(np.broadcast_to(d, (len(x), 2, 3))).data
        log_likelihood = (x * y - np.logaddexp(0, y)).sum(axis=-1)
        log_joint.append(log_likelihood - 2 * np.log(3))
        q_d = np.prod((q * d).sum(axis=-1), axis=-1)
        elbo = elbo + q_d * (log_likelihood - 2 * np.log(3) - np.log(q_d))
    return -np.logaddexp.reduce(log_joint, axis=0), -elbo


def test_the_exact_estimator_gives_the_exact_bound():
    model, x = small()
    reconstruction, kl = model.negative_elbo(x, create("exact"), Rng(0))
    np.testing.assert_allclose((reconstruction + kl).data, by_enumeration(model, x)[1], rtol=1e-12)


def test_the_gradient_of_the_exact_bound_is_right_for_every_parameter():
    model, x = small()
    loss = lambda: float(by_enumeration(model, x)[1].sum())
    reconstruction, kl = model.negative_elbo(x, create("exact"), Rng(0))
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


def test_evaluation_estimates_the_bound_with_hard_samples():
    model, x = small()
    many = np.repeat(x, 5000, axis=0)
    reconstruction, kl = model.evaluate(many, Rng(3))
    values = (reconstruction + kl).reshape(4, 5000)
    error = values.std(axis=1) / np.sqrt(5000)
    assert (np.abs(values.mean(axis=1) - by_enumeration(model, x)[1]) < 4.5 * error + 1e-12).all()


def test_the_importance_bound_lies_between_elbo_and_likelihood_and_reaches_it():
    model, x = small()
    exact, elbo = by_enumeration(model, x)
    many = np.repeat(x, 2000, axis=0)
    five = model.importance_bound(many, Rng(1), samples=5, chunk=2).reshape(4, 2000).mean(axis=1)
    assert (exact < five).all()
    assert (five < elbo).all()
    likelihood = np.exp(-model.importance_bound(many, Rng(2), samples=50)).reshape(4, 2000)  # unbiased for p(x)
    error = likelihood.std(axis=1) / np.sqrt(2000)
    assert (np.abs(likelihood.mean(axis=1) - np.exp(-exact)) < 4.5 * error).all()
    with pytest.raises(ValueError, match="at least 1"):
        model.importance_bound(x, Rng(1), samples=0)


def test_samples_and_reconstructions_are_probabilities():
    model, x = small()
    for images, n in ((model.sample(7, Rng(0)), 7), (model.reconstruct(x, Rng(0)), 4)):
        assert images.shape == (n, 6)
        assert (images > 0).all()
        assert (images < 1).all()


@pytest.mark.parametrize("name", [n for n in ESTIMATORS if n != "exact"])
def test_a_training_step_neither_waits_nor_copies_and_gives_numpy_s_bits(name):
    """On the stand-in device: noise and the batch go in, nothing comes out until the loss is read."""
    results = []
    for backend in (Backend(), DevsimBackend()):
        model = CategoricalVAE(12, 3, 4, (8, 6), rng=Rng(0)).to(backend)
        images = backend.to_device(Rng(0).site("x").uniform((20, 12)))
        order = backend.to_device(Rng(0).permutation(20))
        optimizer, estimator = Adam(model.parameters(), 1e-2), create(name)
        with forbid("sync", "d2h"):
            for step in range(4):
                x = images[order[step * 5 : step * 5 + 5]]
                optimizer.zero_grad()
                reconstruction, kl = model.negative_elbo(x, estimator, Rng(0).at(step).site("code"))
                loss = (reconstruction + kl).mean()
                loss.backward()
                optimizer.step()
                estimator.update()
        results.append([backend.to_host(loss.data), *(backend.to_host(p.data) for p in model.parameters())])
    for a, b in zip(*results, strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_training_step_needs_few_launches():
    """On a GPU a step of this size costs its launches. The budget is what the step needs today."""
    backend = DevsimBackend()
    model = CategoricalVAE(12, 3, 4, (8, 6), rng=Rng(0)).to(backend)
    optimizer, x = Adam(model.parameters(), 1e-2), backend.to_device(Rng(0).uniform((5, 12)))
    before = stats["launch"]
    reconstruction, kl = model.negative_elbo(x, create("st-gs"), Rng(0))
    (reconstruction + kl).mean().backward()
    optimizer.step()
    assert stats["launch"] - before <= 230


@pytest.mark.parametrize(
    "name", ["exact", "rloo:samples=4", "reinforce-mean", "st", "gumbel-softmax", "reinmax", "gst-p"]
)
def test_training_lowers_the_bound(name):
    model = CategoricalVAE(12, 2, 4, (16,), rng=Rng(0))
    images = (Rng(0).site("means").uniform((4, 12)) > 0.5).astype(np.float32)  # four patterns: two bits to encode
    x = images[np.arange(40) % 4]
    optimizer, estimator = Adam(model.parameters(), 1e-2), create(name)
    for step in range(300):
        optimizer.zero_grad()
        reconstruction, kl = model.negative_elbo(x, estimator, Rng(0).at(step))
        (reconstruction + kl).mean().backward()
        optimizer.step()
        estimator.update()
    reconstruction, kl = model.evaluate(x, Rng(1))
    without_code = 12 * np.mean([-p * np.log(p + 1e-9) - (1 - p) * np.log(1 - p + 1e-9) for p in images.mean(axis=0)])
    assert (reconstruction + kl).mean() < 0.75 * without_code
