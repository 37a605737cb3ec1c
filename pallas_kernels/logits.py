"""Logits: what one call of exact attention is told, beside q, k and v.

`LogitSpec` is the form of a logit and who sees whom, `Where` the positions and segments
of the tokens, and `Dropout` which weights are left out.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Callable, NamedTuple

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class LogitSpec:
    """The form of a logit: scale * q.k, then softcap * tanh(s / softcap), then plus
    score(h, i, j), then the mask. Static: it is known before anything is traced.

    mask: a predicate on (head, query position, key position) with `bounds`, as those of
    `attn.masks`; None, which kernels alone take: all are visible. scale: None for
    D^-0.5. score: a function of the same three, as `ALiBi`.
    """

    mask: Any
    scale: float | None = None
    softcap: float | None = None
    score: Callable | None = None


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("q_pos", "kv_pos", "q_segment", "kv_segment", "head"),
    meta_fields=("shift",),  # static: tiles are planned with it
)
@dataclasses.dataclass(frozen=True)
class Where:
    """Where queries and keys stand, int32; None for what goes without saying.

    q_pos [B|1,T], kv_pos [B|1,S], or [B,S,K|1] if heads hold other tokens: positions,
    -1 for an empty slot; None: they count from 0, aligned at the last token.
    q_segment [B|1,T], kv_segment [B|1,S]: a token sees its own segment index, and 0 is
    padding; None: there is one sequence.
    head [H]: the global head numbers, for masks and scores that read them.
    shift: how many tokens further on the queries stand, where positions count.
    """

    q_pos: Any = None
    kv_pos: Any = None
    q_segment: Any = None
    kv_segment: Any = None
    head: Any = None
    shift: int = 0

    @property
    def counted(self) -> bool:
        """Whether positions count from 0. ValueError if one of the two is missing, or
        segments of one side."""
        # one without the other would be ignored, and nothing is ignored silently
        for name in ("pos", "segment"):
            q, kv = (getattr(self, f"{side}_{name}") for side in ("q", "kv"))
            if (q is None) != (kv is None):
                raise ValueError(
                    f"q_{name} and kv_{name} go together: expected both or neither"
                )
        return self.q_pos is None


class Dropout(NamedTuple):
    """rate: the share of weights that is set to 0; the others are divided by 1 - rate.

    key: a PRNG key; the choice is a hash of (key, batch row, head, query index, key
    index), so no chunk or pass can disagree on it. batch [B]: the global numbers of the
    rows. keep [B,H,T,S] bool: the choice itself instead.
    """

    rate: float
    key: Any = None
    batch: Any = None
    keep: Any = None

    @property
    def hashed(self) -> bool:
        """Whether the hash chooses, and anything is left out."""
        return self.rate > 0 and self.key is not None

    @property
    def words(self) -> jax.Array:
        """What the hash takes of the key [2] uint32."""
        return jax.random.key_data(self.key).astype(jnp.uint32)[-2:]
