"""One sequence: of attentions that read a row as a whole, padding beside it or not."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from attn.contract.eager import refuse


def one_sequence(segments: Any, q: Any) -> tuple[jax.Array, jax.Array]:
    """Which tokens of rows like q [B,T,...] are no padding, [B,T] bool; and, for NaN as
    their output, rows that hold more sequences than one [B,1,1,1]: NotImplementedError
    where values are known. segments [B,T], None for no padding."""
    b, t = q.shape[:2]
    if segments is None:
        return jnp.ones((b, t), bool), jnp.zeros((b, 1, 1, 1), bool)
    if isinstance(segments, tuple):
        raise NotImplementedError(
            "segments: a pair of them: queries and keys are of one row, one array"
        )
    ids = segments.astype(jnp.int32)
    some = ids > 0
    least = jnp.where(some, ids, 2**31 - 1).min(1)
    mixed = (ids.max(1) > least) & some.any(1)
    refuse(mixed.any(), None, _refusal)
    return some, mixed[:, None, None, None]


def _refusal(value: Any) -> Exception:
    return NotImplementedError(
        "segments: several sequences in a row, expected one sequence, with padding or "
        "without: what is read is of the whole row"
    )
