"""Prefix softmax: over every prefix, in chunks whose tokens meet in one product.

Inside a chunk P[t,i] = exp(s_i - m_t), i <= t, with the running maximum m_t: acc = P v
and l = P 1. Between chunks one state (m, l, acc) is carried (see
`attn/recurrent/scan.py`). The gradient goes the same way back. With r_t = 1/l_t and
delta_t = do_t.o_t = sum_i P[t,i] r_t do_t.v_i,

    ds_i = sum_t P[t,i] r_t (do_t.v_i - delta_t),    dv_i = sum_t P[t,i] r_t do_t

over t >= i; of later chunks only G = sum exp(ref - m_t) r_t do_t and h, the same of
delta, are known, where ref is the running maximum at the first token of the chunk
behind: s_i <= ref <= m_t, so that no exponent is positive. Where one token has nearly
all of the weight, do_t.v_i - delta_t is a small difference of large numbers: both are
measured from do_t.v of the token with the greatest score, which makes it exact.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from attn.contract.varying import varying
from attn.exact.online import exp_below
from attn.recurrent.chunks import only, from_chunks

F32 = jnp.float32
# sums in float32 are what makes scores of any size safe
einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


def exp(a: jax.Array, m: jax.Array) -> jax.Array:
    """exp(a - m) for a <= m, and 0 where both are -inf."""
    return exp_below(a, jnp.where(m == -jnp.inf, 0, m))


class Chunks(NamedTuple):
    """One call, cut: s [N,B,K,G,c] (-inf: padding), v [N,B,K,c,V], present [N,B,c]: the
    segment at each token or, at padding, before it; None: there is one segment."""

    s: jax.Array
    v: jax.Array
    present: jax.Array | None

    def seen(self) -> jax.Array:
        """Which token i each token t sees [N|1,B|1,1,1,c,c]."""
        c = self.s.shape[-1]
        order = jnp.tril(jnp.ones((1, 1, 1, 1, c, c), bool))
        if self.present is None:
            return order
        r = self.present[:, :, None, None]
        return order & (r[..., None] == r[..., None, :])

    def segment_at(self, at: int) -> jax.Array:
        """The segment [N,B,1,1] at token `at` of each chunk."""
        if self.present is None:
            return jnp.ones((self.s.shape[0], 1, 1, 1), jnp.int32)
        return self.present[:, :, at, None, None]

    def of(self, segment: jax.Array) -> jax.Array | None:
        """Which tokens belong to the segment [N,B,1,1] of each chunk: [N,B,1,1,c]."""
        if self.present is None:
            return None
        return self.present[:, :, None, None] == segment[..., None]


def cut(scores, v, segment, c: int) -> Chunks:
    """Chunks of c tokens."""
    (b, t, h), k = scores.shape, v.shape[2]
    widen = lambda a, **how: jnp.pad(
        a, [(0, 0), (0, -t % c)] + [(0, 0)] * (a.ndim - 2), **how
    )
    s, present = scores.astype(F32), None
    if segment is not None:
        s = jnp.where(segment[..., None] > 0, s, -jnp.inf)
        present = jnp.maximum(jax.lax.cummax(segment, axis=1), 1)
        # [N,B,c]
        present = widen(present, mode="edge").reshape(b, -1, c).swapaxes(0, 1)
    s = widen(s, constant_values=-jnp.inf).reshape(b, -1, c, k, h // k)  # [B,N,c,K,G]
    v = widen(v.astype(F32)).reshape(b, -1, c, *v.shape[2:])  # [B,N,c,K,V]
    return Chunks(s.transpose(1, 0, 3, 4, 2), v.transpose(1, 0, 3, 2, 4), present)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def chunked(chunk: int, dtype: Any, scores, v, segment, m, l, acc):
    """((m, l, acc), o) of `attn.recurrent.scan.prefix_softmax`."""
    return _ahead(chunk, dtype, scores, v, segment, m, l, acc)[0]


def _ahead(chunk: int, dtype, scores, v, segment, m, l, acc):
    (b, t, h), k = scores.shape, v.shape[2]
    x = cut(scores, v, segment, min(chunk, t))
    split = lambda a: a.reshape(b, k, h // k, *a.shape[2:])
    last, starts = _carry(x, split(m), split(l), split(acc))
    segment_before, m_before, l_before, acc_before = starts
    enters = x.of(segment_before)
    logits = jnp.where(x.seen(), x.s[..., None, :], -jnp.inf)  # [N,B,K,G,t,i]
    m_in = m_before[..., None]
    m_in = m_in if enters is None else jnp.where(enters, m_in, -jnp.inf)
    tops = jnp.maximum(logits.max(-1), m_in)  # m_t, the state's included
    # P [N,B,K,G,t,i], and what the state that comes in is multiplied with [N,B,K,G,t]
    p, rescale = exp(logits, tops[..., None]), exp(m_in, tops)
    sums = p.sum(-1) + rescale * l_before[..., None]  # l_t = P 1 + exp(m_in - m_t) l_in
    values = einsum("nbkgti,nbkiv->nbkgtv", p, x.v)  # [c,c] [c,V]
    # acc_t = P v + exp(m_in - m_t) acc_in
    values = values + rescale[..., None] * acc_before[..., None, :]
    o = values / jnp.where(sums > 0, sums, 1)[..., None]
    # [N,B,K,G,c,V] -> [B,T,H,V]
    o = from_chunks(o.reshape(*o.shape[:2], h, *o.shape[4:]), t)
    if segment is not None:
        o = only(segment[..., None, None] > 0, o)
    o = o.astype(dtype)
    state = tuple(a.reshape(b, h, *a.shape[3:]) for a in last)
    return (state, o), (scores, v, segment, starts, tops, sums)


def _carry(x: Chunks, m, l, acc):
    """The last state, [B,K,G] and [B,K,G,V], and what each chunk begins with: (segment,
    m, l, acc), with N in front."""
    ends = x.segment_at(-1)
    own = x.of(ends)
    s = x.s if own is None else jnp.where(own, x.s, -jnp.inf)
    top = s.max(-1)
    p = exp(s, top[..., None])  # exp(s_i - m), m of the whole chunk
    local = top, p.sum(-1), einsum("nbkgi,nbkiv->nbkgv", p, x.v)  # [G,c] [c,V]

    def pass_on(carry, chunk):
        segment, m, l, acc = carry
        end, (top, total, values) = chunk
        # of another segment: nothing comes in
        m_in = jnp.where(segment == end, m, -jnp.inf)
        new = jnp.maximum(m_in, top)
        # both sums are measured from the new maximum
        rescale, mine = exp(m_in, new), exp(top, new)
        values = acc * rescale[..., None] + values * mine[..., None]
        return (end, new, l * rescale + total * mine, values), carry

    first = jnp.ones_like(ends[0]), m, l, acc
    (_, *last), starts = jax.lax.scan(pass_on, *varying((first, (ends, local))))
    return last, starts


def _back(chunk: int, dtype, saved, cotangents):
    scores, v, segment, starts, tops, sums = saved
    (_, dl, dacc), do = cotangents
    (b, t, h), k = scores.shape, v.shape[2]
    x = cut(scores, v, segment, min(chunk, t))
    split = lambda a: a.reshape(b, k, h // k, *a.shape[2:])
    do = do.astype(F32)
    do = do if segment is None else only(segment[..., None, None] > 0, do)
    do = cut(scores, do, None, min(chunk, t)).v
    do = do.reshape(*do.shape[:2], k, h // k, *do.shape[3:])  # [N,B,K,G,c,V]
    # r_t = 1 / l_t, 0 at padding
    r = jnp.where(sums > 0, 1 / jnp.where(sums > 0, sums, 1), 0)
    p, asked, level, delta = _weights(x, starts, tops, r, do)
    # ds_i = sum_t P[t,i] r_t (do_t.v_i - delta_t)
    ds = (p * (asked - delta[..., None])).sum(-2)
    dv = einsum("nbkgti,nbkgtv->nbkiv", p, do)  # sum over t and the group: [c,V]
    first, behind = _carry_back(x, tops, r, do, level + delta, split(dl), split(dacc))
    ds, dv = _reached(x, behind, ds, dv)
    merge = lambda a: a.reshape(b, h, *a.shape[3:])
    unchunk = lambda a: from_chunks(a, t)
    ds = unchunk(ds.reshape(*ds.shape[:2], h, -1, 1))[..., 0]
    segment_0, ref, g, h_first = first
    # dl = -exp(m_0 - ref) h, dacc = exp(m_0 - ref) G, if segment 1 is seen at all
    rescale = jnp.where(segment_0 == 1, exp(starts[1][0], ref), 0)
    d_l, d_acc = merge(-rescale * h_first), merge(rescale[..., None] * g)
    state = varying(jnp.zeros((b, h), F32), ds), d_l, d_acc  # m is a constant
    return ds.astype(scores.dtype), unchunk(dv).astype(v.dtype), None, *state


def _weights(x: Chunks, starts, tops, r, do):
    """P r and do.v - level [N,B,K,G,t,i]; level and delta - level [N,B,K,G,t]."""
    segment_before, m_before, l_before, acc_before = starts
    logits = jnp.where(x.seen(), x.s[..., None, :], -jnp.inf)
    p = exp(logits, tops[..., None])  # P [N,B,K,G,t,i]
    asked = einsum("nbkgtv,nbkiv->nbkgti", do, x.v)  # do_t.v_i: [c,V] [V,c]
    greatest = p == 1  # the tokens with s_i = m_t
    # of several, their mean
    level = only(greatest, asked).sum(-1) / jnp.maximum(greatest.sum(-1, dtype=F32), 1)
    asked, p = asked - level[..., None], p * r[..., None]
    rescale = only(x.of(segment_before), exp(m_before[..., None], tops)) * r
    carried = einsum("nbkgtv,nbkgv->nbkgt", do, acc_before)  # do_t.acc_in: [c,V] [V]
    # acc_in, measured from level as values are
    carried = carried - level * l_before[..., None]
    return p, asked, level, (p * asked).sum(-1) + rescale * carried


def _reached(x: Chunks, behind, ds, dv):
    """ds and dv with what later chunks ask for."""
    segment, ref, g, h = behind
    e = only(x.of(segment), exp(x.s, ref[..., None]))  # exp(s_i - ref) [N,B,K,G,c]
    ds = ds + e * (einsum("nbkiv,nbkgv->nbkgi", x.v, g) - h[..., None])  # [c,V] [V]
    return ds, dv + einsum("nbkgi,nbkgv->nbkiv", e, g)  # [c,G] [G,V]


def _carry_back(x: Chunks, tops, r, do, delta, dl, dacc):
    """What the tokens from a chunk on ask of those before it: (segment, ref, G, h) of
    the first chunk, and of the chunk behind each, with N in front."""
    segments, refs = x.segment_at(0), tops[..., 0]
    weight = exp(refs[..., None], tops) * r  # exp(ref - m_t) r_t
    weight = only(x.of(segments), weight)
    # G and h of this chunk alone: [c] [c,V]
    local = einsum("nbkgt,nbkgtv->nbkgv", weight, do), (weight * delta).sum(-1)

    def pass_on(carry, chunk):
        segment, ref, g, h = carry
        own, mine, (g_own, h_own) = chunk
        # ref grows with time: this one is at most that of the chunk behind
        rescale = jnp.where(segment == own, exp(mine, ref), 0)
        return (own, mine, g_own + rescale[..., None] * g, h_own + rescale * h), carry

    # the last state asks for exp(s_i - m_T) (dl + v_i.dacc)
    last = x.segment_at(-1)[-1], tops[-1, ..., -1], dacc, -dl
    last, chunks = varying((last, (segments, refs, local)))
    return jax.lax.scan(pass_on, last, chunks, reverse=True)


chunked.defvjp(_ahead, _back)
