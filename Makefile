# make demo, make llava-demo, make test: each sets up what it needs. Python 3.10 or later, a C++ compiler and npm are expected.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
HOSTS := .venv-hosts
FLOORS := .venv-floors
# The oldest Python that the package is for, where it is at hand.
FLOORS_PYTHON ?= $(firstword $(foreach p,python3.10 python3.11,$(shell $(p) -c "" 2>/dev/null && echo $(p))) $(PYTHON))
FLOORS_TESTS ?= models tree fit measure data results protocol trunk test_cli.py

# What make gpu runs on: the environment in .venv, unless PYTHON= names another.
GPU_PYTHON := $(if $(filter file,$(origin PYTHON)),$(BIN)/python,$(PYTHON))

.PHONY: demo llava-demo test test-hosts test-floors gpu notebook docs lint setup clean

demo: setup ## fetch two encoders and pictures, fit a tree, measure it at every split: runs/demo/
	$(BIN)/vst demo

llava-demo: setup ## teach a small language model to talk about pictures seen through a tree: runs/llava-demo/
	$(BIN)/python -m llava_integration demo

# A process for each core, four at most: several tests start processes of their own and hold gigabytes. The tests of a file
# stay in one process, since they share what a fixture made.
test: setup lint ## style, types and the whole test suite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

test-hosts: $(HOSTS)/.ready ## the tree as vision tower of the original LLaVA, unmodified, in an environment of its own
	OMP_NUM_THREADS=1 TORCH_EXTENSIONS_DIR=$(CURDIR)/$(HOSTS)/extensions $(HOSTS)/bin/python -m pytest tests/contract

# Run it before a release and after a change of the floors in pyproject.toml: no part of CI, since it fetches gigabytes
# (torch at its lowest version comes with CUDA) and takes a quarter of an hour. What is asked for directly is installed at
# its lowest version, everything else as new as that allows. huggingface_hub is higher there than its floor, since
# transformers 5 needs it so; make test-hosts runs on a huggingface_hub at the floor. One test is left out: the oldest torch
# compiles the same graphs, but takes ten minutes and more over those of that test.
test-floors: $(FLOORS)/.ready ## the library's tests at the lowest versions that pyproject.toml allows
	$(FLOORS)/bin/uv pip list --python $(FLOORS)/bin/python
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(FLOORS)/bin/python -m pytest $(addprefix tests/,$(FLOORS_TESTS)) --deselect tests/measure/test_execution.py::test_compiled

# With PYTHON= nothing is installed: a machine with a GPU brings its own. STEPS=tests,latency LIMITS="tests=180 latency=240"
# OUT=folder AGAIN=1 DRY=1 are options of tools/gpu.py.
gpu: $(if $(filter file,$(origin PYTHON)),setup) ## everything that is to be run on a GPU: docs/results/gpu/ (docs/gpu.md)
	$(GPU_PYTHON) tools/gpu.py $(if $(STEPS),--steps $(STEPS)) $(foreach limit,$(LIMITS),--limit $(limit)) $(if $(OUT),--out $(OUT)) $(if $(AGAIN),--again) $(if $(DRY),--dry-run)

# The outputs are committed, so that a reader sees them without running it; CI runs it and keeps nothing. One thread and
# no warnings: outputs stay alike from run to run and hold no path of a machine.
notebook: setup ## run the notebook and keep its outputs in it
	OMP_NUM_THREADS=1 PYTHONWARNINGS=ignore $(BIN)/python tools/run_notebook.py notebooks/first-tree.ipynb

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

# pip has no way to ask for the lowest versions, uv has.
$(FLOORS)/.ready: pyproject.toml tools/torchvision_cpu.py
	rm -rf $(FLOORS)
	$(FLOORS_PYTHON) -m venv $(FLOORS)
	$(FLOORS)/bin/python -m pip install --quiet --disable-pip-version-check uv
	$(FLOORS)/bin/uv pip install --quiet --python $(FLOORS)/bin/python --resolution lowest-direct --group floors --editable ".[fit,eval,hub,llava]"
	$(FLOORS)/bin/python tools/torchvision_cpu.py
	touch $@

clean: ## remove the virtual environments; runs and fetched files stay
	rm -rf $(VENV) $(HOSTS) $(FLOORS)
