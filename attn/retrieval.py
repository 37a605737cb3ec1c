"""RetrievalAttention (Liu et al., 2024) arXiv:2409.10516: far keys are looked up.

Of a long prompt a token needs few keys, but other ones each time. So the first `sinks`
keys and the last `recent` ones stay on the device and are attended to exactly; all
others lie in the host's memory, under an index that is made for the prompt's queries,
and each query head looks up the `top_k` that fit it best. The host attends to what it
finds, next to the data, and hands over an output and a log-sum-exp a head, which are
merged with the device's: what is looked up and what stays are different keys.

    lse = logaddexp(lse_W, lse_R),  o = e^(lse_W - lse) o_W + e^(lse_R - lse) o_R

Keys that are neither near nor found have weight 0. Prompts are read exactly; nothing is
learned. What is near does not wait for the host.

A state is plain arrays, which on an accelerator lie in its own memory: far keys too,
and each token sends all of them to the host. With `host=HostKeys()` they leave it once,
when the prompt has been read, and a state has their number alone. A token's search is
then begun before what is near is attended to, and waited for behind it, whatever a
compiler makes of the program.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import io_callback

from attn.cache import host_search, kv as caches, reading
from attn.cache.host_keys import HostKeys
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
    for a flat index. An entry of -1: far keys are of a sequence that has ended. Of host
    keys k and v are [B,C,K,0], W is 0 and entry the row's number, 0 before a prompt."""

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
    callback to the host. host: where far keys are then kept; one for all layers of a
    model, None for arrays of the state. Neither score, softcap nor a mask but
    `Causal()`.
    """

    sinks: int = 128
    recent: int = 512
    top_k: int = 100
    index: str = "graph"
    neighbours: int = 100
    degree: int = 35
    beam: int = 500
    queries: int = 1024
    host: HostKeys | None = None
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
        if self.host is not None and self.axis is not None:
            raise ValueError(
                f"Retrieval: axis={self.axis!r} with host keys: expected one of them")
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
        far = caches.empty(k, v, size)
        if self.host is not None:
            width, far = 0, _gone(far)
        return RetrievalState(
            caches.empty(k, v, near), far,
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
            both, segment = caches.concat(self._all(state), k, v, now)
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
        near = put(state.near, jnp.where(  # the last ones behind the first
            first, pos, jnp.where(pos >= cut, self.sinks + pos - cut, -1)))
        slots = state.far.k.shape[1]
        whole = caches.empty(*state.near[:2], slots)
        # what is near is under no index, or it would count twice
        far = put(whole, jnp.where(first | (pos >= cut), -1, pos))
        (b, t, h, d), heads = q.shape, held.k.shape[2]
        width = 3 * self.degree if self.index == "graph" else 0
        links = jnp.full((b, heads, slots, width), -1, jnp.int32)
        entry = jnp.zeros_like(state.entry)
        if self.index == "graph":
            some = np.unique(np.linspace(0, t - 1, min(t, self.queries)).astype(int))
            # [B,N,K,G,D]: the queries of all heads of a group ask its graph
            asked = q[:, some].reshape(b, len(some), heads, h // heads, d)
            links, entry = jax.pure_callback(
                self._on_host(host_search.build), (like(links), like(entry)), asked,
                far.k, far.pos[..., 0], now.segment[:, some] == now.segment.max(
                    1, keepdims=True), vmap_method="sequential")
        if self.host is not None:
            entry = io_callback(
                functools.partial(host_search.put, self.host), like(entry), far.k,
                far.v, far.pos[..., 0], links, entry)
            far, links = _gone(far), links[..., :0]
        return RetrievalState(near, far, links, entry)

    def _token(self, state: RetrievalState, q, k, v, now: TokenPositions, sink):
        """One token: near keys on the device, far ones on the host."""
        # of a sequence that has ended nothing is looked up
        entry = jnp.where(now.segment > 1, -1, state.entry)
        (b, _, h, _), far = q.shape, state.far
        # o and lse are all that comes back: the host attends next to its keys
        answer = (jax.ShapeDtypeStruct((b, 1, h, v.shape[3]), jnp.float32),
                  jax.ShapeDtypeStruct((b, h, 1), jnp.float32))
        if self.host is None:
            found = jax.pure_callback(
                self._on_host(host_search.read), answer, q, far.k, far.v,
                far.pos[..., 0], state.links, entry, vmap_method="sequential")
        else:
            begin = self._on_host(host_search.begin, self.host, v.shape[3])
            ticket = io_callback(
                begin, jax.ShapeDtypeStruct((), jnp.int32), q, entry)
        near, used = caches.append_next(state.near, k, v, now)
        caches.check_room(used, near.k.shape[1])
        newest = jnp.broadcast_to(now.segment, near.k.shape[:2])
        cache, wide = caches.of_one_type(near, q)
        if self.host is not None:
            # near keys are read once the search has begun
            wide, ticket = jax.lax.optimization_barrier((wide, ticket))
        own = reading.read(cache, newest, wide, now, self._spec(), split_lse=True,
                           implementation=self.implementation)
        if self.host is not None:
            # which is waited for once they have been read
            ticket, own = jax.lax.optimization_barrier((ticket, own))
            found = io_callback(self.host.end, answer, ticket)
        # near keys of the device and far ones of the host, in one softmax
        both = join(state_of(*own), state_of(*found))
        if sink is not None:
            both = join(both, without_value(sink, both))
        real = (now.segment > 0)[..., None, None]
        o = caches.poison(output(both), used, near.k.shape[1])
        return RetrievalState(near, far, state.links, entry), jnp.where(real, o, 0.0)

    def _all(self, state: RetrievalState) -> Cache:
        """What is near and what is far, as one cache."""
        far = state.far
        if self.host is not None:
            kinds = tuple(
                jax.ShapeDtypeStruct((*far.k.shape[:3], a.shape[3]), a.dtype)
                for a in state.near[:2])
            get = functools.partial(host_search.get, self.host, kinds)
            far_k, far_v = io_callback(get, kinds, state.entry)
            far = far._replace(k=far_k, v=far_v)
        ended = state.entry[:, :1, None] < 0
        far = far._replace(pos=jnp.where(ended, -1, far.pos))
        k, v, pos = (jnp.concatenate(pair, 1) for pair in zip(state.near[:3], far[:3]))
        return Cache(k, v, pos, *state.near[3:])

    def _on_host(self, f, *more):
        """f of `host_search`, as it is set here."""
        how = host_search.Search(self.index, self.top_k, self.degree, self.neighbours,
                                 self.beam, self.scale)
        return functools.partial(f, how, *more)


def _gone(far: Cache) -> Cache:
    """Where far keys stand, without them."""
    return far._replace(k=far.k[..., :0], v=far.v[..., :0])


def like(a: jax.Array) -> jax.ShapeDtypeStruct:
    """Its shape and type."""
    return jax.ShapeDtypeStruct(a.shape, a.dtype)
