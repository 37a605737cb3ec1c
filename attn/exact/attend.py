"""Exact attention by the best implementation here: XLA's chunks or a kernel.

XLA's form is `attn/exact/chunked.py`, the kernels' `pallas_kernels/flash/api.py`; both
are FlashAttention (Dao et al., 2022, arXiv:2205.14135). `attn/exact/dense.py` is the
same in three steps, for ideas that need the matrix.
"""

from __future__ import annotations

from typing import Any

import jax

from attn.contract.dispatch import interpreted, pick
from attn.exact import chunked
from pallas_kernels.flash.api import flash


def attend(
    q: jax.Array, k: jax.Array, v: jax.Array, *, implementation: str | None = None,
    **options: Any,
) -> tuple[jax.Array, jax.Array]:
    """Exact attention: o [B,T,H,V] and lse [B,H,T], by the best implementation here.

    q [B,T,H,D], k [B,S,K,D], v [B,S,K,V]; options: those of `chunked.attend`.
    implementation: "xla", "pallas" or None for the best; see
    `attn.contract.dispatch.pick`.
    """
    kernel = lambda backend: lambda: flash(
        q, k, v, backend=backend, interpret=interpreted(), **options
    )
    return pick(
        implementation, xla=lambda: chunked.attend(q, k, v, **options),
        tpu=kernel("tpu"), gpu=(kernel("mosaic"), kernel("triton")),
    )
