"""Routed attention: tokens that belong to the same cluster attend to one another.

For each cluster the `window` tokens of a sequence that score highest with it are
gathered, they attend, and what a token got from its clusters is added up. Members are
chosen among all tokens, later ones too; `attn/sparse/lists.py` never looks ahead.

Source: Roy et al., 2020, arXiv:2003.05997.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from attn.exact.attend import attend
from attn.exact.online import OnlineSoftmax, exp_below, join, output, state_of
from attn.masks import Causal, Full, Mask, Window
from pallas_kernels.logits import LogitSpec, Where


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
    # compared by position: ranks in the lists would leak where q's and k's differ
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
    o = o.reshape(*q_at.shape, -1)  # [B,H,C,M,V]
    # what names no token is dropped
    add = jax.vmap(jax.vmap(lambda at, o: jnp.zeros((t, o.shape[-1])).at[at].add(
        o, mode="drop")))
    flat = q_at.reshape(b, h, -1)  # [B,H,C M]
    # the sum of what a token's clusters say, and beside it of how many
    both = jnp.concatenate([o, jnp.ones_like(o[..., :1])], -1)
    # [B,H,C M,V+1] at [B,H,C M] -> [B,T,H,V+1]
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
    # [B,H,C,M,D] x [H,C,n,D] -> [B,H,C,M,n], and with [H,C,n,V] -> [B,H,C,M,V]
    s = jnp.einsum("bhcmd,hcnd->bhcmn", asked, keys) * routes.scale
    m = jax.lax.stop_gradient(s.max(-1))
    p = exp_below(s, m[..., None])
    acc = jnp.einsum("bhcmn,hcnv->bhcmv", p, values)
    shape = b * h * clusters, -1, 1  # [B H C,M,1]
    return OnlineSoftmax(
        m.reshape(shape), p.sum(-1).reshape(shape), acc.reshape(*shape, acc.shape[-1]))
