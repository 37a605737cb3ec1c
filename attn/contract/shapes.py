"""Shapes: what q, k and v must look like, said in one sentence before any tracing."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def check(
    q: Any, k: Any, v: Any, *, segments: Any = None, aligned: bool = False
) -> None:
    """Raises ValueError unless q [B,T,H,D], k [B,S,K,D], v [B,S,K,V] fit together.

    segments: None, [B,T], or ([B,T], [B,S]). aligned: token t of the queries is token t
    of the keys, so S must be T, as in every attention that has a causal order.
    """
    for name, a in (("q", q), ("k", k), ("v", v)):
        if len(a.shape) != 4:
            letters = {"q": "[B,T,H,D]", "k": "[B,S,K,D]", "v": "[B,S,K,V]"}[name]
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
    _check_segments(segments, (b, t), (b, s))


def _check_segments(segments: Any, queries: tuple, keys: tuple) -> None:
    if segments is None:
        return
    if not isinstance(segments, tuple):
        if queries != keys:
            raise ValueError(
                f"segments is one array for {queries[1]} queries and {keys[1]} keys: "
                "expected a pair ([B,T], [B,S])"
            )
        segments = (segments, segments)  # self-attention: one row, read twice
    for name, a, shape in zip(("queries", "keys"), segments, (queries, keys)):
        if a.shape != shape:
            raise ValueError(f"segments of the {name}: {a.shape}, expected {shape}")
        if not jnp.issubdtype(a.dtype, jnp.integer):
            raise ValueError(f"segments of the {name} are {a.dtype}: expected integers")


def concrete(a: Any) -> bool:
    """Whether the values of `a` can be read now, outside of any trace."""
    return not isinstance(a, jax.core.Tracer) and isinstance(a, jax.Array)
