"""Positional Attention (Back De Luca et al., 2024) arXiv:2410.01686: who reads whom
is decided by positions alone, and values carry the data.

An algorithm such as a sum over prefixes reads the same places whatever stands there. So
the weights are made of positional encodings P, which all layers and samples share, and
not of the tokens: a matrix a head that does not depend on the input, and is as right
for numbers ten times as large as those of the training.

    A_h = softmax(d^-0.5 (P W_Q^h + b)(P W_K^h + b')^T),    o_h = A_h v_h

W_Q^h and W_K^h [d,d] have the whole width d of P in each head. P is one-hot by default.
"""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from attn.cache import kv as caches
from attn.contract.angles import sinusoids
from attn.contract.attention import EXACT, Attention, TemplateRow
from attn.contract.fields import check_fields
from attn.contract.segments import locate
from attn.contract.shapes import check
from attn.exact.attend import attend
from attn.masks import Causal, Full, Mask
from attn.parallel.sharding import Axis, gather, over_mesh
from attn.softmax import Softmax
from pallas_kernels.logits import LogitSpec, Where

ONE_HOT, SINUSOID, LEARNED = "onehot", "sinusoid", "learned"


class Positional(nn.Module, Attention):
    """Positional Attention (Back De Luca et al., 2024) arXiv:2410.01686: weights of
    positions only.

    The q and k of a call give only shapes, and `MultiHead` makes no projections for
    them: `query`, `key` [d,H,d] and their biases [H,d] are of the encodings. length:
    the most tokens of a sequence. scratch: so many last tokens of a call stand at the
    last positions, however long it is: working space, not data. encoding: P, one-hot
    ("onehot", d = length), or of `width` d: "sinusoid" or "learned" (`positions`
    [length,d], deviation 1). causal: with a triangular mask, and then with a stream.

    Without segments A is made once for the whole batch, whose values lie side by side
    in one product [T,S] x [S,B V]. The causal form and its stream, the encodings other
    than one-hot and packed rows (positions count from the beginning of a sequence) are
    proposed here.
    """

    length: int = 512
    scratch: int = 0
    encoding: str = ONE_HOT
    width: int | None = None
    causal: bool = False
    scale: float | None = None
    axis: Axis | None = None
    implementation: str | None = None
    needs_query = False
    needs_key = False
    row = TemplateRow(EXACT, "L^2 (D + d / B)", 2)
    parameter_axes = {"query": "DHD", "key": "DHD", "query_bias": "HD",
                      "key_bias": "HD", "positions": "TD"}

    def __post_init__(self):
        check_fields(
            self, least={"length": 1, "scratch": 0, "width": 1},
            choices={"encoding": (ONE_HOT, SINUSOID, LEARNED)})
        one_hot = self.encoding == ONE_HOT
        if one_hot == (self.width is not None):
            raise ValueError(
                f"Positional: encoding={self.encoding!r}, width={self.width}: expected "
                "a width for 'sinusoid' and 'learned', and none for 'onehot'")
        if self.scratch and self.causal:
            raise ValueError(
                f"Positional: scratch={self.scratch}, causal=True: expected scratch=0, "
                "as no token could read the last ones")
        super().__post_init__()

    @property
    def visible(self) -> Mask:
        """The mask."""
        return Causal() if self.causal else Full()

    def __call__(self, q, k, v, *, x=None, segments=None):
        """All tokens at once. q [B,T,H,D] and k [B,S,K,D] (their shapes), v [B,S,K,V]
        -> [B,T,H,V]."""
        check(q, k, v, segments=segments, aligned=self.causal)
        heads, queries, keys = q.shape[2], q.shape[1], k.shape[1]
        tables = self._tables(heads, v.dtype)
        v = jnp.repeat(v, heads // v.shape[2], 2)
        if segments is not None:
            return self._packed(tables, v, queries, segments)
        # [length,H,d] -> [1,n,H,d]: of all rows of the batch
        q, k = (table[self._places(n)][None]
                for table, n in zip(tables, (queries, keys)))
        letters = ".THD .SHD BSHV .T .S -> BTHV"
        at = (jnp.arange(n, dtype=jnp.int32)[None] for n in (queries, keys))
        return over_mesh(self._local, letters, self.axis)(q, k, v, *at)

    def _local(self, q, k, v, q_pos, kv_pos) -> jax.Array:
        """q [1,T,H,d], k [1,S,H,d], v [B,S,H,V] -> [B,T,H,V]: one A for all rows."""
        k, v, kv_pos = (gather(a, self.axis) for a in (k, v, kv_pos))
        b, s, h, width = v.shape
        # one A [T,S] a head, whatever the batch: values of all rows side by side
        where = Where() if self.axis is None else Where(q_pos, kv_pos)
        # [B,S,H,V] -> [1,S,H,B V]
        side_by_side = v.transpose(1, 2, 0, 3).reshape(1, s, h, b * width)
        o = attend(q, k, side_by_side, LogitSpec(self.visible, self.scale), where,
                   implementation=self.implementation)[0]
        # [1,T,H,B V] -> [B,T,H,V]
        return o.reshape(-1, h, b, width).transpose(2, 0, 1, 3)

    def _packed(self, tables, v, queries: int, segments) -> jax.Array:
        """Rows whose sequences begin anywhere: A is of each row."""
        if self.scratch:
            raise NotImplementedError(
                f"segments with scratch={self.scratch}: only a row has last tokens, "
                "expected scratch=0")
        pair = segments if isinstance(segments, tuple) else (segments,) * 2
        b, lengths = v.shape[0], (queries, v.shape[1])
        # [length,H,d] at [B,T] and at [B,S]
        q, k = (self._at(table, locate(a.astype(jnp.int32), b, n).pos)
                for table, a, n in zip(tables, pair, lengths))
        return self._exact(q, k, v, segments=segments)

    def init_state(self, size, q, k, v, *, x=None):
        """An empty memory for `size` tokens, but no more than `length`: a `Cache`
        without keys; q, k, v give shapes."""
        self.check_stream()
        caches.check_size(size)
        # a key is its position, which a cache has anyway
        return caches.empty(k_like(v), v, min(size, self.length))

    def step(self, state, q, k, v, *, x=None, segments=None):
        """The next T tokens -> state, [B,T,H,V]."""
        self.check_stream()
        check(q, k, v, segments=segments, aligned=True, piece=True)
        caches.check_fits(state, k_like(v), v)
        (b, t), slots = q.shape[:2], state.k.shape[1]
        now = locate(segments, b, t, state.end, state.segment)
        caches.check_room(now.next_pos, slots)
        query, key = self._tables(q.shape[2], v.dtype)
        none = jnp.zeros(k_like(v).shape, v.dtype)
        after = caches.append(state, none, v, now, now.pos)
        both, segment = caches.concat(state, none, v, now)
        pos = both.pos[..., 0]
        k = self._at(key, jnp.maximum(pos, 0))  # [B,C+T,H,d]
        held = both.v.astype(v.dtype)
        held = jnp.repeat(held, q.shape[2] // held.shape[2], 2)  # [B,C+T,H,V]
        where = Where(now.pos, pos, now.segment, segment)
        # None is d^-0.5 of the encodings' width, not of the values'
        spec = LogitSpec(self.visible, self.scale)
        o = attend(self._at(query, now.pos), k, held, spec, where,
                   implementation=self.implementation)[0]
        return after, caches.poison(o, now.next_pos, slots)

    def _exact(self, q, k, v, **options) -> jax.Array:
        exact = Softmax(self.visible, self.scale, axis=self.axis,
                        implementation=self.implementation)
        return exact(q, k, v, **options)

    def _places(self, n: int) -> np.ndarray:
        """The positions of a call's n tokens."""
        self._check_length(n)
        places = np.arange(n)
        # the first n rows of P, and its last ones for scratch tokens
        last = max(n - self.scratch, 0)
        return np.where(places < last, places, places + self.length - n)

    def _check_length(self, n: int) -> None:
        if n > self.length:
            raise ValueError(f"{n} tokens: expected at most length={self.length}")

    @staticmethod
    def _at(table, pos) -> jax.Array:
        """Rows [B,T,H,d] of a table [length,H,d]; NaN beyond its end."""
        # [length,H,d] at [B,T] -> [B,T,H,d]
        return table.at[pos].get(mode="fill", fill_value=jnp.nan)

    @nn.compact
    def _tables(self, heads: int, dtype) -> tuple[jax.Array, jax.Array]:
        """P W_Q + b and P W_K + b', [length,H,d] each."""
        d = self.length if self.width is None else self.width
        p = self._encodings(d)
        # Xavier's bound, of q and k of all heads as one matrix [d,2 H d]
        bound = (6 / (d + 2 * heads * d)) ** 0.5
        init = functools.partial(_uniform, bound)
        found = []
        for name in ("query", "key"):
            w = self.param(name, init, (d, heads, d), jnp.float32)
            bias = self.param(
                f"{name}_bias", nn.initializers.zeros_init(), (heads, d), jnp.float32)
            # a one-hot P takes the rows of W: [length,d] x [d,H,d] -> [length,H,d]
            table = w if p is None else jnp.einsum("td,dhe->the", p, w)
            found.append((table + bias[None]).astype(dtype))
        return found[0], found[1]

    def _encodings(self, d: int) -> Any:
        """P [length,d]; None for the identity."""
        if self.encoding == ONE_HOT:
            return None
        if self.encoding == LEARNED:
            init = nn.initializers.normal(1.0)
            return self.param("positions", init, (self.length, d), jnp.float32)
        return sinusoids(jnp.arange(self.length), d, interleaved=True)


def k_like(v: Any) -> jax.ShapeDtypeStruct:
    """The shape of keys that are not kept: like v, one channel wide."""
    return jax.ShapeDtypeStruct((*v.shape[:3], 1), v.dtype)


def _uniform(bound: float, key, shape, dtype) -> jax.Array:
    return jax.random.uniform(key, shape, dtype, -bound, bound)
