"""Shared memory and barriers of flash kernels by Mosaic GPU, by name. Rings hold as
many tiles as there are stages; `there` says that a tile has come, `free` that all
warpgroups have used it."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeVar


class ForwardScratch(NamedTuple):
    """q, o [warpgroups,rows,.], m and l [warpgroups,rows]; o is None where it takes the
    place of q; rings of k and v [stages,columns,.]."""

    q: Any
    k_ring: Any
    v_ring: Any
    o: Any
    m: Any
    l: Any
    q_there: Any
    k_there: Any
    v_there: Any
    k_free: Any
    v_free: Any


class KeyScratch(NamedTuple):
    """For dk and dv: k, v [parts,keys,.] of the block; rings of q, do [stages,rows,.],
    lse and delta [stages,rows]."""

    k: Any
    v: Any
    q_ring: Any
    do_ring: Any
    lse_ring: Any
    delta_ring: Any
    there: Any
    q_there: Any
    do_there: Any
    free: Any


class QueryScratch(NamedTuple):
    """For dq: q, do [parts,rows,.] of the block; rings of k, v [stages,columns,.]."""

    q: Any
    do: Any
    k_ring: Any
    v_ring: Any
    there: Any
    k_there: Any
    v_there: Any
    k_free: Any
    v_free: Any


class HandoverScratch(NamedTuple):
    """Weights that one warpgroup makes for the other; done: both may overwrite what
    only the other one has read."""

    p: Any
    p_there: Any
    p_free: Any
    done: Any


class TensorScratch(NamedTuple):
    """Tensor memory of a forward pass on Blackwell, warpgroups side by side, and
    barriers: logits are there, o is there, the warpgroup has met."""

    s: Any
    p: Any
    o: Any
    s_there: Any
    o_there: Any
    met: Any


Kind = TypeVar("Kind", ForwardScratch, KeyScratch, QueryScratch)


def split(kind: type[Kind], scratch: tuple) -> tuple[Kind, tuple]:
    """What every kernel of a kind has, and what only its way of computing knows."""
    size = len(kind._fields)
    return kind(*scratch[:size]), tuple(scratch[size:])
