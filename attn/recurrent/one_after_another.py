"""One after another: shards of a recurrence that none can begin before its turn.

What a linear recurrence does to the state that comes in can be said before that is
known (`attn/recurrent/lasp.py`). Where it cannot, what is carried goes from one shard
to the next, inside `shard_map`, and each runs in its turn. W shards take as long as one
device does, on a W-th of the memory; the backward pass keeps what shards begin with.
"""

from __future__ import annotations

from typing import Any, Callable

import jax
import jax.numpy as jnp

from attn.parallel.sharding import Axis


def one_after_another(
    run: Callable, first: Any, axis: Axis, shape: tuple
) -> tuple[Any, jax.Array]:
    """What is carried after the last shard, on all of them, and this shard's output.

    run: (carried) -> (carried, output of `shape` float32), over this shard's tokens;
    first: what the first shard begins with, the same on all.
    """
    me, count = jax.lax.axis_index(axis), jax.lax.axis_size(axis)
    forward = [(n, (n + 1) % count) for n in range(count)]

    def wait(memory):
        return memory, jnp.zeros(shape, jnp.float32)

    @jax.checkpoint
    def mine(memory, n):
        # turn n is shard n's; the others hand on what they have
        return jax.lax.cond(n == me, run, wait, memory)

    def turn(carry, n):
        memory, o = carry
        after, found = mine(memory, n)
        moved = jax.tree.map(lambda a: jax.lax.ppermute(a, axis, forward), after)
        ours = me == (n + 1) % count
        memory = jax.tree.map(lambda a, b: jnp.where(ours, a, b), moved, after)
        return (memory, jnp.where(n == me, found, o)), None

    begin = first, jnp.zeros(shape, jnp.float32)
    (memory, o), _ = jax.lax.scan(turn, begin, jnp.arange(count))
    # after the last turn it has come round to the first shard
    last = jax.tree.map(lambda a: jax.lax.psum(jnp.where(me == 0, a, 0), axis), memory)
    return last, o
