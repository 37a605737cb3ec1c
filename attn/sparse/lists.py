"""Lists: clusters of tokens that never look ahead.

Each cluster keeps a list of `window` members. A token enters if it scores above the
lowest, which is then gone for good (of equal scores the older stays), and reads the
lists that it has just entered. A row of this equals the same row of
`attn/sparse/routed.py` of all tokens up to it; a stream needs nothing but the lists.

The mechanism is of Roy et al., 2020, arXiv:2003.05997; the lists are proposed here.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from attn.contract.varying import varying
from attn.exact.dense import weights
from attn.sparse.routed import Routes


class Lists(NamedTuple):
    """The members of clusters: k [B,H,C,W,D], v [B,H,C,W,V], their scores and those of
    the queries that entered [B,H,C,W] float32, -inf for an empty place; segment [B]:
    the sequence that they are of. The older stand first."""

    k: jax.Array
    v: jax.Array
    score: jax.Array
    asked: jax.Array
    segment: jax.Array


def empty(k, v, clusters: int, window: int) -> Lists:
    """Lists without members for k [B,T,H,D], v [B,T,H,V]."""
    b, _, h, _ = k.shape
    nobody = jnp.full((b, h, clusters, window), -jnp.inf, jnp.float32)
    keys, vals = (jnp.zeros((*nobody.shape, a.shape[-1]), a.dtype) for a in (k, v))
    return Lists(keys, vals, nobody, nobody, jnp.ones((b,), jnp.int32))


def prefix(
    lists: Lists, q, k, v, q_score, k_score, segment: jax.Array, routes: Routes
) -> tuple[Lists, jax.Array, jax.Array]:
    """The lists after the tokens, and the sum [B,T,H,V] float32 of what these get from
    the lists that they enter, and of how many [B,T,H].

    q, k [B,T,H,D], v [B,T,H,V]; q_score, k_score [B,H,C,T], the same array if queries
    are keys; segment [B,T]: a new sequence begins with empty lists, 0 is padding.
    """
    t, w = q.shape[1], lists.score.shape[-1]
    size = min(t, max(w, 16))
    filled = -(-t // size) * size

    def cut(a, axis: int):
        # chunks first, filled up with padding
        widths = [(0, filled - t if n == axis else 0) for n in range(a.ndim)]
        a = jnp.pad(a, widths)
        shape = *a.shape[:axis], filled // size, size, *a.shape[axis + 1:]
        return jnp.moveaxis(a.reshape(shape), axis, 0)

    same = q_score is k_score
    given = (*(cut(a, 1) for a in (q, k, v, segment)), cut(k_score, 3),
             None if same else cut(q_score, 3))

    @jax.checkpoint
    def chunk(lists, given):
        q, k, v, segment, k_score, q_score = given
        lists, o, count = _chunk(lists, q, k, v, segment, k_score, q_score, routes)
        return lists, (o, count)

    lists, (o, count) = jax.lax.scan(chunk, *varying((lists, given)))
    # [T/size,B,size,...] -> [B,T,...]
    o, count = (jnp.moveaxis(a, 0, 1).reshape(a.shape[1], filled, *a.shape[3:])[:, :t]
                for a in (o, count))
    return lists, o, count


def _chunk(lists: Lists, q, k, v, segment, k_score, q_score, routes: Routes):
    """`prefix` of a few tokens, all of whose members are in the lists or among them."""
    t, w = q.shape[1], lists.score.shape[-1]
    enters, expires, score, at, last = _entries(
        lists.score, lists.segment, k_score, segment)
    asks, asked = enters, score
    if q_score is not None:
        asks, _, asked, _, _ = _entries(lists.asked, lists.segment, q_score, segment)
    now = jnp.arange(t, dtype=jnp.int32)[None, None, None, :, None]
    born = jnp.arange(-w, t, dtype=jnp.int32)[None, None, None, None]  # of W + T
    # a member is there from when it came until a better one came: [B,H,C,T,W+T]
    there = (born < now if routes.alone else born <= now) & (
        now < expires[..., None, :])
    own = jnp.broadcast_to(lists.segment[:, None], (segment.shape[0], w))
    theirs = jnp.concatenate([own, segment], 1)
    same = (segment[:, :, None] == theirs[:, None]) & (segment > 0)[:, :, None]
    there = there & same[:, None, None] & asks[..., None]
    qf = q.astype(jnp.float32)
    # of the tokens here [B,H,1,T,T], of the members before [B,H,C,T,W]
    near = jnp.einsum("bthd,bshd->bhts", qf, k.astype(jnp.float32))[:, :, None]
    far = jnp.einsum("bthd,bhcwd->bhctw", qf, lists.k.astype(jnp.float32))
    s = jnp.concatenate([far, jnp.broadcast_to(near, (*far.shape[:4], t))], -1)
    # [B,H,C,W+T,V]
    vals = jnp.concatenate([
        lists.v.astype(jnp.float32), jnp.broadcast_to(
            v.astype(jnp.float32).swapaxes(1, 2)[:, :, None],
            (*lists.v.shape[:3], t, v.shape[-1])),
    ], 3)
    s, vals, there = _with_memory(s, vals, there, asks, qf, routes)
    p = weights(s * routes.scale, there)
    # [B,H,C,T,W+T] x [B,H,C,W+T,V] -> [B,H,C,T,V]
    o = jnp.einsum("bhcts,bhcsv->bhctv", p, vals)
    if routes.alone:
        nobody = asks & ~there.any(-1)
        o = jnp.where(nobody[..., None], v.astype(jnp.float32).swapaxes(1, 2)[
            :, :, None], o)
    # over the clusters: [B,H,T,V] and [B,H,T]
    o, count = o.sum(2), asks.sum(2).astype(jnp.float32)
    after = Lists(
        _kept(lists.k, k, at), _kept(lists.v, v, at), score, asked, last)
    return after, o.swapaxes(1, 2), count.swapaxes(1, 2)


def _with_memory(s, vals, there, asks, q, routes: Routes):
    """Logits, values and who is seen, with the memory of each cluster in front."""
    if routes.memory is None:
        return s, vals, there
    keys, more = (a.astype(jnp.float32) for a in routes.memory)
    # [B,T,H,D] x [H,C,n,D] -> [B,H,C,T,n]
    first = jnp.einsum("bthd,hcnd->bhctn", q, keys)
    seen = jnp.broadcast_to(asks[..., None], first.shape)
    more = jnp.broadcast_to(more[None], (vals.shape[0], *more.shape))
    return (jnp.concatenate([first, s], -1), jnp.concatenate([more, vals], 3),
            jnp.concatenate([seen, there], -1))


def _entries(held, held_segment, score, segment):
    """Who enters the lists, token by token, and when members leave them.

    held [B,H,C,W]: scores of the members before, the older first; score [B,H,C,T].
    -> enters [B,H,C,T]; expires [B,H,C,W+T], the first token for which a member is gone
    (0 for one that never was); the scores at last and whose they are [B,H,C,W], as
    numbers of W + T, in order; the segment [B] at last.
    """
    w, t = held.shape[-1], score.shape[-1]
    places = jnp.arange(w, dtype=jnp.int32)[None, None, None]

    def token(carry, given):
        held, who, last = carry
        a, now, segment = given
        real = segment > 0
        begins = (real & (segment != last))[:, None, None, None]
        held, who = jnp.where(begins, -jnp.inf, held), jnp.where(begins, -1, who)
        # a token enters where it scores higher than the worst member [B,H,C,1]
        low = held.min(-1, keepdims=True)
        # of equally low ones the newest goes
        newest = jnp.where(held == low, who, -2).argmax(-1)[..., None]
        enters = (a > low[..., 0]) & real[:, None, None]
        goes = (places == newest) & enters[..., None]
        gone = jnp.where(goes, who, -1).max(-1)
        held = jnp.where(goes, a[..., None], held)
        who = jnp.where(goes, w + now, who)
        return (held, who, jnp.where(real, segment, last)), (enters, gone)

    who = jnp.where(held > -jnp.inf, places, -1)
    given = jnp.moveaxis(score, -1, 0), jnp.arange(t, dtype=jnp.int32), segment.T
    carry, (enters, gone) = jax.lax.scan(
        token, *varying(((held, who, held_segment), given)))
    enters, gone = jnp.moveaxis(enters, 0, -1), jnp.moveaxis(gone, 0, -1)
    # members stay until a better one comes: expires is when, `never` if none does
    never = jnp.iinfo(jnp.int32).max
    here = jnp.concatenate([held > -jnp.inf, enters], -1)
    expires = jnp.where(here, never, 0)
    leave = jax.vmap(jax.vmap(jax.vmap(
        lambda e, gone: e.at[gone].set(jnp.arange(t, dtype=jnp.int32), mode="drop"))))
    expires = leave(expires, jnp.where(gone < 0, w + t, gone))
    held, who, last = carry
    order = jnp.argsort(jnp.where(who < 0, never, who), -1)  # empty places last
    held, who = (jnp.take_along_axis(a, order, -1) for a in (held, who))
    return enters, expires, held, who, last


def _kept(held, new, at):
    """The members `at` [B,H,C,W] of those that were held [B,H,C,W,X] and of new ones
    [B,T,H,X]; what -1 names is some member that nobody sees."""
    w = held.shape[3]
    at = jnp.maximum(at, 0)
    # [B,H,C,W,X] at [B,H,C,W,1]
    old = jnp.take_along_axis(held, jnp.minimum(at, w - 1)[..., None], 3)
    new = new.astype(held.dtype).swapaxes(1, 2)  # [B,H,T,X]
    take = jax.vmap(jax.vmap(lambda a, at: a[at]))
    return jnp.where((at < w)[..., None], old, take(new, jnp.maximum(at - w, 0)))
