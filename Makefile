# Every command of the project. `make` alone lists them; CI (.ci/run) calls the same ones.
# Needs: Python 3.11 with venv, Rust, make, git. Everything else is fetched by pinned version into .venv.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= $(shell command -v python3.11 || command -v python3)
CACHE := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/onecopy
# uv hard-links packages out of its own cache: a second checkout costs seconds and no second 5 GB.
UV := $(or $(shell command -v uv),$(CACHE)/uv/bin/uv)
BIN := .venv/bin

# Who points pip at a mirror means uv, too.
export UV_DEFAULT_INDEX ?= $(PIP_INDEX_URL)
ifeq ($(UV_DEFAULT_INDEX),)
unexport UV_DEFAULT_INDEX
endif
# Beam's workers import torch again and again: they keep the compiled bytecode, whatever the shell says.
unexport PYTHONDONTWRITEBYTECODE
export PATH := $(CURDIR)/$(BIN):$(dir $(UV)):$(PATH)

# The environment is named by what it was made from, so a changed pin makes it anew and a touched file does not.
ENV := .venv/made-from-$(shell cat requirements/dev.txt | sha256sum | cut -c1-16)
EXTENSION := .venv/extension
# What only the benchmarks need lies on top of it.
PEERS := .venv/peers-$(shell cat requirements/bench.txt | sha256sum | cut -c1-16)
RUST := Cargo.toml Cargo.lock pyproject.toml $(shell find rust -path rust/core/fuzz -prune -o -name '*.rs' -print -o -name Cargo.toml -print)

.PHONY: help
help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "%-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

$(UV):
	$(PYTHON) -m venv $(CACHE)/uv
	$(CACHE)/uv/bin/python -m pip install --quiet --requirement requirements/uv.txt

$(ENV): | $(UV)
	$(UV) venv --quiet --clear --python $(PYTHON) .venv
	$(UV) pip sync --python $(BIN)/python requirements/dev.txt
	@touch $@

$(PEERS): $(ENV)
	$(UV) pip install --quiet --python $(BIN)/python --requirement requirements/bench.txt
	@touch $@

# The module is built into python/onecopy; where somebody deleted it, it is built again.
$(EXTENSION): $(RUST) $(ENV) $(if $(wildcard python/onecopy/_core.*.so),,always)
	$(BIN)/maturin develop --uv --release --quiet
	@touch $@

.PHONY: always
always:

.PHONY: build
build: $(EXTENSION) ## the environment (.venv) and the extension; every other target makes it where needed

.PHONY: demo
demo: build ## semantic search over Python's manual: one copy of a real model under Beam, with proof
	$(BIN)/python examples/semantic_search.py

.PHONY: test test-rust test-soak test-python test-models test-beam
test: build ## all tests; Python beside Rust, random killing and Beam, each told when it is done
	$(MAKE) --jobs=2 --output-sync=target --no-print-directory test-python test-rust test-soak test-models test-beam
test-rust: ## tests of the core, without Python
	+cargo test --locked --package onecopy-core --features failpoints
test-soak: build ## a minute of random killing; `make soak` takes ten
	$(BIN)/python tests/soak.py --seconds 60
test-python: build ## tests of the Python face
	$(BIN)/python -m pytest -m "not beam and not odd and not models"
test-models: build ## whole models of the large frameworks
	$(BIN)/python -m pytest -m models
test-beam: build ## real pipelines with several SDK processes
	$(BIN)/python -m pytest -m beam

.PHONY: test-odd
test-odd: build ## little room and odd kernels: pipelines there, and every system call that fails from some step on
	$(BIN)/python -m pytest -m odd
	ONECOPY_FAULTS=lasting cargo test --locked --package onecopy-core --features failpoints --test calls_fail

.PHONY: soak
SOAK_SECONDS ?= 600
soak: build ## random killing for ten minutes (SOAK_SECONDS=...), many more orders of verbs, the registry's larger state space
	$(BIN)/python tests/soak.py --seconds $(SOAK_SECONDS)
	ONECOPY_MODEL_EXAMPLES=600 $(BIN)/python -m pytest --timeout 3600 tests/test_verbs_model.py
	ONECOPY_EXPLORE=large cargo test --locked --release --package onecopy-core --features failpoints --test registry_explored

.PHONY: bench bench-check bench-report
# BENCH=attach,memory: these rows alone (benches/test_*.py). BENCH_LOOK=1: a quick look, printed and not kept. BENCH_ROUNDS,
# BENCH_MIB: see benches/README.md.
# Where a row fails, the others are in BENCH_RAW still: .venv/bin/python benches/report.py target/bench.json
BENCH_RAW := target/bench$(if $(BENCH_LOOK),-look).json
ifneq ($(BENCH_LOOK),)
export BENCH_LOOK
export BENCH_ROUNDS ?= 2
export BENCH_MIB ?= 500
else
unexport BENCH_LOOK
endif
comma := ,
bench: build $(PEERS) ## onecopy beside its peers, row by row, then the report (BENCH=attach,memory picks rows)
	@mkdir -p $(dir $(BENCH_RAW))
	$(BIN)/python -m pytest -c benches/pytest.ini --benchmark-json=$(BENCH_RAW) \
	    $(or $(patsubst %,benches/test_%.py,$(subst $(comma), ,$(BENCH))),benches)
	$(BIN)/python benches/report.py $(BENCH_RAW)
bench-check: build ## system calls and instructions of the verbs, against benches/counted.json; needs strace and valgrind
	$(BIN)/python benches/check.py
bench-report: $(PEERS) ## tables and plots of benches/README.md from benches/results
	$(BIN)/python benches/report.py

.PHONY: growth
growth: build ## what costs how much more with more leases, tags, tensors and bytes (benches/README.md)
	$(BIN)/python benches/growth.py --json=benches/results/growth.json

.PHONY: experiments
# EXPERIMENTS=1,limit: these alone (1, pairs, 2, start, limit, death, gil). EXPERIMENTS_ROUNDS: fewer rounds, a quick look.
experiments: build $(PEERS) ## the two experiments that RunInference's sharing began with, and five more: docs/experiments.md
	$(BIN)/python benches/experiments/run.py $(subst $(comma), ,$(EXPERIMENTS))

.PHONY: fuzz
FUZZ_SECONDS ?= 1800
CARGO_FUZZ := $(CACHE)/cargo-fuzz-0.13.1
$(CARGO_FUZZ)/bin/cargo-fuzz:
	cargo install --locked --version 0.13.1 --root $(CARGO_FUZZ) --target-dir target/cargo-fuzz cargo-fuzz
fuzz: $(CARGO_FUZZ)/bin/cargo-fuzz ## hostile bytes for the parsers, half an hour each side by side (FUZZ_SECONDS=...); needs nightly
	PATH=$(CARGO_FUZZ)/bin:$$PATH rust/core/fuzz/run $(FUZZ_SECONDS)

.PHONY: lint
lint: build ## formatters, clippy, ruff, strict types, stubs against the module
	cargo fmt --all --check
	cargo fmt --manifest-path rust/core/fuzz/Cargo.toml --check
	cargo clippy --locked --workspace --all-targets --features onecopy-core/failpoints -- --deny warnings
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	MYPYPATH=python $(BIN)/python -m mypy.stubtest onecopy._core

.PHONY: format
format: $(ENV) ## let the formatters write
	cargo fmt --all
	cargo fmt --manifest-path rust/core/fuzz/Cargo.toml
	$(BIN)/ruff check --fix-only --quiet
	$(BIN)/ruff format

.PHONY: wheel
wheel: build ## build the wheel, install it into an empty environment, share numpy arrays between two processes there
	rm -rf dist
	$(BIN)/maturin build --release --quiet --out dist
	.ci/try-wheel $(UV) $(PYTHON) dist/onecopy-*.whl

.PHONY: pins
pins: | $(UV) ## resolve requirements/dev.in anew into requirements/dev.txt
	$(UV) pip compile --quiet --upgrade --python-version 3.11 --no-header --no-annotate --no-emit-index-url \
	    --overrides requirements/overrides.txt --output-file requirements/dev.txt requirements/dev.in
	$(UV) pip compile --quiet --upgrade --python-version 3.11 --no-header --no-annotate --no-emit-index-url \
	    --constraint requirements/dev.txt --overrides requirements/overrides.txt --output-file requirements/bench.txt requirements/bench.in

.PHONY: clean
clean: ## remove what the targets made, the environment included
	rm -rf .venv target dist python/onecopy/_core.*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
