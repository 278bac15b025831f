# make demo, make llava-demo, make test: each sets up what it needs. Python 3.10 or later, a C++ compiler and npm are expected.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
HOSTS := .venv-hosts

.PHONY: demo llava-demo test test-hosts docs lint setup clean

demo: setup ## fetch two encoders and pictures, fit a tree, measure it at every split: runs/demo/
	$(BIN)/vst demo

llava-demo: setup ## teach a small language model to talk about pictures seen through a tree: runs/llava-demo/
	$(BIN)/python -m llava_integration demo

test: setup lint ## style, types and the whole test suite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest

test-hosts: $(HOSTS)/.ready ## the tree as vision tower of the original LLaVA, unmodified, in an environment of its own
	OMP_NUM_THREADS=1 TORCH_EXTENSIONS_DIR=$(CURDIR)/$(HOSTS)/extensions $(HOSTS)/bin/python -m pytest tests/contract

docs: setup ## the API reference, from the docstrings: build/docs/index.html
	$(BIN)/python tools/api_reference.py build/docs

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

# The host pins a torch of 2023 and much that its model never imports: it comes without its dependencies.
$(HOSTS)/.ready: pyproject.toml constraints-hosts.txt tools/torchvision_cpu.py
	$(PYTHON) -m venv $(HOSTS)
	$(HOSTS)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints-hosts.txt --editable ".[hosts]" peft deepspeed ninja psutil pytest pytest-timeout
	$(HOSTS)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints-hosts.txt --no-deps llava-torch
	$(HOSTS)/bin/python tools/torchvision_cpu.py
	touch $@

clean: ## remove the virtual environments; runs and fetched files stay
	rm -rf $(VENV) $(HOSTS)
