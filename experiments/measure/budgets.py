"""Budgets: attentions that read a share of the pairs, and the share they really read.

A budget is a share of the causal pairs of T tokens. Each method has one knob that says
how much it reads; `METHODS` turns it for a share. What is read is then counted on the
queries and keys of a real network: it is where the matrix of the attention is not 0.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from attn.flexprefill import FlexPrefill
from attn.hip import HiP
from attn.layers import MultiHead
from attn.masks import Causal, Sink, Window
from attn.moba import MoBA
from attn.s2 import S2
from attn.seer import Seer
from attn.seerr import SeerR
from attn.softmax import Softmax
from attn.topk import TopK
from models.generate import stream


@dataclasses.dataclass(frozen=True)
class Budget:
    """A share of the causal pairs of `length` tokens, read in blocks of `block`.

    width: of a head; rope: what turns q and k there, for an attention that learns from
    those that are not turned.
    """

    share: float
    length: int
    block: int
    width: int
    rope: Any = None

    @property
    def keys(self) -> int:
        """n keys a query: n (n + 1) / 2 + (T - n) n is the share of T (T + 1) / 2."""
        t = self.length
        # n^2 - (2 T + 1) n + share T (T + 1) = 0
        half = (2 * t + 1) / 2
        return max(round(half - math.sqrt(half**2 - self.share * t * (t + 1))), 1)

    @property
    def blocks(self) -> int:
        """Blocks a token, its own one among them, of which it reads a half; 0 if that
        is too much."""
        enough = 2 * self.keys >= self.block
        return round(self.keys / self.block + 0.5) if enough else 0


def _window(budget: Budget) -> Softmax:
    return Softmax(mask=Causal() & Window(budget.keys - 1))


def _sinks(budget: Budget) -> Softmax | None:
    near = budget.keys - budget.block
    if near < 1:
        return None
    return Softmax(mask=Causal() & (Window(near - 1) | Sink(budget.block)))


def _s2(budget: Budget) -> S2 | None:
    n = -(-budget.length // budget.block)
    own, others = n, n * (n - 1) / 2  # pairs of blocks
    left = budget.share * (own + others) - own
    if left <= 0:
        return None
    return S2(block=budget.block, local=1, stride=max(round(others / left), 2))


def _top_tokens(budget: Budget) -> TopK:
    return TopK(budget.keys - 1, block=1, sink=0, local=1, prefill="sparse")


def _top_blocks(budget: Budget) -> TopK | None:
    block = budget.block
    # the own block and what is left behind whole ones is local, half a block more
    count = round((budget.keys - 1.5 * block) / block)
    if count < 1:
        return None
    return TopK(count, block=block, sink=0, local=block, prefill="sparse")


def _hip(budget: Budget) -> HiP:
    near = max(budget.keys // 4, 1)
    return HiP(budget.keys - near, block_q=budget.block, block_k=2, window=near)


def _flexprefill(budget: Budget) -> FlexPrefill:
    room = max(round(budget.keys / budget.block + 0.5), 2)
    return FlexPrefill(
        block=budget.block, gamma=0.98, min_budget=budget.block,
        vs_divisor=budget.block, capacity=room)


def _seer(budget: Budget) -> Seer:
    return Seer(
        block=budget.block, gate_dim=budget.width, ratio=budget.share, capacity=None,
        last_dense=False, diagonal=True, rope=budget.rope)


def _moba(budget: Budget) -> MoBA | None:
    n = budget.blocks
    return MoBA(block=budget.block, top_k=n) if n else None


def _seerr(budget: Budget) -> SeerR | None:
    n = budget.blocks
    if not n:
        return None
    return SeerR(block=budget.block, gate_dim=budget.width, budget=n * budget.block,
                 rope=budget.rope)


# None: so little cannot be read by it
METHODS: dict[str, Callable[[Budget], Any]] = {
    "window": _window, "window and sinks": _sinks, "S2": _s2,
    "best tokens": _top_tokens, "best blocks": _top_blocks, "HiP": _hip,
    "FlexPrefill": _flexprefill, "MoBA": _moba, "Seer": _seer, "SeerR": _seerr,
}


@functools.partial(jax.jit, static_argnums=0)
def matrices(model: nn.Module, params: Any, tokens: jax.Array) -> tuple:
    """The matrix [H,T,S] of the attention of each layer with heads, for tokens [1,T]:
    how much of each key's value a query gets."""
    found = []

    def looked_at(following, args, named, context):
        layer, given = context.module, following(*args, **named)
        if isinstance(layer, MultiHead) and context.method_name == "_project":
            q, k, _ = given
            s, heads = k.shape[1:3]
            # values that are 1 at one key each: o [1,T,H,S] is the matrix
            one = jnp.broadcast_to(jnp.eye(s)[None, :, None], (1, s, heads, s))
            found.append(jnp.moveaxis(layer._bound()(q, k, one)[0], 1, 0))
        return given

    with nn.intercept_methods(looked_at):
        model.apply(params, tokens)
    return tuple(found)


@dataclasses.dataclass(frozen=True)
class Streamed:
    """A model that reads texts token by token: what is sparse in a stream alone is so
    from the first token on."""

    model: nn.Module

    def apply(self, params: Any, tokens: jax.Array, segments: Any = None) -> jax.Array:
        """tokens [B,T] -> logits [B,T,vocab]; segments: None."""
        if segments is not None:
            raise NotImplementedError("segments: a stream is one text")
        return stream(self.model, params, tokens, 1)


def as_read(model: nn.Module) -> Any:
    """What is judged: the model, or if it is sparse in a stream alone, that."""
    gated = any(isinstance(a, SeerR) for a in model.attention)
    return Streamed(model) if gated else model


def share_read(model: nn.Module, params: Any, tokens: np.ndarray) -> float:
    """The share of the causal pairs that the attentions of a network read of tokens
    [1,T], the mean over its layers with heads: where their matrices are not 0. Of
    `SeerR`, whose budget says it, in a stream."""
    t = tokens.shape[1]
    for attention in model.attention:
        if isinstance(attention, SeerR):  # all layers are alike
            at, block = np.arange(t), attention.block
            others = max(attention.budget // block, 1) - 1
            read = at % block + 1 + np.minimum(at // block, others) * block
            return float(read.sum() * 2 / t / (t + 1))
    found = [np.asarray(a) != 0 for a in matrices(model, params, jnp.asarray(tokens))]
    # of T^2 pairs, T (T + 1) / 2 are causal
    return float(np.mean([np.tril(a).mean() for a in found])) * 2 * t / (t + 1)
