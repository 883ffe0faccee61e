SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

# The first Python of at least 3.11 that runs; `make install PYTHON=...` takes another.
PYTHON ?= $(shell for p in python3 python3.12 python3.11 python3.13 python3.14; do \
    "$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && { echo "$$p"; break; }; \
  done)
# More options for pip, such as another package index.
PIP_ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PROTOS := $(wildcard protos/baton/v1/*.proto)
STUBS := shared/gen/.generated
BASELINE := protos/baseline.binpb
MODEL ?= models/demo
PYTEST_ARGS ?=

.PHONY: help
help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-15s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: install
install: $(INSTALLED) $(STUBS) ## Create .venv with pinned dependencies, those of the tests included, and the stubs

.PHONY: protos
protos: $(STUBS) ## Generate the Python stubs of protos/ into shared/gen

.PHONY: run
run: install ## Serve the demo model and stream one answer; ONCE=1 stops after it
	@$(BIN)/python -m services.launcher.run --model $(MODEL) $(if $(filter-out 0,$(ONCE)),--once)

.PHONY: test
test: install ## Run the whole CPU suite (PYTEST_ARGS="-k name" for a part)
	$(BIN)/python -m pytest $(PYTEST_ARGS)

# On a machine with an NVIDIA GPU. Left out by name: tests that need the same bits in every batch.
.PHONY: test-gpu
test-gpu: install ## Run on an NVIDIA GPU all that can run there: kernels, engine, whole stacks
	BATON_TEST_DEVICE=cuda $(BIN)/python -m pytest -m "not exact" --timeout 600 \
	    tests/kernels tests/gpu tests/unit/engine tests/e2e tests/faults $(PYTEST_ARGS)

.PHONY: lint
lint: install ## Check style; rewrites nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/buf format --diff --exit-code protos

.PHONY: format
format: install ## Rewrite to the house style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/buf format --write protos

.PHONY: typecheck
typecheck: install ## Check types, strictly
	$(BIN)/mypy

.PHONY: proto-check
proto-check: install ## Check the contract's style, and that nobody's client breaks
	$(BIN)/buf lint protos
	$(BIN)/buf breaking protos --against $(BASELINE)

.PHONY: proto-baseline
proto-baseline: install ## Take the contract as it is now for the baseline of proto-check
	$(BIN)/buf build protos --exclude-source-info --output $(BASELINE)

.PHONY: bench
bench: install ## Run the benchmarks; results go to benchmarks/results
	$(BIN)/python -m benchmarks

.PHONY: clean
clean: ## Remove everything that is made here, .venv included
	rm -rf $(VENV) shared/gen dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch is pinned by the constraints file: it must be named wherever pip could resolve torch.
$(INSTALLED): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed; name one with PYTHON=..." >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV): minutes on the first run"
	@mkdir -p shared/gen
	$(BIN)/python -m pip install --disable-pip-version-check --quiet $(PIP_ARGS) -c constraints.txt hatchling
	$(BIN)/python -m pip install --disable-pip-version-check $(PIP_ARGS) \
	    -c constraints.txt --no-build-isolation --editable '.[worker,local,test,dev]' \
	    | sed -u '/^Requirement already satisfied/d'
	@touch $@

$(STUBS): $(INSTALLED) $(PROTOS)
	@rm -rf shared/gen/baton
	@mkdir -p shared/gen
	$(BIN)/python -m grpc_tools.protoc --proto_path=protos \
	    --plugin=protoc-gen-mypy_grpc=$(BIN)/protoc-gen-mypy_grpc \
	    --python_out=shared/gen --pyi_out=shared/gen \
	    --grpc_python_out=shared/gen --mypy_grpc_out=shared/gen $(PROTOS)
	@touch $@
