"""LM: a decoder-only language model with one attention per layer.

The pattern of layers is data: `LM(attention=(Lightning(),) * 3 + (Softmax(),))` is a
hybrid, and `model.clone(attention=...)` the same network with other attentions; one
that learns nothing adds no parameters, so checkpoints stay valid. State in, state out:
the same call reads a whole text, a piece of one, or one token.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from attn.cmr import CMR
from attn.contract.attention import said
from attn.contract.norm import Norm
from attn.contract.segments import locate
from attn.contract.view import opened
from attn.layers import Layer, MultiHead
from attn.positions import RoPE
from attn.softmax import Softmax
from models.block import Block, Residual
from models.carried import numbered
from models.feed import INIT
from models.placement import lay
from models.stack import Layers, Pattern, check_layers, check_sizes, unbound
from models.vocabulary import Embed


class LM(nn.Module):
    """A language model: tokens [B,T] -> logits [B,T,vocab], float32.

    attention: one per layer; an entry may also be a `Layer` of its own, such as
    `BaseConv()`. width E, heads H, kv_heads K, head_dim D, hidden: width of the SwiGLU
    (by default 8/3 E up to a multiple of 16; 0 for none). position, qk_norm, out_norm,
    out_gate, sinks, use_bias: see `MultiHead`. feed: the MLP, if it is no SwiGLU
    without bias (`Feed`, `Experts`); norms, residual: of the blocks, which norms, and
    where. Of position, feed and residual a tuple has one a layer.

    learned: so many positions have a vector of their own, which is added to the
    token's. embed_scale: what tokens' vectors are multiplied with; softcap: logits are
    softcap tanh(logits / softcap). tied: the head is the embedding. source: the
    `config.json` that `models.checkpoint` made it from. memory: of hidden states, a
    `CMR`, whose parameters are beside those of the layers; segments of a text end at
    multiples of its `segment`, counted in each sequence, whatever the padding and the
    pieces that it comes in. dtype: of the computation,
    parameters are float32, or what a checkpoint has. With layers that read tokens of
    their own among the text (`Landmark`), these go in and their outputs are left out,
    so that the model stays a function of the text.
    """

    vocab: int = 256
    width: int = 128
    attention: tuple = (Softmax(),)
    heads: int = 4
    kv_heads: int | None = None
    head_dim: int | None = None
    hidden: int | None = None
    position: Any = RoPE()
    qk_norm: bool | str = False
    out_norm: str | None = None
    out_gate: str | None = None
    sinks: bool = False
    use_bias: bool | str = False
    feed: Any = None
    norms: Norm = Norm()
    residual: Any = Residual()
    learned: int | None = None
    embed_scale: float | None = None
    softcap: float | None = None
    tied: bool = True
    source: Any = None
    memory: Any = None
    scan: bool = False
    remat: bool = False
    dtype: Any = jnp.float32
    sites = ("embed", "final", "logits")  # that a view may ask for

    def setup(self):
        if not self.attention:
            raise ValueError("LM: attention=(): expected one entry per layer")
        blocks = self.blocks()
        if self.head_dim is None and self.width % self.heads:
            raise ValueError(
                f"LM: width={self.width}: expected a multiple of heads={self.heads}"
            )
        more = 1 if self.interleaving else 0  # an id for the attention's own token
        self.embed = Embed(self.vocab + more, self.width, self.dtype)
        if self.learned:
            self.positions = Embed(self.learned, self.width, self.dtype)
        self.layers = Layers(
            Pattern(blocks), self.scan, self.remat, self._memory(),
            Pattern(self.blocks(number=False)) if self.scan else None)
        self.norm = self.norms.module(self.dtype)
        if not self.tied:
            self.head = nn.Dense(
                self.vocab, use_bias=False, dtype=self.dtype, kernel_init=INIT
            )

    @property
    def interleaving(self) -> Any:
        """The attention that puts tokens of its own into the text, None if none does.
        """
        asked = ((said(a, "text_block"), a) for a in self.attention)
        found = {block: a for block, a in asked if block}
        if len(found) > 1:
            names = "/".join(sorted({type(a).__name__ for a in found.values()}))
            raise ValueError(f"LM: {names} blocks {sorted(found)}: expected one size")
        return next(iter(found.values()), None)

    def blocks(self, number: bool = True) -> tuple[Block, ...]:
        """The layers, unbound. number: attentions that ask have that of their layer.
        """
        check_sizes("LM", self, "vocab width heads kv_heads head_dim learned")
        check_layers("LM: attention", self.attention)
        # 8/3 E, up to a multiple of 16
        hidden = -(-8 * self.width // 48) * 16 if self.hidden is None else self.hidden
        entries = tuple(map(unbound, self.attention))
        parts = zip(
            numbered(entries) if number else entries, self._each("position"),
            self._each("feed"), self._each("residual"),
        )
        return tuple(
            Block(
                a if isinstance(a, Layer) else MultiHead(
                    a, self.heads, self.kv_heads, self.head_dim,
                    position=unbound(position), qk_norm=self.qk_norm,
                    sinks=self.sinks, out_norm=self.out_norm, out_gate=self.out_gate,
                    norm=self.norms, use_bias=self.use_bias, dtype=self.dtype,
                    parent=None,
                ),
                hidden, self.dtype, feed, self.norms, residual, parent=None,
            )
            for a, position, feed, residual in parts
        )

    def _each(self, name: str) -> tuple:
        """A field that is one for all layers or a tuple of one a layer, as a tuple."""
        value, layers = getattr(self, name), len(self.attention)
        if not isinstance(value, tuple):
            return (value,) * layers
        if len(value) != layers:
            raise ValueError(
                f"LM: {name} has {len(value)} entries: expected one for each of the "
                f"{layers} layers"
            )
        return value

    def __call__(self, tokens, state=None, *, segments=None, at=None):
        """tokens [B,T] int -> logits [B,T,vocab]; with a state: (state, logits).

        segments [B,T]: packed sequences, 0 is padding. at [B]: only the logits of the
        token with this index, [B,vocab].
        """
        if tokens.ndim != 2 or 0 in tokens.shape:
            raise ValueError(f"tokens have shape {tokens.shape}: expected [B,T], T > 0")
        if self.learned and tokens.shape[1] > self.learned:
            raise ValueError(f"tokens have shape {tokens.shape}: expected at most "
                             f"learned={self.learned} of a row")
        index = None
        if self.interleaving:
            # all layers have read the same tokens: the first one's clock is theirs
            clock = (None, None) if state is None else (state[0].end, state[0].segment)
            tokens, segments, index = self.interleaving.interleave(
                tokens, segments, *clock, own=self.vocab
            )
        x = lay(self._embedded(tokens, state, segments), "BTE")  # [B,T] -> [B,T,E]
        after, x = self.layers(opened(self, "embed", x), state, segments)
        x = opened(self, "final", x)
        if index is not None:
            # the outputs of the text alone: [B,T',E] -> [B,T,E]
            x = jnp.take_along_axis(x, index[..., None], 1)
        if at is not None:
            x = jnp.take_along_axis(x, at[:, None, None], 1)[:, 0]  # [B,T,E] -> [B,E]
        x = self.norm(x)
        # [B,T,E] [E,vocab]; the attention's own token is never predicted
        logits = self.embed.attend(x)[..., : self.vocab] if self.tied else self.head(x)
        logits = logits.astype(jnp.float32)
        if self.softcap is not None:
            logits = self.softcap * jnp.tanh(logits / self.softcap)
        logits = opened(self, "logits", logits)
        logits = lay(logits, "BTN" if at is None else "BN")
        return logits if state is None else (after, logits)

    def _embedded(self, tokens, state, segments):
        """The vectors [B,T,E] of tokens [B,T], with those of their positions."""
        x = self.embed(tokens)
        if self.embed_scale is not None:
            # in the dtype of the vectors, as the models were trained
            x = x * jnp.asarray(self.embed_scale, x.dtype)
        if not self.learned:
            return x
        clock = () if state is None else (state[0].end, state[0].segment)
        now = locate(segments, *tokens.shape, *clock)
        return x + self.positions(jnp.minimum(now.pos, self.learned - 1))

    def init_state(self, size: int, tokens: Any) -> tuple:
        """Empty memories for `size` tokens, one per layer. tokens [B,T]: the coming
        ones (the prompt), shapes only. Needs no parameters."""
        b, t = tokens.shape
        if self.interleaving:
            block = self.interleaving.text_block
            size, t = (n + n // block + 1 for n in (size, t))
        x = jax.ShapeDtypeStruct((b, t, self.width), self.dtype)
        layers = Layers(Pattern(self.blocks()), memory=self._memory(), parent=None)
        return layers.init_states(size, x)

    def _memory(self) -> Any:
        """The memory, unbound; ValueError unless it is made for this network."""
        if self.memory is None:
            return None
        if not isinstance(self.memory, CMR):
            raise ValueError(f"LM: memory={self.memory!r}: expected a CMR, or None")
        if self.memory.features != self.width:
            raise ValueError(f"LM: memory of features={self.memory.features}: expected "
                             f"the width, {self.width}")
        self.memory.places(len(self.attention))
        return unbound(self.memory)


def state_bytes(model: Any, size: int, prompt: int | None = None) -> int:
    """Bytes of memory per sequence for `size` tokens, of all layers, of which the first
    `prompt` (by default all) come as one piece."""
    tokens = jax.ShapeDtypeStruct((1, size if prompt is None else prompt), jnp.int32)
    state = jax.eval_shape(lambda: model.init_state(size, tokens))
    return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(state))


def loss(logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cross entropy in nats: (sum, count) over targets [B,T] or [B] >= 0, from logits
    [...,vocab]; -1 has no loss. A target beyond the vocabulary is a ValueError, or NaN
    where it has no value yet."""
    vocab = logits.shape[-1]
    if not isinstance(targets, jax.core.Tracer) and (
        getattr(targets, "is_fully_addressable", True)
    ):
        most = np.asarray(targets).max(initial=-1)
        if most >= vocab:
            raise ValueError(f"targets hold {most}: expected ids below {vocab}, or -1 "
                             "for no loss")
    real, logits = targets >= 0, logits.astype(jnp.float32)
    # a comparison, not an index: where the vocabulary is split, sums are all that moves
    ids = jnp.arange(vocab).reshape((1,) * targets.ndim + (-1,))
    own = jnp.where(ids == targets[..., None], logits, 0).sum(-1)
    nats = jax.nn.logsumexp(logits, -1) - own  # -log p(target)
    nats = jnp.where(targets < vocab, nats, jnp.nan)
    return jnp.where(real, nats, 0).sum(), real.sum()
