"""ABC (Peng et al., 2021) arXiv:2110.02488: attention with a memory of bounded size.

Keys and values are written into c slots, and a query reads those. How much of a token
goes into a slot is a softmax over the tokens, of what a learned matrix says of its key
and, for the slots of values, of its value:

    K~_c = sum_s phi_sc k_s,    phi = softmax_s(k_s W_k),    V~ alike with v and W_v,
    o_t = softmax_c(D^-0.5 q_t.K~_c) V~

In causal order both sums end at t. They are softmaxes over every prefix, so a stream
holds a maximum and two sums a slot, however long it is (`attn/recurrent/scan.py`).
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from attn.contract.attention import LOW, Attention, TemplateRow
from attn.contract.dispatch import pick
from attn.contract.fields import check_fields
from attn.contract.segments import locate, segment_indices
from attn.contract.shapes import check
from attn.exact.dense import weights
from attn.exact.online import OnlineSoftmax, output
from attn.parallel.sharding import Axis, home, mesh_of, over_mesh, splits
from attn.recurrent.pooled_softmax import pooled_softmax
from attn.recurrent.scan import empty, prefix_softmax, total

HIGHEST = jax.lax.Precision.HIGHEST


class ABCState(NamedTuple):
    """Of the current sequence, float32, K c slots in the order of key heads: keys, with
    m, l [B,K c] and acc [B,K c,D], and values, with acc [B,K c,V]; end [B] int32 the
    next token's position; segment [B] int32 the last token's segment, -1 before the
    first."""

    keys: OnlineSoftmax
    values: OnlineSoftmax
    end: jax.Array
    segment: jax.Array


class ABC(nn.Module, Attention):
    """ABC (Peng et al., 2021) arXiv:2110.02488: bounded memory, slots that are learned.

    landmarks: c slots. The matrices `compress_k` [D,c] and `compress_v` [V,c] serve all
    heads of a layer; they begin as Glorot has it, times 2^-0.5. causal=False drops the
    order, for self and cross attention. scale: of q.K~, by default D^-0.5. chunk:
    tokens of a block; it changes the time, not the result. Keys of K < H heads are
    written once. Packed segments are proposed here: each has slots of its own. A
    causal call writes down the slots of every token, c (D + V) numbers a head.
    """

    landmarks: int = 16
    causal: bool = True
    scale: float | None = None
    chunk: int = 16
    axis: Axis | None = None
    implementation: str | None = None
    row = TemplateRow(LOW, "L c D", 1)
    weightless = "what is written into its slots depends on v too"
    parameter_axes = {"compress_[kv]": "DR"}

    def __post_init__(self):
        check_fields(self, least={"landmarks": 1})
        super().__post_init__()

    def __call__(self, q, k, v, *, x=None, segments=None):
        """All tokens at once. q [B,T,H,D], k [B,S,K,D], v [B,S,K,V] -> [B,T,H,V]."""
        check(q, k, v, segments=segments, aligned=self.causal)
        where = segment_indices(segments, q, self.causal)
        both = zip(self._scores(k, v), (k, v))
        if self.causal:
            # sums over all s <= t, as in the paper: CAB's code has the token t alone
            slots = [self._prefixes(None, *a, where[1], self.axis)[1] for a in both]
        elif where[0] is None:
            f = functools.partial(self._whole, list(both))
            slots = pick(self.implementation, xla=f)
        else:
            slots = [self._by_segment(*a, *where) for a in both]
        return self._read(q, *slots).astype(v.dtype)

    def init_state(self, size, q, k, v, *, x=None) -> ABCState:
        """An empty memory for `size` tokens; q, k, v give shapes."""
        self.check_stream()
        b, slots = k.shape[0], k.shape[2] * self.landmarks
        clock = jnp.zeros((b,), jnp.int32)
        # the segment before the first is -1
        return ABCState(
            empty(b, slots, k.shape[3]), empty(b, slots, v.shape[3]), clock, clock - 1)

    def step(self, state, q, k, v, *, x=None, segments=None):
        """The next T tokens -> state, [B,T,H,V]; the state does not grow."""
        self.check_stream()
        check(q, k, v, segments=segments, aligned=True)
        now = locate(segments, q.shape[0], q.shape[1], state.end, state.segment)
        segment = None if segments is None else now.segment
        axis = splits(self.axis, q.shape[1])
        (keys, read_k), (values, read_v) = (
            self._prefixes(*a, segment, axis)
            for a in zip(state[:2], self._scores(k, v), (k, v)))
        o = self._read(q, read_k, read_v).astype(v.dtype)
        return ABCState(keys, values, now.next_pos, now.last_segment), o

    @nn.compact
    def _scores(self, k, v) -> list[jax.Array]:
        """The logits of each token in each slot [B,S,K,c] float32, by k and by v."""
        # variance 2 / (2 (D + c)), Glorot's halved
        init = nn.initializers.variance_scaling(0.5, "fan_avg", "uniform")
        found = []
        for name, a in (("compress_k", k), ("compress_v", v)):
            shape = (a.shape[-1], self.landmarks)
            weight = self.param(name, init, shape, jnp.float32)
            # [B,S,K,D] [D,c]; exponentiated: their absolute error counts
            found.append(jnp.einsum(
                "bskd,dc->bskc", a.astype(jnp.float32), weight, precision=HIGHEST))
        return found

    def _prefixes(self, state, scores, a, segment, axis: Axis | None):
        """The state of all tokens, None for none over an axis; and what the slots hold
        of `a` [B,T,K,D] at every token [B,T,K,c,D] float32."""
        def local(state, scores, a, segment):
            after, slots = prefix_softmax(
                _merged(scores), a, state=state and OnlineSoftmax(*state),
                segment=segment, axis=axis, chunk=self.chunk,
                implementation=self.implementation,
            )
            slots = slots.reshape(*scores.shape, -1)  # [B,T,K,c,D]
            return *(after or [None] * 3), slots

        heads = home("K", a.shape[2], axis)
        letters = "Bk BTk. BTkD BT -> Bk Bk Bk. BTk.D".replace("k", heads)
        *after, slots = over_mesh(local, letters, axis)(state, scores, a, segment)
        return None if after[0] is None else OnlineSoftmax(*after), slots

    def _whole(self, both) -> list[jax.Array]:
        """What the slots hold of all tokens [B,1,K,c,D], in the global view: over a
        mesh XLA adds up the sums, which are small."""
        if self.axis is not None:
            mesh_of(self.axis)  # raises without a mesh
        slots = []
        for scores, a in both:
            held = output(total(_merged(scores), a))  # [B,K c,D]
            slots.append(held.reshape(a.shape[0], 1, *scores.shape[2:], -1))
        return slots

    def _by_segment(self, scores, a, q_segment, kv_segment) -> jax.Array:
        """What the slots hold of each query's segment [B,T,K,c,D]."""
        def local(scores, a, q_segment, kv_segment):
            slots = pooled_softmax(
                _merged(scores), a.astype(jnp.float32), q_segment, kv_segment,
                chunk=self.chunk, axis=self.axis, implementation=self.implementation)
            return slots.reshape(*q_segment.shape, *scores.shape[2:], -1)

        heads = home("K", a.shape[2], self.axis)
        letters = "BSk. BSkD BT BS -> BTk.D".replace("k", heads)
        f = over_mesh(local, letters, self.axis)
        return f(scores, a, q_segment, kv_segment)

    def _read(self, q, keys, values) -> jax.Array:
        """softmax_c(scale q.K~) V~ [B,T,H,V] of slots [B,T|1,K,c,.]."""
        b, t, h, d = q.shape
        heads, scale = keys.shape[2], d**-0.5 if self.scale is None else self.scale
        q = q.astype(jnp.float32).reshape(b, t, heads, -1, d)  # [B,T,K,G,D]
        # without an order and segments the slots are those of all tokens [B,1,K,c,.]
        same = "bt" if keys.shape[1] == t else "b"
        keys, values = (a if same == "bt" else a[:, 0] for a in (keys, values))
        logits: Any = jnp.einsum(f"btkgd,{same}kcd->btkgc", q, keys)  # [G,D] [D,c]
        p = weights(scale * logits)
        o = jnp.einsum(f"btkgc,{same}kcv->btkgv", p, values)  # [G,c] [c,V]
        return o.reshape(b, t, h, -1)


def _merged(scores: jax.Array) -> jax.Array:
    """[B,S,K,c] as [B,S,K c]."""
    return scores.reshape(*scores.shape[:2], -1)
