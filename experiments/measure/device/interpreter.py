"""The GPU interpreter of jax 0.10 compiles a warpgroup's program for each of them, and
at each point of the grid; later releases, and what is patched here, compile it once."""

from __future__ import annotations

import concurrent.futures
import functools
import threading
from typing import Any

import jax

CAN_KEEP = jax.__version_info__ < (0, 11)


@functools.cache
def _program(jaxpr: Any, consts: Any, args: Any) -> Any:
    """The program of a warpgroup, about to be compiled by whoever asks first."""
    del consts, args  # they are part of what it is kept by
    return concurrent.futures.Future(), threading.Lock()


def _run_once_compiled(jaxpr: Any, consts: Any, *args: Any) -> None:
    kinds = lambda tree: tuple(jax.typeof(a) for a in jax.tree.leaves(tree))
    future, lock = _program(jaxpr, kinds(consts), kinds(args))
    if lock.acquire(blocking=False):
        call = lambda consts, *args: jax.core.eval_jaxpr(jaxpr, consts, *args)
        try:
            future.set_result(jax.jit(call).trace(consts, *args).lower().compile())
        except BaseException as error:  # those who wait have to hear of it
            future.set_exception(error)
    future.result()(consts, *args)


def keep_programs() -> Any:
    """Makes it keep them -> what undoes that; nothing where it does so by itself."""
    if not CAN_KEEP:
        return lambda: None
    from jax._src.pallas.mosaic.interpret import thread_map  # no public way

    before = thread_map._run_jaxpr
    thread_map._run_jaxpr = _run_once_compiled

    def undo() -> None:
        thread_map._run_jaxpr = before
        _program.cache_clear()

    return undo
