"""Music: chorales as rows of tokens, made up or Bach's, performances as events, MIDI.

A chorale is a grid of sixteenths with four voices; its row is time-major, soprano,
alto, tenor and bass within a step (Huang et al., 2018, arXiv:1809.04281). The made-up
ones need nothing; Bach's come with the package music21 (the extra `music`).
"""

from __future__ import annotations

import dataclasses
import functools
import struct
from typing import Any, Iterable, NamedTuple

import numpy as np

from experiments.data.dataset import Batch, Dataset, row

VOICES = 4
REST = 128  # the token of a voice that is silent; pitches are 0 to 127
VOCAB = 129
ON, OFF, SHIFT, VELOCITY = 0, 128, 256, 356  # first tokens of each kind of event
STEPS = 100  # the longest shift, in steps of 10 ms
# ranges of soprano, alto, tenor and bass, in MIDI pitches
RANGES = ((60, 81), (53, 74), (48, 67), (40, 62))
# where a degree of the scale goes: a Markov chain over triads I, ii, ... vii
NEXT = np.array([
    [2, 2, 1, 4, 4, 3, 1], [1, 1, 1, 2, 6, 1, 2], [1, 1, 1, 3, 1, 5, 1],
    [4, 2, 1, 1, 5, 1, 1], [7, 1, 1, 1, 2, 3, 1], [1, 4, 1, 4, 2, 1, 1],
    [6, 1, 1, 1, 1, 1, 1],
], float)
SCALE = np.array([0, 2, 4, 5, 7, 9, 11])  # semitones of a major scale


class Note(NamedTuple):
    """A note of a performance: start and duration in steps of 10 ms, MIDI pitch,
    velocity from 1 to 127."""

    start: int
    duration: int
    pitch: int
    velocity: int


def performance(notes: Iterable[Note]) -> list[int]:
    """Tokens of a performance (Oore et al., 2018, arXiv:1808.03715): 128 note-ons, 128
    note-offs, shifts of 1 to 100 steps, 32 velocities, 388 in this order."""
    ordered = sorted(notes, key=lambda note: (note.start, note.pitch))
    events = []
    for n, note in enumerate(ordered):
        # at one step by note, each one's beginning before its end
        events.append((note.start, n, 0, note))
        events.append((note.start + note.duration, n, 1, note))
    tokens, now, loud = [], 0, None
    for step, _, ends, note in sorted(events, key=lambda event: event[:3]):
        while now < step:
            shift = min(step - now, STEPS)
            tokens.append(SHIFT + shift - 1)
            now += shift
        level = (note.velocity - 1) // 4
        if not ends and level != loud:
            loud = level
            tokens.append(VELOCITY + level)
        tokens.append((OFF if ends else ON) + note.pitch)
    return tokens


def notes_of(tokens: Iterable[int]) -> list[Note]:
    """The notes that the tokens say, velocities at the first of their level. A note
    that is begun again ends; one without an end is left out."""
    now, loud, found = 0, 1, []
    held: dict[int, tuple[int, int]] = {}
    for token in tokens:
        if token >= VELOCITY:
            loud = 4 * (token - VELOCITY) + 1
            continue
        if token >= SHIFT:
            now += token - SHIFT + 1
            continue
        pitch = token % 128
        if pitch in held:
            start, velocity = held.pop(pitch)
            found.append(Note(start, now - start, pitch, velocity))
        if token < OFF:
            held[pitch] = now, loud
    return sorted(found)


def serialise(grid: np.ndarray) -> np.ndarray:
    """The tokens [4 T] of a grid [T,4] of pitches, REST for none."""
    return np.asarray(grid).reshape(-1)


def grid_of(tokens: Any) -> np.ndarray:
    """The grid [T,4] of the whole steps of tokens."""
    tokens = np.asarray(tokens)
    return tokens[:len(tokens) // VOICES * VOICES].reshape(-1, VOICES)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chorales(Dataset):
    """Made-up chorales: phrases of `phrase` chords, AABA, in a random major key; B is
    another phrase, and the last A stands where it stood or a fourth away.

    tokens [B,T], targets [B,T]: T = `length` tokens, 4 a step; a row begins anywhere in
    the first AABA of a piece, and goes on with further rounds of it, each moved by a
    fourth down or a tone up. Chords follow a Markov chain over seven triads; each voice
    takes the chord tone next to its last one, in its range and not above the voice
    before it, and holds a chord for one step.
    """

    length: int = 256
    phrase: int = 8

    def __post_init__(self):
        super().__post_init__()
        self.require("length", self.length % VOICES == 0, "a multiple of 4")
        self.require("phrase", self.phrase >= 1, "1 chord or more")

    def draw(self, rng: np.random.Generator, size: int) -> Batch:
        grids = [self.piece(rng) for _ in range(size)]
        # the token that is read first is a rest: nothing has been played
        sequence = np.stack([np.append(REST, serialise(grid)) for grid in grids])
        return row(sequence, np.ones_like(sequence, bool))

    def piece(self, rng: np.random.Generator) -> np.ndarray:
        """A grid [T/4,4] from somewhere in a piece."""
        key = int(rng.integers(12))
        a, b = (self.voiced(rng, key) for _ in range(2))
        steps, moved = self.length // VOICES, 0
        parts: list[np.ndarray] = []
        first = int(rng.integers(4 * self.phrase))
        while sum(len(part) for part in parts) < first + steps:
            parts += [part + moved for part in (a, a, b, self.shifted(rng, a))]
            moved = int(rng.choice([-5, 0, 2]))
        return np.concatenate(parts)[first:first + steps]

    @staticmethod
    def shifted(rng: np.random.Generator, part: np.ndarray) -> np.ndarray:
        """A phrase at its place, a fourth up or a fourth down."""
        return part + int(rng.choice([-5, 0, 5]))

    def voiced(self, rng: np.random.Generator, key: int) -> np.ndarray:
        """A phrase [phrase,4]: chords from the first degree on."""
        degree, rows = 0, []
        last = [int(rng.integers(low + 4, high - 4)) for low, high in RANGES]
        for _ in range(self.phrase):
            tones = (key + SCALE[(degree + np.array([0, 2, 4])) % 7]) % 12
            for voice, (low, high) in enumerate(RANGES):
                pitches = np.arange(low, high + 1)
                # the bass has the root, the others any tone
                own = tones[:1] if voice == VOICES - 1 else tones
                pitches = pitches[np.isin(pitches % 12, own)]
                # of a bass whose range has no such root, the lowest one
                under = pitches[pitches <= last[voice - 1]] if voice else pitches
                pitches = under if under.size else pitches[:1]
                last[voice] = int(pitches[np.abs(pitches - last[voice]).argmin()])
            rows.append(list(last))
            weights = NEXT[degree] / NEXT[degree].sum()
            degree = int(rng.choice(7, p=weights))
        return np.array(rows)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bach(Dataset):
    """Bach's chorales in sixteenths, from the corpus of music21: pieces of four parts.
    70% of the pieces are "train" and the last 15% "valid"; nobody reads the others. A
    row begins anywhere in a piece; train moves each by -3 to 3 semitones.
    """

    length: int = 256

    def draw(self, rng: np.random.Generator, size: int) -> Batch:
        pieces = bach()
        cut, held = len(pieces) * 7 // 10, len(pieces) * 85 // 100
        own = pieces[:cut] if self.split == "train" else pieces[held:]
        rows = []
        for _ in range(size):
            grid = own[int(rng.integers(len(own)))]
            if self.split == "train":
                moved = int(rng.integers(-3, 4))
                grid = np.where(grid == REST, REST, grid + moved)
            tokens = serialise(grid)
            most = max(len(tokens) - self.length, 0) // VOICES
            first = VOICES * int(rng.integers(most + 1))
            part = np.append(REST, tokens[first:first + self.length])
            rows.append(np.pad(part, (0, self.length + 1 - len(part)),
                               constant_values=-1))
        sequence = np.stack(rows)
        # behind the end of a piece nothing is asked, and rests are read
        return row(np.where(sequence < 0, REST, sequence), sequence >= 0)


@functools.cache
def bach() -> list[np.ndarray]:
    """Grids [T,4] of all chorales with four parts, in a fixed random order. ValueError
    if music21 or its corpus is not here."""
    try:
        from music21 import corpus
    except ImportError:
        raise ValueError(
            "music21 is not installed: expected pip install 'attn[music]'") from None
    found = []
    try:
        for score in corpus.chorales.Iterator():
            if len(score.parts) == VOICES:
                found.append(_grid(score))
    except OSError as error:
        raise ValueError(f"music21 has no corpus of chorales here: {error}") from None
    if not found:
        raise ValueError("music21 has no corpus of chorales here: expected its corpus")
    order = np.random.default_rng(0).permutation(len(found))
    return [found[n] for n in order]


def _grid(score: Any) -> np.ndarray:
    """The sixteenths [T,4] of a score: what sounds at each."""
    steps = round(float(score.highestTime) * 4)
    grid = np.full((steps, VOICES), REST)
    for voice, part in enumerate(score.parts):
        for note in part.flatten().notes:
            first = round(float(note.offset) * 4)
            last = round(float(note.offset + note.quarterLength) * 4)
            grid[first:last, voice] = note.pitches[-1].midi
    return grid


def midi(grid: np.ndarray, sixteenth: int = 120) -> bytes:
    """A MIDI file of a grid [T,4]: equal pitches of a voice that follow each other are
    one note. sixteenth: ticks of a step, of 480 a quarter."""
    tracks = []
    for voice in range(VOICES):
        events, now, held = [], 0, REST
        for step, pitch in enumerate([*np.asarray(grid)[:, voice], REST]):
            if pitch == held:
                continue
            for status, value in ((0x80, held), (0x90, pitch)):
                if value != REST:
                    wait = _variable(step * sixteenth - now)
                    events.append(wait + bytes([status | voice, int(value), 80]))
                    now = step * sixteenth
            held = pitch
        data = b"".join(events) + b"\0\xff\x2f\0"  # the end of the track
        tracks.append(b"MTrk" + struct.pack(">I", len(data)) + data)
    head = b"MThd" + struct.pack(">IHHH", 6, 1, VOICES, 480)
    return head + b"".join(tracks)


def _variable(n: int) -> bytes:
    """A number in groups of seven bits, the last one's highest bit 0."""
    found = [n & 127]
    while n := n >> 7:
        found.append(n & 127 | 128)
    return bytes(reversed(found))
