"""Compose: what is kept, how it is stored and what of it is read, as one policy.

    Compose(selection=SnapKV(capacity=1024), storage=KIVI(bits=4),
            reading=Quest(budget=256))

The three are independent where they can be. A selection keeps some of a prompt's tokens
in slots, and adds what is generated; a storage holds the slots, in order, as they are
or in codes; a reading chooses the slots that a token reads by marks of their blocks
(bounds, sums), which are of the keys before they became codes. A prompt is read exactly
with its own keys, and with what is stored of the pieces before it. Razor and Duo store
and read so what their retrieval heads keep; the others keep few as they are.

What does not go together says why, in the class that cannot (`refuses`), and is not
made: `refused` gives the sentence, `python -m experiments.pairs` the table of all of
them. Codes of a prompt that comes in pieces are made anew after each piece, so that
their errors add up. A reading lowers what is computed of codes, not what is unpacked.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from attn.cache import kv as caches
from attn.cache.few import at_slots
from attn.cache.head_groups import HeadGroups, check_shared
from attn.cache.kv import Cache
from attn.contract.attention import MASKED, TemplateRow, takes_rope
from attn.contract.calls import refuse_keywords
from attn.contract.segments import TokenPositions, locate
from attn.contract.shapes import check
from attn.masks import Causal
from attn.softmax import Softmax
from pallas_kernels.arrays import check_logits

PARTS = ("selection", "storage", "reading")


class Composed(NamedTuple):
    """store: the state of the storage, whose tokens are slots, counted from 0; pos
    [B,C,K] the position of each slot's token, None if all tokens are kept; marks: what
    the reading chooses by; end, segment [B] as in `Cache`."""

    store: Any
    pos: jax.Array | None
    marks: Any
    end: jax.Array
    segment: jax.Array

    @property
    def k(self) -> jax.Array:
        """The keys that are stored as they are [B,R,K,D]."""
        return self.store.k


class Whole:
    """The storage that holds keys and values as they are."""

    def init_state(self, size, q, k, v, *, x=None) -> Cache:
        """An empty memory of `size` slots."""
        return caches.empty(k, v, size)

    def stored(self, state: Cache, k, v, now: TokenPositions) -> Cache:
        """The state with tokens k [B,T,K,D], v [B,T,K,V]."""
        return caches.append(state, k, v, now, now.pos)

    def cache(self, state: Cache) -> Cache:
        """All that is held."""
        return state


def refused(selection: Any = None, storage: Any = None, reading: Any = None
            ) -> str | None:
    """Why these parts do not go together, None if they do."""
    given = dict(zip(PARTS, (selection, storage, reading)))
    for place, part in given.items():
        if part is None:
            continue
        if isinstance(part, type):
            return f"{part.__name__} is a class: expected {place}={part.__name__}(...)"
        name, own = type(part).__name__, getattr(part, "part", None)
        made = dataclasses.is_dataclass(part)
        if own != place or not made:
            what = f"a {own}" if own else f"none of {', '.join(PARTS)}"
            return f"{name} is {what}: expected no {place}={part}"
        for other, reason in getattr(part, "refuses", {}).items():
            if given[other] is not None:
                return f"{name} with {type(given[other]).__name__}: {reason}"
        if getattr(part, "prefill", "dense") != "dense":
            return (f"{name}: prefill={part.prefill!r}: a prompt is read exactly, "
                    "expected 'dense'")
    return None


@dataclasses.dataclass(frozen=True)
class Compose(Softmax):
    """A selection, a storage and a reading as one policy; see the head of the file.

    selection: what of a prompt is kept, as `SnapKV()`, None for all. storage: how, as
    `KIVI()`, None for as it is. reading: what a token reads, as `Quest()`, None for all
    that is kept. The other fields are those of `Softmax` and stand for the parts too: a
    part that has its own, and not the same, is refused (ValueError), as is one that
    reads prompts by its rule.
    """

    selection: Any = None
    storage: Any = None
    reading: Any = None
    part = "policy"
    row = TemplateRow(MASKED, "L^2 D, then r D a token", 2)

    def __post_init__(self):
        super().__post_init__()
        if reason := refused(self.selection, self.storage, self.reading):
            raise ValueError(f"Compose: {reason}")
        for part in (self.selection, self.storage, self.reading):
            if takes_rope(part):
                raise ValueError(f"Compose: {type(part).__name__} turns keys itself: "
                                 "expected it in the place of Compose")
        if self.axis is not None:
            raise ValueError(f"Compose: axis={self.axis!r}: expected None")
        if self.reading is not None and self.visible != Causal():
            raise ValueError(f"Compose: mask={self.mask}: blocks are chosen among all "
                             "earlier ones, expected None")
        for part in (self.selection, self.storage, self.reading):
            if part is not None:
                check_shared(self, part, self._fields())
        within = getattr(self.selection, "whole_as", None)
        if within is not None and (self.storage, self.reading) != (None, None):
            raise ValueError(
                f"Compose: {type(self.selection).__name__} has whole_as={within}, "
                "beside a storage or a reading: expected one of both"
            )
        self.alone  # parts may refuse what they are told

    def of_layer(self, n: int, layers: int) -> Compose:
        """This policy with its selection of layer n."""
        ask = getattr(self.selection, "of_layer", None)
        if ask is None:
            return self
        return dataclasses.replace(self, selection=ask(n, layers))

    @property
    def alone(self) -> Any:
        """The one attention that does it: the only part, or heads in two groups; None
        if there is none, as of a reading that knows no softcap, score and sinks."""
        given = [self._own(part) for part in (
            self.selection, self.storage, self.reading) if part is not None]
        if len(given) < 2:
            one = given[0] if given else Softmax(**self._fields())
            return one if isinstance(one, Softmax) else None
        if isinstance(self.selection, HeadGroups):
            inner = Compose(storage=_plain(self.storage), reading=_plain(self.reading),
                            **self._fields())
            return dataclasses.replace(given[0], whole_as=inner)
        return None

    def _fields(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(Softmax)}

    def _own(self, part: Any) -> Any:
        """A part with the scale, softcap and score of this attention."""
        names = {f.name for f in dataclasses.fields(part)}
        return dataclasses.replace(part, **{
            name: a for name, a in self._fields().items() if name in names})

    @property
    def _store(self) -> Any:
        return Whole() if self.storage is None else self.storage

    def init_state(self, size, q, k, v, *, x=None):
        """An empty memory for a prompt as long as q and the rest of `size` tokens."""
        caches.check_size(size)
        if self.alone is not None:
            return self.alone.init_state(size, q, k, v, x=x)
        slots, pos, prompt = size, None, min(q.shape[1], size)
        if self.selection is not None:
            k, v = (jax.eval_shape(self.selection._stored, q, a) for a in (k, v))
            slots = min(prompt, self.selection.kept_of(prompt)) + size - prompt
            pos = jnp.full((k.shape[0], slots, k.shape[2]), -1, jnp.int32)  # [B,C,K]
        store = self._store.init_state(slots, q, k, v)
        marks = None if self.reading is None else self.reading.marks(slots, k)
        return Composed(store, pos, marks, store.end, store.segment)

    def step(
        self, state, q, k, v, *, x=None, segments=None, bias=None, sink=None, **unknown
    ):
        """The next T tokens -> state, [B,T,H,V]: a piece is read exactly and then
        selected, one token is stored and reads what it chooses."""
        if self.alone is not None:
            more = {"bias": bias, "sink": sink, **unknown}
            more = {name: a for name, a in more.items() if a is not None}
            return self.alone.step(state, q, k, v, x=x, segments=segments, **more)
        refuse_keywords(self, unknown)
        check(q, k, v, segments=segments, aligned=True, piece=True)
        self._check_stream(bias)
        self._check_heads(q)
        check_logits(q, k, sink=sink)
        b, t = q.shape[:2]
        now = locate(segments, b, t, state.end, state.segment)
        if self.selection is not None:
            k, v = self.selection._stored(q, k), self.selection._stored(q, v)
        if isinstance(state.store, Cache):
            caches.check_fits(state.store, k, v)
        # the storage counts slots: of what was kept, and of each token since then
        slot = locate(segments, b, t, state.store.end, state.store.segment)
        room = _room(state.store)
        if self.selection is not None and t > 1:
            read = caches.concat(self._cache(state), k, v, now)  # k [B,C+T,K,D]
            o = self.read(*read, q, now, sink=sink)
            after = self._selected(state, *read, q, now, sink)
        else:
            caches.check_room(slot.next_pos, room)
            after = self._appended(state, k, v, now, slot)
            o = self._read(state, after, q, k, v, now, slot, sink)
        o = caches.poison(o.astype(v.dtype), after.store.end, room)
        return after, o

    def _cache(self, state: Composed) -> Cache:
        """What is stored, at the true positions of its tokens."""
        cache = self._store.cache(state.store)
        return self._placed(cache, cache.pos, state)

    def _placed(self, cache: Cache, slot, state: Composed) -> Cache:
        """Slots [B,N,K|1|H], -1 for none, with the positions of their tokens."""
        if state.pos is not None:
            heads = state.pos.shape[2]
            wide = max(heads, slot.shape[2])
            slot = jnp.broadcast_to(slot, (*slot.shape[:2], wide))
            # [B,C,K] -> [B,C,K|H], of which slots [B,N,K|H] take their positions
            table = jnp.repeat(state.pos, wide // heads, 2)
            at = jnp.clip(slot, 0, table.shape[1] - 1)
            found = jnp.take_along_axis(table, at, 1)
            cache = cache._replace(pos=jnp.where(slot < 0, -1, found))
        return cache._replace(end=state.end, segment=state.segment)

    def _appended(self, state: Composed, k, v, now, slot) -> Composed:
        """The state with tokens at slots behind those that are held."""
        pos, marks = state.pos, state.marks
        if pos is not None:
            began = (now.segment > 1).any(1)[:, None, None]
            at = jnp.where(caches.current(now), slot.pos, pos.shape[1])
            row = jnp.arange(at.shape[0])[:, None]
            new = jnp.broadcast_to(now.pos[..., None], (*at.shape, pos.shape[2]))
            pos = jnp.where(began, -1, pos).at[row, at].set(new, mode="drop")
        if marks is not None:
            marks = self.reading.marked(marks, k, slot, state.store.end)
        store = self._store.stored(state.store, k, v, slot)
        return Composed(store, pos, marks, now.next_pos, now.last_segment)

    def _selected(
        self, state: Composed, both: Cache, segment, q, now, sink
    ) -> Composed:
        """The state of what the selection keeps of all that was read."""
        assert state.pos is not None
        selection, slots = self._own(self.selection), state.pos.shape[1]
        mine = caches.in_order(caches.only_current(both, segment))
        size = min(selection.kept_of(q.shape[1]), slots, mine.k.shape[1])
        given = (q, mine, now) if sink is None else (q, mine, now, sink)
        kept = caches.keep(mine, selection.importance(*given), size)  # k [B,size,K,D]
        there = (kept.pos[..., 0] >= 0).astype(jnp.int32)  # as many of every head
        empty = jax.tree.map(jnp.zeros_like, state.store)
        empty = empty._replace(segment=jnp.full_like(empty.segment, -1))
        if isinstance(empty, Cache):
            empty = empty._replace(pos=jnp.full_like(empty.pos, -1))
        # what is kept is stored anew, from slot 0 on, and marked anew
        fresh = Composed(
            empty, None, jax.tree.map(jnp.zeros_like, state.marks), *empty[-2:])
        b, t = there.shape
        slot = locate(there, b, t, empty.end, empty.segment)
        after = self._appended(fresh, kept.k, kept.v, slot, slot)
        pos = jnp.pad(kept.pos, [(0, 0), (0, slots - size), (0, 0)],
                      constant_values=-1)
        # the storage goes on with the ids of the text
        store = after.store._replace(segment=now.last_segment)
        return Composed(store, pos, after.marks, now.next_pos, now.last_segment)

    def _read(self, before: Composed, after: Composed, q, k, v, now, slot, sink):
        """What tokens find: a piece all that was stored and itself, one what it
        chooses."""
        if q.shape[1] > 1:
            return self.read(
                *caches.concat(self._cache(before), k, v, now), q, now, sink=sink)
        cache = self._store.cache(after.store)
        if self.reading is not None:
            # the reading names slots: token n has to lie at index n
            cache = cache if self.storage is None else _by_slot(cache)
            chosen = self.reading.picked(after.marks, cache, q, slot)
            cache = at_slots(cache, chosen)
        cache = self._placed(cache, cache.pos, after)
        newest = now.segment.max(1, keepdims=True)
        return self.read(
            cache, jnp.broadcast_to(newest, cache.k.shape[:2]), q, now, sink=sink)


def _plain(part: Any) -> Any:
    """A part without what it has of the fields of `Softmax`."""
    if part is None:
        return None
    shared = {field.name for field in dataclasses.fields(Softmax)}
    return dataclasses.replace(part, **{
        field.name: field.default for field in dataclasses.fields(part)
        if field.name in shared})


def _room(store: Any) -> int:
    """Slots of a storage."""
    return store.k.shape[1] if isinstance(store, Cache) else store.room


def _by_slot(cache: Cache) -> Cache:
    """The same tokens with token n at index n: codes hold their last ones behind."""
    order = jnp.argsort(jnp.where(cache.pos < 0, caches.FOREVER, cache.pos), axis=1)
    return caches.taken(cache, order)
