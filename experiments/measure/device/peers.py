"""Peers of exact attention in JAX, as functions of q, k and v."""

from __future__ import annotations

import functools
from typing import Any, Callable, Iterator

import jax

from experiments.measure.device.fast import Contender
from experiments.measure.device.place import Place, installed

LONG = 4096  # from which on a whole matrix of logits is not asked for


def exact(place: Place, t: int = LONG, causal: bool = True, window: int | None = None,
          **_: Any) -> Iterator[tuple[str, Callable]]:
    """What computes exact attention here, by name."""
    told: dict[str, Any] = {"is_causal": causal}
    if window:
        told["local_window_size"] = window, 0
    own = jax.nn.dot_product_attention
    if place.platform == "gpu":
        yield "cuDNN", functools.partial(own, implementation="cudnn", **told)
    if t <= LONG:
        yield "jax.nn", functools.partial(own, implementation="xla", **told)
    if installed("tokamax"):
        for kind in {"gpu": ("mosaic", "triton"), "tpu": ("mosaic",)}.get(
                place.platform, ()):
            yield f"tokamax {kind}", functools.partial(_tokamax, kind, told)


def _tokamax(kind: str, told: dict[str, Any], q, k, v):
    import tokamax

    return tokamax.dot_product_attention(q, k, v, implementation=kind, **told)


def contenders(place: Place, **shape: Any) -> list[Contender]:
    """The same as contenders."""
    return [Contender(name, f) for name, f in exact(place, **shape)]
