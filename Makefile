# Everything a person does here, in one place. `make help` lists it.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
ARGS ?=

.PHONY: help install serve demo weights test test-long faults check fix bench clean

help: ## list what can be made
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; set PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.serve: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) install -c constraints.txt -e .
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt $(VENV)/.serve
	$(PIP) install -c constraints.txt -e '.[dev]'
	@touch $@

install: $(VENV)/.dev ## set up the environment for development

serve: $(VENV)/.serve ## set up what is missing and serve on http://127.0.0.1:8000
	@exec $(BIN)/hope serve $(ARGS)

demo: $(VENV)/.serve ## tell, read, kill, restart, ask: in under two minutes
	@exec $(BIN)/hope demo $(ARGS)

weights: $(VENV)/.serve ## fetch the default model into the cache
	$(BIN)/hope models

# one thread: the tests' models are tiny, and threads that wait for each other are slower
test: $(VENV)/.dev weights ## run the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(ARGS)

test-long: $(VENV)/.dev weights ## run the tests that take minutes
	$(BIN)/python -m pytest -m long $(ARGS)

FAULTS ?= --kills 500 --partitions 200 --seed 7
faults: $(VENV)/.dev ## kill, cut and refill 700 times, then the tests of faults that take minutes
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.faults.random_kills $(FAULTS)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m long tests/faults tests/memory_store tests/tools $(ARGS)

check: $(VENV)/.dev ## formatting, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/hadolint Dockerfile

fix: $(VENV)/.dev ## let the tools mend what they can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.dev weights ## measure this machine
	$(BIN)/python -m benchmarks $(ARGS)

clean: ## remove the environment and what tools left
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
