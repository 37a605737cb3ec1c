"""Causal: the two calls that every attention over the linear recurrence has.

`linear_attention` takes all tokens at once, over a mesh if there is an axis, and
`linear_attention_step` the next ones after a state. The decay is made before, in the
global view, so that a paper's file holds its rule and little else. Shapes are those
that `attn.contract.shapes.check` let in at the attention's door.
"""

from __future__ import annotations

from typing import Any

import jax

from attn.contract.segments import locate, segment_indices
from attn.parallel.sharding import Axis, over_mesh, splits, spread_heads
from attn.recurrent.linear import LinearState, recurrence

LETTERS = {1: "H", 3: "BTH", 4: "BTHD"}  # of a decay, by its number of axes


def linear_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array | None = None,
    *,
    segments: Any = None,
    axis: Axis | None = None,
    **how: Any,
) -> jax.Array:
    """o [B,T,H,V] in v's dtype, each token after those before it. q [B,T,H,D], k
    [B,T,K,D], v [B,T,K,V], log_decay [H], [B,T,H] or [B,T,H,D]; segments [B,T]. how:
    chunk, scale and implementation of `attn.recurrent.linear.recurrence`."""
    segment, _ = segment_indices(segments, q)
    return _over(axis, None, q, k, v, log_decay, segment, how)[1]


def linear_attention_step(
    state: LinearState,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array | None = None,
    *,
    segments: jax.Array | None = None,
    axis: Axis | None = None,
    **how: Any,
) -> tuple[LinearState, jax.Array]:
    """The next T tokens -> state, o [B,T,H,V] in v's dtype; arguments as for
    `linear_attention`. The state is whole on every shard of `axis`, and T is split
    where that can be done."""
    now = locate(segments, q.shape[0], q.shape[1], state.end, state.segment)
    segment = None if segments is None else now.segment
    memory, o = _over(
        splits(axis, q.shape[1]), state.memory, q, k, v, log_decay, segment, how
    )
    return LinearState(memory, now.next_pos, now.last_segment), o


def _over(axis, state, q, k, v, log_decay, segment, how) -> tuple[Any, jax.Array]:
    """The state after the tokens, None for none over an axis, and o."""
    k, v = (spread_heads(a, q.shape[2], axis) for a in (k, v))
    form = "." if log_decay is None else LETTERS[log_decay.ndim]

    def local(state, q, k, v, log_decay, segment):
        return recurrence(
            q, k, v, log_decay, state=state, segment=segment, axis=axis, dtype=v.dtype,
            **how,
        )

    # state, q, k, v, log_decay, segment -> state, o
    letters = f"BHDV BTHD BTKD BTKV {form} BT -> BHDV BTHV"
    return over_mesh(local, letters, axis)(state, q, k, v, log_decay, segment)
