"""PixelNet: a picture in, a class out, with one attention per layer.

Every pixel, or every square of p x p pixels, is a token; tokens stand row by row. They
are embedded, told where they are by one of three means or by none, pass through blocks
of attention and SwiGLU, and their mean is read by a linear head. Without any means to
tell where, the network is a function of the set of its pixels.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from attn.layers import Layer, MultiHead
from attn.masks import Full
from attn.softmax import Softmax
from models.block import Block
from models.feed import INIT
from models.stack import Layers, Pattern, check_layers, check_sizes, unbound

_TABLE = nn.initializers.normal(0.02)


class PixelNet(nn.Module):
    """A classifier of images: [B,h,w,C] -> logits [B,classes], float32.

    attention: one per layer, any that reads all tokens at once; those without causal
    order see the whole picture; an entry may also be a `Layer` of its own, such as
    `FNet()`. width E, heads H, kv_heads K, head_dim D, value_dim V, hidden: width of
    the SwiGLU (by default 8/3 E up to a multiple of 16; 0 for none).
    patch: pixels of a token's side. Where a token is can be told by `position`, what
    `MultiHead` turns q and k with; by `encoder`, a module [B,T,E] -> [B,T,E] that takes
    the place of the embedding's output; by `table`, a learned vector a place that is
    added. qk_norm, out_norm, out_gate, gate_rank: see `MultiHead`. dtype: of the
    computation; parameters are float32.
    """

    classes: int = 10
    width: int = 32
    attention: tuple = (Softmax(mask=Full()),) * 2
    heads: int = 4
    kv_heads: int | None = None
    head_dim: int | None = None
    value_dim: int | None = None
    hidden: int | None = None
    patch: int = 1
    position: Any = None
    encoder: Any = None
    table: bool = False
    qk_norm: bool = False
    out_norm: str | None = None
    out_gate: str | None = None
    gate_rank: int | None = None
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images):
        """images [B,h,w,C] -> logits [B,classes]; h and w are multiples of `patch`."""
        if not self.attention:
            raise ValueError("PixelNet: attention=(): expected one entry per layer")
        tokens = patches(images, self.patch)
        # [B,T,p p C] [p p C,E]
        x = nn.Dense(self.width, dtype=self.dtype, kernel_init=INIT, name="embed")(
            tokens
        )
        if self.table:
            shape = x.shape[1:]
            places = self.param("places", _TABLE, shape, jnp.float32)
            x = x + places[None].astype(self.dtype)  # [B,T,E] + [1,T,E]
        if self.encoder is not None:
            x = self.encoder(x)
        _, x = Layers(Pattern(self.blocks()), name="layers")(x)
        x = nn.RMSNorm(dtype=self.dtype, name="norm")(x).mean(1)  # [B,T,E] -> [B,E]
        head = nn.Dense(self.classes, dtype=self.dtype, kernel_init=INIT, name="head")
        return head(x).astype(jnp.float32)  # [B,E] [E,classes]

    def blocks(self) -> tuple[Block, ...]:
        """The layers, unbound."""
        sizes = "classes width heads kv_heads head_dim value_dim patch"
        check_sizes("PixelNet", self, sizes)
        check_layers("PixelNet: attention", self.attention)
        # 8/3 E, up to a multiple of 16
        hidden = -(-8 * self.width // 48) * 16 if self.hidden is None else self.hidden
        return tuple(
            Block(
                a if isinstance(a, Layer) else MultiHead(
                    a, self.heads, self.kv_heads, self.head_dim,
                    self.value_dim, position=unbound(self.position),
                    qk_norm=self.qk_norm, out_norm=self.out_norm,
                    out_gate=self.out_gate, gate_rank=self.gate_rank, dtype=self.dtype,
                    parent=None,
                ),
                hidden, self.dtype, parent=None,
            )
            for a in map(unbound, self.attention)
        )


def patches(images: jax.Array, size: int) -> jax.Array:
    """images [B,h,w,C] -> tokens [B,(h/p)(w/p),p p C], row by row, for p = `size`."""
    if images.ndim != 4 or 0 in images.shape:
        raise ValueError(f"images have shape {images.shape}: expected [B,h,w,C]")
    b, h, w, c = images.shape
    if size < 1 or h % size or w % size:
        raise ValueError(
            f"images of {h} x {w} pixels: expected multiples of patch={size}"
        )
    x = images.reshape(b, h // size, size, w // size, size, c)  # [B,h/p,p,w/p,p,C]
    # pixels of a square side by side
    return x.swapaxes(2, 3).reshape(b, -1, size * size * c)
