"""Exact attention on a device: what is timed of it, beside which peers.

Shapes are those of the field's tables, the rows that were behind first.
"""

from __future__ import annotations

import functools
from typing import Any, Callable, Iterator

from attn.masks import Causal, Window
from experiments.measure.device import peers
from experiments.measure.device.case import Bench, Case, Row, normal
from experiments.measure.device.exact import sized
from experiments.measure.device.fast import OURS, Contender, race, with_gradients
from experiments.measure.device.place import Place
from pallas_kernels.flash.api import flash
from pallas_kernels.logits import LogitSpec

# what is timed: B, T, H, K, D, V, and of the mask what is not causal
SPEED: dict[str, dict[str, Any]] = {
    "causal D128 T1024 B16 H16": {"b": 16, "t": 1024},
    "causal D128 T16384 H16": {"t": 16384},
    "causal D64 T16384 H32": {"t": 16384, "h": 32, "d": 64},
    "causal D192 V128 T1024 B32 H16": {"b": 32, "t": 1024, "d": 192, "v": 128},
    "causal D128 T4096 B4 H16": {"b": 4, "t": 4096},
    "causal D256 T16384 H8": {"t": 16384, "h": 8, "d": 256},
    "causal D128 T4096 B4 H32 K8": {"b": 4, "t": 4096, "h": 32, "k": 8},
    "window 1024 D128 T16384 H16": {"t": 16384, "window": 1024},
    "full D128 T16384 H16": {"t": 16384, "causal": False},
    "causal D128 T512 B32 H16": {"b": 32, "t": 512},
    "causal D128 T2048 B8 H16": {"b": 8, "t": 2048},
    "causal D64 T2048 B8 H32": {"b": 8, "t": 2048, "h": 32, "d": 64},
    "causal D256 T4096 B4 H8": {"b": 4, "t": 4096, "h": 8, "d": 256},
    "causal D128 T8192 B2 H16": {"b": 2, "t": 8192},
}
TINY = {"causal D64 T150 H2": {"t": 150, "h": 2, "d": 64}}
FIRST = 4  # of them come first

WAYS = {"forward": False, "both": True}


def cases(place: Place) -> Iterator[Case]:
    """Every shape, forward, and forward and backward."""
    for n, name in enumerate(shapes(place)):
        for way, back in WAYS.items():
            tier = 0 if n < FIRST and not back else 1 if n < FIRST else 2
            yield Case(f"fast flash {way} {name}",
                       functools.partial(_race, place, name, back), tier)


def shapes(place: Place) -> dict[str, dict[str, Any]]:
    """What is timed here."""
    return TINY if place.tiny else SPEED


def flops(back: bool, b=1, t=4096, h=16, k=None, d=128, v=None, causal=True,
          window=None) -> float:
    """By the field's convention: half the matrix, backward 2.5 times forward."""
    pairs = t * t / 2 if causal else t * t
    if window:
        pairs = window * t - window * window / 2
    return 2 * b * h * pairs * (d + (v or d)) * (3.5 if back else 1)


def call(place: Place, backend: str, causal=True, window=None, variant=(), **_
         ) -> Callable:
    """o of flash as a function of q, k and v."""
    mask = Causal() & Window(window) if window else Causal() if causal else None

    def f(q, k, v):
        return flash(q, k, v, LogitSpec(mask), backend=backend, variant=variant,
                     interpret=place.interpret)[0]

    return f


def arrays(back: bool, **shape: Any) -> tuple:
    """q, k and v, with the backward pass also do [B,T,H,V]."""
    q, k, v = sized(**shape)
    return (q, k, v, normal(9, *q.shape[:3], v.shape[3])) if back else (q, k, v)


def _race(place: Place, name: str, back: bool, bench: Bench) -> Row:
    shape = shapes(place)[name]
    own = place.exact[:1] if place.tiny or not name.startswith("causal D128 T16384") \
        else place.exact
    found = [Contender(f"{OURS} {backend}", call(place, backend, **shape))
             for backend in own]
    found += peers.contenders(place, **shape)
    if back:
        found = [one._replace(f=with_gradients(one.f, 3)) for one in found]
    return race(bench, found, arrays(back, **shape), flops=flops(back, **shape))
