# Every target sets up what it needs: its own virtual environment in .venv, from the exact versions in requirements.lock.

PROFILE ?= mini
# The first interpreter that starts and is new enough; `make PYTHON=...` chooses another.
PYTHON  ?= $(shell for python in python3.11 python3.12 python3.13 python3 python; do \
             "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo "$$python" && break; \
             done)

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help repro detect classify probe test lab clean data

# Stages, tests and notebooks run the environment's `python`, and its kernel wins over one of the user's.
export PATH := $(CURDIR)/.venv/bin:$(PATH)
export VIRTUAL_ENV := $(CURDIR)/.venv
export JUPYTER_PREFER_ENV_PATH := 1
# pip leaves compiling to the first import, for most modules are never imported: so Python must keep what it compiles.
unexport JUPYTER_PATH PYTHONHOME PYTHONPATH PYTHONDONTWRITEBYTECODE
# Tensors' memory is kept for the next ones (see dive_lib/run.py): for `make lab`, whose kernels run.py does not start.
export MALLOC_MMAP_THRESHOLD_ := 33554432
export MALLOC_TRIM_THRESHOLD_ := 17179869184

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

repro: .venv/.ready data  ## Run the whole pipeline; PROFILE=smoke (minutes), mini (default) or paper (GPU node)
	.venv/bin/python -m dive_lib.lanes $(PROFILE)
	.venv/bin/dvc --wait-for-lock repro report@$(PROFILE)

detect: .venv/.ready data  ## The detection half alone: notebooks 01 to 08 and 19
	.venv/bin/dvc --wait-for-lock repro ablation@$(PROFILE) steps@$(PROFILE) diagnosis@$(PROFILE) detectors@$(PROFILE)

classify: .venv/.ready data  ## The classification half alone: notebooks 09 to 12 (13 compares models of both halves)
	.venv/bin/dvc --wait-for-lock repro classifiers@$(PROFILE)

probe: .venv/.ready data  ## What the frozen models know, for three tasks: notebooks 14 to 18
	.venv/bin/dvc --wait-for-lock repro features@$(PROFILE) few_shot@$(PROFILE) sketch_retrieval@$(PROFILE) segmentation@$(PROFILE)

test: .venv/.ready data  ## Run the tests, then every notebook at smoke scale; writes nothing into runs/ or reports/
	@folder=$$(mktemp -d); trap 'rm -rf "$$folder"' EXIT; failed=0; \
	export DIVE_RUNS="$$folder/runs" DIVE_REPORTS="$$folder/reports" DIVE_SCRATCH="$$folder/scratch"; \
	.venv/bin/python -m pytest tests || failed=1; \
	.venv/bin/python -m pytest --nbval-lax --nbval-current-env notebooks || failed=1; \
	exit $$failed

lab: .venv/.ready data  ## Open the notebooks in JupyterLab
	.venv/bin/jupyter lab --LabApp.default_url=/lab/tree/notebooks

clean:  ## Remove the environment, scratch and caches; runs/, reports/ and DVC's cache stay
	rm -rf .venv scratch build *.egg-info .pytest_cache
	find . -path ./.git -prune -o \( -name __pycache__ -o -name .ipynb_checkpoints \) -type d -prune -exec rm -rf {} +

# The raw input comes from the store inside the repository, without a network.
data: .venv/.ready
	@test -d data || .venv/bin/dvc --wait-for-lock pull --quiet data.dvc

.venv/.ready: requirements.lock pyproject.toml
	@test -n "$(PYTHON)" || { echo "error: Python 3.11 or newer not found; install it or run make PYTHON=/path/to/python"; exit 1; }
	"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: Python 3.11 or newer is needed, this is " + sys.version)'
	"$(PYTHON)" -m venv .venv
	.venv/bin/python -m pip install --disable-pip-version-check --quiet --no-compile -r requirements.lock
	.venv/bin/python -m pip install --disable-pip-version-check --quiet --no-deps --no-build-isolation -e .
	touch $@
