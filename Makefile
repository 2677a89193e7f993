# Every target repeats quickly when nothing changed, and stops at the first failure. `make help` lists them.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin
SITE := _build/html
PORT ?= 8000

# Waiting threads sleep instead of spinning: on a busy machine spinning costs minutes.
export OMP_WAIT_POLICY := PASSIVE

SOURCES := $(shell find safescale_lib -name '*.py' -o -path '*/zoo/weights/*' -type f -o -path '*/survey/data/*' -type f)
SCRIPTS := $(wildcard notebooks/[0-9]*.py)
NOTEBOOKS := $(SCRIPTS:.py=.ipynb)
PAGES := _config.yml _toc.yml CHANGELOG.md $(shell find book benchmarks/results notebooks/measured -type f -not -path '*/__pycache__/*' 2>/dev/null)

.PHONY: help book pdf serve lab notebooks test lint unit nbval site-test lab-test bench clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

book: $(SITE)/index.html  ## environment, install, website from the committed outputs
	@echo "Open $(CURDIR)/$(SITE)/index.html in a browser, or run: make serve"

pdf: _build/safescale.pdf  ## the whole book as one PDF, printed by Chromium

serve: book  ## show the website on localhost
	$(BIN)/python -m http.server $(PORT) --bind 127.0.0.1 --directory $(SITE)

lab: $(VENV)/ready  ## open JupyterLab on the notebooks
	$(BIN)/jupyter lab notebooks

notebooks: _build/notebooks.stamp  ## run every notebook again and keep its outputs
	@echo "The notebooks are up to date."

test: lint unit nbval site-test lab-test  ## lint, types, unit tests, notebooks with their outcomes, site, JupyterLab
	@echo "All checks passed."

lint: $(VENV)/ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# One thread a worker: two workers with two threads each would only wait for one another.
unit: $(VENV)/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal --ignore=tests/site --ignore=tests/notebooks/test_jupyterlab.py

nbval: $(VENV)/ready
	$(BIN)/python notebooks/build.py --check
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -p tests.nbval_outcomes --nbval-lax --nbval-cell-timeout=240 -n 2 --dist loadfile notebooks

site-test: $(SITE)/index.html
	SAFESCALE_SITE=$(SITE) $(BIN)/python -m pytest -q -n 2 --dist worksteal tests/site

# A chapter in a real JupyterLab: as long as the chapter, so no other test runs beside it.
lab-test: $(VENV)/ready
	$(BIN)/python -m pytest -q tests/notebooks/test_jupyterlab.py

BENCHMARKS := pgd carlini_wagner square ensemble backdoor_detectors

bench: .venv-bench/ready .venv-gcg/ready  ## measure attacks and detectors side by side with named libraries, one after the other
	for name in $(BENCHMARKS); do .venv-bench/bin/python -m benchmarks.$$name; done
	.venv-gcg/bin/python -m benchmarks.gcg

clean:  ## remove what was built; the environment and the weights stay
	rm -rf _build zoo-training .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(VENV)/ready: requirements.txt pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "Python 3.11 is needed; name it with: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@

.venv-bench/ready: benchmarks/requirements.txt
	$(PYTHON) -m venv .venv-bench
	.venv-bench/bin/pip install --quiet --disable-pip-version-check -r benchmarks/requirements.txt
	.venv-bench/bin/pip install --quiet --disable-pip-version-check --no-deps torchattacks==3.5.1
	touch $@

.venv-gcg/ready: benchmarks/requirements-gcg.txt
	$(PYTHON) -m venv .venv-gcg
	.venv-gcg/bin/pip install --quiet --disable-pip-version-check -r benchmarks/requirements-gcg.txt
	touch $@

$(SITE)/index.html: $(VENV)/ready $(NOTEBOOKS) $(SOURCES) $(PAGES)
	rm -rf $(SITE)
	$(BIN)/jupyter-book build . --path-output . -W -n --keep-going --all -q
	touch $@

_build/safescale.pdf: $(VENV)/ready $(NOTEBOOKS) $(SOURCES) $(PAGES)
	$(BIN)/python book/pdf.py --output $@

_build/notebooks.stamp: $(VENV)/ready $(SCRIPTS) $(SOURCES) notebooks/build.py
	$(BIN)/python notebooks/build.py
	mkdir -p _build && touch $@
