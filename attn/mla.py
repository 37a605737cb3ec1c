"""MLA (DeepSeek-AI, 2024) arXiv:2405.04434: keys and values from one small latent.

What is remembered of a token is not a key and a value a head but one vector c of a few
hundred numbers, from which every head makes its own, and one more key r, that all heads
share and that carries the rotation. While decoding, the matrices that make keys and
values are not applied to all that is remembered but, once, to the query and the output:

    c_t = norm(x_t W_c),  r_t = rot(x_t W_r),  k_h = [c U_h | r],  v_h = c V_h
    q_h.k_h = (q_h^c U_h^T).c + q_h^r.r,    o_h = (sum_t p_t c_t) V_h
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from attn.cache import kv as caches, reading
from attn.contract.fields import check_fields
from attn.contract.norm import Norm
from attn.contract.segments import TokenPositions, locate
from attn.contract.view import opened
from attn.exact.attend import attend
from attn.layers import Layer
from attn.masks import Causal
from pallas_kernels.logits import LogitSpec, Where

_INIT = nn.initializers.variance_scaling(1.0, "fan_in", "normal")
# of [C,H,D], whose inputs are the C channels of the latent
_UP = nn.initializers.variance_scaling(
    1.0, "fan_in", "normal", in_axis=0, out_axis=(1, 2))


class MLA(Layer):
    """MLA (DeepSeek-AI, 2024) arXiv:2405.04434: exact attention with a latent cache.

    heads H; rank C of the latent; head_dim D of the part of queries and keys that is
    made from it, shared_dim R of the part that all heads share, which `position` turns
    (None: it does not, as in Kimi Linear, arXiv:2510.26692); value_dim V. query_rank:
    queries come from a latent of this rank too. scale: of q.k, by default (D+R)^-0.5.
    use_bias: of what makes the latents and of the last projection, but of nothing that
    is made from a latent, nor of queries that come from none. dtype: of the
    computation; parameters are float32. A stream keeps C + R numbers and a position a
    token: `attn.cache.kv.Cache` with keys [B,slots,1,C+R] and no values.
    """

    heads: int
    rank: int = 512
    head_dim: int = 128
    shared_dim: int = 64
    value_dim: int = 128
    query_rank: int | None = None
    position: Any = None
    scale: float | None = None
    norm: Norm = Norm()
    use_bias: bool = False
    dtype: Any = jnp.float32
    implementation: str | None = None
    sites = ("z",)  # what each head has found; a view may ask for it
    parameter_axes = {
        "q/kernel": "EHD", "q_down/kernel": "ER", "q_up/kernel": "RHD",
        "kv_down/kernel": "ER", "k_up": "RHD", "v_up": "RHD", "out/kernel": "HDE",
    }

    @nn.compact
    def __call__(self, x, state=None, *, segments=None):
        """x [B,T,E] -> [B,T,E]; with a state: the next tokens -> (state, [B,T,E]).
        segments [B,T]: packed sequences, 0 is padding."""
        self._check(x)
        clock = () if state is None else (state.end, state.segment)
        now = locate(segments, *x.shape[:2], *clock)
        q = self._queries(x)
        # [B,T,C] and, of one head, [B,T,1,R]
        latent, shared = self._latents(x)
        own, turned = q[..., : self.head_dim], q[..., self.head_dim:]
        if self.position is not None:
            turned, shared = (
                self.position.rotate(a, now.pos) for a in (turned, shared))
        shape = self.rank, self.heads
        k_up = self.param("k_up", _UP, (*shape, self.head_dim), jnp.float32)
        v_up = self.param("v_up", _UP, (*shape, self.value_dim), jnp.float32)
        k_up, v_up = k_up.astype(self.dtype), v_up.astype(self.dtype)
        if state is None:
            o = self._whole(own, turned, latent, shared, k_up, v_up, now, segments)
        else:
            # q_h U_h^T: [B,T,H,D] [C,H,D] -> [B,T,H,C]
            absorbed = jnp.einsum("bthd,chd->bthc", own, k_up)
            q = jnp.concatenate([absorbed, turned], -1)
            k = jnp.concatenate([latent[:, :, None], shared], -1)  # [B,T,1,C+R]
            state, mean = self._read(state, q, k, now, segments)
            # (sum_t p_t c_t) V_h: [B,T,H,C] [C,H,V]
            o = jnp.einsum("bthc,chv->bthv", mean, v_up)
        # [B,T,H,V] [H,V,E]
        y = nn.DenseGeneral(
            x.shape[-1], axis=(-2, -1), use_bias=self.use_bias, dtype=self.dtype,
            kernel_init=_INIT, name="out",
        )(opened(self, "z", o))
        return y if state is None else (state, y)

    def init_state(self, size: int, x: Any) -> caches.Cache:
        """An empty memory for `size` tokens; x [B,T,E] gives shapes only."""
        b, t = x.shape[:2]
        k, v = (jax.ShapeDtypeStruct((b, t, 1, width), self.dtype)
                for width in (self.rank + self.shared_dim, 0))
        if hasattr(self.position, "check_stream"):
            self.position.check_stream(size)
        return caches.empty(k, v, size)

    def _check(self, x) -> None:
        least = "heads", "rank", "head_dim", "shared_dim", "value_dim", "query_rank"
        check_fields(self, least=dict.fromkeys(least, 1))
        if not hasattr(x, "shape") or len(x.shape) != 3:
            raise ValueError(f"x {getattr(x, 'shape', x)}: expected [B,T,E]")

    def _dense(self, name: str, *width: int, bias: bool = False):
        return nn.DenseGeneral(
            width, use_bias=bias, dtype=self.dtype, kernel_init=_INIT, name=name
        )

    def _queries(self, x) -> jax.Array:
        """[B,T,H,D+R]."""
        width = self.heads, self.head_dim + self.shared_dim
        if self.query_rank is None:
            return self._dense("q", *width)(x)  # [B,T,E] [E,H,D+R]
        # [B,T,E] [E,query_rank], then [query_rank,H,D+R]
        low = self._dense("q_down", self.query_rank, bias=self.use_bias)(x)
        return self._dense("q_up", *width)(self.norm.module(self.dtype, "q_norm")(low))

    def _latents(self, x) -> tuple[jax.Array, jax.Array]:
        """The latent [B,T,C] and the key that all heads share [B,T,1,R]."""
        width = self.rank + self.shared_dim
        # [B,T,E] [E,C+R]
        down = self._dense("kv_down", width, bias=self.use_bias)(x)
        latent = self.norm.module(self.dtype, "kv_norm")(down[..., : self.rank])
        return latent, down[..., None, self.rank:]

    def _spec(self) -> LogitSpec:
        width = self.head_dim + self.shared_dim
        return LogitSpec(
            Causal(), width**-0.5 if self.scale is None else self.scale, None, None)

    def _whole(self, own, turned, latent, shared, k_up, v_up, now, segments):
        """o [B,T,H,V] of a whole text, with keys and values of every head."""
        # [B,T,C] x [C,H,D] -> [B,T,H,D], and values [B,T,H,V]
        k = jnp.einsum("btc,chd->bthd", latent, k_up)
        v = jnp.einsum("btc,chv->bthv", latent, v_up)
        k = jnp.concatenate([k, jnp.broadcast_to(shared, turned.shape)], -1)
        q = jnp.concatenate([own, turned], -1)
        where = Where() if segments is None else Where(
            now.pos, now.pos, now.segment, now.segment)
        return attend(q, k, v, self._spec(), where,
                      implementation=self.implementation)[0]

    def _read(self, state, q, k, now: TokenPositions, segments):
        """The next tokens' latents k [B,T,1,C+R] into the cache -> it, and the mean
        latent [B,T,H,C] that each query [B,T,H,C+R] finds."""
        (b, t), slots = q.shape[:2], state.k.shape[1]
        nothing = jnp.zeros((b, t, 1, 0), state.v.dtype)
        caches.check_room(now.next_pos, slots)
        after = caches.append(state, k, nothing, now, now.pos)
        if t == 1 or segments is None:
            # the token's own sequence is all that is left in the cache
            newest = now.segment.max(1, keepdims=True)
            read, segment = after, jnp.broadcast_to(newest, (b, slots))
        else:
            read, segment = caches.concat(state, k, nothing, now)
        read = read._replace(v=read.k[..., : self.rank])
        read, q = caches.of_one_type(read, q)
        o = reading.read(read, segment, q, now, self._spec(),
                         implementation=self.implementation)[0]
        return after, caches.poison(o.astype(self.dtype), now.next_pos, slots)
