"""Interpreted kernels compile a warpgroup's program once, on every release of jax."""

import pytest

from experiments.measure.device.interpreter import keep_programs


@pytest.fixture(autouse=True, scope="package")
def _programs_are_kept():
    undo = keep_programs()
    yield
    undo()
