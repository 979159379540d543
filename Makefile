.PHONY: help demo test test-torch soak lint docs docs-serve gpu-test gpu-sanitize gpu-bench gpu-first bench bench-compare clean
.DEFAULT_GOAL := help
PYTHON ?= python3
BIN := .venv/bin

help:
	@echo "make demo   trains a detector of handwritten digits on large canvases; pictures in out/"
	@echo "python -m examples.classify_points   classifies handwritten digits as point sets"
	@echo "python -m examples.label_points   gives every point of a canvas or a detector's event a label"
	@echo "python -m examples.stream_events   encodes a stream of events slice by slice"
	@echo "make test   runs the tests"
	@echo "make soak   runs the C++ kernel under sanitizers, and again and again, for half an hour;"
	@echo "            a quick part of it: make soak SIZE=quick"
	@echo "make lint   runs ruff and mypy, and mypy and pyright on the code of all pages"
	@echo "make docs   builds the documentation site, strictly, in out/site"
	@echo "make docs-serve  shows it at http://localhost:8000 and follows changes"
	@echo "make bench  runs all CPU measurements: floors, baselines, scaling; figures in benchmarks/results/"
	@echo "            a quick check that it runs: make bench SIZE=quick"
	@echo "python -m benchmarks.ranks   measures 1, 2 and 4 processes that share a scene"
	@echo "make test-torch VERSION=2.14.1   runs them on another torch, in .venv-torch-2.14.1"
	@echo "make gpu-first  tests and measures on a GPU in eight minutes, the most important first;"
	@echo "            without .venv: PYTHON needs torch with its Triton, pytest and hypothesis"
	@echo "make gpu-test   runs the tests that need a GPU, and the Triton kernels on it"
	@echo "make gpu-sanitize   runs the Triton kernels under NVIDIA's Compute Sanitizer, in 20 minutes"
	@echo "make gpu-bench  runs GPU measurements for five minutes, figures in benchmarks/results/; again"
	@echo "            goes on with what is left; for some cases: CASES=\"attention plan compute\""
	@echo "make bench-compare   times this commit and the last release alternately, and warns of what is"
	@echo "            slower; of others: A=commit B=commit"
	@echo "make clean  removes the environment and everything built"
	@echo "make creates .venv first, with the versions pinned in constraints.txt, where a target uses it."

demo: .venv/ready
	$(BIN)/python -m examples.detect_digits

# Keeps pytest's rewritten modules for the next run, even where PYTHONDONTWRITEBYTECODE is set.
test: .venv/ready
	PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n auto --dist worksteal

# An environment for each version of torch, with the Triton that it brings; it stays for the next
# time. The tests run on the wheel, whose kernel is built against that version.
TORCH_ENVIRONMENT = .venv-torch-$(VERSION)
TORCH_PYTHON = $(TORCH_ENVIRONMENT)/bin/python
TESTS ?= -n auto --dist worksteal
test-torch:
	@test -n "$(VERSION)" || { echo "usage: make test-torch VERSION=2.14.1" >&2; exit 2; }
	$(MAKE) $(TORCH_ENVIRONMENT)/ready
	rm -rf $(TORCH_ENVIRONMENT)/wheel
	test ! -d $(TORCH_ENVIRONMENT)/build || find $(TORCH_ENVIRONMENT)/build -path '*/lib*' -type f ! -name '*.so' -delete
	VICINAL_REQUIRE_KERNEL=1 $(TORCH_PYTHON) setup.py -q build --build-base $(TORCH_ENVIRONMENT)/build \
		bdist_wheel --dist-dir $(TORCH_ENVIRONMENT)/wheel
	$(TORCH_PYTHON) -m pip uninstall --quiet --yes vicinal
	$(TORCH_PYTHON) -m pip install --quiet --disable-pip-version-check \
		-c $(TORCH_ENVIRONMENT)/constraints.txt "$$(echo $(TORCH_ENVIRONMENT)/wheel/*.whl)[demo,dev,frameworks,interop]"
	$(TORCH_PYTHON) -m pytest $(TESTS)

# Triton 3.6 interprets kernels with NumPy before 2.4; torch 2.11 and 2.12 need setuptools before 82.
.venv-torch-%/ready:
	@echo "Setting up .venv-torch-$*: torch $* and what it brings"
	test -x .venv-torch-$*/bin/python || $(PYTHON) -m venv .venv-torch-$*
	grep -vE '^(torch|triton|numpy|setuptools)[=><]' constraints.txt > .venv-torch-$*/constraints.txt
	printf 'torch==$*\nnumpy<2.4\n' >> .venv-torch-$*/constraints.txt
	.venv-torch-$*/bin/python -m pip install --quiet --disable-pip-version-check \
		-c .venv-torch-$*/constraints.txt torch 'setuptools>=77' wheel
	touch $@

# Waiting threads sleep: spinning would make it ten times slower on a machine with other load.
soak: .venv/ready
	OMP_WAIT_POLICY=passive PYTHONPATH=tests $(BIN)/python -m tests.soak --size $(SIZE)

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/docs/page_types.py

docs: .venv/ready
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

docs-serve: .venv/ready
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs serve

# Where Python has what they need, PYTHON=... ENVIRONMENT= runs these without making .venv.
ENVIRONMENT ?= .venv/ready
GPU_PYTHON = $(if $(ENVIRONMENT),$(BIN)/python,env PYTHONPATH=src $(PYTHON))
BUILD_IN_PLACE = $(if $(ENVIRONMENT),,$(PYTHON) setup.py build_ext --inplace)
TRITON_TESTS = $(filter-out %_compiled.py,$(wildcard tests/backends/test_triton*.py)) tests/_index/test_sampling.py
gpu-test: $(ENVIRONMENT)
	$(BUILD_IN_PLACE)
	$(GPU_PYTHON) -m pytest tests/test_gpu.py $(TRITON_TESTS) tests/backends/test_no_stalls.py

gpu-sanitize: $(ENVIRONMENT)
	$(BUILD_IN_PLACE)
	$(GPU_PYTHON) -m pytest tests/backends/test_sanitizer.py

# All cases, or those whose names begin with one of CASES, that have no figures yet from this code.
CASES ?=
PART_SECONDS ?= 290
gpu-bench: $(ENVIRONMENT)
	$(GPU_PYTHON) -m benchmarks --device cuda --size $(SIZE) --resume --seconds $(PART_SECONDS) \
		$(if $(CASES),--only $(CASES))

# Without .venv: PYTHON is to have torch with its Triton, pytest and hypothesis.
OUT ?= benchmarks/results
gpu-first:
	env PYTHONPATH=src $(PYTHON) -m benchmarks.first --out $(OUT)

SIZE ?= full
bench: .venv/bench-ready
	$(BIN)/python -m benchmarks --device cpu --size $(SIZE)

A ?= $(shell git describe --tags --abbrev=0 --match 'v*' 2>/dev/null)
B ?= HEAD
bench-compare: .venv/ready
	@test -n "$(A)" || { echo "no release to compare with: give A=commit" >&2; exit 2; }
	$(BIN)/python -m benchmarks.compare $(A) $(B) --size $(SIZE)

# torch comes first: building the kernel needs its headers, and any other package that asks for
# torch would fetch the build with CUDA.
.venv/ready: pyproject.toml setup.py constraints.txt $(wildcard build_backend/*.py src/vicinal/backends/cpu/csrc/* src/vicinal/backends/cpu/csrc/kernels/* src/vicinal/backends/cpu/csrc/kernels/attention/*)
	@echo "Setting up .venv: a virtual environment with torch, the tools and vicinal itself"
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch setuptools
	VICINAL_REQUIRE_KERNEL=1 $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
		--no-build-isolation --editable ".[demo,dev,docs,frameworks,interop]"
	touch $@

# natten is built here, against the installed torch; with a visible GPU it would compile its CUDA
# kernels for an hour, which the study on the CPU does not use.
.venv/bench-ready: .venv/ready
	CUDA_VISIBLE_DEVICES= $(BIN)/python -m pip install --quiet --disable-pip-version-check \
		-c constraints.txt --no-build-isolation --editable ".[bench]"
	touch $@

clean:
	rm -rf .venv .venv-torch-* build dist out src/*.egg-info src/vicinal/backends/cpu/_cpu*.so
