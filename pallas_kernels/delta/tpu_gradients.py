"""The gradients of one chunk of the delta rule on TPU, whatever decays in it.

Source: see `pallas_kernels/delta/api.py`.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.delta.chunk import CHUNK, ROWS, Side, strict
from pallas_kernels.machine.product import F32, NN, NT, TN, dot


def sum_of(parts):
    """The sum of some arrays."""
    return functools.reduce(jnp.add, parts)


def gradients(static, decay, given, own: Side, held, x, ds) -> tuple[Any, ...]:
    """d(side) [ROWS,CHUNK], the gradient of the state that the chunk began with, from
    that of the state that it ended with, dv, dq, dk and dg or None."""
    q, v, do = given
    low, dsl, scale = q.dtype, ds.astype(q.dtype), static.scale
    # the forward pass of the chunk
    (qk, kk), (qe, ke, kl) = decay.pairs(), decay.met()
    ks = dot(ke, held, NN)  # k S [CHUNK,V]
    r = v.astype(F32) - own.enter * ks  # [CHUNK,V]
    u = dot(x, (own.beta * r).astype(low), NN)  # [CHUNK,V]
    ul = u.astype(low)
    # u, and through the system what stands on its right: y is the gradient of beta r
    later = dot(kl, dsl, NN)  # k dS' [CHUNK,V]
    # du = P^T do + leave k dS', y = X^T du: [CHUNK,V]
    du = dot((scale * qk).astype(low), do, TN) + own.leave * later
    y = dot(x, du.astype(low), TN)
    dr = own.beta * y  # dv
    away = (own.enter * dr).astype(low)  # minus the gradient of k S
    # dS = keep dS' - k^T (enter dr) + q^T (scale enter do): [D,V]
    before = decay.kept() * ds - dot(ke, away, TN)
    before = before + dot(qe, ((scale * own.enter) * do.astype(F32)).astype(low), TN)
    # pairs of tokens: d(q k^T), and dA = -y u^T, j < i
    dqk = scale * dot(do, ul, NT)
    da = -strict(dot(y.astype(low), ul, NT))
    from_state = dot(do, held, NT)  # do S^T [CHUNK,D]
    # of queries and keys as they meet the state, and of keys as they enter the next one
    met = ((scale * own.enter) * from_state, -dot(away, held, NT),
           dot((own.leave * u).astype(low), dsl, NT))
    dq, dk, dg, (columns, rows) = decay.back(
        (qk, kk), (dqk, own.beta * da), met, ds * held.astype(F32))

    def across(a):
        return a.sum(1, keepdims=True)

    columns["beta"] = across(y * r) + across(kk * da)
    if dg is None:  # else enter and leave only say what belongs together
        columns["enter"] = (scale * across(q.astype(F32) * from_state)
                            - across(dr * ks))
        columns["leave"] = across(u * later)
    at = Side._fields.index
    lane = jax.lax.broadcasted_iota(jnp.int32, (CHUNK, ROWS), 1)
    placed = [jnp.where(lane == at(name), a, 0.0) for name, a in columns.items()]
    side = sum_of(placed).T  # [ROWS,CHUNK]
    i = jax.lax.broadcasted_iota(jnp.int32, side.shape, 0)
    for name, a in rows.items():
        side = side + jnp.where(i == at(name), a, 0.0)
    return side, before, dr, dq, dk, dg
