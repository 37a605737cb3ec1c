"""Groups: which tokens of a row belong together, and sums over them.

A row is cut into groups, each closed by a landmark: of equal size, so that one lies in
a window of so many keys or in two, or of any size, where the data says so.
"""

from __future__ import annotations

from typing import Callable, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.tile import NEVER


class Row(NamedTuple):
    """What is known of the tokens of a row, [B,T] each.

    segment (an index), pos: as in `attn.contract.segments`. group: number of the
    token's group. mark: it is a landmark. spills: its group began in an earlier window
    of `size` keys; None if every group fills a window of its own.
    """

    segment: jax.Array
    pos: jax.Array
    group: jax.Array
    mark: jax.Array
    spills: jax.Array | None = None


def regular(
    segment: jax.Array, pos: jax.Array, size: int, *, packed: bool = True
) -> Row:
    """The row in which every `size`-th token of a sequence is a landmark. packed: its
    groups begin anywhere, in order and without gaps."""
    spills = None
    if packed:
        index = jnp.arange(segment.shape[1])[None]
        spills = index // size != (index - pos % size) // size
    mark = (pos % size == size - 1) & (segment > 0)
    return Row(segment, pos, pos // size, mark, spills)


def irregular(segment: jax.Array, pos: jax.Array, mark: jax.Array) -> Row:
    """The row in which landmarks stand anywhere: where mark [B,T]."""
    mark = mark & (segment > 0)
    return Row(segment, pos, jnp.cumsum(mark, axis=1) - mark, mark)


def compact(segment: jax.Array, *others: jax.Array) -> tuple[jax.Array, ...]:
    """segment [B,S] and other arrays [B,S,...] with padding (0) moved to the end."""
    # stable: tokens stay in order, and so do positions
    order = jnp.argsort(segment == 0, axis=1, stable=True)

    def take(a):
        at = order.reshape(order.shape + (1,) * (a.ndim - 2))
        return jnp.take_along_axis(a, at, 1)

    return tuple(take(a) for a in (segment, *others))


def reducers(keys: Row, size: int | None) -> tuple[Callable, Callable]:
    """(max, sum) over each key's group, of arrays [B,K,G,q,S], for every key of it."""
    if size is None:
        peak, total = jax.ops.segment_max, jax.ops.segment_sum
        return _by_group(keys, peak), _by_group(keys, total)
    if keys.spills is None:
        return _by_window(jnp.max, size), _by_window(jnp.sum, size)
    spills = keys.spills.reshape(keys.spills.shape[0], 1, 1, 1, -1, size)
    return (_by_two_windows(jnp.max, jnp.maximum, NEVER, spills),
            _by_two_windows(jnp.sum, jnp.add, 0.0, spills))


def _by_group(keys: Row, reduce: Callable) -> Callable:
    """Groups of any lengths."""
    def row(x, group):
        # [K,G,q,S] -> of each group [S,K,G,q] -> of each key's group [S,K,G,q]
        return reduce(jnp.moveaxis(x, -1, 0), group, group.shape[0])[group]

    return lambda x: jnp.moveaxis(jax.vmap(row)(x, keys.group), 1, -1)


def _by_window(reduce: Callable, size: int) -> Callable:
    """Groups that fill a window of `size` keys each."""
    def over(x):
        cut = x.reshape(*x.shape[:-1], -1, size)  # [...,S] -> [...,n,size]
        each = jnp.broadcast_to(reduce(cut, axis=-1, keepdims=True), cut.shape)
        return each.reshape(x.shape)

    return over


def _by_two_windows(reduce, join, nothing: float, spills: jax.Array) -> Callable:
    """Groups that lie in the window in which they begin and, where `spills`
    [B,1,1,1,n,size] says so, in the one after that."""
    def over(x):
        cut = x.reshape(*x.shape[:-1], *spills.shape[-2:])
        left, right = ([*[(0, 0)] * (x.ndim - 1), end] for end in ((1, 0), (0, 1)))

        def part(there):
            return reduce(jnp.where(there, cut, nothing), axis=-1)

        # [...,n]: what of the group that began in a window lies in the next one
        behind = jnp.pad(part(spills)[..., 1:], right, constant_values=nothing)
        each = join(part(~spills), behind)  # of the groups that begin in each window
        # for keys that spill: the group that began in the window before
        before = jnp.pad(each[..., :-1], left, constant_values=nothing)
        return jnp.where(spills, before[..., None], each[..., None]).reshape(x.shape)

    return over
