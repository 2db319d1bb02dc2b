# Two commands for a newcomer: `make demo` and `make test`. Each sets up .venv with every extra first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
URL ?= memory://demo

.PHONY: help venv demo test check bench brokers clean

help:  ## List the targets.
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/'

$(VENV)/.made: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet --editable ".[all]" --group dev
	touch $@

venv: $(VENV)/.made  ## Make .venv with the project in it, every extra and the tools.

demo: venv  ## Run the demonstration; URL=redis://… runs it on another broker.
	$(BIN)/unistream demo "$(URL)"

check: venv  ## Lint, types, who may import whom, unit tests.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/pytest -q tests/unit

test: check  ## Everything, on real brokers: URLs from the environment, else Docker, else local servers.
	$(BIN)/python -m tests.brokers run -- $(BIN)/pytest -q -n 3 --dist loadfile tests --ignore tests/unit

bench: venv  ## unistream against the bare clients, in one run, as ratios.
	$(BIN)/python -m tests.brokers run -- $(BIN)/python -m benchmarks

clean:  ## Remove .venv and caches.
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
