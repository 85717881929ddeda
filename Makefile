# The verbs of this project. `make repro` and `make test` first set up the environment: what a run
# needs, or the tools of `make test` and `make lint` too.
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

# uv does not read pip's configuration, so it is told where pip looks for wheels; asked when needed,
# as pip takes a second to say it
FIND_LINKS = $(shell $(PYTHON) -m pip config get global.find-links 2>/dev/null)
UV := $(shell command -v uv 2>/dev/null)

.PHONY: help setup setup-dev repro results snakemake report bench test test-all lint docs preset style constraints

help: ## print this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "make %-12s %s\n", $$1, $$2}'

setup: .venv/ready ## create or update .venv: what a run needs
setup-dev: .venv/dev ## the same, with what tests and lint need

.venv/ready: EXTRA = cpu
.venv/ready: CONTENTS = $(RUNNING): 1.6 GB on disk
.venv/dev: EXTRA = dev
.venv/dev: CONTENTS = $(RUNNING), and the tools of tests and lint: 2.1 GB on disk
RUNNING = PyTorch, DVC and Snakemake
.venv/ready .venv/dev: pyproject.toml constraints.txt
	@echo "setup: $(CONTENTS) in .venv, more where PyTorch comes with CUDA; 1 to 10 minutes, by network"
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit("need Python 3.11 or newer, got %d.%d (set PYTHON=...)" % v[:2])'
ifneq ($(UV),)
	@uv venv -q --allow-existing --python $(PYTHON) .venv
	@uv pip install -q --python .venv $(addprefix --find-links ,$(FIND_LINKS)) -e '.[$(EXTRA)]' -c constraints.txt
else
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install -q --no-compile --disable-pip-version-check -e '.[$(EXTRA)]' -c constraints.txt
endif
	@touch .venv/ready $@
	@echo "setup: done; \`source .venv/bin/activate\` puts fewstep, dvc and snakemake on your path"

# A command that is shown. On Ctrl-C it says what there is to say; make would add that it was interrupted.
run = @echo '$(1)'; trap 'exit 0' INT; $(1)

repro: setup ## run the experiment of params.yaml and print its results table
	@fewstep check
	@fewstep download-all
	$(call run,dvc repro)
	@cat results/table.md

# Says what a run would redo, by dvc.lock: it needs none of the files that a clone lacks.
results: setup ## print the results in git, and whether they are of these params and this code
	@cat results/table.md || { echo "results: none here; \`make repro\` makes them"; exit 1; }
	@fewstep code > /dev/null
	@stale=$$(dvc repro --dry --allow-missing 2>&1 | sed -n -e "s/^Running stage '\(.*\)'.*/\1/p" \
	-e "s/.*failed to reproduce '\([^']*\)'.*/\1/p" | grep -vx code | sort -u); \
	if [ -z "$$stale" ]; then echo "results: of these params and this code"; \
	else echo "results: stale; \`make repro\` would redo" $$stale; fi

# Snakemake has no record of what DVC made, and would make it again after any edit of params.yaml.
snakemake: setup ## the same by Snakemake, on the GPUs that it finds
	@fewstep check
	@fewstep download-all
	@if dvc status -q 2> /dev/null; then \
	echo "snakemake: DVC made all files, of these params and this code; Snakemake takes note (--touch)"; \
	snakemake --cores 1 --touch --forceall --quiet all; fi
	$(call run,snakemake --cores all --profile gpu)
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

test: setup-dev ## run the quick tests, in minutes
	$(PYTEST) -m 'not slow'

test-all: setup-dev ## run all tests, including the whole pipeline
	$(PYTEST)

lint: setup-dev ## check style and types, the workflow, and that generated docs are fresh
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

docs: setup-dev ## build the site in site/, strictly: a dead link is an error
	NO_MKDOCS_2_WARNING=1 COLUMNS=96 mkdocs build --quiet

style: setup ## rewrite the params files as DVC does, so that `dvc exp run -S` changes one line
	python -m fewstep.params.style params.yaml config/*.yaml

constraints: setup-dev ## pin the tested versions in constraints.txt, with uv
	echo 'torch==2.13.0' | uv pip compile -q --universal --python-version 3.11 --extra dev --strip-extras --no-header --no-annotate -c /dev/stdin pyproject.toml -o constraints.txt
	sed -i '1i # What was tested together. Made by: make constraints' constraints.txt
