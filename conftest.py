"""Test settings: 8 CPU devices, exact arithmetic, strict shapes, a compile cache."""

import gc
import os

import pytest

from experiments.cli import compile_cache
from tests import on_device

# bytes of a process from which on compiled programs are let go: behind a file, inside
LARGE, FULL = 3 * 2**29, 5 * 2**29
BY_ROW = "laws.py", "test_commands.py"

if not on_device.ASKED:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
_FLAGS = os.environ.get("XLA_FLAGS", "")
if "host_platform_device_count" not in _FLAGS:
    _FLAGS = f"{_FLAGS} --xla_force_host_platform_device_count=8"
if "backend_optimization" not in _FLAGS and not on_device.ASKED:
    # compiling is most of the time of small tests
    _FLAGS = f"{_FLAGS} --xla_backend_optimization_level=0"
os.environ["XLA_FLAGS"] = _FLAGS
# an operation's traceback, which nobody reads here, is a sixth of tracing
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")
compile_cache.use()

import jax  # noqa: E402

from tests import memory  # noqa: E402

# a trace is many objects and little garbage
gc.set_threshold(100_000, 20, 20)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")


def _group(item):
    """What of a test's compiled programs others use: its file, and of a law its row."""
    law = item.path.name == "laws.py" and hasattr(item, "callspec")
    return item.path, item.callspec.params["name"] if law else None


def pytest_collection_modifyitems(config, items):
    """Laws of one row follow each other. On an accelerator, what is another's kernel,
    or needs more devices than there are, is left out and counted."""
    if on_device.ASKED:
        out = [item for item in items if on_device.why_not(item)]
        items[:] = [item for item in items if not on_device.why_not(item)]
        config.hook.pytest_deselected(items=out)
    laws = [n for n, item in enumerate(items) if item.path.name == "laws.py"]
    rows = list(dict.fromkeys(_group(items[n])[1] for n in laws))
    ordered = sorted((items[n] for n in laws), key=lambda i: rows.index(_group(i)[1]))
    for n, item in zip(laws, ordered):
        items[n] = item


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """A file of tests, or a row of laws, stays in one process: its tests share what
    they compile; commands share nothing. (Groups by a mark, which xdist has too, pytest
    9.2 does not see.)"""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            file, _, test = nodeid.partition("::")
            row = test.rstrip("]").rpartition("[")[2].rpartition("-")[2]
            return f"{file} {row}" if file.endswith(BY_ROW) else file

    return Scheduling(config, log)


def pytest_runtest_teardown(item, nextitem):
    """A worker stays small to the end: what a file of tests compiled, or a row of laws,
    goes with it once there is much of it."""
    if nextitem is None:
        return
    limit = FULL if _group(item) == _group(nextitem) else LARGE
    if memory.resident() > limit:
        memory.let_go()


def pytest_sessionfinish(session):
    """One process, not each worker, bounds the cache."""
    if not hasattr(session.config, "workerinput"):
        compile_cache.prune()
