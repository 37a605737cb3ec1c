"""RetrievalAttention (Liu et al., 2024) arXiv:2409.10516: far keys are looked up.

Of a long prompt a token needs few keys, but other ones each time. So the first `sinks`
keys and the last `recent` ones stay on the device and are attended to exactly; all
others lie in the host's memory, under an index that is made for the prompt's queries,
and each query head looks up the `top_k` that fit it best. The host attends to what it
finds, next to the data, and hands over an output and a log-sum-exp a head, which are
merged with the device's: what is looked up and what stays are different keys.

    lse = logaddexp(lse_W, lse_R),  o = e^(lse_W - lse) o_W + e^(lse_R - lse) o_R

Keys that are neither near nor found have weight 0. Prompts are read exactly; nothing is
learned. What is near does not wait for the host: the two do not depend on each other.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from attn.cache import graph_index, kv as caches, reading
from attn.cache.graph_index import Graph
from attn.cache.kv import Cache
from attn.contract.attention import MASKED, TemplateRow
from attn.contract.calls import refuse_keywords
from attn.contract.fields import check_fields
from attn.contract.segments import TokenPositions, locate
from attn.contract.shapes import check
from attn.exact.online import join, output, state_of, without_value
from attn.softmax import Softmax
from pallas_kernels.arrays import check_logits

INDEXES = ("graph", "flat")


class RetrievalState(NamedTuple):
    """near: the keys of the device, in order; far: all keys [B,C,K,D] by position, with
    pos -1 for what is near. links [B,K,C,W] and entry [B,K] int32 of the graphs; W = 0
    for a flat index. An entry of -1: far keys are of a sequence that has ended."""

    near: Cache
    far: Cache
    links: jax.Array
    entry: jax.Array

    @property
    def k(self) -> jax.Array:
        """[B,C,K,D] of all tokens of the prompt and room for the rest."""
        return self.far.k

    @property
    def end(self) -> jax.Array:
        """[B] int32: the next token's position."""
        return self.near.end

    @property
    def segment(self) -> jax.Array:
        """[B] int32: the last token's segment, -1 before the first."""
        return self.near.segment


@dataclasses.dataclass(frozen=True)
class Retrieval(Softmax):
    """RetrievalAttention (Liu et al., 2024) arXiv:2409.10516: an index of far keys.

    sinks, recent: keys of the prompt that stay on the device, beside all that is
    generated; top_k: keys that a query head looks up. index: "graph"
    (`attn/cache/graph_index.py`: neighbours, degree, beam; made by at most `queries`
    queries of a group, evenly spaced), or "flat", the exact best. The search is a
    callback to the host. Neither score, softcap nor a mask but `Causal()`.
    """

    sinks: int = 128
    recent: int = 512
    top_k: int = 100
    index: str = "graph"
    neighbours: int = 100
    degree: int = 35
    beam: int = 500
    queries: int = 1024
    part = "reading"
    refuses = {
        "selection": "what it looks up is what a selection drops",
        "storage": "the index is of the keys as they are, in the host's memory",
    }
    row = TemplateRow(MASKED, "L^2 D, then r D a token", 2)

    def __post_init__(self):
        super().__post_init__()
        least = ("recent", "top_k", "neighbours", "degree", "beam", "queries")
        check_fields(self, least={"sinks": 0, **dict.fromkeys(least, 1)},
                     choices={"index": INDEXES})
        for name in ("mask", "score", "softcap"):
            if getattr(self, name) is not None:
                raise ValueError(
                    f"Retrieval: {name}={getattr(self, name)}: an index knows q.k "
                    "alone, expected None"
                )

    def init_state(self, size, q, k, v, *, x=None):
        """An empty memory for a prompt as long as q and the rest of `size` tokens."""
        caches.check_size(size)
        prompt = min(q.shape[1], size)
        # near: what stays of the prompt, and everything that is generated
        near = min(self.sinks + self.recent, prompt) + size - prompt
        # M links of queries and 2M that connect
        width = 3 * self.degree if self.index == "graph" else 0
        b, _, heads, _ = k.shape
        return RetrievalState(
            caches.empty(k, v, near), caches.empty(k, v, size),
            jnp.full((b, heads, size, width), -1, jnp.int32),
            jnp.zeros((b, heads), jnp.int32))

    def step(
        self, state, q, k, v, *, x=None, segments=None, bias=None, sink=None, **unknown
    ):
        """The next T tokens -> state, [B,T,H,V]: a piece is read exactly, and then what
        is not near goes under the index."""
        refuse_keywords(self, unknown)
        check(q, k, v, segments=segments, aligned=True, piece=True)
        self._check_stream(bias)
        check_logits(q, k, sink=sink)
        slots = state.k.shape[1]
        now = locate(segments, q.shape[0], q.shape[1], state.end, state.segment)
        caches.check_room(now.next_pos, slots)
        if q.shape[1] > 1:
            both, segment = caches.concat(_all(state), k, v, now)
            o = self.read(both, segment, q, now, sink=sink)
            held = caches.only_current(both, segment)
            state = self._dealt(state, held, q, now)
        else:
            state, o = self._token(state, q, k, v, now, sink)
        return state, caches.poison(o.astype(v.dtype), now.next_pos, slots)

    def _dealt(self, state: RetrievalState, held: Cache, q, now) -> RetrievalState:
        """All tokens that are held, near or far, and the index of the far ones."""
        cut = jnp.maximum(now.next_pos - self.recent, self.sinks)[:, None]  # [B,1]
        pos, row = held.pos[..., 0], jnp.arange(q.shape[0])[:, None]

        def put(like: Cache, slot):
            slot = jnp.where(slot >= 0, slot, like.k.shape[1])
            k, v = (jnp.zeros_like(a).at[row, slot].set(c, mode="drop")
                    for a, c in zip(like[:2], held[:2]))
            at = jnp.full_like(like.pos, -1).at[row, slot, 0].set(pos, mode="drop")
            return Cache(k, v, at, *held[3:])

        first = pos < self.sinks
        near = put(state.near, jnp.where(
            first, pos, jnp.where(pos >= cut, self.sinks + pos - cut, -1)))
        far = put(state.far, jnp.where(first | (pos >= cut), -1, pos))
        links, entry = state.links, jnp.zeros_like(state.entry)
        if self.index == "graph":
            b, t, h, d = q.shape
            heads = far.k.shape[2]
            some = np.unique(np.linspace(0, t - 1, min(t, self.queries)).astype(int))
            asked = q[:, some].reshape(b, len(some), heads, h // heads, d)
            links, entry = jax.pure_callback(
                self._host_build, (like(links), like(entry)), asked, far.k,
                far.pos[..., 0], now.segment[:, some] == now.segment.max(
                    1, keepdims=True), vmap_method="sequential")
        return RetrievalState(near, far, links, entry)

    def _token(self, state: RetrievalState, q, k, v, now: TokenPositions, sink):
        """One token: near keys on the device, far ones on the host."""
        # of a sequence that has ended nothing is looked up
        entry = jnp.where(now.segment > 1, -1, state.entry)
        (b, _, h, _), far = q.shape, state.far
        found = jax.pure_callback(
            self._host_read, (jax.ShapeDtypeStruct((b, 1, h, v.shape[3]), jnp.float32),
                              jax.ShapeDtypeStruct((b, h, 1), jnp.float32)),
            q, far.k, far.v, far.pos[..., 0], state.links, entry,
            vmap_method="sequential")
        near, used = caches.append_next(state.near, k, v, now)
        caches.check_room(used, near.k.shape[1])
        newest = jnp.broadcast_to(now.segment, near.k.shape[:2])
        cache, wide = caches.of_one_type(near, q)
        own = reading.read(cache, newest, wide, now, self._spec(), split_lse=True,
                           implementation=self.implementation)
        # near keys of the device and far ones of the host, in one softmax
        both = join(state_of(*own), state_of(*found))
        if sink is not None:
            both = join(both, without_value(sink, both))
        real = (now.segment > 0)[..., None, None]
        o = caches.poison(output(both), used, near.k.shape[1])
        return RetrievalState(near, far, state.links, entry), jnp.where(real, o, 0.0)

    def _host_build(self, q, k, pos, real):
        """Graphs of far keys k [B,C,K,D] for queries q [B,N,K,G,D] that are `real`
        [B,N] -> links [B,K,C,W], entry [B,K]. On the host."""
        q, k, pos, real = (np.asarray(a) for a in (q, k, pos, real))
        (b, slots, heads, d), width = k.shape, 3 * self.degree
        links = np.full((b, heads, slots, width), -1, np.int32)
        entry = np.zeros((b, heads), np.int32)
        for row, head in np.ndindex(b, heads):
            at = np.nonzero(pos[row] >= 0)[0]
            asked = q[row, real[row], head].reshape(-1, d).astype(np.float32)
            if not len(at) or not len(asked):
                continue
            graph = graph_index.build(
                k[row, at, head].astype(np.float32), asked, degree=self.degree,
                neighbours=self.neighbours, beam=self.beam)
            own = graph.links
            links[row, head, at] = np.where(own >= 0, at[own], -1)
            entry[row, head] = at[graph.entry]
        return links, entry

    def _host_read(self, q, k, v, pos, links, entry):
        """o [B,1,H,V] and lse [B,H,1] of the far keys that q [B,1,H,D] finds; -inf
        where there are none. On the host."""
        q, k, v, pos, links, entry = (
            np.asarray(a) for a in (q, k, v, pos, links, entry))
        b, _, h, d = q.shape
        heads = k.shape[2]
        scale = d**-0.5 if self.scale is None else self.scale
        o = np.zeros((b, 1, h, v.shape[3]), np.float32)
        lse = np.full((b, h, 1), -np.inf, np.float32)
        for row, head in np.ndindex(b, h):
            own = head // (h // heads)
            asked = q[row, 0, head].astype(np.float32)
            at = self._looked_up(
                asked, k[row, :, own], pos[row], links[row, own], entry[row, own])
            if not len(at):
                continue
            # [n,D] [D], of the n keys that were found; then [n] [n,V]
            s = scale * (k[row, at, own].astype(np.float32) @ asked)
            top = s.max()
            e = np.exp(s - top)
            o[row, 0, head] = e @ v[row, at, own].astype(np.float32) / e.sum()
            lse[row, head] = top + np.log(e.sum())
        return o, lse

    def _looked_up(self, q, k, pos, links, entry) -> np.ndarray:
        """The slots of the far keys k [C,D] that q [D] finds, in order."""
        far = np.nonzero((pos >= 0) & (entry >= 0))[0]
        if len(far) <= self.top_k:
            return far  # everything fits
        if self.index == "flat":
            # [n,D] [D]
            best = np.argsort(-(k[far].astype(np.float32) @ q), kind="stable")
            return np.sort(far[best[:self.top_k]])
        found, _ = graph_index.search(
            Graph(links, int(entry)), k.astype(np.float32), q, self.top_k, self.beam)
        return np.sort(np.array(found, int))


def _all(state: RetrievalState) -> Cache:
    """What is near and what is far, as one cache."""
    ended = state.entry[:, :1, None] < 0
    far = state.far._replace(pos=jnp.where(ended, -1, state.far.pos))
    k, v, pos = (jnp.concatenate(pair, 1) for pair in zip(state.near[:3], far[:3]))
    return Cache(k, v, pos, *state.near[3:])


def like(a: jax.Array) -> jax.ShapeDtypeStruct:
    """Its shape and type."""
    return jax.ShapeDtypeStruct(a.shape, a.dtype)
