"""Adapter for h2o-streaming.npz: one function a case, named as the case begins."""

from __future__ import annotations

from typing import Any, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from attn.adakv import AdaKV
from attn.cache import evict, kv as caches
from attn.cache.rolling import rerotated
from attn.contract.segments import locate
from attn.exact.dense import logits, values, weights
from attn.h2o import H2O, simulated
from attn.kivi import KIVI
from attn.pyramidkv import budgets
from attn.quest import Quest
from attn.positions import RoPE
from attn.streaming import Streaming
from attn.tova import TOVA


def run(case: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Which policy it is, its arrays say."""
    config = case["config"]
    kinds = {
        "sink": streaming, "heavy": h2o, "steps": tova, "new_positions": rerotate,
        "beta": pyramid, "floor_alpha": ada, "page": quest, "bits": kivi,
    }
    name = next(word for word in kinds if word in config)
    return {key: np.asarray(a) for key, a in kinds[name](case, config).items()}


def arrays(case, names="qkv"):
    return tuple(jnp.asarray(case[name]) for name in names)


def streaming(case, config):
    """Token by token, with keys from before the rotation."""
    q, k, v = arrays(case, ("q_prerope", "k_prerope", "v"))
    policy = Streaming(
        sinks=config["sink"], window=config["window"], rope=RoPE(config["rope_base"]))
    state, outs, held = policy.init_state(q.shape[1], q, k, v), [], []
    step = jax.jit(policy.step)
    for t in range(q.shape[1]):
        state, o = step(state, *(a[:, t:t + 1] for a in (q, k, v)))
        outs.append(o)
        held.append(int((state.pos[0, :, 0] >= 0).sum()))
    return {"out": jnp.concatenate(outs, 1), "cache_len": np.array(held)}


def decoded(policy, q, k, v, prompt, steps):
    """What a prompt and single tokens give: out [B,1,H,V] of each step, and for the
    prompt and each step the positions and scores held, in order."""
    step = jax.jit(policy.step)
    start = policy.init_state(q.shape[1], *(a[:, :prompt] for a in (q, k, v)))
    state, first = step(start, *(a[:, :prompt] for a in (q, k, v)))
    held, outs = [kept(policy, state)], [first]
    for t in range(prompt, prompt + steps):
        state, o = step(state, *(a[:, t:t + 1] for a in (q, k, v)))
        held.append(kept(policy, state))
        outs.append(o)
    return outs, *map(np.stack, zip(*held))


def kept(policy, state: evict.Scored):
    """Positions and scores [K,budget] of the first row in order, -1 behind them."""
    pos, score = np.asarray(state.cache.pos[0].T), np.asarray(state.score[0].T)
    late = np.where(pos < 0, 10**6, pos)
    order = np.argsort(late, axis=1)[:, :policy.budget]
    return np.take_along_axis(pos, order, 1), np.take_along_axis(score, order, 1)


def h2o(case, config):
    q, k, v = arrays(case)
    policy = H2O(heavy=config["heavy"], recent=config["recent"])
    outs, pos, score = decoded(policy, q, k, v, config["prefill"], config["steps"])
    n = config["prefill"]
    p = map_of(q[:, :n], k[:, :n])
    mask = simulated(p, config["heavy"])
    if case["hh_mask_simulated"][0, 0, 1] == 0:  # joined with the causal mask
        mask = mask & np.tri(n, dtype=bool)
    return {"decode_out": jnp.stack([o[0, 0] for o in outs[1:]])[None],
            "kept_positions": pos, "acc_scores": score, "hh_mask_simulated": mask[0]}


def map_of(q, k):
    """The causal map [B,H,T,T]."""
    return weights(logits(q, k), np.tri(q.shape[1], dtype=bool)[None, None])


def tova(case, config):
    q, k, v = arrays(case)
    policy = TOVA(capacity=config["capacity"])
    outs, pos, _ = decoded(policy, q, k, v, config["prefill"], config["steps"])
    return {"decode_out": jnp.stack([o[0, 0] for o in outs[1:]])[None],
            "kept_positions": pos[:, 0]}


def rerotate(case, config):
    rope = RoPE(config["rope_base"])
    every, k = arrays(case, ("k_prerope", "k_rope"))
    at = jnp.asarray(case["kept_idx"]).swapaxes(1, 2).astype(jnp.int32)  # [B,n,K]
    taken = jnp.take_along_axis(k, at[..., None], 1)
    counted = jnp.arange(k.shape[1], dtype=jnp.int32)[None]
    return {"k_rope": rope.rotate(every, counted),
            "k_rerotated": rerotated(taken, at, rope)}


def pyramid(case, config):
    given = (config[name] for name in ("q_len", "capacity", "window", "beta", "layers"))
    return {"pyramid_topk": np.array(budgets(*given))}


def ada(case, config):
    q, k, v = arrays(case)
    s, heads = k.shape[1:3]
    policy = AdaKV(
        capacity=config["base_capacity"], window=config["window"],
        kernel=config["kernel"], pool=config["pool"].removesuffix("pool"),
        floor=config["floor_alpha"])
    now = locate(None, 1, s)
    pos = jnp.broadcast_to(now.pos[..., None], (1, s, heads))
    cache, early = caches.Cache(k, v, pos, *now[2:]), pos < s - policy.window
    score = policy.head_scores(q, cache, now, early)[0, :, :s - policy.window]
    state, _ = jax.jit(policy.step)(policy.init_state(s + 1, q, k, v), q, k, v)
    tokens, own = (np.asarray(a).ravel() for a in (state.tokens, state.heads))
    mask = np.zeros((heads, s), bool)
    mask[own[own >= 0], tokens[own >= 0]] = True
    return {"pooled_scores_kv": score, "head_lens": mask.sum(1), "keep_mask": mask}


def same_scores(ours, theirs, results) -> float:
    """Max pooling makes exact ties at the cut: 0 for a choice whose scores are those of
    the stored one, head by head."""
    score = np.asarray(results["pooled_scores_kv"])
    cut = score.shape[1]
    chosen = [[np.sort(np.asarray(row)[mask[:cut]]) for row, mask in zip(score, kept)]
              for kept in (ours, theirs)]
    same = all(len(a) == len(b) and np.allclose(a, b, rtol=1e-5)
               for a, b in zip(*chosen)) and (ours[:, cut:] == theirs[:, cut:]).all()
    return 0.0 if same else float("nan")


RULES = {"keep_mask": same_scores}


def quest(case, config):
    q, k, v = arrays(case)
    s, h = k.shape[1], q.shape[2]
    policy = Quest(page=config["page"], budget=config["token_budget"],
                   least=config["min_pages"])
    wide = jnp.broadcast_to(q, (1, s, *q.shape[2:]))
    state, _ = jax.jit(policy.step)(policy.init_state(s, wide, k, v), wide, k, v)
    slots = np.asarray(policy.chosen_slots(state, q[:, 0]))[0]  # [N,H]
    mask = np.zeros((1, h, s), bool)
    for head in range(h):
        mask[0, head, slots[slots[:, head] >= 0, head]] = True
    p = weights(logits(q, k), mask[:, :, None])
    return {"page_upper_bound": policy.bounds(state, q[:, 0]), "token_mask": mask,
            "out": values(p, v)}


def kivi(case, config):
    k, v = arrays(case, "kv")
    policy = KIVI(bits=config["bits"], group=config["group"],
                  residual=config["residual"])
    state, _ = jax.jit(policy.step)(policy.init_state(k.shape[1], k, k, v), k, k, v)
    cache, out = policy.cache(state), {}
    for name, codes, n, per in (
        ("k", state.keys, config["n_k_quant"], policy.group),
        ("v", state.values, config["n_v_quant"], 1),
    ):
        words = n * policy.bits // 32 if name == "k" else n
        out[f"{name}_code_packed"] = jnp.swapaxes(codes.code[:, :words], 1, 2)
        out[f"{name}_scale"] = jnp.swapaxes(codes.scale[:, :n // per], 1, 2)
        out[f"{name}_min"] = jnp.swapaxes(codes.least[:, :n // per], 1, 2)
        out[f"{name}_deq"] = getattr(cache, name)[:, :n]
    return out
