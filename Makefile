# Two commands do everything on a fresh machine: `make run` and `make test`.
# pip's own settings (PIP_INDEX_URL, PIP_EXTRA_INDEX_URL, PIP_FIND_LINKS, …) are passed through to it untouched.
PYTHON ?= python3
BIN := $(CURDIR)/.venv/bin
PRESET ?=
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help run test all-tests test-fast test-ray test-servers lint docs setup setup-dev clean bench-teacher bench-student bench-serve bench-cache check-gpu

help:
	@echo "make run              set up, download model and data, run the pipeline, print what was gained"
	@echo "make run PRESET=NAME  the same with presets/NAME.yaml laid over params.yaml, in runs/NAME"
	@echo "make test             set up, lint, check types, run the tests"
	@echo "make test-fast        the quick tests alone, while code changes: no real model, no DVC, no processes of their own, no exports"
	@echo "make test-ray         every way in which a worker of Ray may fail; make test has one of them"
	@echo "make test-servers     a teacher behind llama.cpp's own server, compiled in an environment of its own (after make run)"
	@echo "make lint             ruff and pyright"
	@echo "make docs             write docs/params.md from the params"
	@echo "make bench-teacher    the teacher's engines side by side (after make run; BENCH_ARGS for more)"
	@echo "make bench-student    training speed and memory beside Trainer, SFTTrainer and the limit (after make run)"
	@echo "make bench-serve      requests a second of shotless serve (after make run; BENCH_ARGS=\"--student FOLDER\")"
	@echo "make bench-cache      bytes of the score cache against what it loses (after make run)"
	@echo "make check-gpu        the default model on a GPU: probe, teacher, student, vLLM; ten minutes at most (after make run)"
	@echo "make clean            remove everything that runs have made, scores too (the environment stays)"

run: setup
	@"$(BIN)/shotless" run $(if $(PRESET),--preset "$(PRESET)")

# Several workers, a test file always on one, each on a core of its own (tests/conftest.py).
PYTEST := "$(BIN)/python" -m pytest -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

test: setup-dev  # lint takes the time in which a worker waits for another's last file
	@$(MAKE) --no-print-directory --jobs=2 lint all-tests

all-tests: setup-dev
	@$(PYTEST)

test-fast: setup-dev
	@$(PYTEST) -m "not real and not slow"

test-ray: setup-dev
	@SHOTLESS_RAY=1 "$(BIN)/python" -m pytest tests/teachers/test_teachers_ray.py

test-servers: setup-dev
	@SHOTLESS_SERVERS=1 "$(BIN)/python" -m pytest -rP tests/teachers/test_teachers_real_server.py

lint: setup-dev
	@"$(BIN)/ruff" check .
	@"$(BIN)/ruff" format --check .
	@"$(BIN)/pyright" --pythonpath "$(BIN)/python"

docs: setup
	@"$(BIN)/python" -m docs.params_page

bench-teacher bench-student bench-serve bench-cache: bench-%: setup-dev
	@"$(BIN)/python" -m benchmarks.$* $(BENCH_ARGS)

check-gpu: setup-dev
	@"$(BIN)/python" -m benchmarks.check_gpu

# What a run needs, and what tests, benchmarks and all extras (pyproject.toml) need.
setup: .venv/.installed
setup-dev: .venv/.installed-dev

# Twice --quiet: pip's warnings, of an index for example, are not this project's to explain. Errors are shown. A home that cannot be written
# to has no place for pip's cache, which pip itself does not see if it is run by root. Python compiles what is imported, which is
# a small part, and keeps it.
.venv/.installed-dev: EXTRAS := [dev]
.venv/.installed .venv/.installed-dev: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; set PYTHON=…")'
	@echo "setting up .venv; this takes some minutes"
	@$(PYTHON) -m venv .venv
	@cache="$$("$(BIN)/python" -m pip cache dir)"; mkdir -p "$$cache" 2>/dev/null && [ -w "$$cache" ] || export PIP_NO_CACHE_DIR=1; \
	  "$(BIN)/python" -m pip install --quiet --quiet --disable-pip-version-check --no-compile --constraint constraints.txt --editable ".$(EXTRAS)"
	@touch .venv/.installed $@

clean:
	rm -rf artifacts downloads metrics report runs .work dvc.lock .dvc/cache .dvc/tmp
