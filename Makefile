# SPDX-License-Identifier: Apache-2.0
# `make demo` and `make test` need nothing but Python (with venv) and a C++ compiler; everything else goes into $(VENV).
PYTHON ?= python3
VENV ?= .venv

TORCH := torch==2.13.0
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip
# pip builds the extension with the cmake and ninja that it has just installed.
export PATH := $(abspath $(BIN)):$(PATH)
# What the extension is built from: when one of these changes, the next target builds again.
SOURCES := setup.py CMakeLists.txt pyproject.toml $(shell find csrc -type f)
CPP_FILES := $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

# A run leaves nothing but build/ and benchmarks/results.
BENCHMARKS := -B -m pytest -p no:cacheprovider -q benchmarks/ops/*.py benchmarks/scaling.py \
	--benchmark-disable-gc --benchmark-quiet --benchmark-storage=build/benchmarks

.DELETE_ON_ERROR:
.PHONY: demo test test-abi setup lint bench bench-full clean

demo: setup
	@$(BIN)/python -m hourllava.demo

test: setup
	@$(BIN)/python -m pytest

# The stable ABI's promise: the library as it was built for one torch works with another, and another Python. Not part
# of `make test`: a torch with CUDA is a download of 3 GB. Name others: make test-abi ABI_PYTHON=... ABI_TORCH=...
ABI_PYTHON ?= python3.12
ABI_TORCH ?= torch==2.11.0
test-abi: setup
	$(ABI_PYTHON) -m venv $(VENV)-abi
	$(VENV)-abi/bin/python -m pip install $(ABI_TORCH) numpy pytest
	PYTHONPATH=. $(VENV)-abi/bin/python -m pytest -q -p no:cacheprovider tests/ops tests/test_library.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CPP_FILES)
	$(BIN)/mypy

# About five minutes; every shape and length takes the better part of an hour.
bench: setup
	$(BIN)/python $(BENCHMARKS) --benchmark-max-time=0.5 --benchmark-min-rounds=3

bench-full: setup
	$(BIN)/python $(BENCHMARKS) --full

setup: $(VENV)/.installed

clean:
	rm -rf $(VENV) $(VENV)-abi build dist python/*.egg-info *.egg-info hourllava_ext/*.so

$(VENV)/.ready:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "hourllava: $(PYTHON) is missing or older than 3.10;" \
		"install a newer one, or name it: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
		{ echo "hourllava: $(PYTHON) has no venv module;" \
		"install it (Debian and Ubuntu: apt-get install python3-venv)" >&2; exit 1; }
	@command -v "$${CXX:-c++}" >/dev/null || \
		{ echo "hourllava: there is no C++ compiler ($${CXX:-c++});" \
		"install one (Debian and Ubuntu: apt-get install g++; macOS: xcode-select --install)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --upgrade pip
	@touch $@

# torch comes first and alone, and every later step is held to the version that is there: the extension is built against
# it, and no dependency can bring a second one.
$(VENV)/torch.txt: $(VENV)/.ready
	$(BIN)/python -c 'import torch' 2>/dev/null || $(PIP) install $(TORCH)
	$(BIN)/python -c 'from importlib.metadata import version; print("torch==" + version("torch"))' > $@

$(VENV)/.installed: $(VENV)/torch.txt $(SOURCES)
	$(PIP) install --constraint $< 'setuptools>=77' wheel 'cmake>=3.24' ninja
	$(PIP) install --no-build-isolation --constraint $< --editable ".[dev]"
	@touch $@
