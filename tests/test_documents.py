"""All documents: formulas that GitHub shows as they are written, links that lead somewhere, names that exist."""

import re
import subprocess
import tomllib
from pathlib import Path

import pytest

import github_markdown

ROOT = Path(__file__).parents[1]


def documents():
    """Every Markdown file of the project, by its path from the root."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
    if not listed:  # no repository: what a source archive holds
        listed = [str(p.relative_to(ROOT)) for folder in (".", "*") for p in ROOT.glob(f"{folder}/*.md")]
    return sorted(set(listed))


def read(file):
    return (ROOT / file).read_text(encoding="utf-8")


def test_the_documents_are_found():
    assert {"README.md", "CONTRIBUTING.md", "CHANGELOG.md"} <= set(documents())
    assert {"estimators/README.md", "models/README.md"} <= set(documents())


# ---- formulas


@pytest.mark.parametrize("file", documents())
def test_github_shows_the_formulas_as_they_are_written(file):
    assert github_markdown.formula_faults(read(file)) == []


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (r"a $x\,y$ b", "the backslash of"),
        (r"a $x\;y$ b", "backslash"),
        (r"a $x\!y$ b", "backslash"),
        (r"a $x\:y$ b", "backslash"),
        (r"$\{x\}$", "backslash"),
        (r"$\|x\|$", "backslash"),
        (r"$a\_b$", "backslash"),
        (r"$50\%$", "backslash"),
        (r"$a \\ b$", "backslash"),
        (r"$\begin{pmatrix} a \\ b \end{pmatrix}$", "backslash"),
        ("$$\na \\\\\nb\n$$", "backslash"),
        ("$$x\\,y$$", "backslash"),
        ("# On $x\\,y$", "backslash"),
        ("$a \\\nb$", "backslash"),
        ("- an item with $x\\,y$\n", "backslash"),
        ("> quoted $x\\,y$\n", "backslash"),
        ("* one\n\n    $x\\,y$ in the second paragraph of an item", "backslash"),
        (r"nodes $x'_i = s_{i}$ and $x_{i+1}$", "_ makes emphasis"),
        ("$\\hat{a}_{b}$ and $\\hat{c}_{d}$", "_ makes emphasis"),
        ("$$\n\\theta'_i + x_{j}\n$$", "_ makes emphasis"),
        ("$a^*$ and $b^*$", r"\* makes emphasis"),
        ("$a*b*c$", r"\* makes emphasis"),
        ("*so $a*$ ends it early", r"\* makes emphasis"),
        ("$a ~b~ c$", "~ makes emphasis"),
        ("$a<b$", "begins a tag"),
        ("$x <y> z$", "begins a tag"),
        ("$x </b$", "begins a tag"),
        ("$[a, b](x)$", "make a link"),
        ("$a &lt; b$", "an entity"),
        ("$a `b` c$", "backtick"),
        ("| a | b |\n| --- | --- |\n| $|x|$ | y |", "a bar in a row"),
        ("| a | b |\n| --- | --- |\n| $\\|x\\|$ | y |", "a bar in a row"),
        ("| a | b |\n| --- | --- |\n| $`|x|`$ | y |", "a bar in a row"),
        ("| $P(a|b)$ | b |\n| --- | --- |\n| x | y |", "a bar in a row"),
        ("a$x$", "opens no formula after 'a'"),
        ("2$x$", "opens no formula after '2'"),
        ("degree-$d$", "opens no formula after '-'"),
        ("$n$th", "closes no formula before 't'"),
        ("$n$2", "closes no formula before '2'"),
        ("a$`x`$", "touches a letter"),
        ("$`n`$th", "touches a letter"),
        ("$ x $", "a space inside"),
        ("$x $", "a space inside"),
        ("costs $5", "without another"),
        ("$x$ and $y", "without another"),
        ("$x\n\ny$", "without another"),
        ("$x$$y$", "two dollars"),
        (r"$\mathbb{E}_{x}[f]$ and $\mathbb{E}_{y}[g]$", "_ makes emphasis"),
        ("$$\na\n- b\n$$", "without another"),
        ("$$\nx$", "without another"),
        ("```math\nx", "not closed"),
        ("```math\n\\frac{a}{b\n```", "braces"),
        ("$`\\frac{a`$", "braces"),
        ("```math\n\\left( x\n```", "without"),
        ("```math\n\\begin{aligned} a\n```", "without"),
        ("$\\operatorname{Var} x$", "refuses"),
    ],
)
def test_a_formula_that_github_would_change_is_found(text, fault):
    for surroundings in ("{}", "# Title\n\nText before.\n\n{}", "{}\n\nText after, with $x$ in it.\n"):
        if not text.startswith("```math\nx"):  # an open fence swallows what follows
            assert re.search(fault, "\n".join(github_markdown.formula_faults(surroundings.format(text)))), text
    assert re.search(fault, "\n".join(github_markdown.formula_faults(text)))


@pytest.mark.parametrize(
    "text",
    [
        "no formula",
        "$x$, $y$; ($z$) and $w$-th: $n$ **$m$** *$k$*",
        r"$a_i + b_j$, $x_{i}$ and $\hat a_i^{(k)}$",
        r"$\lbrace 0, 1 \rbrace$, $\lVert x \rVert$, $p(x \mid y)$, $a \lt b$",
        "$a < b$ and $b > a$",
        "$a^\\ast$ and $b^\\ast$",
        r"$`x\,y`$ and $`x'_i`$ and ($`\{0, 1\}`$)",
        "```math\nx\\,y \\\\\nx'_i = s_{i} < z\n```",
        "- an item\n\n  ```math\n  a \\\\ b\n  ```\n",
        "````\n```math\n$x\\,y\n```\n````",
        "$$\nx_i = \\frac{a}{b}\n$$",
        "text\n$$x = y$$\ntext",
        "`$x\\,y$` and ``$`x\\,y`$``",
        "```bash\necho $HOME $OUT\n```",
        "text\n\n    echo $HOME\n    cost=$5\n\ntext",
        r"it costs \$5",
        "| a | b |\n| --- | --- |\n| $\\lvert x \\rvert$ | $p(a \\mid b)$ |",
        "| a | b |\n| --- | --- |\n| $x$ | $y$ |\n\n*also* _this_ $z$",
        "a [link](some_file_name.md) and *emphasis* and $x_i$ and [another_one](b_c_d.md)",
        "<!-- $ in a comment -->\n\n$x$",
        "`a_b` *c* $x_{ij} y_{ij}$ and 2 * 3 * 4",
        "a line that ends in $x$\n$y$ begins the next",
        "a formula $x +\ny$ over two lines",
    ],
)
def test_a_formula_that_arrives_as_it_is_written_is_left_alone(text):
    assert github_markdown.formula_faults(text) == []


# ---- links


@pytest.mark.parametrize("file", documents())
def test_every_link_leads_somewhere(file):
    assert dead_links(file, read(file)) == []


def dead_links(file, text):
    """The relative links of a document to files or headings that do not exist."""
    dead = []
    for target in github_markdown.links(text):
        if re.match(r"[a-z][a-z0-9+.-]*:", target):  # another site
            continue
        path, _, anchor = target.partition("#")
        there = (ROOT / file).parent / path if path else ROOT / file
        headings = lambda path=path, there=there: github_markdown.anchors(
            there.read_text(encoding="utf-8") if path else text
        )
        if not there.exists() or (anchor and anchor not in headings()):
            dead.append(target)
    return dead


def test_a_dead_link_is_found():
    text = "# A heading, twice: `x`\n\n# B\n\n# B\n\n{}"
    row = "| a |\n| - |\n| [x](none.md) |"
    for link in ("[x](none.md)", "![x](none.png)", "[x](#none)", "[x](#b-2)", "[x](README.md#none)", row):
        assert dead_links("README.md", text.format(link)) != [], link
    for link in ("[x](README.md)", "[x](#b-1)", "[x](#a-heading-twice-x)", "[x](https://none)", "`[x](none)`"):
        assert dead_links("README.md", text.format(link)) == [], link


# ---- names


def test_the_tests_that_are_named_exist():
    sources = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("test_*.py"))
    exist = set(re.findall(r"^def (test_\w+)", sources, re.MULTILINE))
    for file in documents():
        named = set(re.findall(r"`(test_\w+)`", read(file)))
        assert named <= exist, f"{file} names tests that do not exist"


def test_the_short_answers_are_those_that_are_tested():
    """Each answer names a test of test_answers.py, and each of its tests is named there."""
    chapter = re.search(r"^## Short answers$(.*?)^## ", read("estimators/README.md"), re.MULTILINE | re.DOTALL)[1]
    named = re.findall(r"`(test_\w+)`", chapter)
    assert sorted(named) == sorted(re.findall(r"^def (test_\w+)", read("tests/test_answers.py"), re.MULTILINE))
    assert len(named) == len(re.findall(r"^\*\*.*\?\*\*", chapter, re.MULTILINE))


@pytest.mark.parametrize("file", ["README.md", "CONTRIBUTING.md"])
def test_the_files_that_are_named_exist(file):
    text = github_markdown.without_code(read(file))
    for path in re.findall(r"`((?:minigrad|estimators|models|scripts|tests)/[\w/.]*)`", text):
        assert (ROOT / path).exists() or re.search("[A-Z]{2}", path), path  # NAME stands for any


# ---- the citation


def test_the_citation_says_what_the_package_says():
    text, package = read("CITATION.cff"), tomllib.loads(read("pyproject.toml"))["project"]
    keys = re.findall(r"^([a-z-]+):", text, re.MULTILINE)
    assert len(keys) == len(set(keys))
    assert {"cff-version", "message", "title", "authors"} <= set(keys)  # what the format requires
    field = lambda key: re.search(rf'^{key}: "?(.*?)"?$', text, re.MULTILINE)[1]
    assert field("cff-version") == "1.2.0"
    assert field("type") == "software"
    assert field("version") == package["version"]
    assert field("license") == package["license"]
    assert package["authors"] == [{"name": name} for name in re.findall(r'^  - name: "(.*)"$', text, re.MULTILINE)]
    assert "\t" not in text
