SHELL := /bin/bash
.DEFAULT_GOAL := help
# A default only: threads beyond the cores of a small machine make everything slower.
export OMP_NUM_THREADS ?= 2
export MKL_NUM_THREADS ?= $(OMP_NUM_THREADS)
# For scripts/setup.sh: the interpreter, and more arguments for pip install.
export PYTHON PIP_ARGS
BIN := .venv/bin
PYTEST_ARGS ?=

.PHONY: help setup demo test check format clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z%-]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: ## make .venv and install Lamina into it (the other targets do this by themselves)
	@bash scripts/setup.sh

demo: setup ## compress the shipped LeNet-5 on the shipped digits into runs/demo
	$(BIN)/lamina compress lenet-5 --data mnist-10k --size 1% -o runs/demo

test: setup ## run the tests and the examples in the docstrings
	@$(BIN)/python -m pytest $(PYTEST_ARGS)

check: setup ## format, lint, types, import order, line budget
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python scripts/check_lines.py

format: setup ## lay out the code and mend what lint can mend
	$(BIN)/ruff check --fix-only --quiet .
	$(BIN)/ruff format .

bench-%: setup ## run one benchmark, e.g. make bench-lenet-5
	$(BIN)/python benchmarks/$*/run.py

clean: ## remove .venv, caches and runs
	rm -rf .venv build dist runs src/*.egg-info .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find src tests scripts -name __pycache__ -type d -prune -exec rm -rf {} +
