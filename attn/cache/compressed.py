"""Compressed: what a cache of all tokens keeps beside it of blocks that are complete.

A block of tokens becomes one token when its last one is there. Which blocks a piece
completes follows from positions alone, so that nothing else has to be remembered.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from attn.cache.kv import Cache
from attn.contract.segments import TokenPositions
from attn.sparse.compressed_blocks import Compressor, compress


def completed(
    held: tuple[jax.Array, jax.Array], phi: tuple, cache: Cache, had: jax.Array,
    now: TokenPositions, stride: int, length: int,
) -> tuple[jax.Array, jax.Array]:
    """held: compressed keys and values [B,N,K,.], with those of the blocks of `length`
    tokens, one every `stride`, that the tokens at `now` complete. phi: of keys and of
    values, None for what is not compressed; cache: with these tokens; had [B]: tokens
    that it had of the sequence before them."""
    done = jnp.maximum((had - length) // stride + 1, 0)
    most = now.pos.shape[1] // stride + 1  # blocks that so many tokens complete
    number = done[:, None] + jnp.arange(most, dtype=jnp.int32)[None]
    begin = number * stride
    whole = begin + length <= now.next_pos[:, None]
    slot = begin[..., None] + jnp.arange(length, dtype=jnp.int32)[None, None]
    slot = slot.reshape(slot.shape[0], -1, 1, 1)  # [B,n l,1,1]
    at = jnp.where(whole, number, held[0].shape[1])  # outside: dropped
    row = jnp.arange(len(had))[:, None]

    def add(a, tokens, phi: Compressor | None):
        if phi is None:
            return a
        tokens = jnp.take_along_axis(tokens, slot, 1, mode="clip")
        return a.at[row, at].set(compress(tokens, phi, length), mode="drop")

    keys, values = (
        add(*each) for each in zip(held, (cache.k, cache.v), phi, strict=True))
    return keys, values
