"""LongShort (Zhu et al., 2021) arXiv:2107.02192: a window, and few rows for the rest.

Far tokens are compressed by a projection that the tokens themselves decide: r rows,
each a softmax over tokens of what a matrix says of them. A query has one softmax over
both, the r rows and its window; two layer norms make their scales alike.

    P = softmax_s(x W_p),    K~ = LN(P^T k),    V~ = LN(P^T v)
    o_t = softmax([q.K~ | q.k_near]) [V~ | v_near]

In causal order every chunk of l tokens is compressed by itself, queries see the chunks
before their own, and distances have logits of their own (Transformer-XL's):

    near: (q + b_w).k_s + (q + b_r).R_(t-s),    far: q.k~_c + q.R'_dist

with q scaled, dist 0 for the newest row. In front of the text there is a memory of zero
vectors, which are seen: after their norms they are its bias.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from attn.cache import kv as caches
from attn.contract.angles import sinusoids
from attn.contract.attention import LOW, Attention, TemplateRow
from attn.contract.dispatch import pick
from attn.contract.fields import check_fields
from attn.contract.one_sequence import one_sequence
from attn.contract.shapes import check
from attn.exact.online import OnlineSoftmax
from attn.parallel.sharding import Axis, mesh_of
from attn.recurrent import scan
from attn.sparse import long_short
from attn.sparse.long_short import Keys


class LongShortState(NamedTuple):
    """k [B,C,K,D] and v [B,C,K,V] float32, rows of whole chunks before their norm;
    near_k, near_v: the last w - 1 tokens, before theirs; keys, values: of the chunk
    that has begun, m, l [B,K r] and acc [B,K r,.]; end [B] int32 the next token's
    position; segment [B] int32 the last token's segment, -1 before the first."""

    k: jax.Array
    v: jax.Array
    near_k: jax.Array
    near_v: jax.Array
    keys: OnlineSoftmax
    values: OnlineSoftmax
    end: jax.Array
    segment: jax.Array


class LongShort(nn.Module, Attention):
    """LongShort (Zhu et al., 2021) arXiv:2107.02192: long-short transformer.

    rank: r rows, in causal order of each chunk of `chunk` l tokens, else of the whole
    sequence. window: w last keys, the token itself included; without an order blocks of
    w queries see their w keys and w/2 to either side. memory: zero vectors in front of
    a causal text, a multiple of `chunk`. Projections and their biases are those of
    `MultiHead`; it gates on x [B,T,E]. Parameters: `compress` [E,K,r], the norms
    `norm_far` and `norm_near` over the channels of all key heads (values have scales of
    their own, `value_norm_*`, if they are of another width), in causal order `place`
    and `place_far` [E,H,D] and `asks`, `turns` [H,D]. It has no cross attention. Rows
    with padding are moved together; several sequences in a row are refused, and in a
    stream, all segments. Over an `axis` its sums over tokens are left to XLA. The
    authors' optional convolution is not there.
    """

    rank: int = 1
    window: int = 256
    chunk: int = 32
    memory: int = 0
    causal: bool = True
    scale: float | None = None
    axis: Axis | None = None
    implementation: str | None = None
    crosses = False
    row = TemplateRow(LOW, "L w D + L^2 r D / l, or L (w + r) D", 2)
    weightless = "its values are normed"
    parameter_axes = {
        "compress/kernel": "EHR", "compress/bias": "HR", "place": "EHD",
        "place_far/kernel": "EHD", "place_far/bias": "HD", "asks": "HD",
        "turns": "HD", "*norm_*/scale": "HD", "*norm_*/bias": "HD",
    }

    def __post_init__(self):
        check_fields(self, least={"rank": 1, "window": 1, "memory": 0})
        if self.memory % self.chunk:
            raise ValueError(
                f"LongShort: memory={self.memory}: expected a multiple of "
                f"chunk={self.chunk}"
            )
        super().__post_init__()

    def __call__(self, q, k, v, *, x=None, segments=None):
        """All tokens at once. q [B,T,H,D], k [B,T,K,D], v [B,T,K,V] -> [B,T,H,V]; x
        [B,T,E]. segments: 0 for padding, of rows of one sequence."""
        check(q, k, v, segments=segments, aligned=True)
        _check_tokens(x, q)
        if self.axis is not None:
            mesh_of(self.axis)  # raises without a mesh
        real, mixed = one_sequence(segments, q)
        xla = functools.partial(self._moved, segments is None, real, q, k, v, x)
        o = pick(self.implementation, xla=xla)
        return jnp.where(mixed, jnp.nan, o).astype(v.dtype)

    def _moved(self, whole: bool, real, *arrays) -> jax.Array:
        """o [B,T,H,V] float32, where real tokens stand in front and go back after."""
        if whole:
            return self._attend(real, *arrays)
        order = jnp.argsort(~real, axis=1, stable=True)
        take = jax.vmap(lambda a, at: a[at])
        arrays = tuple(take(a, order) for a in arrays)
        o = self._attend(take(real, order), *arrays)
        return take(o, jnp.argsort(order, axis=1))

    def init_state(self, size, q, k, v, *, x=None) -> LongShortState:
        """An empty memory for `size` tokens, or as many as make whole chunks."""
        self.check_stream()
        caches.check_size(size)
        b, _, heads, _ = k.shape
        rows = -(-size // self.chunk) * self.rank
        like = [(a.shape[-1], a.dtype) for a in (k, v)]
        far_k, far_v = (jnp.zeros((b, rows, heads, n), jnp.float32) for n, _ in like)
        near_k, near_v = (
            jnp.zeros((b, self.window - 1, heads, n), t) for n, t in like)
        keys, values = (scan.empty(b, heads * self.rank, n) for n, _ in like)
        clock = jnp.zeros((b,), jnp.int32)
        return LongShortState(
            far_k, far_v, near_k, near_v, keys, values, clock, clock - 1)

    def step(self, state, q, k, v, *, x=None, segments=None):
        """The next T tokens -> state, [B,T,H,V]. Past the state's size: ValueError, and
        NaN inside a trace."""
        self.check_stream()
        check(q, k, v, segments=segments, aligned=True, piece=True)
        _check_tokens(x, q)
        if segments is not None:
            raise NotImplementedError(
                "segments: chunks are counted from the first token of a stream, "
                "expected rows of one sequence without padding"
            )
        size = state.k.shape[1] // self.rank * self.chunk
        caches.check_room(state.end + q.shape[1], size)
        xla = functools.partial(self._attend, None, q, k, v, x, state)
        after, o = pick(self.implementation, xla=xla)
        return after, caches.poison(o.astype(v.dtype), after.end, size)

    @nn.compact
    def _attend(self, real, q, k, v, x, state=None):
        """o [B,T,H,V] float32, of tokens that follow a state with it."""
        p, q = self._logits(x, k), q.astype(jnp.float32)
        scaled = q * (q.shape[-1] ** -0.5 if self.scale is None else self.scale)
        if state is not None:
            return self._streamed(state, scaled, k, v, p, x)
        k, v = (a.astype(jnp.float32) for a in (k, v))
        if not self.causal:
            near = self._normed("near", Keys(k, v))
            p = jnp.where(real[..., None, None], p, -jnp.inf)
            some = real.any(1)[:, None, None, None]
            p = jax.nn.softmax(jnp.where(some, p, 0), 1)  # over tokens [B,T,K,r]
            far = self._normed("far", long_short.compress(p, near))
            return long_short.noncausal(scaled, near, far, real.sum(1), self.window)
        near = self._normed("near", Keys(*(
            jnp.pad(a, ((0, 0), (self.window - 1, 0), (0, 0), (0, 0))) for a in (k, v)
        )))
        # by chunks [B,N,l,...], of which only whole ones are seen by later queries
        p, k, v = (long_short.blocks(a, self.chunk).swapaxes(0, 1) for a in (p, k, v))
        made = long_short.compress(jax.nn.softmax(p, 2), Keys(k, v))  # [B,N,r,K,.]
        rows = [a.reshape(a.shape[0], -1, *a.shape[3:]) for a in made]  # [B,N r,K,.]
        # compressed before the norm of near keys; without an order behind it
        far = self._normed("far", self._behind(rows))
        return self._ordered(0, scaled, near, far, x)

    def _streamed(self, state, q, k, v, p, x):
        t, end = q.shape[1], state.end
        # a token's chunk, numbered as segments are: 1 is the one that was begun
        pos = end[:, None] + jnp.arange(t, dtype=jnp.int32)[None]
        begun = jnp.where(end % self.chunk > 0, 1, 2)[:, None]
        chunk = pos // self.chunk - end[:, None] // self.chunk + begun
        done = (pos + 1) % self.chunk == 0
        slot = pos // self.chunk * self.rank  # of its first row
        slot = jnp.where(done, slot, state.k.shape[1])[..., None]
        slot = slot + jnp.arange(self.rank, dtype=jnp.int32)[None, None]  # [B,T,r]
        scores = p.reshape(*p.shape[:2], -1)  # [B,T,K r]
        held: list = []
        made: list = []
        for part, a in zip((state.keys, state.values), (k, v)):
            # what the chunk holds at each token: that of its last one is its rows
            after, rows = scan.prefix_softmax(
                scores, a.astype(jnp.float32), state=OnlineSoftmax(*part),
                segment=chunk, implementation="xla")
            held.append(after)
            rows = rows.reshape(*p.shape, -1).swapaxes(2, 3)  # [B,T,r,K,D]
            made.append(rows.reshape(rows.shape[0], -1, *rows.shape[3:]))  # [B,T r,K,.]
        put = jax.vmap(lambda a, at, new: a.at[at.reshape(-1)].set(new, mode="drop"))
        far = [put(a, slot, new) for a, new in zip((state.k, state.v), made)]
        near_held = state.near_k, state.near_v
        front = [jnp.concatenate([a.astype(jnp.float32) for a in pair], 1)
                 for pair in zip(near_held, (k, v))]  # [B,w-1+T,K,.]
        near = self._normed("near", Keys(*front))
        o = self._ordered(end[0], q, near, self._normed("far", self._behind(far)), x)
        last = [a[:, t:].astype(b.dtype) for a, b in zip(front, near_held)]
        return LongShortState(
            far[0], far[1], last[0], last[1], held[0], held[1], end + t,
            jnp.ones_like(end)), o

    def _behind(self, rows) -> Keys:
        """Rows behind those of the memory, which are zeros."""
        front = self.memory // self.chunk * self.rank
        return Keys(*(jnp.pad(a, ((0, 0), (front, 0), (0, 0), (0, 0))) for a in rows))

    def _ordered(self, start, q, near: Keys, far: Keys, x) -> jax.Array:
        places = self._places(x.shape[-1], q, far.k.shape[1])
        return long_short.causal(
            q, near, far, places, start=start, chunk=self.chunk, rank=self.rank,
            memory=self.memory)

    def _logits(self, x, k) -> jax.Array:
        """Of the compression [B,T,K,r] float32."""
        return nn.DenseGeneral(  # [B,T,E] [E,K,r]
            (k.shape[2], self.rank), dtype=jnp.float32, name="compress")(x)

    def _normed(self, name: str, keys: Keys) -> Keys:
        """Both after their layer norm over the channels of all heads."""
        def norm(name):
            return nn.LayerNorm(
                epsilon=1e-5, reduction_axes=(-2, -1), feature_axes=(-2, -1),
                use_fast_variance=False, dtype=jnp.float32, name=name)

        of_keys = norm(f"norm_{name}")
        same = keys.k.shape[-1] == keys.v.shape[-1]
        of_values = of_keys if same else norm(f"value_norm_{name}")
        return Keys(of_keys(keys.k), of_values(keys.v))

    def _places(self, e: int, q, rows: int) -> long_short.Places:
        """What distances are, near ones and those of the rows."""
        h, d = q.shape[2:]
        init = nn.initializers.lecun_normal(in_axis=0, out_axis=(1, 2))
        place = self.param("place", init, (e, h, d), jnp.float32)
        far = nn.DenseGeneral((h, d), dtype=jnp.float32, name="place_far")
        zeros = nn.initializers.zeros_init()
        asks, turns = (self.param(n, zeros, (h, d)) for n in ("asks", "turns"))
        # [w,E] x [E,H,D] -> [w,H,D], and [M,E] [E,H,D] of far rows
        near = jnp.einsum("we,ehd->whd", sinusoids(jnp.arange(self.window), e), place)
        return long_short.Places(near, far(sinusoids(jnp.arange(rows), e)), asks, turns)


def _check_tokens(x: Any, q: Any) -> None:
    if x is None or x.shape[:2] != q.shape[:2]:
        raise ValueError(
            f"x {None if x is None else x.shape}: expected the tokens that q, k and v "
            f"were made of, [B,T,E] with {q.shape[:2]} in front"
        )
