"""The arithmetic of one tile: logits, who sees whom, and what dropout keeps.

Every form of exact attention, XLA's and each kernel's, computes its tiles with these
functions, elementwise on arrays that broadcast against the tile: what differs between
them is only how tiles are fetched and in which order they are visited.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Callable

import jax
import jax.numpy as jnp

LOG2E = 1.4426950408889634  # kernels compute 2^(s log2 e): hardware has exp2
NEVER = -jnp.inf
# the least float32, below no finite logit and above NEVER: only NEVER hides, and no
# guard is needed for 2^(NEVER - LOW)
LOW = float(jnp.finfo(jnp.float32).min)
APART = 2.0**22  # from here on a float32 beside log l keeps too little of it


@dataclasses.dataclass(frozen=True)
class TileSpec:
    """A `LogitSpec` (`pallas_kernels/logits.py`) as tiles compute it: with a scale.

    dropout: the share of weights that is set to 0. unit: what kernels have logits
    multiplied with, see `unit_of`.
    """

    mask: Any = None
    scale: float = 1.0
    softcap: float | None = None
    score: Callable | None = None
    dropout: float = 0.0
    unit: float = 1.0

    def recompute(self, s, base):
        """Weights made again from logits, times `unit`, and the base of their row."""
        # no logit is above base; of large ones, one that was rounded otherwise here may
        # be, and then by so much that 2^x is infinite
        return self.exp2(jnp.minimum(s - base, 0))

    def exp2(self, x):
        """e to the power of x/unit, of a difference of logits times `unit`."""
        # hardware has 2^x: a factor of 1 costs nothing
        return jnp.exp2(x if self.unit == LOG2E else x * (LOG2E / self.unit))

    def logits(self, raw, h, i, j, bias=None, unit: float | None = None):
        """unit * (cap(scale * raw) + score + bias), and d(capped)/d(scale * raw).

        raw: q.k of a tile, float32; h, i, j: head, query and key positions.
        """
        slope = None
        unit = self.unit if unit is None else unit
        if self.softcap is None:
            # one multiplication, or none
            s = raw if self.scale * unit == 1 else raw * (self.scale * unit)
        else:
            capped = jnp.tanh(raw * (self.scale / self.softcap))
            # d tanh(x) = 1 - tanh(x)^2
            s, slope = (self.softcap * unit) * capped, 1 - capped * capped
        if self.score is not None:
            s = s + self.score(h, i, j) * unit
        if bias is not None:
            s = s + bias.astype(jnp.float32) * unit
        return s, slope


def unit_of(scale: float, softcap, *added) -> float:
    """What kernels have logits multiplied with, so that e to the power of a difference
    costs one multiplication at most. added: what is added to a logit, or None.

    Of products alone 1 / scale: the maximum is taken of q.k, and the difference, which
    is exact, is scaled. (A fused scale * q.k - m would leave the error of m.) What is
    added may be as low as float32 goes, and stays as it is: 1. Else log2(e).
    """
    if any(a is not None for a in added):
        return 1.0
    if softcap is None and scale > 0:
        # of floats near 1 / scale that whose product with scale is 1
        unit = 1 / scale
        near = (unit, math.nextafter(unit, 0), math.nextafter(unit, math.inf))
        return next((a for a in near if a * scale == 1), unit)
    return LOG2E


def base_and_factor(m, l, unit: float = 1.0):
    """What the weights exp(s - m) / l of a row are made again from: a base and a factor
    [...] with p = exp(s - base) factor. s, m and base are multiplied by `unit`.

    The base is m + log l, as float32 has it, and the factor what is missing to 1. Where
    m is so large that log l would be lost, the base is m and the factor 1 / l. The
    factor goes into what weights are multiplied with going back, d(o) and delta, and so
    costs nothing. A row that sees nothing (l = 0) has 0 and 1.
    """
    some = l > 0
    log = jnp.log(jnp.where(some, l, 1))
    base = jnp.where(jnp.abs(m) < APART * unit, m + log * unit, m)
    base = jnp.where(some, base, 0)  # not -inf: 2^(-inf - 0) = 0
    # base - m has no rounding error where log l has one (Fast2Sum)
    factor = jnp.exp((base - m) / unit - log)
    return base, jnp.where(some, factor, 1)


def lse_of(m, l):
    """lse = m + log l, -inf where nothing is seen: l = 0."""
    some = l > 0
    # log 0 is not computed, as its gradient would be NaN even where it is not chosen
    return jnp.where(some, m + jnp.log(jnp.where(some, l, 1)), NEVER)


def sink_logit(sink, unit: float = 1.0):
    """Sinks as a first logit, float32, times `unit`: finite unless they are -inf, which
    is no sink."""
    sink = sink.astype(jnp.float32)
    return jnp.where(jnp.isneginf(sink), NEVER, jnp.maximum(sink * unit, LOW))


def both(a, b):
    """a & b, where None hides nothing."""
    return b if a is None else a if b is None else a & b


def dropout_keep(rate: float, seed, batch, head, row, column):
    """Which weights dropout keeps: a hash of (seed, batch, head, query, key) is not
    below the rate. seed: two uint32; row and column are indices, not positions."""
    words = [a.astype(jnp.uint32) for a in (batch, head, row, column)]
    word = murmur_mix32(murmur_mix32(seed[0] ^ words[0]) ^ words[1])
    word = murmur_mix32(murmur_mix32(word ^ seed[1] ^ words[2]) ^ words[3])
    return word >= jnp.uint32(round(rate * 2**32))


def murmur_mix32(x: jax.Array) -> jax.Array:
    """A 32-bit integer hash with full avalanche: the finaliser of MurmurHash3."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
