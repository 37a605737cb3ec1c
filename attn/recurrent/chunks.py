"""Chunks: how the tokens of a recurrence are cut, and what the pieces give each other.

A row of T tokens becomes N chunks of c tokens, [N,B,H,c,X]. The masks of `Segments` say
which tokens of a chunk belong together and to the state that passes through it; `pairs`
are the weights between the tokens of one chunk.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class ChunkSegments(NamedTuple):
    """Which tokens of a chunk see what; None means all do. seen [N,B,1,c,c]: token j by
    token i; enters [N,B,1,c,1]: the token sees the state the chunk begins with; stays
    [N,B,1,c,1]: it belongs to the segment the chunk ends in; keeps [N,B,1,1,1]: the
    chunk ends in the segment that it begins in."""

    seen: jax.Array | None
    enters: jax.Array | None
    stays: jax.Array | None
    keeps: jax.Array | None


def segments_of(segment: jax.Array | None, c: int, carried: Any = 1) -> ChunkSegments:
    """Segments of chunks of c tokens. segment [B|1,T] with T a multiple of c, 0 is
    padding; carried: the segment [B], or one for all, of the state that comes in."""
    order = jnp.tril(jnp.ones((1, 1, 1, c, c), bool))
    if segment is None:
        return ChunkSegments(order, None, None, None)
    carried = jnp.broadcast_to(jnp.asarray(carried, segment.dtype), segment.shape[:1])
    # the segment at each token or, at padding, before it [B,1+T]
    present = jax.lax.cummax(jnp.concatenate([carried[:, None], segment], 1), axis=1)
    # [B,T] -> [N,B,1,c]
    r = segment.reshape(segment.shape[0], -1, c).swapaxes(0, 1)[:, :, None]
    first, last = (  # [N,B,1,1]
        a.T[..., None, None] for a in (present[:, :-1:c], present[:, c::c])
    )
    real = r > 0
    return ChunkSegments(
        order & (r[..., None] == r[..., None, :]) & real[..., None],
        ((r == first) & real)[..., None],
        ((r == last) & real)[..., None],
        (first == last)[..., None],
    )


def only(where: jax.Array | None, a: jax.Array) -> jax.Array:
    """`a`, zero outside of `where`."""
    return a if where is None else jnp.where(where, a, 0)


def filled(segment: jax.Array | None, t: int, c: int) -> jax.Array | None:
    """segment [B,T] with padding behind it up to a multiple of c tokens; [1,T] if there
    were no segments, and None if no padding is needed either."""
    if segment is None and t % c == 0:
        return None
    segment = jnp.ones((1, t), jnp.int32) if segment is None else segment
    return jnp.pad(segment, ((0, 0), (0, -t % c)))


def to_chunks(a: jax.Array, c: int, heads: int | None = None) -> jax.Array:
    """a [B,T,H,X] as float32 chunks [N,B,H,c,X], zeros behind the last token; with
    `heads`, key heads are repeated to so many."""
    b, t, h, x = a.shape
    if heads not in (None, h):
        a, h = jnp.repeat(a, heads // h, 2), heads
    a = jnp.pad(a.astype(jnp.float32), ((0, 0), (0, -t % c), (0, 0), (0, 0)))
    # [B,N,c,H,X] -> [N,B,H,c,X]
    return a.reshape(b, -1, c, h, x).transpose(1, 0, 3, 2, 4)


def from_chunks(o: jax.Array, t: int) -> jax.Array:
    """The inverse of `to_chunks`: [N,B,H,c,V] -> [B,T,H,V]."""
    n, b, h, c, v = o.shape
    return o.transpose(1, 0, 3, 2, 4).reshape(b, n * c, h, v)[:, :t]


def pairs(q: jax.Array, k: jax.Array, g: jax.Array | None) -> jax.Array:
    """q_i.k_j exp(decay from j to i) [N,B,H,c,c], for j <= i; g [...,c,1] or None."""
    return _gram(q, k) * pair_decays(g)


@jax.custom_jvp
def exact_pairs(k: jax.Array) -> tuple[jax.Array, jax.Array]:
    """k_i.k_j as the sum of two arrays [N,B,H,c,c], the second a small rest, which
    together are nearer to it than one float32 is.

    The same rounding in every pair of equal keys would add up over a row: a product
    that is off by 6e-8 everywhere makes 6e-5 of 1,000 tokens.
    """
    # the power of two at or below the longest channel [N,B,H,c,1], by its bits
    longest = jnp.maximum(jnp.abs(k).max(-1, keepdims=True), 1e-30)
    bits = jax.lax.bitcast_convert_type(longest, jnp.int32) & 0x7F800000
    unit = jax.lax.bitcast_convert_type(bits, jnp.float32)
    # whole numbers of up to 128, whose products' sums float32 holds exactly
    coarse = jnp.round(k / unit * 64) * (unit / 64)
    fine = k - coarse
    return _gram(coarse, coarse), _gram(coarse, fine) + _gram(fine, k)


def _gram(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum("nbhid,nbhjd->nbhij", a, b)  # [c,D] [D,c]


@exact_pairs.defjvp
def _(primals, tangents):
    (k,), (dk,) = primals, tangents
    found = exact_pairs(k)
    return found, (_gram(dk, k) + _gram(k, dk), jnp.zeros_like(found[1]))


def pair_decays(g: jax.Array | None) -> jax.Array | float:
    """exp(decay from j to i) [N,B,H,c,c], for j <= i, of g [...,c,1]; 1 for None."""
    return 1.0 if g is None else jnp.exp(_between(*_clock(g)))[..., 0]


def pairs_by_channel(q, k, g: jax.Array, block: int) -> jax.Array:
    """sum_d q_id k_jd exp(decay of d from j to i) [N,B,H,c,c], for j <= i; g
    [N,B,H,c,D].

    Both factors of a pair of blocks are measured from the beginning of the later block,
    so that neither exponent is positive; inside a block [block,block,D] are summed.
    """
    lead, (c, d) = q.shape[:3], q.shape[3:]
    n = c // block
    # chunks, rows and heads as one dimension M, and blocks with them where sums are:
    # XLA:CPU of jaxlib 0.10.2 dies of some sums over arrays of seven dimensions (jax
    # issue 40412), and every vmap adds one
    q, k, g = (a.reshape(-1, c, d) for a in (q, k, g))

    def blocks(a):
        """[M,c,D] as n blocks [M,n,block,D]."""
        return a.reshape(-1, n, block, d)

    def begin(a):
        """The clock in front of each block [M,n,1,D]."""
        return jnp.pad(blocks(a)[:, :-1, -1:], [(0, 0), (1, 0), (0, 0), (0, 0)])

    def merged(a):
        return a.reshape(-1, *a.shape[2:])

    clock = _clock(g)
    first, inside = (tuple(f(a) for a in clock) for f in (begin, blocks))
    near = merged(blocks(q) * jnp.exp(_apart(inside, first)))  # [M n,block,D]
    earlier = (jnp.arange(c) // block)[None] < jnp.arange(n)[:, None]
    earlier = earlier.reshape(1, n, c, 1)
    since = _apart(first, tuple(a[:, None] for a in clock))
    far = merged(only(earlier, k[:, None] * jnp.exp(only(earlier, since))))
    s = jnp.einsum("mid,mjd->mij", near, far)  # [block,D] [D,c]
    own = _in_block(*map(merged, (blocks(q), blocks(k), *inside)))  # [M n,block,block]
    # the tokens of block j, of n, are in columns of their own
    eye = jnp.eye(n, dtype=bool).reshape(1, n, 1, n, 1)
    own = only(eye, own.reshape(-1, n, block, 1, block))
    return (s.reshape(own.shape) + own).reshape(*lead, c, c)


def _in_block(q, k, coarse, fine) -> jax.Array:
    """The pairs [...,i,j] inside blocks [...,block,D], channel by channel."""
    # a product of matrices, not one fused sum, whose exponentials would be scalar code
    k = k[..., None, :, :] * jnp.exp(_between(coarse, fine))
    return jnp.einsum("...id,...ijd->...ij", q, k)


def _clock(g: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cumulated log decays in two parts: multiples of 1/256, whose sums and differences
    are exact in float32 for chunks of up to 512 tokens, and the small rest. The decay
    between two neighbours then stays exact behind a token that decays strongly."""
    coarse = jax.lax.stop_gradient(jnp.round(g * 256) / 256)
    return jnp.cumsum(coarse, -2), jnp.cumsum(g - coarse, -2)


def _apart(a: tuple, b: tuple) -> Any:
    """The difference of two clocks, part by part."""
    return sum(x - y for x, y in zip(a, b))


def _between(coarse: jax.Array, fine: jax.Array) -> jax.Array:
    """Log decay from j to i [...,i,j,X] (0 for j >= i) of clocks [...,c,X]."""
    c = coarse.shape[-2]
    after = jnp.tril(jnp.ones((c, c), bool), -1)
    after = after.reshape((1,) * (coarse.ndim - 2) + (c, c, 1))

    def pairwise(a):
        return a[..., :, None, :] - a[..., None, :, :]  # [...,i,j,X]

    # a token does not decay against itself, and must get no gradient from that
    return only(after, pairwise(coarse) + pairwise(fine))
