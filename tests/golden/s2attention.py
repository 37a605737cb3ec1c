"""Adapter for s2attention.npz: block masks and their columns, attention and gradients.
"""

from __future__ import annotations

from typing import Any, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from attn.exact.dense import allowed, formed, logits
from attn.s2 import S2
from attn.sparse.shards import columns, forgets
from pallas_kernels.logits import LogitSpec, Where


def run(case: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """What the arrays of the case ask for."""
    config = case["config"]
    heads, tokens = config.get("heads"), config.get("tokens")
    if heads is None:
        tokens, heads = case["q"].shape[1:3]
    kv_heads = config.get("kv_heads") or heads
    attention = S2(
        config["block"], config["local_blocks"], config["vert_stride"],
        offset=config.get("head_sliding_offset", 0),
        dense=config.get("num_dense_heads", 0),
        homogeneous=config.get("homo_head", False), causal=config.get("causal", True),
        scale=config.get("scale"),
    )
    blocks = attention.blocks(heads, kv_heads, tokens, config.get("past_len", 0))
    out = {"block_mask": blocks, **csr(blocks)}
    if "kv_cache_efficient" in case:
        out["kv_cache_efficient"] = np.asarray(forgets(blocks))
    if "q" in case:
        out |= attended(attention, case)
    return {name: np.asarray(a) for name, a in out.items()}


def csr(blocks: np.ndarray) -> dict[str, np.ndarray]:
    """The columns of each head one after the other, and where its rows begin."""
    count = blocks.sum(-1)
    crow = np.pad(np.cumsum(count, 1), ((0, 0), (1, 0)))
    col = np.full((len(blocks), crow[:, -1].max()), -1)
    for h, rows in enumerate(columns(blocks)):
        found = rows[rows >= 0]
        col[h, :found.size] = found
    return {"csr_crow": crow, "csr_col": col}


def attended(attention: S2, case: Mapping[str, Any]) -> dict[str, Any]:
    """Output, gradients, and what a query sees and its lse, by the pattern."""
    q, k, v, do = (jnp.asarray(case[name]) for name in ("q", "k", "v", "cotangent"))
    t, h = q.shape[1:3]
    pos = jnp.arange(t)[None]
    where = Where(pos, pos, head=jnp.arange(h))
    spec = LogitSpec(attention.pattern(h, k.shape[2]), attention.scale)
    seen = allowed(spec.mask, where)
    s = jnp.where(seen, formed(logits(q, k, spec.scale), spec, where), -jnp.inf)
    out, back = jax.vjp(jax.jit(attention), q, k, v)
    return {
        "out": out, **dict(zip(("dq", "dk", "dv"), back(do))),
        "token_mask": seen[0], "lse": jax.nn.logsumexp(s, -1),
    }
