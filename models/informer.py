"""Informer (Zhou et al., 2020) arXiv:2012.07436: a long forecast, written at once.

An encoder whose layers halve the sequence between them (distilling: a convolution, ELU,
the maximum of three with stride 2), and a decoder that gets the newest `label` steps
and zeros for the steps asked for, and fills those in one pass.
"""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp

from attn.contract.norm import Norm
from models.block import Block
from models.feed import INIT
from models.places import Places
from models.seq2seq import Decoder, feed, mixer, with_places
from models.stack import check_sizes


class Distil(nn.Module):
    """[B,T,E] -> [B,ceil(T/2),E]: convolution of three steps, norm, ELU, maximum of
    three with stride 2. (The paper's norm is over the batch; this one over channels.)
    """

    @nn.compact
    def __call__(self, x):
        """x [B,T,E] -> [B,ceil(T/2),E]."""
        x = nn.Conv(x.shape[-1], (3,), padding="CIRCULAR", name="conv")(x)
        x = nn.elu(Norm("layer").module(x.dtype, "norm")(x))
        return nn.max_pool(x, (3,), (2,), ((1, 1),))


class Informer(nn.Module):
    """Informer (Zhou et al., 2020) arXiv:2012.07436, small; patterns NS in encoder and
    decoder, NC from decoder to encoder.

    channels C of a series; label: known steps that the decoder begins with; horizon:
    steps asked for. width E, heads H, layers: of encoder and of decoder. (The paper
    masks the decoder's self attention; the benchmark CAB counts it as noncausal, and so
    it is here: the steps asked for are zeros for each other.)
    """

    channels: int = 7
    label: int = 48
    horizon: int = 48
    width: int = 64
    heads: int = 4
    layers: int = 2
    places: Places = Places()

    @nn.compact
    def __call__(self, series):
        """series [B,T,C], T >= label -> the next steps [B,horizon,C]."""
        check_sizes("Informer", self, "channels label horizon width heads layers")
        if series.shape[1] < self.label:
            raise ValueError(f"series have {series.shape[1]} steps: expected label="
                             f"{self.label} or more")
        enter = lambda name, a: with_places(
            nn.Conv(self.width, (3,), padding="CIRCULAR", name=name)(a))
        x = enter("encoder_in", series)
        for n in range(self.layers):
            block = Block(mixer(self.places.at("NS"), self.heads), 0,
                          feed=feed(self.width), norm=Norm("layer"),
                          name=f"encoder_{n}")
            _, x = block(x)
            x = Distil(name=f"distil_{n}")(x) if n < self.layers - 1 else x
        x = Norm("layer").module(x.dtype, "encoder_norm")(x)
        # what is asked for stands behind the label as zeros
        ahead = ((0, 0), (0, self.horizon), (0, 0))
        y = enter("decoder_in", jnp.pad(series[:, -self.label:], ahead))
        y = Decoder(self.places, self.layers, self.heads, "NS", "NC", name="decoder")(
            y, x)
        return nn.Dense(self.channels, kernel_init=INIT, name="out")(
            y[:, self.label:])
