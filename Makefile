# Every target builds .venv first if it is missing or older than pyproject.toml; nothing needs to be installed beforehand but Python >= 3.10.
PYTHON ?= python3
VENV ?= .venv
ARGS ?=
# pytest-xdist workers; 0 runs the tests in one process (for a debugger).
WORKERS ?= auto

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -n $(WORKERS) --dist worksteal --durations=15 --durations-min=2

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help install train eval test test-slow lint format bench evidence docs clean

help: ## show this list
	@awk 'BEGIN { FS = ":.*## " } /^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))
	@printf '\nVariables: PYTHON=%s  VENV=%s  WORKERS=%s (test processes)  ARGS="hydra overrides or pytest arguments"\n' '$(PYTHON)' '$(VENV)' '$(WORKERS)'
	@printf 'Example:   make train ARGS="model=mobilenet_v1 condconv.experts=4"\n'

install: $(STAMP) ## create .venv and install everything into it

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 10) else "condconv needs Python >= 3.10, $(PYTHON) is " + sys.version.split()[0] + "; use make PYTHON=python3.12")'
	@echo "Installing into $(VENV): a few minutes, several GB (torch brings its CUDA libraries on Linux) ..."
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[train,dev,export,fast]'
	@touch $(STAMP)

# pipefail is said here too, since make 3.81 (macOS) knows no .SHELLFLAGS; tee -i: Ctrl-C is for the training, which saves.
# At a terminal the two variables let rich draw its bar through the pipe (FORCE_COLOR: rich below 14).
train: $(STAMP) ## train (embedded digits unless ARGS says otherwise), then evaluate the saved checkpoint
# Help and sweeps name no checkpoint to evaluate.
ifneq ($(filter -m --multirun -h --help --hydra-help -c --cfg% -i --info%,$(ARGS)),)
	@$(BIN)/python train.py $(ARGS)
else
	@set -euo pipefail; said=$$(mktemp); trap 'rm -f "$$said"' EXIT; \
	if [ -t 1 ]; then export TTY_COMPATIBLE=1 FORCE_COLOR=1; fi; \
	PYTHONUNBUFFERED=1 $(BIN)/python train.py $(ARGS) | tee -i "$$said"; \
	ckpt=$$(sed -n 's/^  last checkpoint  *//p' "$$said" | tail -n 1); \
	if [ ! -f "$$ckpt" ]; then \
		echo 'error: train.py named no last checkpoint, so there is none to evaluate: make eval ARGS="ckpt=..."' >&2; exit 1; \
	fi; \
	printf '\nEvaluating the checkpoint, rebuilt from its own folder: make eval ARGS="ckpt=%s"\n' "$$ckpt"; \
	$(BIN)/python eval.py "ckpt='$$ckpt'"; \
	printf 'Checkpoints, metrics.csv and config.yaml: %s\n' "$$(dirname "$$(dirname "$$ckpt")")"
endif

eval: $(STAMP) ## evaluate a checkpoint: make eval ARGS="ckpt=outputs/.../last.ckpt"
	@$(BIN)/python eval.py $(ARGS)

test: $(STAMP) ## run the test suite
	@$(PYTEST) $(ARGS)

test-slow: $(STAMP) ## run the test suite with the tests that take minutes
	@$(PYTEST) --slow --timeout=1800 $(ARGS)

lint: $(STAMP) ## check style, formatting and types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: $(STAMP) ## repair style and formatting in place
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

bench: $(STAMP) ## measure networks and layers on this machine (ARGS=--quick to see it work); an interrupted run continues
	@$(BIN)/python -m benchmarks.networks $(ARGS)
	@$(BIN)/python -m benchmarks.layers $(ARGS)

evidence: $(STAMP) ## rerun the studies on CIFAR-10 and write their report: ARGS="data.root=/cifar10"; --dry-run lists them
	@$(BIN)/python -m sweeps.evidence $(ARGS)

docs: $(STAMP) ## redraw the picture and recompute the table of README.md
	@$(BIN)/python docs/figures/make_idea.py
	@$(BIN)/python docs/backbone_table.py

clean: ## remove caches and builds; keeps .venv and outputs
	@rm -rf build dist .pytest_cache .mypy_cache .ruff_cache *.egg-info
	@find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
