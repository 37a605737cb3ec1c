"""NSA (Yuan et al., 2025) arXiv:2502.11089: compressed tokens, chosen and near ones.

In Native Sparse Attention a token reads the past three times. Coarsely: every `stride`
tokens a block of `compress` of them, made into one key and one value by a learned
network. Finely: the `top_k` blocks of `block` tokens that the coarse weights point at,
one choice for all heads that share keys. And what is near, in a window. Gates of the
token add them up.

    o_t = sum_c g_t^c Attn(q_t, K_t^c, V_t^c),   c = compressed, selected, window
    K^cmp_i = phi(k_(i d), ..., k_(i d + l - 1)),   g_t = sigmoid(W x_t + b)
    p^slc_j = sum_(h in group) sum_(m < l'/d) sum_(n < l/d) p^cmp_h[j l'/d + m - n]

All is trained from the beginning, but the choice, which has no gradient.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from attn.cache import kv as caches, reading
from attn.cache.compressed import completed
from attn.cache.few import at_slots, of_blocks
from attn.cache.kv import Cache
from attn.cache.on_grid import Piece, piece
from attn.contract.attention import MASKED, Attention, TemplateRow
from attn.contract.fields import check_fields
from attn.contract.segments import TokenPositions, locate
from attn.contract.shapes import check
from attn.masks import Causal, Window
from attn.parallel.query_blocks import over_rows
from attn.parallel.sharding import Axis, check_groups
from attn.softmax import Softmax
from attn.sparse import compressed_blocks
from attn.sparse.block_grid import Grid, grid
from attn.sparse.compressed_blocks import Choice, Compressed
from pallas_kernels.logits import LogitSpec

BRANCHES = ("compressed", "selected", "window")


@caches.of_cache
class NSAState(NamedTuple):
    """A cache of all tokens, and the compressed keys [B,N,K,D] and values [B,N,K,V],
    float32, of the blocks that are complete."""

    cache: Cache
    keys: jax.Array
    values: jax.Array


class NSA(nn.Module, Attention):
    """Native Sparse Attention (Yuan et al., 2025) arXiv:2502.11089: three readings of
    the past, added up by gates.

    compress l, stride d, block l', top_k n, window w: the paper's. Among the top_k are
    the `first` blocks and the `local` last ones in any case. gated: with gates of the
    tokens x, three a head; without, the readings are summed. branches: which there are.

    phi is one for each key head, for keys and for values: positions inside of the block
    (`key_position` [K,l,D]) are added, then l D -> hidden -> D around a gelu (hidden:
    by default D, and V). The paper says a learned network with such positions and no
    more; its form, and that keys are compressed as they come, turned by a layer's
    rotation, are choices here. So is that the three readings share keys and values, as
    in the public implementations; the paper has projections of its own for each.

    As proposed here, not published: packed sequences, each on blocks of its own; over
    an `axis`, query blocks are split and keys are whole on every device.
    """

    compress: int = 32
    stride: int = 16
    block: int = 64
    top_k: int = 16
    window: int = 512
    first: int = 1
    local: int = 2
    hidden: int | None = None
    gated: bool = True
    branches: tuple[str, ...] = BRANCHES
    scale: float | None = None
    axis: Axis | None = None
    implementation: str | None = None
    row = TemplateRow(MASKED, "L^2 D / d + (n l' + w) L D", 2)
    weightless = "its compressed values are not linear in v"
    parameter_axes = {
        "branch_gate/kernel": "EHR", "branch_gate/bias": "HR", "*_position": "HTD",
        "key_in": "HDR", "key_out": "HRD", "value_in": "HDR", "value_out": "HRD",
    }

    def __post_init__(self):
        check_fields(self, least={
            "compress": 1, "stride": 1, "block": 1, "top_k": 1, "window": 1, "first": 0,
            "local": 1, "hidden": 1})
        for name in ("compress", "block"):
            if getattr(self, name) % self.stride:
                raise ValueError(f"NSA: {name}={getattr(self, name)}: expected a "
                                 f"multiple of stride={self.stride}")
        if self.top_k < (sure := self.first + self.local):
            raise ValueError(
                f"NSA: top_k={self.top_k}: expected first + local = {sure} or more")
        names = tuple(n for n in BRANCHES if n in self.branches)
        if not names or names != self.branches:
            raise ValueError(f"NSA: branches={self.branches!r}: expected some of "
                             f"{BRANCHES}, in order")
        super().__post_init__()

    @property
    def near(self) -> Softmax:
        """What reads the window."""
        return Softmax(mask=Causal() & Window(self.window - 1), scale=self.scale,
                       axis=self.axis, implementation=self.implementation)

    def __call__(self, q, k, v, *, x=None, segments=None):
        """All tokens at once, with x [B,T,E]; q [B,T,H,D], k, v [B,T,K,.] -> [B,T,H,V].
        """
        check(q, k, v, segments=segments, aligned=True)
        gates, phi = self._parameters(q, k, v, x)
        now = locate(segments, *q.shape[:2])
        packed = segments is not None
        if not packed:  # one row stands for all
            now = TokenPositions(*(a[:1] for a in now))
        found = {}
        if self._far:
            on = grid(now.pos, now.segment, self.block, packed=packed)
            found = self._read(phi, q, k, v, on, on, aligned=True)
        if "window" in self.branches:
            found["window"] = self.near(q, k, v, segments=segments)
        return self._sum(gates, found, v)

    @property
    def _far(self) -> bool:
        return self.branches != BRANCHES[2:]

    def _sum(self, gates, found: dict[str, jax.Array], v) -> jax.Array:
        """Equation 5: gates [B,T,H,c] times the readings [B,T,H,V], which may lie on a
        mesh in different ways."""
        parts = [found[name].astype(jnp.float32) for name in self.branches]
        if gates is not None:
            parts = [gates[..., c, None] * o for c, o in enumerate(parts)]  # g_c o_c
        return functools.reduce(jnp.add, parts).astype(v.dtype)

    @nn.compact
    def _parameters(self, q, k, v, x) -> tuple[Any, tuple]:
        """The gates [B,T,H,c] of tokens, or None, and phi of keys and of values."""
        gates = None
        if self.gated:
            if x is None:
                raise ValueError("x is None: NSA makes gates of the tokens [B,T,E]")
            dense = nn.DenseGeneral(  # [B,T,E] [E,H,c]
                (q.shape[2], len(self.branches)), name="branch_gate")
            gates = jax.nn.sigmoid(dense(x.astype(jnp.float32)))
        make = functools.partial(
            compressed_blocks.compressor, self.param, self.compress, self.hidden)
        of_k = make("key", k) if self._far else None
        of_v = make("value", v) if "compressed" in self.branches else None
        return gates, (of_k, of_v)

    def _choice(self, d: int) -> Choice:
        scale = d**-0.5 if self.scale is None else self.scale
        return Choice(self.block, self.top_k, self.block // self.stride,
                      self.compress // self.stride, self.first, self.local, scale)

    def _read(self, phi, q, k, v, rows: Grid, columns: Grid, aligned: bool):
        """The far readings, by name, of tokens on `rows` of those on `columns`."""
        check_groups(k.shape[2], self.axis)
        first, own = columns.blocks_of(rows)
        keys, vals = columns.put(k), columns.put(v)  # [B,N I,K,.]
        pos, segment = (
            a.reshape(a.shape[0], -1) for a in (columns.pos, columns.segment))
        found = compressed_blocks.compressed(
            phi, keys, vals, pos, segment, self.compress, self.stride)
        local = functools.partial(
            compressed_blocks.readings, choice=self._choice(q.shape[3]),
            fine="selected" in self.branches, aligned=aligned, scale=self.scale,
            implementation=self.implementation)
        told = rows.pos, rows.segment, first, own
        o = over_rows(local, self.axis, rows.put(q), told, None, keys, vals,
                      (found, pos, segment))
        o = columns.poison(rows.poison(rows.take(o, q.shape[1])))  # [B,T,H,c V]
        names = [name for name in self.branches if name != "window"]
        return dict(zip(names, jnp.split(o, len(names), -1)))

    def init_state(self, size, q, k, v, *, x=None):
        """An empty memory for `size` tokens: keys, values, and compressed ones."""
        caches.check_size(size)
        blocks = -(-size // self.block) * (self.block // self.stride)  # one a stride
        keys, values = (  # [B,N,K,D], [B,N,K,V]
            jnp.zeros((a.shape[0], blocks, *a.shape[2:]), jnp.float32) for a in (k, v))
        return NSAState(caches.empty(k, v, size), keys, values)

    def step(self, state, q, k, v, *, x=None, segments=None):
        """The next T tokens -> state, [B,T,H,V]. Past the size: ValueError or NaN."""
        check(q, k, v, segments=segments, aligned=True, piece=True)
        gates, phi = self._parameters(q, k, v, x)
        cache = state.cache
        caches.check_fits(cache, k, v)
        (b, t), slots = q.shape[:2], cache.k.shape[1]
        now = locate(segments, b, t, cache.end, cache.segment)
        caches.check_room(now.next_pos, slots)
        had = jnp.where((now.segment > 1).any(1), 0, cache.end)
        held = caches.append(cache, k, v, now, now.pos)
        after = NSAState(held, *completed(
            state[1:], phi, held, had, now, self.stride, self.compress))
        if t == 1:
            found = self._decode(after, q, now)
        else:
            on = piece(
                cache, held, q, k, v, now, self.block, packed=segments is not None)
            found = self._piece(phi, on, now)
        o = self._sum(gates, found, v)
        return after, caches.poison(o, now.next_pos, slots)

    def _piece(self, phi, on: Piece, now: TokenPositions) -> dict:
        """What several tokens read of a cache."""
        found = {}
        if self._far:
            found = self._read(phi, on.q, on.held.k, on.held.v, on.rows, on.columns,
                               aligned=False)
        if "window" in self.branches:
            found["window"] = self.near.read(on.held, on.segment, on.q, now)
        return found

    def _decode(self, state: NSAState, q, now: TokenPositions) -> dict:
        """What one token q [B,1,H,D] reads of the memory that holds it."""
        pos, d, heads = now.pos, q.shape[3], state.keys.shape[2]
        found, slots = {}, {}
        if self._far:
            last = jnp.arange(state.keys.shape[1], dtype=jnp.int32)[None] * self.stride
            last = last + (self.compress - 1)  # of block i the last token
            there = jnp.ones_like(last)  # the cache holds one sequence
            values = state.values if "compressed" in self.branches else None
            o, chosen = compressed_blocks.read(  # [B,1,H,V], [B,K,1,n]
                q, pos, jnp.ones_like(pos), jnp.zeros_like(pos), pos // self.block,
                Compressed(state.keys, values, last, there), self._choice(d))
            found["compressed"] = o
            slots["selected"] = of_blocks(chosen[:, :, 0], self.block, pos[:, 0])
        back = jnp.arange(self.window, dtype=jnp.int32)[None, :, None]
        slots["window"] = jnp.broadcast_to(  # [B,w,K]
            jnp.maximum(pos[..., None] - back, -1), (len(pos), self.window, heads))
        for name in [n for n in self.branches if n != "compressed"]:
            few, wide = caches.of_one_type(at_slots(state.cache, slots[name]), q)
            segment = jnp.broadcast_to(now.segment, few.k.shape[:2])
            found[name] = reading.read(
                few, segment, wide, now, LogitSpec(Causal(), self.scale),
                implementation=self.implementation)[0]
        return found
