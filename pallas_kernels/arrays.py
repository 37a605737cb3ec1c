"""Arrays: what a call is given beside q, k and v, held against its letters before
anything is traced.

A form is a word a letter for each axis: "B|1 H|1 T S" is an array whose first axis is B
long, or 1. An array that is shorter than it should be would otherwise be filled up with
zeros, or read beyond its end.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from pallas_kernels.logits import Dropout, Where

FLOAT, INT, BOOL = jnp.floating, jnp.integer, jnp.bool_
KINDS = {FLOAT: "a floating point type", INT: "integers", BOOL: "booleans"}


def check_arrays(sizes: dict[str, int], **given: tuple) -> None:
    """Raises ValueError unless each array has one of its forms, and its kind.

    sizes: {letter: length}. given: name=(array, kind, form, ...); None arrays are
    allowed, kind None for any.
    """
    for name, (a, kind, *forms) in given.items():
        if a is None:
            continue
        if not hasattr(a, "shape") or not hasattr(a, "dtype"):
            raise ValueError(
                f"{name} is a {type(a).__name__}: expected an array {_said(forms)}"
            )
        if not any(_fits(a.shape, form.split(), sizes) for form in forms):
            letters = sorted({c for form in forms for c in form if c.isalpha()})
            lengths = ", ".join(f"{c}={sizes[c]}" for c in letters if c in sizes)
            raise ValueError(
                f"{name} has shape {tuple(a.shape)}: expected {_said(forms)}"
                + (f" with {lengths}" if lengths else "")
            )
        if kind is not None and not jnp.issubdtype(a.dtype, kind):
            raise ValueError(f"{name} is {a.dtype}: expected {KINDS[kind]}")


def check_logits(
    q: Any, k: Any, where: Where = Where(), *, bias=None, sink=None,
    dropout: Dropout | None = None, given=None,
) -> None:
    """`check_arrays` of what exact attention of q [B,T,H,D] and k [B,S,K,D] is
    given."""
    (b, t, h, _), (s, heads) = q.shape, k.shape[1:3]
    keep, batch = (None, None) if dropout is None else (dropout.keep, dropout.batch)
    check_arrays(
        {"B": b, "T": t, "H": h, "S": s, "K": heads},
        bias=(bias, FLOAT, "B|1 H|1 T|1 S|1"), sink=(sink, FLOAT, "H"),
        head=(where.head, INT, "H"), q_pos=(where.q_pos, INT, "B|1 T"),
        kv_pos=(where.kv_pos, INT, "B|1 S", "B|1 S K|1"), keep=(keep, BOOL, "B H T S"),
        batch=(batch, INT, "B"), given=(given, FLOAT, "B H T"),
        q_segment=(where.q_segment, INT, "B|1 T"),
        kv_segment=(where.kv_segment, INT, "B|1 S"),
    )


def check_heads(h: int, **heads: int) -> None:
    """Raises ValueError unless each number of heads divides H."""
    for name, n in heads.items():
        if n < 1 or h % n:
            raise ValueError(f"{name} has {n} heads: expected a number that divides "
                             f"H={h}")


def check_pairs(**pairs: tuple) -> None:
    """Raises ValueError if one of a pair is missing: it would be ignored."""
    for name, (mine, other) in pairs.items():
        if (mine is None) != (other is None):
            raise ValueError(
                f"q_{name} and kv_{name} go together: expected both or neither"
            )


def _fits(shape: tuple, form: list[str], sizes: dict[str, int]) -> bool:
    def one(length, word):
        # a letter without a size may have any
        return any(
            length == (int(c) if c.isdigit() else sizes.get(c, length))
            for c in word.split("|")
        )

    return len(shape) == len(form) and all(map(one, shape, form))


def _said(forms) -> str:
    return " or ".join("[" + form.replace(" ", ",") + "]" for form in forms)
