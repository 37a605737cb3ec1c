"""Online softmax: what some of the keys say of a query, in three numbers a head.

However many they are, it is the largest logit, the sum of the exponentials below it and
the weighted sum of values. States of different keys merge in any order:

    m_c = max_j s_j,  l_c = sum_j exp(s_j - m_c),  acc_c = sum_j exp(s_j - m_c) v_j
    m = max_c m_c,  l = sum_c exp(m_c - m) l_c,  acc = sum_c exp(m_c - m) acc_c
    o = acc / l,  lse = m + log l

Keys of which a query sees none give the least m, l = 0 and acc = 0, and an lse of -inf.
m and l stay apart: where m is large, m + log l has nothing of l. All is float32.
Source: Milakov & Gimelshein, 2018, arXiv:1805.02867.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.tile import LOW, NEVER, lse_of, sink_logit

EMPTY = LOW  # the maximum of no logits, finite so that differences are no NaN


class OnlineSoftmax(NamedTuple):
    """What some keys say of each query, float32: m, l [...] and acc [...,V], where
    [...] is [B,T,H], or another order of the axes of queries."""

    m: jax.Array
    l: jax.Array
    acc: jax.Array


@jax.custom_jvp
def exp_below(s: jax.Array, m: jax.Array) -> jax.Array:
    """exp(s - m), where m is the largest of logits s, or near it: at most 1.

    The choice between them keeps XLA from making one instruction of a product in s and
    the difference, which rounds s otherwise than m was: at 3e9 by more than 88, so that
    the weights of a row would all be 0, or infinite.
    """
    return jnp.exp(jnp.where(s > m, m, s) - m)


@exp_below.defjvp
def _exp_below_jvp(primals, tangents):
    # dp = p (ds - dm), of a logit that stands above m by rounding too
    p, (ds, dm) = exp_below(*primals), tangents
    return p, p * (ds - dm)


def empty(shape: tuple[int, ...], width: int) -> OnlineSoftmax:
    """The state of no keys, of queries [...] = `shape` and V = width."""
    zeros = jnp.zeros((*shape, width), jnp.float32)
    # the least m, l = 0, acc = 0
    return OnlineSoftmax(zeros[..., 0] + EMPTY, zeros[..., 0], zeros)


def state_of(o: jax.Array, m: jax.Array, l: jax.Array | None = None) -> OnlineSoftmax:
    """The state of an attention that is done, as `attend` gives it with `split_lse`: o
    [B,T,H,V], m and l [B,H,T]; or (lse, 1, o) of o and its lse, -inf where a row sees
    nothing."""
    m, o = m.swapaxes(1, 2), o.astype(jnp.float32)  # [B,T,H]
    if l is None:
        some = m > NEVER
        return OnlineSoftmax(jnp.where(some, m, EMPTY), some.astype(jnp.float32), o)
    l = l.swapaxes(1, 2)
    return OnlineSoftmax(m, l, o * l[..., None])


def without_value(sink: jax.Array, like: OnlineSoftmax) -> OnlineSoftmax:
    """The state of sinks [H], logits without value of queries as `like` has them
    [B,T,H]; -inf is none."""
    m = jnp.broadcast_to(sink_logit(sink), like.m.shape)
    some = m > NEVER
    # its gradient flows through l, as m is a constant: l = exp(sink - m) = 1
    top = jax.lax.stop_gradient(jnp.where(some, m, EMPTY))
    l = jnp.where(some, jnp.exp(jnp.where(some, m, 0) - jnp.where(some, top, 0)), 0)
    return OnlineSoftmax(top, l, jnp.zeros_like(like.acc))


def rescale(state: OnlineSoftmax, m: jax.Array) -> OnlineSoftmax:
    """The same state, its sums taken below another maximum m [...] >= state.m."""
    # where no key has been seen, exp(EMPTY - EMPTY) would be 1
    decay = jnp.where(state.l > 0, jnp.exp(state.m - m), 0)
    return OnlineSoftmax(m, decay * state.l, decay[..., None] * state.acc)


def join(a: OnlineSoftmax, b: OnlineSoftmax) -> OnlineSoftmax:
    """The state of the keys of both. No gradient flows through its m, on which o does
    not depend."""
    m = jax.lax.stop_gradient(jnp.maximum(a.m, b.m))
    # both below one maximum: exponents are at most 0
    a, b = rescale(a, m), rescale(b, m)
    return OnlineSoftmax(m, a.l + b.l, a.acc + b.acc)


def merge(
    parts: OnlineSoftmax, axis: str | tuple[str, ...] | None = None
) -> OnlineSoftmax:
    """The state of all keys: of the parts on the devices along mesh axis `axis`, inside
    `shard_map`, by one maximum and one sum; without one, of a leading axis."""
    own = jax.lax.stop_gradient(parts.m)
    if axis is None:
        # m = max_c m_c, and every part below it
        m = own.max(0)
        _, l, acc = rescale(parts, jnp.broadcast_to(m, own.shape))
        return OnlineSoftmax(m, l.sum(0), acc.sum(0))
    m = jax.lax.pmax(own, axis)
    # every part is below the common maximum before it is summed: nothing overflows
    _, l, acc = rescale(parts, m)
    return OnlineSoftmax(m, jax.lax.psum(l, axis), jax.lax.psum(acc, axis))


def output(state: OnlineSoftmax) -> jax.Array:
    """o = acc / l [...,V] float32; 0 where nothing was seen."""
    # l = 0: acc is 0 too
    return state.acc / jnp.where(state.l > 0, state.l, 1)[..., None]


def logsumexp(state: OnlineSoftmax) -> jax.Array:
    """lse = m + log l [...] float32; -inf where nothing was seen."""
    return lse_of(state.m, state.l)
