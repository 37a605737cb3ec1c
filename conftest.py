"""Test settings: 8 CPU devices, exact arithmetic, strict shapes, a compile cache."""

import os

import pytest

from tests import compile_cache

os.environ.setdefault("JAX_PLATFORMS", "cpu")
_FLAGS = os.environ.get("XLA_FLAGS", "")
if "host_platform_device_count" not in _FLAGS:
    _FLAGS = f"{_FLAGS} --xla_force_host_platform_device_count=8"
if "backend_optimization" not in _FLAGS:
    # compiling is most of the time of small tests
    _FLAGS = f"{_FLAGS} --xla_backend_optimization_level=0"
os.environ["XLA_FLAGS"] = _FLAGS
compile_cache.use()

import jax  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")
compile_cache.write_whole_entries()


@pytest.fixture(autouse=True, scope="module")
def compiled_programs_are_let_go():
    """A worker stays small to the end: what a file of tests compiled goes with it."""
    yield
    jax.clear_caches()


def pytest_sessionfinish(session):
    """One process, not each worker, bounds the cache."""
    if not hasattr(session.config, "workerinput"):
        compile_cache.prune()
