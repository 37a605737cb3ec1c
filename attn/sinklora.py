"""SinkLoRA (Zhang, 2024) arXiv:2406.05678: short attention to fine-tune long models.

A model of short texts is extended to long ones by fine-tuning with attention inside
groups of tokens, cheap and close to what it knows, while some heads have their groups
shifted by half a group, so that what groups say travels on. S2-Attn of LongLoRA (Chen
et al., 2023, arXiv:2309.12307) shifts half of the heads. SinkLoRA returns half of those
to their place (segmentation and reassembly) and lets all tokens see the first few, the
sinks ("SF-Attn"). Afterwards the model reads with exact attention, or, as SF-Attn is an
attention of bounded reach, as a stream of a group and the sinks.

All of it is one mask (`Groups`), read by exact attention, which skips what it hides.
`models/lora.py` has the adapters.
"""

from __future__ import annotations

import dataclasses

from attn.contract.attention import MASKED, Attention, TemplateRow
from attn.contract.fields import check_fields
from attn.contract.shapes import check
from attn.masks import Mask, Reach
from attn.parallel.exchange import EXCHANGES
from attn.parallel.sharding import Axis
from attn.softmax import Softmax

SINK, FLASH, ROLL = "sf", "flash", "roll"


@dataclasses.dataclass(frozen=True)
class Groups(Mask):
    """Tokens see their group of `size`, and the first `sinks` ones. Heads from
    `shifted` on have groups that begin half a group later, the first half by itself.
    causal: no later token; without it the sinks see everything, too.

    length: groups of shifted heads wrap around a text of so many tokens, in the order
    in which they are rolled, and see as sinks nothing.
    """

    size: int
    shifted: int
    sinks: int = 0
    causal_order: bool = True
    length: int | None = None

    def __call__(self, h, i, j):
        late = h >= self.shifted
        own = self._together(0, i, j) & (late ^ True) | (
            self._together(self.size // 2, i, j) & late)
        if self.length is not None:
            return own
        seen = own | (j < self.sinks)
        # in a decoder sinks see no later token either
        return seen & (j <= i) if self.causal_order else seen | (i < self.sinks)

    def _together(self, half: int, i, j):
        """Whether tokens are in one group, of groups that begin so much later."""
        if self.length is None:
            # of shifted heads the first group is a half
            return (i + half) // self.size == (j + half) // self.size
        # rolled back: the end of the text stands beside its start
        i, j = (i - half) % self.length, (j - half) % self.length
        return (i // self.size == j // self.size) & (j <= i)

    def bounds(self, i, j):
        (i0, i1), (j0, j1), size = i, j, self.size
        some, every = j0 < self.sinks, j1 < self.sinks
        alike = every ^ True | every  # True, as wide as both
        for half in (0, size // 2):
            # the groups of the first and last query, and of the first and last key
            a0, a1, b0, b1 = ((a + half) // size for a in (i0, i1, j0, j1))
            some = some | (a0 <= b1) & (b0 <= a1)
            alike = alike & (a0 == a1) & (b0 == b1) & (a0 == b0)
        every = every | alike
        if self.length is not None:
            # the first half group of shifted heads, and the end of the text
            around = (i0 < size // 2) & (j1 >= self.length - size // 2)
            return some & (j0 <= i1) | around, every & (every ^ True)
        if self.causal_order:
            return some & (j0 <= i1), every & (j1 <= i0)
        return some | (i0 < self.sinks), every | (i1 < self.sinks)

    def reach(self):
        if self.length is not None:
            return super().reach()
        # a group begins size - 1 tokens back at most, shifted or not
        return Reach(self.size - 1, self.sinks)


@dataclasses.dataclass(frozen=True)
class SinkLoRA(Attention):
    """SinkLoRA (Zhang, 2024) arXiv:2406.05678: groups of tokens, some of them shifted,
    and sinks.

    form: "sf", SF-Attn; "flash", S2-Attn as LongLoRA runs it, in which the first and
    the last shifted group are halves; "roll", S2-Attn by rolling tokens. group: tokens,
    an even number, 2,048 as LongLoRA has for 8,192; None for `ratio` of the text's.
    shifted: heads, the last ones; None for a quarter ("sf"), or half ("flash", "roll";
    of an odd number the greater half). sinks: the first tokens, which all see ("sf").

    **"roll" lets the first half group of shifted heads see the end of the text**, as
    LongLoRA's code without flash attention does: a later token changes earlier outputs.
    It has no stream and takes no packed rows.

    How much SF-Attn shifts was not found (the paper shows it in pictures): a quarter,
    and groups that do not wrap around, is proposed here. So are packed rows: groups,
    shifts and sinks count from the beginning of each sequence.
    """

    group: int | None = 2048
    ratio: float = 0.25
    form: str = SINK
    shifted: int | None = None
    sinks: int = 4
    causal: bool = True
    scale: float | None = None
    axis: Axis | None = None
    exchange: str = "gather"
    implementation: str | None = None
    crosses = False
    row = TemplateRow(MASKED, "L (w + s) D", 1)

    def __post_init__(self):
        check_fields(
            self, least={"group": 2, "shifted": 0, "sinks": 0}, above={"ratio": 0},
            choices={"form": (SINK, FLASH, ROLL), "exchange": EXCHANGES})
        if self.group is not None and self.group % 2:
            raise ValueError(
                f"SinkLoRA: group={self.group}: expected an even number of tokens")
        if self.form == ROLL and not self.causal:
            raise ValueError(
                "SinkLoRA: form='roll', causal=False: expected form='sf' or 'flash'")

    def mask(self, heads: int, tokens: int | None = None) -> Mask:
        """What each of H heads sees of a text of so many tokens."""
        size = self.group
        if size is None:
            if tokens is None:
                raise ValueError(
                    "SinkLoRA: group=None: expected a number of tokens for a stream")
            size = int(tokens * self.ratio)  # LongLoRA's group_size_ratio
            if size < 2 or size % 2:
                raise ValueError(
                    f"SinkLoRA: a group of {size} tokens of {tokens}, ratio="
                    f"{self.ratio}: expected an even number, or group=")
        # SF-Attn shifts a quarter of the heads, S2-Attn the greater half
        few = heads // 4 if self.form == SINK else heads - heads // 2
        few = few if self.shifted is None else min(self.shifted, heads)
        sinks = self.sinks if self.form == SINK else 0
        if self.form != ROLL:
            return Groups(size, heads - few, sinks, self.causal)
        if tokens is None:
            raise NotImplementedError(
                "form='roll' lets tokens see later ones: no stream")
        if tokens % size:
            raise ValueError(
                f"{tokens} tokens in groups of {size}: expected a multiple, as "
                "form='roll' wraps around")
        return Groups(size, heads - few, 0, True, tokens)

    def __call__(self, q, k, v, *, x=None, segments=None):
        """All tokens at once. q [B,T,H,D], k [B,T,K,D], v [B,T,K,V] -> [B,T,H,V]."""
        check(q, k, v, segments=segments, aligned=True)
        if self.form == ROLL and segments is not None:
            raise NotImplementedError(
                "segments with form='roll': groups would wrap around the row, expected "
                "form='sf' or 'flash'")
        return self._exact(q, q.shape[1])(q, k, v, segments=segments)

    def init_state(self, size, q, k, v, *, x=None):
        """An empty memory for `size` tokens: a ring of a group and the sinks."""
        self.check_stream()
        return self._exact(q).init_state(size, q, k, v)

    def step(self, state, q, k, v, *, x=None, segments=None):
        """The next T tokens -> state, [B,T,H,V]."""
        self.check_stream()
        return self._exact(q).step(state, q, k, v, segments=segments)

    def _exact(self, q, tokens: int | None = None) -> Softmax:
        return Softmax(
            self.mask(q.shape[2], tokens), self.scale, axis=self.axis,
            exchange=self.exchange, implementation=self.implementation)
