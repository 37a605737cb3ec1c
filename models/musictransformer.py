"""Music Transformer (Huang et al., 2018) arXiv:1809.04281: a decoder whose layers know
how far back a token was, and on request where it stands.

It is the `LM` of this library with the paper's parts: relative attention instead of a
rotation, LayerNorm, an MLP with ReLU and biases, and absolute sinusoids that are added
to the tokens' vectors or stand beside them.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from attn.contract.angles import sinusoids
from attn.contract.norm import Norm
from attn.contract.segments import locate
from attn.relative import Relative
from models.feed import INIT, Feed
from models.lm import LM

SINUSOIDS = (None, "add", "concat")


class MusicTransformer(LM):
    """Music Transformer (Huang et al., 2018) arXiv:1809.04281: see `LM` for all other
    fields.

    sinusoids: of the absolute positions; "add": to the tokens' vectors; "concat":
    beside them, and back to E by a matrix; None: relative attention alone knows order.
    The baseline of the paper is `attention=(Softmax(),) * n, sinusoids="add"`.
    """

    vocab: int = 388
    width: int = 256
    attention: tuple = (Relative(),) * 5
    heads: int = 8
    position: Any = None
    norms: Norm = Norm("layer")
    feed: Any = Feed(1024, "relu", gated=False, bias=True)
    sinusoids: str | None = None

    def setup(self):
        if self.sinusoids not in SINUSOIDS:
            raise ValueError(f"MusicTransformer: sinusoids={self.sinusoids!r}: "
                             f"expected one of {SINUSOIDS}")
        super().setup()
        if self.sinusoids == "concat":
            self.join = nn.Dense(
                self.width, use_bias=False, dtype=self.dtype, kernel_init=INIT)

    def _embedded(self, tokens, state, segments):
        x = super()._embedded(tokens, state, segments)
        if self.sinusoids is None:
            return x
        clock = () if state is None else (state[0].end, state[0].segment)
        now = locate(segments, *tokens.shape, *clock)
        places = sinusoids(now.pos, self.width).astype(x.dtype)
        if self.sinusoids == "add":
            return x + places
        return self.join(jnp.concatenate([x, places], -1))  # [B,T,2E] [2E,E]
