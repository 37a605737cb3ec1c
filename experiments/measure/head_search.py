"""Head search: which heads are to be changed, found by trying them on questions.

From coarse to fine (AutoPASTA, Zhang et al., 2024, arXiv:2409.10790): all heads of a
layer first, then single ones of the best layers; or all heads one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

Score = Callable[[np.ndarray], float]


def coarse_to_fine(score: Score, layers: Sequence[int], shape: tuple[int, int],
                   best_layers: int, most: int) -> tuple[np.ndarray, int]:
    """Heads [L,H] and how many sets were tried: layers as a whole, the heads of the
    best ones, then as many of these as answer best together. score: of heads [L,H], 0
    or 1; layers: those that may be tried; shape: (L, H)."""
    whole = []
    for n in layers:
        own = np.zeros(shape)
        own[n] = 1
        whole.append(score(own))
    best = np.argsort(-np.array(whole), kind="stable")[:best_layers]
    found, tried = one_by_one(score, [layers[n] for n in best], shape, most)
    return found, tried + len(layers)


def one_by_one(score: Score, layers: Sequence[int], shape: tuple[int, int],
               most: int) -> tuple[np.ndarray, int]:
    """The best of all heads of these layers, as many as answer best together, at most
    `most`; and how many sets were tried."""
    heads = [(int(n), h) for n in layers for h in range(shape[1])]

    def mask(some):
        own = np.zeros(shape)
        own[tuple(np.array(some).T)] = 1
        return own

    alone = [score(mask([head])) for head in heads]
    order = [heads[n] for n in np.argsort(-np.array(alone), kind="stable")]
    sets = [mask(order[:n]) for n in range(1, min(most, len(order)) + 1)]
    scores = [max(alone), *map(score, sets[1:])]
    return sets[int(np.argmax(scores))], len(heads) + len(sets) - 1
