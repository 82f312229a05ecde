# make demo      train configs/demo.yaml through Ray on this machine
# make test      lint, types and fast tests
# make test-rest what CI runs after it: `slow`, `ray`, `browser` and `gpu`, but not `exhaustive`
# make test-all  all tests, those marked `exhaustive` too: before a release
# make newest    fast tests with the newest megatron-core and torch that pyproject.toml allows, in .venv-newest (Python 3.12)
# make docs      the site into site/, in strict mode
# make storm     32 faults against a run on a Ray cluster of this machine, compared with an undisturbed one (docs/storm.md)
# make wheels    both distributables into dist/
#
# Each creates .venv if missing and installs what it needs, pinned by requirements.lock, which `newest` follows but for those
# two and Triton. They honour PYTHON=, the interpreter that the environment is made from, and ARGS=, key=value overrides or pytest
# arguments.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
INSTALLED_DEV := $(VENV)/.installed-dev
INSTALLED_DOCS := $(VENV)/.installed-docs
REQUIREMENTS := pyproject.toml kernels/pyproject.toml requirements.lock
PIP_INSTALL = $(BIN)/pip install --disable-pip-version-check -c requirements.lock -e kernels
LINTED := dash_dist kernels launch tests tools

# One GPU cannot hold the demo's two context-parallel ranks (NCCL refuses two ranks on a device).
GPUS = $(shell nvidia-smi -L 2>/dev/null | grep -c '^GPU')
DEMO_OVERRIDES = $(if $(filter 1,$(GPUS)),parallel.context=1)

.PHONY: demo test test-rest test-all newest lint docs storm wheels
.DELETE_ON_ERROR:

demo: $(INSTALLED)
	$(BIN)/python launch/ray_train.py configs/demo.yaml $(DEMO_OVERRIDES) $(ARGS)

# Exit status 5: ARGS chose none of a part's tests.
FAST := not slow and not ray and not browser and not gpu
test: lint
	$(BIN)/python -m pytest -n 2 --dist loadgroup -m "$(FAST)" $(ARGS) || [ $$? -eq 5 ]

test-all: test
	$(MAKE) test-rest REST="not ($(FAST))"

# Tests that start Ray clusters come last, with the machine to themselves: five nodes on two busy cores exceed the time that
# Ray allows for a start.
REST := not ($(FAST)) and not exhaustive
test-rest: $(INSTALLED_DEV)
	$(BIN)/python -m pytest -n 2 --dist loadgroup -m "($(REST)) and not ray" $(ARGS) || [ $$? -eq 5 ]
	$(BIN)/python -m pytest -m ray $(ARGS) || [ $$? -eq 5 ]

# Its own environment, whose lock is made anew each time: pip then upgrades what has a newer release.
newest:
	$(PYTHON) -m venv .venv-newest
	grep -vE '^(megatron-core|torch|triton)==' requirements.lock > .venv-newest/requirements.lock
	.venv-newest/bin/pip install --disable-pip-version-check --upgrade -c .venv-newest/requirements.lock \
		megatron-core torch -e kernels -e '.[dev]'
	.venv-newest/bin/python -m pytest -n 2 --dist loadgroup -m "$(FAST)" $(ARGS) || [ $$? -eq 5 ]

storm: $(INSTALLED_DEV)
	$(BIN)/python -m tests.storm --faults 32 $(ARGS)

lint: $(INSTALLED_DEV)
	$(BIN)/ruff check $(LINTED)
	$(BIN)/ruff format --check $(LINTED)
	$(BIN)/mypy
	$(BIN)/mypy launch tools
	$(BIN)/python tools/check_prose.py

docs: $(INSTALLED_DOCS)
	$(BIN)/mkdocs build --strict

wheels: $(INSTALLED_DEV)
	rm -rf dist
	$(BIN)/python -m build --outdir dist kernels
	$(BIN)/python -m build --outdir dist .

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is older than Python 3.11: pass a newer one with PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(INSTALLED): $(REQUIREMENTS) | $(BIN)/python
	$(PIP_INSTALL) -e '.[ray,report]'
	touch $@

# The development install holds everything the plain one does.
$(INSTALLED_DEV): $(REQUIREMENTS) | $(BIN)/python
	$(PIP_INSTALL) -e '.[dev]'
	touch $(INSTALLED) $@

# The site reads docstrings from the sources, without importing them.
$(INSTALLED_DOCS): $(REQUIREMENTS) | $(BIN)/python
	$(PIP_INSTALL) -e '.[docs]'
	touch $@
