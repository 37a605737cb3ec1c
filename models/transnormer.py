"""TransNormer (Qin et al., 2024) arXiv:2405.17381: a decoder of linear attention.

Every layer is a gated linear attention and a gated linear unit, both after a norm
without parameters. Softmax is nowhere: the output of the attention, whose size grows
with the number of tokens that it sums, is normalised instead, over all heads at once.

    x = x + GLA(norm(x)),  GLA(x) = (norm(lightning(silu(x Q), silu(x K), x V)) * x U) O
    x = x + SGLU(norm(x)), SGLU(x) = ((x V) * (x U)) O
    norm(x) = x / sqrt(mean(x^2) + 1e-6)

Decay alone tells old from new; one layer, the first, also gets a learned rotation.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from attn.contract.angles import learned_angles
from attn.contract.segments import locate
from attn.layers import Layer
from attn.lightning import Lightning
from attn.recurrent.linear import LinearState
from models.feed import INIT
from models.placement import lay
from models.stack import check_sizes
from models.vocabulary import Embed

VARIANTS, WHERE = ("paper", "example"), ("first", "rest", None)


def srmsnorm(x: jax.Array, eps: float = 1e-6) -> jax.Array:
    """x [...,E] over its root mean square, in float32; returns x's dtype."""
    y = x.astype(jnp.float32)
    # x / sqrt(mean(x^2) + eps)
    return (y * jax.lax.rsqrt((y * y).mean(-1, keepdims=True) + eps)).astype(x.dtype)


def lrpe(x: jax.Array, theta: jax.Array, pos: jax.Array) -> jax.Array:
    """LRPE-d (Qin et al., 2023) arXiv:2307.09270: x [B,T,H,D] -> [B,T,H,2D], x times
    the cosine and the sine of theta [H,D] (radians a token) times pos [B,T], so that
    q.k becomes sum_d q_d k_d cos(theta_d (t - j))."""
    # [B,T,1,1] x [1,1,H,D]
    angle = learned_angles(pos[:, :, None, None], theta.astype(jnp.float32)[None, None])
    y = x.astype(jnp.float32)
    both = jnp.concatenate([y * jnp.cos(angle), y * jnp.sin(angle)], -1)  # [B,T,H,2D]
    return both.astype(x.dtype)


class GLA(Layer):
    """The token mixer of TransNormer (Qin et al., 2024) arXiv:2405.17381.

    variant "paper": silu of q and k, norm without parameters over E, gate x U, E x E.
    "example", of the authors' later example code: silu of q, k and v, LayerNorm with
    parameters, gate sigmoid(x A B) through the width of one head. rotates: LRPE-d with
    a learned theta [H,D]. dtype: of the computation; parameters are float32.
    """

    attention: Lightning
    heads: int
    rotates: bool = False
    variant: str = "paper"
    dtype: Any = jnp.float32
    parameter_axes = {
        "[qkvu]/kernel": "EF", "out/kernel": "FE", "gate_down/kernel": "ER",
        "gate_up/kernel": "RF", "theta": "HD",
    }

    def __post_init__(self):
        if self.variant not in VARIANTS:
            raise ValueError(
                f"GLA: variant={self.variant!r}: expected one of {VARIANTS}"
            )
        super().__post_init__()

    @nn.compact
    def __call__(self, x, state=None, *, context=None, pos=None, segments=None):
        """x [B,T,E] -> [B,T,E]; with a state: the next tokens -> (state, [B,T,E]).

        pos [B,T]: positions other than those of the stream. segments [B,T]: packed
        sequences, 0 is padding.
        """
        if context is not None:
            raise NotImplementedError("GLA reads queries and keys in step: no context")
        self._width(x)
        q, k, v = self._project(x)
        if self.rotates:
            q, k = self._rotate(x, q, k, state, pos, segments)
        if state is None:
            o = self.attention(q, k, v, segments=segments)
        else:
            state, o = self.attention.step(state, q, k, v, segments=segments)
        o = o.reshape(x.shape)  # [B,T,H,D] -> [B,T,E]
        if self.variant == "paper":
            o = srmsnorm(o) * self._dense(x.shape[-1], "u")(x)  # norm(o) * x U
        else:
            o = nn.LayerNorm(epsilon=1e-5, dtype=self.dtype, name="norm")(o)
            # x A: [B,T,E] [E,E/H]
            narrow = self._dense(x.shape[-1] // self.heads, "gate_down")(x)
            # times sigmoid(x A B)
            o = o * nn.sigmoid(self._dense(x.shape[-1], "gate_up")(narrow))
        y = self._dense(x.shape[-1], "out")(o)  # [B,T,E] [E,E]
        return y if state is None else (state, y)

    def init_state(self, size: int, x: Any) -> LinearState:
        """An empty memory for `size` tokens; x [B,T,E] gives its shape."""
        b, t, _ = x.shape
        d = self._width(x)

        def like(d):
            return jax.ShapeDtypeStruct((b, t, self.heads, d), self.dtype)

        wide = like(2 * d if self.rotates else d)  # cosines and sines of LRPE
        return self.attention.init_state(size, wide, wide, like(d))

    def _width(self, x) -> int:
        if x.shape[-1] % self.heads:
            raise ValueError(
                f"E={x.shape[-1]}: expected a multiple of heads={self.heads}"
            )
        return x.shape[-1] // self.heads

    def _dense(self, width: int, name: str) -> nn.Dense:
        return nn.Dense(
            width, use_bias=False, dtype=self.dtype, kernel_init=INIT, name=name
        )

    def _project(self, x) -> list[jax.Array]:
        shape = *x.shape[:2], self.heads, -1
        # [B,T,E] [E,E] -> [B,T,H,D]
        q, k, v = (self._dense(x.shape[-1], n)(x).reshape(shape) for n in "qkv")
        return [nn.silu(q), nn.silu(k), nn.silu(v) if self.variant == "example" else v]

    def _rotate(self, x, q, k, state, pos, segments):
        end, segment = (None, None) if state is None else (state.end, state.segment)
        if pos is None:
            pos = locate(segments, x.shape[0], x.shape[1], end, segment).pos
        shape = q.shape[2:]

        def slow(key, shape, dtype):
            size = shape[0] * shape[1]
            at = jnp.arange(size, dtype=dtype).reshape(shape)
            # frequencies fall over all H D channels, head after head
            return 10000 ** (-2 * at / size)

        theta = self.param("theta", slow, shape, jnp.float32)
        return lrpe(q, theta, pos), lrpe(k, theta, pos)


class SGLU(nn.Module):
    """The channel mixer of TransNormer (Qin et al., 2024) arXiv:2405.17381: ((x V) *
    (x U)) O, without bias or activation."""

    hidden: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        """x [B,T,E] -> [B,T,E]."""
        dense = functools.partial(
            nn.Dense, use_bias=False, dtype=self.dtype, kernel_init=INIT
        )
        # [B,T,E] [E,F]
        v, u = dense(self.hidden, name="v")(x), dense(self.hidden, name="u")(x)
        return dense(x.shape[-1], name="out")(v * u)  # ((x V) * (x U)) O: [B,T,F] [F,E]


class TransNormer(nn.Module):
    """TransNormer (Qin et al., 2024) arXiv:2405.17381: tokens in, logits out.

    width E, heads H, depth layers, hidden: width of the SGLU (2E by default).
    attention: what every layer uses, told its own number. lrpe: which layers rotate q
    and k: "first" as in the paper, "rest" (all but the first, as the authors' compact
    code does), or None. variant: see `GLA`. tied: the head is the embedding. dtype: of
    the computation, parameters are float32.
    """

    vocab: int = 256
    width: int = 128
    heads: int = 4
    depth: int = 2
    hidden: int | None = None
    attention: Lightning = Lightning()
    lrpe: str | None = "first"
    variant: str = "paper"
    tied: bool = True
    dtype: Any = jnp.float32

    def setup(self):
        self.embed = Embed(self.vocab, self.width, self.dtype)
        self.mixers = self.layers()
        hidden = 2 * self.width if self.hidden is None else self.hidden
        self.channels = [SGLU(hidden, self.dtype) for _ in range(self.depth)]
        if not self.tied:
            self.head = nn.Dense(
                self.vocab, use_bias=False, dtype=self.dtype, kernel_init=INIT
            )

    def layers(self, **how: Any) -> list[GLA]:
        """The token mixers; `how` goes to `GLA`."""
        if self.lrpe not in WHERE:
            raise ValueError(
                f"TransNormer: lrpe={self.lrpe!r}: expected one of {WHERE}"
            )
        check_sizes("TransNormer", self, "vocab width heads depth hidden")
        made = []
        for n in range(self.depth):
            told = dataclasses.replace(self.attention, layer=n, layers=self.depth)
            rotates = self.lrpe == ("first" if n == 0 else "rest")
            made.append(
                GLA(told, self.heads, rotates, self.variant, self.dtype, **how)
            )
        return made

    def __call__(self, tokens, state=None, *, segments=None, at=None):
        """tokens [B,T] int -> logits [B,T,vocab]; with a state: (state, logits).

        segments [B,T]: packed sequences, 0 is padding. at [B]: only the logits of the
        token with this index, [B,vocab].
        """
        if tokens.ndim != 2 or 0 in tokens.shape:
            raise ValueError(f"tokens have shape {tokens.shape}: expected [B,T], T > 0")
        x, after = lay(self.embed(tokens), "BTE"), []
        for n, (mixer, channel) in enumerate(zip(self.mixers, self.channels)):
            if state is None:
                y = mixer(srmsnorm(x), segments=segments)
            else:
                own, y = mixer(srmsnorm(x), state[n], segments=segments)
                after.append(own)
            x = lay(x + y, "BTE")  # x + GLA(norm(x))
            x = lay(x + channel(srmsnorm(x)), "BTE")  # x + SGLU(norm(x))
        if at is not None:
            x = jnp.take_along_axis(x, at[:, None, None], 1)[:, 0]  # [B,T,E] -> [B,E]
        x = srmsnorm(x)
        # [B,T,E] [E,vocab]
        logits = self.embed.attend(x) if self.tied else self.head(x)
        logits = lay(logits.astype(jnp.float32), "BTN" if at is None else "BN")
        return logits if state is None else (tuple(after), logits)

    def init_state(self, size: int, tokens: Any) -> tuple[LinearState, ...]:
        """Empty memories, one a layer; they do not grow with `size`. tokens [B,T]: the
        coming ones, shapes only. Needs no parameters."""
        x = jax.ShapeDtypeStruct((*tokens.shape, self.width), self.dtype)
        return tuple(
            layer.init_state(size, x) for layer in self.layers(parent=None)
        )
