"""Exact attention by the best implementation here: XLA's chunks or a kernel.

XLA's form is `attn/exact/chunked.py`, the kernels' `pallas_kernels/flash/api.py`; both
are FlashAttention (Dao et al., 2022, arXiv:2205.14135). `attn/exact/dense.py` is the
same in one matrix, for ideas that need it and for derivatives of every kind.
"""

from __future__ import annotations

from typing import Any, Callable

import jax
import jax.numpy as jnp

from attn.contract.dispatch import interpreted, pick
from attn.exact import chunked, dense
from attn.exact.distances import Distances
from attn.masks import Full
from pallas_kernels.arrays import BOOL, check_arrays
from pallas_kernels.flash.api import flash
from pallas_kernels.logits import Dropout, LogitSpec, Where
from pallas_kernels.tile import NEVER


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    spec: LogitSpec = LogitSpec(Full()),
    where: Where = Where(),
    *,
    bias: jax.Array | None = None,
    sink: jax.Array | None = None,
    dropout: Dropout | None = None,
    given: jax.Array | None = None,
    split_lse: bool = False,
    tile: tuple[int, int] | None = None,
    distances: Distances | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, ...]:
    """Exact attention: o [B,T,H,V] and lse [B,H,T], by the best implementation here.

    Arguments are those of `chunked.attend`. implementation: "xla", "pallas" or None for
    the best, see `attn.contract.dispatch.pick`; or "dense", the matrix in plain jnp,
    the only one with forward-mode derivatives. No kernel, and no matrix, has distances.
    """
    options: dict[str, Any] = {
        "bias": bias, "sink": sink, "dropout": dropout, "given": given, "tile": tile,
        "split_lse": split_lse,
    }

    def xla():
        return chunked.attend(q, k, v, spec, where, distances=distances, **options)

    def plain():
        if given is not None:
            raise NotImplementedError("implementation='dense': a ring has no matrix")
        return dense.attend(
            q, k, v, spec, where, bias=bias, sink=sink, dropout=dropout,
            split_lse=split_lse,
        )

    def kernel(backend: str) -> Callable:
        return lambda: flash(
            q, k, v, spec, where, backend=backend, interpret=interpreted(), **options)

    if distances is not None:
        return pick(implementation, xla=xla)
    # of a GPU's two, Hopper's first; what it refuses (a bias, another card) is Triton's
    return pick(
        implementation, xla=xla, dense=plain,
        tpu=kernel("tpu"), gpu=(kernel("mosaic"), kernel("triton")),
    )


def with_mask(q, k, bias, mask) -> jax.Array | None:
    """The bias [B|1,H|1,T|1,S|1] that hides what a boolean mask of that form hides."""
    if mask is None:
        return bias
    (b, t, h, _), s = q.shape, k.shape[1]
    form = "B|1 H|1 T|1 S|1"
    check_arrays({"B": b, "H": h, "T": t, "S": s}, mask=(mask, BOOL, form))
    # -inf beside a logit: its weight is 0
    return jnp.where(mask, 0.0 if bias is None else bias, NEVER)
