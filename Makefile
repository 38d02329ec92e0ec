# The front door: `make` lists the targets.
PYTHON ?= python3
SET ?=
VENV := .venv$(addprefix -,$(SET))
CONSTRAINTS := constraints$(addprefix -,$(SET)).txt
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# For what needs no torch: the environment that is there, else the small one.
LIGHT := $(if $(wildcard $(READY)),$(VENV),.venv-fast)
TORCH_INDEX ?=
SITE ?=
MAX_MISSING ?=
ENGINE ?= builtin
COMMIT ?=
PYTEST_ARGS ?=
ROOM ?=
SINCE ?=
PYTHONS ?= python3.12 python3.13

# What needs neither torch nor a training, and is quick: whole folders where that holds for all in them.
FAST_TESTS := tests/docs tests/formats tests/metadata tests/planning tests/templates tests/trainer tests/test_files.py \
	tests/test_file_hashes.py tests/test_locks.py tests/test_streams.py tests/test_toml_files.py \
	tests/test_architecture.py tests/test_count_lines.py \
	tests/cli/test_help.py tests/cli/test_output.py tests/cli/test_next_steps.py \
	tests/config/test_effective.py tests/config/test_fates.py tests/config/test_layers.py tests/config/test_render.py \
	tests/dataset/test_recipe.py tests/dataset/images/test_tars.py tests/dataset/captions/test_making.py \
	tests/sampling/test_grammar.py tests/training/data/test_captions.py tests/training/data/test_order.py \
	tests/training/records/test_ledger.py tests/training/records/test_states.py
FAST_ARGS := -n 2 -m "not slow and not sd_scripts and not torch" $(or $(filter tests/$(ROOM)%,$(if $(ROOM),$(FAST_TESTS))),$(FAST_TESTS))
MUTANTS_ARGS ?=

# Tests start some hundred processes, and each would compile every module that it imports anew.
unexport PYTHONDONTWRITEBYTECODE

ifeq ($(wildcard $(CONSTRAINTS)),)
$(error SET=$(SET): no such set of versions; there is: $(patsubst constraints-%.txt,%,$(wildcard constraints-*.txt)))
endif

.DEFAULT_GOAL := help
.PHONY: help setup epsilon prove prove-upstream census gpu test test-slow test-fast test-trainer test-pythons fuzz mutants lint lines bench bench-dataset bench-merge bench-scale bench-latents bench-report bench-states bench-kills bench-elastic docs pictures package clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(READY)  ## make .venv (SET=transformers-5, TORCH_INDEX=URL)

$(READY): setup.cfg $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "kwrap needs Python 3.11 or newer: make setup PYTHON=python3.11")'
	@echo "Installing the tested packages into $(VENV): some GB, some minutes"
	$(PYTHON) -m venv $(VENV)
	$(if $(TORCH_INDEX),$(BIN)/pip install --disable-pip-version-check -q --index-url $(TORCH_INDEX) torch==2.13.0)
	$(BIN)/pip install --disable-pip-version-check -q -c $(CONSTRAINTS) -e '.[train$(addprefix -,$(SET)),merge,dev,mutants]'
	@touch $(READY)

epsilon: $(READY)  ## the whole recipe, demo scale (SITE=site.toml: yours)
	$(BIN)/python -P -m kohaku_wrap.demo.tour $(if $(SITE),--site $(SITE)) $(if $(MAX_MISSING),--max-missing $(MAX_MISSING))

prove: $(READY)  ## train, kill, resume, compare (ENGINE=sd-scripts, COMMIT=C)
	$(BIN)/python -P -m $(if $(COMMIT),kohaku_wrap.proving.prove_trainer --commit $(COMMIT),kohaku_wrap.proving.prove --engine $(ENGINE))

prove-upstream: $(READY)  ## the same for plain sd-scripts: why kwrap exists
	$(BIN)/python -P -m kohaku_wrap.proving.prove --upstream

census: $(READY)  ## try every option on the real trainer, some minutes
	$(BIN)/python -P -m kohaku_wrap.proving.census

gpu: $(READY)  ## measure on GPUs, into gpu-report/ and docs/measurements.md
	$(BIN)/python -P -m kohaku_wrap.proving.gpu --document docs/measurements.md

test: $(READY)  ## run the tests, minutes (ROOM=merging: those of one room)
	$(BIN)/python -m pytest -n auto --dist worksteal -m "not slow" $(if $(ROOM),tests/$(ROOM)) $(PYTEST_ARGS)

test-slow: $(READY)  ## whole runs, killed and changed, and all that the docs say
	$(BIN)/python -m pytest -n auto --dist worksteal -m slow $(if $(ROOM),tests/$(ROOM)) $(PYTEST_ARGS)

test-fast: .venv-fast/.ready  ## the quick tests, in .venv-fast without torch
	.venv-fast/bin/python -m pytest $(FAST_ARGS) $(PYTEST_ARGS)

.venv-fast/.ready: setup.cfg constraints.txt
	$(PYTHON) -m venv .venv-fast
	.venv-fast/bin/pip install --disable-pip-version-check -q -c constraints.txt -e '.[fast]'
	@touch $@

test-trainer: $(READY)  ## the tests on the real sd-scripts (kwrap trainer install)
	@$(BIN)/kwrap trainer show
	$(BIN)/python -m pytest -n auto -m sd_scripts $(PYTEST_ARGS)

test-pythons: $(addprefix test-on-,$(PYTHONS))  ## the quick tests on Python 3.12 and 3.13, where they are

test-on-%:
	@if ! $* -c '' 2>/dev/null; then echo "$*: not installed here, not tried"; else \
	  $* -m venv .venv-$(notdir $*) && \
	  .venv-$(notdir $*)/bin/pip install --disable-pip-version-check -q -c constraints.txt -e '.[fast]' && \
	  .venv-$(notdir $*)/bin/python -m pytest $(FAST_ARGS) $(PYTEST_ARGS); fi

fuzz: $(READY)  ## formulas and headers at random, some minutes
	$(BIN)/python -m pytest -n auto -m fuzz --hypothesis-profile fuzz --timeout 0 tests/merging $(PYTEST_ARGS)

mutants: $(READY)  ## small faults planted one by one: do the tests notice?
	$(BIN)/python benchmarks/mutants.py $(MUTANTS_ARGS)

lint: $(READY)  ## ruff, mypy and the import directions
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

lines: $(READY)  ## lines of code by room (SINCE=COMMIT: and the change)
	$(BIN)/python benchmarks/count_lines.py $(if $(SINCE),--since $(SINCE))

bench: bench-dataset bench-merge bench-scale bench-report  ## every benchmark, each figure beside its bar

bench-dataset: $(READY)  ## selection, captions, tars against HakuBooru
	$(BIN)/python benchmarks/bench_dataset.py
	$(BIN)/python benchmarks/bench_tars.py

bench-merge: $(READY)  ## merges against cat + cp and sd-mecha (25 GB of disk)
	$(BIN)/python benchmarks/bench_merge.py

bench-scale: $(READY)  ## 5.2 million entries: start-up and memory
	$(BIN)/python benchmarks/bench_scale.py

bench-latents: $(READY)  ## cached latents: reading, and the index of 5.2 million
	$(BIN)/python benchmarks/bench_latents.py

bench-report: $(READY)  ## the page of a run of 20,354 steps and 2,000 pictures
	$(BIN)/python benchmarks/bench_report.py

bench-states: $(READY)  ## 2,000 states with a failure at every write and rename
	$(BIN)/python benchmarks/states_under_fault.py

bench-kills: $(READY)  ## 20 SIGKILLs at random moments of whole runs
	$(BIN)/python benchmarks/kills.py

bench-elastic: $(READY)  ## the same run on 2, 1 and again 2 processes (ENGINE=)
	$(BIN)/python benchmarks/elastic.py --engine $(ENGINE)

docs: $(LIGHT)/.ready  ## write the reference of commands, docs/commands.md, anew
	$(LIGHT)/bin/python docs/make_reference.py

pictures: $(READY)  ## the README's pictures, of a run that crashes (Chromium)
	$(BIN)/python docs/make_pictures.py

package: $(READY)  ## build the sdist and the wheel into dist/
	$(BIN)/python -m build -q

clean:  ## remove all that make made, .venv and the demo too
	rm -rf .venv .venv-* build dist *.egg-info epsilon-demo prove census gpu-report .bench .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
