"""The script for coarse gradients as a user meets it: where descent ends, the table over seeds, what is refused."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import coarse_gradient
from coarse_gradient import Config, Population, Subspaces
from experiments.run_folder import RunFolder
from models import population
from registry import quick

ROOT = Path(__file__).parents[1]
TINY = ["--steps", "20", "--starts", "3"]
FEW = [
    "--problem",
    "subspaces",
    "--classes",
    "3",
    "--dimensions",
    "3",
    "--points",
    "8",
    "--units",
    "12",
    "--seeds",
    "2",
]


def run(*flags):
    return coarse_gradient.main([*map(str, flags), "--quiet"])


@pytest.fixture
def no_picture(monkeypatch):
    for problem in (Population, Subspaces):
        monkeypatch.setattr(problem, "draw", lambda *_: None)


def complete(**settings):
    config = Config(**settings).complete()
    config.check()
    return config


class Silent:
    def update(self, n):
        pass


# ---- the population problem


def test_the_target_has_the_ratio_and_the_first_start_is_beside_the_spurious_minimum():
    for ratio in (0.001, 0.7, 2.4):
        problem = Population(complete(ratio=ratio, starts=4))
        v_star, w_star = problem.target
        assert v_star @ v_star == pytest.approx(4.0)
        assert v_star.sum() ** 2 == pytest.approx(4.0 * ratio, abs=1e-12)
        assert np.linalg.norm(w_star) == pytest.approx(1.0)
        v, w = problem.start
        assert (v.shape, w.shape) == ((5, 4), (5, 5))
        for start, point in zip((v, w), population.spurious_minimum(*problem.target), strict=True):
            assert 0.0 < abs(start[0] - point).max() < 0.05
            assert abs(start[1:] - point).max() > 0.5


@pytest.mark.parametrize(("ratio", "end"), quick((0.9,), [pytest.param(1.5, "global"), pytest.param(0.9, "caught")]))
def test_the_identity_leaves_the_spurious_minimum_or_is_caught_there_and_the_relu_stays(
    tmp_path, no_picture, ratio, end
):
    flags = ["--ratio", ratio, "--lr", 0.02, "--steps", 4000, "--starts", 10, "--proxies", "identity,relu"]
    assert run(*flags, "--out", tmp_path / "run") == 0
    identity, relu = RunFolder(tmp_path / "run").metrics()
    assert (identity["end"], relu["end"]) == (end, "spurious")
    assert identity["highest_loss"] > 1.5 * relu["highest_loss"]
    assert (identity["loss"] < 1e-6) == (end == "global")
    assert (identity["norm"] < 0.1) == (end == "caught")
    assert identity["global"] >= 5
    for line in (identity, relu):
        assert sum(line[kind] for kind in coarse_gradient.ENDS) == 10


def test_an_end_is_counted_as_what_it_is():
    problem = Population(complete(starts=4))
    loss = problem.spurious
    found = coarse_gradient.Descent(
        "relu",
        [0, 1],
        [3.0, loss],
        np.array([loss, 1e-7, 0.5 * loss, 1.005 * loss, loss]),
        np.array([math.pi, 0.0, math.pi, 3.13, 3.0]),
        np.array([1.0, 0.01, 0.01, 1.0, 1.0]),
    )
    line = problem.line(found)
    assert line | {"global": 1, "caught": 1, "spurious": 1, "elsewhere": 1} == line
    assert (line["end"], line["loss"], line["highest_loss"], line["norm"]) == ("spurious", loss, 3.0, 1.0)


def test_what_is_drawn_is_the_trajectory_of_the_first_start():
    problem = Population(complete(steps=30, starts=2))
    found = problem.descend("clipped_relu", Silent())
    points = list(population.descend(*problem.start, *problem.target, "clipped_relu", 0.01, 30))
    assert (found.steps[0], found.steps[-1], len(found.steps)) == (0, 30, len(found.losses))
    for step, loss in zip(found.steps, found.losses, strict=True):
        v, w = points[step]
        assert loss == pytest.approx(population.loss(v[0], w[0], *problem.target))
    np.testing.assert_allclose(found.end_losses, population.loss(*points[-1], *problem.target))
    np.testing.assert_allclose(found.end_norms, np.linalg.norm(points[-1][1], axis=1))


def test_a_population_run_leaves_its_results_and_ends_with_the_promised_line(tmp_path, capsys):
    out = tmp_path / "run"
    assert coarse_gradient.main([*TINY, "--out", str(out)]) == 0
    captured = capsys.readouterr()
    metrics = RunFolder(out).metrics()
    assert [m["proxy"] for m in metrics] == ["identity", "relu", "clipped_relu"]
    counts = ["global", "caught", "spurious", "elsewhere"]
    assert list(metrics[0]) == ["proxy", "loss", "highest_loss", "end", "norm", *counts]
    *_, last = lines = captured.out.splitlines()
    assert [json.loads(line) for line in lines if line.startswith("{")] == metrics
    assert last == "final at the global minimum of 3: " + " ".join(f"{m['proxy']} {m['global']}" for m in metrics)
    assert "the identity is not caught there" in captured.out
    assert (out / "curve.png").read_bytes().startswith(b"\x89PNG")
    config = json.loads((out / "config.json").read_text())["config"]
    assert (config["units"], config["lr"], config["steps"]) == (4, 0.01, 20)


@pytest.mark.slow
def test_a_run_is_a_function_of_its_seed(tmp_path, no_picture):
    for flags in (TINY, [*FEW, "--steps", 5]):
        texts = []
        for n, seed in enumerate((3, 3, 4)):
            out = tmp_path / f"{flags[1]}-{n}"
            assert run(*flags, "--seed", seed, "--out", out) == 0
            lines = [{k: v for k, v in m.items() if k != "seed"} for m in RunFolder(out).metrics()]
            texts.append(lines)
        assert texts[0] == texts[1] != texts[2]


# ---- subspaces


@pytest.mark.parametrize("fixed", [pytest.param((), marks=pytest.mark.slow), ("--fixed",)])
def test_one_sided_data_are_learned_with_every_proxy(tmp_path, no_picture, fixed):
    assert run("--problem", "subspaces", "--sided", "one", "--seeds", 1, *fixed, "--out", tmp_path / "run") == 0
    metrics = RunFolder(tmp_path / "run").metrics()
    assert len(metrics) == 2 * 4
    assert all(m["accuracy"] == 1.0 and 0 < m["steps"] < 300 for m in metrics)


def test_on_two_sided_data_two_bits_and_the_clipped_relu_succeed_and_the_identity_fails(tmp_path, no_picture):
    flags = ["--problem", "subspaces", "--bits", 2, "--seeds", 1, "--proxies", "clipped_relu,identity"]
    assert run(*flags, "--out", tmp_path / "run") == 0
    clipped, identity = RunFolder(tmp_path / "run").metrics()
    assert (clipped["accuracy"], clipped["steps"] < 1000) == (1.0, True)
    assert 0.5 < identity["accuracy"] < 0.97
    assert identity["steps"] == 1000


def test_a_subspace_run_leaves_its_results_and_ends_with_the_promised_line(tmp_path, capsys):
    out = tmp_path / "run"
    assert coarse_gradient.main([*FEW, "--steps", "30", "--bits", "1,3", "--out", str(out)]) == 0
    captured = capsys.readouterr()
    metrics = RunFolder(out).metrics()
    assert len(metrics) == 2 * 4 * 2
    assert metrics[0].keys() == {"sided", "bits", "proxy", "seed", "accuracy", "steps", "new_accuracy"}
    assert [m["seed"] for m in metrics[:4]] == [0, 1, 0, 1]
    perfect = sum(m["accuracy"] == 1.0 for m in metrics)
    assert captured.out.splitlines()[-1] == f"final two-sided: {perfect} of 16 runs classify all points"
    table = captured.out.splitlines()[-6:-1]
    assert table[0].split() == ["proxy", "1", "bit", "3", "bits"]
    assert [row.split()[0] for row in table[1:]] == ["identity", "relu", "clipped_relu", "sigmoid"]
    assert (out / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_the_table_counts_perfect_runs_and_shows_the_accuracy_of_the_others():
    assert coarse_gradient.outcome([[0.5, 1.0], [0.2, 0.3, 0.9, 1.0]]) == "2 of 2, step 1 to 3"
    assert coarse_gradient.outcome([[0.5, 1.0], [0.2, 0.875], [0.25]]) == "1 of 3, 25.0 to 87.5 %"


def test_training_stops_where_all_points_are_classified_and_counts_the_accuracy_before_each_step():
    problem = Subspaces(complete(problem="subspaces", sided="one"))
    accuracies, new = problem.train(2, "relu", 0)
    assert accuracies[-1] == 1.0
    assert max(accuracies[:-1]) < 1.0
    assert accuracies[0] < 0.6
    assert 0.8 < new <= 1.0
    short, early = Subspaces(complete(problem="subspaces", sided="one", steps=3)).train(2, "relu", 0)
    assert short == accuracies[:4]
    assert early < new


# ---- bad input: one sentence on standard error, exit code 2, nothing created

BAD_FLAGS = {
    "--problem magic": "unknown problem 'magic'; the known ones are population, subspaces",
    "--proxies sigmoid": "unknown proxy 'sigmoid'; population knows identity, relu, clipped_relu",
    "--problem subspaces --proxies relu,hat": "unknown proxy 'hat'; subspaces knows identity, relu, clipped_relu, sigm",
    "--units 1": "--units must be at least 2, got 1",
    "--steps 0": "--steps must be at least 1, got 0",
    "--steps 100000000": "--steps must be at most 10,000,000, got 100000000",
    "--starts 0": "--starts must be at least 1",
    "--inputs 0": "--inputs must be at least 1",
    "--ratio 2.5": "--ratio must be at least 0.001 and below (m + 1)/2 = 2.5, where a spurious minimum is, got 2.5",
    "--ratio -1": "--ratio must be at least 0.001",
    "--ratio 0": "--ratio must be at least 0.001",  # where the spurious minimum is a global one
    "--ratio nan": "--ratio must be at least 0.001",
    "--proxies relu,identity,relu": "--proxies has something twice: name each once",
    "--problem subspaces --bits 2,2": "--bits has something twice: name each once",
    "--problem subspaces --seeds 10001": "--seeds must be at most 10,000, got 10001",
    "--lr 0": "--lr, the learning rate, must be positive",
    "--seed -1": "--seed must be an integer from 0",
    "--problem subspaces --seed 18446744073709551615": "--seed must leave room for --seeds",
    "--problem subspaces --bits 0": "--bits must be from 1 to 16, as in --bits 1,2",
    "--problem subspaces --bits none": "--bits must be from 1 to 16, as in --bits 1,2",
    "--problem subspaces --alpha inf": "--alpha must be positive and finite, got inf",
    "--problem subspaces --classes 1": "--classes must be at least 2",
    "--problem subspaces --sided both": "unknown sided 'both'; the known ones are one, two",
    "--problem subspaces --seeds 0": "--seeds must be at least 1",
    "--problem subspaces --units 63 --fixed": "--fixed needs a multiple of 4 --units, equally many a class, got 63",
    "--problem subspaces --ratio 1": "--problem subspaces does not read it: leave --ratio out",
    "--bits 1": "--problem population does not read it: leave --bits out",
    "--units 1000000000000": "does not fit into memory",
    "--problem subspaces --points 1000000000000": "does not fit into memory",
    "--out " + "x" * 300: "File name too long",
    "--resume run": "unrecognized arguments: --resume run",
    "--lr 1e200": "the loss became infinite or NaN with the proxy identity: try a smaller --lr",
}


@pytest.mark.parametrize("flags", BAD_FLAGS)
def test_a_bad_flag_is_one_sentence_and_exit_code_2(tmp_path, capsys, monkeypatch, flags):
    monkeypatch.chdir(tmp_path)
    given = flags.split()
    assert run("--out", "run", *given, *(() if "--steps" in given else ("--steps", 5))) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert BAD_FLAGS[flags] in captured.err
    assert captured.err.count("\n") == 1
    assert captured.err.endswith((".\n", "help.\n"))
    assert list(tmp_path.iterdir()) == []


def test_an_output_folder_that_exists_is_left_alone(tmp_path, capsys):
    (tmp_path / "keep.txt").write_text("mine")
    assert run(*TINY, "--out", tmp_path) == 2
    assert "exists already" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["keep.txt"]


@pytest.mark.parametrize(("flags", "name"), [(TINY, "population"), ([*FEW, "--steps", "2"], "subspaces-two-sided")])
def test_the_run_folder_gets_a_name(tmp_path, monkeypatch, no_picture, flags, name):
    monkeypatch.chdir(tmp_path)
    assert run(*flags, "--seed", 7) == 0
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith(f"coarse-gradient-{name}-s7-")


def test_the_script_itself_exits_with_2_without_a_traceback(tmp_path):
    command = [sys.executable, str(ROOT / "scripts" / "coarse_gradient.py"), "--ratio", "9"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert result.returncode == 2
    assert result.stderr.startswith("coarse_gradient.py: error: --ratio must be at least 0")
    assert result.stdout == ""
