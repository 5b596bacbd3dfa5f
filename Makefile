# Everything runs in .venv, which the first target makes. The only network it needs is the package registry.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

# Nothing here reads a hub.
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: help install demo test results lint types clean

help:  ## show the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 10

install: $(STAMP)  ## make .venv with kvstack and its tools

# The stamp is older than what it depends on when that has changed; then pip runs again.
# torch comes first and alone, so that no other package can pull in another build of it, and vLLM last, without what it asks for.
$(STAMP): pyproject.toml constraints.txt tests/vllm/requirements.txt tests/vllm/engine.txt
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "kvstack needs Python 3.11 or newer: make PYTHON=...")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[hf,cli,triton,dev]' -r tests/vllm/requirements.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r tests/vllm/engine.txt
	@touch $@

demo: $(STAMP)  ## see what a compressed cache saves
	$(BIN)/kvstack demo

# Two test processes must not fight over threads, and no thread may spin while it waits for a core that is busy.
export OMP_WAIT_POLICY ?= passive
test: export OMP_NUM_THREADS ?= 1
test: lint types  ## all checks and all tests
	$(BIN)/pytest -n 2

results: $(STAMP)  ## make docs/results.md from results/*.json
	$(BIN)/python -m kvstack.eval.report results/*.json > docs/results.md

lint: $(STAMP)  ## style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)  ## static types
	$(BIN)/mypy

clean:  ## remove what make made, .venv too
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis dist out
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
