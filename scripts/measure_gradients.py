"""Measure the bias and the variance of gradient estimators against the exact gradient.

    python scripts/measure_gradients.py                                         # a small problem, a few seconds
    python scripts/measure_gradients.py --problem vae --code bernoulli          # a fresh VAE on the embedded digits
    python scripts/measure_gradients.py --checkpoint runs/NAME --estimators reinmax st-gs rloo:samples=4 --taus 0.5 1 2

All flags are listed by --help.

The gradient is that of Σ E f(D), the sum over images, with respect to the logits θ of every image; in the VAE
f(d) = −log p(x|d). All joint outcomes of the variables are enumerated (at most 16,384), so it is exact. The docstring
of `estimators/measure.py`, which measures, says what bias, deviation, mse and cosine are, which estimators are
enumerated and which are sampled (`--samples` estimates for each image), and how far the intervals can be trusted.

The time of a call is that of the estimator and the cost, forward and backward, on up to 100 images, in --dtype.
"""

from __future__ import annotations

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))
from experiments.start import before_numpy

before_numpy()

import dataclasses
import functools
import inspect
import itertools
import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from estimators import ESTIMATORS, Estimator, categorical, create
from estimators.base import SettingError, check_tau, value_and_grad
from estimators.exact import check_outcomes
from estimators.measure import FAMILIES, GROUPS, EnumeratedCost
from experiments import vae
from experiments.errors import command, disk_errors, require, size_errors, user_errors
from experiments.flags import DTYPES, at_least, at_most, check_read, check_seed, flag, one_of, parse_flags, quiet_flag
from experiments.memory import check_evaluations, check_memory, draws
from experiments.pictures import new_figure
from experiments.run_folder import CHECKPOINT, RunFolder, new_folder
from minigrad import Rng, Tensor, grad, no_grad
from minigrad.backend import Backend
from minigrad.checkpoint import StateError
from minigrad.fused import bce_with_logits
from minigrad.ops import softplus, stable_sigmoid, tanh

PROBLEMS = ("small", "vae")
DEFAULT_ESTIMATORS = (
    *("reinforce", "rloo", "muprop", "local-expectation", "disarm", "disarm-sb", "rebar"),
    *("st", "gumbel-softmax", "st-gs", "gumbel-rao", "gst-1.0", "darn", "reinmax"),
)
ENUMERATED = ("sample", "none")  # the randomness of an estimator that needs no --samples
SAMPLES = {"small": 2000, "vae": 400}
MOST_SAMPLES = 1_000_000
TABLE_BYTES = 2e9
CALLS, CALLS_SECONDS, CALLS_IMAGES = 10, 2.0, 100  # calls that are timed, or as many as fit; on how many images
RESULTS = "results.jsonl"


@dataclass(frozen=True)
class Config:
    problem: str = flag("small", f"{' or '.join(PROBLEMS)}; vae where there is a --checkpoint")
    checkpoint: str = flag("", "a run folder of train_vae.py: its model, and the test images of its data set")
    data_dir: str = flag("", "a folder with one folder per data set; else MINIGRAD_DATA, else a download")
    estimators: tuple = flag(DEFAULT_ESTIMATORS, "names with options, like rloo:samples=4", type=str, nargs="+")
    taus: tuple = flag((0.5, 1.0, 2.0), "temperatures, for estimators that take one", type=float, nargs="+")
    images: int = flag(100, "test images of the VAE, or points θ of the small problem")
    samples: int | None = flag(None, "estimates per image, where sampled; else 2000 (small) or 400 (vae)", type=int)
    seed: int = flag(0, "fixes the noise, the small problem, and the weights of a fresh VAE")
    code: str = flag("", f"{' or '.join(FAMILIES)}: the family of the variables; else the first, or the checkpoint's")
    variables: int | None = flag(None, "L of a fresh VAE; else 4 categorical ones or 12 bits", type=int)
    categories: int = flag(8, "K of a fresh VAE")
    dtype: str = flag("float64", f"one of {', '.join(DTYPES)}")

    def check(self, given) -> None:
        """UserError, one sentence, for the first flag out of range or of no use beside the others."""
        one_of(self, problem=PROBLEMS, dtype=DTYPES, code=("", *FAMILIES))
        if self.problem == "small":
            of_vae = ("checkpoint", "data_dir", "variables", "categories")
            check_read(given, dict.fromkeys(of_vae, "the small problem has sizes of its own and no data"))
        elif self.checkpoint:
            of_model = ("code", "variables", "categories")
            check_read(given, dict.fromkeys(of_model, "the checkpoint says what its model is like"))
        else:
            bits = {"categories": "bits have no categories"} if self.code == "bernoulli" else {}
            check_read(given, {"data_dir": "a fresh VAE has the embedded digits"} | bits)
        at_least(1, self, "images")
        at_most(MOST_SAMPLES, self, "samples")
        for name in ("estimators", "taus"):
            values = getattr(self, name)
            twice = [value for n, value in enumerate(values) if value in values[:n]]
            require(not twice, f"--{name} has {twice and twice[0]} twice: leave one out.")
        least = 2 * GROUPS
        require(
            self.samples is None or self.samples >= least,
            f"--samples must be at least {least}, two for each of the {GROUPS} groups of the jackknife, "
            f"got {self.samples}.",
        )
        check_seed(self)
        with user_errors(SettingError):
            for tau in self.taus:
                check_tau(tau)


# ---- the problems: logits (B, ...), what learned baselines may look at, and the cost


class SmallProblem:
    """B points θ ~ N(0, 1) of 3 variables of 4 classes, or of 6 bits: 64 outcomes either way. The same cost for all,

        f(d) = 1 + ½ Σⱼ vⱼ tanh ½⟨wⱼ, d⟩,   8 units,  w, v ~ N(0, 1),

    which is no polynomial, nor a sum over the variables.
    """

    inputs = None

    def __init__(self, points: int, family, rng: Rng, dtype):
        self.family, shape = family, (3, 4) if family is categorical else (6,)
        draw = lambda name, shape: rng.site(name).normal(shape, like=np.empty(0, dtype))
        self.logits = draw("logits", (points, *shape))
        self.w, self.v = 0.5 * draw("w", (math.prod(shape), 8)), draw("v", (8, 1))

    def cost(self, d: Tensor, images) -> Tensor:
        """f for each row of d (n, ...), whatever its image: images (n,) -> (n,)"""
        hidden = tanh(d.reshape(d.shape[0], -1) @ self.w)
        return 1.0 + 0.5 * (hidden @ self.v).reshape(-1)

    def costs(self, outcomes):
        return np.broadcast_to(self._at(outcomes)[0], (len(self.logits), len(outcomes)))

    def slopes(self, outcomes):
        return np.broadcast_to(self._at(outcomes)[1], (len(self.logits), *outcomes.shape))

    def _at(self, outcomes):
        return value_and_grad(lambda d: self.cost(d, None), outcomes)

    def zero_grad(self) -> None:
        pass


class VAEProblem:
    """Images x and θ = encoder(x);  f(d) = −log p(x|d) = Σ softplus(y) − ⟨x, y⟩,  y = decoder(d).

    run: in whatever dtype it was, so that its weights and its binarised test images are the same in another.
    """

    def __init__(self, run: vae.VAEExperiment, images: int, dtype):
        self.model, self.family = run.model, run.estimator.family
        self.inputs = run.test[:images].astype(dtype)
        self.model.to(Backend(), dtype)  # away from the optimizer, which has no part in this
        with no_grad():
            self.logits = self.model.theta(self.inputs).data

    def zero_grad(self) -> None:
        for p in self.model.parameters():
            p.grad = None

    def cost(self, d: Tensor, images) -> Tensor:
        """f for each row of d (n, ...) and the image with its index: images (n,) -> (n,)"""
        return bce_with_logits(self.model.decode(d), self.inputs[images])

    def costs(self, outcomes):
        """f(z) for every image and outcome: y depends on the outcome only.   outcomes (N, ...) -> (B, N)"""
        with no_grad():
            y = self.model.decode(Tensor(outcomes))
            return softplus(y).data.sum(axis=-1) - self.inputs @ y.data.T

    def slopes(self, outcomes):
        """∇f(z) for every image and outcome.   outcomes (N, ...) -> (B, N, ...)

        With y = h W + b, the last layer, the gradient with respect to h is (σ(y) − x) Wᵀ = σ(y) Wᵀ − x Wᵀ: the largest
        product is one for all images, and the forward pass, too.
        """
        *layers, last = self.model.decoder.layers
        z = Tensor(outcomes, requires_grad=True)
        h = functools.reduce(lambda h, layer: layer(h), layers, z.reshape(len(outcomes), -1))
        W, g = last.weight.data, np.empty((len(self.inputs), *outcomes.shape), outcomes.dtype)
        from_y = stable_sigmoid(last(h).data) @ W.T
        for i, x in enumerate(self.inputs):
            g[i] = grad(h, [z], from_y - x @ W.T, keep=True)[0]
        return g


def make_problem(c: Config):
    """(the problem, what its results record besides the flags). UserError for what cannot be measured."""
    dtype = np.dtype(c.dtype)
    if c.problem == "small":
        check_memory(c.images * 64 * 12, dtype, "--images")  # the slopes at 64 outcomes, 12 numbers each
        return SmallProblem(c.images, FAMILIES[c.code or "categorical"], Rng(c.seed).site("problem"), dtype), {}
    facts = {}
    if c.checkpoint:
        folder, stored = RunFolder.resume(c.checkpoint, vae.Config, {}, ())
        arrays, info = folder.load()
        stored = dataclasses.replace(stored, backend="numpy", data_dir=c.data_dir or stored.data_dir)
        stored.check_given(["data_dir"] if c.data_dir else [])
        run = vae.VAEExperiment(stored)
        prefix = "model."
        with user_errors(StateError, file=folder.path / CHECKPOINT):
            run.model.load_state_dict({k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)})
        facts["epoch"] = info.get("epoch")
    else:
        bits = c.code == "bernoulli"
        variables = c.variables if c.variables is not None else 12 if bits else 4
        with user_errors(SettingError):
            check_outcomes(variables, 2 if bits else c.categories)
        sizes = {"variables": variables, "categories": c.categories, "code": c.code or "categorical"}
        run = vae.VAEExperiment(vae.Config(seed=c.seed, **sizes))
    family, shape = run.estimator.family, (1, *run.model.latent_shape)
    L, K = family.sizes(shape)
    with user_errors(SettingError):
        check_outcomes(L, K)
    found = len(run.test)
    require(c.images <= found, f"--images {c.images}: there are only {found} test images.")
    require(
        c.images * K**L * math.prod(shape) * dtype.itemsize <= TABLE_BYTES,
        f"--images {c.images}: the tables of {K**L} outcomes would exceed {TABLE_BYTES:.0e} bytes, use fewer images.",
    )
    return VAEProblem(run, c.images, dtype), facts


def enumerate_outcomes(problem) -> EnumeratedCost:
    """The problem at all its outcomes, which it evaluates for all images together."""
    tables = {"inputs": problem.inputs, "costs": problem.costs, "slopes": problem.slopes}
    return EnumeratedCost(problem.logits, problem.cost, problem.family.name, **tables)


# ---- what is measured here: the cost of a call


def cost_of_a_call(make: Callable[[], Estimator], problem, table: EnumeratedCost, rng: Rng) -> dict:
    """Evaluations of f and seconds per call, as in training: the estimator learns, and so would the decoder.

    The median of the seconds, and the mean of the counts, over the calls after the first one. An oracle's one call is
    counted on the table, and not timed: the graphs of all outcomes at once would fill the memory.
    """
    estimator = make()
    oracle = estimator.randomness == "none"
    images = np.arange(min(CALLS_IMAGES, len(problem.logits)))
    evaluate = table.cost_of_rows(images, 1) if oracle else lambda d: problem.cost(d, images)
    x = None if problem.inputs is None else problem.inputs[images]
    seconds, counts = [], []

    def cost(d):
        counts[-1] += 1
        return evaluate(d)

    for call in range(1 if oracle else 1 + CALLS):
        theta = Tensor(problem.logits[images], requires_grad=True)
        problem.zero_grad()
        counts.append(0)
        start = time.perf_counter()
        value = estimator(theta, cost, rng.at(call), inputs=x)
        value.backward(np.ones_like(value.data))
        seconds.append(time.perf_counter() - start)
        estimator.update()
        if sum(seconds) > CALLS_SECONDS:
            break
    first = min(1, len(seconds) - 1)
    return {
        "evaluations": estimator.evaluations,
        "evaluations_counted": statistics.mean(counts[first:]),
        "seconds": None if oracle else statistics.median(seconds[first:]),
    }


# ---- what to measure, and how it is shown


@dataclass(frozen=True)
class Row:
    """One estimator at one temperature (None: it has none)."""

    spec: str
    tau: float | None
    make: Callable[[], Estimator]
    tempered: bool = False  # is tau one of --taus?


def rows(specs, taus, family: str, remark) -> list[Row]:
    """The rows of the table. UserError for an estimator that cannot be measured, a remark for a refused temperature."""
    found = []
    for spec in specs:
        plain = functools.partial(create, spec, None, family)
        with user_errors(SettingError):
            estimator = plain()
        require(
            not estimator.multi_sample,
            f"{spec} estimates the gradient of {estimator.objective}, which is not that of E f(D): leave it out.",
        )
        name, _, options = spec.partition(":")
        if "tau" not in inspect.signature(ESTIMATORS[name]).parameters or "tau=" in options.replace(" ", ""):
            found.append(Row(spec, getattr(estimator, "tau", None), plain))
            continue
        for tau in taus:
            make = functools.partial(create, spec, tau, family)
            try:
                make()
            except SettingError as error:
                remark(f"{spec} is left out at tau {tau:g}: {error}")
            else:
                found.append(Row(spec, tau, make, tempered=True))
    require(bool(found), "nothing is left to measure: choose other --estimators or --taus.")
    return found


def handles(name: str, family: str) -> bool:
    """Is the estimator called `name` one for this kind of variables?"""
    return any(module.name == family for module in create(name).families)


def measure_row(row: Row, problem, table: EnumeratedCost, rng: Rng, samples: int) -> dict:
    """Everything about one row, as it is written to the results: finite numbers, or None."""
    found = table.measure(row.make, samples=samples, rng=rng.site("noise")).as_dict()
    norm = found.pop("gradient_norm")
    call = cost_of_a_call(row.make, problem, table, rng.site("calls"))
    return {"estimator": row.spec, "tau": row.tau} | found | call | {"gradient_norm": norm}


# after the estimator and the temperature, and how wide they are
COLUMNS = {"bias": 24, "deviation": 24, "mse": 10, "cosine": 9, "s/call": 10, "how": 12, "evaluations": 0}


def line(cells, width: int) -> str:
    """A line of the table: the estimator, as wide as it has to be, the temperature, and the cells of the columns."""
    widths = (width, 6, *COLUMNS.values())
    return "".join(f"{text:<{w}}" for text, w in zip(cells, widths, strict=True)).rstrip()


def cells(result: dict) -> list[str]:
    number = lambda x: "—" if x is None else f"{x:.3g}"
    interval = lambda name: f" [{', '.join(map(number, result[name]))}]" if name in result else ""
    stated, counted = result["evaluations"], number(result["evaluations_counted"])
    return [
        result["estimator"],
        "" if result["tau"] is None else f"{result['tau']:g}",
        *(number(result[name]) + interval(f"{name}_interval") for name in ("bias", "deviation")),
        *(number(result[name]) for name in ("mse", "cosine", "seconds")),
        result["how"],
        counted if stated == counted else f"{counted} ({stated})",
    ]


# ---- the figure


def draw(stem: Path, results: list[dict], negligible: float) -> None:
    """`stem`.png and .pdf: relative deviation against relative bias, a point for each row.

    Filled points are enumerated, open ones sampled. On the left margin stand those without bias: enumerated ones with
    a bias below `negligible`, and sampled ones whose interval begins at 0. Rows without variance have no place here.
    """
    shown = [r for r in results if None not in (r["bias"], r["deviation"]) and r["deviation"] > negligible]
    unbiased = lambda r: r["bias_interval"][0] == 0.0 if "bias_interval" in r else r["bias"] <= negligible
    ends = lambda r, name: r.get(f"{name}_interval", [r[name]] * 2)
    lowest = min((ends(r, "bias")[0] for r in shown if not unbiased(r)), default=0.1)
    highest = max((ends(r, "bias")[1] for r in shown if not unbiased(r)), default=1.0)
    left = 0.7 * lowest  # where the margin ends
    zero = left / max(2.0, highest / lowest) ** 0.08
    edge = zero * zero / left

    from matplotlib import colormaps, rc_context  # here, as in `experiments.pictures`

    with rc_context({"font.size": 8, "pdf.fonttype": 42}):
        figure = new_figure(5.5, 4.0)
        axes = figure.subplots()
        axes.set_xscale("log")
        axes.set_yscale("log")
        heights = [end for r in shown for end in ends(r, "deviation")]
        if shown and max(heights) < 1.001 * min(heights):  # too close together for matplotlib to find a range
            axes.set_ylim(0.5 * min(heights), 2.0 * max(heights))
        axes.axvspan(edge, left, color="0.93", linewidth=0)
        specs = list(dict.fromkeys(r["estimator"] for r in shown))
        labels = []
        for n, spec in enumerate(specs):
            colour, marker = colormaps["tab10"].colors[n % 10], "osD^v<>"[n // 10 % 7]
            own = [r for r in shown if r["estimator"] == spec]
            at = [(zero if unbiased(r) else r["bias"], r["deviation"]) for r in own]
            axes.plot(*zip(*at, strict=True), color=colour, linewidth=0.8, zorder=2)
            for i, (r, (x, y)) in enumerate(zip(own, at, strict=True)):
                (x0, x1), (y0, y1) = (max(zero, end) for end in ends(r, "bias")), ends(r, "deviation")
                bars = {"xerr": [[x - x0], [x1 - x]], "yerr": [[y - y0], [y1 - y]]}
                inside = colour if r["how"] == "enumerated" else "white"
                style = {"marker": marker, "markersize": 4, "markerfacecolor": inside, "elinewidth": 0.6, "zorder": 3}
                axes.errorbar(x, y, **bars, color=colour, **style)
                tau = "" if r["tau"] is None else f"{r['tau']:g}"
                name = spec.replace(f"tau={tau}", "").rstrip(":,")
                labels.append((x, y, " ".join(filter(None, [name if i == 0 else "", tau])) or name, colour))
        axes.set_xlabel("relative bias  ‖E ĝ − g‖ / ‖g‖")
        axes.set_ylabel("relative standard deviation  √(tr Var ĝ) / ‖g‖")
        axes.grid(alpha=0.25, linewidth=0.5)
        axes.margins(y=0.08)
        set_ticks(axes, zero, edge, left, highest)
        place_labels(figure, axes, labels)
        figure.savefig(stem.with_suffix(".png"), dpi=200)
        figure.savefig(stem.with_suffix(".pdf"), metadata={"CreationDate": None})


def set_ticks(axes, zero, edge, left, highest) -> None:
    """Ticks at round numbers, on the horizontal axis to the right of the margin, whose one tick is 0."""
    right = highest * (highest / zero) ** 0.06
    major, minor = round_numbers(left, right)
    axes.set_xticks([zero, *major], ["0\n(exact)", *(f"{x:g}" for x in major)])
    axes.set_xticks(minor, [""] * len(minor), minor=True)
    axes.set_xlim(edge, right)
    low, high = axes.get_ylim()
    major, minor = round_numbers(low, high)
    axes.set_yticks(major, [f"{y:g}" for y in major])
    axes.set_yticks(minor, [""] * len(minor), minor=True)
    axes.set_ylim(low, high)


def round_numbers(low: float, high: float) -> tuple[list[float], list[float]]:
    """(numbers for labelled ticks between low and high, for the others): the wider the range, the fewer of a decade."""
    decades = math.log10(high / low)
    of_a_decade = (1, 2, 3, 5, 7) if decades < 1 else (1, 2, 5) if decades < 2.5 else (1,)
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    within = lambda steps: [x for e in exponents for s in steps if low < (x := float(f"{s}e{e}")) < high]
    return within(of_a_decade), within(range(1, 10))


def place_labels(figure, axes, labels, size: float = 6.5) -> None:
    """Write each (x, y, text, colour) where it covers the least of the points, the lines and the labels before it."""
    figure.draw_without_rendering()  # the layout is made here, and kept
    figure.set_layout_engine("none")
    renderer, point = figure.canvas.get_renderer(), figure.dpi / 72.0
    frame = axes.get_window_extent(renderer)
    on_lines = [axes.transData.transform(line.get_xydata()) for line in axes.lines if line.get_linestyle() != "None"]
    centres = [axes.transData.transform((x, y)) for x, y, _, _ in labels]
    squares = np.array([*centres, *between(on_lines, 3.0 * point)]).reshape(-1, 2)
    taken = np.concatenate([squares - 2.0 * point, squares + 2.0 * point], axis=1)  # (n, 4), as x0, y0, x1, y1
    for (x, y, text, colour), centre in zip(labels, centres, strict=True):
        trial = axes.text(x, y, text, fontsize=size)
        box = trial.get_window_extent(renderer)
        trial.remove()
        choices = []
        for radius, dx, dy in itertools.product((5, 10, 16, 24, 34), (1, 0, -1), (1, 0, -1)):
            if dx or dy:
                offset = np.array([dx, dy]) * radius / math.hypot(dx, dy)
                middle, half = centre + point * offset + 0.5 * np.array([dx, dy]) * box.size, 0.5 * box.size
                low, high = middle - half, middle + half
                shared = np.minimum(high, taken[:, 2:]) - np.maximum(low, taken[:, :2])
                covered = np.maximum(shared, 0.0).prod(axis=1).sum()
                outside = max(0.0, *(frame.min - low), *(high - frame.max))
                choices.append((covered + 1e3 * outside + radius * point, radius, offset, (dx, dy), [*low, *high]))
        _, radius, offset, (dx, dy), where = min(choices, key=lambda choice: choice[0])
        taken = np.concatenate([taken, [where]])
        axes.annotate(
            text,
            (x, y),
            xytext=tuple(offset),
            textcoords="offset points",
            fontsize=size,
            color=colour,
            ha=("center", "left", "right")[dx],
            va=("center", "bottom", "top")[dy],
            arrowprops={"arrowstyle": "-", "linewidth": 0.4, "color": colour, "shrinkB": 2} if radius > 10 else None,
        )


def between(lines, step: float):
    """Points on polylines, about `step` apart."""
    for start, end in itertools.chain.from_iterable(map(itertools.pairwise, lines)):
        n = max(1, round(math.dist(start, end) / step))
        yield from (start + (end - start) * i / n for i in range(1, n))


# ---- the script


@command
def main(argv=None) -> int:
    extra = (
        ("--out", {"help": "the folder to make for the results, or an empty one (default: a new one below runs/)"}),
        quiet_flag("print nothing but the table"),
    )
    given, other = parse_flags(Config, __doc__, argv, extra)
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
    remark = (lambda text: None) if other["quiet"] else lambda text: print(text, file=sys.stderr)
    if given.get("checkpoint"):
        given = {"problem": "vae"} | given
    config = Config(**given)
    config.check(given)
    path = new_folder(other.get("out"), "gradients", config.problem, f"s{config.seed}")
    with size_errors():
        problem, facts = make_problem(config)
    family = problem.family.name
    if "estimators" not in given:
        config = dataclasses.replace(config, estimators=tuple(n for n in config.estimators if handles(n, family)))
    config = dataclasses.replace(config, code=family, samples=config.samples or SAMPLES[config.problem])
    todo = rows(config.estimators, config.taus, family, remark)
    L, K = problem.family.sizes(problem.logits.shape)
    for row in todo:
        estimator = row.make()
        with user_errors(SettingError):
            estimator.check_size(L, K)
        check_evaluations(estimator, L, K)
        check_memory(config.images * L * K * draws(estimator), config.dtype, "--images or fewer samples")
    unread = {}
    if all(row.make().randomness in ENUMERATED for row in todo):
        unread["samples"] = "all these estimators are enumerated"
    if not any(row.tempered for row in todo):
        unread["taus"] = "none of these estimators takes a temperature from --taus"
    check_read(given, unread)
    begun = time.perf_counter()
    table = enumerate_outcomes(problem)
    norm = table.gradient_norm
    require(math.isfinite(norm), "the exact gradient is not finite: the model's parameters are damaged.")
    with user_errors(ValueError):
        table.check_norm()
    seconds = time.perf_counter() - begun
    with RunFolder.create(path, config, Backend(), numbered="out" not in other) as folder:
        N = table.outcomes.shape[0]
        about = f"exact gradient of {config.images} × {N} outcomes in {seconds:.2f} s, norm {norm:.4g}"
        remark(f"folder {folder.path}\n{about}")
        width = 2 + max(len("estimator"), *(len(row.spec) for row in todo))
        print(line(("estimator", "tau", *COLUMNS), width), flush=True)
        results, rng = [], Rng(config.seed)
        for row in todo:
            results.append(measure_row(row, problem, table, rng, config.samples) | facts)
            with disk_errors(), open(folder.path / RESULTS, "a") as file:
                file.write(json.dumps(results[-1], allow_nan=False) + "\n")
            print(line(cells(results[-1]), width), flush=True)
        with disk_errors():
            draw(folder.path / "bias_variance", results, negligible=float(np.sqrt(np.finfo(config.dtype).eps)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
