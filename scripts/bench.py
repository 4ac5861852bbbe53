"""How fast is a step? Everything is measured in one run, in turns, and reported as a ratio.

    python scripts/bench.py vae      a training step of the categorical VAE beside its bare matrix products and its
                                     updates alone, and beside PyTorch and JAX where they are installed
    python scripts/bench.py ops      one small op, forward and backward, in a chain of 2,000
    python scripts/bench.py listops  a training step of the latent-tree LSTM in linear time, beside the same on the tape
                                     and in PyTorch, on ten batches of 16 sequences of 6 to 95 tokens
    python scripts/bench.py conv     forward and backward of LeNet's two convolutions, beside their bare matrix products
                                     and PyTorch
    python scripts/bench.py classes  a training step of the semi-supervised VAE that sums over its classes, beside one
                                     that samples the class, for 5 to 100 classes

Each contender runs in a process of its own, so that thread pools do not meet; the processes take turns of about a
second, and a contender's figure is the median over all its steps.  The sequences are the published validation ones,
`listops/valid.tsv` of --data-dir or MINIGRAD_DATA; without that file they are generated, which is said.
"""

from __future__ import annotations

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))
from experiments.start import before_numpy

before_numpy()

import contextlib
import functools
import importlib.util
import itertools
import math
import multiprocessing
import platform
import signal
import statistics
from multiprocessing import resource_tracker
from time import perf_counter

import numpy as np

from estimators import create
from experiments.errors import UserError, command, disk_errors, require, user_errors
from experiments.flags import Parser, at_least, at_most, whole
from experiments.pictures import check_picture, speed
from experiments.start import KERNELS, keep_freed_memory
from minigrad import Rng, Tensor
from minigrad.convolution import conv2d
from minigrad.optim import Adam, clip_grad_norm
from models.data import DataError, listops
from models.semi_supervised import SemiSupervisedVAE
from models.tree_lstm import TreeLSTM
from models.vae import CategoricalVAE

PIXELS, HIDDEN, VARIABLES, CATEGORIES, BATCH, TAU, LR = 784, (512, 256), 30, 10, 100, 1.0, 1e-3
SIZES = [PIXELS, *HIDDEN, VARIABLES * CATEGORIES, *reversed(HIDDEN), PIXELS]


def images():
    """A batch of gray images is any (100, 784) array in [0, 1]: no branch depends on the values."""
    return Rng(0).site("images").uniform((BATCH, PIXELS))


# ---- contenders for `vae`: each returns a function that does one full step


def floor():
    """The 17 matrix products of the six layers: outputs, weight gradients, and input gradients but for the first."""
    rng = Rng(0)
    xs = [rng.site(f"x{i}").normal((BATCH, n)) for i, n in enumerate(SIZES)]
    ws = [rng.site(f"w{i}").normal(shape) for i, shape in enumerate(itertools.pairwise(SIZES))]

    def step():
        for x, w in zip(xs, ws, strict=False):
            x @ w
        for i in reversed(range(len(ws))):
            xs[i].T @ xs[i + 1]
            if i:
                xs[i + 1] @ ws[i].T

    return step


def updates():
    """The optimizer's part of the step, whatever the gradients are."""
    parameters = CategoricalVAE(PIXELS, VARIABLES, CATEGORIES, HIDDEN, rng=Rng(0)).parameters()
    optimizer = Adam(parameters, LR)
    for n, p in enumerate(parameters):
        p.grad = Rng(0).site(n).normal(p.shape)
    return optimizer.step


def minigrad_vae():
    rng = Rng(0)
    model = CategoricalVAE(PIXELS, VARIABLES, CATEGORIES, HIDDEN, rng=rng)
    optimizer, estimator, x, step_number = (
        Adam(model.parameters(), LR),
        create("st-gs", TAU),
        images(),
        iter(range(10**9)),
    )

    def step():
        optimizer.zero_grad()
        reconstruction, kl = model.negative_elbo(x, estimator, rng.at(next(step_number)))
        (reconstruction + kl).mean().backward()
        optimizer.step()

    return step


def torch_vae(compiled=False):
    import torch
    from torch import nn

    def mlp(sizes):
        layers = []
        for i, o in itertools.pairwise(sizes):
            layers += [nn.Linear(i, o), nn.ReLU()]
        return nn.Sequential(*layers[:-1])

    half = len(SIZES) // 2
    encoder, decoder, x = mlp(SIZES[: half + 1]), mlp(SIZES[half:]), torch.from_numpy(images())
    optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=LR)

    def loss(x):
        logits = encoder(x).view(BATCH, VARIABLES, CATEGORIES)
        d = nn.functional.gumbel_softmax(logits, tau=TAU, hard=True)
        bce = nn.functional.binary_cross_entropy_with_logits(decoder(d.flatten(1)), x, reduction="sum")
        log_p = logits.log_softmax(-1)
        return (bce + (log_p.exp() * (log_p + np.log(CATEGORIES))).sum()) / BATCH

    objective = torch.compile(loss) if compiled else loss

    def step():
        optimizer.zero_grad(set_to_none=True)
        objective(x).backward()
        optimizer.step()

    return step


def jax_vae():
    import jax
    import jax.numpy as jnp

    keys = jax.random.split(jax.random.PRNGKey(0), len(SIZES))
    bound = [1 / np.sqrt(i) for i in SIZES]
    shapes = list(itertools.pairwise(SIZES))
    params = [
        (jax.random.uniform(k, s, minval=-b, maxval=b), jnp.zeros(s[1]))
        for k, s, b in zip(keys, shapes, bound, strict=False)
    ]
    x, half = jnp.asarray(images()), len(SIZES) // 2

    def mlp(layers, h):
        for w, b in layers[:-1]:
            h = jax.nn.relu(h @ w + b)
        return h @ layers[-1][0] + layers[-1][1]

    def loss(params, key):
        logits = mlp(params[:half], x).reshape(BATCH, VARIABLES, CATEGORIES)
        z = logits + jax.random.gumbel(key, logits.shape)
        soft = jax.nn.softmax(z / TAU)
        hard = jax.nn.one_hot(z.argmax(-1), CATEGORIES)
        d = jax.lax.stop_gradient(hard - soft) + soft
        y = mlp(params[half:], d.reshape(BATCH, -1))
        bce = (jax.nn.softplus(y) - x * y).sum()
        log_p = jax.nn.log_softmax(logits)
        return (bce + (jnp.exp(log_p) * (log_p + np.log(CATEGORIES))).sum()) / BATCH

    def update(params, m, v, t, key):
        key, noise = jax.random.split(key)
        g = jax.grad(loss)(params, noise)
        tree = jax.tree_util.tree_map
        m = tree(lambda m, g: 0.9 * m + 0.1 * g, m, g)
        v = tree(lambda v, g: 0.999 * v + 0.001 * g * g, v, g)
        t = t + 1
        c1, c2 = 1 - 0.9**t, 1 - 0.999**t
        params = tree(lambda p, m, v: p - LR * (m / c1) / (jnp.sqrt(v / c2) + 1e-8), params, m, v)
        return params, m, v, t, key

    update = jax.jit(update, donate_argnums=(0, 1, 2))
    zeros = lambda: jax.tree_util.tree_map(jnp.zeros_like, params)
    state = [params, zeros(), zeros(), jnp.float32(0), jax.random.PRNGKey(1)]

    def step():
        state[:] = update(*state)
        jax.block_until_ready(state)

    return step


# ---- contenders for `ops`: each returns a function that runs the chain once

CHAIN = 2000


def _chain(start, factor, loss):
    y = start
    for _ in range(CHAIN):
        y = y * factor
    return loss(y)


def minigrad_ops():
    x, w = (Tensor(np.full(16, v, np.float32), requires_grad=True) for v in (1.0, 0.999))
    return lambda: _chain(x, w, lambda y: y.sum()).backward()


def torch_ops():
    import torch

    x, w = (torch.full((16,), v, requires_grad=True) for v in (1.0, 0.999))
    return lambda: _chain(x, w, lambda y: y.sum()).backward()


def mygrad_ops():
    import mygrad

    x, w = (mygrad.tensor(np.full(16, v, np.float32)) for v in (1.0, 0.999))
    return lambda: _chain(x, w, lambda y: y.sum()).backward()


def autograd_ops():
    import autograd

    gradient = autograd.grad(lambda x, w: _chain(x, w, lambda y: y.sum()), argnum=(0, 1))
    x, w = (np.full(16, v, np.float32) for v in (1.0, 0.999))
    return lambda: gradient(x, w)


# ---- contenders for `listops`: each returns {size of the batch: a function that does one full step on it}

DIM, DROPOUT, CLIP, BATCHES, SEQUENCES, LONGEST = 300, 0.5, 5.0, 10, 16, 95


def listops_batches(data_dir):
    """Ten of the batches of 16 sequences of similar length, from the shortest to the longest."""
    tokenizer = listops.Tokenizer(split=True)
    sequences = listops.load(data_dir, counts=(1, 16_000, 1))["valid"]
    kept, _ = listops.within(sequences, tokenizer, LONGEST)
    batches = listops.batches(kept[: len(kept) // SEQUENCES * SEQUENCES], tokenizer, SEQUENCES)
    chosen = [batches[round(i * (len(batches) - 1) / (BATCHES - 1))] for i in range(BATCHES if batches else 0)]
    if len({batch.ids.shape[1] for batch in chosen}) < BATCHES:
        raise DataError(f"the sequences have too few lengths for {BATCHES} batches: choose another --data-dir.")
    return tokenizer, chosen


def minigrad_listops(data_dir, plain=False):
    tokenizer, batches = listops_batches(data_dir)
    model = TreeLSTM(tokenizer.size, dim=DIM, hidden=DIM, dropout=DROPOUT, rng=Rng(0))
    optimizer, estimator = Adam(model.parameters(), LR), create("gst-1.0")
    rngs = (Rng(0).at(n) for n in itertools.count())

    def step(batch):
        optimizer.zero_grad()
        cost = model.cost(batch.ids, batch.lengths, batch.labels, next(rngs), estimator, plain=plain)
        cost.mean().backward()
        clip_grad_norm(optimizer, CLIP)
        optimizer.step()

    return {batch.ids.shape[1]: functools.partial(step, batch) for batch in batches}


def torch_listops(data_dir):
    import torch
    from torch import nn
    from torch.nn.functional import cross_entropy, dropout

    tokenizer, batches = listops_batches(data_dir)
    word, leaf, cell = nn.Embedding(tokenizer.size, DIM), nn.LSTMCell(DIM, DIM), nn.Linear(2 * DIM, 5 * DIM)
    query, hidden, output = nn.Parameter(0.01 * torch.randn(DIM)), nn.Linear(DIM, DIM), nn.Linear(DIM, 10)
    parameters = [query, *(p for m in (word, leaf, cell, hidden, output) for p in m.parameters())]
    optimizer = torch.optim.Adam(parameters, lr=LR)

    def choose(v, mask):
        v = v.masked_fill(~mask, -1e30)
        with torch.no_grad():
            d = nn.functional.one_hot(torch.distributions.Categorical(logits=v).sample(), v.shape[1]).to(v.dtype)
            m = v.amax(-1, keepdim=True)
            shift = (m - v) * d - (v - m + 1.0).clamp(min=0.0) * (1.0 - d)
        soft = (v + shift).softmax(-1)
        return d - soft.detach() + soft

    def step(ids, lengths, labels):
        x = dropout(word(ids), DROPOUT)
        state, states = None, []
        for t in range(ids.shape[1]):
            state = leaf(x[:, t], state)
            states.append(state)
        h, c = (torch.stack(s, 1) for s in zip(*states, strict=True))
        for k in range(ids.shape[1] - 1):
            h_l, h_r, c_l, c_r = h[:, :-1], h[:, 1:], c[:, :-1], c[:, 1:]
            i, f_l, f_r, u, o = cell(torch.cat([h_l, h_r], -1)).chunk(5, -1)
            new_c = (f_l + 1.0).sigmoid() * c_l + (f_r + 1.0).sigmoid() * c_r + i.sigmoid() * u.tanh()
            new_h = o.sigmoid() * new_c.tanh()
            if h_l.shape[1] > 1:
                mask = torch.arange(h_l.shape[1]) < (lengths - 1 - k)[:, None]
                mask[:, 0] = True
                s = choose((new_h @ query) / DIM**0.5, mask)[..., None]
                up_to = s.cumsum(1)
                new_h = s * new_h + (1.0 - up_to) * h_l + (up_to - s) * h_r
                new_c = s * new_c + (1.0 - up_to) * c_l + (up_to - s) * c_r
            going = (lengths > k + 1)[:, None, None]
            h, c = torch.where(going, new_h, h_l), torch.where(going, new_c, c_l)
        features = hidden(dropout(h[:, 0], DROPOUT)).relu()
        optimizer.zero_grad(set_to_none=True)
        cross_entropy(output(dropout(features, DROPOUT)), labels).backward()
        nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()

    arrays = lambda b: map(torch.from_numpy, (b.ids, b.lengths, b.labels))
    return {batch.ids.shape[1]: functools.partial(step, *arrays(batch)) for batch in batches}


# ---- contenders for `classes`: each returns {number of classes: a function that does one full step}

CLASSES, LATENT, STYLE_HIDDEN = (5, 10, 20, 50, 100), 50, (500,)


def semi_supervised(estimator=None):
    """100 images with labels and 100 without, 784 pixels; the networks of Kingma et al. (2014)."""
    rngs = (Rng(0).at(n) for n in itertools.count())

    def contender(K):
        model, x = SemiSupervisedVAE(PIXELS, K, LATENT, STYLE_HIDDEN, rng=Rng(0)), images()
        optimizer, labels = Adam(model.parameters(), LR), np.arange(BATCH) % K

        def step():
            rng = next(rngs)
            optimizer.zero_grad()
            labelled = model.labelled(x, labels, rng.site("labelled"))
            unlabelled = model.unlabelled(x, rng.site("unlabelled"), estimator)
            (labelled.mean() + unlabelled.mean()).backward()
            optimizer.step()

        return step

    return {K: contender(K) for K in CLASSES}


# ---- contenders for `conv`: the two convolutions of LeNet, each forward and backward, without what is between them

CONVOLUTIONS = ((1, 28, 6), (6, 12, 16))  # channels, height and width, outputs; windows of 5 × 5


def convolution_arrays():
    """For each of the two: (images (N, C, H, W), weights (C, 5, 5, O), the gradient that arrives (N, O, P, Q))."""
    rng = Rng(0)
    for n, (C, H, O) in enumerate(CONVOLUTIONS):
        x = rng.site(f"x{n}").uniform((BATCH, C, H, H))
        yield x, rng.site(f"w{n}").normal((C, 5, 5, O)), rng.site(f"g{n}").normal((BATCH, O, H - 4, H - 4))


def minigrad_convolutions():
    """The first has images for its input, which want no gradient; the second what a layer before it has put out, and
    its gradient arrives from a layer behind it: in the order in memory that the ops give them."""
    batch_last = lambda a: np.ascontiguousarray(a.transpose(1, 2, 3, 0)).transpose(3, 0, 1, 2)
    work = [
        (
            Tensor(x if C == 1 else batch_last(x), C > 1),
            Tensor(w, True),
            Tensor(np.zeros(O, np.float32), True),
            batch_last(g),
        )
        for (x, w, g), (C, _, O) in zip(convolution_arrays(), CONVOLUTIONS, strict=True)
    ]

    def step():
        for x, w, b, g in work:
            x.grad = w.grad = b.grad = None
            conv2d(x, w, b).backward(g)

    return step


def torch_convolutions():
    import torch

    work = [
        tuple(
            map(
                torch.from_numpy, (x, np.ascontiguousarray(w.transpose(3, 0, 1, 2)), np.zeros(len(g[0]), np.float32), g)
            )
        )
        for x, w, g in convolution_arrays()
    ]
    for x, *parameters, _ in work:
        for p in parameters if x.shape[1] == 1 else (x, *parameters):
            p.requires_grad_()

    def step():
        for x, w, b, g in work:
            x.grad = w.grad = b.grad = None
            torch.conv2d(x, w, b).backward(g)

    return step


def convolution_products():
    """The matrix products of the two alone: outputs, weight gradients, and the input gradient of the second."""
    work = []
    for x, w, g in convolution_arrays():
        O = w.shape[-1]
        windows = np.lib.stride_tricks.sliding_window_view(x, (5, 5), axis=(2, 3)).transpose(1, 4, 5, 2, 3, 0)
        columns = windows.reshape(w.size // O, -1).copy()
        work.append(
            (columns, w.reshape(-1, O), np.ascontiguousarray(g.transpose(1, 2, 3, 0)).reshape(O, -1), x.shape[1] > 1)
        )

    def step():
        for columns, w, g, further in work:
            w.T @ columns
            columns @ g.T
            if further:
                w @ g

    return step


CONTENDERS = {
    "conv": {
        "matrix products alone": (convolution_products, None),
        "minigrad": (minigrad_convolutions, None),
        "PyTorch eager": (torch_convolutions, "torch"),
    },
    "vae": {
        "matrix products alone": (floor, None),
        "Adam alone": (updates, None),
        "minigrad": (minigrad_vae, None),
        "PyTorch eager": (torch_vae, "torch"),
        "PyTorch compiled": (lambda: torch_vae(compiled=True), "torch"),
        "JAX jit": (jax_vae, "jax"),
    },
    "ops": {
        "minigrad": (minigrad_ops, None),
        "PyTorch eager": (torch_ops, "torch"),
        "mygrad": (mygrad_ops, "mygrad"),
        "autograd": (autograd_ops, "autograd"),
    },
    "listops": {
        "minigrad": (minigrad_listops, None),
        "minigrad, on the tape": (lambda data_dir: minigrad_listops(data_dir, plain=True), None),
        "PyTorch eager": (torch_listops, "torch"),
    },
    "classes": {
        "marginalisation": (semi_supervised, None),
        "one sample (st-gs)": (lambda: semi_supervised(create("st-gs", TAU)), None),
    },
}

AXES = {  # of the figures: what a size is, and what a step does
    "listops": ("tokens T", "seconds for a training step of 16 sequences"),
    "classes": ("classes K", "seconds for a training step of 100 + 100 images"),
}


def _contender(benchmark, name, arguments, pipe):
    """A process: build the steps, then time them for a while whenever asked."""
    if "minigrad" in name:
        keep_freed_memory()  # as the training scripts do
    with contextlib.suppress(EOFError, ConnectionError):  # the parent was killed
        try:
            steps = CONTENDERS[benchmark][name][0](*arguments)
            steps = steps if isinstance(steps, dict) else {None: steps}
            for step in steps.values():
                for _ in range(5 if len(steps) == 1 else 1):
                    step()
        except Exception as error:
            pipe.send(f"{type(error).__name__}: {error}")
            return
        pipe.send(None)
        _measure_on_request(pipe, steps)


def _measure_on_request(pipe, steps) -> None:
    while (seconds := pipe.recv()) is not None:
        for step in list(steps.values())[:1] * 3:
            step()
        times, end = {key: [] for key in steps}, perf_counter() + seconds
        while not any(times.values()) or perf_counter() < end:
            for key, step in steps.items():
                start = perf_counter()
                step()
                times[key].append(perf_counter() - start)
        pipe.send(times)


def _start(process) -> None:
    """Start it deaf to Ctrl-C, which a terminal sends to all: its parent ends it."""
    if not hasattr(signal, "pthread_sigmask"):
        return process.start()
    resource_tracker.ensure_running()  # with the first process it would unblock the signal
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        return process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _answer(name: str, pipe, *request: float):
    try:
        for seconds in request:
            pipe.send(seconds)
        return pipe.recv()
    except (EOFError, ConnectionError):
        raise UserError(f"{name}: its process has ended; is there enough memory?") from None


def measure(benchmark: str, rounds: int, seconds: float, *arguments) -> dict[str, dict]:
    """{name: {size or None: median seconds of a step}} for each contender that is installed and works."""
    spawn = multiprocessing.get_context("spawn")
    running, times = {}, {}
    for name, (_, module) in CONTENDERS[benchmark].items():
        if module and importlib.util.find_spec(module) is None:
            print(f"{name}: not installed, left out", file=sys.stderr)
            continue
        pipe, other = spawn.Pipe()
        process = spawn.Process(target=_contender, args=(benchmark, name, arguments, other), daemon=True)
        _start(process)
        other.close()
        if problem := _answer(name, pipe):
            print(f"{name}: left out, {problem.splitlines()[0]}", file=sys.stderr)
            continue
        running[name], times[name] = (process, pipe), {}
    for _ in range(rounds):
        for name, (_, pipe) in running.items():
            for key, found in _answer(name, pipe, seconds).items():
                times[name].setdefault(key, []).extend(found)
    for process, pipe in running.values():
        pipe.send(None)
        process.join()
    return {name: {key: statistics.median(t) for key, t in found.items()} for name, found in times.items()}


def show(benchmark: str, medians: dict[str, dict]) -> None:
    print(f"{platform.machine()}, {multiprocessing.cpu_count()} cores, Python {platform.python_version()}, ", end="")
    kernels = os.environ.get(KERNELS)  # as the user or `start` set it; PyTorch and JAX have their own
    print(f"NumPy {np.__version__}" + (f" with OpenBLAS's {kernels} kernels" if kernels else ""))
    if benchmark == "listops":
        return show_listops(medians)
    if benchmark == "classes":
        return show_classes(medians)
    medians = {name: found[None] for name, found in medians.items()}
    ours = medians["minigrad"]
    if benchmark == "vae":
        print(f"one training step, {'-'.join(map(str, SIZES))}, batch {BATCH}, float32, ST Gumbel-Softmax, Adam\n")
        unit, scale = "ms", 1e3
    elif benchmark == "conv":
        print(f"LeNet's two convolutions, batch {BATCH}, float32, forward and backward\n")
        unit, scale = "ms", 1e3
    else:
        print(f"y = y * w with 16 float32 elements, {CHAIN:,} times, forward and backward, per op\n")
        unit, scale = "µs", 1e6 / CHAIN
    print(f"{'':24}{unit:>8}  minigrad takes")
    for name, seconds in medians.items():
        ratio = "" if name == "minigrad" else f"{ours / seconds:8.2f} of this"
        print(f"{name:24}{seconds * scale:8.2f}  {ratio}")
    return None


def exponent(seconds: dict[int, float], shorter: int = 25) -> float:
    """The p of time ~ T^p between the size nearest to `shorter` and the longest."""
    low, high = min(seconds, key=lambda T: abs(T - shorter)), max(seconds)
    return math.log(seconds[high] / seconds[low]) / math.log(high / low)


def show_listops(medians: dict[str, dict]) -> None:
    print(
        f"one training step, latent-tree LSTM, {DIM} dimensions, batch {SEQUENCES}, dropout {DROPOUT}, float32, ",
        end="",
    )
    print("GST-1.0, clipping, Adam: ms\n")
    print(
        f"{'tokens':24}" + "".join(f"{T:7}" for T in medians["minigrad"]) + "    all ten  growth from 25 to the longest"
    )
    for name, found in medians.items():
        total = 1e3 * sum(found.values())
        row = "".join(f"{1e3 * s:7.0f}" for s in found.values())
        print(f"{name:24}{row} {total:10.0f}  T^{exponent(found):.2f}")
    ours = sum(medians["minigrad"].values())
    for name, found in medians.items():
        if name != "minigrad":
            print(f"{name} takes {sum(found.values()) / ours:.1f} times as long")


def show_classes(medians: dict[str, dict]) -> None:
    sizes = f"{PIXELS} pixels, hidden {STYLE_HIDDEN[0]}, z {LATENT}"
    print(f"one training step, semi-supervised VAE, {sizes}, {BATCH} images with and {BATCH} without labels, ", end="")
    print("float32, Adam: ms\n")
    summed, sampled = medians.values()
    print(f"{'classes':24}" + "".join(f"{K:8}" for K in summed))
    for name, found in medians.items():
        print(f"{name:24}" + "".join(f"{1e3 * s:8.1f}" for s in found.values()))
    print(f"{'ratio':24}" + "".join(f"{summed[K] / sampled[K]:8.1f}" for K in summed))
    print("published, with convolutional networks: 2 for 10 classes, 9.9 for 100 (Jang, Gu & Poole 2017)")


@command
def main(argv=None) -> int:
    parser = Parser(description=__doc__ and __doc__.split("\n\n")[0])
    parser.add_argument("benchmark", choices=CONTENDERS)
    parser.add_argument("--rounds", type=whole, default=10, help="how often each contender gets its turn (default 10)")
    parser.add_argument("--seconds", type=float, default=1.0, help="the length of a turn (default 1)")
    parser.add_argument("--data-dir", help="for listops: a folder with listops/valid.tsv; else MINIGRAD_DATA")
    parser.add_argument(
        "--figure", help="where time against size is drawn (default listops-speed.png; classes: nowhere)"
    )
    flags = parser.parse_args(argv)
    arguments, figure = (), flags.figure
    at_least(1, flags, "rounds")
    at_most(10_000, flags, "rounds")
    require(0.0 < flags.seconds < math.inf, f"--seconds must be positive and finite, got {flags.seconds}.")
    require(not flags.data_dir or flags.benchmark == "listops", "--data-dir is for listops: leave it out.")
    require(not figure or flags.benchmark in AXES, f"--figure is for {' and '.join(AXES)}: leave it out.")
    if flags.benchmark == "listops":
        arguments, figure = (flags.data_dir,), figure or "listops-speed.png"
    if figure:
        check_picture(figure)
    if flags.benchmark == "listops":
        with user_errors(DataError), disk_errors():
            if "valid" not in listops.files(flags.data_dir):
                print("no listops/valid.tsv in --data-dir or MINIGRAD_DATA: sequences are generated", file=sys.stderr)
            listops_batches(flags.data_dir)
    medians = measure(flags.benchmark, flags.rounds, flags.seconds, *arguments)
    show(flags.benchmark, medians)
    if figure:
        with disk_errors():
            speed(figure, medians, *AXES[flags.benchmark])
    return 0


if __name__ == "__main__":
    sys.exit(main())
