"""Sub-words: the best segmentation, by all segmentations and as it was given."""

import itertools
import math
import pathlib

import numpy as np
import pytest

from experiments import tokenise

VECTORS = pathlib.Path(__file__).parents[1] / "golden" / "prflash.npz"


def test_given_words_have_the_given_pieces():
    with np.load(VECTORS) as file:
        case = {name: file[f"swe/{name}"] for name in (
            "words", "vocab", "logp", "best_logp", "segmentation")}
    logp = dict(zip(case["vocab"].tolist(), case["logp"].tolist()))
    for word, want, pieces in zip(
            case["words"].tolist(), case["best_logp"], case["segmentation"].tolist()):
        best, found = tokenise.segment(word, logp, 10)
        assert best == pytest.approx(want, rel=1e-9) and " ".join(found) == pieces


def test_the_best_is_the_best_of_all():
    rng = np.random.default_rng(0)
    pieces = ["".join(p) for n in (1, 2, 3) for p in itertools.product("ab", repeat=n)]
    for _ in range(20):
        logp = {u: -float(rng.exponential()) for u in pieces if rng.random() < 0.7}
        word = "".join(rng.choice(["a", "b"], 7))
        best = -math.inf
        for cuts in itertools.product((0, 1), repeat=6):
            at = [0, *(n + 1 for n, cut in enumerate(cuts) if cut), 7]
            parts = [word[i:j] for i, j in zip(at, at[1:])]
            best = max(best, sum(logp.get(p, -math.inf) for p in parts))
        assert tokenise.segment(word, logp, 3)[0] == pytest.approx(best)


def test_merges_are_the_most_frequent_pairs():
    split, vocabulary = tokenise.merged({"low": 5, "lowest": 2, "newest": 6}, 12)
    assert {"es", "est"} <= vocabulary and len(vocabulary) == 12
    assert all("".join(pieces) == word for word, pieces in split.items())


def test_learned_pieces_are_likelier_than_merges():
    found = tokenise.run(tokenise.TINY)
    merged, best, settled, learned = (
        found[f"40 {way}"]
        for way in ("merged", "best of merged", "settled", "learned"))
    assert merged <= best + 1e-12 <= settled + 1e-9
    assert learned > merged
