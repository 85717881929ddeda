# The verbs of this project. `make repro` and `make test` set the environment up first.
PYTHON ?= python3
BIN := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)

# uv does not read pip's configuration; it is given the same place to look for wheels
FIND_LINKS := $(shell $(PYTHON) -m pip config get global.find-links 2>/dev/null)
INSTALL = -e '.[dev]' -c constraints.txt
UV := $(shell command -v uv 2>/dev/null)

.PHONY: help setup repro snakemake report bench test test-all lint preset constraints

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "make %-12s %s\n", $$1, $$2}'

setup: .venv/ready ## create .venv, or bring it up to date

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

snakemake: setup ## the same by Snakemake, on the GPUs that are there
	@fewstep check
	@fewstep download-all
	snakemake --cores all --profile gpu
	@cat results/table.md

report: setup ## report.html of what Snakemake made: results, captions, how long each job took
	snakemake --cores all --report report.html

# make bench PRESET=config/imagenet64.yaml VARIANTS='fast layout plain' OPTIONS='--pairs 3 --batch 8'
PRESET ?= params.yaml
VARIANTS ?= fast plain
bench: setup ## how fast this code is here, and where the time goes: docs/performance.md
	python benchmarks $(PRESET) --variants $(VARIANTS) $(OPTIONS)

test: setup ## the quick tests, minutes
	pytest -m 'not slow'

test-all: setup ## all tests, the whole pipeline among them
	pytest

lint: setup ## style and types, of the workflow too
	ruff check .
	ruff format --check .
	basedpyright
	snakefmt --check workflow
	snakemake --lint

preset: ## make NAME=fmnist16 the experiment: copy config/NAME.yaml to params.yaml
	@test -f config/$(NAME).yaml || { echo "need NAME, one of: $(filter-out params.schema,$(basename $(notdir $(wildcard config/*.yaml))))"; exit 1; }
	cp config/$(NAME).yaml params.yaml
	@echo "params.yaml is now config/$(NAME).yaml; run it with make repro"

constraints: setup ## pin what is tested, with uv
	echo 'torch==2.13.0' | uv pip compile -q --universal --python-version 3.11 --extra dev --strip-extras --no-header --no-annotate -c /dev/stdin pyproject.toml -o constraints.txt
	sed -i '1i # What was tested together. Made by: make constraints' constraints.txt
