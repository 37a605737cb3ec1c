"""Coins: a sequence of which every token counts, and none more than another.

What a part of it allows is known: the best answer after n of T coins is right in a
share of the rows that follows from n and T alone.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from experiments.data.dataset import Batch, Dataset, row


@dataclasses.dataclass(frozen=True, kw_only=True)
class Majority(Dataset):
    """Coins, and at the end the question which side came up more often.

    tokens [B,T]: T - 1 coins 0 or 1, an odd number, then 2; the target there is the
    side. The chance of 1 is uniform within 1/2 +- `bias` for each row. Of fair coins,
    who sees only the last n can be right in 1/2 + arcsin(sqrt(n/(T-1)))/pi of the rows
    (for many coins: the signs of two correlated normal sums agree as often).
    """

    length: int = 512
    bias: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        self.require("length", self.length % 2 == 0, "an even number")
        self.require("bias", 0 <= self.bias <= 0.5, "0 to 1/2")

    @property
    def vocab(self) -> int:
        """How many token ids there are."""
        return 3

    def draw(self, rng: np.random.Generator, size: int) -> Batch:
        chance = 0.5 + self.bias * rng.uniform(-1, 1, (size, 1))
        coins = (rng.random((size, self.length - 1)) < chance).astype(int)
        side = (2 * coins.sum(1) > self.length - 1)[:, None]
        sequence = np.concatenate([coins, np.full((size, 1), 2), side], 1)
        answers = np.broadcast_to(np.arange(self.length + 1) == self.length,
                                  sequence.shape)
        return row(sequence, answers)

    def best(self, context: int) -> float:
        """The share of right answers that the last `context` tokens allow, of fair
        coins."""
        seen = (min(context, self.length) - 1) / (self.length - 1)
        return 0.5 + float(np.arcsin(seen**0.5)) / np.pi
