"""Modules, initialisers and optimizers."""

import copy
import math
import pickle

import numpy as np
import pytest

from minigrad import Rng, Tensor, nn
from minigrad.backend import Backend
from minigrad.fused import cross_entropy
from minigrad.optim import OPTIMIZERS, SGD, Adam, Plateau, RAdam, clip_grad_norm


class Net(nn.Module):
    def __init__(self, rng, dtype=np.float64):
        self.layers = [
            nn.Linear(3, 4, rng.site("a"), relu=True, dtype=dtype),
            nn.Linear(4, 2, rng.site("b"), dtype=dtype),
        ]
        self.shared = self.layers[0]
        self.scale = nn.parameter(np.ones(1, dtype))

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return x * self.scale


def test_parameters_have_names_and_shared_ones_count_once():
    names = list(Net(Rng(0)).named_parameters())
    assert names == ["layers.0.weight", "layers.0.bias", "layers.1.weight", "layers.1.bias", "scale"]


def test_parameters_are_found_in_containers_and_results_are_not_taken_for_them():
    class Nested(nn.Module):
        def __init__(self):
            linear = lambda site: nn.Linear(1, 1, Rng(0).site(site), dtype=np.float64)
            self.heads = {"mean": linear("m"), 7: (nn.parameter(np.ones(1)), [linear("n")])}
            self.seen, self.fixed, self.size = nn.parameter(np.ones(2)) * 2.0, Tensor(np.ones(1)), 3

    names = ["heads.mean.weight", "heads.mean.bias", "heads.7.0", "heads.7.1.0.weight", "heads.7.1.0.bias"]
    assert list(Nested().named_parameters()) == names


def test_a_seed_fixes_the_initial_weights():
    a, b, c = Net(Rng(0)), Net(Rng(0)), Net(Rng(1))
    for p, q, r in zip(a.parameters(), b.parameters(), c.parameters(), strict=True):
        np.testing.assert_array_equal(p.data, q.data)
        assert p.size == 1 or not np.array_equal(p.data, r.data)


def test_state_dict_round_trip_and_refusals():
    a, b = Net(Rng(0)), Net(Rng(1))
    b.load_state_dict(a.state_dict())
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        np.testing.assert_array_equal(p.data, q.data)
    state = a.state_dict()
    with pytest.raises(ValueError, match="lacks scale"):
        b.load_state_dict({k: v for k, v in state.items() if k != "scale"})
    with pytest.raises(ValueError, match="has also extra"):
        b.load_state_dict(state | {"extra": np.ones(1)})
    with pytest.raises(ValueError, match="another model"):
        b.load_state_dict(state | {"scale": np.ones(2)})


def test_initialisers_have_their_moments():
    shape, rng = (200, 300), Rng(3)
    u = nn.uniform_fan_in(rng, shape, np.float64)
    assert np.abs(u).max() <= 1 / np.sqrt(200)
    assert u.std() == pytest.approx(1 / np.sqrt(3 * 200), rel=0.02)
    assert nn.xavier_uniform(rng, shape, np.float64).std() == pytest.approx(np.sqrt(2 / 500), rel=0.02)
    assert nn.he_normal(rng, shape, np.float64).std() == pytest.approx(np.sqrt(2 / 200), rel=0.02)
    assert nn.normal(rng, shape).std() == pytest.approx(0.01, rel=0.02)
    assert nn.normal(rng, shape).dtype == np.float32
    for q in (nn.orthogonal(rng, (5, 3), np.float64), nn.orthogonal(rng, (3, 5), np.float64).T):
        np.testing.assert_allclose(q.T @ q, np.eye(3), atol=1e-14)


def test_a_leaky_relu_has_the_slope_of_its_layer():
    x = np.linspace(-1.0, 1.0, 15).reshape(5, 3)
    layer = nn.Linear(3, 4, Rng(0), relu=True, slope=0.3, dtype=np.float64)
    y = x @ layer.weight.data + layer.bias.data
    np.testing.assert_allclose(layer(x).data, np.where(y > 0, y, 0.3 * y))
    mlp = nn.MLP([3, 4, 2], Rng(0), slope=0.3, dtype=np.float64)
    first, last = mlp.layers
    h = x @ first.weight.data + first.bias.data
    np.testing.assert_allclose(mlp(x).data, np.where(h > 0, h, 0.3 * h) @ last.weight.data + last.bias.data)


def test_an_initialiser_reaches_every_layer():
    layers = nn.MLP([3, 4, 2], Rng(0), init=nn.he_normal, dtype=np.float64).layers
    for n, (layer, shape) in enumerate(zip(layers, [(3, 4), (4, 2)], strict=True)):
        np.testing.assert_array_equal(layer.weight.data, nn.he_normal(Rng(0).site(n).site("weight"), shape, np.float64))


def test_embedding_and_lstm_learn():
    rng = Rng(0)
    embed, lstm, head = nn.Embedding(5, 4, rng.site(0)), nn.LSTM(4, 8, rng.site(1)), nn.Linear(8, 5, rng.site(2))
    optimizer = Adam([*embed.parameters(), *lstm.parameters(), *head.parameters()], lr=0.02)
    ids = np.random.default_rng(0).integers(0, 5, (6, 16))  # the task: repeat the first symbol at the end
    for _ in range(160):
        optimizer.zero_grad()
        h, _ = lstm(embed(ids))
        loss = cross_entropy(head(h[-1]), ids[0]).mean()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1


# ---- optimizers: the blocked update against the published algorithm, written out


def published(name, theta, gs, lr, momentum=0.9, betas=(0.9, 0.999), eps=1e-8):
    m, v = np.zeros_like(theta), np.zeros_like(theta)
    for t, g in enumerate(gs, start=1):
        if name == "sgd":
            v = momentum * v + g
            theta = theta - lr * v
            continue
        m = betas[0] * m + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * g * g
        m_hat, v_hat = m / (1 - betas[0] ** t), v / (1 - betas[1] ** t)
        if name == "adam":
            theta = theta - lr * m_hat / (np.sqrt(v_hat) + eps)
        else:
            rho_inf = 2 / (1 - betas[1]) - 1
            rho = rho_inf - 2 * t * betas[1] ** t / (1 - betas[1] ** t)
            if rho > 5:
                r = np.sqrt((rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho))
                theta = theta - lr * r * m_hat / (np.sqrt(v_hat) + eps)
            else:
                theta = theta - lr * m_hat
    return theta


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_update_is_the_published_one_across_blocks(name, rng, monkeypatch):
    monkeypatch.setattr("minigrad.optim._BLOCK", 7)  # several blocks, the last one shorter
    shapes = [(3, 4), (5,), (2, 2)]
    starts = [rng.standard_normal(s) for s in shapes]
    gs = [[rng.standard_normal(s) for s in shapes] for _ in range(12)]
    parameters = [Tensor(s.copy(), requires_grad=True) for s in starts]
    options = {"momentum": 0.9} if name == "sgd" else {}
    optimizer = OPTIMIZERS[name](parameters, lr=0.01, **options)
    for g in gs:
        optimizer.zero_grad()
        sum(((p * gi).sum() for p, gi in zip(parameters, g, strict=True)), start=Tensor(0.0)).backward()
        optimizer.step()
    for i, p in enumerate(parameters):
        expected = published(name, starts[i], [g[i] for g in gs], 0.01)
        np.testing.assert_allclose(p.data, expected, rtol=1e-10, atol=1e-12)


def test_gradients_are_written_into_the_flat_buffer_and_accumulate(rng):
    net = Net(Rng(0))
    x, labels = rng.standard_normal((6, 3)), np.array([0, 1, 0, 1, 1, 0])
    cross_entropy(net(x), labels).mean().backward()
    expected = [p.grad.copy() for p in net.parameters()]
    optimizer = SGD(net.parameters(), lr=0.1)
    for times in (1, 2, 3):  # without zero_grad, gradients add up in the buffer
        cross_entropy(net(x), labels).mean().backward()
        for p, g in zip(net.parameters(), expected, strict=True):
            np.testing.assert_allclose(p.grad, times * g, rtol=1e-12)
            assert np.shares_memory(p.grad, optimizer.flat.grad)
            assert np.shares_memory(p.data, optimizer.flat.data)
    optimizer.zero_grad()
    cross_entropy(net(x), labels).mean().backward()
    np.testing.assert_allclose(net.layers[0].weight.grad, expected[0], rtol=1e-12)


def test_a_weight_used_twice_in_one_pass_accumulates_in_the_buffer(rng):
    w = Tensor(rng.standard_normal((3, 3)), requires_grad=True)
    b = Tensor(np.zeros(3), requires_grad=True)
    from minigrad.fused import linear

    x = rng.standard_normal((2, 3))
    linear(linear(x, w, b), w, b).sum().backward()
    expected = w.grad.copy(), b.grad.copy()
    SGD([w, b], lr=0.1)
    linear(linear(x, w, b), w, b).sum().backward()
    np.testing.assert_allclose(w.grad, expected[0], rtol=1e-12)
    np.testing.assert_allclose(b.grad, expected[1], rtol=1e-12)


def test_a_parameter_without_gradient_stays(rng):
    a, b = (Tensor(np.ones(2), requires_grad=True) for _ in range(2))
    optimizer = SGD([a, b], lr=0.1)
    (a * b).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    before = b.data.copy()
    a.sum().backward()
    optimizer.step()
    np.testing.assert_array_equal(b.data, before)
    np.testing.assert_allclose(a.data, 0.8)


def test_a_gradient_that_the_user_sets_is_the_one_that_counts():
    a, b = (Tensor(np.ones(2), requires_grad=True) for _ in range(2))
    optimizer = SGD([a, b], lr=0.1)
    (a + b).sum().backward()
    a.grad = np.array([2.0, 3.0])
    assert clip_grad_norm(optimizer, 100.0) == pytest.approx(np.sqrt(4.0 + 9.0 + 1.0 + 1.0))
    optimizer.step()
    np.testing.assert_allclose([a.data, b.data], [[0.8, 0.7], [0.9, 0.9]])
    for wrong in (np.ones(1), np.ones((2, 2)), np.float64(1.0)):
        a.grad = wrong
        with pytest.raises(ValueError, match="a gradient that was set has the shape"):
            optimizer.step()


def test_an_optimizer_whose_parameter_was_given_another_array_says_so():
    p = Tensor(np.ones(3), requires_grad=True)
    optimizer = SGD([p], lr=1.0)
    p.data = np.zeros(3)
    (p * 2.0).sum().backward()
    with pytest.raises(RuntimeError, match=r"\.data was replaced"):
        optimizer.step()
    p.data = optimizer.flat.data.reshape(3)  # another view of the same memory is another array, too
    with pytest.raises(RuntimeError, match=r"\.data was replaced"):
        optimizer.step()


def test_an_optimizer_made_before_its_model_was_moved_says_so():
    model = nn.Linear(2, 1, Rng(0))
    optimizer = SGD(model.parameters(), lr=1.0)
    model.to(Backend(), np.float64)
    model(np.ones((1, 2))).sum().backward()
    with pytest.raises(RuntimeError, match=r"\.data was replaced: .* make the optimizer afterwards"):
        optimizer.step()


def test_an_optimizer_that_has_lost_its_parameters_to_another_one_says_so():
    p = Tensor(np.ones(3), requires_grad=True)
    first, second = SGD([p], lr=1.0), SGD([p], lr=1.0)
    (p * 2.0).sum().backward()
    with pytest.raises(RuntimeError, match="gone over to an optimizer that was made later"):
        first.step()
    second.step()
    np.testing.assert_array_equal(p.data, -1.0)


def test_clip_scales_the_joint_norm():
    a, b = (Tensor(np.ones(1), requires_grad=True) for _ in range(2))
    optimizer = SGD([a, b], lr=1.0)
    (a * 3.0 + b * 4.0).sum().backward()
    assert clip_grad_norm(optimizer, 10.0) == pytest.approx(5.0)
    np.testing.assert_allclose([a.grad[0], b.grad[0]], [3.0, 4.0])
    assert clip_grad_norm(optimizer, 1.0) == pytest.approx(5.0)
    np.testing.assert_allclose([a.grad[0], b.grad[0]], [0.6, 0.8], rtol=1e-5)


def test_a_numpy_scalar_may_be_a_parameter():
    class Scaled(nn.Module):
        def __init__(self):
            self.scale, self.shift = nn.parameter(np.float64(2.0)), nn.parameter(np.ones(2))

    model = Scaled()
    model.load_state_dict(model.state_dict() | {"scale": np.array(3.0)})
    optimizer = SGD(model.parameters(), lr=1.0)
    (model.scale * model.shift).sum().backward()
    optimizer.step()
    np.testing.assert_array_equal(model.scale.data, 1.0)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_parameters_without_elements_are_trained(name):
    p = Tensor(np.ones((0, 3)), requires_grad=True)
    optimizer = OPTIMIZERS[name]([p], lr=0.1)
    (p * 2.0).sum().backward()
    optimizer.step()
    assert optimizer.steps == 1


@pytest.mark.parametrize("again", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_model_and_its_optimizer_can_be_copied_together(name, again):
    def train(model, optimizer, zero=True):
        if zero:
            optimizer.zero_grad()
        model(x).sum().backward()
        optimizer.step()

    x, model = Tensor(np.ones((2, 3))), Net(Rng(0))
    optimizer = OPTIMIZERS[name](model.parameters(), lr=0.1)
    train(model, optimizer)
    copied, its_optimizer = again((model, optimizer))
    before = model.state_dict()
    for zero in (False, True):  # the gradients are copied, too
        train(copied, its_optimizer, zero)
    np.testing.assert_equal(model.state_dict(), before)
    for zero in (False, True):
        train(model, optimizer, zero)
    np.testing.assert_equal(model.state_dict(), copied.state_dict())


def test_what_is_shared_or_refers_back_counts_once():
    parent, child = nn.Module(), nn.Module()
    parent.child, child.parent, child.weight = child, parent, nn.parameter(np.ones(1))
    parent.again, parent.itself = child, [child]
    parent.itself.append(parent.itself)
    assert list(parent.named_parameters()) == ["child.weight"]


@pytest.mark.parametrize(
    "parts",
    [
        lambda p, q: {0: p, "0": q},
        lambda p, q: {"a.b": p, "a": {"b": q}},
        lambda p, q: {"a": [p], "a.0": q},
        lambda p, q: [{True: p, "True": q}],
    ],
)
def test_two_parameters_of_one_name_are_refused(parts):
    model = nn.Module()
    model.parts = parts(nn.parameter(np.ones(2)), nn.parameter(np.zeros(2)))
    with pytest.raises(ValueError, match="two parameters are called parts"):
        model.parameters()


def test_a_model_that_has_moved_forgets_the_graphs_of_before():
    model, x = Net(Rng(0)), Tensor(np.ones((2, 3)))
    loss = model(x).sum()
    model.to(Backend(), np.float64)
    with pytest.raises(RuntimeError, match="was updated after this graph"):
        loss.backward()
    with pytest.raises(TypeError, match="parameters are float32 or float64, not int64"):
        model.to(Backend(), int)


@pytest.mark.parametrize("wrong", [None, [], nn.Linear(1, 1, Rng(0))])
def test_a_schedule_wants_an_optimizer(wrong):
    with pytest.raises(TypeError, match="of an optimizer, got"):
        Plateau(wrong)


def test_nan_is_no_improvement_not_even_at_first():
    schedule = Plateau(SGD([Tensor(np.ones(3), requires_grad=True)], lr=0.8), patience=1)
    found = [schedule.step(metric) for metric in (math.nan, 1.0, math.nan, math.inf, math.inf, math.nan)]
    assert found == [False, True, False, True, False, False]
    assert schedule.optimizer.lr == 0.4


def test_a_copied_module_is_trained_by_itself():
    a = Net(Rng(0))
    b, x = copy.deepcopy(a), Tensor(np.ones((2, 3)))
    (a(x).sum() + 2.0 * b(x).sum()).backward()
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        np.testing.assert_array_equal(q.grad, 2.0 * p.grad)


@pytest.mark.parametrize("make", [Adam, RAdam, lambda p: SGD(p, 0.1, momentum=0.9)])
def test_optimizer_state_round_trip(make):
    def train(optimizer, a, steps):
        for _ in range(steps):
            optimizer.zero_grad()
            ((a - 3.0) ** 2.0).sum().backward()
            optimizer.step()

    a = Tensor(np.zeros(3), requires_grad=True)
    first = make([a])
    train(first, a, 5)
    b = Tensor(a.data.copy(), requires_grad=True)
    second = make([b])
    second.load_state_dict(first.state_dict())
    train(first, a, 5)
    train(second, b, 5)
    np.testing.assert_array_equal(a.data, b.data)
    with pytest.raises(ValueError, match="another"):
        second.load_state_dict({"steps": np.array([1])})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: Adam(p, lr=0.0), "learning rate"),
        (lambda p: Adam(p, lr=float("nan")), "learning rate"),
        (lambda p: Adam([], lr=0.1), "at least one parameter"),
        (lambda p: SGD(p, 0.1, momentum=1.0), "momentum"),
        (lambda p: Adam(p, betas=(0.9, 1.0)), "betas"),
        (lambda p: Adam(p, betas=(0.9,)), "betas must be two numbers"),
        (lambda p: RAdam(p, betas=()), "betas must be two numbers"),
        (lambda p: nn.Linear(0, 3, Rng(0)), "inputs must be an integer of at least 1, got 0"),
        (lambda p: nn.Linear(3, 2.5, Rng(0)), "outputs must be an integer of at least 1, got 2.5"),
        (lambda p: nn.MLP([3, -1, 2], Rng(0)), "outputs must be an integer of at least 1, got -1"),
        (lambda p: nn.MLP([3], Rng(0)), "its input and its output"),
        (lambda p: nn.Embedding(3, 0, Rng(0)), "width must be"),
        (lambda p: nn.LSTM(3, 0, Rng(0)), "hidden must be"),
        (lambda p: Adam(p, eps=0.0), "eps must be positive"),
        (lambda p: Adam([*p, Tensor(np.ones(2))]), "leaf Tensors that require a gradient"),
        (lambda p: Adam([p[0] * 2.0]), "leaf Tensors that require a gradient"),
        (lambda p: Adam([np.ones(2)]), "leaf Tensors that require a gradient"),
        (lambda p: Adam([*p, Tensor(np.ones(1, np.float32), requires_grad=True)]), "different dtypes"),
    ],
)
def test_bad_settings_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make([Tensor(np.ones(2), requires_grad=True)])
