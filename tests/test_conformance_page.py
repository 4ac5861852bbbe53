"""The table about published code: what is judged, what cannot be, and where the table goes. No package is needed."""

import importlib
import sys
from pathlib import Path

import pytest

from estimators.checks import invariances
from estimators.checks.adapters import Adapter
from estimators.conformance import from_estimator

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts" / "tools"))
page = importlib.import_module("conformance_page")


def missing():
    raise ImportError("No module named 'nowhere'")


def nothing(logits, cost, seed):
    return logits, logits * float("nan")


@pytest.fixture
def entries(monkeypatch):
    """One that is right, one that is not installed, one that gives nothing, one that has no checkout."""
    monkeypatch.setattr(invariances, "SMALL_BATCHES", 0.1)
    made = [
        page.Published("numpy", "st", lambda: from_estimator("st"), claim="linear"),
        page.Published("nowhere", "lost", missing),
        page.Published("numpy", "empty", lambda: Adapter(nothing)),
        page.Published("gst", "elsewhere", lambda folder: None, checkout=True),
    ]
    monkeypatch.setattr(page, "ALL", made)
    return made


def test_each_has_a_row_with_its_verdicts_or_the_reason_why_not(entries, capsys, tmp_path):
    assert page.main(["--budget", "0.2", "--reports", str(tmp_path)]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    st, lost, empty, elsewhere = rows[2:6]
    assert "Sample by sample it is `st`" in st
    assert "No bias was seen for linear costs; biased for quadratic ones." in st
    assert "not tried: ImportError: No module named 'nowhere'" in lost
    assert "nothing to judge: empty gives no finite number" in empty
    assert "not tried: no checkout was given (--checkout gst=DIR)" in elsewhere
    assert len(rows) == 2 + len(entries) + len(page.NOT_TRIED)
    assert len(list(tmp_path.iterdir())) == len(entries)


def test_the_table_goes_between_its_marks(entries, monkeypatch, tmp_path, capsys):
    path = tmp_path / "page.md"
    path.write_text(f"before\n{page.BEGIN}\nold\n{page.END}\nafter\n")
    monkeypatch.setattr(page, "PAGE", path)
    assert page.main(["--budget", "0.2", "--only", "lost", "--write"]) == 0
    text = path.read_text()
    assert text.startswith(f"before\n{page.BEGIN}\n| package")
    assert text.endswith(f"|\n{page.END}\nafter\n")
    assert "old" not in text


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--only nobody", "nothing has 'nobody' in its name"),
        ("--budget 0", "--budget must be positive"),
        ("--checkout gst", "--checkout is NAME=DIR with NAME in gst, got 'gst'"),
        ("--checkout disarm=.", "--checkout is NAME=DIR"),
        ("--checkout gst=/nowhere", "there is no folder /nowhere"),
    ],
)
def test_bad_input_is_one_sentence(flags, words, capsys):
    assert page.main(flags.split()) == 2
    assert words in capsys.readouterr().err
