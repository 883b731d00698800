# `make demo` and `make test` work on a machine with only Python 3.11-3.13 and a C++ compiler: they create .venv,
# install the versions of constraints.txt and run. `make help` lists the targets and variables.

# PYTHON: the interpreter for a new environment; by default the first suitable one on PATH.
PYTHON ?=
# TORCH_INDEX=https://download.pytorch.org/whl/cpu installs torch without the CUDA libraries.
TORCH_INDEX ?=
DEMO_ARGS ?=
PYTEST_ARGS ?=
GPU_ARGS ?=
TEST_WORKERS ?= 2
# TESTS="not gpu" adds the tests of more than about 20 seconds, as .ci/run does.
TESTS ?= not gpu and not slow
FUZZ ?= 10
SEED ?= $(shell date +%s)
TEST_TIMEOUT_S ?= 600

BIN := .venv/bin
TEXTS := bpo kernels ds_configs slurm benchmarks tests docs .ci Makefile setup.py pyproject.toml README.md CONTRIBUTING.md CHANGELOG.md
SCRIPTS := slurm/*.sh .ci/run .ci/venv benchmarks/offline/run.sh
# ninja and the deepspeed launcher must be on PATH; one thread per process, because ranks and workers share the cores.
RUN := env PATH="$(CURDIR)/$(BIN):$$PATH" OMP_NUM_THREADS=1

.DEFAULT_GOAL := help
.PHONY: help demo test fuzz lint format types gpu floor clean .venv compiler

help: ## list targets and variables
	@grep -hE '^[a-z.]+:.*## ' Makefile | sed -E 's/^([a-z.]+):.*## /  make \1\t/' | expand -t 16
	@echo 'Variables: PYTHON=python3.12  TORCH_INDEX=URL  DEMO_ARGS="--seeds 5"  PYTEST_ARGS="-k plan"' \
		' TESTS="not gpu"  TEST_WORKERS=2  TEST_TIMEOUT_S=600  FUZZ=10  SEED=7'

demo: .venv compiler ## bootstrap, train, evaluate and report on a small synthetic world
	$(RUN) $(BIN)/bpo demo $(DEMO_ARGS)

test: .venv compiler ## the everyday tests: no GPU, none of more than about 20 seconds
	$(RUN) $(BIN)/python -m pytest -m "$(TESTS)" -n $(TEST_WORKERS) --dist loadfile \
		--timeout $(TEST_TIMEOUT_S) $(PYTEST_ARGS)

fuzz: .venv ## random examples instead of the fixed ones, FUZZ times as many; prints the seed that repeats a failure
	@echo "make fuzz SEED=$(SEED) FUZZ=$(FUZZ)"
	$(RUN) FUZZ=$(FUZZ) $(BIN)/python -m pytest --hypothesis-seed=$(SEED) --timeout $(TEST_TIMEOUT_S) \
		$(shell grep -rlE '^from hypothesis' tests --include='test_*.py') $(PYTEST_ARGS)

lint: .venv ## ruff: errors, imports, formatting; codespell; shellcheck
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell -D - -D .ci/prose.txt $(TEXTS)
	$(BIN)/shellcheck -x $(SCRIPTS)

format: .venv ## apply lint fixes and formatting
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: .venv ## mypy on bpo/ and kernels/
	$(BIN)/mypy

gpu: .venv compiler ## on a GPU machine, within 10 minutes: GPU tests and benchmarks; writes benchmarks/results/gpu-*.json
	$(BIN)/python benchmarks/gpu.py --check
	@EXTRA=bench .ci/venv
	$(RUN) $(BIN)/python benchmarks/gpu.py $(GPU_ARGS)

floor: ## run the tests at the oldest versions that setup.py allows, in .floor; writes benchmarks/results/floor.json
	@TORCH_INDEX="$(TORCH_INDEX)" .ci/floor $(if $(PYTHON),"$(PYTHON)")

clean: ## remove environments, caches and builds; keeps runs/
	rm -rf .venv .floor .wheels .wheels-quack build dist bpo.egg-info .ruff_cache .mypy_cache .pytest_cache .hypothesis
	find bpo kernels ds_configs tests -name __pycache__ -type d -prune -exec rm -rf {} +

.venv: ## create only the environment
	@TORCH_INDEX="$(TORCH_INDEX)" .ci/venv $(if $(PYTHON),"$(PYTHON)")

compiler:
	@command -v "$${CXX:-c++}" >/dev/null || command -v g++ >/dev/null || { echo "error: no C++ compiler; DeepSpeed" \
		"compiles its CPU operations at first use (Debian and Ubuntu: apt install g++)" >&2; exit 1; }
