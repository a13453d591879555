# Every target sets up .venv by itself, once (scripts/bootstrap.sh); `make` alone lists them.
#   PYTHON=/path/to/python3   which Python (>= 3.10) to build .venv with
#   ARGS="..."                passed on to pytest, the benchmark or `megalite pretrain`
#   JOBS=N                    test processes

.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

BIN := .venv/bin
CORES := $(shell getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)
JOBS ?= $(shell if [ $(CORES) -gt 8 ]; then echo 8; else echo $(CORES); fi)
ARGS ?=
export PYTHON

# --- the first run: real text (the Python standard library, and English prose from one package) on two CPU cores
DATA ?= data/first
CONFIG ?= examples/pretrain_cpu.toml
PREPARE := $(BIN)/megalite data prepare code=stdlib prose=botocore --out $(DATA)
PRETRAIN := $(BIN)/megalite pretrain $(CONFIG) --dataset $(DATA) --json

# One thread per test process: the processes fill the cores, and one thread is bitwise reproducible.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS)
# The compile gates need tools that `make test` does not install.
NOT_GATES := --ignore tests/triton_gate --ignore tests/cuda_gate

CPP_FILES := \( -name '*.cpp' -o -name '*.h' -o -name '*.inc' -o -name '*.cu' -o -name '*.cuh' \)

.PHONY: help
help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-14s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

.PHONY: setup
setup: ## make .venv with what megalite needs
	@scripts/bootstrap.sh

.PHONY: pretrain
pretrain: ## train a small base model on real text; the last line is its result as JSON
	@scripts/bootstrap.sh corpus
	@test -e $(DATA)/dataset.json || $(PREPARE)
	@$(PRETRAIN) $(ARGS)

.PHONY: test
test: ## run every test that needs no GPU and little time
	@scripts/bootstrap.sh test
	@$(PYTEST) -m "not slow and not gpu" $(NOT_GATES) $(ARGS)

.PHONY: test-triton
test-triton: ## interpret the Triton kernels on the CPU, and compile them for the GPUs of the gate
	@scripts/bootstrap.sh test triton
	@TRITON_INTERPRET=1 $(PYTEST) tests/triton $(ARGS)
	@$(PYTEST) tests/triton_gate $(ARGS)

.PHONY: test-cuda
test-cuda: ## emulate the CUDA kernels on the CPU, and compile them for the GPUs of the gate
	@scripts/bootstrap.sh test triton cuda
	@MEGALITE_CUDA_EMULATE=80 $(PYTEST) -m "not slow" tests/cuda $(ARGS)
	@$(PYTEST) -m "not slow" tests/cuda_gate tests/cuda_loader $(ARGS)

.PHONY: test-cuda-all
test-cuda-all: ## the same with every planted error and every instance
	@$(MAKE) test-cuda ARGS='-m "slow or not slow" $(ARGS)'

.PHONY: test-slow
test-slow: ## run the slow tests too
	@scripts/bootstrap.sh test
	@$(PYTEST) -m "not gpu" $(NOT_GATES) $(ARGS)

.PHONY: test-layouts
test-layouts: ## prove that every parallel layout trains every kind of model as one process does
	@scripts/bootstrap.sh test
	@$(PYTEST) tests/parallel/test_matrix.py $(ARGS)

.PHONY: bench
bench: setup ## measure training throughput beside other trainers; then the tables and plots of README
	@$(BIN)/python benchmarks/train_throughput.py --output benchmarks/results/throughput.jsonl $(ARGS)
	@$(BIN)/python -m benchmarks.tables

.PHONY: bench-kernels
bench-kernels: setup ## time every kernel here against torch and torch.compile; then the tables and plots of README
	@$(BIN)/python -m benchmarks.kernels $(ARGS)
	@$(BIN)/python -m benchmarks.tables

.PHONY: bench-tables
bench-tables: setup ## make the tables and plots of README from the records in benchmarks/results
	@$(BIN)/python -m benchmarks.tables $(ARGS)

.PHONY: bench-check
bench-check: setup ## measure again, and compare with the records of the same kind of machine; about 5 minutes
	@$(BIN)/python -m benchmarks.check $(ARGS)

.PHONY: doctor
doctor: setup ## check and time every op on this machine
	@$(BIN)/megalite doctor $(ARGS)

# Runs with the machine's own Python: torch, triton, numpy and pytest, no network, no installation.
GPU_PYTHON ?= python3
OUT ?= gpu-check
.PHONY: gpu-check
gpu-check: ## prove and time every kernel on this machine's NVIDIA GPU (PARTS=..., OUT=folder)
	@PYTHONPATH=.:kernels $(GPU_PYTHON) benchmarks/gpu_check.py --out $(OUT) $(if $(PARTS),--parts $(PARTS)) $(ARGS)

.PHONY: lint
lint: ## check style, types and C++ format
	@scripts/bootstrap.sh test dev
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@find csrc -type f $(CPP_FILES) | xargs $(BIN)/clang-format --dry-run --Werror --style=file

.PHONY: format
format: ## rewrite Python and C++ in the project's style
	@scripts/bootstrap.sh dev
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .
	@find csrc -type f $(CPP_FILES) | xargs $(BIN)/clang-format -i --style=file

.PHONY: clean
clean: ## remove .venv and build outputs; data and runs are kept
	rm -rf .venv build dist *.egg-info kernels/megalite_kernels/_C*.so kernels/megalite_kernels/_pool*.so kernels/megalite_kernels/native/cuda/kernels.zip
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
