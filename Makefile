# What a person and CI run. `make help` lists it. Everything happens in .venv, made from pyproject.toml and constraints.txt.

VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.headrace-installed
LOG := $(VENV)/setup.log
UNMARKED := not faults and not gpu
ARGS ?=

# The first Python that is new enough; `make PYTHON=/path/to/python3.12 setup` names another.
PYTHON ?= $(shell for p in python3 python3.11 python3.12 python3.13; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)

.DEFAULT_GOAL := help
.PHONY: help setup pretrain test check check-types check-units bench faults clean

help: ## this list
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 18

setup: $(STAMP) ## the environment in .venv; nothing happens where it is up to date

# PIP_CONSTRAINT, not only -c: it also holds for the environments in which pip builds source packages.
$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "make: Headrace needs Python 3.11 or newer, and no python3 here is. Name one: make PYTHON=... setup" >&2; exit 2; }
	@$(PY) -m pip --version >/dev/null 2>&1 || { echo "creating $(VENV) with $$($(PYTHON) --version)"; $(PYTHON) -m venv --clear $(VENV); }
	@echo "installing Headrace and its dependencies (minutes the first time) ..."
	@PIP_CONSTRAINT="$(CURDIR)/constraints.txt" PIP_DISABLE_PIP_VERSION_CHECK=1 \
		$(PY) -m pip install -q -c constraints.txt -e ".[dev]" >$(LOG) 2>&1 </dev/null || { cat $(LOG) >&2; exit 1; }
	@$(PY) -m jobs.prepare --builtin
	@touch $@

pretrain: $(STAMP) ## train the tiny model on this machine; ARGS="--set train.steps=50" changes it
	@$(PY) -m jobs.pretrain --config jobs/recipes/tiny_cpu.yaml $(ARGS)

test: $(STAMP) ## every test that needs no GPU, but for the slow faults
	@$(PY) -m pytest tests -m "$(UNMARKED)" $(ARGS)

check: $(STAMP) ## lint, format, types, layering and unit tests: under two minutes
	@$(PY) -m ruff check -q .
	@$(PY) -m ruff format -q --check .
	@$(MAKE) --no-print-directory --jobs=2 --output-sync=target check-types check-units

check-types:
	@$(PY) -m basedpyright --pythonpath $(PY)
	@$(VENV)/bin/lint-imports

check-units:
	@$(PY) -m pytest tests/unit -m "$(UNMARKED)" $(ARGS)

faults: $(STAMP) ## the slow tests that kill processes and damage files
	@$(PY) -m pytest tests -m faults $(ARGS)

bench: $(STAMP) ## the measurement of README's table: the pipeline beside a bare PyTorch loop
	@$(PY) -m tests.bench.pipeline $(ARGS)

clean: ## remove .venv and caches; runs/ stays
	@rm -rf $(VENV) .pytest_cache .ruff_cache .import_linter_cache .hypothesis *.egg-info
	@find cluster llm jobs tests -name __pycache__ -type d -prune -exec rm -rf {} +
