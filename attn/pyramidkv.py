"""PyramidKV (Cai et al., 2024) arXiv:2406.02069: early layers keep more than late ones.

Early layers of a language model spread their attention over the whole prompt, late ones
gather it on few tokens. So a budget that all layers share is given out as a pyramid:
the number of keys falls from layer to layer by equal steps, and each layer chooses its
own as SnapKV does, by the votes of the prompt's last queries.

    k_0 - k_(L-1) = (L - 1) step,   k_(L-1) about (C - W) / beta,   k_l = k_0 - l step
    kept in layer l = top_(k_l) of the pooled votes, and the window W

Of a prompt of S tokens with fewer than k_0 before its window, the pyramid is as flat as
makes k_0 fit. In the mean over layers it is about C - W keys (steps are whole numbers).
Nothing is learned. A layer's budget follows from its number and the prompt's length,
padding included: of a prompt that comes in pieces, from the length of the piece (our
choice), so that pieces no longer than C keep C in every layer.
"""

from __future__ import annotations

import dataclasses

from attn.cache.votes import Voting
from attn.contract.attention import MASKED, TemplateRow
from attn.contract.fields import check_fields
from attn.softmax import Softmax


@dataclasses.dataclass(frozen=True)
class PyramidKV(Voting, Softmax):
    """PyramidKV (Cai et al., 2024) arXiv:2406.02069: SnapKV with a budget a layer.

    capacity C: tokens of the prompt that a layer keeps in the mean, `window` W of them
    the last ones; beta: how pointed the pyramid is; layer: the number of this layer of
    `layers`, from 0. `PyramidKV(layers=8).stack()` is the tuple of a model's
    attentions. The other fields are those of `SnapKV`.
    """

    capacity: int = 320
    window: int = 64
    kernel: int = 5
    pool: str = "avg"
    beta: int = 20  # the authors'
    layers: int | None = None
    layer: int = 0
    share_group: bool = True
    row = TemplateRow(MASKED, "L^2 D, then r D a token", 2)

    def __post_init__(self):
        super().__post_init__()
        self.check_voting()
        check_fields(self, least={"beta": 1, "layers": 1, "layer": 0})
        if self.layer >= (self.layers or 1):
            raise ValueError(
                f"PyramidKV: layer={self.layer} of layers={self.layers}: expected a "
                "number below"
            )

    def of_layer(self, n: int, layers: int) -> PyramidKV:
        """This policy in layer n of `layers`, unless it says itself where it is."""
        if self.layers is not None:
            return self
        return dataclasses.replace(self, layer=n, layers=layers)

    def stack(self) -> tuple[PyramidKV, ...]:
        """One attention for each layer of a model."""
        many = self.layers or 1
        return tuple(dataclasses.replace(self, layer=n) for n in range(many))

    def kept_of(self, prompt: int) -> int:
        """Tokens of a prompt that this layer keeps, the window included."""
        return self.window + budgets(
            prompt, self.capacity, self.window, self.beta, self.layers or 1)[self.layer]


def budgets(
    prompt: int, capacity: int, window: int, beta: int, layers: int
) -> tuple[int, ...]:
    """How many keys before the window each layer keeps of a prompt of so many tokens;
    the same for all of one that is no longer than `capacity`."""
    mean, there = capacity - window, prompt - window  # C - W, S - W
    if prompt <= capacity:
        return (mean,) * layers
    # k of the last layer, and of the first, with `mean` in the mean of both
    low = mean // beta
    high = 2 * mean - low
    # no more than there is: the pyramid is flatter
    if high >= there:
        high, low = there, 2 * mean - there
    # k_l = k_0 - l step
    step = (high - low) // (layers - 1) if layers > 1 else 0
    # a single layer has the mean
    high = high if layers > 1 else mean
    return tuple(high - n * step for n in range(layers))
