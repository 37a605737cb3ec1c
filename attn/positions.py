"""Positions: how a token's place enters its attention.

`RoPE` rotates q and k before they meet, `ALiBi` adds to their logits, and None leaves
the order to the mask and the recurrence.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attn.contract.angles import angles, dynamic_angles, powers
from attn.contract.angles import ramp_of_pairs, ramp_of_turns

FAST = {"yarn": 32.0, "llama3": 4.0}  # turns, as published


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
    `fast` turns and interpolates in the number of turns; "dynamic" (emozilla, 2023)
    raises theta as "ntk" does, by as much as the longest text of the batch is longer
    than `original`, so that angles move with its length and cannot be streamed;
    "longrope" (Ding et al., 2024, arXiv:2402.13753) divides each channel by a factor of
    its own [D/2], `short` while the longest text of the batch has at most `original`
    tokens and `long` beyond, and multiplies q and k by sqrt(1 + ln(factor) /
    ln(original)): a stream beyond `original` takes short=long. fast:
    None for what each was published with, 32 and, as `high_freq_factor` of Llama 3, 4.
    truncate: whether yarn's ramp begins and ends at whole channels; temperature: what q
    and k are multiplied with, where it is not the scaling's own.

    Angles are as exact at position 2^31 as at 1 ("dynamic": as float32 is).
    """

    theta: float = 10000.0
    scaling: str | None = None
    factor: float = 1.0
    original: int = 2048
    slow: float = 1.0
    fast: float | None = None
    interleaved: bool = False
    fraction: float = 1.0
    truncate: bool = True
    temperature: float | None = None
    short: tuple[float, ...] | None = None
    long: tuple[float, ...] | None = None

    def __post_init__(self):
        known = (None, "linear", "ntk", "dynamic", "yarn", "llama3", "longrope")
        if self.scaling not in known:
            raise ValueError(f"RoPE: scaling={self.scaling!r}: expected one of {known}")
        if self.factor < 1:
            raise ValueError(f"RoPE: factor={self.factor}: expected 1 or more")
        if self.theta <= 0 or self.original < 1:
            raise ValueError(f"RoPE: theta={self.theta}, original={self.original}: "
                             "expected above 0")
        if self.fast is not None and not self.fast > self.slow:
            raise ValueError(
                f"RoPE: fast={self.fast}, slow={self.slow}: expected fast above slow"
            )
        if not 0 < self.fraction <= 1:
            raise ValueError(f"RoPE: fraction={self.fraction}: expected in (0, 1]")
        own = self.scaling == "longrope"
        for name in ("short", "long"):
            given = getattr(self, name)
            if (given is not None) != own or own and not min(given, default=0) > 0:
                raise ValueError(f"RoPE: {name}={given}: expected factors above 0 with "
                                 "scaling='longrope', and none without")

    def frequencies(self, width: int) -> np.ndarray:
        """Angles per token [width/2] in radians, for `width` turned channels."""
        if width % 2:
            raise ValueError(f"RoPE: {width} channels: expected an even number")
        theta = self.theta
        if self.scaling == "ntk" and width > 2:
            # the slowest channel turns `factor` times slower, the fastest as before
            theta = theta * self.factor ** (width / (width - 2))
        plain = powers(theta, width)  # theta^(-2m/D)
        if self.scaling in (None, "ntk", "dynamic"):
            return plain
        if self.scaling == "linear":
            return plain / self.factor
        if self.scaling == "longrope":
            return self._divided(plain, "short")
        fast = FAST[self.scaling] if self.fast is None else self.fast
        if self.scaling == "yarn":
            keep = ramp_of_pairs(
                theta, width, self.original, self.slow, fast, self.truncate)
        else:
            keep = ramp_of_turns(plain, self.original, self.slow, fast)
        # keep 1: as trained; 0: divided by the factor, as "linear" does
        return plain * (keep + (1 - keep) / self.factor)

    def _divided(self, plain: np.ndarray, name: str) -> np.ndarray:
        """Angles per token by the factors of longrope, a factor a pair."""
        factors = np.asarray(getattr(self, name))
        if factors.shape != plain.shape:
            raise ValueError(f"RoPE: {name} has {factors.size} factors: expected "
                             f"{plain.size}, one for each pair of channels")
        return plain / factors

    @property
    def magnitude(self) -> float:
        """What q and k are multiplied with: yarn's or longrope's temperature, or 1."""
        if self.temperature is not None:
            return self.temperature
        if self.scaling == "longrope" and self.factor > 1:
            return math.sqrt(1 + math.log(self.factor) / math.log(self.original))
        return 0.1 * math.log(self.factor) + 1 if self.scaling == "yarn" else 1.0

    @property
    def moving(self) -> bool:
        """Whether angles follow the length of the text, beyond `original` tokens."""
        return self.scaling == "dynamic" or self.short != self.long

    def check_stream(self, size: int) -> None:
        """NotImplementedError if angles would move in a stream of `size` tokens."""
        if self.moving and size > self.original:
            raise NotImplementedError(
                f"{self}: beyond {self.original} tokens its angles follow the length "
                f"of the text, which a stream of {size} does not know; expected fewer "
                "tokens, or another scaling"
            )

    def _angles(self, pos: jax.Array, width: int) -> jax.Array:
        """The angles [...,width/2] at pos [...,1]."""
        own = self.frequencies(width)
        if self.moving and self.scaling == "longrope":
            far = self._divided(powers(self.theta, width), "long")
            beyond = pos.max() >= self.original
            return jnp.where(beyond, angles(pos, far), angles(pos, own))
        if not self.moving or width < 4:
            return angles(pos, own)
        return dynamic_angles(pos, width, self.theta, self.factor, self.original)

    def rotate(self, x: jax.Array, pos: jax.Array) -> jax.Array:
        """x [B,T,H,D] turned to its positions: pos [B|1,T], or [B,T,H] per head."""
        width = int(x.shape[-1] * self.fraction)
        turned, rest = x[..., :width], x[..., width:]
        # [B,T,1|H,1], then [B,T,1|H,D/2]
        angle = pos[..., None] if pos.ndim == 3 else pos[:, :, None, None]
        angle = self._angles(angle, width)
        cos, sin = jnp.cos(angle) * self.magnitude, jnp.sin(angle) * self.magnitude
        # (a, b) -> (a cos - b sin, a sin + b cos), in float32
        y = turned.astype(jnp.float32)
        if self.interleaved:
            a, b = y[..., 0::2], y[..., 1::2]  # pairs (2m, 2m + 1)
            y = jnp.stack([a * cos - b * sin, a * sin + b * cos], -1).reshape(y.shape)
        else:
            a, b = jnp.split(y, 2, -1)  # pairs (m, m + D/2)
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


@dataclasses.dataclass(frozen=True)
class HarmonicALiBi:
    """RoPE x ALiBi (Li, 2024) arXiv:2410.18441: a bias that falls like a logarithm.

    Beside rotated q and k, whose products have the weight gamma, head h adds

        -(1 - gamma) m_h Hm(|i - j|),   Hm(n) = 1 + 1/2 + ... + 1/n,

    or |i - j| itself for bias="linear"; m_h = 2^(-8h/H), h = 1..H, for every H. gamma
    of 1 is RoPE alone, 0 has no content. The formula was not to be had and is proposed
    here. `Softmax(**HarmonicALiBi(heads=8).of(width=64))` has both halves of it.
    """

    heads: int
    gamma: float = 0.5
    bias: str = "harmonic"

    def __post_init__(self):
        if self.heads < 1:
            raise ValueError(f"HarmonicALiBi: heads={self.heads}: expected 1 or more")
        if not 0 < self.gamma <= 1:
            raise ValueError(f"HarmonicALiBi: gamma={self.gamma}: expected in (0, 1]")
        if self.bias not in ("harmonic", "linear"):
            raise ValueError(
                f"HarmonicALiBi: bias={self.bias!r}: expected 'harmonic' or 'linear'")

    def of(self, width: int) -> dict[str, Any]:
        """The fields `scale` and `score` of an attention with D = width."""
        return {"scale": self.gamma * width**-0.5, "score": self}

    def slopes(self, h: jax.Array) -> jax.Array:
        """m_h of the global head numbers h (from 0), any shape."""
        return jnp.exp2(-8.0 * (jnp.asarray(h, jnp.float32) + 1) / self.heads)

    def __call__(self, h: jax.Array, i: jax.Array, j: jax.Array) -> jax.Array:
        """The score added to the logit of query i and key j of head h."""
        far = jnp.abs(i - j).astype(jnp.float32)
        far = harmonic(far) if self.bias == "harmonic" else far
        return -(1 - self.gamma) * self.slopes(h) * far


def harmonic(n: jax.Array) -> jax.Array:
    """Hm(n) = 1 + 1/2 + ... + 1/n of n >= 0, float32, elementwise as kernels want it;
    Hm(0) = 0, to 1e-6."""
    # the asymptotic series at n + 4, where it is exact to float32, and four steps back
    y = n + 4.5
    z = 1 / (y * y)
    # log y + gamma + 1/(24 y^2) - 7/(960 y^4) + 31/(8064 y^6), y = n + 4 + 1/2
    far = jnp.log(y) + 0.5772156649015329 + z * (1 / 24 - z * (7 / 960 - z * 31 / 8064))
    return far - (1 / (n + 1) + 1 / (n + 2) + 1 / (n + 3) + 1 / (n + 4))
