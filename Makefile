# make demo   install mirrord into .venv and move a live disk, showing what happens
# make test   install what the tests need and run all of them
# make bench  install what the tests need and measure beside other programs
#
# Each target does its own set-up, and does it once: a second run starts at once.

VENV := .venv
BIN := $(VENV)/bin
WORKERS ?= 3# test processes: on two cores, as some of them wait

.PHONY: demo test lint bench bench-readme packages clean help
.DELETE_ON_ERROR:

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile
	@echo 'make lint   ruff and mypy alone'
	@echo 'make bench SCENARIOS="nbd copy"   some of it; make bench-readme writes the figures down'
	@echo 'make clean  remove .venv, caches and everything else that was made here'

demo: $(VENV)/.installed
	$(BIN)/mirrord demo

# A folder of its own for the tests' disks: what an earlier run left mounted can't disturb this one.
test: packages lint
	folder=$$(mktemp -d -t mirrord-tests-XXXXXX) && \
	$(BIN)/pytest -n $(WORKERS) --dist worksteal --basetemp="$$folder" $(PYTEST_ARGS) && \
	rm -rf "$$folder"

lint: $(VENV)/.installed-for-tests
	$(BIN)/ruff check .
	$(BIN)/mypy --strict

# Three quarters of an hour on two quiet cores, and it wants 21 GiB in /tmp (BENCH_ARGS="--folder …") and a quiet machine.
bench: $(VENV)/.installed-for-tests
	$(BIN)/python -m bench $(SCENARIOS) $(BENCH_ARGS)

bench-readme: $(VENV)/.installed
	$(BIN)/python -m bench readme

packages:
	.ci/packages

$(BIN)/python:
	.ci/make-venv $(VENV)

$(VENV)/.installed: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check --editable .
	touch $@

# Kerberos for Python comes as source, for which `packages` has the compiler.
$(VENV)/.installed-for-tests: pyproject.toml | $(BIN)/python packages
	CFLAGS="-O1 -g0" $(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check --editable '.[test]'
	touch $@ $(VENV)/.installed

clean:
	rm -rf $(VENV) .cache .mypy_cache .pytest_cache .ruff_cache .hypothesis .coverage build dist
	rm -rf *.egg-info
	find mirrord tests bench -name __pycache__ -prune -exec rm -rf {} +
