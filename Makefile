# Two commands for a new user: `make quickstart` and `make test`. Each does all of its own set-up.
PYTHON ?= $(shell for p in python3 python3.12 python3.11; do \
    $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV ?= .venv
PEERS_VENV ?= .venv-peers
RUN = $(VENV)/bin/python
PYTEST_ARGS ?=
# A module's tests share their fixtures, so they stay in one process. Where one ends that process, the suite ends and
# names it: what would be started in its place waits for ever. tests/conftest.py says in which order modules begin.
WORKERS ?= 2
# Large pages for XLA's buffers on a CPU, kept instead of returned to the system: a third less time (glibc only).
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1:glibc.malloc.trim_threshold=8000000000:glibc.malloc.mmap_threshold=4000000000

.PHONY: quickstart test test-slow test-peers lint lock plan-table clean

quickstart: $(VENV)/.installed
	$(RUN) -m launch.quickstart

test: $(VENV)/.installed-dev
	$(RUN) -m pytest -n $(WORKERS) --dist loadscope --no-loadscope-reorder --max-worker-restart 0 $(PYTEST_ARGS)

# Fifty random kills of a run, which then must have lost nothing; Flamingo on four processes, two and one.
test-slow: $(VENV)/.installed-dev
	$(RUN) -m pytest -s -m slowest $(PYTEST_ARGS)

# Against PyTorch's CLIP and SigLIP, in an environment of their own.
test-peers: $(PEERS_VENV)/.installed
	$(PEERS_VENV)/bin/python -m pytest tests/peers $(PYTEST_ARGS)
	$(PEERS_VENV)/bin/python -m pytest tests/test_preprocess.py $(PYTEST_ARGS)  # pixels with the oracle's Pillow

lint: $(VENV)/.installed-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# Both versions of Python get their pins from the same two lock files; the larger set is resolved first, as an extra may
# ask for an older release than the newest.
UV_COMPILE = $(VENV)/bin/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes \
    --no-emit-index-url --no-annotate
lock: $(VENV)/.installed-dev
	$(RUN) -m pip install --quiet uv
	$(UV_COMPILE) --extra dev pyproject.toml -o requirements-dev.lock
	$(UV_COMPILE) -c requirements-dev.lock pyproject.toml -o requirements.lock

$(VENV)/bin/python $(PEERS_VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "make: Python 3.11 or newer was not found; name one: make PYTHON=/path/to/python3.12"; exit 1; }
	$(PYTHON) -m venv $(@:/bin/python=)

$(VENV)/.installed: requirements.lock | $(VENV)/bin/python
	$(RUN) -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
	touch $@

$(VENV)/.installed-dev: requirements-dev.lock | $(VENV)/bin/python
	$(RUN) -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements-dev.lock
	touch $@

# PyTorch first: a resolver left to choose takes its largest build. After a change of pyproject.toml pip only adds
# what is not there yet.
$(PEERS_VENV)/.installed: pyproject.toml | $(PEERS_VENV)/bin/python
	$(PEERS_VENV)/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(PEERS_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -e ".[peers,tpu]"
	touch $@

# What the configs for pods take, then ViT-L/14@336 from 8 to 4,096 chips at 64 examples on each. What stands in a table
# is not compiled again.
plan-table: $(VENV)/.installed-dev
	$(RUN) -m launch.planning.table launch/planning/table.md
	$(RUN) -m launch.planning.growth launch/planning/growth.json

clean:
	rm -rf runs .cache $(VENV) $(PEERS_VENV)
