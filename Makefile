# Each target sets itself up on a fresh machine: Python >= 3.11 and pip are enough.
PYTHON ?= python3
CONFIG ?= configs/digits.yaml
VENV := .venv
BIN := $(VENV)/bin

.PHONY: setup train test test-gpu defects lint types fmt check clean

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Python >= 3.11 is needed: make PYTHON=python3.11"'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

train: setup
	bin/dpsgd-train $(CONFIG)

test: setup
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile

test-gpu: setup
	$(BIN)/python -m pytest -m gpu

defects: setup
	$(BIN)/python tests/planted_defects.py --write

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

fmt: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

check: lint types test

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
