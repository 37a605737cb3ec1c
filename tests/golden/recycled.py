"""Adapter for recycled.npz: full steps, outputs, and what is recycled after each."""

from __future__ import annotations

from typing import Any, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from attn.contract.segments import locate
from attn.recycled import Recycled


def run(case: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """A prompt and single tokens."""
    config = case["config"]
    q, k, v = (jnp.asarray(case[name]) for name in "qkv")
    fixed = config["mode"] == "fixed"
    policy = Recycled(
        capacity=config["K_recycle"], schedule="stride" if fixed else "similarity",
        stride=config["stride"] or 1, check_every=config["check_every"] or 1,
        threshold=float(config["threshold"]), group=config["gqa_pool"])
    n = config["prefill"]
    step, asks = jax.jit(policy.step), jax.jit(policy.asks)
    state = policy.init_state(q.shape[1], *(a[:, :n] for a in (q, k, v)))
    state, _ = step(state, *(a[:, :n] for a in (q, k, v)))
    outs, full, held = [], [], [kept(state)]
    now = policy_now(q.shape[0])
    for t in range(n, q.shape[1]):
        full.append(asks(state, q[:, t:t + 1], now))
        state, o = step(state, *(a[:, t:t + 1] for a in (q, k, v)))
        outs.append(o)
        held.append(kept(state))
    return {"out": np.concatenate(outs, 1), "full_step": np.stack(full, 1),
            "cache_positions": np.stack(held, 1)}


def policy_now(batch):
    """One real token of the sequence that goes on."""
    return locate(None, batch, 1)


def kept(state):
    """Sorted positions [B,K,capacity]; the free slot comes first."""
    return np.sort(np.asarray(state.few.cache.pos), 1)[:, 1:].swapaxes(1, 2)
