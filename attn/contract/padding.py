"""Padding: what stands where a token's segment is 0 is never read.

Padding is often memory that nobody has written: it may hold NaN or infinity, which a
product with 0 does not remove. So whatever an attention is given is replaced by 0 there
before the attention sees it, and so is its output: neither a number nor a gradient can
come from padding. NaN of real tokens stays what it is.

This stands at the door of every `Attention`, which puts it around `__call__` and `step`
of its classes, and of layers; an attention's own file knows nothing of it.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any, Callable

import jax
import jax.numpy as jnp

from pallas_kernels import padding

# which of a pair of segments the tokens of an argument have
QUERIES, KEYS = ("q", "x"), ("k", "v", "context")


def blank(a: Any, segments: Any) -> Any:
    """`a` [B,T,...] with 0 where segments [B,T] are 0. What does not fit them is left
    as it is, for the attention to refuse, and so is what holds no real numbers."""
    if a is None or isinstance(a, jax.ShapeDtypeStruct) or not hasattr(a, "dtype"):
        return a
    whole = getattr(segments, "shape", None)
    if not jnp.issubdtype(a.dtype, jnp.floating) or a.shape[:2] != whole:
        return a
    # 0 and no gradient: what stands at padding may be NaN
    return padding.blank(segments, a)[0]


def padding_unread(method: Callable) -> Callable:
    """`method(self, ..., segments=None)` of an attention or a layer, whose arguments
    are named in QUERIES and KEYS, with these and its output blank at padding. Without
    segments it is the method itself."""
    signature = inspect.signature(method)

    @functools.wraps(method)
    def guarded(self, *args, segments=None, **named):
        if segments is None:
            return method(self, *args, **named)
        pair = segments if isinstance(segments, tuple) else (segments, segments)
        try:
            bound = signature.bind(self, *args, segments=segments, **named)
        except TypeError:
            # says itself what is wrong with the call
            return method(self, *args, segments=segments, **named)
        for names, own in zip((QUERIES, KEYS), pair):
            given = (name for name in names if name in bound.arguments)
            bound.arguments |= {n: blank(bound.arguments[n], own) for n in given}
        o = method(*bound.args, **bound.kwargs)
        if isinstance(o, tuple):  # of a stream: the state is of real tokens
            return o[0], blank(o[1], pair[0])
        return blank(o, pair[0])

    return guarded


def guard(cls: type, names: tuple[str, ...], *guards: Callable) -> None:
    """Puts guards around methods of a class, its own or inherited, the last one
    outermost; once, whatever inherits from it."""
    for name in names:
        owner = next((c for c in cls.__mro__ if name in vars(c)), None)
        if owner is None or hasattr(vars(owner)[name], "guarded"):
            continue
        method = functools.reduce(lambda f, put: put(f), guards, vars(owner)[name])
        method.guarded = True  # type: ignore[attr-defined]
        setattr(cls, name, method)
