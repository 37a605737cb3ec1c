# Every target works from a bare clone: it makes its own .venv and installs into it.
PYTHON ?= python3
JOBS ?= 2
BIN := .venv/bin

.PHONY: compare test lint matrix matrix-all clean

compare: .venv/.run  ## train and compare attentions: the main job
	$(BIN)/python -m experiments.compare

test: .venv/.test  ## the whole suite
	$(BIN)/python -m pytest -n $(JOBS)

lint: .venv/.test  ## style and types
	$(BIN)/python -m flake8
	$(BIN)/python -m mypy

matrix: .venv-aot/.done  ## kernels that changed compiled for every target, held against the record
	.venv-aot/bin/python -m pallas_kernels.matrix --check --quick

matrix-all: .venv-aot/.done  ## all compiled, with peers and those that another one is very near to
	.venv-aot/bin/python -m pallas_kernels.matrix --check --all

.venv/.run: setup.cfg pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --disable-pip-version-check -e .
	touch $@

.venv/.test: setup.cfg pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --disable-pip-version-check -e ".[test]"
	touch $@

.venv-aot/.done: setup.cfg pyproject.toml
	test -x .venv-aot/bin/python || $(PYTHON) -m venv .venv-aot
	.venv-aot/bin/python -m pip install -q --disable-pip-version-check -e ".[aot]"
	touch $@

clean:  ## remove what make made; results/ stays
	rm -rf .venv .venv-aot build *.egg-info
