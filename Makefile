# make demo, make llava-demo, make test: each sets up what it needs. Python 3.10 or later, a C++ compiler and npm are expected.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo llava-demo test lint setup clean

demo: setup ## fetch two encoders and pictures, fit a tree, measure it at every split: runs/demo/
	$(BIN)/vst demo

llava-demo: setup ## teach a small language model to talk about pictures seen through a tree: runs/llava-demo/
	$(BIN)/python -m llava_integration demo

test: setup lint ## style, types and the whole test suite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt tools/torchvision_cpu.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	$(BIN)/python tools/torchvision_cpu.py
	touch $@

clean: ## remove the virtual environment; runs and fetched files stay
	rm -rf $(VENV)
