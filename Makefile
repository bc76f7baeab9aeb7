# `make quickstart` and `make test` work on a fresh clone with Python 3.11 or newer and nothing else.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

.PHONY: setup test lint format quickstart clean

setup: $(READY)

# torch first and pinned: any other order may pull another build of several gigabytes.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet "$$(grep '^torch==' constraints.txt)"
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

test: setup lint
	$(BIN)/python -m pytest

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# A tiny random model and made-up pairs, written into build/quickstart: no hub, no GPU, about a minute.
quickstart: setup
	$(BIN)/python -m tests.tiny build/quickstart
	$(BIN)/prefopt check recipes/gpo-quickstart.yaml
	$(BIN)/prefopt train recipes/gpo-quickstart.yaml --overwrite

clean:
	rm -rf $(VENV) build .mypy_cache .ruff_cache .pytest_cache
