"""Speech, synthetic: strings of phones and the frames of a spectrum that they make.

It stands for the recordings of the benchmark CAB (LJSpeech): a phone has a spectrum of
its own, lasts as long as it and its neighbour say, and flows into the next one. There
is no voice, no pitch and no real log-mel spectrum.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from experiments.data.dataset import Batch, Dataset

PHONES, BANDS = 24, 20  # phone 0 is silence
NOISE = 0.05


def _spectra() -> tuple[np.ndarray, np.ndarray]:
    """Of each phone: its bands [PHONES,BANDS], three bumps; how long it lasts."""
    rng = np.random.default_rng(24)
    centre = rng.uniform(0, BANDS, (PHONES, 3, 1))
    width = rng.uniform(1, 3, (PHONES, 3, 1))
    height = rng.uniform(0.5, 2, (PHONES, 3, 1))
    bumps = height * np.exp(-0.5 * ((np.arange(BANDS) - centre) / width) ** 2)
    bands = bumps.sum(1) - 1
    bands[0] = -1.0  # silence
    return bands, rng.integers(3, 7, PHONES)


SPECTRA, LASTS = _spectra()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Speech(Dataset):
    """Utterances of `count` phones, `length` frames T each, the rest silence.

    phones [B,S] int32, S = count + 1, the last one silence; lasts [B,S] int32 frames of
    each, T in all: of a phone 3 to 6, one more before a phone with an even number, and
    fewer of the last ones where there is no more room; frames [B,T,BANDS] float32.
    """

    length: int = 144
    count: int = 24

    def __post_init__(self):
        super().__post_init__()
        room = f"at most {self.length // 4}, a quarter of the frames"
        self.require("count", 1 <= self.count <= self.length // 4, room)

    def draw(self, rng: np.random.Generator, size: int) -> Batch:
        phones = rng.integers(1, PHONES, (size, self.count + 1))
        phones[:, -1] = 0
        lasts = LASTS[phones] + (np.roll(phones, -1, 1) % 2 == 0)
        # what each may last so that a frame is left for every one behind it
        ends = np.cumsum(lasts, 1)
        left = np.arange(self.count, -1, -1)
        ends = np.minimum(ends, self.length - left)
        ends[:, -1] = self.length
        lasts = np.diff(ends, prepend=0, axis=1)
        at = (ends[:, None] <= np.arange(self.length)[:, None]).sum(-1)  # [B,T]
        frames = SPECTRA[np.take_along_axis(phones, at, 1)]
        # a transition of three frames on either side
        wide = np.pad(frames, ((0, 0), (1, 1), (0, 0)), mode="edge")
        frames = (wide[:, :-2] + 2 * wide[:, 1:-1] + wide[:, 2:]) / 4
        frames += NOISE * rng.normal(size=frames.shape)
        return {"phones": phones.astype(np.int32), "lasts": lasts.astype(np.int32),
                "frames": frames.astype(np.float32)}
