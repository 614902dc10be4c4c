# make demo   install mirrord into .venv and move a live disk, showing what happens
# make test   install what the tests need and run all of them
# make bench  install what the tests need and measure beside other programs
# make fuzz   install a fuzzer and run every parser on changed input, each for a minute
#
# Each target does its own set-up, and does it once: a second run starts at once.

VENV := .venv
BIN := $(VENV)/bin
FUZZ_SECONDS ?= 60
WORKERS ?= 3# test processes: on two cores, as some of them wait

# Where it is installed, and with which Python it runs then; EXTRAS=kerberos builds what that needs.
PREFIX ?= /usr/local
SYSCONFDIR ?= /etc
DESTDIR ?=
SYSTEM_PYTHON ?= /usr/bin/python3
EXTRAS ?=
WHEELS := build/wheels
PAGES := build/pages
PIP := $(BIN)/python -m pip --disable-pip-version-check
SOURCES := $(shell find mirrord -name '*.py') pyproject.toml
INSTALL := DESTDIR="$(DESTDIR)" PREFIX="$(PREFIX)" SYSCONFDIR="$(SYSCONFDIR)" \
	PYTHON="$(SYSTEM_PYTHON)" PIP="$(abspath $(BIN))/python -m pip --disable-pip-version-check" \
	WHEELS="$(abspath $(WHEELS))" PAGES="$(abspath $(PAGES))" systemd/packaging/install

.PHONY: demo test lint bench bench-readme fuzz packages install uninstall deb clean help
.DELETE_ON_ERROR:

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile
	@echo 'make lint   ruff and mypy alone'
	@echo 'make bench SCENARIOS="nbd copy"   some of it; make bench-readme writes the figures down'
	@echo 'make install PREFIX=/usr/local   and make uninstall; make deb builds a Debian package'
	@echo 'make clean  remove .venv, caches and everything else that was made here'

demo: $(VENV)/.installed
	$(BIN)/mirrord demo

# A folder of its own for the tests' disks: what an earlier run left mounted can't disturb this one.
test: packages lint $(WHEELS)/.ours $(PAGES)/.made
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

# All that needs the network is in the wheels: whoever made them can install without it.
install: $(WHEELS)/.ours $(PAGES)/.made
	$(INSTALL)

uninstall:
	$(INSTALL) uninstall

deb: $(WHEELS)/.ours $(PAGES)/.made
	SYSTEM_PYTHON="$(SYSTEM_PYTHON)" systemd/packaging/build-deb

$(WHEELS)/.made: pyproject.toml | $(BIN)/python
	rm -rf $(WHEELS)
	$(PIP) --python $(SYSTEM_PYTHON) wheel --quiet --quiet --wheel-dir $(WHEELS) ".$(EXTRAS:%=[%])"
	touch $@

$(WHEELS)/.ours: $(WHEELS)/.made $(SOURCES)
	rm -f $(WHEELS)/mirrord-*
	$(PIP) --python $(SYSTEM_PYTHON) wheel --quiet --quiet --no-deps --wheel-dir $(WHEELS) .
	touch $@

$(PAGES)/.made: $(SOURCES) systemd/packaging/pages.py systemd/mirrord.toml | $(VENV)/.installed
	rm -rf $(PAGES)
	$(BIN)/python systemd/packaging/pages.py $(PAGES)
	touch $@

# FUZZ_TARGETS="location configuration" for some of them. What was found is kept in .cache/fuzz.
fuzz: $(VENV)/.installed-for-fuzz
	nice $(BIN)/python -m tests.fuzz $(FUZZ_TARGETS) --seconds $(FUZZ_SECONDS)

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

$(VENV)/.installed-for-fuzz: $(VENV)/.installed-for-tests
	$(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check --editable '.[fuzz]'
	touch $@

clean:
	rm -rf $(VENV) .cache .mypy_cache .pytest_cache .ruff_cache .hypothesis .coverage build dist
	rm -rf *.egg-info
	find mirrord tests bench -name __pycache__ -prune -exec rm -rf {} +
