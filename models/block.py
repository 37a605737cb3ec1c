"""Block: a mixer and a gated MLP, each added to what it was made of."""

from __future__ import annotations

import dataclasses
from typing import Any, Callable

import flax.linen as nn
import jax.numpy as jnp

from attn.contract.norm import Norm
from attn.contract.view import opened
from attn.layers import Layer
from models.feed import Feed
from models.placement import lay


@dataclasses.dataclass(frozen=True)
class Residual:
    """Where a block has its norms, and what it adds to.

    before: norm(x) goes into mixer and MLP; after: what comes out of them is normed
    before it is added. normed: it is added to norm(x) instead of x (DeepNorm's place of
    the norm, as MiniMax has it). mixer, mlp: (a, b) of a x + b y.
    """

    before: bool = True
    after: bool = False
    normed: bool = False
    mixer: tuple[float, float] = (1.0, 1.0)
    mlp: tuple[float, float] = (1.0, 1.0)

    def __post_init__(self):
        if self.normed and not self.before:
            raise ValueError("Residual: normed=True adds to norm(x): expected before")


# what a view calls the parts that a block adds, and the stream around them
SITES = {"mixer": "attn_out", "mlp": "mlp_out"}


class Block(nn.Module):
    """x + mixer(norm(x)), then x + MLP(norm(x)); norms in float32.

    hidden: of a SwiGLU, 0 for none; feed: another description of the MLP, as `Feed`.
    norm, residual: which norms there are, and where.
    """

    mixer: Layer
    hidden: int
    dtype: Any = jnp.float32
    feed: Any = None
    norm: Norm = Norm()
    residual: Residual = Residual()
    sites = ("resid_pre", *SITES.values(), "resid_mid", "resid_post")

    @nn.compact
    def __call__(self, x, state=None, segments=None):
        """x [B,T,E] -> (state, x); the state stays None if none was given."""
        x = opened(self, "resid_pre", x)

        def mix(y):
            y = self.mixer(y, state, segments=segments)
            return (None, y) if state is None else y

        after, x = self._added("mixer", x, mix)
        x = opened(self, "resid_mid", x)
        feed = Feed(self.hidden) if self.feed is None else self.feed
        if feed.hidden:
            mlp = feed.module(self.dtype, "mlp")
            _, x = self._added("mlp", x, lambda y: (None, mlp(y)))
        return after, opened(self, "resid_post", x)

    def _added(self, name: str, x, f: Callable) -> tuple[Any, Any]:
        """The state, and x with f's output, of its norms' places."""
        how = self.residual
        y = self.norm.module(self.dtype, f"{name}_norm")(x) if how.before else x
        base = y if how.normed else x
        state, y = f(y)
        if how.after:
            y = self.norm.module(self.dtype, f"{name}_out_norm")(y)
        a, b = getattr(how, name)
        # no product where there is no factor
        base, y = (m if w == 1 else m * w for m, w in ((base, a), (y, b)))
        return state, lay(base + opened(self, SITES[name], y), "BTE")
