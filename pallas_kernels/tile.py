"""The arithmetic of one tile: logits, who sees whom, and what dropout keeps.

Every form of exact attention, XLA's and each kernel's, computes its tiles with these
functions, elementwise on arrays that broadcast against the tile: what differs between
them is only how tiles are fetched and in which order they are visited.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Callable

import jax
import jax.numpy as jnp

LOG2E = 1.4426950408889634  # kernels compute 2^(s log2 e): hardware has exp2
NEVER = -jnp.inf
LOW = -1e30  # below every logit, above NEVER: no guard is needed for 2^(NEVER - LOW)


@dataclasses.dataclass(frozen=True)
class LogitSpec:
    """The form of a logit and who sees whom: what is static in one call.

    mask: a predicate on (head, query position, key position) with `bounds`; None: all
    are visible. score: a function of the same three that is added to the logit.
    dropout: the share of weights that is set to 0.
    """

    mask: Any = None
    scale: float = 1.0
    softcap: float | None = None
    score: Callable | None = None
    dropout: float = 0.0

    def logits(self, raw, h, i, j, bias=None, unit: float = 1.0):
        """unit * (cap(scale * raw) + score + bias), and d(capped)/d(scale * raw).

        raw: q.k of a tile, float32; h, i, j: head, query and key positions.
        """
        slope = None
        if self.softcap is None:
            s = raw * (self.scale * unit)  # one multiplication
        else:
            capped = jnp.tanh(raw * (self.scale / self.softcap))
            # d tanh(x) = 1 - tanh(x)^2
            s, slope = (self.softcap * unit) * capped, 1 - capped * capped
        if self.score is not None:
            s = s + self.score(h, i, j) * unit
        if bias is not None:
            s = s + bias.astype(jnp.float32) * unit
        return s, slope


def both(a, b):
    """a & b, where None hides nothing."""
    return b if a is None else a if b is None else a & b


def dropout_keep(rate: float, seed, batch, head, row, column):
    """Which weights dropout keeps: a hash of (seed, batch, head, query, key) is not
    below the rate. seed: two uint32; row and column are indices, not positions."""
    words = [a.astype(jnp.uint32) for a in (batch, head, row, column)]
    word = murmur_mix32(murmur_mix32(seed[0] ^ words[0]) ^ words[1])
    word = murmur_mix32(murmur_mix32(word ^ seed[1] ^ words[2]) ^ words[3])
    return word >= jnp.uint32(round(rate * 2**32))


def murmur_mix32(x: jax.Array) -> jax.Array:
    """A 32-bit integer hash with full avalanche: the finaliser of MurmurHash3."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
