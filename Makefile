# Every target makes its own environment first. Nothing but Python 3.11 or 3.12 with venv and pip, and make, is needed;
# a C++17 compiler makes indexes faster.
#
#   make demo                     the whole path on this machine's own files: corpora, training, export, report
#   make study-toy                a whole study on them: arms that share trunks, evaluated, with a report of differences
#                                 (STUDY_ARGS="--seeds 1,2,3", --all-arms, "--study quality", "--scale tiny")
#   make test | check | soak      tests | format, lint and types | tests that take minutes
#   make sanitize                 the C++ under AddressSanitizer and UndefinedBehaviorSanitizer
#   make PYTHON=python3.12 …      another interpreter for .venv
#   make TORCH_INDEX=URL …        torch alone from another index, for example PyTorch's CPU index (see README.md)

SHELL := /bin/sh
PYTHON ?= python3
TORCH_INDEX ?=
DEMO_ARGS ?=
STUDY_ARGS ?=
PYTEST_ARGS ?=
# which tests: .ci/run takes those marked long, too
TESTS ?= not soak and not gpu and not long
# processes of pytest; each test's own math runs on one thread
PYTEST_WORKERS ?= 2

VENV := .venv
RUN := $(VENV)/bin/python
# names, not times, so that a changed pin or source installs again and a checkout that only touches files does not;
# without TORCH_INDEX any installation of the same pins will do
PINS := $(VENV)/.installed-$(shell cat requirements/*.txt | cksum | tr ' ' '-')
INSTALLED := $(if $(TORCH_INDEX),$(PINS)-$(shell echo "$(TORCH_INDEX)" | cksum | tr ' ' '-'),$(firstword \
  $(wildcard $(PINS)*) $(PINS)))
BUILT := $(VENV)/.built-$(shell cat setup.py pyproject.toml csrc/* | cksum | tr ' ' '-')
# torch-free: everything that a login node runs
TYPED := $(filter-out megatron/data/loader.py, $(wildcard megatron/config/*.py megatron/data/*.py \
  megatron/corpora/*.py megatron/preprocessing/*.py megatron/tokenizers/*.py megatron/planner/*.py megatron/launch/*.py megatron/metrics/*.py megatron/optim/lr.py \
  megatron/commands/frame.py megatron/commands/cli.py megatron/commands/plan.py megatron/commands/plan_tables.py megatron/commands/inspect_data.py \
  megatron/commands/ledger.py megatron/commands/report.py megatron/commands/preprocess_data.py \
  megatron/commands/merge_data.py megatron/commands/preprocess_progress.py \
  megatron/commands/train_tokenizer.py))

.DEFAULT_GOAL := help
.PHONY: help .venv demo study-toy test soak sanitize check format clean

help:
	@sed -n 's/^#   //p' Makefile

.venv: $(BUILT)

$(INSTALLED):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo 'error: Stagemix needs Python 3.11 or 3.12, and $(PYTHON) is' \
	    "`$(PYTHON) --version 2>&1`: name another, for example make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info >= (3, 13))' || \
	  echo 'warning: tested with Python 3.11 and 3.12; the pinned packages may have no builds for this one' >&2
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { \
	  echo 'error: this Python has no venv. Debian, Ubuntu: apt install python3-venv; others: install' \
	    'the full Python package, then run make again' >&2; exit 2; }
	@test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	@rm -f $(VENV)/.installed-* $(VENV)/.built-*
	$(if $(TORCH_INDEX),$(RUN) -m pip install --no-deps --force-reinstall --index-url $(TORCH_INDEX) -r requirements/torch.txt)
	$(RUN) -m pip install -r requirements/dev.txt
	@touch $@

$(BUILT): $(INSTALLED)
	@rm -f $(VENV)/.built-*
	$(RUN) -m pip install --no-deps --no-build-isolation -e .
	@$(RUN) -c 'from megatron.data.native import backend_name; print("stagemix is installed; indexes run on:", backend_name())'
	@touch $@

demo: .venv
	$(RUN) examples/demo/run.py $(DEMO_ARGS)

study-toy: .venv
	$(RUN) examples/studies/run_toy.py $(STUDY_ARGS)

test: .venv
	OMP_NUM_THREADS=1 $(RUN) -m pytest -m "$(TESTS)" -n $(PYTEST_WORKERS) $(PYTEST_ARGS)

soak: .venv
	OMP_NUM_THREADS=1 $(RUN) -m pytest -m soak --timeout 3600 $(PYTEST_ARGS)

sanitize: .venv
	@OMP_NUM_THREADS=1 $(RUN) tests/sanitized_extension.py || [ $$? -eq 77 ]

check: .venv
	$(RUN) -m ruff format --check .
	$(RUN) -m ruff check .
	@echo mypy of what is free of torch
	@$(RUN) -m mypy $(TYPED)

format: .venv
	$(RUN) -m ruff format .
	$(RUN) -m ruff check --fix .

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -path ./$(VENV) -prune -o \( -name __pycache__ -o -name '*.so' \) -prune -exec rm -rf {} +
	rm -f $(VENV)/.built-*
