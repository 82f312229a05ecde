# make demo   create .venv if missing, install, and train configs/demo.yaml through Ray on this machine
# make test   create .venv if missing, install with the development tools, then lint, type check and test
# make storm  32 faults against a run on a Ray cluster of this machine, compared with an undisturbed one (docs/storm.md)
# They honour PYTHON=, the interpreter that .venv is made from, and ARGS=, key=value overrides or pytest arguments.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
INSTALLED_DEV := $(VENV)/.installed-dev
REQUIREMENTS := pyproject.toml tests/constraints.txt
LINTED := dash_dist kernels launch tests tools

# One GPU cannot hold the demo's two context-parallel ranks (NCCL refuses two ranks on a device).
GPUS = $(shell nvidia-smi -L 2>/dev/null | grep -c '^GPU')
DEMO_OVERRIDES = $(if $(filter 1,$(GPUS)),parallel.context=1)

.PHONY: demo test lint storm
.DELETE_ON_ERROR:

demo: $(INSTALLED)
	$(BIN)/python launch/ray_train.py configs/demo.yaml $(DEMO_OVERRIDES) $(ARGS)

# Two workers; those that start Ray clusters come after, with the machine to themselves: five nodes on two cores that do
# something else do not start in the time that Ray gives them. Exit status 5: ARGS chose none of a part's tests.
ALONE := tests/launch tests/cluster
test: lint
	$(BIN)/python -m pytest -n 2 --dist loadgroup $(ALONE:%=--ignore=%) $(ARGS) || [ $$? -eq 5 ]
	$(BIN)/python -m pytest $(ALONE) $(ARGS) || [ $$? -eq 5 ]

storm: $(INSTALLED_DEV)
	$(BIN)/python -m tests.storm --faults 32 $(ARGS)

lint: $(INSTALLED_DEV)
	$(BIN)/ruff check $(LINTED)
	$(BIN)/ruff format --check $(LINTED)
	$(BIN)/mypy
	$(BIN)/mypy launch tools

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is older than Python 3.11: pass a newer one with PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(INSTALLED): $(REQUIREMENTS) | $(BIN)/python
	$(BIN)/pip install --disable-pip-version-check -c tests/constraints.txt -e .
	touch $@

# The development install holds everything the plain one does.
$(INSTALLED_DEV): $(REQUIREMENTS) | $(BIN)/python
	$(BIN)/pip install --disable-pip-version-check -c tests/constraints.txt -e '.[dev]'
	touch $(INSTALLED) $@
