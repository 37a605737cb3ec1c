"""Pieces: which tokens of a row a learned memory takes at once, and when it turns over.

Gradients of a chunk of b tokens of a sequence are all taken at the weights that it
begins with. Rows are cut into pieces of c <= b tokens wherever they begin, so in one
piece at most one chunk of the sequence that comes in begins, and any number of other
sequences, none of which gets to its second chunk there. A piece is passed over once for
each of these, by masks.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Where(NamedTuple):
    """Where tokens stand: pos and segment [B,T] as in `attn.contract.segments`, segment
    None if a row is one sequence without padding."""

    pos: jax.Array
    segment: jax.Array | None


class Passes(NamedTuple):
    """Masks of the passes over pieces of c tokens. member [N,P,B,c]: tokens that take
    part; new and freeze [N,P,B]: the memory begins anew; the chunk begins. None: no."""

    member: jax.Array
    new: jax.Array | None
    freeze: jax.Array | None


def passes_of(
    where: Where, t: int, c: int, chunk: int, lag: bool, plain: bool
) -> Passes:
    """Of T tokens in pieces of c; plain: a chunk begins with each piece."""
    pad = [(0, 0), (0, -t % c)]

    def pieces(a):
        """[B,T] -> [N,B,c], 0 behind the last token."""
        return jnp.pad(a, pad).reshape(a.shape[0], -1, c).swapaxes(0, 1)

    packed = where.segment is not None
    real = jnp.ones((1, t), bool) if where.segment is None else where.segment > 0
    real = pieces(real)
    if plain:
        new = pieces(where.pos == 0) & real if packed else None
        return Passes(real[:, None], None if new is None else new[:, None, :, -1], None)
    pos = pieces(where.pos) % chunk
    real = jnp.broadcast_to(real, pos.shape)
    # with a lag token the second token of a chunk begins it, too
    begins = real & ((pos == 0) | lag & (pos == 1))
    new = real & (pieces(where.pos) == 0) if packed else jnp.zeros_like(begins)
    if c == 1:
        new, begins = (a[:, None, :, 0] for a in (new, begins))
        member = jnp.broadcast_to(real[:, None], (*new.shape, 1))
        return Passes(member, new if packed else None, begins)
    # tokens of sequences that begin in this piece: one pass for all of them
    fresh = jax.lax.cummax(new.astype(jnp.int32), axis=2) > 0
    phase = jnp.cumsum(begins & ~fresh, 2)  # how often a chunk has begun in this piece
    # of the sequence that goes on: one pass before each beginning of a chunk, and
    # one behind the last
    old = [real & ~fresh & (phase == n) for n in range(3 if lag else 2)]
    frozen = [jnp.zeros_like(real[..., 0]), *((begins & a).any(2) for a in old[1:])]
    anew = [jnp.zeros_like(a) for a in frozen]
    if packed:
        old, frozen = [*old, real & fresh], [*frozen, new.any(2)]
        anew = [*anew, new.any(2)]
    stack = [jnp.stack(a, 1) for a in (old, anew, frozen)]
    return Passes(stack[0], stack[1] if packed else None, stack[2])


def seen_by(member, segment) -> jax.Array:
    """[B|1,1,c+1,c]: token i by token t, and by the end of the piece, which belongs to
    the last member's sequence. member [B|1,c], segment [B,c] or None."""
    c = member.shape[1]
    seen = jnp.tril(jnp.ones((c + 1, c), bool))[None] & member[:, None]
    if segment is not None:
        own = jnp.where(member, segment, 0)  # rises along the row
        rows = jnp.concatenate([own, own.max(1, keepdims=True)], 1)
        seen = seen & (rows[:, :, None] == own[:, None])
    return seen[:, None]
