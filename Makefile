# Two commands do everything on a fresh machine: `make run` and `make test`.
# pip's own settings (PIP_INDEX_URL, PIP_EXTRA_INDEX_URL, PIP_FIND_LINKS, …) are passed through to it untouched.
PYTHON ?= python3
BIN := $(CURDIR)/.venv/bin
PRESET ?=
# A preset runs in a workspace of its own and shares the DVC cache and the row store with the default run.
WORKSPACE := $(if $(PRESET),runs/$(PRESET),.)
ON_PATH = PATH="$(BIN):$$PATH"

.DEFAULT_GOAL := help
.PHONY: help run study test test-faults test-ray setup lint bench-teacher bench-ray bench-student bench-cache bench-reads bench-scale clean

help:
	@echo "make run              set up, fetch model and data, run the pipeline, print what was gained"
	@echo "make run PRESET=NAME  the same with presets/NAME.yaml laid over params.yaml, in runs/NAME"
	@echo "make study            many runs of the pipeline, hours in all, in parts -> docs/results.md (PARTS=... for some of them)"
	@echo "make test             set up, lint, check types, run the tests"
	@echo "make test-ray         every way in which a worker of Ray may fail; make test has one of them"
	@echo "make test-faults      bad input and damage, ten times as much as in make test; prints what became of each fault"
	@echo "make bench-teacher    the teacher's engines side by side (after make run; BENCH_ARGS for more)"
	@echo "make bench-ray        the teacher with one and with two workers of Ray at one thread each"
	@echo "make bench-scale      a plan of 10^5, 10^6 and 10^7 rows, made, written, read and shuffled: seconds and memory"
	@echo "make bench-reads      writing and reading a cache of a million rows: rows/s and memory"
	@echo "make bench-student    training speed and memory beside Trainer, SFTTrainer and the limit (after make run)"
	@echo "make bench-cache      bytes of the score cache against what it loses; the loss's time and memory (after make run)"
	@echo "make clean            remove everything that runs have made (the environment stays)"

run: export SHOTLESS_WORK ?= $(CURDIR)/.work
run: setup
	@$(if $(PRESET),"$(BIN)/shotless" preset "$(PRESET)")
	@cd "$(WORKSPACE)" && "$(BIN)/shotless" check
	@cd "$(WORKSPACE)" && { "$(BIN)/shotless" fresh || $(ON_PATH) dvc repro --quiet --force --single-item fetch; }
	@cd "$(WORKSPACE)" && $(ON_PATH) dvc repro
	@cd "$(WORKSPACE)" && "$(BIN)/shotless" summary

# Parts that were run before cost seconds; a part that was stopped goes on. PARTS="sentiment-0 sst2-1" runs some of them.
PARTS ?=
study: export SHOTLESS_WORK ?= $(CURDIR)/.work
study: setup
	@set -e; for part in $(or $(PARTS),$$("$(BIN)/shotless" study parts)); do \
		workspace=$$("$(BIN)/shotless" study workspace $$part); echo "$$workspace"; start=$$(date +%s); \
		failed=; (cd "$$workspace" && "$(BIN)/shotless" check && $(ON_PATH) dvc repro compare) || failed=1; \
		echo $$(( $$(date +%s) - start )) $$(nproc) >> "$$workspace/seconds.txt"; test -z "$$failed"; \
	done
	@"$(BIN)/shotless" study results

# Several workers, a test file always on one, each on a core of its own (tests/conftest.py).
WORKERS := -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

test: setup lint
	@$(ON_PATH) python -m pytest $(WORKERS)

test-ray: export SHOTLESS_RAY = 1
test-ray: setup
	@$(ON_PATH) python -m pytest tests/teacher/test_teacher_ray.py

test-faults: export SHOTLESS_FAULTS ?= 10
test-faults: export OMP_NUM_THREADS ?= 1
test-faults: setup
	@$(ON_PATH) nice -n 19 python -m pytest tests/faults

lint: setup
	@"$(BIN)/ruff" check .
	@"$(BIN)/ruff" format --check .
	@"$(BIN)/pyright" --pythonpath "$(BIN)/python"

bench-teacher: setup
	@$(ON_PATH) python -m benchmarks.teacher $(BENCH_ARGS)

bench-ray: setup
	@$(ON_PATH) python -m benchmarks.ray_teacher $(BENCH_ARGS)

bench-scale: setup
	@$(ON_PATH) python -m benchmarks.scale $(BENCH_ARGS)

bench-reads: setup
	@$(ON_PATH) python -m benchmarks.cache_reads

bench-student: setup
	@$(ON_PATH) python -m benchmarks.student $(BENCH_ARGS)

bench-cache: setup
	@$(ON_PATH) python -m benchmarks.cache $(BENCH_ARGS)

setup: .venv/.installed

.venv/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; set PYTHON=…")'
	$(PYTHON) -m venv .venv
	"$(BIN)/python" -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	@touch $@

clean:
	rm -rf artifacts metrics report runs .work dvc.lock .dvc/cache .dvc/tmp
