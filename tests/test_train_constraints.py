"""The script for logical constraints as a user meets it: results, theories from files, each loss, who knows labels."""

import shutil

import numpy as np
import pytest

import train_constraints
from experiments import run_folder
from experiments.loop import Loop
from experiments.run_folder import RunFolder
from minigrad import Rng
from minigrad.check import audit
from minigrad.fused import softmax
from models.cnf import Theory
from models.theories import COMPLETIONS, READINGS, is_path

TINY = ["--epochs", "2", "--examples", "60", "--batch", "20", "--quiet"]
PROBLEMS = (*READINGS, *COMPLETIONS)


def run(*flags):
    return train_constraints.main([str(f) for f in (*TINY, *flags)])


def training(**flags):
    return train_constraints.Constraints(train_constraints.Config(**({"examples": 60, "hidden": (16,)} | flags)))


@pytest.fixture(autouse=True)
def few_images_of_operators(monkeypatch):
    monkeypatch.setattr(train_constraints, "DRAWN", (120, 60))
    monkeypatch.setattr(train_constraints, "EVALUATED", 500)
    monkeypatch.setattr(train_constraints, "COMPLETED", 60)


@pytest.mark.parametrize("problem", ["add", "apply2x2", "paths", "sudoku4"])
def test_a_run_leaves_its_results_and_ends_with_the_promised_line(tmp_path, capsys, problem):
    out = tmp_path / "run"
    assert run("--problem", problem, "--out", out) == 0
    lines, last_line = RunFolder(out).metrics(), capsys.readouterr().out.splitlines()[-1]
    assert [line["epoch"] for line in lines] == [1, 2]
    expected = {"epoch", "train_loss", "train_constraint", "ms_per_step"}
    keys = ["accuracy", "satisfied", *(["solved"] if problem in COMPLETIONS else [])] + ["valid"] * (problem == "paths")
    assert lines[0].keys() == expected | {f"{part}_{key}" for part in ("valid", "test") for key in keys}
    assert all(0.0 <= line[f"test_{key}"] <= 1.0 for line in lines for key in keys)
    assert (
        last_line == f"final test accuracy {lines[-1]['test_accuracy']:.4f} satisfied {lines[-1]['test_satisfied']:.4f}"
    )
    assert (out / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert Theory.load(out / "theory.cnf") == (READINGS | COMPLETIONS)[problem]("probability").theory


# ---- theories from files


def test_the_theory_that_a_run_leaves_gives_the_same_run(tmp_path):
    assert run("--out", tmp_path / "a") == 0
    assert run("--out", tmp_path / "b", "--cnf", tmp_path / "a" / "theory.cnf") == 0
    drop = lambda folder: [{k: v for k, v in m.items() if k != "ms_per_step"} for m in RunFolder(folder).metrics()]
    assert drop(tmp_path / "a") == drop(tmp_path / "b")


def test_another_theory_is_what_answers_are_held_against(tmp_path):
    """A theory without the clause for the sum 18 is satisfied by whatever is said of two nines."""
    theory = READINGS["add"]("probability").theory
    Theory(theory.clauses[:1], theory.atoms).save(tmp_path / "zero.cnf")  # only two zeros are told anything
    found = training(cnf=str(tmp_path / "zero.cnf")).evaluate("test")
    assert 0.97 < found["test_satisfied"] <= 1.0 > found["test_accuracy"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("p cnf 3 1\n1 4 0\n", "x.cnf cannot be used: line 2: the clause that ends here has an atom outside 1 to 3.\n"),
        ("p cnf 3 1\n1 2 0\n", "x.cnf has 3 atoms, and --problem add needs 119 with this binariser"),
    ],
)
def test_a_bad_theory_is_one_sentence_and_leaves_nothing(tmp_path, capsys, text, message):
    (tmp_path / "x.cnf").write_text(text)
    assert run("--out", tmp_path / "run", "--cnf", tmp_path / "x.cnf") == 2
    captured = capsys.readouterr()
    assert (captured.out, captured.err.count("\n")) == ("", 1)
    assert message in captured.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.cnf"]


def test_a_run_does_not_go_on_with_another_theory(tmp_path, capsys):
    file = tmp_path / "x.cnf"
    theory = READINGS["add"]("probability").theory
    theory.save(file)
    assert run("--out", tmp_path / "run", "--cnf", file) == 0
    Theory(theory.clauses[:-1], theory.atoms).save(file)
    capsys.readouterr()
    assert train_constraints.main(["--resume", str(tmp_path / "run"), "--epochs", "3", "--quiet"]) == 2
    assert "is not the one that the run began with: restore it" in capsys.readouterr().err
    theory.save(file)
    assert train_constraints.main(["--resume", str(tmp_path / "run"), "--epochs", "3", "--quiet"]) == 0
    shutil.rmtree(tmp_path / "run")


# ---- what is trained


def outputs_of(experiment, index):
    x = experiment.model(experiment.pictures[experiment.train[index].reshape(-1)])
    return x.reshape(len(index), experiment.problem.items, experiment.problem.classes)


@pytest.mark.parametrize("problem", ["add", "apply2x2", "member3"])
def test_the_exact_loss_is_the_likelihood_of_the_facts(problem):
    trained = training(problem=problem, method="exact", dtype="float64")
    index = np.arange(30)
    x, facts = outputs_of(trained, index), trained.facts[index]
    p, expected = softmax(x).data, []
    values = np.stack(np.meshgrid(*[np.arange(trained.problem.classes)] * trained.problem.items), -1)
    values = values.reshape(-1, trained.problem.items)
    told = trained.problem.told(trained.rng.site("groups").site("train").site("told"), labels_of(trained))[index]
    for row, fact, t in zip(p, facts, told, strict=True):
        true = (trained.problem.facts(values, np.tile(t, (len(values), 1))) == fact).all(axis=(1, 2))
        expected.append(np.prod([row[i, values[true, i]] for i in range(row.shape[0])], axis=0).sum())
    loss = trained.constraint(x, facts, Rng(0))
    assert loss.item() == pytest.approx(-np.log(expected).mean(), rel=1e-9)


def labels_of(experiment):
    return experiment.images.train_labels.astype(np.int64)[experiment.train]


@pytest.mark.parametrize("method", ["reinmax", "rloo:samples=4"])
def test_an_estimator_s_value_is_the_share_of_samples_of_which_the_facts_are_not_true(method):
    trained, index = training(method=method, dtype="float64"), np.arange(60)
    facts, total = trained.facts[index], 0.0
    x = outputs_of(trained, index)
    p = trained.problem.holds(softmax(x), facts).data
    for seed in range(40):
        total += trained.constraint(x, facts, Rng(seed)).item() / 40
    assert total == pytest.approx(1.0 - p.mean(), abs=4.0 * np.sqrt(0.1 * 0.9 / (60 * 40)))


@pytest.mark.parametrize("problem", ["member3", "sudoku4"])
def test_parts_that_are_left_out_are_missing_from_the_sum(problem):
    def step(without):
        trained = training(problem=problem, without=without, dtype="float64", h1=0.0)
        trained.step(np.arange(20), Rng(0))
        return {name: p.grad.copy() for name, p in trained.model.named_parameters().items()}

    parts = ["deduce", "unsat", "sat", *(["labels"] if problem == "sudoku4" else [])]
    whole, alone = step(""), [step(",".join(p for p in parts if p != part)) for part in parts]
    assert all(any(np.abs(g).max() > 0 for g in found.values()) for found in alone)
    for name, g in whole.items():
        np.testing.assert_allclose(g, sum(found[name] for found in alone), atol=1e-12)


@pytest.mark.parametrize(
    "flags",
    [
        {"problem": "add2x2", "binariser": "clipped"},
        {"problem": "member3"},
        {"problem": "apply2x2", "method": "exact"},
        {"problem": "add", "method": "reinmax"},
        {"problem": "paths"},
        {"problem": "sudoku4"},
    ],
    ids=str,
)
def test_the_constraint_passes_the_audit(flags):
    trained = training(dtype="float64", **flags)
    index = np.arange(4)
    x = outputs_of(trained, index) if trained.reads else trained.model(trained.train[index])
    result = audit(trained.constraint(x, trained.facts[index], Rng(0)))
    assert result.ok, str(result)


def test_a_weight_of_0_leaves_the_constraint_out():
    trained = training(problem="paths", h0=0.0, h1=0.0)
    loss, constraint = trained.step(np.arange(20), Rng(0))
    assert constraint > 0.0
    other = training(problem="paths", without="deduce,unsat,sat", h1=0.0)
    assert other.step(np.arange(20), Rng(0))[0] == loss
    for a, b in zip(trained.model.parameters(), other.model.parameters(), strict=True):
        np.testing.assert_array_equal(a.data, b.data)


def test_no_label_of_an_image_is_at_hand_in_training():
    """Steps are the same after all labels of training images were spoiled, and facts are all that was made of them."""
    results = []
    for spoiled in (False, True):
        trained = training()
        assert not hasattr(trained, "train_labels")
        if spoiled:
            trained.images.train_labels[:] = 0
        for step in trained.epoch_steps():
            trained.step(step, Rng(0))
        results.append([p.data for p in trained.model.parameters()])
    for a, b in zip(*results, strict=True):
        np.testing.assert_array_equal(a, b)


def test_examples_and_facts_are_of_training_images_alone():
    trained = training(examples=2000)
    assert trained.train.max() == len(trained.pictures) - 1
    labels = labels_of(trained)
    np.testing.assert_array_equal(trained.facts[:, 0, 0], 100 + labels.sum(axis=1))
    assert len(trained.valid) == len(trained.images.train) // 6


# ---- evaluation


def test_accuracy_and_satisfied_are_counted_over_all_images_and_groups(monkeypatch):
    trained = training()
    for size in (7, 1000):
        monkeypatch.setattr(train_constraints.Constraints, "EVALUATION_BATCH", size)
        found = trained.evaluate("test")
        classes = trained.model(trained.test).data.argmax(axis=1)
        groups, facts = trained.examined["test"]
        sums = classes[groups].sum(axis=1) == trained.test_labels[groups].sum(axis=1)
        np.testing.assert_array_equal(facts[:, 0, 0], 100 + trained.test_labels[groups].sum(axis=1))
        assert found["test_accuracy"] == pytest.approx((classes == trained.test_labels).mean())
        assert found["test_satisfied"] == pytest.approx(sums.mean())


def test_completions_are_counted_as_they_are_defined():
    trained = training(problem="paths")
    inputs, _, paths = trained.examined["valid"]
    answer = (trained.model(inputs).data >= 0).astype(np.float32)
    found = trained.evaluate("valid")
    assert found["valid_accuracy"] == pytest.approx((answer == paths).mean())
    assert found["valid_solved"] == pytest.approx((answer == paths).all(axis=1).mean())
    assert found["valid_valid"] == pytest.approx(is_path(answer, inputs).mean())


# ---- goals


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("binariser", ["probability", "clipped"])
def test_every_problem_has_a_step(problem, binariser):
    trained = training(problem=problem, binariser=binariser)
    losses = trained.step(trained.epoch_steps()[0], Rng(0))
    assert all(np.isfinite(loss) for loss in losses)
    assert losses[1] > 0.0


def test_digits_are_read_after_a_second():
    """Of 1,198 images and their sums in pairs, well before the end of the default run; by chance it would be 10 %."""
    trained = training(examples=1500, hidden=(128,), lr=4e-3)
    loop = Loop(trained, None, quiet=True)
    for _ in range(3):
        for step in trained.epoch_steps():
            loop.step(step)
        trained.epoch, trained.step_in_epoch = trained.epoch + 1, 0
    assert trained.evaluate("test")["test_accuracy"] > 0.85


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_default_run_reaches_its_target(tmp_path, monkeypatch, seed):
    monkeypatch.setattr(train_constraints, "EVALUATED", 5000)
    assert train_constraints.main(["--seed", str(seed), "--out", str(tmp_path / "run"), "--quiet"]) == 0
    last = run_folder.RunFolder(tmp_path / "run").metrics()[-1]
    assert last["test_accuracy"] > 0.97
    assert last["test_satisfied"] > 0.95


@pytest.mark.slow
@pytest.mark.parametrize("method", ["exact", "reinmax", "rloo:samples=4"])
def test_other_gradients_train_it_too(tmp_path, method):
    assert train_constraints.main(["--method", method, "--out", str(tmp_path / "run"), "--quiet"]) == 0
    assert run_folder.RunFolder(tmp_path / "run").metrics()[-1]["test_accuracy"] > 0.5
