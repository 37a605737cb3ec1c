"""The memory of a process of tests: how much it holds, and letting go of programs."""

import ctypes
import gc
import os
import pathlib

import jax


def resident() -> int:
    """Bytes of this process in memory; 0 where the system does not say."""
    try:
        pages = pathlib.Path("/proc/self/statm").read_text().split()[1]
    except OSError:
        return 0
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def let_go() -> None:
    """Drops every compiled program and trace, and gives the memory back."""
    jax.clear_caches()
    gc.collect()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):
        pass  # another C library
