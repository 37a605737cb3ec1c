"""Routed attention: tokens that belong to the same cluster attend to one another.

`whole` takes, for each cluster, the `window` tokens of a sequence that score highest
with it, gathers them, attends, and adds up what a token got from its clusters. Members
are chosen among all tokens, later ones too. `prefix` never looks ahead: each cluster
keeps a list of `window` members, a token enters if it scores above the lowest, which is
then gone for good, and reads the lists that it has just entered.

Source: Roy et al., 2020, arXiv:2003.05997; that lists equal routing over each prefix is
proposed here.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from attn.contract.varying import varying
from attn.exact.attend import attend
from attn.exact.dense import weights
from attn.exact.logits import LogitSpec, Where
from attn.exact.online import OnlineSoftmax, join, output, state_of
from attn.masks import Causal, Full, Mask, Window


class Routes(NamedTuple):
    """How clusters are read. window: members. scale: of q.k. causal: members see no
    later ones. alone: a token sees itself only if there is no other one. eps: added to
    the number of a token's clusters. memory: keys and values [H,C,n,.] that every
    member of a cluster sees, or None."""

    window: int
    scale: float
    causal: bool
    alone: bool
    eps: float
    memory: tuple | None = None


def members(
    score: jax.Array, window: int, segment: jax.Array | None = None
) -> jax.Array:
    """The tokens of each cluster by score [B,H,C,T], in order [B,H,C,M]; T for none.

    Every sequence of a packed row, segment [B,T], sends its own `window` best ones, so
    that M is T; else M is min(window, T).
    """
    t = score.shape[-1]
    window = min(window, t)
    if segment is None:
        return jnp.sort(jax.lax.top_k(score, window)[1], -1)
    at = jnp.arange(t, dtype=jnp.int32)[None, None, None]
    index = jnp.broadcast_to(at, score.shape)
    segment = jnp.broadcast_to(segment[:, None, None], score.shape)
    # sequence after sequence, the best first
    segment, _, index = jax.lax.sort((segment, -score, index), num_keys=2)
    first = jnp.concatenate(
        [jnp.ones_like(segment[..., :1], bool), segment[..., 1:] != segment[..., :-1]],
        -1)
    rank = at - jax.lax.cummax(jnp.where(first, at, 0), axis=segment.ndim - 1)
    return jnp.sort(jnp.where((rank < window) & (segment > 0), index, t), -1)


def whole(
    q: jax.Array, k: jax.Array, v: jax.Array, q_at: jax.Array, k_at: jax.Array,
    routes: Routes, segments: tuple[Any, Any] = (None, None),
) -> tuple[jax.Array, jax.Array]:
    """The sum [B,T,H,V] float32 of what tokens get from their clusters, and from how
    many [B,T,H].

    q [B,T,H,D], k [B,S,H,D], v [B,S,H,V]; q_at [B,H,C,M], k_at [B,H,C,N]: `members`.
    segments: [B,T] and [B,S], which clusters do not mix.
    """
    (b, t, h, _), s = q.shape, k.shape[1]
    n, clusters = b * h * q_at.shape[2], q_at.shape[2]

    def rows(a, at):
        # [B,T,H,X] at [B,H,C,M] -> [B H C,M,1,X]
        a = jnp.pad(a.swapaxes(1, 2), ((0, 0), (0, 0), (0, 1), (0, 0)))
        taken = jax.vmap(jax.vmap(lambda a, at: a[at]))(a, at)
        return taken.reshape(n, -1, 1, a.shape[-1])

    def ids(segment, at):
        if segment is None:
            return None
        segment = jnp.pad(segment, ((0, 0), (0, 1)))
        return jax.vmap(lambda a, at: a[at])(segment, at).reshape(n, -1)

    asked = rows(q, q_at)
    where = Where(
        q_at.reshape(n, -1), jnp.where(k_at < s, k_at, -1).reshape(n, -1),
        ids(segments[0], q_at), ids(segments[1], k_at),
    )
    spec = LogitSpec(_mask(routes), routes.scale)
    # one cluster of one head and row is a batch row of its own
    found = attend(asked, rows(k, k_at), rows(v, k_at), spec, where, split_lse=True)
    state = state_of(*found)
    if routes.memory is not None:
        state = join(state, _remembered(asked, routes, b, h, clusters))
    o = output(state)
    if routes.alone:
        own = rows(v, q_at).astype(jnp.float32)
        o = jnp.where(state.l[..., None] > 0, o, own)
    o = o.reshape(*q_at.shape, -1)
    # what names no token is dropped
    add = jax.vmap(jax.vmap(lambda at, o: jnp.zeros((t, o.shape[-1])).at[at].add(
        o, mode="drop")))
    flat = q_at.reshape(b, h, -1)
    both = jnp.concatenate([o, jnp.ones_like(o[..., :1])], -1)
    both = add(flat, both.reshape(b, h, -1, both.shape[-1])).swapaxes(1, 2)
    return both[..., :-1], both[..., -1]


def _mask(routes: Routes) -> Mask:
    """Who of the members sees whom."""
    seen: Mask = Causal() if routes.causal else Full()
    return seen & ~Window(0, 0) if routes.alone else seen


def _remembered(asked, routes: Routes, b, h, clusters) -> OnlineSoftmax:
    """What members asked [B H C,M,1,D] get from the memory of their cluster."""
    keys, values = (a.astype(jnp.float32) for a in routes.memory or ())
    asked = asked.astype(jnp.float32).reshape(b, h, clusters, -1, asked.shape[-1])
    s = jnp.einsum("bhcmd,hcnd->bhcmn", asked, keys) * routes.scale
    m = jax.lax.stop_gradient(s.max(-1))
    p = jnp.exp(s - m[..., None])
    acc = jnp.einsum("bhcmn,hcnv->bhcmv", p, values)
    shape = b * h * clusters, -1, 1
    return OnlineSoftmax(
        m.reshape(shape), p.sum(-1).reshape(shape), acc.reshape(*shape, acc.shape[-1]))


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
        lists, o, count = _chunk(lists, *given, routes)
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
    near = jnp.einsum("bthd,bshd->bhts", qf, k.astype(jnp.float32))[:, :, None]
    far = jnp.einsum("bthd,bhcwd->bhctw", qf, lists.k.astype(jnp.float32))
    s = jnp.concatenate([far, jnp.broadcast_to(near, (*far.shape[:4], t))], -1)
    vals = jnp.concatenate([
        lists.v.astype(jnp.float32), jnp.broadcast_to(
            v.astype(jnp.float32).swapaxes(1, 2)[:, :, None],
            (*lists.v.shape[:3], t, v.shape[-1])),
    ], 3)
    s, vals, there = _with_memory(s, vals, there, asks, qf, routes)
    p = weights(s * routes.scale, there)
    o = jnp.einsum("bhcts,bhcsv->bhctv", p, vals)
    if routes.alone:
        nobody = asks & ~there.any(-1)
        o = jnp.where(nobody[..., None], v.astype(jnp.float32).swapaxes(1, 2)[
            :, :, None], o)
    o, count = o.sum(2), asks.sum(2).astype(jnp.float32)
    after = Lists(
        _kept(lists.k, k, at), _kept(lists.v, v, at), score, asked, last)
    return after, o.swapaxes(1, 2), count.swapaxes(1, 2)


def _with_memory(s, vals, there, asks, q, routes: Routes):
    """Logits, values and who is seen, with the memory of each cluster in front."""
    if routes.memory is None:
        return s, vals, there
    keys, more = (a.astype(jnp.float32) for a in routes.memory)
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
    old = jnp.take_along_axis(held, jnp.minimum(at, w - 1)[..., None], 3)
    new = new.astype(held.dtype).swapaxes(1, 2)  # [B,H,T,X]
    take = jax.vmap(jax.vmap(lambda a, at: a[at]))
    return jnp.where((at < w)[..., None], old, take(new, jnp.maximum(at - w, 0)))
