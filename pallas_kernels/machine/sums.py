"""Sums of some of the tokens of a chunk, as products with matrices of 0 and 1, in which
float32 is taken apart into three bfloat16 numbers, which is exact; and the levels by
which the pairs of a chunk are sorted."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.machine.product import F32, NN, dot

BF16 = jnp.bfloat16


def split_bf16x3(x) -> list[Any]:
    """x float32 as three bfloat16 arrays whose sum it is."""
    found = []
    for _ in range(2):
        # cut off, not rounded: a conversion there and back may be optimised away
        bits = jax.lax.bitcast_convert_type(x, jnp.int32) & -65536
        part = jax.lax.bitcast_convert_type(bits, F32)
        found.append(part.astype(BF16))
        x = x - part  # exact: both have the same leading bits
    return [*found, x.astype(BF16)]


def chosen(where):
    """A boolean matrix as 0 and 1 in bfloat16."""
    return jnp.where(where, 1.0, 0.0).astype(BF16)


def add_up(where, x, contract=NN):
    """sum_t where[i,t] x[t,n] -> [i,n] float32; TN: where[t,i]."""
    w = chosen(where)
    high, middle, low = (dot(w, part, contract) for part in split_bf16x3(x))
    return (low + middle) + high  # the smallest first


def add_columns(x, where):
    """sum_t x[i,t] where[t,n] -> [i,n] float32."""
    w = chosen(where)
    high, middle, low = (dot(part, w, NN) for part in split_bf16x3(x))
    return (low + middle) + high  # the smallest first


def levels(c: int) -> list[int]:
    """The levels of a chunk of c tokens."""
    return [1 << n for n in range((c - 1).bit_length())]
