"""Efficiency length: from how many tokens on an attention costs less than the matrix.

Time and memory of one layer, forward, are measured over lengths; exact attention as one
matrix is fitted by a T^2 + b T + c, the other by d T + e, and where the two meet is the
efficiency length. What is not published: the answers "always" and "never", and none at
all for costs that bend as a parabola themselves, as those of exact attention do, which
no line describes. Memory is what the compiler's analysis says is needed beside inputs
and outputs.

Source: Comprehensive Attention Benchmarking (Zhang et al., 2022) arXiv:2210.07661.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attn.layers import MultiHead
from attn.masks import Full
from attn.softmax import Softmax

LEAST = 256  # the length whose time the benchmark leaves out


def dense(pattern: str) -> Softmax:
    """Exact attention as one matrix, which is what is compared with."""
    return Softmax(mask=Full() if pattern == "NS" else None, implementation="dense")


def costs(attention: Any, lengths: Sequence[int], width: int, heads: int,
          repeats: int) -> dict[str, list[float]]:
    """ms and mb of a layer of `attention` at each length, of one row of E = `width`:
    the mean of the middle half of `repeats` calls, and megabytes."""
    layer = MultiHead(attention, heads, position=None, use_bias=True)
    found: dict[str, list[float]] = {"ms": [], "mb": []}
    run = jax.jit(layer.apply)
    all_ = jax.random.normal(jax.random.key(0), (1, max(lengths), width), jnp.float32)
    params = jax.jit(layer.init)(jax.random.key(1), all_[:, :LEAST])
    for t in lengths:
        x = all_[:, :t]
        made = run.lower(params, x).compile()
        analysis: Any = made.memory_analysis()
        found["mb"].append(analysis.temp_size_in_bytes / 2**20)
        spent = []
        for _ in range(repeats + 1):
            clock = time.perf_counter()
            jax.block_until_ready(made(params, x))
            spent.append(1e3 * (time.perf_counter() - clock))
        middle = sorted(spent[1:])[len(spent[1:]) // 4:][: max(1, repeats // 2)]
        found["ms"].append(float(np.mean(middle)))
    return found


def efficiency_length(lengths: Sequence[int], exact: Sequence[float],
                      other: Sequence[float], drop_least: bool = False
                      ) -> float | str | None:
    """The larger T at which a T^2 + b T + c, fitted to `exact`, meets d T + e, fitted
    to `other`: the other costs less from there on. "always": the line is below at
    every T > 0. Where `exact` shows no parabola in these lengths, "always" or "never"
    if the other costs less, or more, at each of them. None: it is now less and now
    more, or no line fits, as the other's own parabola is bent by more than a fourth of
    exact attention's. drop_least: the other's first length, 256, is left out, as the
    benchmark does of times."""
    at, line, matrix = (np.array(a, float) for a in (lengths, other, exact))
    a, b, c = np.polyfit(at, matrix, 2)
    kept = at > LEAST if drop_least and (at > LEAST).sum() > 1 else at > 0
    # a bend that rounding makes is none
    if a * at.max() ** 2 <= 1e-6 * np.abs(matrix).max():
        below = line[kept] < matrix[kept]
        above = line[kept] > matrix[kept]
        return "always" if below.all() else "never" if above.all() else None
    bent = kept if kept.sum() > 2 else at > 0
    if np.polyfit(at[bent], line[bent], 2)[0] > a / 4:
        return None
    d, e = np.polyfit(at[kept], line[kept], 1)
    inside = (b - d) ** 2 - 4 * a * (c - e)
    root = (d - b + np.sqrt(max(inside, 0))) / (2 * a)
    return float(root) if inside >= 0 and root > 0 else "always"
