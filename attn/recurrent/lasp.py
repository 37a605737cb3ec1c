"""LASP: what a shard's state owes to the shards before it, by one collective.

Each shard of a recurrence reads its own tokens from an empty state. What it does to the
state that really comes in is affine, S_out = A S_in + M, so it is enough that every
shard gathers the pair (A, M) of each and joins those in front of it (LASP-2, Sun et
al., 2025, arXiv:2502.07563):

    P_0 = S,  P_(w+1) = A_w P_w + M_w

The gradient goes the same way from the other end: every shard gathers the cotangents
dP_w and joins those behind it, R_w = dP_(w+1) + A_(w+1)^T R_(w+1), which is dM_w. Both
ways it is one all-gather whose size does not depend on T. An all-gather moves W-1
states to a shard, more than the hops of a chain do, but in one step that may overlap
with the work inside the shards. `carry_in` is this; `exclusive_prefix` is the same for
any associative join of stretches of tokens.
"""

from __future__ import annotations

import functools
from typing import Any, Callable, NamedTuple

import jax
import jax.numpy as jnp

from attn.parallel.sharding import Axis, stacked
from attn.recurrent.chunks import only


class CarryIn(NamedTuple):
    """What a shard begins with, state [B,H,D,V] and its segment [B] (1 without
    segments), and the state after all shards, None if nothing was there before them."""

    state: jax.Array
    segment: jax.Array | int
    after: jax.Array | None


class _How(NamedTuple):
    axis: Axis
    alike: bool
    reverse: bool


def carry_in(
    added: jax.Array,
    factor: jax.Array | None,
    last: jax.Array | None,
    axis: Axis,
    *,
    state: jax.Array | None = None,
    alike: bool = False,
    reverse: bool = False,
) -> CarryIn:
    """The state that a shard begins with, inside `shard_map`.

    added M [B,H,D,V] float32: a shard's state at its end without the others. factor:
    what multiplies the state that comes in, None for 1, [B|1,H,1|D] for each row, or
    matrices A [B,H,D,D]; `alike` on all shards, and then not gathered, or not. last
    [B]: the shard's last segment, 0 if it has none; a segment that began in between
    drops the state. state [B,H,D,V]: what comes before the first shard, of segment 1;
    then the state after the last shard is given too, on every shard. Without a factor M
    may be of fewer heads that divide H. `reverse`: the shards behind come first.
    """
    how = _How(axis, alike or factor is None, reverse)
    before, segment, after = _carry_in(how, added, factor, last, state)
    return CarryIn(before, 1 if last is None else segment, after)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _carry_in(how: _How, added, factor, last, state):
    return _ahead(how, added, factor, last, state)[0]


def _ahead(how: _How, added, factor, last, state):
    order, me = _order(how)
    sent = added, None if how.alike else factor, last
    parts = _turned(how, stacked(sent, how.axis))  # in the order of reading [W,B,...]

    def pass_on(carry, part):
        now, segment, mine = carry
        n, (new, own, newest) = part
        # what stood before this shard
        mine = jax.tree.map(lambda a, b: jnp.where(n == me, a, b), (now, segment), mine)
        then = segment if newest is None else jnp.maximum(
            segment, newest
        )  # segments rise
        keep = None if newest is None else then == segment  # else S is dropped
        passed = _times(factor if how.alike else own, now)
        # heads that share a key head have one M, but states of their own
        new = jnp.repeat(new, now.shape[1] // new.shape[1], 1)
        # P_(w+1) = A_w P_w + M_w
        return (_kept(keep, passed) + new, then, mine), keep

    start = jnp.zeros_like(added) if state is None else state  # P_0
    first = start, jnp.ones(added.shape[:1], jnp.int32)
    (after, _, mine), keeps = jax.lax.scan(pass_on, (*first, first), (order, parts))
    out = *mine, None if state is None else after
    met = None if factor is None else mine[0]
    return out, (factor, parts[1], keeps, met, state is not None, added.shape[1])


def _back(how: _How, saved, cotangents):
    factor, factors, keeps, met, streams, heads = saved
    d_before, _, d_after = cotangents
    order, me = _order(how)
    sent = (d_before, d_after) if streams else d_before
    parts = _turned(how, stacked(sent, how.axis))
    parts, ends = parts if streams else (parts, None)

    def pass_on(carry, part):
        behind, mine = carry
        n, own, keep, d = part
        mine = jnp.where(n == me, behind, mine)
        passed = _times(factor if how.alike else own, behind, True)
        # R_w = dP_(w+1) + A_(w+1)^T R_(w+1)
        return (d + _kept(keep, passed), mine), None

    # every shard gave the state after all, so its cotangents add up
    last = jnp.zeros_like(d_before) if ends is None else ends.sum(0)
    xs = order, factors, keeps, parts
    (first, mine), _ = jax.lax.scan(pass_on, (last, last), xs, reverse=True)
    # a value that all shards hold has the sum of their gradients
    d_state = jnp.where(me == 0, first, 0) if streams else None
    b, h, d, v = mine.shape
    d_added = mine.reshape(b, heads, h // heads, d, v).sum(2)  # [B,K,G,D,V]
    if factor is None:
        return d_added, None, None, d_state
    keep = None if keeps is None else keeps[me]
    d_factor = _share(factor, _kept(keep, mine), met)  # dA_w = R_w P_w^T
    return d_added, d_factor, None, d_state


_carry_in.defvjp(_ahead, _back)


def _order(how: _How) -> tuple[jax.Array, jax.Array]:
    """Numbers of the shards, and of this one, in the order in which they are read."""
    shards, me = jax.lax.axis_size(how.axis), jax.lax.axis_index(how.axis)
    return jnp.arange(shards), shards - 1 - me if how.reverse else me


def _turned(how: _How, parts: Any) -> Any:
    return jax.tree.map(lambda a: jnp.flip(a, 0), parts) if how.reverse else parts


def _kept(keep: jax.Array | None, a: jax.Array) -> jax.Array:
    return only(None if keep is None else keep[:, None, None, None], a)


def _times(factor, state, transposed: bool = False) -> jax.Array:
    """A S, or A^T S."""
    if factor is None:
        return state
    if factor.ndim == 3:
        return state * factor[..., None]  # [B,H,D,V] x [B,H,D,1]
    form = "bhed,bhev->bhdv" if transposed else "bhde,bhev->bhdv"  # [D,D] [D,V]
    return jnp.einsum(form, factor, state, precision=jax.lax.Precision.HIGHEST)


def _share(factor, d_after, before) -> jax.Array:
    """The gradient of the factor in A S, given those of A S and S."""
    if factor.ndim == 4:
        return jnp.einsum("bhdv,bhev->bhde", d_after, before,  # [D,V] [V,D]
                          precision=jax.lax.Precision.HIGHEST)
    each = (d_after * before).sum(-1)  # A is diagonal: [B,H,D]
    wide = [n for n in range(3) if factor.shape[n] == 1 and each.shape[n] > 1]
    return each.sum(tuple(wide), keepdims=True)


def tagged(op: Callable) -> Callable:
    """`op` on pairs (segment, stretch), where segment [...] is that of the stretch's
    last token and 0 if it has none: a stretch of another segment replaces what came
    before it. Segments rise, so if the last segments are equal, all behind the seam
    belongs to one segment."""
    def step(a, b):
        def choose(x, y, joined):
            def of(test):
                return test.reshape(test.shape + (1,) * (x.ndim - test.ndim))

            return jnp.where(of(b[0] == 0), x, jnp.where(of(a[0] == b[0]), joined, y))

        return jnp.maximum(a[0], b[0]), jax.tree.map(choose, a[1], b[1], op(a[1], b[1]))

    return step


def exclusive_prefix(
    op: Callable, last: jax.Array, final: Any, axis: Axis, first: Any,
    ends: bool = False,
) -> tuple[Any, Any]:
    """(segment, stretch) of all tokens before this shard, and, if `ends`, of all tokens
    of all shards, else None. last [B]: its last segment, 0 if it has none; final
    [B,...]: its stretch, `first`: the pair that comes before all. One all-gather of
    stretches, and in the backward pass one of their gradients, from which every shard
    takes its own by going the same way again.
    """
    return _exclusive_prefix((op, axis, ends), last, final, *first)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _exclusive_prefix(how: tuple, last, final, segment, state):
    return _gathered(how, last, final, segment, state)[0]


def _gathered(how: tuple, last, final, segment, state):
    op, axis, ends = how
    lasts, parts = stacked((last, final), axis)
    after, starts = _joined(op, segment, lasts, state, parts)
    mine = _of(axis, starts)
    return (mine, after if ends else None), (segment, lasts, state, parts)


def _joined(op: Callable, segment, lasts, state, parts):
    """The pair behind all shards, and those that shards begin with [W,...]."""
    step = tagged(op)

    def pass_on(pair, part):
        return step(pair, part), pair

    return jax.lax.scan(pass_on, (segment, state), (lasts, parts))


def _of(axis: Axis, parts: Any) -> Any:
    """This shard's part."""
    me = jax.lax.axis_index(axis)
    return jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, me, 0, False), parts)


def _scattered(how: tuple, saved, cotangents):
    op, axis, ends = how
    segment, lasts, state, parts = saved
    (_, d_mine), d_after = cotangents
    sent = (d_mine, d_after[1]) if ends else d_mine
    found = stacked(sent, axis)
    d_starts, d_ends = found if ends else (found, None)
    # every shard gave the last one, so its cotangents add up
    d_last = jax.tree.map(lambda a: a.sum(0), d_ends) if ends else jax.tree.map(
        jnp.zeros_like, state)

    def stretches(state, parts):
        (_, after), (_, starts) = _joined(op, segment, lasts, state, parts)
        return after, starts

    _, back = jax.vjp(stretches, state, parts)
    d_state, d_parts = back((d_last, d_starts))
    # a value that all shards hold has the sum of their gradients
    me = jax.lax.axis_index(axis)
    d_state = jax.tree.map(lambda a: jnp.where(me == 0, a, 0), d_state)
    return None, _of(axis, d_parts), None, d_state


_exclusive_prefix.defvjp(_gathered, _scattered)
