# Every target works from a bare clone: it makes its own .venv and installs into it.
PYTHON ?= python3
JOBS ?= 2
BIN := .venv/bin
# the releases of jax beside the one that pip gives PYTHON, and a Python that has them
JAX ?= 0.11.2 0.12.0
PYTHON_JAX ?= python3.12
RUN := -m pytest -n $(JOBS)

.PHONY: compare test quick test-device test-jax test-peers lint matrix matrix-all clean

compare: .venv/.run  ## train and compare attentions: the main job
	$(BIN)/python -m experiments.compare

test: .venv/.test  ## the whole suite
	$(BIN)/python $(RUN)

quick: .venv/.test  ## what a change can affect: the tests that executed what it changed
	$(BIN)/python $(RUN) --testmon

test-jax: $(JAX:%=.venv-jax%/.done)  ## laws and kernels on the other releases of jax
	for version in $(JAX); do \
	    .venv-jax$$version/bin/python $(RUN) tests/laws.py tests/pallas_kernels || exit 1; \
	done

# installs nothing: DEVICE_PYTHON is one that has jax for the device, and pytest
DEVICE_PYTHON ?= $(PYTHON)
test-device:  ## kernels, laws and golden files on this machine's accelerator
	ATTN_DEVICE=1 XLA_PYTHON_CLIENT_PREALLOCATE=false $(DEVICE_PYTHON) -m pytest \
	    tests/pallas_kernels tests/laws.py tests/test_golden.py

lint: .venv/.test  ## style and types
	$(BIN)/python -m flake8
	$(BIN)/python -m mypy

matrix: .venv-aot/.done  ## kernels that changed compiled for every target, held against the record
	.venv-aot/bin/python -m pallas_kernels.matrix --check --quick
	.venv-aot/bin/python -m pallas_kernels.matrix --targets v5e --function jax.numpy:tanh --shapes 'f32[64,128]'
	.venv-aot/bin/python -m experiments.measure.sharded_step

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

test-peers: .venv-peers/.done  ## ours beside torch's and ejkernel's
	.venv-peers/bin/python -m pytest -rs tests/experiments/test_timing.py

.venv-peers/.done: setup.cfg pyproject.toml
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install -q --disable-pip-version-check -e ".[test,peers]"
	touch $@

.venv-jax%/.done: setup.cfg pyproject.toml
	test -x $(@D)/bin/python || $(PYTHON_JAX) -m venv $(@D)
	$(@D)/bin/python -m pip install -q --disable-pip-version-check -e ".[test]" jax==$* jaxlib==$*
	touch $@

.venv-aot/.done: setup.cfg pyproject.toml
	test -x .venv-aot/bin/python || $(PYTHON) -m venv .venv-aot
	.venv-aot/bin/python -m pip install -q --disable-pip-version-check -e ".[aot]"
	touch $@

clean:  ## remove what make made; results/ stays
	rm -rf .venv .venv-aot .venv-jax* .testmondata* build *.egg-info
