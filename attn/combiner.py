"""Combiner (Ren et al., 2021) arXiv:2107.05768: near tokens one by one, far ones by
region, and nothing left out.

A token's past is cut into disjoint sets: one is read token by token, the others as
regions, each of which is one key and one value (`attn/sparse/regions.py`):

    o_i = sum_(j direct) p_j v_j + sum_r p_r v_r,
    p = softmax(s q_i.[k_j of direct tokens, k_r of regions])

Every token gets some weight, rows sum to one, and the weights inside a region do not
depend on who reads it. How the past is cut is the plan: blocks ("fixed", T^1.5 for
blocks of sqrt(T)), powers of two ("logsparse", T log T), or rows and columns of a grid
("axial_...", T^1.5 for rows of sqrt(T)).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from attn.cache import kv as caches
from attn.cache import regions as streams
from attn.cache.regions import BlocksState, SpansState
from attn.contract.attention import MASKED, Attention, TemplateRow
from attn.contract.dispatch import pick
from attn.contract.fields import check_fields
from attn.contract.segments import TokenPositions, locate
from attn.contract.shapes import check
from attn.exact.attend import attend
from attn.exact.online import OnlineSoftmax, join, output, state_of
from attn.masks import BlockCausal, Causal, Mask, Window
from attn.parallel.sharding import Axis, gather, mesh_of, over_mesh, spread_heads
from attn.sparse import axial, regions, spans
from attn.sparse.regions import Regions, Tokens, compact
from pallas_kernels.logits import LogitSpec, Where

FIXED, LOGSPARSE = "fixed", "logsparse"
# the regions that a grid is read by: (vertical, horizontal)
AXIAL = {"axial_mixture": (True, True), "axial_vertical": (True, False),
         "axial_horizontal": (False, True)}
PLANS = FIXED, LOGSPARSE, *AXIAL


@dataclasses.dataclass(frozen=True)
class Combiner(Attention):
    """Combiner (Ren et al., 2021) arXiv:2107.05768: direct tokens, and regions.

    plan: "fixed" reads the own block up to the token, and earlier blocks as regions;
    "logsparse" itself, and a span of 2^l tokens for each bit of its position;
    "axial_vertical", "axial_horizontal" and "axial_mixture" the row and the column, and
    the regions of `attn/sparse/axial.py`; a tuple of plans is their average. block:
    tokens of a block, or of a row of the grid. causal=False, of "fixed" alone: the own
    block whole and all others as regions.

    Streams: "fixed" keeps a region for each block and the present block; "logsparse"
    all keys and values, and at most log2(T) + 1 spans, of which a token renews one;
    grids and averages have none. Packed rows are proposed here: blocks and spans are
    counted from the beginning of each sequence; a grid, whose rows would begin anywhere
    then, takes none, and without an order such rows have as many regions as tokens.
    Keys of regions are those of K heads; their values are of H, as each query head has
    its own q_r. Over an axis shards of whole blocks exchange regions alone.
    """

    plan: Any = FIXED
    block: int = 128
    causal: bool = True
    scale: float | None = None
    axis: Axis | None = None
    implementation: str | None = None
    crosses = False
    row = TemplateRow(MASKED, "L b D + L^2 D / b, or L log L D", 2)

    def __post_init__(self):
        # maxima of queries are scaled: below 0 they would be minima
        check_fields(self, least={"block": 1}, above={"scale": 0})
        plans = self.plan if isinstance(self.plan, tuple) else (self.plan,)
        if not plans or not all(plan in PLANS for plan in plans):
            raise ValueError(
                f"Combiner: plan={self.plan!r}: expected one of {PLANS}, or a tuple")
        if not self.causal and set(plans) != {FIXED}:
            raise ValueError(
                f"Combiner: causal=False, plan={self.plan!r}: expected plan='fixed'")

    def __call__(self, q, k, v, *, x=None, segments=None):
        """All tokens at once. q [B,T,H,D], k [B,T,K,D], v [B,T,K,V] -> [B,T,H,V]."""
        check(q, k, v, segments=segments, aligned=True)
        if isinstance(self.plan, tuple):
            each = (dataclasses.replace(self, plan=plan) for plan in self.plan)
            found = [a(q, k, v, segments=segments).astype(jnp.float32) for a in each]
            # plans share no softmax: the mean is of their outputs (section 3.3)
            return (sum(found) / len(found)).astype(v.dtype)
        now = locate(segments, q.shape[0], q.shape[1])
        segment = None if segments is None else now.segment
        if self.plan == FIXED:
            k, v = (spread_heads(a, q.shape[2], self.axis) for a in (k, v))
            letters = "BTHD BSKD BSKV BT BT -> BTHV"
            local = over_mesh(self._fixed, letters, self.axis)
            return local(q, k, v, now.pos, segment)
        if self.axis is not None:
            mesh_of(self.axis)  # how these are split is left to the compiler
        if self.plan == LOGSPARSE:
            o = pick(self.implementation, xla=lambda: self._spans(
                q, k, v, now.pos, segment))
            return o.astype(v.dtype)
        if segments is not None:
            raise NotImplementedError(
                f"segments with plan={self.plan!r}: the rows of a grid would begin "
                "anywhere, expected plan='fixed' or 'logsparse'")
        vertical, horizontal = AXIAL[self.plan]
        k, v = (jnp.repeat(a, q.shape[2] // a.shape[2], 2) for a in (k, v))
        o = axial.attend(
            q, k, v, self.block, self._scale(q), vertical=vertical,
            horizontal=horizontal, implementation=self.implementation)
        return o.astype(v.dtype)

    def _fixed(self, q, k, v, pos, segment) -> jax.Array:
        """Blocks: q [B,T,H,D] of this shard."""
        row = Tokens(q, k, v, pos, segment)
        aligned = segment is None and q.shape[1] % self.block == 0
        if self.axis is not None and not aligned:
            # a block may begin on one shard and end on another
            row = jax.tree.map(lambda a: gather(a, self.axis), row)
        if segment is None:
            far = regions.regular(row, self.block, self._scale(q))
        else:
            row = compact(row)
            far = regions.complete(
                row, self.block, self._scale(q), partly=not self.causal)
        if self.axis is not None and aligned:
            far = jax.tree.map(lambda a: gather(a, self.axis), far)
        if segment is None and (aligned or self.axis is None):
            near = axial.within(
                q, row.k, row.v, self.block, self._scale(q), causal=self.causal,
                implementation=self.implementation)
        else:
            where = Where(pos, row.pos, segment, row.segment)
            near = self._attend(q, row.k, row.v, self._own_block, where)
        return self._joined(near, q, far, pos, segment, v.dtype)

    @property
    def _own_block(self) -> Mask:
        """What is read token by token."""
        own = BlockCausal(self.block, 0)
        return Causal() & own if self.causal else own

    def _attend(self, q, k, v, mask: Mask, where: Where) -> OnlineSoftmax:
        return state_of(*attend(
            q, k, v, LogitSpec(mask, self._scale(q)), where, split_lse=True,
            implementation=self.implementation))

    def _joined(self, near, q, far: Regions, pos, segment, dtype) -> jax.Array:
        """What the direct tokens and the regions give."""
        number = pos // self.block  # [B,T]
        # strictly earlier blocks, or without an order all others
        mask, number = (Causal(), number - 1) if self.causal else (
            ~Window(0, 0), number)
        of = None if segment is None else far.segment
        # [B,n,H,.]: keys of K heads, each for the query heads of its group
        far_k = jnp.repeat(far.k, q.shape[2] // far.k.shape[2], 2).astype(q.dtype)
        far_v = far.v.astype(dtype)
        found = self._attend(
            q, far_k, far_v, mask, Where(number, far.number, segment, of))
        return output(join(near, found)).astype(dtype)

    def _spans(self, q, k, v, pos, segment) -> jax.Array:
        """Spans of 2^l tokens."""
        scale = self._scale(q)
        if segment is None:
            return spans.attend(q, k, v, pos, scale)
        place, length = spans.apart(pos, segment)
        row = jnp.arange(q.shape[0])[:, None]

        def put(a):
            empty = jnp.zeros((a.shape[0], length, *a.shape[2:]), a.dtype)
            return empty.at[row, place].set(a, mode="drop")

        o = spans.attend(put(q), put(k), put(v), put(pos), scale)
        return o.at[row, place].get(mode="fill", fill_value=0)

    def init_state(self, size, q, k, v, *, x=None):
        """An empty memory for `size` tokens, of "fixed" up to a whole block."""
        caches.check_size(size)
        self.check_stream()
        if self.plan == LOGSPARSE:
            return streams.empty_spans(size, q, k, v)
        return streams.empty_blocks(size, self.block, q, k, v)

    def step(self, state, q, k, v, *, x=None, segments=None):
        """The next T tokens -> state, [B,T,H,V]. Past the state's size: ValueError, and
        NaN inside a trace."""
        check(q, k, v, segments=segments, aligned=True, piece=True)
        self.check_stream()
        now = locate(segments, q.shape[0], q.shape[1], state.end, state.segment)
        log = self.plan == LOGSPARSE
        room = state.k.shape[1] * (1 if log else self.block)  # of tokens, or of regions
        caches.check_room(now.next_pos, room)
        step = self._step_spans if log else self._step_fixed
        state, o = step(state, q, k, v, now)
        return state, caches.poison(o.astype(v.dtype), now.next_pos, room)

    def check_stream(self) -> None:
        super().check_stream()
        if self.plan not in (FIXED, LOGSPARSE):
            raise NotImplementedError(
                f"step: plan={self.plan!r} has no stream, expected 'fixed' or "
                "'logsparse'")

    def _step_fixed(self, state: BlocksState, q, k, v, now: TokenPositions):
        """The present block and the regions of the earlier ones."""
        row = streams.present(state, Tokens(q, k, v, now.pos, now.segment))
        fresh = regions.complete(row, self.block, self._scale(q))
        far = streams.held(state)  # a block that ends now is not seen by its last token
        if q.shape[1] > 1:
            far = Regions(*(jnp.concatenate([a, c.astype(a.dtype)], 1)
                            for a, c in zip(far, fresh)))
        where = Where(now.pos, row.pos, now.segment, row.segment)
        near = self._attend(
            q, row.k.astype(q.dtype), row.v.astype(q.dtype), self._own_block, where)
        o = self._joined(near, q, far, now.pos, now.segment, v.dtype)
        return streams.after(state, row, fresh, now), o

    def _step_spans(self, state: SpansState, q, k, v, now: TokenPositions):
        """Token after token."""
        return pick(self.implementation, xla=lambda: streams.through(
            state, q, k, v, now, self._scale(q)))

    def _scale(self, q) -> float:
        return q.shape[-1] ** -0.5 if self.scale is None else self.scale


class RowMajor(nn.Module, Attention):
    """Combiner (Ren et al., 2021) arXiv:2107.05768, on rows of a grid: a token reads
    its row up to itself, and each row above as one region.

    What a row says depends on the column: its value is what its token in that column
    finds in the whole row. Its key is that token's own ("none"), the keys found with
    the value ("wsum"), or, "proj", W LN(x + U value), which learns, of the tokens x
    [B,T,E]. block: tokens of a row. Neither packed rows nor streams.
    """

    block: int = 128
    summary: str = "proj"
    scale: float | None = None
    axis: Axis | None = None
    implementation: str | None = None
    row = TemplateRow(MASKED, "L b D + L^2 D / b", 2)
    parameter_axes = {"summary_out/kernel": "HDE", "summary_key/kernel": "EHD",
                      "summary_norm/*": "E"}

    def __post_init__(self):
        check_fields(self, least={"block": 1}, choices={
            "summary": ("proj", "none", "wsum")})
        super().__post_init__()

    @nn.compact
    def __call__(self, q, k, v, *, x=None, segments=None):
        """All tokens at once. q [B,T,H,D], k [B,T,K,D], v [B,T,K,V], x [B,T,E] ->
        [B,T,H,V]."""
        check(q, k, v, segments=segments, aligned=True)
        if segments is not None:
            raise NotImplementedError(
                "segments: the rows of a grid would begin anywhere, expected Combiner()"
            )
        if self.axis is not None:
            mesh_of(self.axis)  # how this is split is left to the compiler
        k, v = (jnp.repeat(a, q.shape[2] // a.shape[2], 2) for a in (k, v))
        own = k

        def key(value, found):
            if self.summary != "proj":
                return own if self.summary == "none" else found
            if x is None:
                raise ValueError("x is None: summary='proj' reads the tokens [B,T,E]")
            dense = functools.partial(
                nn.DenseGeneral, use_bias=False, dtype=jnp.float32, kernel_init=_INIT)
            # [B,T,H,V] [H,V,E]
            y = dense(x.shape[-1], axis=(-2, -1), name="summary_out")(value)
            y = nn.LayerNorm(dtype=jnp.float32, name="summary_norm")(
                x.astype(jnp.float32) + y)
            return dense(q.shape[2:], name="summary_key")(y)  # [B,T,E] [E,H,D]

        scale = q.shape[-1] ** -0.5 if self.scale is None else self.scale
        o = axial.row_major(
            q, k, v, self.block, scale, key, implementation=self.implementation)
        return o.astype(v.dtype)


_INIT = nn.initializers.xavier_uniform()
