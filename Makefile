# `make help` lists the targets. Each does its own set-up; all of it stays inside this folder.

PY := .venv/bin/python
TORCH ?= 2.13.0
TRITON ?= 3.7.1
export TORCH TRITON

# Here a native build that fails is an error, not a fall back to Python. CUDA C++ is compiled wherever
# nvcc is, GPU or not: that is its compile check.
WHEEL_CUDA := $(or $(DEEPALIGN_BUILD_CUDA),0)
NVCC_PATH := $(shell command -v $${NVCC:-nvcc} 2>/dev/null)
DEEPALIGN_BUILD_NATIVE ?= 1
DEEPALIGN_BUILD_CUDA ?= $(if $(and $(NVCC_PATH),$(wildcard csrc/cuda/*.cu),$(filter 1,$(DEEPALIGN_BUILD_NATIVE))),1,auto)
export DEEPALIGN_BUILD_NATIVE DEEPALIGN_BUILD_CUDA

# Processes that pytest runs in; each takes its share of the cores (tests/conftest.py).
WORKERS ?= $(shell nproc 2>/dev/null || echo 2)

# pyright must not ask the network for newer versions of itself.
PYRIGHT := PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(PY) -m pyright --pythonpath $(PY)

.DEFAULT_GOAL := help
.PHONY: help demo test test-fast test-avx2 matrix bench lint docs format build wheel hub clean
.NOTPARALLEL:

help: ## this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## /{printf "make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@echo "TORCH=$(TORCH) TRITON=$(TRITON)   versions to install (TORCH may carry +cpu, +cu130, +rocm...)"
	@echo "PYTHON=python3.12             interpreter for a new .venv"
	@echo "PYTEST_ARGS='-k kl -x'        passed on by test; BENCH_ARGS, DEMO_ARGS likewise"
	@echo "DEEPALIGN_BUILD_NATIVE=1|auto|0, DEEPALIGN_BUILD_CUDA=1|auto|0, CXX=, NVCC=, MAX_JOBS="

demo: build ## the whole method end to end on a toy model, into demo_output/
	$(PY) -m deepalign_kernels.toyworld.demo --out demo_output $(DEMO_ARGS)

test: lint docs ## all checks: build, lint, documentation, pytest
	$(PY) -m pytest -n $(WORKERS) $(PYTEST_ARGS)

test-fast: build ## pytest without the slow tests: two minutes on two idle cores
	$(PY) -m pytest -n $(WORKERS) -m "not slow" $(PYTEST_ARGS)

test-avx2: export DEEPALIGN_CPU_ISA=avx2
test-avx2: export ATEN_CPU_CAPABILITY=avx2
test-avx2: export ONEDNN_MAX_CPU_ISA=AVX2
# torch 2.13 finds compiled graphs again by all but the vector width: those for AVX-512 give wrong values here.
test-avx2: export TORCHINDUCTOR_CACHE_DIR=$(CURDIR)/build/inductor-avx2
test-avx2: build ## pytest as on a processor with AVX2 only: our kernels, torch and oneDNN held to it
	$(PY) -m pytest -n $(WORKERS) $(PYTEST_ARGS)

matrix: ## test-fast in environments of other versions (docs/versions.md); MATRIX="oldest gpu" chooses
	@python3 .ci/matrix --workers $(WORKERS) $(MATRIX)

bench: build ## microbenchmarks
	$(PY) -m benchmarks $(BENCH_ARGS)

lint: build ## ruff check, ruff format --check, pyright
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(PYRIGHT)

docs: build ## the documentation, into site/; a warning is an error
	@if $(PY) -c 'import sys; sys.exit(sys.version_info < (3, 11, 5))'; then \
		NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build; \
	else echo "docs: NOT built, its tools need Python 3.11.5"; fi

format: build ## rewrite the Python files as `make lint` wants them
	$(PY) -m ruff check --fix
	$(PY) -m ruff format

build: ## .venv with torch and the tools, then the native libraries
	@sh .ci/setup
	@$(PY) setup.py --quiet build_ext --inplace

wheel: build ## wheels and the source archive, into dist/
	@DEEPALIGN_BUILD_CUDA=$(WHEEL_CUDA) sh .ci/wheel

hub: wheel ## the layout of a kernel repository of the Hugging Face Hub, into build/hub/
	@cd build/wheel/deepalign_kernels-* && CXXFLAGS="-include $$PWD/.ci/glibc_2_28.h" \
		$(CURDIR)/$(PY) hub/make.py $(CURDIR)/build/hub

clean: ## remove what the targets made, except .venv
	rm -rf build dist site demo_output .matrix deepalign_kernels.egg-info .pytest_cache .ruff_cache .benchmarks
	rm -f deepalign_kernels/_native_*
	find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +
