"""The latent-tree LSTM: its three evaluations against each other, its gradients, its estimators, its baselines."""

import functools
import itertools

import numpy as np
import pytest

import devsim
from devsim import DevsimBackend, forbid
from estimators import ESTIMATORS, Estimator, Sampler, create, facts
from minigrad import Rng, Tensor, no_grad
from minigrad.backend import Backend
from minigrad.check import audit, check_rule
from minigrad.optim import Adam
from models import linear_time, tree_lstm, trees
from models.composition import Draw, compose_given, compose_plain
from models.linear_time import compose, compose_greedy
from models.tree_lstm import TreeLSTM

CATEGORICAL = [name for name in ESTIMATORS if facts(name).family.name == "categorical"]
SAMPLERS = [name for name in CATEGORICAL if isinstance(facts(name), Sampler) and facts(name).support == "hard"]
BATCHES = {
    "one": [1],
    "two": [2],
    "one and two": [2, 1],
    "three": [3, 3],
    "mixed": [7, 7, 6, 2, 1, 5],
    "equal": [12] * 3,
    "long": [40, 33, 18, 4],
}


class Given:
    """A sampler that takes the choices it is given; finished rows and the last merge count for nothing."""

    def __init__(self, choices):
        self.choices, self.step = np.asarray(choices), 0

    def sample(self, logits, rng, mask):
        d = np.zeros(logits.shape)
        d[np.arange(len(d)), np.minimum(self.choices[:, self.step], mask.sum(axis=1) - 1)] = 1.0
        self.step += 1
        return Tensor(d)


class Greedy:
    @staticmethod
    def sample(logits, rng, mask):
        v = np.where(mask, logits.data, -np.inf)
        return Tensor((v.argmax(axis=1)[:, None] == np.arange(v.shape[1])).astype(logits.dtype))


def weights(H=4, seed=0):
    rng = np.random.default_rng(seed)
    scale = {"w": (0.5, (2 * H, 5 * H)), "b": (0.5, (5 * H,)), "q": (3.0, (H,))}
    return [s * rng.standard_normal(shape) for s, shape in scale.values()]


def states(lengths, H=4, seed=1):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal((len(lengths), max(lengths), H)) for _ in range(2)]


def gradients(evaluate, arrays, **settings):
    """Values and gradients of a random function of both outputs."""
    inputs = [Tensor(a, requires_grad=True) for a in arrays]
    root, log_p = evaluate(*inputs, **settings)
    loss = (root * np.cos(np.arange(root.size)).reshape(root.shape)).sum()
    if log_p.requires_grad:
        loss = loss + (log_p * np.arange(1.0, 1.0 + len(log_p))).sum()
    loss.backward()
    zero = lambda t: np.zeros_like(t.data) if t.grad is None else t.grad
    return [root.data, log_p.data, *map(zero, inputs)]


def assert_equal(found, expected, tolerance=1e-10):
    for a, b in zip(found, expected, strict=True):
        assert np.abs(a - b).max(initial=0.0) <= tolerance * max(np.abs(b).max(initial=0.0), 1e-3)


def enlarge(model):
    """Away from the small initial values, so that no gradient is tiny and no sequence has all its ReLUs off."""
    for name, p in model.named_parameters().items():
        p.data *= {"word.weight": 50.0, "query": 200.0, "output.weight": 500.0}.get(name, 1.0)
    model.features.bias.data += 1.0


# ---- the linear-time rule


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.daily(6)
def test_the_linear_time_gradient_is_that_of_the_tape(name):
    """Of embeddings, leaf LSTM, composition, query and classifier, for all lengths from 1 to 40 in mixed batches."""
    model = TreeLSTM(9, 5, dim=4, hidden=16, rng=Rng(0), dtype=np.float64)
    enlarge(model)
    for n, lengths in enumerate((range(40, 0, -1), [12] * 3, [23, 2, 3, 7])):
        results, lengths = [], np.array(lengths)
        ids = np.random.default_rng(n).integers(0, 9, (len(lengths), lengths.max()))
        for plain in (False, True):
            cost = model.cost(ids, lengths, lengths % 5, Rng(n), create(name), plain=plain)
            cost.backward(np.cos(np.arange(len(lengths))))
            parameters = model.named_parameters()
            results.append([cost.data, *(p.grad for p in parameters.values())])
            for p in parameters.values():
                p.grad = None
        assert_equal(*results)
        assert np.abs(results[1][0] - np.log(5.0)).min() > 1e-4  # no sequence's gradient ends at ReLUs that are all off
        query = list(parameters).index("query")
        assert np.abs(results[1][1 + query]).max() > 1e-4  # the choices have a gradient to speak of


@pytest.mark.parametrize("lengths", BATCHES.values(), ids=BATCHES.keys())
@pytest.mark.parametrize("scored", [False, True])
@pytest.mark.parametrize("name", ["reinmax", "gst-1.0"])
def test_both_evaluations_agree_and_so_do_the_log_probabilities(lengths, scored, name):
    settings = {"lengths": np.array(lengths), "rng": Rng(3), "scored": scored, "sampler": create(name)}
    arrays = [*states(lengths), *weights()]
    assert_equal(gradients(compose, arrays, **settings), gradients(compose_plain, arrays, **settings))


@pytest.mark.parametrize("lengths", [[1], [2], [2, 1], [3, 2, 1]])
def test_a_batch_may_be_padded_beyond_its_longest_sequence(lengths):
    lengths = np.array(lengths)
    arrays = [*states([5] * len(lengths)), *weights()]
    settings = {"lengths": lengths, "rng": Rng(3), "scored": True, "sampler": create("reinmax")}
    assert_equal(gradients(compose, arrays, **settings), gradients(compose_plain, arrays, **settings))
    root, choices = compose_greedy(*arrays, lengths=lengths)
    with no_grad():
        again = compose_given(*map(Tensor, arrays[:4]), lengths=lengths, choices=choices)
    np.testing.assert_allclose(again.data, root, rtol=1e-12)


def test_all_lengths_from_1_to_40_agree():
    for T in range(1, 41):
        settings = {"lengths": np.array([T, max(1, T - T // 3)]), "rng": Rng(T), "sampler": create("st-gs")}
        arrays = [*states(settings["lengths"], 3), *weights(3)]
        assert_equal(gradients(compose, arrays, **settings), gradients(compose_plain, arrays, **settings))


@pytest.mark.parametrize("shape", ["left", "right", "balanced"])
def test_extreme_trees_agree(shape):
    """Choices at the ends of the sequence have no neighbour on one side."""
    build = {"left": trees.left_branching, "right": trees.right_branching, "balanced": trees.balanced}[shape]
    lengths = np.array([9, 9, 6])
    choices = np.zeros((3, 8), int)
    for row, n in zip(choices, lengths, strict=True):
        row[: n - 1] = build(n)
    arrays = [*states(lengths), *weights()]
    results = []
    for evaluate in (compose, compose_plain):
        settings = {"lengths": lengths, "rng": Rng(0), "scored": True, "sampler": Given(choices)}
        results.append(gradients(evaluate, arrays, **settings))
    assert_equal(*results)


def test_the_backward_pass_is_pure_and_small_float32_errors_stay_small():
    lengths = np.array([7, 5, 1])
    arrays = [np.array(a) for a in (*states(lengths), *weights())]
    for a in arrays:
        a.flags.writeable = False
    settings = {"lengths": lengths, "sampler": create("reinmax"), "rng": Rng(0)}
    _, rule = compose.rule(*arrays, **settings)
    g = np.sin(np.arange(12.0)).reshape(3, 4)
    first, second = ([d() if callable(d) else d for d in rule(g, np.zeros(3))] for _ in range(2))
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a, b)
    # a fixed tree, since rounding the scores may change a choice
    exact = gradients(compose, arrays, **(settings | {"sampler": Given(np.zeros((3, 6), int))}))
    single = [a.astype(np.float32) for a in arrays]

    class Given32(Given):
        def sample(self, *arguments):
            return Tensor(super().sample(*arguments).data.astype(np.float32))

    inputs = [Tensor(a, requires_grad=True) for a in single]
    root, _ = compose(*inputs, **(settings | {"sampler": Given32(np.zeros((3, 6), int))}))
    (root * np.cos(np.arange(12, dtype=np.float32)).reshape(3, 4)).sum().backward()
    for t, b in zip([root, *inputs[:4]], [exact[0], *exact[2:6]], strict=True):
        a = t.data if t is root else t.grad
        assert a.dtype == np.float32
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


def test_there_are_at_most_three_pairs_for_each_token(monkeypatch):
    lengths = np.array([30, 30, 25])
    traces, forward = [], linear_time.forward
    monkeypatch.setattr(linear_time, "forward", lambda *a: traces.append(forward(*a)) or traces[-1])
    with no_grad():
        compose(*map(Tensor, (*states(lengths), *weights())), lengths=lengths, sampler=create("st"), rng=Rng(0))
    # the plain evaluation has 29 · 30 / 2 for each sequence
    assert 2 * lengths.sum() < traces[0].pair_count <= 3 * 30 * 3


def counted(seen, function, slopes, *arguments):
    seen[0] += slopes.size
    return function(slopes, *arguments)


def test_the_work_of_the_backward_pass_grows_with_the_length_and_not_with_its_square(monkeypatch):
    """The elements that pass through the cell's derivative, counted: T² would be 4 times as many for twice the length,
    and these are 2 times as many."""
    counts = []
    for T in (20, 40, 80):
        seen, vjp = [0], linear_time.cell_vjp
        with monkeypatch.context() as patch:
            patch.setattr(linear_time, "cell_vjp", functools.partial(counted, seen, vjp))
            lengths = np.array([T])
            gradients(compose, [*states(lengths), *weights()], lengths=lengths, sampler=create("st"), rng=Rng(0))
        counts.append(seen[0])
    assert counts[1] / counts[0] < 2.3
    assert counts[2] / counts[1] < 2.2


def test_the_audit_says_where_the_linear_time_rule_is_proved():
    lengths = np.array([4, 3])
    inputs = [Tensor(a, requires_grad=True) for a in (*states(lengths), *weights())]
    root, _ = compose(*inputs, lengths=lengths, sampler=create("st"), rng=Rng(0))
    result = audit(root.sum())
    assert result.ok
    assert "test_the_linear_time_gradient_is_that_of_the_tape" in str(result)


# ---- the plain evaluation


@pytest.mark.parametrize("name", [*SAMPLERS, "gumbel-softmax"])
def test_the_plain_evaluation_passes_the_audit(name):
    model = TreeLSTM(6, 3, dim=3, hidden=4, rng=Rng(2), dtype=np.float64)
    enlarge(model)
    ids = np.random.default_rng(0).integers(0, 6, (2, 5))
    cost = model.cost(ids, np.array([5, 4]), np.array([0, 2]), Rng(1), create(name), plain=True)
    result = audit(cost.sum())
    assert result.ok, str(result)
    assert "tree_lstm_cell" in str(result)


@pytest.mark.parametrize("evaluate", [compose, compose_plain])
def test_a_sequence_gives_the_same_in_any_batch_whatever_its_padding(evaluate):
    lengths = np.array([6, 4, 1, 2])
    arrays = [*states(lengths), *weights()]
    padded = [a.copy() for a in arrays]
    for b, n in enumerate(lengths):
        padded[0][b, n:], padded[1][b, n:] = 7.0, -7.0
    settings = {"rng": Rng(0), "sampler": Greedy}
    together = gradients(evaluate, arrays, lengths=lengths, **settings)
    np.testing.assert_array_equal(gradients(evaluate, padded, lengths=lengths, **settings)[0], together[0])
    for b, n in enumerate(lengths):
        alone = [Tensor(a[b : b + 1, :n], requires_grad=True) for a in arrays[:2]]
        root, _ = evaluate(*alone, *map(Tensor, arrays[2:]), lengths=lengths[b : b + 1], **settings)
        np.testing.assert_allclose(root.data[0], together[0][b], rtol=1e-12)
        assert not together[2][b, n:].any()
        assert not together[3][b, n:].any()


WRONG_LENGTHS = ([4, 5], [0, 4], [2.0, 3.0], [4], [4, 3, 2], [[4], [3]])


def test_lengths_out_of_range_are_refused():
    arrays = [Tensor(a) for a in (*states([4, 4]), *weights())]
    for evaluate in (compose, compose_plain):
        for lengths in WRONG_LENGTHS:
            with pytest.raises(ValueError, match="lengths must be integers from 1 to 4"):
                evaluate(*arrays, lengths=np.array(lengths), sampler=create("st"), rng=Rng(0))


def test_states_and_weights_that_do_not_fit_are_refused():
    """By the op itself, not on the way back."""
    h, c, w, b, q = (Tensor(a) for a in (*states([4, 4]), *weights()))
    choices = {"lengths": np.array([4, 4]), "choices": np.zeros((2, 3), int)}
    drawn = {"lengths": np.array([4, 4]), "sampler": create("st"), "rng": Rng(0)}
    for wrong in ({"c": c.reshape(2, -1)}, {"c": c[:1]}, {"h": h[0]}, {"b": b[:1]}, {"b": b[0]}, {"w": w.T}):
        first = {"h": h, "c": c, "w": w, "b": b} | wrong
        with pytest.raises(ValueError, match="must fit"):
            compose_given(*first.values(), **choices)
        with pytest.raises(ValueError, match="must fit"):
            compose(*first.values(), q, **drawn)


@pytest.mark.parametrize("encoder", tree_lstm.ENCODERS)
@pytest.mark.parametrize("lengths", WRONG_LENGTHS)
def test_every_encoder_refuses_lengths_out_of_range(encoder, lengths):
    model = TreeLSTM(6, 3, dim=3, hidden=4, encoder=encoder, rng=Rng(0))
    with pytest.raises(ValueError, match="lengths must be integers from 1 to 4, one for each of 2 sequences"):
        model.predict(np.zeros((2, 4), int), np.array(lengths), np.zeros((2, 3), int))


@pytest.mark.parametrize("evaluate", [compose, compose_plain])
def test_lengths_may_be_unsigned_integers(evaluate):
    arrays = [*states([6, 1, 3]), *weights()]
    settings = {"sampler": create("st"), "rng": Rng(3), "scored": True}
    signed, unsigned = (
        gradients(evaluate, arrays, lengths=np.array([6, 1, 3], dtype), **settings) for dtype in (np.int64, np.uint8)
    )
    assert_equal(unsigned, signed, tolerance=0.0)


# ---- greedy evaluation and given trees


@pytest.mark.parametrize("lengths", BATCHES.values(), ids=BATCHES.keys())
def test_greedy_evaluation_takes_the_best_pair_and_tells_the_tree(lengths):
    lengths, arrays = np.array(lengths), [*states(lengths), *weights()]
    root, choices = compose_greedy(*arrays, lengths=lengths)
    with no_grad():
        expected, _ = compose_plain(*map(Tensor, arrays), lengths=lengths, sampler=Greedy, rng=Rng(0))
        again = compose_given(*map(Tensor, arrays[:4]), lengths=lengths, choices=choices)
    np.testing.assert_allclose(root, expected.data, rtol=1e-12)
    np.testing.assert_allclose(again.data, root, rtol=1e-12)
    assert choices.shape == (len(lengths), max(lengths) - 1)
    assert (choices >= 0).all()
    assert (choices <= np.maximum(lengths[:, None] - 2 - np.arange(max(lengths) - 1), 0)).all()


def random_trees(lengths, seed=0):
    choices = np.zeros((len(lengths), max(lengths) - 1), int)
    for b, n in enumerate(lengths):
        choices[b, : n - 1] = trees.random(n, Rng(seed).at(b))
    return choices


@pytest.mark.parametrize("lengths", BATCHES.values(), ids=BATCHES.keys())
def test_a_given_tree_is_composed_as_if_it_had_been_chosen(lengths):
    lengths, arrays = np.array(lengths), [*states(lengths), *weights()]
    choices = random_trees(lengths)
    given = lambda h, c, w, b, q: (compose_given(h, c, w, b, lengths=lengths, choices=choices), Tensor(np.zeros(1)))
    chosen = functools.partial(compose_plain, lengths=lengths, sampler=Given(choices), rng=Rng(0))
    assert_equal(gradients(given, arrays), gradients(chosen, arrays))


def test_the_rule_for_given_trees_is_the_derivative_of_its_output():
    lengths = np.array([5, 3, 1])
    arrays = [*states(lengths, 3), *weights(3)[:2]]
    check_rule(compose_given.rule, *arrays, lengths=lengths, choices=random_trees(lengths))


# ---- samples and score functions


def test_drawn_trees_have_the_probability_that_is_reported():
    """All 6 ways to merge 4 tokens: their reported probabilities sum to 1, and draws follow them (χ²)."""
    n, lengths = 6000, np.array([4])
    arrays = [*states(lengths), *weights()]
    ways = [[a, b, 0] for a, b in itertools.product(range(3), range(2))]
    log_ps = []
    for way in ways:
        with no_grad():
            settings = {"lengths": lengths, "rng": Rng(0), "scored": True}
            log_ps.append(compose_plain(*map(Tensor, arrays), sampler=Given([way]), **settings)[1].data[0])
    p = np.exp(log_ps)
    assert abs(p.sum() - 1.0) < 1e-12
    many = [np.repeat(a, n, axis=0) for a in arrays[:2]]
    with no_grad():
        inputs, settings = map(Tensor, (*many, *arrays[2:])), {"sampler": Draw, "rng": Rng(5), "scored": True}
        _, log_p = compose(*inputs, lengths=np.full(n, 4), **settings)
    counts = np.array([np.sum(np.abs(log_p.data - x) < 1e-9) for x in log_ps])
    assert counts.sum() == n  # the ways have different probabilities, so that each draw names its way
    chi_square = np.sum((counts - n * p) ** 2 / (n * p))
    assert chi_square < 20.5  # 5 degrees of freedom: exceeded once in a thousand


@pytest.mark.parametrize("spec", ["reinforce", "reinforce-mean", "rloo:samples=2"])
@pytest.mark.parametrize("evaluate", [compose, compose_plain])
def test_episodes_are_unbiased_for_latent_trees(spec, evaluate):
    """All trees of 4 tokens, enumerated: the mean of the estimator's gradients is the gradient of the mean cost."""
    lengths, arrays = np.array([4]), [*states([4]), *weights()]
    ways = [[[a, b, 0]] for a, b in itertools.product(range(3), range(2))]
    target = np.sin(np.arange(4.0))

    def run(inputs, way):
        settings = {"lengths": lengths, "rng": Rng(0), "scored": True, "sampler": Given(way)}
        root, log_p = evaluate(*inputs, **settings)
        return ((root - target) ** 2).sum(axis=1), log_p

    exact = [Tensor(a, requires_grad=True) for a in arrays]
    pairs = [run(exact, way) for way in ways]
    sum((f * log_p.exp()).sum() for f, log_p in pairs).backward()
    p = [float(np.exp(log_p.data[0])) for _, log_p in pairs]

    estimator, mean = create(spec), [0.0] * len(arrays)
    if spec == "reinforce-mean":
        estimator.load_state_dict({"mean": np.array(0.7), "started": np.array(True)})
    for which in itertools.product(range(len(ways)), repeat=estimator.sample_count):
        inputs = [Tensor(a, requires_grad=True) for a in arrays]
        runs = iter(which)
        estimator.episode(lambda sampler, rng: run(inputs, ways[next(runs)]), Rng(0)).sum().backward()  # noqa: B023
        weight = np.prod([p[i] for i in which])
        mean = [m + weight * t.grad for m, t in zip(mean, inputs, strict=True)]
    assert_equal(mean, [t.grad for t in exact])


def test_an_estimator_that_cannot_choose_step_by_step_says_so():
    model = TreeLSTM(6, 3, dim=3, hidden=4, rng=Rng(2))
    for name in (n for n in CATEGORICAL if not facts(n).episodes):
        with pytest.raises(ValueError, match="cannot choose step by step"):
            model.cost(np.zeros((1, 3), int), np.array([3]), np.array([0]), Rng(0), create(name))


@pytest.mark.parametrize("name", [n for n in CATEGORICAL if facts(n).episodes])
def test_every_estimator_with_episodes_trains_a_step(name):
    model, estimator = TreeLSTM(6, 3, dim=4, hidden=4, rng=Rng(2)), create(name)
    optimizer = Adam(model.parameters(), 1e-3)
    ids, lengths = np.random.default_rng(0).integers(0, 6, (3, 6)), np.array([6, 5, 3])
    for step in range(2):
        optimizer.zero_grad()
        cost = model.cost(ids, lengths, np.array([0, 1, 2]), Rng(0).at(step), estimator)
        assert cost.shape == (3,)
        cost.mean().backward()
        assert np.isfinite(optimizer.flat.grad).all()
        assert np.abs(model.query.grad).max() > 0.0
        optimizer.step()
        estimator.update()


# ---- the model


@pytest.mark.parametrize("leaves", ["lstm", "affine"])
@pytest.mark.parametrize("encoder", ["latent", "tree", "lstm"])
@pytest.mark.parametrize("plain", [False, True])
def test_the_step_stays_on_the_device(encoder, leaves, plain):
    """The stand-in device refuses any wait and any copy to the host; costs and gradients are NumPy's to rounding."""
    if (encoder, leaves) == ("lstm", "affine") or (plain and encoder != "latent"):
        return
    ids, lengths = np.random.default_rng(0).integers(0, 6, (4, 16)), np.array([16, 11, 5, 1])
    results = []
    for backend in (Backend(), DevsimBackend()):
        model = TreeLSTM(6, 3, dim=4, hidden=16, encoder=encoder, leaves=leaves, rng=Rng(0), dtype=np.float64)
        enlarge(model)
        model.to(backend)
        on_device, labels = backend.to_device(ids), backend.to_device(np.array([0, 2, 1, 2]))
        with forbid("sync", "d2h"):
            given = create("gst-1.0"), random_trees(lengths)
            cost = model.cost(on_device, lengths, labels, Rng(1), *given, plain=plain)
            cost.mean().backward()
        results.append([backend.to_host(cost.data), *(backend.to_host(p.grad) for p in model.parameters())])
    assert_equal(results[1], results[0], 1e-12)
    assert all(np.abs(g).max() > 1e-6 for g in results[0])  # nothing equal because it is zero


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("name", ["gst-1.0", "gumbel-rao", "reinforce"])
def test_masks_and_noise_of_a_batch_are_sent_once(name, plain):
    """Two transfers for any number of choices, and one more where an estimator draws noise beside the sample."""
    backend, counts = DevsimBackend(), []
    model = TreeLSTM(6, 3, dim=4, hidden=8, dropout=0.0, rng=Rng(0), dtype=np.float64).to(backend)
    for T in (5, 12):
        lengths, labels = np.array([T, 3]), backend.to_device(np.array([0, 2]))
        ids, before = backend.to_device(np.ones((2, T), int)), devsim.stats["h2d"]
        model.cost(ids, lengths, labels, Rng(1), create(name), plain=plain).mean().backward()
        counts.append(devsim.stats["h2d"] - before)
    assert counts == [3 if name == "gumbel-rao" else 2] * 2


def test_a_device_composes_small_batches_with_the_fewest_launches(monkeypatch):
    """If this fails because the linear-time path has become the better one, a device needs `compose_plain` no more."""
    model, lengths = TreeLSTM(6, 3, dim=4, hidden=4, rng=Rng(0)), np.array([20, 19, 4])

    def launches(backend, **how):
        model.to(backend)
        ids, labels = backend.to_device(np.ones((3, 20), int)), backend.to_device(np.array([0, 2, 1]))
        before = devsim.stats["launch"]
        model.cost(ids, lengths, labels, Rng(1), create("gst-1.0"), **how).mean().backward()
        return devsim.stats["launch"] - before

    linear, plain, default = (launches(DevsimBackend(), **how) for how in ({"plain": False}, {"plain": True}, {}))
    assert default == plain < 0.85 * linear
    with monkeypatch.context() as patched:
        patched.setattr(tree_lstm, "PLAIN_PAIRS", 3 * 190 - 1)
        assert launches(DevsimBackend()) == linear
    monkeypatch.setattr(tree_lstm, "compose_plain", None)  # the host does without it
    launches(Backend())


def test_the_initial_values_are_the_published_ones():
    model = TreeLSTM(16, 10, rng=Rng(0))
    state = model.state_dict()
    assert state["cell_weight"].shape == (600, 1500)
    np.testing.assert_allclose(state["cell_weight"] @ state["cell_weight"].T, np.eye(600), atol=1e-5)
    assert (state["cell_bias"][300:900] == 1.0).all()
    assert not state["cell_bias"][:300].any()
    assert not state["cell_bias"][900:].any()
    np.testing.assert_allclose(state["leaf.w_hidden"] @ state["leaf.w_hidden"].T, np.eye(300), atol=1e-5)
    assert (state["leaf.bias"][300:600] == 1.0).all()
    assert abs(state["leaf.w_input"].std() - np.sqrt(2.0 / 300)) < 1e-3
    assert abs(state["query"].std() - 0.01) < 2e-3
    assert abs(state["word.weight"].std() - 0.01) < 1e-3
    assert np.abs(state["output.weight"]).max() <= 0.002
    assert np.abs(state["output.weight"]).max() > 0.0019


def test_the_lstm_encoder_reads_the_last_token_of_each_row():
    model = TreeLSTM(6, 3, dim=4, hidden=4, encoder="lstm", rng=Rng(0), dtype=np.float64)
    ids = np.random.default_rng(0).integers(0, 6, (2, 5))
    logits, choices = model.predict(ids, np.array([5, 3]))
    alone, _ = model.predict(ids[1:, :3], np.array([3]))
    np.testing.assert_allclose(logits[1], alone[0], rtol=1e-12)
    assert choices is None
    for at, matters in ((2, True), (3, False)):  # the last token, and the padding behind it
        other = ids.copy()
        other[1, at] = (other[1, at] + 1) % 6
        assert np.array_equal(model.predict(other, np.array([5, 3]))[0][1], logits[1]) != matters


def test_dropout_is_on_in_training_only():
    model = TreeLSTM(6, 3, dim=8, hidden=8, rng=Rng(0), dtype=np.float64)
    model.output.weight.data *= 500.0
    ids, lengths, labels = np.zeros((1, 4), int), np.array([4]), np.array([0])
    costs = {float(model.cost(ids, lengths, labels, Rng(0).at(n), Sampled()).data[0]) for n in range(5)}
    assert len(costs) == 5
    assert np.array_equal(model.predict(ids, lengths)[0], model.predict(ids, lengths)[0])
    model.dropout = 0.0
    costs = {float(model.cost(ids, lengths, labels, Rng(0).at(n), Sampled()).data[0]) for n in range(5)}
    logits = model.predict(ids, lengths)[0][0]
    assert len(costs) == 1
    np.testing.assert_allclose(costs.pop(), np.log(np.exp(logits - logits[0]).sum()), rtol=1e-12)


class Sampled(Estimator):
    """An estimator whose choices are greedy, so that dropout is the only noise."""

    def episode(self, play, rng):
        return play(Greedy, rng)[0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"encoder": "bush"}, "unknown encoder 'bush'; the known ones are latent, tree, lstm"),
        ({"leaves": "green"}, "unknown leaves 'green'; the known ones are lstm, affine"),
        ({"dim": 0}, "sizes must be at least 1"),
        ({"dropout": 1.0}, "dropout in \\[0, 1\\)"),
        ({"encoder": "lstm", "leaves": "affine"}, "cannot have affine leaves"),
    ],
)
def test_bad_settings_are_refused_in_one_sentence(settings, message):
    with pytest.raises(ValueError, match=message):
        TreeLSTM(6, 3, rng=Rng(0), **settings)


# ---- what mutations of the model would change


@pytest.mark.parametrize("evaluate", [compose, compose_plain])
def test_every_step_draws_noise_of_its_own(evaluate):
    seen = []

    class Recorded:
        @staticmethod
        def sample(logits, rng, mask):
            seen.append(float(rng.uniform((1,), like=np.empty(0))[0]))
            return Greedy.sample(logits, rng, mask)

    with no_grad():
        evaluate(*map(Tensor, (*states([7]), *weights())), lengths=np.array([7]), sampler=Recorded, rng=Rng(0))
    assert len(set(seen)) == len(seen) == 5


def test_what_does_not_exist_is_never_read(monkeypatch):
    """Rows of absent nodes and pairs: memory that was not written holds NaN here, and no result has one."""
    empty = np.empty

    def not_a_number(*arguments, **keywords):
        x = empty(*arguments, **keywords)
        if x.dtype.kind == "f":
            x.fill(np.nan)
        return x

    monkeypatch.setattr(np, "empty", not_a_number)
    lengths = np.array([7, 5, 2, 1])
    settings = {"lengths": lengths, "sampler": create("reinmax"), "rng": Rng(0), "scored": True}
    found = gradients(compose, [*states(lengths), *weights()], **settings)
    assert all(np.isfinite(x).all() for x in found)


def test_the_score_is_divided_by_the_root_of_d():
    lengths, seen = np.array([3]), []
    arrays = h, c, w, b, q = [*states(lengths), *weights()]

    class Recorded:
        @staticmethod
        def sample(logits, rng, mask):
            seen.append(logits.data[0].copy())
            return Greedy.sample(logits, rng, mask)

    with no_grad():
        for evaluate in (compose, compose_plain):
            evaluate(*map(Tensor, arrays), lengths=lengths, sampler=Recorded, rng=Rng(0))
    pairs = [(np.concatenate(h[0, i : i + 2]) @ w + b, c[0, i], c[0, i + 1]) for i in range(2)]
    expected = [cell_by_hand(*pair)[0] @ q / 2.0 for pair in pairs]
    for v in seen:
        np.testing.assert_allclose(v, expected, rtol=1e-12)


def cell_by_hand(a, *cells):
    sigma = lambda x: 1.0 / (1.0 + np.exp(-x))
    i, *f, u, o = a.reshape(-1, len(cells[0]))
    c = sigma(i) * np.tanh(u) + sum(sigma(f_n) * c_n for f_n, c_n in zip(f, cells, strict=True))
    return sigma(o) * np.tanh(c), c


@pytest.mark.parametrize("leaves", ["lstm", "affine"])
def test_dropout_is_on_the_word_vectors_and_before_both_layers_of_the_classifier(monkeypatch, leaves):
    dropout, seen = tree_lstm.dropout, []

    def recorded(x, keep, *, rate):
        seen.append((x.shape, rate, keep))
        return dropout(x, keep, rate=rate)

    monkeypatch.setattr(tree_lstm, "dropout", recorded)
    model = TreeLSTM(6, 3, dim=40, hidden=40, leaves=leaves, dropout=0.2, rng=Rng(0))
    lengths = np.array([5, 3])
    model.cost(np.zeros((2, 5), int), lengths, np.array([0, 1]), Rng(0), create("st"))
    words = (5, 2, 40) if leaves == "lstm" else (2, 5, 40)
    assert [(shape, rate) for shape, rate, _ in seen] == [(words, 0.2), ((2, 40), 0.2), ((2, 40), 0.2)]
    for _, _, keep in seen:
        assert abs(keep.mean() - 0.8) < 0.15  # 3 standard errors of 80
    assert not np.array_equal(seen[1][2], seen[2][2])


@pytest.mark.parametrize("leaves", ["lstm", "affine"])
def test_the_model_is_its_formula(leaves):
    """Two tokens, which leave nothing to choose, written out."""
    model = TreeLSTM(6, 5, dim=3, hidden=8, leaves=leaves, rng=Rng(3), dtype=np.float64)
    for p in model.parameters():
        p.data[...] = np.random.default_rng(p.size).standard_normal(p.shape)
    s, ids = model.state_dict(), np.array([4, 1])
    x, state, nodes = s["word.weight"][ids], (np.zeros(3), np.zeros(3)), []
    for x_t in x:
        if leaves == "lstm":
            state = cell_by_hand(x_t @ s["leaf.w_input"] + state[0] @ s["leaf.w_hidden"] + s["leaf.bias"], state[1])
        else:
            state = np.split(x_t @ s["leaf.weight"] + s["leaf.bias"], 2)
        nodes.append(state)
    (h_l, c_l), (h_r, c_r) = nodes
    root, _ = cell_by_hand(np.concatenate([h_l, h_r]) @ s["cell_weight"] + s["cell_bias"], c_l, c_r)
    features = np.maximum(root @ s["features.weight"] + s["features.bias"], 0.0)
    assert 0 < (features == 0.0).sum() < 8  # the ReLU shows
    expected = features @ s["output.weight"] + s["output.bias"]
    np.testing.assert_allclose(model.predict(ids[None], np.array([2]))[0][0], expected, rtol=1e-12)


def test_soft_choices_are_composed_on_the_tape():
    model = TreeLSTM(6, 3, dim=4, hidden=16, rng=Rng(2), dtype=np.float64)
    enlarge(model)
    ids, lengths = np.random.default_rng(0).integers(0, 6, (2, 6)), np.array([6, 4])
    costs = [
        model.cost(ids, lengths, np.array([0, 2]), Rng(1), create("gumbel-softmax"), plain=p) for p in (False, True)
    ]
    np.testing.assert_array_equal(costs[0].data, costs[1].data)
    hard = model.cost(ids, lengths, np.array([0, 2]), Rng(1), create("st-gs"))
    assert np.abs(costs[0].data - hard.data).max() > 1e-3


def test_affine_leaves_start_as_published():
    state = TreeLSTM(16, 10, leaves="affine", rng=Rng(0)).state_dict()
    assert abs(state["leaf.weight"].std() - np.sqrt(2.0 / 300)) < 1e-3
    assert not state["leaf.bias"].any()


def test_the_classifier_starts_as_published():
    state = TreeLSTM(16, 10, rng=Rng(0)).state_dict()
    assert abs(state["features.weight"].std() - np.sqrt(2.0 / 300)) < 1e-3
    for zeros in (state["features.bias"], state["output.bias"], state["leaf.bias"][:300], state["leaf.bias"][600:]):
        assert not zeros.any()


def test_an_episode_attaches_the_cost_minus_its_baseline():
    f = np.array([3.0, -1.0, 0.5])

    def gradients_of(estimator, costs):
        log_qs = [Tensor(np.zeros(3), requires_grad=True) for _ in costs]
        runs = iter(zip(map(Tensor, costs), log_qs, strict=True))
        estimator.episode(lambda sampler, rng: next(runs), Rng(0)).sum().backward()
        return [t.grad for t in log_qs]

    assert gradients_of(create("reinforce"), [f])[0].tolist() == f.tolist()
    estimator = create("reinforce-mean")
    estimator.load_state_dict({"mean": np.array(0.7), "started": np.array(True)})
    np.testing.assert_allclose(gradients_of(estimator, [f])[0], f - 0.7)
    estimator.update()
    assert estimator.mean == pytest.approx(0.9 * 0.7 + 0.1 * f.mean())
    costs = [f, f**2, -f]
    for g, own in zip(gradients_of(create("rloo:samples=3"), costs), costs, strict=True):
        np.testing.assert_allclose(g, (own - (sum(costs) - own) / 2.0) / 3.0)
