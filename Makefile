SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

# The first interpreter that starts, is 3.11 or 3.12 and can make environments. Being on PATH is not enough: a pyenv shim of a
# version that is not selected is there and fails.
PYTHON ?= $(shell for python in python3.12 python3.11 python3; do \
	"$$python" -c '$(USABLE)' >/dev/null 2>&1 && command -v "$$python" && break; done)
USABLE := import ensurepip, sys, venv; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))

TORCH ?= torch==2.13.0
PIP_ARGS ?=
TEST_PROCESSES ?= 2
PYTEST_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# No network; hexadecimal strings of high entropy are hashes here. A false alarm is silenced by "pragma: allowlist secret".
SECRET_SCAN := --no-verify --disable-plugin HexHighEntropyString
STUDY := configs/studies/quickstart.yaml
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist loadfile

.PHONY: help
help:  ## Show this text
	@echo "usage: make TARGET [VARIABLE=VALUE]"
	@echo
	@sed -nE 's/^([a-z-]+):[^#]*## (.*)/  \1\t\2/p' $(MAKEFILE_LIST) | expand -t 16
	@echo
	@echo "variables (in brackets: now)"
	@echo "  PYTHON         interpreter for $(VENV), 3.11 or 3.12 [$(or $(PYTHON),none found)]"
	@echo "  TORCH          what pip installs as torch, first and pinned [$(TORCH)]"
	@echo "  PIP_ARGS       more arguments for pip [$(PIP_ARGS)]; for small CPU wheels:"
	@echo '                   PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"'
	@echo "  TEST_PROCESSES test processes side by side [$(TEST_PROCESSES)]"
	@echo '  PYTEST_ARGS    more arguments for pytest, such as "-k attention" [$(PYTEST_ARGS)]'

.PHONY: quickstart
quickstart: environment  ## Run the small weight-decay study on this machine and write its report
	$(BIN)/megatron-plasticity study run $(STUDY)
	$(BIN)/megatron-plasticity study report runs/quickstart

.PHONY: test
test: environment  ## Run the tests
	$(PYTEST) $(PYTEST_ARGS)

.PHONY: coverage
coverage: environment  ## Run the tests and say which lines and branches they miss (slower)
	$(PYTEST) --cov --cov-report=term $(PYTEST_ARGS)

.PHONY: test-full
test-full: environment  ## Run the tests, all parallel layouts and tools at length (six minutes more)
	$(PYTEST) -m "full or not full" $(PYTEST_ARGS)

.PHONY: lint
lint: environment  ## Check style, types, secrets and generated documents; changes nothing, needs no network
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	git ls-files -z --cached --others --exclude-standard | xargs -0 $(BIN)/detect-secrets-hook $(SECRET_SCAN)
	$(BIN)/python tools/generate_docs.py --check

.PHONY: format
format: environment  ## Put the code into its standard form
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

.PHONY: docs
docs: environment  ## Write docs/config.md and docs/schema/ from the code
	$(BIN)/python tools/generate_docs.py

.PHONY: environment
environment: $(INSTALLED)  ## Make or update .venv (every other target does it when needed)

# torch comes first and pinned: resolved together with the rest, pip may take a newer build with gigabytes of CUDA packages.
$(INSTALLED): pyproject.toml
	@if [ -z "$(PYTHON)" ]; then \
		echo "make: no usable Python found. Python 3.11 or 3.12 with its venv module is needed (tried python3.12, python3.11," \
			"python3). Install one (on Debian: python3 python3-venv) or name it: make PYTHON=/path/to/python3.12" >&2; exit 2; fi
	@if ! "$(PYTHON)" -c '$(USABLE)' 2>/dev/null; then \
		echo "make: PYTHON=$(PYTHON) cannot be used: it must start, be version 3.11 or 3.12, and have the venv module." >&2; exit 2; fi
	@if [ -x $(BIN)/python ] && ! $(BIN)/python -c '$(USABLE)' 2>/dev/null; then \
		echo "make: $(VENV) belongs to an interpreter that is gone or not 3.11 or 3.12; remove it with: make distclean" >&2; exit 2; fi
	[ -x $(BIN)/python ] || "$(PYTHON)" -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check $(PIP_ARGS) "$(TORCH)"
	$(BIN)/python -m pip install --disable-pip-version-check $(PIP_ARGS) "$(TORCH)" -e ".[dev]"
	@touch $@

.PHONY: python
python:  ## Print the interpreter that .venv would be made with
	@echo "$(PYTHON)"

.PHONY: clean
clean:  ## Remove caches and build output; runs/, data/ and .venv stay
	rm -rf build dist htmlcov coverage.xml .coverage .coverage.* .pytest_cache .ruff_cache
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -print0 | xargs -0 rm -rf

.PHONY: distclean
distclean: clean  ## Remove .venv as well
	rm -rf $(VENV)
