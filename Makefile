# `make help` lists what there is. Everything runs in .venv, which the first target makes.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
# The CPU build is enough for the sample; on a machine with a GPU: make train TORCH=torch
TORCH  ?= torch==2.13.0
CORES  ?= $(shell getconf _NPROCESSORS_ONLN)
RECIPE ?= quickstart

.DEFAULT_GOAL := help
.PHONY: help setup train test test-slow check format wheel clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

$(VENV)/installed: setup.py constraints.txt Makefile
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	@touch $@

setup: $(VENV)/installed  ## make .venv and install the package with its tools

train: $(VENV)/installed  ## learn the embedded sample's tasks, or go on with them (RECIPE=… for another run)
	$(BIN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
		--num_cpu_threads_per_process $(CORES) \
		-m hf_zocl train --recipe $(RECIPE) --resume $(ARGS)

test: $(VENV)/installed  ## the tests, without the slow ones, one process a core
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(CORES) --dist loadfile

test-slow: $(VENV)/installed  ## the slow tests, one process a core
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow -n $(CORES) --dist loadfile

check: $(VENV)/installed  ## lint, format, types and the import floors
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/installed  ## let ruff rewrite the files
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

wheel: $(VENV)/installed  ## build dist/*.whl
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .

clean:  ## remove .venv, runs and build leftovers
	rm -rf $(VENV) runs build dist *.egg-info
