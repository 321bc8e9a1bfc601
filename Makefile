# Everything that is run in this repository is run from here. Python 3.11 or newer and make are all that has
# to be there: the first target that needs an environment builds it, later ones use it again. An environment
# is brought up to date when pyproject.toml or the constraints change.
#
# Settings, for example `make test WORKERS=4 ARGS="-k hooks"`:
#   PYTHON     the Python to build environments with (else the newest that is found)
#   PIP_ARGS   more arguments for `pip install`
#   WORKERS    test processes, one thread each (0: no worker processes, which a debugger needs)
#   ARGS       more arguments for the command that the target runs

VENV := .venv
BENCH_VENV := .venv-bench
PYTHON ?=
PIP_ARGS ?=
WORKERS ?= 2
ARGS ?=

CANDIDATES = $(if $(PYTHON),"$(PYTHON)",python3.13 python3.12 python3.11 python3)
# One thread per process: two workers whose threads compete for two cores are slower than one.
ONE_THREAD = OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false

.DEFAULT_GOAL := help
.PHONY: help demo serve test test-slow lint format bench install docs python clean again

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z][a-z-]*:.*## / { printf "make %-10s %s\n", $$1, $$2 }' Makefile

demo: $(VENV)/.installed ## show what the library does on the models it ships
	$(VENV)/bin/lenskit demo $(ARGS)

serve: $(VENV)/.installed ## serve the embedded models on this machine, without keys
	$(VENV)/bin/lenskit serve demo-gpt2 demo-llama --no-keys $(ARGS)

test: lint ## lint, then run the tests that are not marked slow
	$(ONE_THREAD) $(VENV)/bin/python -m pytest -m "not slow" -n $(WORKERS) --dist worksteal $(ARGS)

test-slow: $(VENV)/.installed ## run the tests that are marked slow
	$(ONE_THREAD) $(VENV)/bin/python -m pytest -m slow -n $(WORKERS) --dist worksteal $(ARGS)

lint: $(VENV)/.installed ## check style, formatting and types
	$(VENV)/bin/python -m ruff check
	$(VENV)/bin/python -m ruff format --check
	$(VENV)/bin/python -m mypy

format: $(VENV)/.installed ## repair style and formatting, where that can be done automatically
	$(VENV)/bin/python -m ruff check --fix
	$(VENV)/bin/python -m ruff format

bench: $(BENCH_VENV)/.installed ## compare speed and memory with transformers and TransformerLens
	$(BENCH_VENV)/bin/python scripts/benchmark.py $(ARGS)

docs: $(VENV)/.installed-docs ## build the documentation into site/
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/python -m mkdocs build $(ARGS)

install: $(VENV)/.installed ## only build the environment

clean: ## remove the environments, caches and build outputs
	rm -rf .venv .venv-bench .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist site
	find lenskit scripts tests -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

# --- environments ---------------------------------------------------------------------------------------

# A program for `python -c`: exits 0 where an environment can be built with this Python.
SUITABLE = import sys; sys.exit(sys.version_info < (3, 11))

# Shell: sets `python` to the first candidate that runs, is new enough and can make environments, or stops.
# Each is run, not only looked up: a version manager's stand-ins are found but fail.
define FIND_PYTHON
python=; no_venv=; \
for candidate in $(CANDIDATES); do \
    "$$candidate" -c '$(SUITABLE)' >/dev/null 2>&1 || continue; \
    if "$$candidate" -c 'import ensurepip, venv' >/dev/null 2>&1; then python=$$candidate; break; fi; \
    no_venv="$$no_venv $$candidate"; \
done; \
if [ -z "$$python" ] && [ -n "$$no_venv" ]; then \
    echo "Found$$no_venv, but without the module that makes virtual environments." >&2; \
    echo "Install it (Debian and Ubuntu: apt install python3-venv) and run make again." >&2; \
    exit 1; \
elif [ -z "$$python" ]; then \
    echo 'No Python 3.11 or newer found; tried: $(subst ",,$(CANDIDATES)).' >&2; \
    echo "Install one (Debian and Ubuntu: apt install python3 python3-venv; macOS: brew install python)" >&2; \
    echo "or name one that is not on the PATH: make PYTHON=/path/to/python3" >&2; \
    exit 1; \
fi
endef

python: # print the Python that environments are built with; fails where none is suitable
	@$(FIND_PYTHON); "$$python" -c 'import sys; print(sys.executable)'

# Whether the environment $(1) was completed in this folder (environments cannot be moved) and still runs.
ready = $(shell [ "$$(cat $(1)/.installed 2>/dev/null)" = "$$(pwd)" ] && $(1)/bin/python -c '' 2>/dev/null && echo yes)

# Shell: makes the environment $(1), unless there is one that works and was not moved here from elsewhere.
define MAKE_VENV
if ! $(1)/bin/python -c 'import pip; $(SUITABLE)' >/dev/null 2>&1 || \
    { [ -e $(1)/.installed ] && [ "$$(cat $(1)/.installed)" != "$$(pwd)" ]; }; then \
    $(FIND_PYTHON); \
    echo "Making $(1) with $$("$$python" -c 'import sys; print("Python", sys.version.split()[0])')"; \
    "$$python" -m venv --clear $(1); \
fi
endef

$(VENV)/.installed: pyproject.toml constraints.txt $(if $(call ready,$(VENV)),,again)
	@$(call MAKE_VENV,$(VENV))
	$(VENV)/bin/python -m pip install $(PIP_ARGS) -c constraints.txt -e '.[dev]'
	@pwd > $@

# What builds the documentation comes into the same environment when it is first asked for: its pages say what lenskit
# says of itself, so they need it and torch, and the tests do without the rest.
$(VENV)/.installed-docs: $(VENV)/.installed
	$(VENV)/bin/python -m pip install $(PIP_ARGS) -c constraints.txt -e '.[docs]'
	@touch $@

# TransformerLens and what it brings stay out of the development environment.
$(BENCH_VENV)/.installed: pyproject.toml constraints.txt constraints-bench.txt $(if $(call ready,$(BENCH_VENV)),,again)
	@$(call MAKE_VENV,$(BENCH_VENV))
	$(BENCH_VENV)/bin/python -m pip install $(PIP_ARGS) -c constraints.txt -c constraints-bench.txt -e . transformer-lens
	@pwd > $@
