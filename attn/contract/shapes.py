"""Shapes: what q, k and v must look like, said in one sentence before any tracing."""

from __future__ import annotations

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

MOST = 2**31 - 1


def check(
    q: Any, k: Any, v: Any, *, segments: Any = None, aligned: bool = False,
    piece: bool = False,
) -> None:
    """Raises ValueError unless q [B,T,H,D], k [B,S,K,D], v [B,S,K,V] fit together.

    segments: None, [B,T], or ([B,T], [B,S]). aligned: token t of the queries is token t
    of the keys, so S must be T, as in every attention that has a causal order. piece:
    of a stream, which may be shorter than there are heads; of whole rows that are, it
    is warned, as they may be [B,H,T,D].
    """
    for name, a in (("q", q), ("k", k), ("v", v)):
        letters = {"q": "[B,T,H,D]", "k": "[B,S,K,D]", "v": "[B,S,K,V]"}[name]
        if not hasattr(a, "shape") or not hasattr(a, "dtype"):
            raise ValueError(
                f"{name} is a {type(a).__name__}: expected an array {letters}"
            )
        if len(a.shape) != 4:
            raise ValueError(f"{name} has shape {a.shape}: expected {letters}")
        if 0 in a.shape:
            raise ValueError(f"{name} has shape {a.shape}: no axis may be empty")
        if not jnp.issubdtype(a.dtype, jnp.floating):
            raise ValueError(f"{name} is {a.dtype}: expected a floating point type")
        if a.dtype != q.dtype:
            raise ValueError(f"{name} is {a.dtype}, q is {q.dtype}: expected one type")
    # from here on all are [B,.,.,.]: what is left is that their letters agree
    (b, t, h, d), (kb, s, heads, kd) = q.shape, k.shape
    if k.shape[:3] != v.shape[:3]:
        raise ValueError(f"k {k.shape} and v {v.shape} differ in B, S or K")
    if kb != b:
        raise ValueError(f"q has batch {b} and k has batch {kb}: expected the same")
    if kd != d:
        raise ValueError(f"q has width D={d} and k has D={kd}: expected the same")
    if h % heads:
        raise ValueError(
            f"H={h} query heads: expected a multiple of K={heads} key heads"
        )
    if aligned and t != s:
        raise ValueError(
            f"{t} queries and {s} keys: this attention reads them in step, T must be S"
        )
    if 1 < t < h and t == s and not piece:
        warnings.warn(
            f"q has shape {q.shape}, read as [B,T,H,D]: T={t} tokens, fewer than H={h} "
            "heads. If it is [B,H,T,D], swap axes 1 and 2", stacklevel=3
        )
    _check_segments(segments, (b, t), (b, s))


def _check_segments(segments: Any, queries: tuple, keys: tuple) -> None:
    if segments is None:
        return
    if isinstance(segments, list):
        raise ValueError(
            "segments is a list: expected an array [B,T] or a tuple ([B,T], [B,S])"
        )
    if isinstance(segments, tuple) and len(segments) != 2:
        raise ValueError(
            f"segments is a tuple of {len(segments)}: expected ([B,T], [B,S])"
        )
    if not isinstance(segments, tuple):
        if queries != keys:
            raise ValueError(
                f"segments is one array for {queries[1]} queries and {keys[1]} keys: "
                "expected a pair ([B,T], [B,S])"
            )
        segments = (segments, segments)  # self-attention: one row, read twice
    for name, a, shape in zip(("queries", "keys"), segments, (queries, keys)):
        if not hasattr(a, "shape") or not hasattr(a, "dtype"):
            raise ValueError(
                f"segments of the {name} is a {type(a).__name__}: expected an array"
            )
        if a.shape != shape:
            raise ValueError(f"segments of the {name}: {a.shape}, expected {shape}")
        if not jnp.issubdtype(a.dtype, jnp.integer):
            raise ValueError(f"segments of the {name} are {a.dtype}: expected integers")
        _check_ids(f"segments of the {name}", a)


def _check_ids(what: str, a: Any) -> None:
    """Raises ValueError for ids that int32 does not hold: they would be padding."""
    # int32 holds all that the type can say
    if jnp.iinfo(a.dtype).max <= MOST:
        return
    known = isinstance(a, np.ndarray) or concrete(a)
    if known and (a.size == 0 or int(a.max()) <= MOST):
        return
    if known or jnp.issubdtype(a.dtype, jnp.unsignedinteger):
        raise ValueError(f"{what} are {a.dtype}: expected ids that int32 holds")


def concrete(a: Any) -> bool:
    """Whether the values of `a` can be read now, outside of any trace."""
    return not isinstance(a, jax.core.Tracer) and isinstance(a, jax.Array)
