"""StreamingLLM (Xiao et al., 2023) arXiv:2309.17453: sinks, and the last tokens.

A model that is trained on a window of text fails when the first tokens leave its cache:
softmax has to put its weight somewhere, and learns to put it on the first tokens, the
sinks. So the first `sinks` tokens stay in the cache for ever, beside the last `window`
ones, and positions count by slot of the cache: no distance is longer than the cache, so
that text of any length is read within lengths that the model knows.

    seen by token t:  j < sinks  or  t - j < window        (sinks + window keys)
    position of key j: j if j < sinks else j - (t + 1 - sinks - window)

A prompt is read exactly and then cut (the authors feed it token by token). Memory is
constant. Nothing is learned.
"""

from __future__ import annotations

import dataclasses

from attn.cache.rolling import Rolling, Turned
from attn.contract.attention import MASKED, TemplateRow
from attn.contract.fields import check_fields
from attn.positions import RoPE
from attn.softmax import Softmax


@dataclasses.dataclass(frozen=True)
class Streaming(Rolling, Turned, Softmax):
    """StreamingLLM (Xiao et al., 2023) arXiv:2309.17453: attention sinks and a window.

    sinks: first tokens that stay; window: last ones, the token itself included. rope:
    the rotation, which `MultiHead` hands over, as keys are cached before it and turned
    to their slots; rebase=False keeps true positions (the variant without shift). The
    other fields are those of `Softmax`.
    """

    sinks: int = 4
    window: int = 1020
    rebase: bool = True
    rope: RoPE | None = None
    row = TemplateRow(MASKED, "L^2 D, then r D a token", 2)

    def __post_init__(self):
        super().__post_init__()
        check_fields(self, least={"sinks": 0, "window": 1})
