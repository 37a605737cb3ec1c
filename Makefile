# Every target works from a bare clone: it makes its own .venv and installs into it.
PYTHON ?= python3
JOBS ?= 2
BIN := .venv/bin

.PHONY: compare test lint clean

compare: .venv/.run  ## train and compare attentions: the main job
	$(BIN)/python -m experiments.compare

test: .venv/.test  ## the whole suite
	$(BIN)/python -m pytest -n $(JOBS)

lint: .venv/.test  ## style and types
	$(BIN)/python -m flake8
	$(BIN)/python -m mypy

.venv/.run: setup.cfg pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --disable-pip-version-check -e .
	touch $@

.venv/.test: setup.cfg pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --disable-pip-version-check -e ".[test]"
	touch $@

clean:  ## remove what make made; results/ stays
	rm -rf .venv .cache build *.egg-info
