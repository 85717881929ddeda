# The verbs of this project. `make repro` and `make test` first set up the environment.
PYTHON ?= python3
BIN := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)

# A container's user may have no name and no home, without which DVC and Snakemake end in tracebacks.
ifneq ($(shell whoami >/dev/null 2>&1 && echo named),named)
export LOGNAME ?= fewstep
endif
ifneq ($(shell test -d "$$HOME" && test -w "$$HOME" && echo usable),usable)
export HOME := $(CURDIR)/scratch/home
$(shell mkdir -p '$(HOME)')
endif

# uv does not read pip's configuration, so it is told where pip looks for wheels
FIND_LINKS := $(shell $(PYTHON) -m pip config get global.find-links 2>/dev/null)
INSTALL = -e '.[dev]' -c constraints.txt
UV := $(shell command -v uv 2>/dev/null)

.PHONY: help setup repro snakemake report bench test test-all lint preset constraints

help: ## print this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "make %-12s %s\n", $$1, $$2}'

setup: .venv/ready ## create or update .venv

.venv/ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit("need Python 3.11 or newer, got %d.%d (set PYTHON=...)" % v[:2])'
ifneq ($(UV),)
	uv venv -q --allow-existing --python $(PYTHON) .venv
	uv pip install -q --python .venv $(addprefix --find-links ,$(FIND_LINKS)) $(INSTALL)
else
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --disable-pip-version-check $(INSTALL)
endif
	@touch $@

repro: setup ## run the experiment of params.yaml and print its results table
	@fewstep check
	@fewstep download-all
	dvc repro
	@cat results/table.md

snakemake: setup ## the same by Snakemake, on the GPUs that it finds
	@fewstep check
	@fewstep download-all
	snakemake --cores all --profile gpu
	@cat results/table.md

report: setup ## collect what Snakemake made in report.html: results, captions, duration of each job
	snakemake --cores all --report report.html

# make bench PRESET=config/imagenet64.yaml VARIANTS='fast layout plain' OPTIONS='--pairs 3 --batch 8'
PRESET ?= params.yaml
VARIANTS ?= fast plain
bench: setup ## measure how fast this code is here, and where the time goes (docs/performance.md)
	python benchmarks $(PRESET) --variants $(VARIANTS) $(OPTIONS)

# One process a core, each with one thread, is faster than one process with all threads.
PYTEST = OMP_NUM_THREADS=1 pytest -n logical --dist worksteal

test: setup ## run the quick tests, in minutes
	$(PYTEST) -m 'not slow'

test-all: setup ## run all tests, including the whole pipeline
	$(PYTEST)

lint: setup ## check style and types, the workflow, and that generated docs are fresh
	ruff check .
	ruff format --check .
	basedpyright
	python -m fewstep.params.docs --check
	snakefmt --check workflow
	snakemake --lint

preset: ## copy config/NAME.yaml to params.yaml (make preset NAME=fmnist16)
	@test -f config/$(NAME).yaml || { echo "need NAME, one of: $(basename $(notdir $(wildcard config/*.yaml)))"; exit 1; }
	cp config/$(NAME).yaml params.yaml
	@echo "params.yaml is now config/$(NAME).yaml; run it with make repro"

constraints: setup ## pin the tested versions in constraints.txt, with uv
	echo 'torch==2.13.0' | uv pip compile -q --universal --python-version 3.11 --extra dev --extra export --strip-extras --no-header --no-annotate -c /dev/stdin pyproject.toml -o constraints.txt
	sed -i '1i # What was tested together. Made by: make constraints' constraints.txt
