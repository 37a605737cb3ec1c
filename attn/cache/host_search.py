"""Far keys of RetrievalAttention on the host: their graphs, and what a query finds.

Functions of numpy arrays, which `attn/retrieval.py` calls out of a program. Keys and
values are arrays that the call was sent, or rows that `HostKeys` stores.

Source: Liu et al., 2024, arXiv:2409.10516.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from attn.cache import graph_index
from attn.cache.graph_index import Graph
from attn.cache.host_keys import HostKeys


@dataclasses.dataclass(frozen=True)
class Search:
    """How a query looks for its `top_k` keys: fields of `Retrieval`."""

    index: str
    top_k: int
    degree: int
    neighbours: int
    beam: int
    scale: float | None


def build(how: Search, q, k, pos, real):
    """Graphs of far keys k [B,C,K,D] for queries q [B,N,K,G,D] that are `real` [B,N] ->
    links [B,K,C,W], entry [B,K]."""
    q, k, pos, real = (np.asarray(a) for a in (q, k, pos, real))
    (b, slots, heads, d), width = k.shape, 3 * how.degree
    links = np.full((b, heads, slots, width), -1, np.int32)
    entry = np.zeros((b, heads), np.int32)
    for row, head in np.ndindex(b, heads):
        at = np.nonzero(pos[row] >= 0)[0]
        # [N G,D]: all heads of the group
        asked = q[row, real[row], head].reshape(-1, d).astype(np.float32)
        if not len(at) or not len(asked):
            continue
        graph = graph_index.build(
            k[row, at, head].astype(np.float32), asked, degree=how.degree,
            neighbours=how.neighbours, beam=how.beam)
        own = graph.links
        # the graph numbers far keys: back to slots
        links[row, head, at] = np.where(own >= 0, at[own], -1)
        entry[row, head] = at[graph.entry]
    return links, entry


def read(how: Search, q, k, v, pos, links, entry):
    """o [B,1,H,V] and lse [B,H,1] of the far keys k [B,C,K,D] that q [B,1,H,D] finds;
    -inf where there are none."""
    q, k, v, pos, links, entry = (np.asarray(a) for a in (q, k, v, pos, links, entry))
    d, group = q.shape[3], q.shape[2] // k.shape[2]
    scale = d**-0.5 if how.scale is None else how.scale
    o, lse = _nothing(q, v.shape[3])
    for row, head in np.ndindex(*q.shape[::2]):
        own = head // group
        asked = q[row, 0, head].astype(np.float32)
        at = find(
            how, asked, k[row, :, own], pos[row], links[row, own], entry[row, own])
        if not len(at):
            continue
        # [n,D] [D], of the n keys that were found; then [n] [n,V]
        s = scale * (k[row, at, own].astype(np.float32) @ asked)
        # lse is of scaled logits, while the index goes by q.k as it is
        top = s.max()
        e = np.exp(s - top)
        o[row, 0, head] = e @ v[row, at, own].astype(np.float32) / e.sum()
        lse[row, head] = top + np.log(e.sum())
    return o, lse


def put(host: HostKeys, k, v, pos, links, entry):
    """Stores each row's k, v, pos, links and entry -> its number [B,K]."""
    rows = zip(*(np.asarray(a) for a in (k, v, pos, links, entry)))
    numbers = np.array([host.put(*row) for row in rows], np.int32)
    return np.broadcast_to(numbers[:, None], entry.shape)


def get(host: HostKeys, kinds, numbers):
    """Stored k [B,C,K,D] and v [B,C,K,V]; zeros for rows without a prompt."""
    found = tuple(np.zeros(kind.shape, kind.dtype) for kind in kinds)
    for row, number in enumerate(np.asarray(numbers)[:, 0]):
        if number > 0:
            for a, held in zip(found, host.get(number)):
                a[row] = held
    return found


def begin(how: Search, host: HostKeys, width: int, q, numbers):
    """A ticket for what q [B,1,H,D] finds in the rows of these numbers [B,K]: o
    [B,1,H,V = width] and lse [B,H,1] of `host.end`."""
    # the runtime may take back what it lends to a callback
    q, numbers = np.array(q), np.array(numbers)
    return np.int32(host.begin(_read_stored, how, host, width, q, numbers))


def _read_stored(how: Search, host: HostKeys, width: int, q, numbers):
    """`read` of stored rows; nothing of one without a prompt, or whose sequence has
    ended."""
    o, lse = _nothing(q, width)
    for row, number in enumerate(numbers[:, 0]):
        if number > 0:
            held = (a[None] for a in host.get(number))
            found = read(how, q[row:row + 1], *held)
            o[row], lse[row] = found[0][0], found[1][0]
    return o, lse


def _nothing(q, width: int):
    """o and lse of queries q [B,1,H,D] without keys."""
    b, _, h, _ = q.shape
    o = np.zeros((b, 1, h, width), np.float32)
    return o, np.full((b, h, 1), -np.inf, np.float32)


def find(how: Search, q, k, pos, links, entry) -> np.ndarray:
    """The slots of the far keys k [C,D] that q [D] finds, in order."""
    far = np.nonzero((pos >= 0) & (entry >= 0))[0]
    if len(far) <= how.top_k:
        return far  # everything fits
    if how.index == "flat":
        # [n,D] [D]
        best = np.argsort(-(k[far].astype(np.float32) @ q), kind="stable")
        return np.sort(far[best[:how.top_k]])
    found, _ = graph_index.search(
        Graph(links, int(entry)), k.astype(np.float32), q, how.top_k, how.beam)
    return np.sort(np.array(found, int))
