# Every target makes .venv ready by itself, and again only when what it is made from has changed.
# Needs python3 (3.11 or newer), a C and C++ compiler and make. Another Python: make PYTHON=python3.13 ...

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help demo shell test check bench soak clean

help:  ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 16

$(READY): pyproject.toml .ci/install.py .ci/constraints.txt .ci/llama.cmake
	@$(PYTHON) .ci/install.py $(VENV)
	@touch $@

demo: $(READY)  ## several processes on the built-in model, in under a minute
	@$(BIN)/llmos -f examples/tour.llm

shell: $(READY)  ## the interactive shell
	@$(BIN)/llmos

check: $(READY)  ## lint, format, types, floors
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

test: check  ## check, then every test
	@$(BIN)/pytest --durations=8 --durations-min=0.5

bench: $(READY)  ## speed, as ratios measured in one run
	@$(BIN)/llmos bench throughput
	@$(BIN)/llmos bench interactive
	@$(BIN)/llmos bench shares
	@$(BIN)/llmos bench fork
	@$(BIN)/llmos bench kill
	@$(BIN)/llmos bench boot

soak: $(READY)  ## the long campaigns
	@$(BIN)/pytest -m soak

clean:  ## remove .venv and caches (pip keeps the compiled llama.cpp)
	@rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache build dist tour.ckpt
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
