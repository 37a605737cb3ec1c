"""Native Sparse Attention (Yuan et al., 2025) arXiv:2502.11089: compressed, chosen, near.

A token reads the past three times. Coarsely: every `stride` tokens a block of
`compress` of them, made into one key and one value by a learned network. Finely: the
`top_k` blocks of `block` tokens that the coarse weights point at, one choice for all
heads that share keys. And what is near, in a window. Gates of the token add them up.

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

from attn.cache import kv as caches
from attn.cache.few import at_slots
from attn.cache.kv import Cache
from attn.contract.attention import MASKED, Attention, TemplateRow
from attn.contract.fields import check_fields
from attn.contract.segments import TokenPositions, locate
from attn.contract.shapes import check
from attn.exact.logits import LogitSpec
from attn.exact.online import join, output
from attn.masks import Causal, Window
from attn.parallel.query_blocks import over_rows
from attn.parallel.sharding import Axis, home
from attn.softmax import Softmax
from attn.sparse import by_block, compressed_blocks
from attn.sparse.block_grid import Grid, grid
from attn.sparse.compressed_blocks import Choice, Compressed, Compressor

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
        "gate/kernel": "EHR", "gate/bias": "HR", "*_position": "HTD",
        "key_in": "HDR", "key_out": "HRD", "value_in": "HDR", "value_out": "HRD",
    }

    def __post_init__(self):
        check_fields(self, least={
            "compress": 1, "stride": 1, "block": 1, "top_k": 1, "window": 1, "first": 0,
            "local": 1, "hidden": 1})
        for name in ("compress", "block"):
            if getattr(self, name) % self.stride:
                raise ValueError(
                    f"NSA: {name}={getattr(self, name)}: expected a multiple of "
                    f"stride={self.stride}")
        if self.top_k < self.first + self.local:
            raise ValueError(
                f"NSA: top_k={self.top_k}: expected first + local = "
                f"{self.first + self.local} or more")
        names = [n for n in BRANCHES if n in self.branches]
        if not names or tuple(names) != self.branches:
            raise ValueError(
                f"NSA: branches={self.branches!r}: expected some of {BRANCHES}, in "
                "order")
        super().__post_init__()

    @property
    def near(self) -> Softmax:
        """What reads the window."""
        return Softmax(mask=Causal() & Window(self.window - 1), scale=self.scale,
                       axis=self.axis, implementation=self.implementation)

    def __call__(self, q, k, v, *, x=None, segments=None):
        """All tokens at once. q [B,T,H,D], k [B,T,K,D], v [B,T,K,V], x [B,T,E] ->
        [B,T,H,V]."""
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
        return self.branches != ("window",)

    def _sum(self, gates, found: dict[str, jax.Array], v) -> jax.Array:
        """Equation 5: gates [B,T,H,c] times the readings [B,T,H,V]."""
        parts = [found[name].astype(jnp.float32) for name in self.branches]
        if gates is not None:
            parts = [gates[..., c, None] * o for c, o in enumerate(parts)]
        return sum(parts).astype(v.dtype)

    @nn.compact
    def _parameters(self, q, k, v, x) -> tuple[Any, tuple]:
        """The gates [B,T,H,c] of tokens, or None, and phi of keys and of values."""
        gates = None
        if self.gated:
            if x is None:
                raise ValueError(
                    "x is None: NSA makes its gates from the tokens [B,T,E]")
            shape = q.shape[2], len(self.branches)
            gates = jax.nn.sigmoid(
                nn.DenseGeneral(shape, name="gate")(x.astype(jnp.float32)))
        phi = tuple(
            self._compressor(name, *a.shape[2:]) if there else None
            for name, a, there in (
                ("key", k, self._far), ("value", v, "compressed" in self.branches)))
        return gates, phi

    def _compressor(self, name: str, heads: int, width: int) -> Compressor:
        hidden, length = self.hidden or width, self.compress
        init = nn.initializers.variance_scaling(
            1.0, "fan_in", "normal", in_axis=-2, out_axis=-1, batch_axis=(0,))
        return Compressor(
            self.param(f"{name}_position", nn.initializers.normal(0.02),
                       (heads, length, width)),
            self.param(f"{name}_in", init, (heads, length * width, hidden)),
            self.param(f"{name}_out", init, (heads, hidden, width)))

    def _choice(self, d: int) -> Choice:
        return Choice(
            self.top_k, self.block // self.stride, self.compress // self.stride,
            self.first, self.local, d**-0.5 if self.scale is None else self.scale)

    def _read(self, phi, q, k, v, rows: Grid, columns: Grid, aligned: bool):
        """The far readings of tokens on the grid `rows` of those on `columns`, by name.
        """
        heads = k.shape[2]
        if self.axis is not None and home("K", heads, self.axis) == ".":
            raise ValueError(
                f"K={heads} key heads, whose groups choose together, cannot be split "
                "over the mesh axis 'model': expected a multiple of its devices")
        first = jnp.broadcast_to(
            columns.first_block(rows.owner)[..., None], rows.pos.shape)
        own = jnp.where(rows.pos < 0, -1, first + rows.pos // self.block)
        keys, vals = columns.put(k), columns.put(v)
        pos, segment = (
            a.reshape(a.shape[0], -1) for a in (columns.pos, columns.segment))
        found = Compressed(
            *(None if f is None else compressed_blocks.compress(a, f, self.stride)
              for a, f in zip((keys, vals), phi)),
            *compressed_blocks.inside(pos, segment, self.compress, self.stride))
        local = functools.partial(self._local, aligned=aligned)
        o = over_rows(
            local, self.axis, rows.put(q), (rows.pos, rows.segment, first, own), None,
            keys, vals, (found, pos, segment))
        o = columns.poison(rows.poison(rows.take(o, q.shape[1])))
        names = [name for name in self.branches if name != "window"]
        return dict(zip(names, jnp.split(o, len(names), -1)))

    def _local(self, q, rows, _, k, v, columns, head, *, aligned) -> jax.Array:
        """q [B,N,I,H,D] of query blocks, k and v [B,S,K,.] -> [B,N,I,H,c V], what the
        far readings found side by side."""
        b, n, size, h, d = q.shape
        found, kv_pos, kv_segment = columns
        group = h // k.shape[2]
        mine = head[::group] // group  # the key heads of this device
        found = found._replace(**{
            name: a[:, :, mine] for name, a in (("k", found.k), ("v", found.v))
            if a is not None})

        @jax.checkpoint
        def coarse(args):
            return compressed_blocks.read(*args, found, self._choice(d))

        o, chosen = jax.lax.map(
            coarse, jax.tree.map(lambda a: jnp.moveaxis(a, 1, 0), (q, *rows)))
        results = [] if o is None else [jnp.moveaxis(o, 0, 1)]
        if "selected" in self.branches:
            # [N,B,K,I,n] -> [B,K,N I,n]
            chosen = chosen.transpose(1, 2, 0, 3, 4)
            chosen = chosen.reshape(b, k.shape[2], n * size, -1)
            pos, own = (rows[i].reshape(-1, n * size) for i in (0, 3))
            how = {"block": self.block, "head": head, "scale": self.scale,
                   "implementation": self.implementation}
            q = q.reshape(b, n * size, h, d)
            # the own block, which is among them, is read up to the token itself
            state = by_block.own_block(
                q, k, v, pos, own, kv_pos, kv_segment, rows=n, aligned=aligned, **how)
            chosen = jnp.where(chosen == own[:, None, :, None], -1, chosen)
            state = join(state, by_block.attend(q, k, v, chosen, kv_pos, **how))
            results.append(output(state).reshape(b, n, size, h, -1))
        return jnp.concatenate(results, -1)

    def init_state(self, size, q, k, v, *, x=None):
        """An empty memory for `size` tokens: all keys and values, and compressed ones.
        """
        caches.check_size(size)
        blocks = -(-size // self.block) * (self.block // self.stride)
        keys, values = (
            jnp.zeros((a.shape[0], blocks, *a.shape[2:]), jnp.float32) for a in (k, v))
        return NSAState(caches.empty(k, v, size), keys, values)

    def step(self, state, q, k, v, *, x=None, segments=None):
        """The next T tokens -> state, [B,T,H,V]. Past the state's size: ValueError, and
        NaN inside a trace."""
        check(q, k, v, segments=segments, aligned=True, piece=True)
        gates, phi = self._parameters(q, k, v, x)
        cache = state.cache
        caches.check_fits(cache, k, v)
        (b, t), slots = q.shape[:2], cache.k.shape[1]
        now = locate(segments, b, t, cache.end, cache.segment)
        caches.check_room(now.next_pos, slots)
        after = self._remembered(state, phi, k, v, now)
        if t == 1:
            found = self._decode(after, q, now)
        else:
            found = self._piece(phi, after.cache, cache, q, k, v, now,
                                segments is not None)
        o = self._sum(gates, found, v)
        return after, caches.poison(o, now.next_pos, slots)

    def _remembered(self, state: NSAState, phi, k, v, now: TokenPositions):
        """The memory with new tokens, and the blocks that they complete compressed."""
        cache = caches.append(state.cache, k, v, now, now.pos)
        length, stride, t = self.compress, self.stride, k.shape[1]
        had = jnp.where((now.segment > 1).any(1), 0, state.cache.end)  # [B]
        done = jnp.maximum((had - length) // stride + 1, 0)
        number = done[:, None] + jnp.arange(t // stride + 1, dtype=jnp.int32)[None]
        begin = number * stride
        whole = begin + length <= now.next_pos[:, None]
        slot = begin[..., None] + jnp.arange(length, dtype=jnp.int32)[None, None]
        slot = slot.reshape(slot.shape[0], -1, 1, 1)  # [B,n l,1,1]
        at = jnp.where(whole, number, state.keys.shape[1])  # outside: dropped
        row = jnp.arange(k.shape[0])[:, None]

        def add(held, a, phi):
            if phi is None:
                return held
            a = jnp.take_along_axis(a, slot, 1, mode="clip")
            new = compressed_blocks.compress(a, phi, length)
            return held.at[row, at].set(new, mode="drop")

        return NSAState(
            cache, add(state.keys, cache.k, phi[0]), add(state.values, cache.v, phi[1]))

    def _piece(self, phi, after: Cache, before: Cache, q, k, v, now, packed: bool):
        """Several tokens over the cache `after` them, or one `before` them that holds
        another sequence than some of them are of."""
        both, segment = after, (after.pos[..., 0] >= 0).astype(jnp.int32)
        if packed:
            both, segment = caches.concat(before, k, v, now)
            segment = jnp.where(both.pos[..., 0] >= 0, segment, 0)
        read, wide = caches.of_one_type(both, q)
        found = {}
        if self._far:
            # a row of queries may begin inside of a block
            rows = grid(
                now.pos, now.segment, min(self.block, q.shape[1]), packed=packed)
            columns = grid(both.pos[..., 0], segment, self.block, packed=packed,
                           spare=before.k.shape[1] // self.block)
            found = self._read(
                phi, wide, read.k, read.v, rows, columns, aligned=False)
        if "window" in self.branches:
            found["window"] = self.near.read(read, segment, wide, now)
        return found

    def _decode(self, state: NSAState, q, now: TokenPositions) -> dict:
        """What one token q [B,1,H,D] reads of the memory that holds it."""
        pos, d, heads = now.pos, q.shape[3], state.keys.shape[2]
        found, slots = {}, {}
        if self._far:
            last = jnp.arange(state.keys.shape[1], dtype=jnp.int32)[None] * self.stride
            last = last + (self.compress - 1)
            there = jnp.ones_like(last)
            values = state.values if "compressed" in self.branches else None
            o, chosen = compressed_blocks.read(
                q, pos, jnp.ones_like(pos), jnp.zeros_like(pos), pos // self.block,
                Compressed(state.keys, values, last, there), self._choice(d))
            found["compressed"] = o
            inside = jnp.arange(self.block, dtype=jnp.int32).reshape(1, 1, 1, -1)
            slot = chosen[:, :, 0, :, None] * self.block + inside  # [B,K,n,block]
            slots["selected"] = jnp.moveaxis(slot.reshape(len(pos), heads, -1), 1, 2)
        back = jnp.arange(self.window, dtype=jnp.int32)[None, :, None]
        slots["window"] = jnp.broadcast_to(
            pos[..., None] - back, (len(pos), self.window, heads))
        for name in self.branches:
            if name == "compressed":
                continue
            slot = slots[name]
            slot = jnp.where(slot <= pos[..., None], jnp.maximum(slot, -1), -1)
            few, wide = caches.of_one_type(at_slots(state.cache, slot), q)
            segment = jnp.broadcast_to(now.segment, few.k.shape[:2])
            found[name] = caches.read(
                few, segment, wide, now, LogitSpec(Causal(), self.scale),
                implementation=self.implementation)[0]
        return found
