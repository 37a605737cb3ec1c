"""Angles: how far a position turns each pair of channels, exact at any position.

Frequencies are angles per token. `powers`, and what shares of them yarn and llama3
keep; `angles` and `learned_angles` multiply them with positions; `dynamic_angles`
changes them with the length of the text. `sinusoids` are their sines and cosines.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np


def powers(theta: float, width: int) -> np.ndarray:
    """The frequencies theta^(-2m/D) of the pairs m < D/2, float64 [D/2], D = width."""
    return theta ** (-np.arange(0, width, 2) / width)


def ramp_of_pairs(
    theta: float, width: int, original: int, slow: float, fast: float, truncate: bool
) -> np.ndarray:
    """What yarn keeps of each frequency [D/2]: 1 for pairs of more than `fast` turns in
    `original` tokens, 0 for fewer than `slow`, linear in the pair's number between;
    `truncate`: between whole pairs."""
    # frequencies fall with m: more turns are lower numbers
    low, high = (_pair(turns, theta, width, original) for turns in (fast, slow))
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    own = (np.arange(width // 2) - low) / max(high - low, 1e-3)
    return 1 - np.clip(own, 0, 1)


def _pair(turns: float, theta: float, width: int, original: int) -> float:
    """The pair, not a whole number, that makes so many turns in `original` tokens:
    theta^(-2m/D) original = 2 pi turns, solved for m."""
    return width * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))


def ramp_of_turns(
    frequencies: np.ndarray, original: int, slow: float, fast: float
) -> np.ndarray:
    """What llama3 keeps of each frequency, as `ramp_of_pairs`, linear in the turns."""
    turns = original * frequencies / (2 * math.pi)
    return np.clip((turns - slow) / (fast - slow), 0, 1)


def dynamic_angles(
    pos: jax.Array, width: int, theta: float, factor: float, original: int
) -> jax.Array:
    """pos [...,1] times the powers [D/2] of a theta that grows with the longest text L:

        theta (factor L / original - (factor - 1))^(D/(D-2)),   L >= original.
    """
    over = jnp.maximum(pos.max() + 1, original) / original  # L / original
    grown = theta * (factor * over - (factor - 1)) ** (width / (width - 2))
    share = jnp.asarray(-np.arange(0, width, 2) / width, jnp.float32)  # -2m/D
    turned = jnp.exp(share * jnp.log(grown))
    lead = (1,) * (pos.ndim - 1)
    return pos.astype(jnp.float32) * turned.reshape(*lead, -1)


def angles(pos: jax.Array, frequencies: np.ndarray) -> jax.Array:
    """pos [...,1] times frequencies [n] in radians, float32, in [-pi, pi], for integer
    positions to 2^31 with an error below 1e-6.

    As one product of float32 the error is that of the product, 1e-7 of an angle of
    many turns. Whole turns do not matter: of the share of a turn a token, as a fixed
    point number of 64 bits, pos times the upper 32 is exact modulo one turn, and of pos
    times the lower 32 the upper half is added. Other positions are multiplied.
    """
    lead = (1,) * (pos.ndim - 1)
    if not jnp.issubdtype(pos.dtype, jnp.integer):
        factor = jnp.asarray(frequencies, jnp.float32).reshape(*lead, -1)
        return pos.astype(jnp.float32) * factor
    fixed = [round(f / (2 * math.pi) * 2.0**64) % 2**64 for f in frequencies.tolist()]
    high, low = (
        jnp.asarray(np.array(a, np.uint32).reshape(*lead, -1))
        for a in zip(*(divmod(n, 2**32) for n in fixed))
    )
    return _turned_by(pos, high, low)


def _turned_by(pos: jax.Array, high: jax.Array, low: jax.Array) -> jax.Array:
    """pos int times a share of a turn, 2^-32 high + 2^-64 low, in radians."""
    n = jnp.abs(pos).astype(jnp.uint32)
    # in 2^-32 turns; uint32 wraps around, which is whole turns
    turns = n * high + _upper(n, low)
    # as a signed number, the nearer way round
    share = jax.lax.bitcast_convert_type(turns, jnp.int32).astype(jnp.float32)
    angle = share * jnp.float32(2 * math.pi / 2**32)
    return jnp.where(pos < 0, -angle, angle)


# 2^224 / (2 pi), and of it what a float32 of each exponent is multiplied with: in
# 2^-96 turns, modulo one turn, by words of 32 bits [256,3], the upper one first
_TURN = 0x28BE60DB9391054A7F09D5F47D4D377036D8A5664F10E4107F9458EA
_TURNS = np.array(
    [[(_TURN >> 278 - e) >> shift & 0xFFFFFFFF for shift in (64, 32, 0)]
     for e in range(256)], np.uint32)


def learned_angles(pos: jax.Array, theta: jax.Array) -> jax.Array:
    """pos times theta in radians, as `angles`, for integer positions to 2^31 and
    frequencies theta float32 that are arrays, learned ones, of a shape that goes with
    that of pos; its gradient is that of the product.

    theta = +-m 2^(e - 150) with m below 2^24; its share of a turn as a fixed point
    number of 64 bits is m times the table's number of 96.
    """
    plain = pos.astype(jnp.float32) * theta
    if not jnp.issubdtype(pos.dtype, jnp.integer):
        return plain
    bits = jax.lax.bitcast_convert_type(theta, jnp.uint32)
    exponent = bits >> jnp.uint32(23) & jnp.uint32(0xFF)
    m = bits & jnp.uint32(0x7FFFFF) | jnp.uint32(1 << 23)
    # the table's words for the exponent of each theta, the upper one first
    c2, c1, c0 = jnp.moveaxis(jnp.asarray(_TURNS)[exponent.astype(jnp.int32)], -1, 0)
    low = m * c1 + _upper(m, c0)
    carry = (low < m * c1).astype(jnp.uint32)
    angle = _turned_by(pos, m * c2 + _upper(m, c1) + carry, low)
    angle = jax.lax.stop_gradient(jnp.where(theta < 0, -angle, angle))
    # 0 but for the gradient, and for what is no number
    return angle + (plain - jax.lax.stop_gradient(plain))


def sinusoids(pos: jax.Array, width: int, *, interleaved: bool = False) -> jax.Array:
    """sin and cos of pos [...] int times 10000^(-2i/E), i < E/2 (Vaswani et al., 2017,
    arXiv:1706.03762), [...,E] float32 for E = `width`: all sines first, or one sine and
    one cosine in turn if `interleaved`."""
    angle = angles(pos[..., None], powers(10000.0, width))
    both = jnp.stack([jnp.sin(angle), jnp.cos(angle)], -1 if interleaved else -2)
    return both.reshape(*pos.shape, -1)[..., :width]


def _upper(a: jax.Array, b: jax.Array) -> jax.Array:
    """The upper 32 bits of the product of two uint32, by halves of 16 bits."""
    half, low = jnp.uint32(16), jnp.uint32(0xFFFF)
    a1, a0, b1, b0 = a >> half, a & low, b >> half, b & low
    middle = a1 * b0 + (a0 * b0 >> half)  # below 2^32
    other = a0 * b1 + (middle & low)
    return a1 * b1 + (middle >> half) + (other >> half)
