"""Speech from phones: all frames at once, or one after the other.

`FastSpeech`, after FastSpeech 2 (Ren et al., 2020) arXiv:2006.04558: an encoder of
phones, each repeated for as long as a predictor says it lasts, and a decoder of frames;
there is no order, so all frames are made at once. `TransformerTTS` (Li et al., 2018)
arXiv:1809.08895: an encoder of phones and a decoder that reads it and the frames so
far. Both small: no pitch, no energy, no stop symbol, one linear layer to the frames.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from models.feed import INIT
from models.places import Places
from models.seq2seq import Decoder, Encoder, with_places
from models.stack import check_sizes
from models.vocabulary import Embed


def repeated(x: jax.Array, lasts: jax.Array, frames: int) -> jax.Array:
    """x [B,S,E], each token for `lasts` [B,S] frames -> [B,frames,E]: what is longer is
    cut, behind what is shorter the last token goes on."""
    ends = jnp.cumsum(lasts, 1)
    # token n lasts until frame ends_n: as many ends lie at or before frame t
    at = (ends[:, None] <= jnp.arange(frames)[None, :, None]).sum(-1)  # [B,frames]
    at = jnp.minimum(at, x.shape[1] - 1)
    return jnp.take_along_axis(x, at[..., None], 1)


class FastSpeech(nn.Module):
    """FastSpeech 2 (Ren et al., 2020) arXiv:2006.04558, small; pattern NS in encoder
    and decoder.

    phones: ids; frames T of an utterance; bands: numbers of a frame; width E, heads H,
    layers: of encoder and of decoder.
    """

    phones: int = 24
    frames: int = 144
    bands: int = 20
    width: int = 64
    heads: int = 4
    layers: int = 2
    places: Places = Places()

    @nn.compact
    def __call__(self, phones, lasts=None):
        """phones [B,S] int, lasts [B,S] int: frames of each, None for those that are
        predicted -> (frames [B,T,bands], log of how long each phone lasts [B,S])."""
        check_sizes("FastSpeech", self, "phones frames bands width heads layers")
        x = Embed(self.phones, self.width, name="embed")(phones) * self.width**0.5
        x = Encoder(self.places, self.layers, self.heads, name="encoder")(
            with_places(x))
        # two convolutions over phones, as in the paper
        y = x
        for n in range(2):
            y = nn.relu(nn.Conv(self.width, (3,), name=f"lasts_{n}")(y))
        log = nn.Dense(1, kernel_init=INIT, name="lasts")(y)[..., 0]
        if lasts is None:
            lasts = jnp.maximum(jnp.round(jnp.exp(log)), 1).astype(jnp.int32)
        x = with_places(repeated(x, lasts, self.frames))
        x = Encoder(self.places, self.layers, self.heads, name="decoder")(x)
        return nn.Dense(self.bands, kernel_init=INIT, name="bands")(x), log


class TransformerTTS(nn.Module):
    """TransformerTTS (Li et al., 2018) arXiv:1809.08895, small; patterns NS in the
    encoder, CS and CC in the decoder. Fields as in `FastSpeech`. A frame goes into the
    decoder through two layers, as in the paper."""

    phones: int = 24
    bands: int = 20
    width: int = 64
    heads: int = 4
    layers: int = 2
    places: Places = Places()

    def setup(self):
        check_sizes("TransformerTTS", self, "phones bands width heads layers")
        self.embed = Embed(self.phones, self.width)
        self.encoder = Encoder(self.places, self.layers, self.heads)
        self.decoder = Decoder(self.places, self.layers, self.heads)
        self.first = nn.Dense(self.width, kernel_init=INIT)
        self.second = nn.Dense(self.width, kernel_init=INIT)
        self.last = nn.Dense(self.bands, kernel_init=INIT)

    def __call__(self, phones, before):
        """phones [B,S] int, before [B,T,bands]: each frame's one before, zeros first ->
        frames [B,T,bands]."""
        return self.decode(self.encode(phones), before)

    def encode(self, phones):
        """phones [B,S] int -> [B,S,E]."""
        return self.encoder(with_places(self.embed(phones) * self.width**0.5))

    def decode(self, context, before):
        """context [B,S,E], before [B,T,bands] -> frames [B,T,bands]."""
        x = nn.relu(self.second(nn.relu(self.first(before))))
        return self.last(self.decoder(with_places(x), context))
