# Two commands set everything up: `make train` and `make test`. The README has the plain pip commands.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: train test lint clean

.venv/.scripts: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --editable '.[scripts]'
	touch $@

.venv/.test: .venv/.scripts
	$(BIN)/pip install --quiet --editable '.[test]'
	touch $@

.venv/.dev: .venv/.test
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@

train: .venv/.scripts  ## train a categorical VAE on the embedded digits
	$(BIN)/python scripts/train_vae.py $(ARGS)

test: .venv/.test  ## the quick test suite
	$(BIN)/python -m pytest $(ARGS)

lint: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv build *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
