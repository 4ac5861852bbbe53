"""Commands where something that is usually there is missing: streams, a home directory, a locale, docstrings."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[1] / "scripts"

# name: (variables of the environment, None for none; redirections; exit code)
ENVIRONMENTS = {
    "python -OO": ({"PYTHONOPTIMIZE": "2"}, "", 0),
    "unbuffered": ({"PYTHONUNBUFFERED": "1"}, "", 0),
    "safe path": ({"PYTHONSAFEPATH": "1"}, "", 0),
    "Jupyter": ({"MPLBACKEND": "module://matplotlib_inline.backend_inline"}, "", 0),
    "no stdin": ({}, "<&-", 0),
    "no stdout": ({}, ">&-", 0),
    "no stderr": ({}, "2>&-", 0),
    "no streams": ({}, "<&- >&- 2>&-", 0),
    "full stderr": ({}, "2>/dev/full", 0),
    "full stdout": ({}, ">/dev/full", 2),
    "full stdout, unbuffered": ({"PYTHONUNBUFFERED": "1"}, ">/dev/full", 2),
    "full streams": ({"PYTHONUNBUFFERED": "1"}, ">/dev/full 2>/dev/full", 2),
    "no home": ({"HOME": None}, "", 0),
    "a home that cannot be written": ({"HOME": "/proc"}, "", 0),
    "the C locale": ({"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, "", 0),
    "no folder for temporary files": ({"TMPDIR": "/nonexistent"}, "", 0),
}
VAE = "train_vae.py --epochs 1 --hidden 4 --variables 1 --categories 2 --batch 200 --out OUT"
LISTOPS = "train_listops.py --epochs 1 --generate 60 --dim 8 --hidden 8 --max-length 15 --batch 8 --out OUT"
RUN_SWEEP = "sweep.py sweep.toml --workers 1 --out OUT"
COMMANDS = (
    VAE,
    LISTOPS,
    "train_structured.py --epochs 1 --variables 4 --samples 5 --batch 200 --out OUT",
    "train_semi_supervised.py --epochs 1 --hidden 8 --latent 2 --images 250 --labels 20 --out OUT",
    "train_conditional.py --epochs 1 --experts 20 --gater 8 --batch 200 --out OUT",
    "train_quantised.py --epochs 1 --hidden 8 --batch 200 --out OUT",
    "train_constraints.py --epochs 1 --examples 60 --out OUT",
    "polynomial.py --epochs 1 --steps 5 --out OUT",
    "coarse_gradient.py --steps 5 --starts 2 --out OUT",
    "check_estimator.py st --budget 0.1 --out OUT",
    "measure_gradients.py --images 5 --estimators st-gs --samples 40 --taus 1 --out OUT",
    "evaluate_listops.py LISTOPS sequences.tsv --trees 1",
    "draw_curves.py VAE --metric test --out OUT.png",
    RUN_SWEEP,
    "report.py SWEEP --out OUT",
    "bench.py ops --rounds 1 --seconds 0.01",
    "minimal_vae.py",
    "train_spiking.py --epochs 1 --hidden 8 --steps 2 --batch 200 --out OUT",
)
SWEEP = """
title = "tiny"
script = "train_vae"
[report]
metrics = ["test"]
curve = "test"
[fixed]
epochs = 1
hidden = [4]
variables = 1
categories = 2
[grid]
seed = [0]
"""


def run(folder, command, variables, redirections):
    env = {k: v for k, v in (os.environ | variables).items() if v is not None}
    line = f"{sys.executable} {SCRIPTS}/{command} {redirections}"
    return subprocess.run(line, shell=True, capture_output=True, text=True, cwd=folder, env=env, check=False)


def together(*names):
    """Several environments in one."""
    return {k: v for name in names for k, v in ENVIRONMENTS[name][0].items()}


BARE = together("safe path", "Jupyter", "no home", "the C locale", "no folder for temporary files")


def test_a_run_in_a_bare_environment(tmp_path):
    ran = run(tmp_path, VAE.replace("OUT", "run"), BARE, "<&- >&- 2>&-")
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")
    files = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    assert {"config.json", "metrics.jsonl", "checkpoint.safetensors", "curve.png", "samples.png"} <= files.keys()
    assert all(b"step" not in files[name] for name in ("config.json", "metrics.jsonl"))  # nor a bar of progress


@pytest.mark.parametrize(("flags", "unbuffered"), [("--help", ""), ("--help", "1"), ("--epochs 0", "1")])
def test_a_full_standard_output_is_one_sentence(tmp_path, flags, unbuffered):
    ran = run(tmp_path, f"train_vae.py {flags}", {"PYTHONUNBUFFERED": unbuffered}, ">/dev/full")
    full = "the standard output cannot be written (No space left on device)"
    said = full if flags == "--help" else "--epochs must be at least 1, got 0"
    assert (ran.returncode, ran.stderr) == (2, f"train_vae.py: error: {said}.\n")


@pytest.mark.parametrize("redirection", ["2>&-", "2>/dev/full"])
def test_an_error_that_cannot_be_said_is_one_still(tmp_path, redirection):
    ran = run(tmp_path, "train_vae.py --epochs 0", together("python -OO"), redirection)
    assert (ran.returncode, ran.stdout) == (2, "")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a run of each kind that other commands want."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "sequences.tsv").write_text("3\t( ( ( [MAX 2 ) 3 ) ] )\n")
    (folder / "sweep.toml").write_text(SWEEP)
    for name, command in (("VAE", VAE), ("LISTOPS", LISTOPS), ("SWEEP", RUN_SWEEP)):
        ran = run(folder, command.replace("OUT", name), {}, "")
        assert ran.returncode == 0, ran.stderr
    return folder


SILENT = ("draw_curves.py",)  # they print nothing, so that a full disk does not matter
PAGE = ("minimal_vae.py",)  # it is a page: what cannot be printed is a traceback


@pytest.mark.slow
@pytest.mark.parametrize("environment", ENVIRONMENTS)
@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.split()[0])
def test_every_command_in_every_environment(made, tmp_path, command, environment):
    variables, redirections, code = ENVIRONMENTS[environment]
    name = command.split()[0]
    if code and name in PAGE:
        pytest.skip("a page without commands' ways")
    shutil.copytree(made, tmp_path / "made")
    ran = run(tmp_path / "made", command.replace("OUT", "new"), variables, redirections)
    assert ran.returncode == (0 if name in SILENT else code), ran.stderr
    assert "Traceback" not in ran.stderr
    assert "Exception ignored" not in ran.stderr
    if code and ran.returncode and "2>" not in redirections:
        last = ran.stderr.splitlines()[-1]
        assert last == f"{name}: error: the standard output cannot be written (No space left on device)."


def test_without_numpy_a_command_says_what_to_install():
    code = "import sys, runpy; sys.modules['numpy'] = sys.modules['scipy'] = None; sys.argv = sys.argv[1:]; "
    code += "runpy.run_path(sys.argv[0], run_name='__main__')"
    command = [sys.executable, "-c", code, str(SCRIPTS / "train_vae.py")]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    message = "train_vae.py: error: numpy, scipy not found: pip install -e '.[scripts]'.\n"
    assert (ran.returncode, ran.stderr) == (2, message)
