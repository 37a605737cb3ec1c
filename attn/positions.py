"""Positions: how a token's place enters its attention.

`RoPE` rotates q and k before they meet, `ALiBi` adds to their logits, and None leaves
the order to the mask and the recurrence.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class RoPE:
    """RoPE (Su et al., 2021) arXiv:2104.09864: q.k depends on the distance alone.

    Channel pair m of D/2 is turned by the angle pos * theta^(-2m/D). Pairs are (m, m +
    D/2), or (2m, 2m + 1) if `interleaved`; `fraction` < 1 turns only the first ones.

    To read further than the model was trained on, `scaling` changes the angles:
    "linear" (Chen et al., 2023, arXiv:2306.15595) divides positions by `factor`; "ntk"
    (b10n and others, 2023) raises theta to theta * factor^(D/(D-2)); "yarn" (Peng et
    al., 2023, arXiv:2309.00071) divides only the slow channels, those that turn fewer
    than `slow` times in `original` tokens, leaves those with more than `fast` turns,
    goes linearly between them, and multiplies q and k by 0.1 ln(factor) + 1; "llama3"
    (Dubey et al., 2024, arXiv:2407.21783) has the same three bands with `slow` and
    `fast` turns (1 and 4 in its models) and interpolates in the number of turns.
    """

    theta: float = 10000.0
    scaling: str | None = None
    factor: float = 1.0
    original: int = 2048
    slow: float = 1.0
    fast: float = 32.0
    interleaved: bool = False
    fraction: float = 1.0

    def __post_init__(self):
        known = (None, "linear", "ntk", "yarn", "llama3")
        if self.scaling not in known:
            raise ValueError(f"RoPE: scaling={self.scaling!r}: expected one of {known}")
        if self.factor < 1:
            raise ValueError(f"RoPE: factor={self.factor}: expected 1 or more")
        if not 0 < self.fraction <= 1:
            raise ValueError(f"RoPE: fraction={self.fraction}: expected in (0, 1]")

    def frequencies(self, width: int) -> np.ndarray:
        """Angles per token [width/2] in radians, for `width` turned channels."""
        if width % 2:
            raise ValueError(f"RoPE: {width} channels: expected an even number")
        theta = self.theta
        if self.scaling == "ntk" and width > 2:
            # the slowest channel turns `factor` times slower, the fastest as before
            theta = theta * self.factor ** (width / (width - 2))
        plain = theta ** (-np.arange(0, width, 2) / width)  # theta^(-2m/D) [D/2]
        if self.scaling in (None, "ntk"):
            return plain
        if self.scaling == "linear":
            return plain / self.factor
        # how often each channel turns within the length that the model was trained on
        turns = self.original * plain / (2 * math.pi)
        if self.scaling == "yarn":
            # the ramp runs over channel numbers, between those with `fast` and `slow`
            low = max(math.floor(self._channel(self.fast, width)), 0)
            high = min(math.ceil(self._channel(self.slow, width)), width - 1)
            own = (np.arange(width // 2) - low) / max(high - low, 1e-3)
            keep = 1 - np.clip(own, 0, 1)
        else:
            keep = np.clip((turns - self.slow) / (self.fast - self.slow), 0, 1)
        # keep 1: as trained; 0: divided by the factor, as "linear" does
        return plain * (keep + (1 - keep) / self.factor)

    def _channel(self, turns: float, width: int) -> float:
        """The channel number, not a whole one, that makes so many turns in `original`
        tokens: theta^(-2m/D) original = 2 pi turns, solved for m."""
        return (
            width * math.log(self.original / (turns * 2 * math.pi))
            / (2 * math.log(self.theta))
        )

    @property
    def magnitude(self) -> float:
        """What q and k are multiplied with: yarn's attention temperature, else 1."""
        return 0.1 * math.log(self.factor) + 1 if self.scaling == "yarn" else 1.0

    def rotate(self, x: jax.Array, pos: jax.Array) -> jax.Array:
        """x [B,T,H,D] turned to its positions: pos [B|1,T], or [B,T,H] per head."""
        width = int(x.shape[-1] * self.fraction)
        turned, rest = x[..., :width], x[..., width:]
        # [B,T,1|H,1], then [B,T,1|H,D/2]
        angle = pos[..., None] if pos.ndim == 3 else pos[:, :, None, None]
        angle = angle.astype(jnp.float32) * jnp.asarray(
            self.frequencies(width), jnp.float32
        ).reshape((1,) * 3 + (-1,))
        cos, sin = jnp.cos(angle) * self.magnitude, jnp.sin(angle) * self.magnitude
        # (a, b) -> (a cos - b sin, a sin + b cos), in float32
        y = turned.astype(jnp.float32)
        if self.interleaved:
            a, b = y[..., 0::2], y[..., 1::2]
            y = jnp.stack([a * cos - b * sin, a * sin + b * cos], -1).reshape(y.shape)
        else:
            a, b = jnp.split(y, 2, -1)
            y = jnp.concatenate([a * cos - b * sin, a * sin + b * cos], -1)
        return jnp.concatenate([y.astype(x.dtype), rest], -1)


@dataclasses.dataclass(frozen=True)
class ALiBi:
    """ALiBi (Press et al., 2021) arXiv:2108.12409: near tokens count more.

    Head h adds -m_h |i - j| to its logits; m_h is the geometric sequence 2^(-8h/H), h =
    1..H, for H a power of two, else that of the power below, followed by every second
    one of the power above. A logit's `score`: `Softmax(score=ALiBi(heads=8))`.
    """

    heads: int

    def __post_init__(self):
        if self.heads < 1:
            raise ValueError(f"ALiBi: heads={self.heads}: expected 1 or more")

    def slopes(self, h: jax.Array) -> jax.Array:
        """m_h of the global head numbers h (from 0), any shape."""
        # the power of two below H, whose heads have 2^(-8/P), 2^(-16/P), ...
        power = 2 ** int(math.log2(self.heads))
        h = jnp.asarray(h, jnp.float32)
        # exp2, not a power: kernels know it on every platform
        own = jnp.exp2(-8.0 * (h + 1) / power)
        between = jnp.exp2(-4.0 * (2 * (h - power) + 1) / power)
        return jnp.where(h < power, own, between)

    def __call__(self, h: jax.Array, i: jax.Array, j: jax.Array) -> jax.Array:
        """The score added to the logit of query i and key j of head h."""
        return -self.slopes(h) * jnp.abs(i - j).astype(jnp.float32)
