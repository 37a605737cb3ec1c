"""Short convolution: a filter of each channel over the last few tokens.

    y_t = sum_w weight_w x_(t-W+1+w),    w = 0..W-1, channel by channel

It gives the layers and gates around an attention their sight of the nearest tokens. All
that has to be remembered, or to come from another shard, are W-1 tokens.
"""

from __future__ import annotations

from typing import Any, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from attn.parallel.sharding import Axis, stacked


def shortconv(
    x: jax.Array,
    weight: jax.Array,
    bias: jax.Array | None = None,
    *,
    state: jax.Array | None = None,
    segment: jax.Array | None = None,
    state_segment: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """A causal convolution of each channel -> the next state, y [B,T,C].

    x [B,T,C]; weight [W,C], its last row meets the token itself; bias [C]; state
    [B,W-1,C] the tokens before these, None for zeros. segment [B,T] as in
    `attn.contract.segments`: a token sees its own segment, the state is of segment 1,
    or of state_run [B,W-1]; padding is passed over and gets 0.
    """
    _check(x, weight, bias, state, segment)
    b, t, c = x.shape
    w = weight.shape[0]
    if state is None:
        state = jnp.zeros((b, w - 1, c), x.dtype)
    if segment is None:
        row = jnp.concatenate([state, x], 1)  # [B,W-1+T,C]
        return row[:, t:], _filtered(row, weight, bias, None, t)
    # padding goes to the end of the row, so that neighbours lie side by side
    order = jnp.argsort(segment == 0, axis=1, stable=True)
    row = jnp.concatenate([state, jnp.take_along_axis(x, order[..., None], 1)], 1)
    if state_segment is None:
        state_segment = jnp.ones((b, w - 1), segment.dtype)
    segments = jnp.concatenate(
        [state_segment, jnp.take_along_axis(segment, order, 1)], 1
    )
    y = _filtered(row, weight, bias, segments, t)
    y = jnp.take_along_axis(y, jnp.argsort(order, axis=1)[..., None], 1)
    # where the last W-1 real tokens stand, behind the state's W-1
    newest = (segment > 0).sum(1, keepdims=True) + jnp.arange(w - 1)[None]
    present = jnp.maximum(segment.max(1, keepdims=True), 1)  # the segment that goes on
    same = jnp.take_along_axis(segments, newest, 1) == present
    last = jnp.take_along_axis(row, newest[..., None], 1)
    return jnp.where(same[..., None], last, 0), y


def shortconvs(
    xs: Sequence[jax.Array],
    weights: Sequence[jax.Array],
    *,
    states: Sequence[jax.Array] | None = None,
    segment: jax.Array | None = None,
    axis: Axis | None = None,
) -> tuple[Sequence[jax.Array] | None, list[jax.Array]]:
    """`shortconv` of each x [B,T,.] by its weight [W,.], where T is split over mesh
    axis `axis`, inside `shard_map` -> the next states, the same on all shards (None
    over an axis where none came in), and [y].

    One collective brings the W-1 tokens in front of the shard: a neighbour sends its
    last ones; or, with segments, with a state, or where a shard has fewer tokens, each
    shard gathers the last of all, which does not depend on T.
    """
    w, t = weights[0].shape[0], xs[0].shape[1]
    begun: Any = states
    ids = after = None
    if axis is not None and w > 1:
        if segment is None and states is None and t >= w - 1:
            begun = _halo(xs, w - 1, axis)
        else:
            begun, ids, after = _tails(xs, states, segment, w - 1, axis)
    results = [
        shortconv(
            x, weight, state=begun and begun[i], segment=segment, state_segment=ids
        )
        for i, (x, weight) in enumerate(zip(xs, weights))
    ]
    if axis is None or w == 1:
        after = [state for state, _ in results]
    return after, [y for _, y in results]


def _halo(xs, count: int, axis: Axis) -> list[jax.Array]:
    """The last `count` tokens of the shard before, zeros for the first."""
    # one message for all channels
    tail = jnp.concatenate([x[:, -count:] for x in xs], -1)
    forward = [(i, i + 1) for i in range(jax.lax.axis_size(axis) - 1)]
    return _apart(jax.lax.ppermute(tail, axis, forward), xs)


def _tails(xs, states, segment, count: int, axis: Axis):
    """The last `count` tokens before this shard, their segments (0: there is none), and
    the last tokens of all, zero where they are not of the last segment; None without
    states."""
    b, t = xs[0].shape[:2]
    ids = jnp.ones((b, t), jnp.int32) if segment is None else segment
    short = max(count - t, 0)  # a shard may have fewer tokens than the filter sees

    def widen(a):
        return jnp.pad(a, [(0, 0), (short, 0)] + [(0, 0)] * (a.ndim - 2))

    def flat(a):
        """[B,shards,count,...] as [B,shards count,...]."""
        return a.reshape(b, -1, *a.shape[3:])

    newest, *last = _last(count, widen(ids), *(widen(x) for x in xs))
    sent = newest, jnp.concatenate(last, -1)
    row = [jnp.moveaxis(a, 0, 1) for a in stacked(sent, axis)]  # [B,W,count,...]
    # only shards in front
    here = jnp.arange(row[0].shape[1]) < jax.lax.axis_index(axis)
    ids, before = flat(row[0]), flat(jnp.where(here[None, :, None], row[0], 0))
    tokens = flat(row[1])  # [B,shards count,C]
    if states is not None:
        # [B,W-1,C] in front, of segment 1
        tokens = jnp.concatenate([jnp.concatenate(states, -1), tokens], 1)
        one = jnp.ones((b, count), ids.dtype)
        ids, before = (jnp.concatenate([one, a], 1) for a in (ids, before))
    before, front = _last(count, before, tokens)
    begun = _apart(jnp.where((before > 0)[..., None], front, 0), xs)
    if states is None:
        return begun, before, None
    own, after = _last(count, ids, tokens)
    # the next state is of the last segment alone
    own = own == jnp.maximum(ids.max(1, keepdims=True), 1)
    return begun, before, _apart(jnp.where(own[..., None], after, 0), xs)


def _last(count: int, ids, *arrays) -> list[jax.Array]:
    """The last `count` real tokens of ids [B,T] and arrays [B,T,.]; ids of 0 in front
    where there are fewer."""
    order = jnp.argsort(ids > 0, axis=1, stable=True)[:, -count:]  # real tokens last
    found = [jnp.take_along_axis(a, order[..., None], 1) for a in arrays]
    return [jnp.take_along_axis(ids, order, 1), *found]


def _apart(a: jax.Array, like: Sequence[jax.Array]) -> list[jax.Array]:
    """The channels of each, which lie side by side."""
    ends = np.cumsum([x.shape[2] for x in like])[:-1]
    return jnp.split(a, ends.tolist(), -1)


def _filtered(row, weight, bias, segments, t: int) -> jax.Array:
    """The sums over the taps, for the last t tokens of row [B,W-1+T,C]."""
    w, c = weight.shape
    y = jnp.zeros((row.shape[0], t, c), row.dtype)
    # y_t = sum_n weight_n x_(t-W+1+n)
    for n in range(w):
        x = row[:, n:n + t]
        if segments is not None:
            # a tap ends at the border of its token's segment
            x = jnp.where(
                (segments[:, n:n + t] == segments[:, w - 1:])[..., None], x, 0
            )
        y = y + x * weight[n].astype(row.dtype).reshape(1, 1, c)
    if bias is not None:
        y = y + bias.astype(row.dtype).reshape(1, 1, c)
    return y if segments is None else jnp.where(
        (segments[:, w - 1:] > 0)[..., None], y, 0
    )


def _check(x, weight, bias, state, segment) -> None:
    if x.ndim != 3 or 0 in x.shape:
        raise ValueError(f"x has shape {x.shape}: expected [B,T,C], none of them 0")
    b, t, c = x.shape
    if weight.ndim != 2 or weight.shape[0] < 1 or weight.shape[1] != c:
        raise ValueError(f"weight has shape {weight.shape}: expected [W,C={c}], W >= 1")
    before = (b, weight.shape[0] - 1, c)
    for name, a, shape in (
        ("bias", bias, (c,)), ("state", state, before), ("segment", segment, (b, t))
    ):
        if a is not None and a.shape != shape:
            raise ValueError(f"{name} has shape {a.shape}: expected {shape}")
