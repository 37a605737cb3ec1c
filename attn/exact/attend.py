"""Exact attention by the best implementation here: XLA's chunks or a kernel.

XLA's form is `attn/exact/chunked.py`, the kernels' `pallas_kernels/flash/api.py`; both
are FlashAttention (Dao et al., 2022, arXiv:2205.14135). `attn/exact/dense.py` is the
same in three steps, for ideas that need the matrix.
"""

from __future__ import annotations

from typing import Any, Callable

import jax

from attn.contract.dispatch import interpreted, pick
from attn.exact import chunked
from attn.exact.logits import Dropout, LogitSpec, Where
from pallas_kernels.flash.api import flash


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    spec: LogitSpec = LogitSpec(),
    where: Where = Where(),
    *,
    bias: jax.Array | None = None,
    sink: jax.Array | None = None,
    dropout: Dropout | None = None,
    given: jax.Array | None = None,
    split_lse: bool = False,
    tile: tuple[int, int] | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, ...]:
    """Exact attention: o [B,T,H,V] and lse [B,H,T], by the best implementation here.

    Arguments are those of `chunked.attend`. implementation: "xla", "pallas" or None for
    the best; see `attn.contract.dispatch.pick`.
    """
    options: dict[str, Any] = {
        "bias": bias, "sink": sink, "given": given, "tile": tile,
        "split_lse": split_lse,
    }

    def xla():
        return chunked.attend(q, k, v, spec, where, dropout=dropout, **options)

    def kernel(backend: str) -> Callable:
        return lambda: flash(
            q, k, v, backend=backend, interpret=interpreted(), shift=where.shift,
            **kernel_options(spec, where), **_dropout_options(dropout), **options,
        )

    # of a GPU's two, Hopper's first; what it refuses (a bias, another card) is Triton's
    return pick(
        implementation, xla=xla,
        tpu=kernel("tpu"), gpu=(kernel("mosaic"), kernel("triton")),
    )


def kernel_options(spec: LogitSpec, where: Where) -> dict[str, Any]:
    """Both as the keyword arguments of a kernel's entry function."""
    # kernels know nothing of attn, and call a segment index a run
    return {
        "mask": spec.mask, "scale": spec.scale, "softcap": spec.softcap,
        "score": spec.score, "head": where.head, "q_pos": where.q_pos,
        "kv_pos": where.kv_pos, "q_run": where.q_segment, "kv_run": where.kv_segment,
    }


def _dropout_options(dropout: Dropout | None) -> dict[str, Any]:
    if dropout is None:
        return {}
    # XLA and kernels share one hash, so that both drop the same weights
    return {"dropout": dropout.rate, "key": dropout.key, "batch": dropout.batch,
            "keep": dropout.keep}
