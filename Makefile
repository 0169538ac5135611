# make demo   install into .venv and train on the embedded dataset
# make test   install into .venv with everything for development, then `make check`
# make check  exactly what CI runs, in an environment that is set up already
# make docs   build the site into build/site
# make quick  lint, types and a fast part of the tests that enters every room

PYTHON ?= python3
BIN := .venv/bin
WORKERS ?= 2
# runtime, rules, optim, models, data, episodes, engine, verification, learners, analysis, training, reproduce, cli
QUICK := architecture files perturbations optim rules validation_sets models folder load_dataset episodes interop \
	learners evaluation congruence config ledger help readme site api

.PHONY: demo test check quick lint types package tests docs clean

demo: .venv/installed
	$(BIN)/train_maml --inner agnostic_sam --ways 5 --shots 1

test: .venv/developing
	$(MAKE) check

check: lint types package docs tests

quick: lint types
	$(BIN)/pytest -q -n $(WORKERS) $(QUICK:%=tests/test_%.py)

lint:
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types:
	$(BIN)/mypy

package:
	rm -rf dist build
	$(BIN)/python -m build --no-isolation --outdir dist . > /dev/null
	$(BIN)/pip install --quiet --no-deps --target build/wheel dist/*.whl

# The tests import the installed wheel, not the working tree.
tests: package
	PYTHONPATH=$(CURDIR)/build/wheel $(BIN)/pytest -n $(WORKERS) --durations=10

# Warnings are errors: a broken link, a page that no table of contents names, a docstring that cannot be read.
docs:
	$(BIN)/python -m sphinx --quiet --fail-on-warning --keep-going --doctree-dir build/doctrees -c docs . build/site

.venv/bin/python:
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip

.venv/installed: pyproject.toml constraints.txt | .venv/bin/python
	$(BIN)/pip install --constraint constraints.txt --editable .
	touch $@

.venv/developing: pyproject.toml constraints.txt scripts/install_peers.py | .venv/bin/python
	$(BIN)/pip install --constraint constraints.txt --editable ".[dev]"
	$(BIN)/python scripts/install_peers.py
	touch $@ .venv/installed

clean:
	rm -rf .venv build dist *.egg-info
