"""Bits: kernels count in 32 of them, whatever the program around them does."""

from __future__ import annotations

import functools
from typing import Any, Callable

import jax


def in_32_bits(f: Callable) -> Callable:
    """`f`, traced as without jax_enable_x64: under it Python's numbers and counters of
    loops would be int64, which no kernel's integers are and no accelerator has."""
    @functools.wraps(f)
    def traced(*args: Any, **named: Any) -> Any:
        with jax.enable_x64(False):
            return f(*args, **named)

    return traced
