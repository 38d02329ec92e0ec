# The front door: `make` lists the targets.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
TORCH_INDEX ?=
SITE ?=
MAX_MISSING ?=
ENGINE ?= builtin
PYTEST_ARGS ?=
MUTANTS_ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help setup epsilon prove prove-upstream census gpu test fuzz mutants lint bench bench-dataset bench-merge bench-scale bench-states bench-kills bench-elastic docs package clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(READY)  ## make .venv, tested versions (TORCH_INDEX=URL: own torch)

$(READY): setup.cfg constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "kwrap needs Python 3.11 or newer: make setup PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(if $(TORCH_INDEX),$(BIN)/pip install --disable-pip-version-check -q --index-url $(TORCH_INDEX) torch==2.13.0)
	$(BIN)/pip install --disable-pip-version-check -q -c constraints.txt -e '.[train,merge,dev,mutants]'
	@touch $(READY)

epsilon: $(READY)  ## the whole recipe, demo scale (SITE=site.toml: yours)
	$(BIN)/python -P -m kohaku_wrap.demo.tour $(if $(SITE),--site $(SITE)) $(if $(MAX_MISSING),--max-missing $(MAX_MISSING))

prove: $(READY)  ## train, kill, resume, compare (ENGINE=sd-scripts)
	$(BIN)/python -P -m kohaku_wrap.proving.prove --engine $(ENGINE)

prove-upstream: $(READY)  ## the same for plain sd-scripts: why kwrap exists
	$(BIN)/python -P -m kohaku_wrap.proving.prove --upstream

census: $(READY)  ## try every option on the real trainer, some minutes
	$(BIN)/python -P -m kohaku_wrap.proving.census

gpu: $(READY)  ## measure on GPUs, into gpu-report/ and docs/measurements.md
	$(BIN)/python -P -m kohaku_wrap.proving.gpu --document docs/measurements.md

test: $(READY)  ## run the tests
	$(BIN)/python -m pytest -n auto $(PYTEST_ARGS)

fuzz: $(READY)  ## formulas and headers at random, some minutes
	$(BIN)/python -m pytest -n auto -m fuzz --hypothesis-profile fuzz --timeout 0 tests/merging $(PYTEST_ARGS)

mutants: $(READY)  ## small faults planted one by one: do the tests notice?
	$(BIN)/python benchmarks/mutants.py $(MUTANTS_ARGS)

lint: $(READY)  ## ruff, mypy and the import directions
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: bench-dataset bench-merge bench-scale  ## every benchmark, each figure beside its bar

bench-dataset: $(READY)  ## selection, captions, tars against HakuBooru
	$(BIN)/python benchmarks/bench_dataset.py
	$(BIN)/python benchmarks/bench_tars.py

bench-merge: $(READY)  ## merges against cat + cp and sd-mecha (25 GB of disk)
	$(BIN)/python benchmarks/bench_merge.py

bench-scale: $(READY)  ## 5.2 million entries: start-up and memory
	$(BIN)/python benchmarks/bench_scale.py

bench-states: $(READY)  ## 2,000 states with a failure at every write and rename
	$(BIN)/python benchmarks/states_under_fault.py

bench-kills: $(READY)  ## 20 SIGKILLs at random moments of whole runs
	$(BIN)/python benchmarks/kills.py

bench-elastic: $(READY)  ## the same run on 2, 1 and again 2 processes (ENGINE=)
	$(BIN)/python benchmarks/elastic.py --engine $(ENGINE)

docs: $(READY)  ## write the reference of commands, docs/commands.md, anew
	$(BIN)/python docs/make_reference.py

package: $(READY)  ## build the sdist and the wheel into dist/
	$(BIN)/python -m build -q

clean:  ## remove all that make made, .venv and the demo too
	rm -rf $(VENV) build dist *.egg-info epsilon-demo prove census gpu-report .bench .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
