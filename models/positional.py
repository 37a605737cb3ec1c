"""A network that executes algorithms on lists of numbers, with weights of positions or
of content (Back De Luca et al., 2024) arXiv:2410.01686.

A layer is an MLP of a token beside what it attends to, [x ; attention(x)]: there is no
residual connection and no norm, so that numbers of any size go through alike.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from attn.layers import MultiHead
from attn.masks import Full
from attn.positional import Positional
from attn.softmax import Softmax

_XAVIER = nn.initializers.xavier_uniform()


def _torch_bound(key, shape, dtype, fan_in: int | None = None) -> jax.Array:
    """Uniform within fan_in^-0.5, as torch draws the weights of a Linear."""
    bound = (fan_in or shape[0]) ** -0.5
    return jax.random.uniform(key, shape, dtype, -bound, bound)


class Linear(nn.Module):
    """x W + b with both drawn uniform within fan_in^-0.5."""

    features: int

    @nn.compact
    def __call__(self, x):
        """x [...,F] -> [...,features]."""
        def bias(key, shape, dtype):
            return _torch_bound(key, shape, dtype, x.shape[-1])

        return nn.Dense(self.features, kernel_init=_torch_bound, bias_init=bias)(x)


class Beside(nn.Module):
    """MLP([x ; attention(x)]): Linear and ReLU in turn, `depth` Linears in all."""

    attention: Any
    heads: int
    hidden: int
    depth: int = 2
    head_dim: int | None = None
    position: Any = None

    @nn.compact
    def __call__(self, x):
        """x [B,T,E] -> [B,T,E]."""
        e = x.shape[-1]
        y = MultiHead(
            self.attention, self.heads, head_dim=self.head_dim,
            value_dim=e // self.heads, position=self.position, use_bias=True,
            name="mixer",
        )(x)
        y = jnp.concatenate([x, y], -1)  # [B,T,2E]
        for n in range(self.depth - 1):
            y = nn.relu(Linear(self.hidden, name=f"mlp_{n}")(y))
        return Linear(e, name=f"mlp_{self.depth - 1}")(y)


class PositionalTransformer(nn.Module):
    """Numbers [B,n,d_in] -> [B,n,outputs], float32.

    attention: one a layer, of layers that each have parameters of their own.
    `Positional(length)` has the numbers alone as its input; one that reads content, as
    `Softmax(mask=Full())`, is told positions by a one-hot vector behind them (`onehot`,
    how long), or by a rotation (`position=RoPE()`). width E, heads H; head_dim of q and
    k, E in each head of the authors' standard network; hidden, depth: of the MLPs.
    """

    attention: tuple = (Positional(9),) * 4
    width: int = 64
    heads: int = 2
    hidden: int = 64
    depth: int = 2
    outputs: int = 1
    head_dim: int | None = None
    onehot: int = 0
    position: Any = None

    @nn.compact
    def __call__(self, x):
        """x [B,n,d_in] -> [B,n,outputs]."""
        if self.onehot and x.shape[1] != self.onehot:
            raise ValueError(
                f"x has {x.shape[1]} tokens: expected onehot={self.onehot}")
        if self.onehot:
            place = jnp.broadcast_to(jnp.eye(self.onehot)[None], (
                x.shape[0], self.onehot, self.onehot))
            x = jnp.concatenate([x, place], -1)
        x = Linear(self.width, name="encoding")(x)
        for n, attention in enumerate(self.attention):
            if isinstance(attention, nn.Module):
                attention = attention.clone(parent=None)
            x = Beside(
                attention, self.heads, self.hidden, self.depth, self.head_dim,
                self.position, name=f"layer_{n}",
            )(x)
        return Linear(self.outputs, name="decoding")(x)


def depth_for(n: int) -> int:
    """Layers for lists of n numbers: floor(log2 n) + 1."""
    return n.bit_length()


def positional(n: int, scratch: int = 1, layers: int | None = None,
               **sizes: Any) -> PositionalTransformer:
    """The network whose weights are of positions, for lists of n numbers and `scratch`
    tokens behind them."""
    own = Positional(n + scratch, scratch)
    return PositionalTransformer((own,) * (layers or depth_for(n)), **sizes)


def standard(n: int, scratch: int = 1, layers: int | None = None,
             **sizes: Any) -> PositionalTransformer:
    """The authors' baseline: content attends to content, positions are one-hot."""
    width = sizes.get("width", 64)
    return PositionalTransformer(
        (Softmax(mask=Full()),) * (layers or depth_for(n)), onehot=n + scratch,
        head_dim=width, **sizes)
