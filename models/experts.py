"""Experts: a token goes through the few MLPs that its router chooses.

    p = score(x W_r),   chosen = top-k of p,   y = sum_(n in chosen) w_n MLP_n(x)

No token is dropped: tokens are sorted by expert, and each expert multiplies its own
rows (`jax.lax.ragged_dot`), whatever their number. Sources: mixtures with a sparse gate
(Shazeer et al., 2017) arXiv:1701.06538; shared experts (Dai et al., 2024)
arXiv:2401.06066; sigmoid scores whose bias chooses but does not weigh, and groups of
experts (DeepSeek-AI, 2024) arXiv:2412.19437; clamped gates (OpenAI, 2025)
arXiv:2508.10925.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from models.feed import ACTIVATIONS, INIT, Feed

SCORES = ("softmax", "top", "sigmoid")


@dataclasses.dataclass(frozen=True)
class Experts:
    """experts N of width `hidden` F, of which each token goes through `top_k`.

    score: "softmax" over all experts, "top" (softmax over the chosen ones) or
    "sigmoid", with a learned bias that chooses only. renormalise: weights are divided
    by their sum; factor: and multiplied with this. groups: experts lie in so many, and
    only the `top_groups` with the greatest sums of two scores are chosen from.
    shared: an expert that every token goes through, as a `Feed`; shared_gate: times
    sigmoid(x w). limit, steep: gates are x sigmoid(steep x), clamped to `limit`, times
    the clamped up + 1, as gpt-oss has them. bias: of experts and router.
    """

    hidden: int
    experts: int
    top_k: int
    score: str = "softmax"
    renormalise: bool = True
    factor: float = 1.0
    groups: int = 1
    top_groups: int = 1
    shared: Feed | None = None
    shared_gate: bool = False
    activation: str = "silu"
    limit: float | None = None
    steep: float = 1.702
    bias: bool = False

    def __post_init__(self):
        if self.score not in SCORES:
            raise ValueError(f"Experts: score={self.score!r}: expected one of {SCORES}")
        for name in ("hidden", "experts", "top_k", "groups", "top_groups"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"Experts: {name}={getattr(self, name)}: expected 1 or more")
        if self.top_k > self.experts or self.experts % self.groups:
            raise ValueError(
                f"Experts: top_k={self.top_k}, groups={self.groups}: expected at most "
                f"and a divisor of experts={self.experts}")
        if self.top_groups > self.groups:
            raise ValueError(f"Experts: top_groups={self.top_groups}: expected at most "
                             f"groups={self.groups}")
        if self.top_k > self.top_groups * (self.experts // self.groups):
            raise ValueError(f"Experts: top_k={self.top_k}: expected no more than the "
                             f"experts of top_groups={self.top_groups} groups")

    def module(self, dtype: Any, name: str | None = None) -> nn.Module:
        """The layer, a linen module of [B,T,E] -> [B,T,E]."""
        return ExpertLayer(self, dtype, name=name)


class ExpertLayer(nn.Module):
    """The module of `Experts`: router, experts/gate, experts/up and experts/out, whose
    kernels have an axis N in front, and shared."""

    how: Experts
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        """x [B,T,E] -> [B,T,E]."""
        how, flat = self.how, x.reshape(-1, x.shape[-1])  # [M,E]
        weights, chosen = self._chosen(flat)  # [M,k]
        y = Mlps(how, self.dtype, name="experts")(flat.astype(self.dtype), chosen)
        # the weighted sum over the chosen, in the order of their weights: [M,k,E]
        y = (y * weights[..., None].astype(self.dtype)).sum(1).reshape(x.shape)
        if how.shared is None:
            return y
        more = how.shared.module(self.dtype, "shared")(x)
        if how.shared_gate:
            gate = nn.Dense(1, use_bias=False, dtype=self.dtype, name="shared_gate")(x)
            more = nn.sigmoid(gate) * more
        return y + more

    def _chosen(self, x) -> tuple[jax.Array, jax.Array]:
        """The weights [M,k] float32 and the numbers [M,k] of each token's experts."""
        how = self.how
        logits = nn.Dense(
            how.experts, use_bias=how.bias, dtype=jnp.float32, name="router"
        )(x.astype(jnp.float32))
        if how.score == "top":
            best, chosen = jax.lax.top_k(logits, how.top_k)
            return jax.nn.softmax(best) * how.factor, chosen
        if how.score == "softmax":
            scores = worth = jax.nn.softmax(logits)
        else:
            scores = nn.sigmoid(logits)
            zeros = nn.initializers.zeros_init()
            bias = self.param("correction", zeros, (how.experts,), jnp.float32)
            worth = scores + bias.astype(jnp.float32)[None]
        _, chosen = jax.lax.top_k(self._of_groups(worth), how.top_k)
        weights = jnp.take_along_axis(scores, chosen, 1)
        if how.renormalise:
            weights = weights / (weights.sum(1, keepdims=True) + 1e-20)
        return weights * how.factor, chosen

    def _of_groups(self, worth) -> jax.Array:
        """worth [M,N], -inf outside of the groups that a token may choose from."""
        how = self.how
        if how.groups == 1:
            return worth
        parts = worth.reshape(worth.shape[0], how.groups, -1)  # [M,groups,N/groups]
        best = jax.lax.top_k(parts, min(2, parts.shape[2]))[0].sum(-1)  # [M,groups]
        _, among = jax.lax.top_k(best, how.top_groups)
        open_ = (among[:, :, None] == jnp.arange(how.groups)[None, None]).any(1)
        return jnp.where(open_[..., None], parts, -jnp.inf).reshape(worth.shape)


class Mlps(nn.Module):
    """N gated MLPs, each for the rows that chose it."""

    how: Experts
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, chosen):
        """x [M,E], chosen [M,k] int -> what each token's experts say, [M,k,E]."""
        n, (m, k) = self.how.experts, chosen.shape
        expert = chosen.reshape(-1)  # [M k]
        order = jnp.argsort(expert, stable=True)
        rows = x[order // k]  # sorted by expert [M k,E]
        sizes = jnp.bincount(expert, length=n).astype(jnp.int32)  # [N], sum M k
        whose = expert[order]
        gate = self._dense("gate", self.how.hidden, rows, sizes, whose)
        up = self._dense("up", self.how.hidden, rows, sizes, whose)
        y = self._dense("out", x.shape[-1], self._gated(gate, up), sizes, whose)
        return y[jnp.argsort(order)].reshape(m, k, -1)  # back to the tokens' order

    def _gated(self, gate, up) -> jax.Array:
        how = self.how
        if how.limit is None:
            return ACTIVATIONS[how.activation](gate) * up
        gate = jnp.minimum(gate, how.limit)
        up = jnp.clip(up, -how.limit, how.limit)
        return (up + 1) * (gate * nn.sigmoid(how.steep * gate))

    def _dense(self, name: str, width: int, x, sizes, whose) -> jax.Array:
        """x [R,E] in runs of `sizes` [N] rows, times the kernel of each run."""
        n, e = self.how.experts, x.shape[-1]
        kernel = self.param(f"{name}_kernel", _per_expert, (n, e, width), jnp.float32)
        y = jax.lax.ragged_dot(x, kernel.astype(self.dtype), sizes)  # [R,E] [N,E,F]
        if not self.how.bias:
            return y
        zeros = nn.initializers.zeros_init()
        bias = self.param(f"{name}_bias", zeros, (n, width), jnp.float32)
        return y + bias.astype(self.dtype)[whose]


def _per_expert(key, shape, dtype):
    """Kernels [N,E,F], each with E inputs."""
    keys = jax.random.split(key, shape[0])
    return jnp.stack([INIT(one, shape[1:], dtype) for one in keys])
