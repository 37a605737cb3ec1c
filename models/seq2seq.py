"""Sequence to sequence: an encoder, and a decoder that reads what it made.

The Transformer (Vaswani et al., 2017) arXiv:1706.03762, with norms before each part and
absolute sinusoids that are added to the inputs, so that any attention of the library
can stand at any place that its patterns allow (`models/places.py`). Its parts serve the
other networks of the benchmark CAB; `Seq2Seq` itself is the one that summarises.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from attn.contract.angles import sinusoids
from attn.contract.norm import Norm
from attn.layers import MultiHead
from models.block import Block
from models.feed import INIT, Feed
from models.places import Places
from models.stack import Layers, Pattern, check_sizes, stack
from models.vocabulary import Embed

NORM = Norm("layer")


def mixer(attention: Any, heads: int) -> MultiHead:
    """Multi-head attention as in the paper: biases, no rotation."""
    return MultiHead(attention, heads, position=None, use_bias=True, parent=None)


def feed(width: int) -> Feed:
    """The MLP of the paper, twice as wide as the network."""
    return Feed(2 * width, "relu", gated=False, bias=True)


def with_places(x):
    """x [B,T,E] and the sinusoids of its positions, 0 to T - 1."""
    return x + sinusoids(jnp.arange(x.shape[1]), x.shape[2])[None].astype(x.dtype)


class Encoder(nn.Module):
    """`layers` blocks of self attention (pattern NS unless another is named), and a
    norm."""

    places: Places
    layers: int = 2
    heads: int = 4
    pattern: str = "NS"

    @nn.compact
    def __call__(self, x):
        """x [B,T,E] -> [B,T,E]."""
        blocks = tuple(
            Block(mixer(self.places.at(self.pattern), self.heads), 0,
                  feed=feed(x.shape[-1]), norm=NORM, parent=None)
            for _ in range(self.layers))
        _, x = Layers(Pattern(blocks), scan=True, name="layers")(x)
        return NORM.module(x.dtype, "norm")(x)


class DecoderBlock(nn.Module):
    """x + self(norm x), then x + cross(norm x, context), then x + MLP(norm x); own,
    cross: the patterns of both attentions."""

    places: Places
    heads: int
    own: str = "CS"
    cross: str = "CC"

    @nn.compact
    def __call__(self, x, context):
        """x [B,T,E], context [B,S,E] -> [B,T,E]."""
        norm = lambda name: NORM.module(x.dtype, f"{name}_norm")(x)
        own = mixer(self.places.at(self.own), self.heads)
        x = x + own.clone(parent=self, name="own")(norm("own"))
        cross = mixer(self.places.at(self.cross), self.heads)
        x = x + cross.clone(parent=self, name="cross")(norm("cross"), context=context)
        return x + feed(x.shape[-1]).module(x.dtype, "mlp")(norm("mlp"))


class Decoder(nn.Module):
    """`layers` of `DecoderBlock`, one program for all of them, and a norm."""

    places: Places
    layers: int = 2
    heads: int = 4
    own: str = "CS"
    cross: str = "CC"

    @nn.compact
    def __call__(self, x, context):
        """x [B,T,E], context [B,S,E] -> [B,T,E]."""
        block = DecoderBlock(
            self.places, self.heads, self.own, self.cross, parent=None)
        if self.is_initializing():
            for n in range(self.layers):
                x = block.clone(parent=self, name=f"layer_{n}")(x, context)
        else:
            each = {name: stack({n: one for n, one in own.items() if n != "norm"}, 1)
                    for name, own in self.variables.items()}  # leaves [layers,...]
            own = {name: one["layer_0"] for name, one in each.items()}
            x, _ = jax.lax.scan(
                lambda x, own: (block.apply(own, x, context), None), x, own)
        return NORM.module(x.dtype, "norm")(x)


class Seq2Seq(nn.Module):
    """Tokens of a text and of what is written so far -> logits of what follows, for
    summarisation; patterns NS, CS and CC.

    vocab: ids, of which 0 is the start symbol. width E, heads H, layers: of encoder and
    of decoder. One table embeds both sequences and is the head.
    """

    vocab: int
    width: int = 64
    heads: int = 4
    layers: int = 2
    places: Places = Places()

    def setup(self):
        check_sizes("Seq2Seq", self, "vocab width heads layers")
        self.embed = Embed(self.vocab, self.width)
        self.encoder = Encoder(self.places, self.layers, self.heads)
        self.decoder = Decoder(self.places, self.layers, self.heads)

    def __call__(self, source, before):
        """source [B,S] int, before [B,T] int: each answer's token before -> logits
        [B,T,vocab], float32."""
        return self.decode(self.encode(source), before)

    def encode(self, source):
        """source [B,S] int -> [B,S,E]."""
        return self.encoder(with_places(self._embedded(source)))

    def decode(self, context, before):
        """context [B,S,E], before [B,T] int -> logits [B,T,vocab]."""
        x = self.decoder(with_places(self._embedded(before)), context)
        return self.embed.attend(x).astype(jnp.float32)

    def _embedded(self, tokens):
        return self.embed(tokens) * self.width**0.5  # section 3.4


class MaskedLM(nn.Module):
    """RoBERTa (Liu et al., 2019) arXiv:1907.11692, small: tokens of which some are
    masked -> logits of all; pattern NS.

    vocab: ids without the mask's, which is `vocab` itself.
    """

    vocab: int = 256
    width: int = 64
    heads: int = 4
    layers: int = 2
    places: Places = Places()

    @nn.compact
    def __call__(self, tokens):
        """tokens [B,T] int -> logits [B,T,vocab], float32."""
        check_sizes("MaskedLM", self, "vocab width heads layers")
        x = Embed(self.vocab + 1, self.width, name="embed")(tokens)
        x = Encoder(self.places, self.layers, self.heads, name="encoder")(
            with_places(x * self.width**0.5))
        return nn.Dense(self.vocab, kernel_init=INIT, name="head")(x).astype(
            jnp.float32)
