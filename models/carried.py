"""Carried: what goes from layer to layer of a stack, within one call of it.

Three things that a layer cannot know alone, and that no user has to hand over:

- its number, for an attention that asks for it by `of_layer` (PyramidKV's budgets), in
  a layer of its own too; it tells what is kept, so a call without states has none;
- what the layers with one kind of attention share in a step: `shared_by_layers` makes
  it before the first of them, each finds it in the field `shared` of its state and
  leaves there what the next one gets (ActQKV's pool of blocks); between steps the field
  is None;
- a memory of hidden states beside the layers (CMR), which has a state of its own behind
  those of the layers.

All of it is values that go in and come out: nothing is global. Where nobody asks, the
program is the same as without.
"""

from __future__ import annotations

from typing import Any, Callable, NamedTuple

import jax
import jax.numpy as jnp

from attn.cache.kv import current
from attn.cmr import CMR, Buffer
from attn.contract.attention import said
from attn.contract.segments import locate
from attn.layers import Layer


def numbered(attentions: tuple) -> tuple:
    """Attentions of a model that ask for it, as layer n of those of their class."""
    inner = [getattr(a, "attention", a) for a in attentions]  # of a layer of its own
    # of a policy of several parts the one that asks
    kinds = [(type(a), type(getattr(a, "selection", None))) for a in inner]
    found = []
    for n, (entry, a) in enumerate(zip(attentions, inner)):
        if said(a, "of_layer") is not None:
            a = a.of_layer(kinds[:n].count(kinds[n]), kinds.count(kinds[n]))
            entry = entry.clone(attention=a, parent=None) if isinstance(
                entry, Layer) else a
        found.append(entry)
    return tuple(found)


def begin(blocks: tuple, states: Any, tokens: int) -> dict[type, Any]:
    """What layers share in a step of `tokens` tokens, by the class of attention.
    ValueError if they share something and are not alike."""
    if states is None:
        return {}
    kinds: dict[type, list[int]] = {}
    for n, block in enumerate(blocks):
        attention = _of(block)
        if said(attention, "shared_by_layers") is not None:
            kinds.setdefault(type(attention), []).append(n)
    found = {}
    for kind, at in kinds.items():
        own = tuple(states[n] for n in at)
        each = dict.fromkeys(_of(blocks[n]) for n in at)
        values = [a.shared_by_layers(own, tokens) for a in each]
        if all(value is None for value in values):
            continue
        if len(values) > 1:
            raise ValueError(f"{kind.__name__}: layers that share differ, as "
                             f"{[*each][1]} from {[*each][0]}: expected one setting")
        found[kind] = values[0]
    return found


def given(block: Any, state: Any, shared: dict[type, Any]) -> Any:
    """The state of a layer with what it shares."""
    kind = type(_of(block))
    return state._replace(shared=shared[kind]) if kind in shared else state


def taken(block: Any, state: Any, shared: dict[type, Any]) -> tuple[Any, dict]:
    """The state without it, and what the next layers share."""
    kind = type(_of(block))
    if kind not in shared:
        return state, shared
    return state._replace(shared=None), {**shared, kind: state.shared}


def _of(block: Any) -> Any:
    return getattr(block.mixer, "attention", None)


def by_pieces(step: Callable, states: Any, given: Any, size: int) -> tuple:
    """(states, y [B,T,E]) of step(states, part) -> (states, y of the part) over parts
    of `size` tokens of what is given [B,T,...], in a loop, and what is left behind."""
    t = jax.tree.leaves(given)[0].shape[1]
    if t <= size:
        return step(states, given)
    whole, outs = t // size * size, []

    def cut(a):  # [B,T,...] -> [N,B,size,...]
        return jnp.moveaxis(
            a[:, :whole].reshape(a.shape[0], -1, size, *a.shape[2:]), 1, 0)

    states, y = jax.lax.scan(step, states, jax.tree.map(cut, given))
    y = jnp.moveaxis(y, 0, 1)  # [B,N,size,E]
    outs.append(y.reshape(y.shape[0], whole, *y.shape[3:]))
    if whole < t:
        states, y = step(states, jax.tree.map(lambda a: a[:, whole:], given))
        outs.append(y)
    return states, jnp.concatenate(outs, 1)


def parted(step: Callable, size: int) -> Callable:
    """step(states, (x, segments)) of a piece of at most `size` tokens in which a row
    may come to the end of a segment of the memory, at a token of its own: what is
    behind it waits as padding, and is a second step where a row has that."""

    def both(states, part):
        x, ids = part
        memory, (b, t, _) = states[-1], x.shape
        if ids is None:  # the same sequence goes on
            own = jnp.where(memory.segment < 0, 1, memory.segment)
            ids = jnp.broadcast_to(own[:, None], (b, t))
        now = locate(ids, b, t, memory.end, memory.segment)
        # a sequence that begins here is no longer than a segment
        over = (now.segment == 1) & (now.pos // size > memory.end[:, None] // size)
        late = jax.lax.cummax(over.astype(jnp.int32), axis=1) > 0  # [B,T]
        states, y = step(states, (x, jnp.where(late, 0, ids)))

        def behind(states):
            states, more = step(states, (x, jnp.where(late, ids, 0)))
            return states, jnp.where(late[..., None], more, y)

        def nothing(states):
            return states, y

        return jax.lax.cond(late.any(), behind, nothing, states)

    return both


class Reweaving(NamedTuple):
    """A buffer of `CMR`; states [B,m,S,E] of a segment that is not full yet, at pos
    [B,S], -1 where nothing is; end, segment [B] as in `attn.cache.kv.Cache`."""

    buffer: Buffer
    states: jax.Array
    pos: jax.Array
    end: jax.Array
    segment: jax.Array


def empty(memory: CMR, x: Any) -> Reweaving:
    """The state of a memory that has read nothing, for tokens like x [B,T,E]."""
    b, size = x.shape[0], memory.segment
    return Reweaving(
        memory.init_state(x),
        jnp.zeros((b, memory.layers, size, x.shape[2]), x.dtype),
        jnp.full((b, size), -1, jnp.int32), jnp.zeros((b,), jnp.int32),
        jnp.full((b,), -1, jnp.int32))


def as_it_is(a: Any) -> Any:
    """The same."""
    return a


class Reader:
    """A memory during one piece, in which no row goes beyond its segment: `before` and
    `after` every layer, and `end`, the state behind the piece. A segment of a row ends
    at a multiple of `segment` of its own sequence."""

    def __init__(self, memory: CMR, layers: int, state: Reweaving, x, segments):
        self.memory, self.state = memory, state
        self.layers, self.at = memory.places(layers)
        b, t = x.shape[:2]
        self.now = locate(segments, b, t, state.end, state.segment)
        self.seen: dict[int, jax.Array] = {}

    def before(self, n: int, x: jax.Array) -> jax.Array:
        """The tokens [B,T,E] that go into layer n."""
        if n != self.at:
            return x
        found = self.memory(x, self.state.buffer, self.now.pos)
        # of a sequence that begins here nothing was captured
        return jnp.where((self.now.segment == 1)[..., None], found, x)

    def after(self, n: int, x: jax.Array) -> None:
        """Notes what comes out of layer n, if that is captured."""
        self.seen[n] = x

    def end(self) -> Reweaving:
        """The state after the piece, captured if the segment is full."""
        state, now, size = self.state, self.now, self.memory.segment
        new = jnp.stack([self.seen[n] for n in self.layers], 1)  # [B,m,T,E]
        began = (now.segment > 1).any(1)
        buffer = state.buffer._replace(
            pos=jnp.where(began[:, None, None], -1, state.buffer.pos))
        old = jnp.where(began[:, None], -1, state.pos)
        mine = current(now)
        both = jnp.concatenate([state.states, new.astype(state.states.dtype)], 2)
        pos = jnp.concatenate([old, jnp.where(mine, now.pos, -1)], 1)  # [B,S+T]
        full = (pos >= 0).sum(1) >= size

        def captured(buffer):
            new = self.memory.capture(
                buffer, both, jnp.maximum(pos, 0), (pos >= 0).astype(jnp.int32))
            return jax.tree.map(
                lambda a, b: jnp.where(full.reshape(-1, *(1,) * (a.ndim - 1)), a, b),
                new, buffer)

        # of one token at a time most fill no segment
        buffer = jax.lax.cond(full.any(), captured, as_it_is, buffer)
        # what is not captured yet goes to the front
        order = jnp.argsort(pos < 0, axis=1, stable=True)[:, :size]
        left = jnp.where(full[:, None], -1, jnp.take_along_axis(pos, order, 1))
        states = jnp.take_along_axis(both, order[:, None, :, None], 2)
        return Reweaving(buffer, states, left, now.next_pos, now.last_segment)
