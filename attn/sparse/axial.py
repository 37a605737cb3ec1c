"""Axial regions: a text as rows of a grid, read along the token's row and column.

A token at row r, column c reads its row up to itself and its column above itself token
by token, and everything else that came before as regions: each other column's part
above row r ("vertical"), or of each row above the part left of column c and the part
right of it ("horizontal"), or both, in one softmax, by which far tokens are covered
twice. Summaries are running maxima with one attention along a row or column; all
products are attentions of rows or of columns, so memory is linear.

Source: Ren et al., 2021, arXiv:2107.05768, section 4.3 (Axial and its mixture).
"""

from __future__ import annotations

import functools
from typing import Callable

import jax
import jax.numpy as jnp

from attn.exact.attend import attend as exact
from attn.exact.online import OnlineSoftmax, join, output, state_of
from attn.masks import Causal, Full, Mask, Window
from pallas_kernels.logits import LogitSpec, Where

OTHERS = ~Window(0, 0)  # all but its own place
ABOVE = Causal() & OTHERS  # strictly: a token is in its row already


def attend(
    q, k, v, length: int, scale: float, *, vertical: bool, horizontal: bool,
    implementation: str | None = None,
) -> jax.Array:
    """o [B,T,H,V] of q [B,T,H,D], k [B,T,H,D], v [B,T,H,V] in rows of `length`."""
    (b, t), rows = q.shape[:2], -(-q.shape[1] // length)
    q, k, v = (_grid(a, length) for a in (q, k, v))  # [B,R,C,H,.]
    read = functools.partial(_read, scale, implementation)
    columns, lines = _along(1), _along(2)
    # the own row up to the token, and the own column above it
    state = join(read(lines, q, k, v, Causal()), read(columns, q, k, v, ABOVE))
    if vertical:
        far_k, far_v = _running(read, columns, 1, q, k, v)
        # of row r, the columns as they are above it; above the first there is nothing
        there = jnp.arange(rows) > 0
        there = jnp.broadcast_to(there[None, :, None], (b, rows, length))
        state = join(state, read(lines, q, far_k, far_v, OTHERS, there))
    if horizontal:
        for flip in (False, True):
            turned = (a[:, :, ::-1] if flip else a for a in (q, k, v))
            # of each row above, what is left of the column, or right of it if turned
            far_k, far_v = _running(read, lines, 2, *turned)
            there = jnp.arange(length) > 0
            far_k, far_v, there = (
                (a[:, :, ::-1] if flip else a) for a in
                (far_k, far_v, jnp.broadcast_to(there[None, None], (b, rows, length))))
            state = join(state, read(columns, q, far_k, far_v, ABOVE, there))
    o = output(state)  # [B,R,C,H,V]
    return o.reshape(b, -1, *o.shape[3:])[:, :t]


def within(
    q, k, v, length: int, scale: float, *, causal: bool,
    implementation: str | None = None,
) -> OnlineSoftmax:
    """Attention of each row of `length` tokens to itself, in causal order or whole: its
    state [B,T,H] of q [B,T,H,D], k [B,T,K,D], v [B,T,K,V]."""
    b, t = q.shape[:2]
    there = None
    if not causal:  # what fills the last row up stands behind it
        there = _grid(jnp.ones((b, t), bool), length)
    q, k, v = (_grid(a, length) for a in (q, k, v))
    state = _read(scale, implementation, _along(2), q, k, v,
                  Causal() if causal else Full(), there)
    return OnlineSoftmax(*(a.reshape(b, -1, *a.shape[3:])[:, :t] for a in state))


def row_major(
    q, k, v, length: int, scale: float, key: Callable, *,
    implementation: str | None = None,
) -> jax.Array:
    """As `attend`, where a row above is one region, another one for each column: its
    value is what the row's token in that column finds in the whole row, its key is
    key(value [B,T,H,V], key found [B,T,H,D]) [B,T,H,D]."""
    (b, t), rows = q.shape[:2], -(-q.shape[1] // length)
    width = v.shape[3]
    # keys beside values, so that one attention finds both
    both = jnp.concatenate([v, k], -1)
    q, k, v = (_grid(a, length) for a in (q, k, v))
    read = functools.partial(_read, scale, implementation)
    found = output(read(_along(2), q, k, _grid(both, length), Full()))
    found = found.reshape(b, -1, *found.shape[3:])[:, :t]
    value = found[..., :width]
    far_k = _grid(key(value, found[..., width:]).astype(q.dtype), length)
    far_v = _grid(value.astype(v.dtype), length)
    state = join(
        read(_along(2), q, k, v, Causal()), read(_along(1), q, far_k, far_v, ABOVE))
    return output(state).reshape(b, rows * length, -1, width)[:, :t]


def _grid(a, length: int) -> jax.Array:
    """[B,T,...] -> [B,R,C,...] of rows of `length`, filled up behind."""
    b, t = a.shape[:2]
    a = jnp.pad(a, [(0, 0), (0, -t % length)] + [(0, 0)] * (a.ndim - 2))
    return a.reshape(b, -1, length, *a.shape[2:])


def _along(axis: int) -> tuple[Callable, Callable]:
    """How a grid [B,R,C,...] becomes its columns (axis 1) or rows (2) [B X,Y,...], and
    how it is made of them again."""
    def cut(a):
        a = a.swapaxes(1, 2) if axis == 1 else a
        return a.reshape(-1, *a.shape[2:])

    def joined(a, like):
        b, rows, length = like.shape[:3]
        shape = (b, length, rows) if axis == 1 else (b, rows, length)
        a = a.reshape(*shape, *a.shape[2:])
        return a.swapaxes(1, 2) if axis == 1 else a

    return cut, joined


def _read(
    scale, implementation, along, q, k, v, mask: Mask, there=None
) -> OnlineSoftmax:
    """Attention of each row or column to itself; there [B,R,C]: which keys exist."""
    cut, joined = along
    where = Where()
    if there is not None:
        pos = jnp.arange(cut(there).shape[1], dtype=jnp.int32)[None]
        where = Where(
            jnp.broadcast_to(pos, cut(there).shape), jnp.where(cut(there), pos, -1))
    found = exact(
        cut(q), cut(k), cut(v), LogitSpec(mask, scale), where, split_lse=True,
        implementation=implementation,
    )
    return OnlineSoftmax(*(joined(a, q) for a in state_of(*found)))


def _running(read, along, axis: int, q, k, v) -> tuple[jax.Array, jax.Array]:
    """Key and value [B,R,C,H,.] of what is before each place along the axis."""
    top_q, top_k = (jax.lax.cummax(a, axis=axis) for a in (q, k))
    # v_r: what the maximum of all queries so far finds in the keys so far
    value = output(read(along, top_q, k, v, Causal())).astype(v.dtype)

    # one place on: the zeros at the first one are hidden by who reads them
    def before(a):
        widths = [(1, 0) if n == axis else (0, 0) for n in range(a.ndim)]
        return jax.lax.slice_in_dim(jnp.pad(a, widths), 0, a.shape[axis], axis=axis)

    return before(top_k), before(value)
