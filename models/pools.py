"""Pools: attention and its cache on devices of their own, beside those of the model.

Lamina (Chen et al., 2024, arXiv:2405.01814). A network is cut at its attention
(`models/slices.py`), its slices run on the devices of the model, and each attention on
devices that hold the cache, split by key heads. A query is sent as soon as it is made:
attention to what was there before begins while key and value are still computed, and
is merged with the new token's by their log-sum-exp. Two batches may take turns, so that
one is attended to while the other is computed.

    pools = Pools(model, params, devices[:4], devices[4:])
    state, logits = pools.read(tokens)                 # a prompt, on the first ones
    state, logits = pools.step(state, token)           # one token, on both

The host of an accelerator can be the second pool, `Pools(model, params, devices,
jax.devices("cpu"))`, which was not run on one; a cache in pinned host memory inside one
program is not there, as memory spaces are part of types: every constant of an attention
would have to say its own, and `compute_on` is called otherwise from one release of jax
to the next (0.10.2, 0.11.2). On a CPU, where pools are devices of one
machine, the split is right and what moves is counted; that says nothing of time. Rows
go on together, without padding, and every batch size has a graph of its own; exact
attention without sinks is split, what is not that, or has a memory beside its layers,
is refused. Parameters lie whole on every device of the model.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Generator, NamedTuple, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

from attn.cache import kv as caches, reading
from attn.cache.rolling_slots import rolling_slots
from attn.contract.segments import locate
from attn.exact.attend import Where, attend
from attn.exact.online import join, output, state_of
from attn.softmax import Softmax
from models.slices import OPERATOR, Graph


class Pools:
    """A model of exact attention on two sets of devices; sent: the bytes that have gone
    between them in steps. overlap: queries are sent before keys and values are made."""

    def __init__(self, model: Any, params: Any, own: Sequence, others: Sequence, *,
                 overlap: bool = True):
        _check(model, own, others)
        self.model, self.overlap, self.sent = model, overlap, 0
        self.home = NamedSharding(Mesh(np.array(own), ("model",)), P())
        self.far = Mesh(np.array(others), ("heads",))
        self.params = jax.device_put(params, self.home)
        self.traced: dict[Any, _Traced] = {}  # by batch size and type of tokens

    def read(self, tokens: jax.Array, room: int = 1) -> tuple[Any, jax.Array]:
        """A prompt tokens [B,T] and room for so many behind it -> state, logits. It is
        read by the model's devices, and its cache then sent."""
        state = self.model.init_state(tokens.shape[1] + room, tokens)
        tokens, state = jax.device_put((tokens, state), self.home)
        state, logits = jax.jit(self.model.apply)(self.params, tokens, state)
        return jax.tree.map(self._sent, state), logits

    def step(self, state: Any, token: jax.Array) -> tuple[Any, jax.Array]:
        """One token [B,1] of each row -> state, logits [B,1,vocab]."""
        (found,) = self.in_turns([(state, token)])
        return found

    def in_turns(self, batches: Sequence[tuple[Any, jax.Array]]) -> list:
        """[(state, logits)] of several batches (state, token), which take turns: while
        one is attended to, the next one is computed."""
        going = {n: self._going(*batch) for n, batch in enumerate(batches)}
        found: dict[int, Any] = {}
        while going:
            for n in list(going):
                try:
                    next(going[n])
                except StopIteration as end:
                    found[n] = end.value
                    del going[n]
        return [found[n] for n in range(len(batches))]

    def _going(self, state: Any, token: jax.Array) -> Generator[None, None, tuple]:
        """The step of one batch, which pauses when its attention has been sent."""
        rows = len(state[0].end)
        if token.shape != (rows, 1):
            raise ValueError(f"token has shape {tuple(token.shape)}: expected "
                             f"[B,1]={(rows, 1)}, one of each row of the state")
        own = self._trace(token)
        end = jax.device_put(state[0].end, self.home)
        given, after = [jax.device_put(token, self.home), end], []
        for n, attention in enumerate(self.model.attention):
            q, *handed = own.programs[n][0](own.leaves, given)
            far_q = self._moved(q, self._heads)
            parts = own.attentions[n]
            if self.overlap:  # it begins before key and value are there
                before = parts["before"](state[n], far_q)
            k, v, *context = own.programs[n][1](own.leaves, [*given, q, *handed])
            far_k, far_v = (self._moved(a, self._heads) for a in (k, v))
            if not self.overlap:
                before = parts["before"](state[n], far_q)
            held, o = parts["after"](state[n], before, far_q, far_k, far_v)
            after.append(held)
            given = [self._moved(o, self.home), *context]
            yield
        (logits,) = own.programs[-1][1](own.leaves, given)
        return tuple(after), logits

    def _moved(self, a: jax.Array, where: Any) -> jax.Array:
        self.sent += a.nbytes
        return jax.device_put(a, where)

    @property
    def _heads(self) -> NamedSharding:
        return NamedSharding(self.far, P(None, None, "heads"))

    def _sent(self, a: jax.Array) -> jax.Array:
        """An array of a cache: what has key heads is split by them."""
        split = a.ndim > 2 and a.shape[2] > 1
        return jax.device_put(a, self._heads if split else NamedSharding(self.far, P()))

    def _trace(self, token: jax.Array) -> _Traced:
        """The slices, once for each batch size: shapes are theirs."""
        key = len(token), jnp.dtype(token.dtype)
        if key in self.traced:
            return self.traced[key]
        marked = self.model.clone(attention=tuple(
            _Marked(a) for a in self.model.attention))
        state = tuple(_Clock(jnp.zeros((len(token),), jnp.int32),
                             jnp.full((len(token),), 1, jnp.int32))
                      for _ in self.model.attention)

        def f(params, token, end):
            own = tuple(_Clock(end, one.segment) for one in state)
            return marked.apply(params, token, own)[1]

        leaves = jax.tree.leaves(self.params)
        graph = Graph(f, self.params, token, state[0].end, free=len(leaves))
        programs = [[graph.compiled(n, part) for part in (0, 1)]
                    for n in range(len(graph.slices))]
        made = {a: {"before": jax.jit(_Attention(a).before),
                    "after": jax.jit(_Attention(a).after)}
                for a in self.model.attention}
        self.traced[key] = _Traced(
            graph, [*jax.device_put(graph.consts, self.home), *leaves], programs,
            [made[a] for a in self.model.attention])
        return self.traced[key]


class _Traced(NamedTuple):
    """The slices of a step, what they are given beside arrays, and their programs."""

    graph: Graph
    leaves: list
    programs: list
    attentions: list


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Clock:
    """Of a state where its next token stands [B]: the keys are elsewhere."""

    end: jax.Array
    segment: jax.Array


@dataclasses.dataclass(frozen=True)
class _Marked:
    """An attention as one call with a name, of which the slices know the shape."""

    inner: Softmax

    def __call__(self, q, k, v, *, x=None, segments=None):
        """All tokens at once."""
        return self.inner(q, k, v, segments=segments)

    def init_state(self, size, q, k, v, *, x=None):
        """Where the first token stands."""
        return _Clock(*(jnp.zeros((q.shape[0],), jnp.int32),) * 2)

    def step(self, state, q, k, v, *, x=None, segments=None):
        """One token of each row."""
        def attention_operator(q, k, v):
            width = q.shape[2] // k.shape[2]
            return jnp.repeat(v, width, 2) + 0 * q.sum(3, keepdims=True)

        assert attention_operator.__name__ == OPERATOR
        return state, jax.jit(attention_operator)(q, k, v)


@dataclasses.dataclass(frozen=True)
class _Attention:
    """What the devices of a cache compute for one token of each row."""

    inner: Softmax

    def before(self, state: caches.Cache, q):
        """What q [B,1,H,D] finds among the keys that were there: the online softmax
        state [B,1,H]."""
        now = locate(None, q.shape[0], q.shape[1], state.end, state.segment)
        segment = jnp.broadcast_to(now.segment, state.k.shape[:2])
        cache, wide = caches.of_one_type(state, q)
        return state_of(*reading.read(
            cache, segment, wide, now, self.inner._spec(), split_lse=True,
            implementation=self.inner.implementation))

    def after(self, state: caches.Cache, before, q, k, v):
        """The cache with the new token, and o [B,1,H,V] of both."""
        now = locate(None, q.shape[0], q.shape[1], state.end, state.segment)
        where = Where(now.pos, now.pos, now.segment, now.segment)
        own = state_of(*attend(q, k, v, self.inner._spec(), where, split_lse=True,
                               implementation="xla"))
        slots = state.k.shape[1]
        ring = rolling_slots(self.inner.visible, slots)
        held = caches.append(state, k, v, now, ring.slot(now))
        o = output(join(before, own)).astype(v.dtype)
        return held, o if ring.endless else caches.poison(o, now.next_pos, slots)


def _check(model: Any, own: Sequence, others: Sequence) -> None:
    """ValueError for pools that meet or do not divide the heads; NotImplementedError
    for what cannot be split."""
    if not own or not others or {*own} & {*others}:
        raise ValueError(f"pools of {len(own)} and {len(others)} devices: expected one "
                         "or more each, none in both")
    keys = model.kv_heads or model.heads
    if keys % len(others):
        raise ValueError(f"{keys} key heads over {len(others)} devices: expected a "
                         "number that divides them")
    if model.memory is not None:
        raise NotImplementedError(
            f"memory={type(model.memory).__name__}: a step is cut at attention alone, "
            "expected a model without one")
    for a in model.attention:
        if type(a) is not Softmax or a.axis is not None or model.sinks:
            raise NotImplementedError(
                f"{type(a).__name__}: what is sent is split for exact attention "
                "without sinks and mesh axis, expected Softmax()")
