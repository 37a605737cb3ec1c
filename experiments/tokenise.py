"""Sub-words by likelihood: the best pieces of words against greedy merges.

Claim of "The Nature of Mathematical Modeling and Probabilistic Optimization Engineering
in Generative AI" (Li, 2024), of which the abstract alone was read: begun as byte-pair
encoding is, with characters and counts of words, the best segmentation under a
vocabulary whose likelihood is made as large as can be is better than merges that are
greedy. What that means exactly is proposed here, not published: pieces u have
probabilities p(u), a word its most likely segmentation (Viterbi), and the vocabulary is
pruned from all frequent substrings, by what the likelihood loses, p counted anew (hard
EM), until V pieces are left.

    python -m experiments.tokenise

takes 8 seconds of processor time and prints log likelihoods in nats a character, of the
2,000 most frequent words of docstrings of the standard library (Python 3.11; other
versions have other words):

    V                         100       200       400
    merged                 -2.601    -2.345    -2.073
    best of merged         -2.592    -2.326    -2.052
    settled                -2.586    -2.319    -2.044
    learned                -2.313    -2.067    -1.810

Greedy merges are read in three ways: as they were merged, by the most likely
segmentation under their own vocabulary and counts, and so on until counts no longer
change. The claim shows: all three are less likely than pieces that were learned, which
are not proved to be the best ones.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import math
import re
import sys
from collections import Counter
from typing import Any

from rich.console import Console

from experiments.cli import config
from experiments.cli.config import FREE, option

Words = dict[str, int]
MODULES = (
    "argparse", "ast", "asyncio", "collections", "csv", "datetime", "decimal",
    "difflib", "email", "functools", "heapq", "inspect", "itertools", "json", "logging",
    "math", "os", "pathlib", "random", "re", "socket", "string", "subprocess",
    "threading", "typing", "unittest", "urllib.request", "xml.etree.ElementTree",
)


@dataclasses.dataclass(frozen=True)
class Config:
    """The words, and the vocabularies that are made of them."""

    sizes: tuple[int, ...] = option((100, 200, 400), "pieces V of a vocabulary")
    words: int = option(2000, "words, the most frequent ones")
    longest: int = option(8, "characters of a piece, at most")
    least: int = option(3, "how often a substring is there, to be one")
    rounds: int = option(4, "counts anew after each pruning")
    shrink: float = option(0.7, "share of the pieces that a pruning keeps")
    modules: tuple[str, ...] = option(MODULES, "whose docstrings are read")
    quiet: bool = option(False, "no table", FREE)

    def __post_init__(self):
        if not self.sizes or min(self.sizes) < 1:
            raise ValueError(f"sizes={self.sizes}: expected 1 or more")
        if not 0 < self.shrink < 1:
            raise ValueError(f"shrink={self.shrink}: expected in (0, 1)")


TINY = Config(sizes=(40,), words=60, modules=("json",), rounds=1, quiet=True)


def corpus(modules: tuple[str, ...], most: int) -> Words:
    """The most frequent words of docstrings and how often each is there."""
    found: Counter[str] = Counter()
    for name in modules:
        module = importlib.import_module(name)
        texts = [module.__doc__] + [getattr(a, "__doc__", None) for a in
                                    vars(module).values() if inspect.isroutine(a)
                                    or inspect.isclass(a)]
        for text in dict.fromkeys(t for t in texts if isinstance(t, str)):
            found.update(re.findall("[a-z]+", text.lower()))
    ordered = sorted(found.items(), key=lambda item: (-item[1], item[0]))
    return dict(ordered[:most])


def segment(word: str, logp: dict[str, float], longest: int) -> tuple[float, list[str]]:
    """The largest sum of log p over segmentations of a word, and its pieces; of equals
    the one whose last piece begins first. -inf and nothing if there is none."""
    best = [0.0] + [-math.inf] * len(word)
    begin = [0] * (len(word) + 1)
    for end in range(1, len(word) + 1):
        for start in range(max(0, end - longest), end):
            piece = logp.get(word[start:end])
            if piece is not None and best[start] + piece > best[end] + 1e-12:
                best[end], begin[end] = best[start] + piece, start
    if best[-1] == -math.inf:
        return best[-1], []
    pieces, end = [], len(word)
    while end:
        pieces.append(word[begin[end]:end])
        end = begin[end]
    return best[-1], pieces[::-1]


def counted(words: Words, logp: dict[str, float], longest: int) -> Counter[str]:
    """How often each piece is used by the best segmentations."""
    used: Counter[str] = Counter()
    for word, n in words.items():
        for piece in segment(word, logp, longest)[1]:
            used[piece] += n
    return used


def probabilities(used: Counter[str], vocabulary: set[str]) -> dict[str, float]:
    """log p(u) by counts; a single character that is not used counts once, other
    pieces that are not used are left out."""
    counts = {u: used[u] or 1 for u in vocabulary if used[u] or len(u) == 1}
    total = sum(counts.values())
    return {u: math.log(n / total) for u, n in sorted(counts.items())}


def likelihood(words: Words, logp: dict[str, float], longest: int) -> float:
    """The sum of log p over all words, each as often as it is there."""
    return sum(n * segment(word, logp, longest)[0] for word, n in words.items())


def settled(words: Words, logp: dict[str, float], longest: int, rounds: int):
    """log p after counting anew, until nothing changes or `rounds` times."""
    for _ in range(rounds):
        after = probabilities(counted(words, logp, longest), set(logp))
        if after == logp:
            break
        logp = after
    return logp


def learned(words: Words, size: int, config_: Config) -> dict[str, float]:
    """log p of at most `size` pieces, pruned from all frequent substrings; all single
    characters stay."""
    longest, found = config_.longest, Counter[str]()
    for word, n in words.items():
        for start in range(len(word)):
            for end in range(start + 1, min(start + longest, len(word)) + 1):
                found[word[start:end]] += n
    vocabulary = {u for u, n in found.items() if len(u) == 1 or n >= config_.least}
    logp = probabilities(Counter({u: found[u] for u in vocabulary}), vocabulary)
    while True:
        logp = settled(words, logp, longest, config_.rounds)
        if len(logp) <= size:
            return logp
        used = counted(words, logp, longest)
        goal = max(size, int(len(logp) * config_.shrink))
        long = sorted((u for u in logp if len(u) > 1),
                      key=lambda u: (lost(u, used[u], logp, longest), u))
        gone = set(long[:len(logp) - goal])
        if not gone:
            return logp
        kept = set(logp) - gone
        # what they stood for is counted as their own best pieces
        without = {u: logp[u] for u in kept}
        logp = probabilities(counted(words, without, longest), kept)


def lost(piece: str, uses: int, logp: dict[str, float], longest: int) -> float:
    """What the likelihood loses at most without a piece: each use of it becomes its own
    best pieces."""
    own = logp.pop(piece)
    other = segment(piece, logp, longest)[0]
    logp[piece] = own
    return uses * (own - other)


def merged(words: Words, size: int) -> tuple[dict[str, list[str]], set[str]]:
    """Byte-pair encoding to `size` pieces: each word as it was merged, and the
    vocabulary. Of pairs that are there as often the first in order is merged."""
    split = {word: list(word) for word in words}
    vocabulary = {c for word in words for c in word}
    while len(vocabulary) < size:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, pieces in split.items():
            for pair in zip(pieces, pieces[1:]):
                pairs[pair] += words[word]
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        vocabulary.add("".join(best))
        for pieces in split.values():
            at = 0
            while at < len(pieces) - 1:
                if (pieces[at], pieces[at + 1]) == best:
                    pieces[at:at + 2] = ["".join(best)]
                at += 1
    return split, vocabulary


def run(config_: Config) -> dict[str, Any]:
    """-> {"V WAY": nats a character}, of greedy merges, of the best segmentation under
    their vocabulary, and of the vocabulary that was learned; the larger the better."""
    words = corpus(config_.modules, config_.words)
    characters = sum(len(word) * n for word, n in words.items())
    longest = max(map(len, words))
    found: dict[str, Any] = {"words": len(words)}
    for size in config_.sizes:
        split, vocabulary = merged(words, size)
        used: Counter[str] = Counter()
        for word, pieces in split.items():
            used.update({u: n * words[word] for u, n in Counter(pieces).items()})
        logp = probabilities(used, vocabulary)
        greedy = sum(words[w] * logp[u] for w, pieces in split.items() for u in pieces)
        again = settled(words, logp, longest, 10 * config_.rounds)
        ways = {
            "merged": greedy, "best of merged": likelihood(words, logp, longest),
            "settled": likelihood(words, again, longest),
            "learned": likelihood(
                words, learned(words, size, config_), config_.longest),
        }
        found |= {f"{size} {way}": a / characters for way, a in ways.items()}
    if not config_.quiet:
        console = Console()
        for name, value in found.items():
            console.print(f"{name:<22} {value:.4g}", highlight=False)
    return found


if __name__ == "__main__":
    config.main(run, Config, __doc__, sys.argv[1:])
