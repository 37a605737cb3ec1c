"""Index claims: what is found where no model is needed, on drawn queries and keys.

`probes`: a window of queries of which few look for something (ActQKV, Xiao et al.,
2025, arXiv:2502.13542). `graphs`: queries that lie elsewhere than the keys
(RetrievalAttention, Liu et al., 2024, arXiv:2409.10516).
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from scipy.cluster.vq import kmeans2

from attn.cache import graph_index, probes
from experiments.measure.cache_claims import Rated

WIDTH, BLOCKS, BLOCK, WINDOW = 64, 64, 8, 32
KEYS, QUERIES, TRAINED, TOP = 2000, 100, 2000, 32
BEAMS = (32, 48, 64, 96, 128, 192, 256, 384, 512)


def probe_recall(seed: int, trials: int) -> Rated:
    """How often the block that 1 to 3 of 32 queries look for is among the best 2, by
    the mean of the queries and by the probe; noise: length of the others' queries
    beside theirs."""
    rng, rated = np.random.default_rng(seed), []
    for noise in (1.0, 0.75, 0.5):
        hits = {"mean": 0, "probe": 0}
        for _ in range(trials):
            keys = rng.standard_normal((BLOCKS, BLOCK, WIDTH)).astype(np.float32)
            own = int(rng.integers(BLOCKS))
            z = keys.mean(1)
            h = noise * rng.standard_normal((WINDOW, WIDTH)).astype(np.float32)
            anchors = rng.permutation(WINDOW)[:int(rng.integers(1, 4))]
            h[anchors] = z[own] / z[own].std()
            query = {"mean": jnp.asarray(h.mean(0))[None],
                     "probe": probes.probe(jnp.asarray(h)[None])[1]}
            for name, p in query.items():
                score = np.asarray(probes.block_scores(jnp.asarray(z)[None], p))[0]
                hits[name] += own in np.argsort(-score)[:2]
        rated += [(f"noise {noise}, by the {name}", hit / trials)
                  for name, hit in hits.items()]
    return rated


def pooled_recall(seed: int, trials: int) -> Rated:
    """The share of relevant blocks that 8 layers read of one pool of 64: 4 layers have
    one block that stands out, 4 have 16 that stand out a little."""
    rng, hits = np.random.default_rng(seed), {"alike": 0.0, "by entropy": 0.0}
    for _ in range(trials):
        scores, relevant = rng.normal(0, 0.02, (8, BLOCKS)), []
        for layer in range(8):
            flat = layer % 2
            own = rng.permutation(BLOCKS)[:16 if flat else 1]
            scores[layer, own] += 0.5 if flat else 5.0
            relevant.append(own)
        means = [float(probes.entropy(jnp.asarray(row))[1]) for row in scores]
        for name, warm in (("alike", False), ("by entropy", True)):
            pool, found, all_ = 64, 0, 0
            for layer in range(8):
                many = probes.shares(means, layer, pool, 1, 16, warm)
                pool -= many
                best = np.argsort(-scores[layer])[:many]
                found += len({*best} & {*relevant[layer]})
                all_ += len(relevant[layer])
            hits[name] += found / all_ / trials
    return [(f"a pool shared {name}", hit) for name, hit in hits.items()]


def drawn(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Keys x = A z + b1, and queries q = C z' - b2 whose z' lie near some z: those that
    the graph is made for, and those that ask."""
    z = rng.standard_normal((KEYS, 32))
    a, c = rng.standard_normal((2, 32, 32)) / np.sqrt(32)
    shift = rng.standard_normal((2, 32))
    keys = z @ a + shift[0]

    def asking(many: int) -> np.ndarray:
        near = z[rng.integers(KEYS, size=many)]
        return (near + 0.3 * rng.standard_normal(near.shape)) @ c - shift[1]

    return keys, asking(TRAINED), asking(QUERIES)


def graph_scans(seed: int) -> dict[str, list[tuple[float, float]]]:
    """(share of keys looked at, recall of the best 32) of each index at each effort,
    also of a graph of keys that keys ask."""
    rng = np.random.default_rng(seed)
    keys, trained, asking = drawn(rng)
    of_keys, of_queries = (graph_index.build(
        keys, asked, neighbours=32, degree=16, beam=64) for asked in (keys, trained))
    like_keys = keys[rng.permutation(KEYS)[:QUERIES]]
    return {
        "clusters of keys": _clustered(keys, asking, seed),
        "graph of keys": _walked(of_keys, keys, asking),
        "graph for queries": _walked(of_queries, keys, asking),
        "graph of keys, asked by keys": _walked(of_keys, keys, like_keys),
    }


def _best(keys: np.ndarray, q: np.ndarray) -> list[set[int]]:
    near = np.argsort(-(q @ keys.T), axis=1, kind="stable")[:, :TOP]
    return [{*map(int, row)} for row in near]


def _walked(graph, keys: np.ndarray, q: np.ndarray) -> list[tuple[float, float]]:
    want, curve = _best(keys, q), []
    for beam in BEAMS:
        each = [graph_index.search(graph, keys, one, TOP, beam) for one in q]
        scanned = np.mean([many for _, many in each]) / len(keys)
        recall = np.mean([len(own & {*ids}) / TOP for own, (ids, _) in zip(want, each)])
        curve.append((float(scanned), float(recall)))
    return curve


def _clustered(keys: np.ndarray, q: np.ndarray, seed: int) -> list[tuple[float, float]]:
    centroids, of = kmeans2(keys, 45, seed=seed, minit="++")
    order = np.argsort(-(q @ centroids.T), axis=1)
    want, curve = _best(keys, q), []
    for probed in (1, 2, 4, 8, 12, 16, 24, 32, 45):
        shares, recalls = [], []
        for row, own in zip(order, want):
            there = np.flatnonzero(np.isin(of, row[:probed]))
            shares.append((len(there) + len(centroids)) / len(keys))
            recalls.append(len(own & {*map(int, there)}) / TOP)
        curve.append((float(np.mean(shares)), float(np.mean(recalls))))
    return curve


def graphs(seed: int, recall: float = 0.9) -> Rated:
    """The least share of the keys that each index looks at for that recall; more than
    1 where it does not get there."""
    return [(f"looked at for {recall:.0%}, {name}",
             min((share for share, got in curve if got >= recall), default=np.inf))
            for name, curve in graph_scans(seed).items()]
