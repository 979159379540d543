.PHONY: help demo test lint docs docs-serve gpu-test gpu-bench gpu-first bench bench-compare clean
.DEFAULT_GOAL := help
PYTHON ?= python3
BIN := .venv/bin

help:
	@echo "make demo   trains a detector of handwritten digits on large canvases; pictures in out/"
	@echo "python -m examples.classify_points   classifies handwritten digits as point sets"
	@echo "make test   runs the tests"
	@echo "make lint   runs ruff and mypy"
	@echo "make docs   builds the documentation site, strictly, in out/site"
	@echo "make docs-serve  shows it at http://localhost:8000 and follows changes"
	@echo "make bench  runs all CPU measurements: floors, baselines, scaling; figures in benchmarks/results/"
	@echo "            a quick check that it runs: make bench SIZE=quick"
	@echo "make gpu-test   runs the tests that need a GPU, and the Triton kernels on it"
	@echo "make gpu-bench  runs all GPU measurements; figures in benchmarks/results/; for some cases:"
	@echo "            make gpu-bench CASES=\"attention plan compute\""
	@echo "make gpu-first  runs the most important GPU tests and cases, for when GPU time is short"
	@echo "make bench-compare A=commit B=commit   times two commits alternately"
	@echo "make clean  removes the environment and everything built"
	@echo "All of them first create .venv, with the versions pinned in constraints.txt."

demo: .venv/ready
	$(BIN)/python -m examples.detect_digits

test: .venv/ready
	$(BIN)/python -m pytest -n auto --dist worksteal

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: .venv/docs-ready
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

docs-serve: .venv/docs-ready
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs serve

# Where Python has what they need, PYTHON=... ENVIRONMENT= runs these without making .venv.
ENVIRONMENT ?= .venv/ready
GPU_PYTHON = $(if $(ENVIRONMENT),$(BIN)/python,env PYTHONPATH=src $(PYTHON))
BUILD_IN_PLACE = $(if $(ENVIRONMENT),,$(PYTHON) setup.py build_ext --inplace)
gpu-test: $(ENVIRONMENT)
	$(BUILD_IN_PLACE)
	$(GPU_PYTHON) -m pytest tests/test_gpu.py tests/backends/test_triton.py tests/backends/test_no_stalls.py

# All cases, or those whose names begin with one of CASES.
CASES ?=
gpu-bench: $(ENVIRONMENT)
	$(GPU_PYTHON) -m benchmarks --device cuda --size $(SIZE) $(if $(CASES),--only $(CASES))

gpu-first: $(ENVIRONMENT)
	$(BUILD_IN_PLACE)
	$(GPU_PYTHON) -m pytest tests/test_gpu.py
	$(GPU_PYTHON) -m pytest -n auto tests/backends/test_triton.py
	$(GPU_PYTHON) -m benchmarks --device cuda --only attention plan compute

SIZE ?= full
bench: .venv/bench-ready
	$(BIN)/python -m benchmarks --device cpu --size $(SIZE)

bench-compare: .venv/ready
	$(BIN)/python -m benchmarks.compare $(A) $(B) --size $(SIZE)

# torch comes first: building the kernel needs its headers, and any other package that asks for
# torch would fetch the build with CUDA.
.venv/ready: pyproject.toml setup.py constraints.txt $(wildcard src/vicinal/backends/cpu/csrc/*)
	@echo "Setting up .venv: a virtual environment with torch, the tools and vicinal itself"
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch setuptools
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
		--no-build-isolation --editable ".[demo,dev]"
	touch $@

# natten is built here, against the installed torch; with a visible GPU it would compile its CUDA
# kernels for an hour, which the study on the CPU does not use.
.venv/bench-ready: .venv/ready
	CUDA_VISIBLE_DEVICES= $(BIN)/python -m pip install --quiet --disable-pip-version-check \
		-c constraints.txt --no-build-isolation --editable ".[bench]"
	touch $@

.venv/docs-ready: .venv/ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
		--no-build-isolation --editable ".[docs]"
	touch $@

clean:
	rm -rf .venv build dist out src/*.egg-info src/vicinal/backends/cpu/_cpu*.so
