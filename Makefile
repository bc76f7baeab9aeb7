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

# A worker for each core; the tests of a file stay together, as they share what takes long to make.
test: setup lint
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# The sandbox: a small world whose true reward is known. It is built once, into the user's cache folder; a second
# quickstart replaces the first one's run. No hub, no GPU.
quickstart: setup
	$(BIN)/prefopt sandbox build
	$(BIN)/prefopt check recipes/gpo-sandbox.yaml --pairs 1
	$(BIN)/prefopt train recipes/gpo-sandbox.yaml output_dir=runs/quickstart --overwrite
	$(BIN)/prefopt sandbox score runs/quickstart --show 3 --exact-prompts 8
	@echo "$$WHAT_NEXT"

# Every command of it is run by tests/test_docs.py.
define WHAT_NEXT

What to try next, after `source $(BIN)/activate`. Training takes about a minute each time.

Another loss, and both policies side by side:
  prefopt train recipes/gpo-sandbox.yaml method.loss=squared method.beta=0.25 output_dir=runs/squared
  prefopt sandbox score runs/squared runs/quickstart

Held-out preferences: accuracy, margins and calibration with intervals, what is worth knowing in plain words, and a
report for the browser (docs/evaluation.md):
  prefopt eval runs/quickstart

A weaker and a stronger pull towards the base policy, with a picture of win rate against KL:
  prefopt train recipes/gpo-sandbox.yaml method.beta=0.1 output_dir=runs/beta-0.1
  prefopt train recipes/gpo-sandbox.yaml method.beta=2 output_dir=runs/beta-2
  prefopt sandbox score runs/beta-0.1 runs/quickstart runs/beta-2 --plot runs/kl-win-rate.png

Soft preference optimization: a temperature in place of beta, and a KL on what the policy itself writes (docs/soft.md):
  prefopt train recipes/soft-sandbox.yaml
  prefopt sandbox score runs/soft-sandbox runs/quickstart

A second loss beside DPO: a classifier that tells how much of a reply was removed (docs/self-supervised.md):
  prefopt train recipes/self-supervised-sandbox.yaml
  prefopt sandbox score runs/self-supervised-sandbox runs/quickstart

All of them on the same pairs, and two side by side:
  prefopt compare runs/quickstart runs/squared runs/beta-0.1 runs/beta-2 runs/soft-sandbox
  prefopt sample runs/quickstart --against runs/beta-0.1

Another dimension, from where the quickstart ended:
  prefopt train recipes/gpo-sandbox.yaml model.name_or_path=runs/quickstart dataset.train=sandbox:polite output_dir=runs/polite
  prefopt sandbox score runs/polite --against runs/quickstart

Your own model and data (docs/recipes.md, docs/data.md), and what the sandbox is (docs/sandbox.md):
  prefopt recipe new gpo --output my.yaml
endef
export WHAT_NEXT

clean:
	rm -rf $(VENV) build .mypy_cache .ruff_cache .pytest_cache
