# Needs make and one Python 3.11 to 3.13. Every target sets itself up in $(VENV) and starts at once from then on.
#   VENV=.venv        where the virtual environment is
#   PYTHON=           the interpreter that makes it; chosen by .ci/venv when empty
#   WORKERS=2         how many processes `make test` uses
#   PYTEST_ARGS=      passed to pytest: make test PYTEST_ARGS="tests/models -k cache"

SHELL := /bin/sh
VENV ?= .venv
PYTHON ?=
WORKERS ?= 2
PYTEST_ARGS ?=

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TOOLS := $(VENV)/.tools
# The package is installed; what develops it is too. The first names the checkout it was made for: a moved, copied or
# broken environment is made again.
ifneq ($(shell test -x "$(BIN)/python" && cat "$(STAMP)" 2>/dev/null),$(CURDIR))
STALE := stale
endif

.DEFAULT_GOAL := help
.PHONY: help quickstart test proof lint docs types clean $(STALE)

help:  ## print this list
	@sed -n 's/^\([a-z]*\):.*##/\1:/p' Makefile | awk -F: '{ printf "  make %-11s%s\n", $$1, $$2 }'
	@sed -n 's/^#   /  /p' Makefile

quickstart: $(STAMP)  ## every pillar on small models trained meanwhile, and a page that shows it; no download
	$(BIN)/jaxaroo quickstart --out quickstart-out

test: $(TOOLS)  ## the test suite on CPU, in two processes
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(PYTEST_ARGS)

proof: $(TOOLS)  ## the long proofs: the tests marked `proof`, one at a time
	$(BIN)/python -m pytest -m proof $(PYTEST_ARGS) || { test $$? -eq 5 && echo "make proof: no test is marked proof."; }

lint: $(TOOLS)  ## ruff: rules and layout
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .

docs: $(TOOLS)  ## the pages, in docs/_build/html; a warning is an error
	JAX_PLATFORMS=cpu $(BIN)/python -m sphinx -j auto -q -W --keep-going -b html docs docs/_build/html

types: $(TOOLS)  ## pyright
	$(BIN)/python -m pyright --pythonpath $(BIN)/python

clean:  ## remove the environment and everything else that was made here
	@.ci/venv --remove "$(VENV)"
	rm -rf build dist docs/_build docs/_generated *.egg-info .cache .hypothesis .pytest_cache .ruff_cache quickstart-out
	find . -name .git -prune -o -name '.venv*' -prune -o -name __pycache__ -prune -exec rm -rf {} +

$(STAMP): pyproject.toml $(STALE)
	@PYTHON="$(PYTHON)" .ci/venv "$(VENV)"

$(TOOLS): pyproject.toml $(STALE)
	@PYTHON="$(PYTHON)" .ci/venv "$(VENV)" dev
