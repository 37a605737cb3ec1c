"""Time softmax: keys as a softmax over all tokens until now, channel by channel.

In every channel of the key, tokens share out one unit of weight. With

    z_t = log sum_(s<=t) exp(k_s)

a token takes exp(k_t - z_t) when it comes, and what was there before is multiplied with
exp(z_{t-1} - z_t): a linear recurrence whose state is always a mean. Keys of any size
are safe, as a sum is held as its largest exponent and the rest.

Source: LightNet (Qin et al., 2024) arXiv:2405.21022.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from attn.parallel.sharding import Axis, over_mesh
from attn.recurrent.chunks import only
from attn.recurrent.scan import prefix_scan

LOW = -1e30  # the largest of no keys; finite, as differences of two have to be


class Mass(NamedTuple):
    """The sum of exp(keys) = exp(top) total, [...,D] float32: the largest key, and a
    sum that is measured from it. Keys of any size are safe then, and differences of two
    masses, or of a key and one, keep the precision that a small number has."""

    top: jax.Array
    total: jax.Array


class Shares(NamedTuple):
    """Of each token [B,T,H,D] float32: share exp(k_t - z_t), log_decay z_{t-1} - z_t
    and z; and top and total [B,H,D] after all tokens, None where not wanted."""

    share: jax.Array
    log_decay: jax.Array
    z: jax.Array
    top: Any
    total: Any


def shares(
    k: jax.Array,
    segment: jax.Array | None,
    before: tuple,
    *,
    chunk: int,
    axis: Axis | None = None,
    init_lse: float = -math.inf,
    ends: bool = True,
) -> Shares:
    """The shares of keys k [B,T,H,D] float32, in the global view. segment [B,T] as in
    `attn.contract.segments`; before: top and total [B,H,D] of what came in, `nothing`
    at the beginning; init_lse: z in front of the first token. Over a mesh these sums
    are gathered before the states, whose decays depend on them."""
    f = functools.partial(running, axis, chunk, init_lse, ends)
    letters = "BTHD BT BHD BHD -> BTHD BTHD BTHD BHD BHD"
    return Shares(*over_mesh(f, letters, axis)(k, segment, *before))


def running(axis: Axis | None, chunk: int, init_lse, ends: bool, k, segment, *before):
    """`shares` inside of `shard_map`, if there is an axis."""
    # a constant: top + log(total) does not depend on where it is measured from
    top, held = jax.lax.stop_gradient(k), Mass(*before)
    # the mass in front of a token, and its own: exp(k - top) = 1, with k's gradient
    token = Mass(*nothing(k.shape)), Mass(top, jnp.exp(k - top))
    after, (last, now) = prefix_scan(
        _shifted, token, state=(held, held), segment=segment, chunk=chunk, axis=axis,
        ends=ends,
    )
    (old_top, old), (new_top, new) = (_begun(a, init_lse) for a in (last, now))
    real = None if segment is None else (segment > 0)[..., None, None]
    # exp(k_t - z_t), z = top + log(total)
    share = only(real, jnp.exp(only(real, k - new_top)) / new)
    log_decay = old_top - new_top + jnp.log(old) - jnp.log(new)  # z_{t-1} - z_t
    # rounding may make it positive, but no decay is
    log_decay = jnp.where(log_decay > 0, 0, log_decay)
    z = new_top + jnp.log(new)
    return share, log_decay, z, *(after[1] if ends else (None, None))


def _begun(mass: Mass, init_lse: float) -> tuple[jax.Array, jax.Array]:
    """top and total > 0 with what stands in front of the first token."""
    top, total = mass.top, mass.total
    if init_lse > -math.inf:
        top = jnp.maximum(top, init_lse)
        # exp(init_lse), below the same top
        total = total * jnp.exp(mass.top - top) + jnp.exp(init_lse - top)
    return top, jnp.where(total > 0, total, 1)


def nothing(shape: tuple[int, ...]) -> Mass:
    """The mass of no keys."""
    return Mass(jnp.full(shape, LOW, jnp.float32), jnp.zeros(shape, jnp.float32))


def _joined(a: Mass, b: Mass) -> Mass:
    """The mass of the keys of both."""
    top = jnp.maximum(a.top, b.top)
    return Mass(top, a.total * jnp.exp(a.top - top) + b.total * jnp.exp(b.top - top))


def _shifted(a: tuple[Mass, Mass], b: tuple[Mass, Mass]) -> tuple[Mass, Mass]:
    """`_joined` of stretches of tokens, first without the last token of them."""
    return _joined(a[1], b[0]), _joined(a[1], b[1])


def largest(k: jax.Array, segment: jax.Array) -> jax.Array:
    """The largest of k [B,S,...] in each token's segment [B,S], numbered up to S."""
    many = k.shape[1] + 1
    # by row: [S,...] -> [S+1,...]
    best = jax.vmap(lambda a, r: jax.ops.segment_max(a, r, many))(k, segment)
    at = segment.reshape(*segment.shape, *(1,) * (k.ndim - 2))
    return jnp.take_along_axis(best, at, 1)
