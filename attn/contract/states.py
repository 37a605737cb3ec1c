"""States: what a stream is begun and gone on with, said in one sentence.

This stands at the door of every `Attention`: `init_state` is asked for a number of
tokens and given what has the shape of tokens, and the state that `step` goes on with is
one that `init_state` gives for tokens like those that come.
"""

from __future__ import annotations

import functools
import inspect
import operator
from typing import Any, Callable

import jax

FAR = 2**20  # tokens: a size at which what grows with it differs from that of one


def sized(method: Callable) -> Callable:
    """`init_state(self, size, q, k, v, ...)` that raises ValueError for arguments that
    are no number of tokens from 1 on and no arrays, as swapped ones."""
    signature = inspect.signature(method)

    @functools.wraps(method)
    def init_state(self, *args, **named):
        given = signature.bind(self, *args, **named).arguments
        try:
            operator.index(given["size"])
        except TypeError:
            raise ValueError(
                f"size is {_said(given['size'])}: expected a number of tokens, "
                "init_state(size, q, k, v)"
            ) from None
        if given["size"] < 1:
            raise ValueError(
                f"size: a memory for {given['size']} tokens, expected 1 or more")
        for name in ("q", "k", "v"):
            if name in given and len(getattr(given[name], "shape", ())) != 4:
                raise ValueError(
                    f"{name} is {_said(given[name])}: expected an array [B,T,.,.] or "
                    "its ShapeDtypeStruct, init_state(size, q, k, v)"
                )
        return method(self, *args, **named)

    return init_state


def stateful(method: Callable) -> Callable:
    """`step(self, state, q, k, v, ...)` that raises ValueError for a state of another
    attention, or of tokens of other sizes."""
    signature = inspect.signature(method)

    @functools.wraps(method)
    def step(self, *args, **named):
        given = signature.bind(self, *args, **named).arguments
        tokens = tuple(given[name] for name in "qkv")
        # other tokens are refused by the attention
        if all(len(getattr(a, "shape", ())) == 4 for a in tokens):
            _check(self, given["state"], tokens, given.get("x"))
        return method(self, *args, **named)

    return step


def _check(attention: Any, state: Any, tokens: tuple, x: Any) -> None:
    q, k, v = tokens

    def empty(size: int) -> Any:
        return jax.eval_shape(lambda: attention.init_state(size, q, k, v, x=x))

    one, far = empty(1), empty(FAR)  # of shapes alone
    if type(state) is not type(one):
        name = type(one).__name__
        article = "an" if name[0] in "AEIOU" else "a"
        raise ValueError(
            f"state is a {type(state).__name__}: expected {article} {name}, as "
            f"{type(attention).__name__}.init_state gives"
        )
    leaves = jax.tree_util.tree_leaves_with_path(one)
    for (path, a), b, held in zip(leaves, jax.tree.leaves(far), jax.tree.leaves(state)):
        # an axis that grows with the size may have any length
        want = tuple(n if n == m else None for n, m in zip(a.shape, b.shape))
        found = tuple(None if m is None else n for n, m in zip(held.shape, want))
        if len(held.shape) != len(want) or found != want:
            shape = str(want).replace("None", ".")
            name = jax.tree_util.keystr(path).lstrip(".")
            raise ValueError(
                f"the state holds {name} {held.shape}: expected {shape} for q "
                f"{q.shape}, k {k.shape} and v {v.shape}"
            )


def _said(a: Any) -> str:
    """What an argument is, in a few words."""
    shape = getattr(a, "shape", None)
    return repr(a)[:40] if shape is None else f"an array of shape {shape}"
