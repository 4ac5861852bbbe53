"""Reports: the statistics against hand-computed ones, what the tables say, and results that are missing or damaged."""

import csv
import json
import math
import re
import warnings

import matplotlib as mpl
import pytest
from matplotlib.axes import Axes
from scipy import stats

import draw_curves
import report
import sweep
from experiments import pictures, sweeps
from experiments.specification import run_key

REPORT = {
    "metrics": ["test", "train"],
    "better": "lower",
    "curve": "test",
    "panels": [],
    "scale": 1,
    "unit": "nats",
    "source": "a table",
}
FINALS = {"A": [1.0, 2.0, 3.0], "B": [1.5, 2.0, 4.0], "C": [1.5, 2.5, 3.5]}  # by seed


def make(out, finals=FINALS, published=None, name="tiny", panels=None, **options):
    """A folder as scripts/sweep.py leaves it; a seed's value None is an unfinished run."""
    runs = []
    for row, values in finals.items():
        for seed, value in enumerate(values):
            config = {"estimator": row, "epochs": 2, "data_dir": "", "seed": seed, "sweep": name}
            key = run_key("train_vae", config)
            panel = (panels or {}).get(row, "")
            about = {"key": key, "script": "train_vae", "config": config, "flags": {}, "panel": panel, "row": row}
            runs.append(about | {"published": (published or {}).get(row, {})})
            if value is None:
                continue
            (out / key).mkdir(parents=True)
            lines = [{"epoch": 1, "test": value + 10.0}, {"epoch": 2, "test": value, "train": -value, "by": [1]}]
            (out / key / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
            result = {"script": "train_vae", "config": config, "metrics": lines[-1], "seconds": 1.0}
            (out / key / "result.json").write_text(json.dumps(result))
    about = {"name": name, "title": name.title(), "script": "train_vae", "report": REPORT | options, "runs": runs}
    (out / f"{name}.sweep.json").write_text(json.dumps(about))
    return out


def written(out):
    return (out / "report.md").read_text()


def rows_of(text, first):
    """The cells of the lines of Markdown tables that begin with this cell."""
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    return [cells for cells in lines if cells[0] == first]


# ---- statistics


def test_an_interval_is_that_of_a_paired_t_test():
    differences = [0.5, 0.0, 1.0]
    mean, low, high = report.interval(differences)
    assert mean == pytest.approx(0.5)
    assert high - mean == pytest.approx(4.302653 * 0.5 / math.sqrt(3), rel=1e-6)  # the standard deviation is 0.5
    expected = stats.ttest_rel(differences, [0.0] * 3).confidence_interval(0.95)
    assert (low, high) == pytest.approx((expected.low, expected.high))
    assert report.interval([1.0]) is None
    assert report.mean_sd([2.0]) == (2.0, None)


# ---- the tables


def test_means_differences_and_comparisons_are_those_computed_by_hand(tmp_path, capsys):
    published = {"A": {"test": [1.75, 0.25], "train": [-2.5, None]}, "B": {"test": [3.0, None]}}
    out = make(tmp_path, published=published)
    assert report.main([str(out)]) == 0
    assert capsys.readouterr().out == f"9 finished runs: {out / 'report.md'}\n"
    text = written(out)
    (a, *pairs), (b, *_) = rows_of(text, "A"), rows_of(text, "B")
    assert a == ["A", "3", "2.00 ± 1.00", "1.75 ± 0.25", "+0.25", "-2.00 ± 1.00", "-2.50", "+0.50"]
    assert b[2:5] == ["2.50 ± 1.32", "3.00", "-0.50"]
    assert b[6:] == ["", ""]  # nothing published
    # A − B: −0.5, 0, −1 has the mean −0.5 and the standard deviation 0.5; A − C is −0.5 for every seed
    half = 4.302653 * 0.5 / math.sqrt(3)
    assert pairs[0] == ["A", "B", "3", "-0.50", f"{-0.5 - half:+.2f} to {-0.5 + half:+.2f}", "undecided"]
    assert pairs[1] == ["A", "C", "3", "-0.50", "-0.50 to -0.50", "A"]
    assert "Published: a table." in text
    assert "lower is better" in text
    assert "tiny: epochs 2, sweep tiny." in text

    with open(out / "report.csv", newline="") as file:
        lines = {(line["row"], line["metric"]): line for line in csv.DictReader(file)}
    assert len(lines) == 6
    first = lines["A", "test"]
    assert (first["seeds"], first["expected"]) == ("3", "3")
    assert [float(first[k]) for k in ("mean", "sd", "published", "published_sd", "difference")] == [
        2,
        1,
        1.75,
        0.25,
        0.25,
    ]
    assert lines["B", "train"]["difference"] == ""
    with open(out / "pairs.csv", newline="") as file:
        found = list(csv.DictReader(file))
    assert [(line["first"], line["second"]) for line in found] == [("A", "B"), ("A", "C"), ("B", "C")]
    assert float(found[0]["low"]) == pytest.approx(-0.5 - half)
    for picture in ("curves.png", "bars.png"):
        assert (out / picture).read_bytes().startswith(b"\x89PNG")


def test_higher_can_be_better_and_numbers_can_be_per_cent(tmp_path):
    out = make(tmp_path, published={"A": {"test": [2.5, None]}}, better="higher", scale=100, unit="%")
    assert report.main([str(out)]) == 0
    (a, _, against_c), (header, *_) = rows_of(written(out), "A"), rows_of(written(out), "")
    assert header[:5] == ["", "seeds", "test (%)", "published", "difference"]
    assert a[2:5] == ["200.00 ± 100.00", "250.00", "-50.00"]
    assert against_c[3:] == ["-50.00", "-50.00 to -50.00", "C"]


def test_metrics_can_have_scales_and_units_of_their_own(tmp_path):
    units = {"scale": {"test": 100}, "unit": {"test": "%", "train": "nats"}}
    out = make(tmp_path, published={"A": {"test": [2.5, None], "train": [1.0, None]}}, curve="train", **units)
    assert report.main([str(out)]) == 0
    (a, _, against_c), (header, *_) = rows_of(written(out), "A"), rows_of(written(out), "")
    assert header == ["", "seeds", "test (%)", "published", "difference", "train (nats)", "published", "difference"]
    assert a[2:] == ["200.00 ± 100.00", "250.00", "-50.00", "-2.00 ± 1.00", "1.00", "-3.00"]
    assert against_c[3] == "-50.00"
    ((_, curve_label, bar_label, rows),) = report.picture_data(report.read_sweeps(out, []))
    assert (curve_label, bar_label) == ("train (nats)", "test (%)")
    name, (_, mean, _), (final, *_) = rows[0]
    assert (name, mean[-1], final) == ("A", -2.0, 200.0)


def test_small_numbers_keep_three_digits(tmp_path):
    """An accuracy of 0.924 beside one of 0.926, and the variance of a gradient, would be equal with two decimals."""
    finals = {"A": [0.0926, 0.0924], "B": [0.0921, 0.0919]}
    out = make(tmp_path, finals, published={"A": {"test": [0.0925, None], "train": [-1.0, None]}})
    assert report.main([str(out)]) == 0
    a, pair = rows_of(written(out), "A")
    assert a[2:6] == ["0.0925 ± 0.0001", "0.0925", "+0.0000", "-0.0925 ± 0.0001"]
    assert pair[3:5] == ["+0.0005", "+0.0005 to +0.0005"]
    assert [report.decimals(x) for x in (0.0, 1.0, -31.5, 0.92, -7.1e-6)] == [2, 2, 2, 3, 8]
    assert report.spread(7.12345e-6, 3.2e-8, 8) == "7.12e-06 ± 3.20e-08"
    assert report.signed(-1e-12, 8) == "+0.00e+00"


def test_the_pictures_have_room_for_the_rows_of_the_largest_specifications(tmp_path):
    """Seven estimators at six learning rates; what does not fit would be a warning, which is an error."""
    few, many = make(tmp_path / "few"), make(tmp_path / "many", {f"{n}, lr 0.0001": [1.0 * n] for n in range(42)})
    assert report.main([str(few)]) == report.main([str(many)]) == 0
    for picture in ("curves.png", "bars.png"):
        heights = [int.from_bytes((out / picture).read_bytes()[20:24], "big") for out in (few, many)]
        assert 2 * heights[0] < heights[1]


def test_only_what_is_in_one_table_is_compared_and_all_sweeps_below_are_found(tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    make(tmp_path / "one", panels={"A": "size 1", "B": "size 1", "C": "size 2"}, name="one")
    make(tmp_path / "two", {"D": [5.0, 6.0]}, name="two")
    assert report.main([str(tmp_path), "--out", str(tmp_path / "report")]) == 0
    text = written(tmp_path / "report")
    assert [line for line in text.splitlines() if line.startswith("## ")] == [
        "## One: size 1",
        "## One: size 2",
        "## Two",
    ]
    with open(tmp_path / "report" / "pairs.csv", newline="") as file:
        assert [(line["first"], line["second"]) for line in csv.DictReader(file)] == [("A", "B")]


def test_a_curve_is_the_mean_over_the_seeds_at_the_epochs_that_all_have():
    lines = lambda *values: [{"epoch": epoch, "test": v} for epoch, v in enumerate(values, 1)]
    row = report.Row("A", 2, {}, {}, {0: [*lines(4.0, 2.0, 1.0), {"epoch": 3, "bound": 7.0}], 1: lines(6.0, 3.0)})
    epochs, mean, sd = report.curve(row, "test")
    assert epochs == [1, 2]
    assert mean == [5.0, 2.5]
    assert sd == pytest.approx([math.sqrt(2.0), math.sqrt(0.5)])
    assert report.curve(row, "nothing") == ([], [], [])


# ---- names

NAMES = {
    "a dollar": "$",
    "TeX that matplotlib does not know": r"$\bm{\tau}$",
    "hidden": "_a",
    "markup": "<b>a|b</b> `*x*` [y](z) &lt; #1",
    "lines": "a\nb\x00\u2028",
    "long": "x " * 3000,
    "glyphs that the font does not have": "\N{GRINNING FACE} \u05e9\u202e \ud800 \u6f22",
    "formats": "%s {0} {}",
}


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
@pytest.mark.daily(3)
def test_a_report_takes_any_name(tmp_path, capsys, monkeypatch, name):
    """A warning is an error here."""
    legends, legend = [], Axes.legend
    monkeypatch.setattr(Axes, "legend", lambda axes, **options: legends.append(legend(axes, **options)))
    out = make(tmp_path, {"A": [1.0, 2.0], "B": [2.0, 1.0]}, unit=name, curve="test", source=name)
    about = json.loads((out / "tiny.sweep.json").read_text())
    for run in about["runs"]:
        run["row"], run["panel"] = run["row"] if run["row"] == "B" else name, name
    (out / "tiny.sweep.json").write_text(json.dumps(about | {"title": name}))
    assert report.main([str(out)]) == 0
    assert capsys.readouterr().err == ""
    assert all(len(found.get_texts()) == 2 for found in legends)
    assert all(not text.startswith("_") for found in legends for text in [t.get_text() for t in found.get_texts()])
    table = [line for line in written(out).splitlines() if line.startswith("| ")]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in table[:4]} == {5}  # as many cells as in the header
    assert (out / "bars.png").exists()


def test_markdown_shows_a_name_as_it_is():
    assert report.markdown_text("_a_ x_y $z$ <b> `c` a|b *") == r"\_a\_ x_y \$z\$ \<b\> \`c\` a\|b \*"
    assert pictures.plain("_a $x$\n") == r" _a \$x\$ "
    assert pictures.plain("x" * 100) == "x" * 39 + "…"


def test_a_picture_needs_no_latex(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with mpl.rc_context({"text.usetex": True}):
        pictures.curves(tmp_path / "curve.png", [{"epoch": 1, "train": 1.0, "test": 2.0}], pictures.plain("$a_b"))


def test_a_sweep_that_is_too_large_for_a_picture_has_the_first_rows_in_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(pictures, "MOST_ROWS", 2)
    monkeypatch.setattr(report, "MOST_COMPARED", 2)
    out = make(tmp_path)
    assert report.main([str(out)]) == 0
    assert "the pictures show the first rows" in capsys.readouterr().err
    assert len(rows_of(written(out), "C")) == 1
    with open(out / "pairs.csv", newline="") as file:
        assert [(line["first"], line["second"]) for line in csv.DictReader(file)] == [("A", "B")]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["one", "two/one"], "two curves are called 'one': give NAME=two/one, with another name"),
        (["a=one", "a=two/one"], "two curves are called 'a'"),
        (["one", "--metric", "by"], "'one' has no metrics.jsonl with numbers for 'by'"),
        (["nothing"], "'nothing' has no metrics.jsonl with numbers"),
        (["one", "--out", "a.xyz"], "no picture ends in .xyz"),
        (["one", "--out", "a.pgf"], "no picture ends in .pgf"),
        (["one", "--out", "two"], "two is a folder: give the picture a name"),
        (["one", "--out", "no/a.png"], "there is no folder no for the picture"),
        (["one", "--out", ""], "out is empty: give it a value, or leave it out"),
        ([f"{n}=one" for n in range(201)], "a picture has room for 200 curves, got 201"),
    ],
)
def test_curves_that_cannot_be_drawn_are_a_sentence(tmp_path, capsys, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    for folder in ("one", "two/one", "lr=1"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "metrics.jsonl").write_text('{"epoch": 1, "valid_accuracy": 0.5, "by": {"5": [1]}}\n')
    assert draw_curves.main(flags) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not list(tmp_path.glob("*.png"))
    assert draw_curves.main(["lr=1", "b=one"]) == 0  # a folder's name may look like a curve's
    assert (tmp_path / "curves.png").exists()


def test_a_metric_that_is_a_list_is_drawn_against_the_place_in_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "one").mkdir()
    lines = '{"epoch": 1, "after": [0.1]}\n{"epoch": 2, "by": 0.3}\n{"epoch": 2, "after": [0.5, 0.7, 0.9]}\n'
    (tmp_path / "one/metrics.jsonl").write_text(lines)
    seen = []
    monkeypatch.setattr(draw_curves, "several_curves", lambda *given: seen.extend(given))
    assert draw_curves.main(["one", "--metric", "after", "--against", "time steps"]) == 0
    assert seen == ["curves.png", {"one": ((1, 2, 3), (0.5, 0.7, 0.9))}, "after", "time steps"]


@pytest.mark.parametrize("curves", [40, pytest.param(200, marks=pytest.mark.slow)])
def test_many_curves_have_room_beside_their_legend(tmp_path, monkeypatch, curves):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "one").mkdir()
    (tmp_path / "one/metrics.jsonl").write_text('{"epoch": 1, "valid_accuracy": 0.5}\n')
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no room
        assert draw_curves.main([f"curve number {n}=one" for n in range(curves)]) == 0


# ---- what is missing or damaged


def test_seeds_that_both_have_are_compared_and_unfinished_runs_are_said(tmp_path, capsys):
    out = make(tmp_path, {"A": [1.0, None, 3.0], "B": [2.0, 9.0, 5.0], "C": [None, None, 1.0], "D": [None] * 3})
    assert report.main([str(out)]) == 0
    assert capsys.readouterr().err == "tiny: 6 of 12 runs are not finished.\n"
    text = written(out)
    assert "- tiny: 6 of 12 runs are not finished." in text
    (a, against_b), (c,), (d,) = rows_of(text, "A"), rows_of(text, "C"), rows_of(text, "D")
    assert a[:3] == ["A", "2 of 3", "2.00 ± 1.41"]
    assert against_b[2:4] == ["2", "-1.50"]
    assert c == ["C", "1 of 3", "1.00", "-1.00"]  # no deviation, and no interval, with one seed
    assert d == ["D", "0 of 3", "", ""]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("result.json", '{"config"', "result.json is damaged"),
        ("result.json", "[]", "result.json is damaged"),
        ("result.json", '{"config": {"seed": 8}, "metrics": {}}', "is of another configuration"),
        ("metrics.jsonl", '{"epoch": 1', "metrics.jsonl is missing or damaged"),
        ("metrics.jsonl", "3", "metrics.jsonl is missing or damaged"),
        ("metrics.jsonl", "[" * 100_000, "metrics.jsonl is missing or damaged"),
        ("result.json", "[" * 100_000, "result.json is damaged"),
        ("result.json", '{"config": {}, "metrics": {"test": ' + "9" * 5000 + "}}", "result.json is damaged"),
    ],
)
@pytest.mark.daily(4)
def test_a_damaged_run_is_left_out_and_said(tmp_path, capsys, name, content, message):
    out = make(tmp_path, {"A": [1.0, 2.0, 3.0]})
    key = json.loads((out / "tiny.sweep.json").read_text())["runs"][0]["key"]
    (out / key / name).write_text(content)
    assert report.main([str(out)]) == 0
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2
    assert message in said[0]
    assert f"move {out / key} and start the sweep again" in said[0]
    assert rows_of(written(out), "A")[0][:3] == ["A", "2 of 3", "2.50 ± 0.71"]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda about: {"runs": 3},
        lambda about: about | {"runs": []},
        lambda about: about | {"report": REPORT | {"curve": 1}},
        lambda about: about | {"runs": [about["runs"][0] | {"published": 0}]},
        lambda about: about | {"runs": [about["runs"][0] | {"published": {"test": {}}}]},
        lambda about: about | {"runs": [about["runs"][0] | {"key": "../../etc"}]},
        lambda about: about | {"runs": [about["runs"][0] | {"panel": 3}]},
        lambda about: about | {"runs": [about["runs"][0] | {"config": []}]},
        lambda about: about | {"title": ["x"]},
        lambda about: about | {"report": REPORT | {"scale": math.nan}},
        lambda about: [],
    ],
)
@pytest.mark.daily(4)
def test_a_damaged_sweep_does_not_hide_another_one(tmp_path, capsys, spoil):
    out = make(tmp_path)
    about = json.loads((out / "tiny.sweep.json").read_text())
    (out / "other.sweep.json").write_text(json.dumps(spoil(about)))
    assert report.main([str(out)]) == 0
    assert "other.sweep.json is damaged" in capsys.readouterr().err
    assert rows_of(written(out), "A")
    (out / "tiny.sweep.json").unlink()
    assert report.main([str(out)]) == 2
    error = capsys.readouterr().err
    assert "other.sweep.json is damaged" in error
    assert error.count("\n") == 1


def test_a_curve_is_made_of_numbers(tmp_path):
    out = make(tmp_path, {"A": [1.0]})
    key = json.loads((out / "tiny.sweep.json").read_text())["runs"][0]["key"]
    with open(out / key / "metrics.jsonl", "a") as file:
        file.write('{"epoch": 3, "test": "low"}\n{"epoch": [4], "test": 1.0}\n')
    ((_, _, _, [(_, (epochs, mean, _), _)]),) = report.picture_data(report.read_sweeps(out, []))
    assert (epochs, mean) == ([1, 2], [11.0, 1.0])


def test_a_sweep_without_a_finished_run_has_a_report_that_says_so(tmp_path):
    out = make(tmp_path, {"A": [None, None]})
    assert report.main([str(out)]) == 0
    assert "No run is finished." in written(out)
    assert not (out / "bars.png").exists()


def test_bad_folders_are_a_sentence(tmp_path, capsys):
    for folder, message in (
        (tmp_path, "has no sweep in or below it"),
        (tmp_path / "nothing", "there is no folder"),
        (tmp_path / ("x" * 300), "File name too long"),
    ):
        assert report.main([str(folder)]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    out = make(tmp_path)
    (tmp_path / "file").write_text("")
    assert report.main([str(out), "--out", str(tmp_path / "file" / "report")]) == 2
    assert "file" in capsys.readouterr().err


def test_a_report_reads_what_a_sweep_writes(tmp_path):
    spec = tmp_path / "tiny.toml"
    spec.write_text(
        'script = "train_vae"\n[fixed]\nvariables = 2\n[grid]\nseed = [0]\n[report]\npanels = ["variables"]\n'
    )
    found = sweep.Specification.read(spec)
    state = sweeps.Sweep(found, found.runs(), tmp_path / "runs", sweep.Flags())
    state.write_manifest()
    assert report.main([str(tmp_path / "runs")]) == 0
    assert "## tiny: variables 2" in written(tmp_path / "runs")
