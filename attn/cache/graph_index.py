"""Graph index: keys that are found by walking, in a graph made for the queries that
will come.

Queries of attention lie elsewhere than keys, so neighbours among keys lead nowhere. The
graph is made of what queries find: the keys nearest to one query are linked to the one
that is nearest of all (the rules are those of RoarGraph, Chen et al., 2024,
arXiv:2408.08933). Nearness is the inner product. All of this is numpy, on the host.
Where the authors' threads race for a key's links, these are merged in one order (our
choice).
"""

from __future__ import annotations

import heapq
from typing import NamedTuple

import numpy as np


class Graph(NamedTuple):
    """links [n,W] int32, -1 for none, and the entry, a key's number."""

    links: np.ndarray
    entry: int


def build(
    keys: np.ndarray, queries: np.ndarray, *, neighbours: int = 100, degree: int = 35,
    beam: int = 500, connect: bool = True,
) -> Graph:
    """The graph of keys [n,D], for queries like queries [m,D]: neighbours N_q of each
    query, `degree` M links of a key, and up to 2M more that connect it, found with a
    `beam`. connect=False leaves these out."""
    n = len(keys)
    dots = keys @ keys.T  # [n,D] [D,n]
    links: list[list[int]] = [[] for _ in range(n)]
    # [m,D] [D,n] -> [m,N_q]: the keys nearest to each query, the nearest first
    near = np.argsort(-(queries @ keys.T), axis=1, kind="stable")[:, :neighbours]
    for row in near:
        pivot, others = int(row[0]), [int(x) for x in row[1:]]
        links[pivot] = pruned(dots, pivot, links[pivot] + others, degree)
        for x in links[pivot]:
            _link(dots, links, x, pivot, degree)
    # a walk begins at the key nearest to the mean of all
    middle = keys.mean(0)
    entry = int(((keys - middle) ** 2).sum(1).argmin())
    more: list[list[int]] = [[] for _ in range(n)]
    if connect:
        for v in range(n):
            _, seen, _ = walk(keys, keys[v], links, more, entry, beam, dots[v])
            fresh = [x for x in seen if x != v and x not in links[v] + more[v]]
            for x in pruned(dots, v, fresh, degree):
                if len(more[v]) < 2 * degree:
                    more[v].append(x)
                if len(more[x]) < 2 * degree and v not in links[x] + more[x]:
                    more[x].append(v)
    # M links of queries and up to 2M that connect
    table = np.full((n, 3 * degree), -1, np.int32)
    for v in range(n):
        own = list(dict.fromkeys(links[v] + more[v]))[:3 * degree]
        table[v, :len(own)] = own
    return Graph(table, entry)


def _link(dots, links, x: int, new: int, degree: int) -> None:
    """A link back, by the same rule if there are more than `degree`."""
    if new not in links[x] and x != new:
        links[x].append(new)
        if len(links[x]) > degree:
            links[x] = pruned(dots, x, links[x], degree)


def pruned(dots: np.ndarray, p: int, candidates: list[int], degree: int) -> list[int]:
    """Of candidates, nearest to p first, those that no accepted one is nearer to than
    p is: at most `degree`."""
    order = sorted(set(candidates) - {p}, key=lambda x: (-dots[p, x], x))
    kept: list[int] = []
    for x in order:
        # a kept y that is nearer to x than p is leads there already
        if all(dots[x, y] <= dots[x, p] for y in kept):
            kept.append(x)
            if len(kept) == degree:
                break
    return kept


def walk(
    keys, q, links, more, entry: int, beam: int, dots=None
) -> tuple[list, list, int]:
    """Best first from the entry: (the `beam` best keys, those whose links were
    followed, how many were looked at)."""
    seen: set[int] = set()
    followed: list[int] = []
    best: list[tuple[float, int]] = []  # the worst first
    ahead: list[tuple[float, int]] = []

    def look(x: int) -> None:
        if x in seen:
            return
        seen.add(x)
        dot = float(keys[x] @ q if dots is None else dots[x])
        if len(best) < beam or dot > best[0][0]:
            heapq.heappush(best, (dot, -x))
            heapq.heappush(ahead, (-dot, x))
            if len(best) > beam:
                heapq.heappop(best)

    look(entry)
    while ahead:
        dot, x = heapq.heappop(ahead)
        # what lies ahead is worse than all that was found
        if len(best) == beam and -dot < best[0][0]:
            break
        followed.append(x)
        for y in (*links[x], *more[x]):
            look(y)
    return [-x for _, x in sorted(best, reverse=True)], followed, len(seen)


def search(graph: Graph, keys: np.ndarray, q: np.ndarray, top: int, beam: int):
    """(numbers of the `top` keys for q [D] that a walk finds, how many it looked at).
    """
    links = [row[row >= 0].tolist() for row in graph.links]
    none = [()] * len(links)
    found, _, many = walk(keys, q, links, none, graph.entry, max(beam, top))
    return found[:top], many
