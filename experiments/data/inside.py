"""Tasks whose circuits are known elsewhere, in tokens: the indirect object, coloured
objects, repeats and needles.

After Merullo et al., 2023, arXiv:2310.08744 (IOI, Coloured Objects), Wu et al., 2024,
arXiv:2404.15574 (needles): their shapes, on made-up words.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np

from experiments.data.dataset import Batch, Dataset, chosen

PAD, BOS, GIVE, ASK, ANSWER, FIND = range(6)
COLOURS, OBJECTS = np.arange(6, 14), np.arange(14, 31)
NAMES, FILLERS = np.arange(31, 71), np.arange(71, 81)
VOCAB = 81
TASKS = ("ioi", "colours", "repeats", "needle")
NEEDLE, CUE = 6, 2  # tokens of a needle, of which the first are asked for


class Pair(NamedTuple):
    """clean and corrupt [B,T] int32 of equal lengths, answers [B,2]: right and wrong;
    spots [B,n]: where the n candidates for the answer stand, the right one first."""

    clean: np.ndarray
    corrupt: np.ndarray
    answers: np.ndarray
    spots: np.ndarray


def ioi(rng: np.random.Generator, size: int, fillers: int = 4) -> Pair:
    """BOS n1 n2 [fillers] n GIVE -> the name of the two that n is not. Corrupted: the
    other name is repeated."""
    two = NAMES[chosen(rng, size, len(NAMES), 2)]
    right = rng.integers(2, size=size)
    rows = np.arange(size)
    io, subject = two[rows, right], two[rows, 1 - right]
    middle = rng.choice(FILLERS, (size, fillers))

    def text(again):
        begin, end = np.full((size, 1), BOS), np.full((size, 1), GIVE)
        return np.concatenate([begin, two, middle, again[:, None], end], 1)

    spots = np.stack([1 + right, 2 - right], 1)
    return Pair(text(subject).astype(np.int32), text(io).astype(np.int32),
                np.stack([io, subject], 1), spots)


def colours(rng: np.random.Generator, size: int) -> Pair:
    """BOS [colour object] x 3 ASK object ANSWER -> its colour. Corrupted: another
    object of the scene is asked for."""
    c = COLOURS[chosen(rng, size, len(COLOURS), 3)]
    o = OBJECTS[chosen(rng, size, len(OBJECTS), 3)]
    order = chosen(rng, size, 3, 3)  # asked for; corrupted; the third
    scene = np.stack([c, o], 2).reshape(size, 6)
    rows = np.arange(size)

    def text(which):
        own = o[rows, which][:, None]
        parts = [np.full((size, 1), n) for n in (BOS, ASK, ANSWER)]
        return np.concatenate([parts[0], scene, parts[1], own, parts[2]], 1)

    answers = np.stack([c[rows, order[:, n]] for n in (0, 1)], 1)
    return Pair(text(order[:, 0]).astype(np.int32), text(order[:, 1]).astype(np.int32),
                answers, 1 + 2 * order)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inside(Dataset):
    """A mixture of `TASKS` in rows of `length` tokens; shares: of each of them. The
    target stands where the answer is predicted, of repeats and needles at all tokens
    that can be known. A needle of 6 random tokens stands anywhere among others, and
    behind them come its first 2."""

    length: int = 32
    shares: tuple[float, ...] = (1.0, 1.0, 1.0, 1.0)

    def __post_init__(self):
        super().__post_init__()
        self.require("length", self.length >= 20, "20 or more")
        one = len(self.shares) == len(TASKS)
        self.require("shares", one, f"one of each of {TASKS}")

    def draw(self, rng: np.random.Generator, size: int) -> Batch:
        shares = np.array(self.shares) / sum(self.shares)
        tokens = np.zeros((size, self.length), np.int32)
        targets = np.full_like(tokens, -1)
        for row, task in enumerate(rng.choice(TASKS, size, p=shares)):
            text, answer = _drawn(task, rng, self.length)
            tokens[row, : len(text)], targets[row, : len(text)] = text, answer
        segments = (tokens != PAD).astype(np.int32)
        return {"tokens": tokens, "targets": targets, "segments": segments}


def _drawn(task: str, rng: np.random.Generator, length: int):
    """One text and its targets."""
    if task in ("ioi", "colours"):
        many = int(rng.integers(2, 7))
        pair = ioi(rng, 1, many) if task == "ioi" else colours(rng, 1)
        text = pair.clean[0]
        target = np.full(len(text), -1)
        target[-1] = pair.answers[0, 0]
        return text, target
    if task == "repeats":
        period = rng.integers(4, (length - 1) // 2 + 1)
        once = rng.integers(6, VOCAB, period)
        text = np.concatenate([[BOS], once, once])
        target = np.full(len(text), -1)
        target[period + 1:-1] = once[1:]  # what comes next in the second copy
        return text, target
    text, needle, _ = (a[0] for a in needles(rng, 1, length - NEEDLE, VOCAB))
    text = np.concatenate([text, needle[CUE:]])
    target = np.full(len(text), -1)
    target[-(NEEDLE - CUE) - 1:-1] = needle[CUE:]
    return text, target


def needles(rng: np.random.Generator, size: int, length: int, vocab: int, low: int = 6):
    """Prompts [B,length+CUE] of random tokens with a needle at any depth and its first
    tokens behind, the needles [B,NEEDLE], and where they begin [B]."""
    prompt = rng.integers(low, vocab, (size, length))
    needle = low + chosen(rng, size, vocab - low, NEEDLE)
    start = rng.integers(0, length - NEEDLE + 1, size)
    at = start[:, None] + np.arange(NEEDLE)
    np.put_along_axis(prompt, at, needle, 1)
    return np.concatenate([prompt, needle[:, :CUE]], 1).astype(np.int32), needle, start
