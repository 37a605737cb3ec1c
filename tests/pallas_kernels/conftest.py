"""The GPU interpreter of jax 0.10 compiles a warpgroup's program for each of them, and
at each point of the grid; later releases, and these tests, compile it once."""

import concurrent.futures
import functools
import threading

import jax
import pytest

CAN_KEEP = jax.__version_info__ < (0, 11)


@functools.cache
def _program(jaxpr, consts, args):
    """The program of a warpgroup, about to be compiled by whoever asks first."""
    del consts, args  # they are part of what it is kept by
    return concurrent.futures.Future(), threading.Lock()


def _run_once_compiled(jaxpr, consts, *args):
    kinds = lambda tree: tuple(jax.typeof(a) for a in jax.tree.leaves(tree))
    future, lock = _program(jaxpr, kinds(consts), kinds(args))
    if lock.acquire(blocking=False):
        call = lambda consts, *args: jax.core.eval_jaxpr(jaxpr, consts, *args)
        try:
            future.set_result(jax.jit(call).trace(consts, *args).lower().compile())
        except BaseException as error:  # those who wait have to hear of it
            future.set_exception(error)
    future.result()(consts, *args)


@pytest.fixture(autouse=True, scope="package")
def _programs_are_kept():
    if not CAN_KEEP:
        yield
        return
    from jax._src.pallas.mosaic.interpret import thread_map

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(thread_map, "_run_jaxpr", _run_once_compiled)
        yield
    _program.cache_clear()
