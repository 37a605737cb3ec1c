"""View: what a network computes inside, read and replaced by name.

A network is a pure function of its variables, so a look inside is one more collection
of them, beside "params": at `view/<path of the module>/view_<name>` stands what is
wanted of the array that the module calls so. Where nothing stands, which is known
before anything is traced, nothing is computed: without the collection the program is
the same. What is read comes back in the collection "seen". Replacements are arrays, so
that they go through jit, grad and vmap; whatever takes parameters (generation, a
session, training) takes a changed network too. `models/view.py` writes the collection
by layer and name.

Weights of attention are a special case, as nobody has them at hand: they are made for
the heads and rows that are asked for, tile by tile.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Callable

import jax
import jax.numpy as jnp
import numpy as np

from attn.contract.effective import SEEN, VIEW, weights_of


def variable(name: str) -> str:
    """What the array `name` is called in the collections: a module may have a child of
    that name, and linen gives a name once."""
    return f"view_{name}"


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("mask", "value"), meta_fields=("read",),
)
@dataclasses.dataclass(frozen=True)
class Site:
    """What is wanted of an array x: x becomes where(mask, value, x), both as they
    broadcast to it, and comes back if it is to be `read` (static)."""

    mask: Any = None
    value: Any = None
    read: bool = False


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("heads", "rows", "mask", "value"),
    meta_fields=("of", "tile", "read"),
)
@dataclasses.dataclass(frozen=True)
class Rows:
    """Weights of attention p [B,n,m,S]: of n heads and m query rows, int32 arrays or
    tuples, None for all.

    mask, value: p becomes where(mask, value, p), and the head's output follows. of: a
    function of the weights [B,n,tile,S] of so many rows at a time, along axis 2, such
    as those of `attn/maps.py`: what it gives is concatenated along that axis, so that
    the map itself need not exist. Static: of, tile, read.
    """

    heads: Any = None
    rows: Any = None
    mask: Any = None
    value: Any = None
    of: Callable | None = None
    tile: int = 128
    read: bool = True

    def __post_init__(self):
        if self.tile < 1:
            raise ValueError(f"tile={self.tile}: expected 1 or more rows")


def replaced(x: jax.Array, site: Site | Rows) -> jax.Array:
    """where(mask, value, x) of a site, in the dtype of x."""
    mask, value = (jnp.broadcast_to(a, x.shape) for a in (site.mask, site.value))
    return jnp.where(mask, value.astype(x.dtype), x)


def opened(module: Any, name: str, x: jax.Array) -> jax.Array:
    """The array x that a linen module calls `name`, as the view has it."""
    site = module.get_variable(VIEW, variable(name))
    if site is None:
        return x
    if site.value is not None:
        x = replaced(x, site)
    if site.read:
        _keep(module, name, x)
    return x


def with_pattern(
    module: Any, attention: Any, q, k, v, o: jax.Array, options: dict[str, Any]
) -> jax.Array:
    """The output o [B,T,H,V] of `attention` in a linen module, as the view has its
    weights, under the name "pattern". options: keywords of the call.

    NotImplementedError for an attention without a matrix of weights.
    """
    site = module.get_variable(VIEW, variable("pattern"))
    if site is None:
        return o
    h, t = o.shape[2], o.shape[1]
    heads = _numbers("heads", site.heads, 0, h)
    rows = _numbers("rows", site.rows, -t, t)
    rows = jnp.where(rows < 0, rows + t, rows)  # -1: the last one

    def made(rows):
        return weights_of(attention, q, k, v, heads, rows, **options)

    if site.value is None:
        found = by_tiles(made, rows, site.tile, site.of)
    else:
        p = replaced(made(rows), site)  # [B,n,m,S]
        found = p if site.of is None else site.of(p)
        own = v[:, :, heads // (h // v.shape[2])].astype(p.dtype)  # [B,S,n,V]
        # [B,n,m,S] x [B,S,n,V] -> [B,m,n,V]
        new = jnp.einsum("bnms,bsnv->bmnv", p, own)
        o = o.at[:, rows[:, None], heads[None]].set(new.astype(o.dtype))
    if site.read:
        _keep(module, "pattern", found)
    return o


def _numbers(name: str, asked: Any, least: int, size: int) -> jax.Array:
    """The heads or rows of a site, all for None. ValueError for what is no list of
    whole numbers from `least`, below `size`, where values are known."""
    if asked is None:
        return jnp.arange(size)
    found = jnp.asarray(asked)
    whole = jnp.issubdtype(found.dtype, jnp.integer)
    if found.ndim != 1 or not found.size or not whole:
        raise ValueError(f"{name} is {found.dtype}{list(found.shape)}: expected one or "
                         "more whole numbers")
    if not any(isinstance(a, jax.core.Tracer) for a in jax.tree.leaves(asked)):
        for n in np.asarray(asked).tolist():
            if not least <= n < size:
                raise ValueError(f"{name} has {n}: expected numbers from {least}, "
                                 f"below {size}")
    return found


def refuse_pattern(module: Any) -> None:
    """NotImplementedError if the view wants weights of attention in a stream."""
    if module.get_variable(VIEW, variable("pattern")) is not None:
        raise NotImplementedError(
            "pattern: a stream has weights of slots, not of tokens: expected the text "
            "as a whole, without a state"
        )


def by_tiles(made: Callable, rows: jax.Array, tile: int, of: Callable | None) -> Any:
    """of(made(rows)), so many rows at a time, where made(rows [m]) -> [B,n,m,S]: its
    parts one behind the other along axis 2."""
    m = rows.shape[0]
    tile = min(tile, m)
    count = -(-m // tile)
    # rows that fill the last tile up have no weights
    filled = jnp.pad(rows, (0, count * tile - m), constant_values=-1)

    def one(own):
        # [B,n,tile,S]
        p = jnp.where((own >= 0)[None, None, :, None], made(jnp.maximum(own, 0)), 0)
        return p if of is None else of(p)

    parts = jax.lax.map(one, filled.reshape(count, tile))  # [count,B,n,tile|1,...]

    def joined(a):
        whole = jnp.moveaxis(a, 0, 2)  # [B,n,count,tile|1,...]
        whole = whole.reshape(*whole.shape[:2], -1, *whole.shape[4:])
        return whole[:, :, :m] if a.shape[3] == tile else whole

    return jax.tree.map(joined, parts)


def _keep(module: Any, name: str, x: Any) -> None:
    module.sow(SEEN, variable(name), x, reduce_fn=_last, init_fn=_nothing)


def _last(_, x):
    """Of what was seen under a name before, nothing."""
    return x


def _nothing():
    return None
