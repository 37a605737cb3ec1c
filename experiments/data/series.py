"""Series, synthetic: hourly numbers with a day, a week, a trend and noise.

They stand for the three sets of the benchmark CAB (temperature of transformers,
weather, electricity), as three kinds which differ in what is regular and how much not.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from experiments.data.dataset import Batch, Dataset

CHANNELS = 7
# of each kind: heights of the day's and the week's wave, of the trend, of the noise
KINDS = {"transformer": (1.0, 0.5, 0.6, 0.5), "weather": (0.6, 0.1, 1.0, 0.6),
         "electricity": (1.2, 1.0, 0.2, 0.3)}
AR = 1.2, -0.4  # of the noise: n_t = 1.2 n_(t-1) - 0.4 n_(t-2) + e_t


@dataclasses.dataclass(frozen=True, kw_only=True)
class Series(Dataset):
    """`length` known steps and `horizon` steps behind them of seven channels, each
    standardised by what is known of it; the kinds of `KINDS` stand row after row.

    past [B,length,7], future [B,horizon,7] float32; kind [B] int32.
    """

    length: int = 96
    horizon: int = 48

    def __post_init__(self):
        super().__post_init__()
        self.require("horizon", self.horizon >= 1, "1 or more")

    def draw(self, rng: np.random.Generator, size: int) -> Batch:
        steps = self.length + self.horizon
        kind = np.arange(size) % len(KINDS)
        day, week, trend, noise = (
            np.array([one[n] for one in KINDS.values()])[kind][:, None, None]
            for n in range(4))
        hour = rng.integers(24 * 7, size=(size, 1, 1)) + np.arange(steps)[:, None]
        phase = lambda: rng.uniform(0, 2 * np.pi, (size, 1, CHANNELS))
        height = lambda: rng.uniform(0.5, 1.5, (size, 1, CHANNELS))
        turn = 2 * np.pi * hour
        x = day * height() * (np.sin(turn / 24 + phase())
                              + 0.4 * np.sin(turn / 12 + phase()))
        x = x + week * height() * np.sin(turn / 168 + phase())
        x = x + trend * np.sin(turn / 700 + phase())
        x = x + noise * _noise(rng, size, steps)
        past = x[:, : self.length]
        mean, deviation = past.mean(1, keepdims=True), past.std(1, keepdims=True)
        x = ((x - mean) / (deviation + 1e-6)).astype(np.float32)
        return {"past": x[:, : self.length], "future": x[:, self.length:],
                "kind": kind.astype(np.int32)}


def _noise(rng: np.random.Generator, size: int, steps: int) -> np.ndarray:
    """[B,steps,7] of an autoregression of second order, of deviation 1."""
    rows = [np.zeros((size, CHANNELS))] * 2
    for _ in range(steps + 50):  # the first 50 are forgotten
        e = rng.normal(size=(size, CHANNELS))
        rows.append(AR[0] * rows[-1] + AR[1] * rows[-2] + e)
    a = np.stack(rows[-steps:], 1)
    # its variance: (1 - a2) / ((1 + a2) ((1 - a2)^2 - a1^2))
    one, two = AR
    return a / np.sqrt((1 - two) / ((1 + two) * ((1 - two) ** 2 - one**2)))
