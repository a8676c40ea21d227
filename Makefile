# Everything a newcomer needs: make demo, make test. The environment lies in .venv.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help install model demo serve stop test fuzz lint format bench clean

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
LLAMA := $(shell sed -n 's/.*"\(llama-cpp-python==[0-9.]*\)".*/\1/p' pyproject.toml)
# llama.cpp is compiled for this very processor, so the cached wheel is kept apart per processor.
CPU := $(shell uname -m)-$(shell (grep -m1 ^flags /proc/cpuinfo 2>/dev/null || uname -v) | cksum | cut -d' ' -f1)
WHEELS := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/causeway/wheels/$(CPU)

help:  ## this list
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/make \1 \t\2/p' Makefile | expand -t 16

install: .venv/installed  ## build .venv with both sides and the tools (compiles llama.cpp once, about 5 minutes)

.venv/installed: pyproject.toml Makefile
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@mkdir -p "$(WHEELS)"
	@if ! compgen -G "$(WHEELS)/llama_cpp_python-$(lastword $(subst ==, ,$(LLAMA)))-*.whl" >/dev/null; then \
	  echo "Compiling $(LLAMA) for this processor: about 5 minutes, once; kept in $(WHEELS)"; \
	  $(BIN)/pip wheel --disable-pip-version-check -v --no-deps -w "$(WHEELS)" $(LLAMA) 2>&1 | tee "$(WHEELS)/build.log" \
	    | awk '/\[[0-9]+\/[0-9]+\]/ { match($$0, /\[[0-9]+\/[0-9]+\]/); printf "\r  %s compiled", substr($$0, RSTART, RLENGTH); fflush() } END { print "" }' \
	    || { tail -n 40 "$(WHEELS)/build.log"; exit 1; }; \
	fi
	@echo "Installing Causeway and its libraries into .venv"
	@$(BIN)/pip install --disable-pip-version-check -q --find-links "$(WHEELS)" -e ".[edge,cloud,dev]" 2>&1 | (grep -v -e '^WARNING: Location' || true)
	@touch $@

model: install  ## fetch the demo model, SmolLM2-135M (98 MB), with a checksum
	@$(BIN)/edge-agent pull smollm2:135m

demo: model  ## watch prompts being answered on the device and in the cloud; leaves nothing running
	@$(BIN)/python deploy/local.py demo

serve: model  ## start both sides in the background: edge on 8484, cloud on 8585
	@$(BIN)/python deploy/local.py serve

stop:  ## stop what `make serve` started
	@$(BIN)/python deploy/local.py stop

test: model  ## every test: units, properties, real model, real processes
	@$(BIN)/python -m pytest

fuzz: install  ## properties by new random seeds; TIMES=20 the examples, TESTS=tests/router only
	@$(BIN)/python -m pytest -m hypothesis --deep $(or $(TIMES),10) $(TESTS)

lint: install  ## style, types, import arrows
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

format: install  ## let ruff rewrite what it can
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

bench: model  ## side-by-side measurements; takes minutes, wants a quiet machine
	@$(BIN)/edge-agent pull all-minilm
	@PYTHONPATH=deploy $(BIN)/python -m tests.benchmarks

clean:  ## remove the environment and what tools left behind
	@rm -rf .venv .run .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache build *.egg-info
