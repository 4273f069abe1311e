# Two commands do everything on a fresh machine: `make run` and `make test`.
# pip's own settings (PIP_INDEX_URL, PIP_EXTRA_INDEX_URL, PIP_FIND_LINKS, …) are passed through to it untouched.
PYTHON ?= python3
BIN := .venv/bin
DVC = PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/dvc

.DEFAULT_GOAL := help
.PHONY: help run test setup lint clean

help:
	@echo "make run    set up, fetch model and data, run the pipeline, print what was gained"
	@echo "make test   set up, lint, check types, run the tests"
	@echo "make clean  remove everything that runs have made (the environment stays)"

run: setup
	@$(BIN)/shotless check
	@$(BIN)/shotless fresh || $(DVC) repro --quiet --force --single-item fetch
	@$(DVC) repro
	@$(BIN)/shotless summary

test: setup lint
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest

lint: setup
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/pyright --pythonpath $(BIN)/python

setup: .venv/.installed

.venv/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; set PYTHON=…")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	@touch $@

clean:
	rm -rf artifacts metrics report .work dvc.lock .dvc/cache .dvc/tmp
