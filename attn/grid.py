"""Grid: where a token stands in a picture or a film, for attention without an order.

Tokens of a grid of m axes stand row by row, the first axis changing slowest. `MDLRPE`
turns queries and keys by their coordinates, so that q.k depends on how far apart tokens
are along every axis; `MDTPE` mixes every token with those before it along each axis.
"""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from attn.contract.angles import learned_angles
from attn.recurrent.linear import recurrence

_INIT = nn.initializers.variance_scaling(1.0, "fan_in", "normal")
KINDS, DECAYS = ("cosine", "rotary"), ("sigmoid", "exp")


def coordinates(pos: jax.Array, dims: tuple[int, ...], extra: int = 0) -> jax.Array:
    """Numbers of tokens, any shape [...], as coordinates [...,m] int32 on a grid of
    `dims`; the first `extra` tokens are in front of it and have coordinates 0. Tokens
    behind the grid go on along the first axis."""
    at, found = jnp.maximum(pos - extra, 0), []
    # digits of the number, the last axis first; the first axis takes what is left
    for size in dims[:0:-1]:
        found.append(at % size)
        at = at // size
    return jnp.stack([at, *found[::-1]], -1).astype(jnp.int32)


def _check_grid(name: str, dims: tuple[int, ...], extra: int = 0) -> None:
    if not dims or min(dims) < 1 or extra < 0:
        raise ValueError(
            f"{name}: dims={dims}, extra={extra}: expected sizes of 1 or more, and 0 "
            "or more tokens in front"
        )


class MDLRPE(nn.Module):
    """MD-LRPE (Qin et al., 2024) arXiv:2405.21022: channels turn with the coordinates.

    Each axis has e of the D channels (e = D over the number of axes, rounded up), all
    axes the same frequencies theta [heads,e]:

        angle(s) = [s_1 theta, .., s_m theta] up to D,   x -> [x cos, x sin]

    twice as wide, after which q.k is sum_d q_d k_d cos(the difference of the angles).
    kind "rotary", proposed here, gives each axis its part of the D/2 pairs of `RoPE`
    instead and keeps the width. Use it as `MultiHead(position=MDLRPE((8, 8)))`. extra:
    tokens in front of the grid, such as a class, whose angle is 0. learned: theta
    starts at base^(-2i/D), which for several axes is proposed here, and is trained;
    heads: its rows, by default those of q; with K < H key heads give heads=K.
    """

    dims: tuple[int, ...]
    extra: int = 0
    kind: str = "cosine"
    learned: bool = True
    base: float = 10000.0
    heads: int | None = None

    def __post_init__(self):
        _check_grid("MDLRPE", self.dims, self.extra)
        if self.kind not in KINDS:
            raise ValueError(f"MDLRPE: kind={self.kind!r}: expected one of {KINDS}")
        super().__post_init__()

    @property
    def doubles(self) -> bool:
        """Whether q and k become twice as wide."""
        return self.kind == "cosine"

    @nn.compact
    def rotate(self, x: jax.Array, pos: jax.Array) -> jax.Array:
        """x [B,T,H,D] -> [B,T,H,2D or D]; pos [B|1,T]: numbers of the tokens."""
        h, d = x.shape[2:]
        if self.kind == "rotary" and d % 2:
            raise ValueError(f"MDLRPE: {d} channels: expected an even number")
        width = d if self.doubles else d // 2
        each = -(-width // len(self.dims))  # e: the channels of an axis

        def first(key, shape, dtype=jnp.float32):
            theta = self.base ** (-2 * jnp.arange(each, dtype=dtype) / d)
            return jnp.broadcast_to(theta, shape)

        shape = self.heads or h, each
        # [H,e]
        theta = self.param("theta", first, shape) if self.learned else first(0, shape)
        if h % shape[0]:
            raise ValueError(
                f"MDLRPE: {h} heads of x: expected a multiple of heads={shape[0]}"
            )
        theta = jnp.repeat(theta, h // shape[0], 0)
        at = coordinates(pos, self.dims, self.extra)
        # [B,T,1,m,1] x [1,1,H,1,e] -> [B,T,H,m,e], side by side up to `width`
        angle = learned_angles(at[:, :, None, :, None], theta[None, None, :, None])
        # [B,T,H,m e] -> [B,T,H,width]
        angle = angle.reshape(*at.shape[:2], h, -1)[..., :width]
        return _turned(x, angle, self.doubles)


def _turned(x: jax.Array, angle: jax.Array, doubles: bool) -> jax.Array:
    """x times cosines and sines of its angles, side by side; or its pairs turned."""
    cos, sin, y = jnp.cos(angle), jnp.sin(angle), x.astype(jnp.float32)
    if doubles:
        parts = y * cos, y * sin
    else:
        a, b = jnp.split(y, 2, -1)  # pairs (a, b) of RoPE
        parts = a * cos - b * sin, a * sin + b * cos
    return jnp.concatenate(parts, -1).astype(x.dtype)


class MDTPE(nn.Module):
    """MD-TPE (Qin et al., 2024) arXiv:2405.21022: a decaying sum along every axis.

    Along axis a a token takes in those before it, each step away weighed by lambda < 1,
    which makes the order of tokens plain to see. It looks back only, as the author's
    code does, and gives no residual, so it takes the place of the embedding:

        y^a_t = (q_a.k_a) sum_(s<=t along a) lambda_a^(t-s) x_s
        y = sum_a norm_a(y^a) W_a

    dims: the grid, all tokens of it; heads H: each has q_a, k_a [E/H] and one decay,
    and norm_a is of each head's channels, so that little but the sign of q_a.k_a is
    left. decay_param: lambda = sigmoid(p) as in the author's code, or "exp",
    exp(-exp(p)). chunk: tokens of a block of the recurrence; it changes the time, not
    the result.
    """

    dims: tuple[int, ...]
    heads: int = 4
    decay_param: str = "sigmoid"
    chunk: int = 64
    dtype: Any = jnp.float32

    def __post_init__(self):
        _check_grid("MDTPE", self.dims)
        if self.decay_param not in DECAYS:
            raise ValueError(
                f"MDTPE: decay_param={self.decay_param!r}: expected one of {DECAYS}"
            )
        super().__post_init__()

    @nn.compact
    def __call__(self, x):
        """x [B,T,E] -> [B,T,E], T the number of tokens of the grid."""
        b, t, e = x.shape
        if t != math.prod(self.dims) or e % self.heads:
            raise ValueError(
                f"x has shape {x.shape}: expected T={math.prod(self.dims)} tokens of "
                f"{self.dims}, and E a multiple of heads={self.heads}"
            )
        one, normal = (self.heads, e // self.heads), nn.initializers.normal(1.0)
        y = jnp.zeros(x.shape, self.dtype)
        for a in range(len(self.dims)):
            q, k = (self.param(f"{n}_{a}", normal, one, jnp.float32) for n in "qk")
            p = self.param(f"decay_{a}", normal, one[:1], jnp.float32)
            # log lambda, of lambda = exp(-exp(p)) or sigmoid(p)
            by_exp = self.decay_param == "exp"
            log_decay = -jnp.exp(p) if by_exp else jax.nn.log_sigmoid(p)
            grid = x.reshape(b, *self.dims, *one)
            # q.k is one number a head, the gain of the sum along this axis
            mixed = along(
                grid, a, (q * k).sum(-1), log_decay, self.chunk
            )
            mixed = nn.RMSNorm(
                dtype=self.dtype, reduction_axes=-1, feature_axes=(-2, -1),
                name=f"norm_{a}",
            )(mixed)
            dense = nn.Dense(
                e, use_bias=False, dtype=self.dtype, kernel_init=_INIT, name=f"out_{a}"
            )
            # norm_a(y^a) W_a: [B,T,E] [E,E]
            y = y + dense(mixed.reshape(x.shape))
        return y


def along(
    x: jax.Array, axis: int, gain: jax.Array, log_decay: jax.Array, chunk: int = 64
) -> jax.Array:
    """gain sum_(s<=t) exp((t-s) log_decay) x_s along one axis of a grid, float32. x
    [B,*dims,H,V]; axis: of dims; gain, log_decay [H]."""
    # the axis becomes the sequence, all others the batch: [B',T,H,V]
    moved = jnp.moveaxis(x, axis + 1, -3)
    rows = moved.reshape(-1, *moved.shape[-3:]).astype(jnp.float32)
    # linear attention whose q and k are numbers: q = gain, k = 1, v = x
    one = jnp.ones((*rows.shape[:3], 1), jnp.float32)
    scaled = one * gain.astype(jnp.float32)[None, None, :, None]
    o = recurrence(scaled, one, rows, log_decay, chunk=chunk)[1]  # [B',T,H,V]
    return jnp.moveaxis(o.reshape(moved.shape), -3, axis + 1)
