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
from jax.sharding import PartitionSpec

from attn.contract.varying import varying
from models.feed import ACTIVATIONS, INIT, Feed
from models.vocabulary import splits_rows

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
        how = self.how
        weights, chosen = self._chosen(x)  # [B,T,k]
        y = Mlps(how, self.dtype, name="experts")(
            x.astype(self.dtype), weights.astype(self.dtype), chosen)
        if how.shared is None:
            return y
        more = how.shared.module(self.dtype, "shared")(x)
        if how.shared_gate:
            gate = nn.Dense(1, use_bias=False, dtype=self.dtype, name="shared_gate")(x)
            more = nn.sigmoid(gate) * more
        return y + more

    def _chosen(self, x) -> tuple[jax.Array, jax.Array]:
        """The weights [B,T,k] float32 and the numbers [B,T,k] of each token's experts.
        """
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
            worth = scores + bias.astype(jnp.float32).reshape(1, 1, -1)
        _, chosen = jax.lax.top_k(self._of_groups(worth), how.top_k)
        weights = jnp.take_along_axis(scores, chosen, -1)
        if how.renormalise:
            weights = weights / (weights.sum(-1, keepdims=True) + 1e-20)
        return weights * how.factor, chosen

    def _of_groups(self, worth) -> jax.Array:
        """worth [B,T,N], -inf outside of the groups that a token may choose from."""
        how = self.how
        if how.groups == 1:
            return worth
        parts = worth.reshape(*worth.shape[:2], how.groups, -1)  # [B,T,groups,.]
        best = jax.lax.top_k(parts, min(2, parts.shape[3]))[0].sum(-1)
        _, among = jax.lax.top_k(best, how.top_groups)
        number = jnp.arange(how.groups).reshape(1, 1, 1, -1)
        among = (among[..., None] == number).any(2)  # [B,T,groups]
        return jnp.where(among[..., None], parts, -jnp.inf).reshape(worth.shape)


class Mlps(nn.Module):
    """N gated MLPs, each for the rows that chose it.

    On a mesh whose axis `model` can split N, each device has some experts and gives
    what these say of its tokens; the sum over the devices is the result, and neither
    tokens nor kernels are gathered over `model`.
    """

    how: Experts
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, weights, chosen):
        """x [B,T,E], weights [B,T,k], chosen [B,T,k] int -> [B,T,E]."""
        n, width, inner = self.how.experts, x.shape[-1], self.how.hidden
        params = {}
        for name, a, b in (("gate", width, inner), ("up", width, inner),
                           ("out", inner, width)):
            kernel = self.param(f"{name}_kernel", _per_expert, (n, a, b), jnp.float32)
            params[f"{name}_kernel"] = kernel.astype(self.dtype)
            if self.how.bias:
                zeros = nn.initializers.zeros_init()
                bias = self.param(f"{name}_bias", zeros, (n, b), jnp.float32)
                params[f"{name}_bias"] = bias.astype(self.dtype)
        mesh = jax.sharding.get_abstract_mesh()
        split = splits_rows(mesh, x.shape[:2]) and n % mesh.shape.get("model", 1) == 0
        numbers = jnp.arange(n, dtype=chosen.dtype)
        if not split:
            return said(self.how, params, numbers, x, weights, chosen)
        own, rows = PartitionSpec("model"), PartitionSpec("data", "seq")

        def local(params, numbers, x, weights, chosen):
            # said at the door: of a product of runs jax does not know that gradients
            # are sums over the devices
            params, x, weights = varying((params, x, weights), numbers)
            y = said(self.how, params, numbers, x, weights, chosen)
            return jax.lax.psum(y, "model")

        return jax.shard_map(
            local, in_specs=(own, own, rows, rows, rows), out_specs=rows
        )(params, numbers, x, weights, chosen)


def said(how: Experts, params: dict, numbers, x, weights, chosen) -> jax.Array:
    """The weighted sum [B,T,E] of what the experts `numbers` [n], whose params these
    are, say of x [B,T,E]; of a token's other experts nothing."""
    n, k, width = numbers.shape[0], chosen.shape[-1], x.shape[-1]
    expert = chosen.reshape(-1) - numbers[0]  # [M k]
    here = (expert >= 0) & (expert < n)
    expert = jnp.where(here, expert, n)  # others come last
    order = jnp.argsort(expert, stable=True)
    rows = x.reshape(-1, width)[order // k]  # sorted by expert [M k,E]
    sizes = jnp.bincount(expert, length=n + 1)[:n].astype(jnp.int32)
    whose = jnp.minimum(expert[order], n - 1)

    def dense(name, a):
        # each run of rows by its own kernel: [R,E] [n,E,F]
        y = jax.lax.ragged_dot(a, params[f"{name}_kernel"], sizes)
        return y + params[f"{name}_bias"][whose] if how.bias else y

    y = dense("out", _gated(how, dense("gate", rows), dense("up", rows)))
    y = jnp.where(here[order][:, None], y, 0)[jnp.argsort(order)]  # as tokens stand
    # the weighted sum over the chosen, in the order of their weights
    y = y.reshape(*chosen.shape, width) * weights[..., None]
    return y.sum(2)


def _gated(how: Experts, gate, up) -> jax.Array:
    if how.limit is None:
        return ACTIVATIONS[how.activation](gate) * up
    gate = jnp.minimum(gate, how.limit)
    up = jnp.clip(up, -how.limit, how.limit)
    return (up + 1) * (gate * nn.sigmoid(how.steep * gate))


def _per_expert(key, shape, dtype):
    """Kernels [N,E,F], each with E inputs."""
    keys = jax.random.split(key, shape[0])
    return jnp.stack([INIT(one, shape[1:], dtype) for one in keys])
