"""Queries, keys and values after short convolutions, as recurrent attentions ask.

Each channel is filtered over the last few tokens and goes through silu; the weights are
parameters of the attention that asks, `q_conv`, `k_conv` and `v_conv` [W,channels].
"""

from __future__ import annotations

from typing import Any, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from attn.parallel.sharding import Axis, home, over_mesh
from attn.recurrent.shortconv import shortconvs


def short_qkv(
    module: Any,
    arrays: Sequence[jax.Array],
    tails: Sequence[jax.Array] | None,
    segment: jax.Array | None,
    axis: Axis | None,
) -> tuple[Sequence[Any], list[jax.Array]]:
    """The next tails; and q, k, v after convolutions and silu, float32.

    module: the linen module that has the weights, and `conv`, their taps, 0 for none.
    arrays: q [B,T,H,D], k [B,T,K,D], v [B,T,K,V]; tails: what each convolution last saw
    [B,conv-1,channels], None at the beginning. segment [B,T] or None: as in
    `attn.contract.segments`.
    """
    # what follows is rounded once, at its end
    wide = [a.astype(jnp.float32) for a in arrays]
    if not module.conv:
        return unread(tails), [nn.silu(a) for a in wide]
    # [B,T,H D], [B,T,K D], [B,T,K V]: a filter of each channel
    flat = [a.reshape(*a.shape[:2], a.shape[2] * a.shape[3]) for a in wide]
    # uniform within 1/sqrt(conv): the filter of a channel sees `conv` numbers
    fans = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
    weights = [
        module.param(f"{name}_conv", fans, (module.conv, a.shape[2]), jnp.float32)
        for name, a in zip("qkv", flat)
    ]
    streams = tails is not None
    wide_tails = [a.astype(jnp.float32) for a in tails] if tails is not None else None
    # channels are split where their heads are, and if the mesh can split the heads
    channels = [home("H", a.shape[2], axis) for a in arrays]

    def of(axes: str) -> str:
        return " ".join(axes + c for c in channels)

    letters = f"{of('BT')} {of('.')} {of('B.')} BT -> {of('B.')} {of('BT')}"

    def local(*arrays):
        after, found = shortconvs(
            arrays[:3], arrays[3:6], states=arrays[6:9] if streams else None,
            segment=arrays[9], axis=axis,
        )
        return *unread(after), *found

    found = over_mesh(local, letters, axis)(
        *flat, *weights, *unread(wide_tails), segment)
    # tails are remembered in the dtype that the stream began with
    held = arrays if tails is None else tails
    after = [b if b is None else b.astype(a.dtype) for a, b in zip(held, found)]
    # [B,T,H D] -> [B,T,H,D]
    return after, [nn.silu(b).reshape(a.shape) for a, b in zip(arrays, found[3:])]


def unread(tails: Any) -> Sequence[Any]:
    """Tails of three arrays, None where there are none."""
    return [None] * 3 if tails is None else tails


def tail(a: Any, conv: int) -> jax.Array:
    """What a convolution of `conv` taps has seen before the first token of a
    [B,T,heads,width]."""
    shape = a.shape[0], max(conv - 1, 0), a.shape[2] * a.shape[3]
    return jnp.zeros(shape, a.dtype)


def unit(a: jax.Array) -> jax.Array:
    """Vectors of length 1; one that is 0 stays 0."""
    return a * jax.lax.rsqrt((a * a).sum(-1, keepdims=True) + 1e-6)
