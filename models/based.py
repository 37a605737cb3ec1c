"""Based (Arora et al., 2024) arXiv:2402.18668: the hybrid language model, as configs.

Three kinds of layers share the work: short gated convolutions, which see the last three
tokens, in most; linear attention over the whole text in a few; softmax over a window of
128 tokens behind the present one in as many. There is no position encoding.

    from models.based import BASED_360M
    params = BASED_360M.init(key, tokens)

Which layers are which, and the widths, are those of the authors' reference models of
360M and "1.3B" parameters; with the head tied to the embedding the second has 1.39
billion here.
"""

from __future__ import annotations

from typing import Any

from attn.based import Based
from attn.baseconv import BaseConv
from attn.masks import Causal, Window
from attn.softmax import Softmax
from models.lm import LM

LINEAR = (1, 6, 11, 16, 21)  # layers of linear attention, from 0
SLIDING = (2, 7, 12, 17, 22)  # layers of windowed softmax
EARLIER = 128  # tokens of the window before the present one: the authors' 256, halved
VOCAB = 50264  # of GPT-2, up to a multiple of 8


def layers(
    depth: int,
    linear: tuple[int, ...] = LINEAR,
    sliding: tuple[int, ...] = SLIDING,
    window: int = EARLIER,
    feature_dim: int = 16,
) -> tuple:
    """The layers of a model, for `LM(attention=...)`: linear and sliding are numbers of
    layers, from 0, and the others are short convolutions. ValueError if a number is
    past `depth` or in both."""
    if both := set(linear) & set(sliding):
        raise ValueError(f"layers {sorted(both)}: expected linear or sliding, not both")
    if past := [n for n in (*linear, *sliding) if not 0 <= n < depth]:
        raise ValueError(f"layers {sorted(past)}: expected 0 to {depth - 1}")
    kinds: dict[int, Any] = {n: Based(feature_dim=feature_dim) for n in linear}
    kinds |= {n: Softmax(mask=Causal() & Window(window)) for n in sliding}
    return tuple(kinds.get(n, BaseConv()) for n in range(depth))


def hybrid(width: int, depth: int, heads: int = 16, vocab: int = VOCAB) -> LM:
    """The model of a width E and depth; its SwiGLU is 2E wide."""
    return LM(
        vocab=vocab, width=width, heads=heads, attention=layers(depth),
        hidden=2 * width, position=None,
    )


BASED_360M = hybrid(1024, 27)
BASED_1B = hybrid(1792, 36)
