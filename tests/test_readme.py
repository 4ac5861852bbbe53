"""The README is true: its example runs, its table is current, its map names what exists."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import github_markdown
from estimators import ESTIMATORS
from tools import estimator_table

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
GUIDE = (ROOT / "estimators" / "README.md").read_text()


def example() -> str:
    return re.search(r"```python\n(.*?)```", README, re.DOTALL).group(1)


def test_the_example_runs_and_learns(tmp_path):
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", example()], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert result.returncode == 0, result.stderr
    probabilities = [float(x) for x in re.findall(r"\d\.\d*", result.stdout)]
    assert len(probabilities) == 4
    assert probabilities[2] > 0.9


def test_the_audit_in_the_readme_is_what_audit_prints(tmp_path):
    backward = "    loss.mean().backward()"
    code = "from minigrad.check import audit\n" + example().replace(
        backward, "    print(audit(loss.mean()))\n" + backward
    )
    (tmp_path / "example.py").write_text(code)
    result = subprocess.run([sys.executable, tmp_path / "example.py"], capture_output=True, text=True, check=True)
    shown = re.search(r"```\n(op +created at.*?)```", README, re.DOTALL).group(1).splitlines()
    printed = result.stdout.splitlines()[: len(shown)]  # of the first step
    columns = lambda line: [c for i, c in enumerate(re.split(r"  +", line)) if i != 3]  # the errors may differ
    assert list(map(columns, shown)) == list(map(columns, printed))


def test_the_estimator_table_is_current():
    text = (ROOT / estimator_table.GUIDE).read_text()
    assert estimator_table.with_table(text) == text, "run python scripts/tools/estimator_table.py --write"


def test_the_field_guide_has_a_section_for_every_estimator():
    headings = re.findall(r"^### (.*)$", GUIDE, re.MULTILINE)
    named = [name for heading in headings for name in re.findall(r"`([\w.-]+)`", heading)]
    assert sorted(named) == sorted(ESTIMATORS)
    for section in re.split(r"^### ", GUIDE, flags=re.MULTILINE)[1:]:
        heading = section.splitlines()[0]
        if "`" in heading:  # the section of an estimator
            assert "`test_" in section, heading
            assert "```math" in section, heading


def test_the_readme_names_every_estimator_in_its_chapter():
    chapters = {}
    for chapter in re.split(r"^## ", GUIDE, flags=re.MULTILINE)[1:]:
        names = re.findall(r"^### (.*) — ", chapter, re.MULTILINE)
        if names:
            anchor = github_markdown.slug(chapter.splitlines()[0])
            chapters[anchor] = sorted(re.findall(r"`([^`]+)`", " ".join(names)))
    rows = re.findall(r"^\| \[[^\]]*\]\(estimators/README.md#([\w-]+)\) \| (.*) \|$", README, re.MULTILINE)
    assert {anchor: sorted(re.findall(r"`([^`]+)`", names)) for anchor, names in rows} == chapters


@pytest.mark.parametrize("path", re.findall(r"`((?:minigrad|estimators|models|scripts|tests)/[\w/.]*)`", README))
def test_what_the_readme_names_exists(path):
    assert (ROOT / path).exists()


def test_the_package_lists_every_package():
    text = (ROOT / "pyproject.toml").read_text()
    listed = set(re.search(r"^packages = \[(.*?)\]", text, re.MULTILINE).group(1).replace('"', "").split(", "))
    found = {
        ".".join(p.parent.relative_to(ROOT).parts)
        for d in ("minigrad", "estimators", "models")
        for p in (ROOT / d).rglob("*.py")
    }
    assert listed == found
