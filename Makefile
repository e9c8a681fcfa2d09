# Two commands: `make test` and `make bench`. Each sets up what it needs in .venv and builds the native library in place.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The CPU build of torch serves everything but a GPU's own measurements; another torch: make TORCH=torch==2.11.0 ...
TORCH ?= torch==2.13.0
# Two processes, a file of tests in one of them: many small calls and compilations leave half of two cores idle.
PYTEST_ARGS ?= -n 2 --dist loadfile

.PHONY: test bench build clean

test: build
	$(BIN)/python -m pytest $(PYTEST_ARGS)

bench: export PYKERNELS_CUDA := $(shell command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1 && echo auto || echo 0)
bench: build
	$(BIN)/python -m pykernels info
	@# Threads that sleep while they wait, not spin: verify is many small calls.
	OMP_WAIT_POLICY=passive $(BIN)/python -m pykernels verify
	$(BIN)/python -m bench.run
	$(BIN)/python examples/train_lm.py --short

build: $(VENV)/.ready
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .

$(VENV)/.ready: pyproject.toml Makefile
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet "setuptools>=77" wheel "cmake>=3.24" ninja
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable ".[test,bench]"
	touch $@

clean:
	rm -rf $(VENV) build dist pykernels/libpykernels.so *.egg-info
