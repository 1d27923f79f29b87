# Targets set themselves up: each needs nothing but a Python 3.11 to 3.13.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
BUDGET ?= 1.0
WORKDIR ?= runs/quickstart
PYTEST_FLAGS ?=
# A file's tests run in one process, where they share what they compile.
PYTEST := $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder
export KILLS ?= 5

# Programs that were compiled once are read back by later runs.
export JAX_COMPILATION_CACHE_DIR ?= $(CURDIR)/.cache/jax

# The extra of pyproject.toml that brings jax for this machine's accelerators.
ACCELERATOR ?= cuda12

.PHONY: quickstart gpu test test-slow test-faults test-parity lint format clean

quickstart: $(VENV)/ready
	$(BIN)/python -m launch.quickstart --workdir=$(WORKDIR) \
	  --budget=$(BUDGET)

# Checks and times a GPU (or, with ACCELERATOR=tpu, a TPU) in eight minutes.
# Torch's steps of the same networks are a command of their own, see
# tests/parity/torch_steps.py.
gpu: $(VENV)/ready-$(ACCELERATOR)
	$(BIN)/python -m launch.benchmark --suite --out=runs/suite.json

test: $(VENV)/ready-test
	$(PYTEST) -m "not slow and not faults" --ignore=tests/parity $(PYTEST_FLAGS)

# Whatever compiles for more than ten seconds: meshes, two processes, commands that
# train, the packages. .ci/run leaves out what is marked `long` too.
test-slow: $(VENV)/ready-test
	$(PYTEST) -m slow --ignore=tests/parity $(PYTEST_FLAGS)

# kill -9 in the middle of trainings, KILLS times each.
test-faults: $(VENV)/ready-test
	$(BIN)/python -m pytest -n auto -m faults --ignore=tests/parity $(PYTEST_FLAGS)

# The same networks in torch: values, gradients.
test-parity: $(VENV)/ready-parity
	$(BIN)/python -m pytest -n auto tests/parity $(PYTEST_FLAGS)

lint: $(VENV)/ready-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/ready-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# One environment; the second stamp adds what only tests need, the third what
# only comparisons with torch do.
$(VENV)/ready: requirements.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -r requirements.txt
	touch $@

$(VENV)/ready-test: $(VENV)/ready requirements-test.txt
	$(BIN)/python -m pip install --quiet -r requirements-test.txt
	touch $@

$(VENV)/ready-parity: $(VENV)/ready-test requirements-parity.txt
	$(BIN)/python -m pip install --quiet -r requirements-parity.txt
	touch $@

$(VENV)/ready-$(ACCELERATOR): $(VENV)/ready
	$(BIN)/python -m pip install --quiet -c requirements.txt \
	  "jax[$(ACCELERATOR)]"
	touch $@

clean:
	rm -rf $(VENV) .cache .mypy_cache runs
