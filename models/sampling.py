"""Sampling: one token drawn from the logits of the next."""

from __future__ import annotations

import math
import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

BAD = -1  # the token of a row whose logits are no distribution
STEEPEST = 3e38  # of 1 / temperature, just below what float32 holds


class Sampling(NamedTuple):
    """How a token is drawn. temperature 0 takes the most likely one; top_k keeps the k
    most likely, top_p the fewest whose probabilities add up to p, after top_k, and
    min_p those at least so many times as likely as the likeliest, after both (Nguyen et
    al., 2024, arXiv:2407.01082). Of equal tokens at the border of top_k or top_p those
    with the lower ids are kept."""

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None

    def checked(self) -> Sampling:
        """Itself, as plain numbers. ValueError for numbers that say nothing."""
        temperature = number("temperature", self.temperature)
        if not 0 <= temperature < math.inf:
            raise ValueError(
                f"temperature={temperature}: expected a finite number, 0 or more"
            )
        top_k = None if self.top_k is None else whole("top_k", self.top_k)
        if top_k is not None and top_k < 1:
            raise ValueError(f"top_k={top_k}: expected 1 or more")
        top_p = None if self.top_p is None else number("top_p", self.top_p)
        if top_p is not None and not 0 < top_p <= 1:
            raise ValueError(f"top_p={top_p}: expected above 0 and at most 1")
        min_p = None if self.min_p is None else number("min_p", self.min_p)
        if min_p is not None and not 0 <= min_p <= 1:
            raise ValueError(f"min_p={min_p}: expected 0 to 1")
        return Sampling(temperature, top_k, top_p, min_p)


def number(name: str, value: Any) -> float:
    """A real number of Python or numpy as a float; ValueError for anything else."""
    try:
        if isinstance(value, (str, bytes, bool)):
            raise TypeError
        return float(value)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{name}={value!r}: expected a number") from None


def whole(name: str, value: Any) -> int:
    """An integer of Python or numpy as an int; ValueError for anything else."""
    try:
        if isinstance(value, (bool, np.bool_)):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise ValueError(f"{name}={value!r}: expected a whole number") from None


def sample(logits: jax.Array, key: jax.Array, how: Sampling) -> jax.Array:
    """One token [B] int32 from logits [B,vocab].

    -1 for a row whose logits are no distribution: one of them is NaN or inf, or all are
    -inf. ValueError for it where logits have values, outside of jit.
    """
    best = logits.max(-1, keepdims=True)  # [B,1], NaN if any is
    token = jnp.where(jnp.isfinite(best)[:, 0], _drawn(logits, best, key, how), BAD)
    if not isinstance(token, jax.core.Tracer) and (token == BAD).any():
        row = int((token == BAD).argmax())
        raise ValueError(f"logits of row {row} have NaN or inf, or are all -inf: "
                         "expected one finite logit or more, and no NaN")
    return token.astype(jnp.int32)


def _drawn(logits, best, key, how: Sampling) -> jax.Array:
    if how.temperature == 0:
        return logits.argmax(-1)
    # the greatest is 0 at any temperature: nothing overflows but downwards. A product,
    # since a temperature of 1e-40 is 0 to machines that know no subnormal numbers
    steep = min(1 / max(how.temperature, 1 / STEEPEST), STEEPEST)
    scaled = jnp.where(jnp.isneginf(logits), -jnp.inf, (logits - best) * steep)
    if how.top_k is not None and how.top_k < logits.shape[-1]:
        scaled = _kept(scaled, jax.lax.top_k(scaled, how.top_k)[1])
    if how.top_p is not None and how.top_p < 1:
        scaled = _nucleus(scaled, how.top_p)
    if how.min_p:
        # the likeliest is at 0: log(p / p of the likeliest) is what stands there
        least = np.log(np.float32(how.min_p))
        scaled = jnp.where(scaled >= least, scaled, -jnp.inf)
    return jax.random.categorical(key, scaled)


def _kept(logits: jax.Array, ids: jax.Array) -> jax.Array:
    """`logits` [B,vocab] at `ids` [B,n], -inf elsewhere."""
    rows = jnp.arange(logits.shape[0])[:, None]
    kept = jnp.zeros(logits.shape, bool).at[rows, ids].set(True)
    return jnp.where(kept, logits, -jnp.inf)


def _nucleus(logits: jax.Array, p: float) -> jax.Array:
    """`logits` [B,vocab] of the fewest tokens whose probabilities reach p, else -inf
    (Holtzman et al., 2020) arXiv:1904.09751."""
    order = jnp.argsort(logits, -1, stable=True, descending=True)
    chance = jax.nn.softmax(jnp.take_along_axis(logits, order, -1))
    before = jnp.cumsum(chance, -1) - chance
    # a sum that misses p by its rounding has reached it
    inside = before < p * (1 - 1e-6)
    inside = inside.at[:, 0].set(True)
    rows = jnp.arange(logits.shape[0])[:, None]
    kept = jnp.zeros(logits.shape, bool).at[rows, order].set(inside)
    return jnp.where(kept, logits, -jnp.inf)
