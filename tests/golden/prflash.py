"""Adapter for prflash.npz: RoPE x ALiBi, given draws of blocks, the staircase of bits,
segmentation."""

from __future__ import annotations

from typing import Any, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from attn.positions import HarmonicALiBi, RoPE, harmonic
from attn.prflash import PrFlash
from attn.saq import SAQ
from attn.softmax import Softmax
from experiments import tokenise


def run(case: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Which part it is, its arrays say."""
    f = next(f for name, f in (
        ("harmonic_numbers", rope_alibi), ("uniform_draws", blocks), ("keys", saq),
        ("words", swe)) if name in case)
    return {name: np.asarray(a) for name, a in f(case).items()}


def rope_alibi(case):
    q, k, v = (jnp.asarray(case[name]) for name in "qkv")
    (_, t, h, d), rope = q.shape, RoPE(case["config"]["rope_theta"])
    bias, n = HarmonicALiBi(h, case["config"]["gamma"]), jnp.arange(t)
    q, k = (rope.rotate(a, n[None]) for a in (q, k))
    return {"harmonic_numbers": harmonic(n.astype(jnp.float32)),
            "slopes": bias.slopes(jnp.arange(h)), "out": Softmax(**bias.of(d))(q, k, v)}


def blocks(case):
    q, k, v = (jnp.asarray(case[name]) for name in "qkv")
    table = tuple(case["keep_probability_by_block_distance"].tolist())
    attention = PrFlash(block=case["config"]["block"], family="table", table=table)
    draws = jnp.asarray(case["uniform_draws"])
    # values of one position each make the output the weights
    t, size, n = q.shape[1], attention.block, len(draws)
    eye = jnp.broadcast_to(jnp.eye(t)[None, :, None], (1, t, k.shape[2], t))
    read = np.asarray(attention(q, k, eye, draws=draws))[0, :, 0] > 0  # [T,S]
    return {"out": attention(q, k, v, draws=draws),
            "block_mask": read.reshape(n, size, n, size).any((1, 3))}


def saq(case):
    """One head, and values of zeros, which the case has none of."""
    config, keys = case["config"], jnp.asarray(case["keys"])
    t, n = keys.shape[0], config["segment"]
    policy = SAQ(bits=tuple(config["bits_newest_first"]), tokens=n,
                 group=config["group"])
    k = keys[None, :, None]
    v = jnp.zeros((1, t, 1, config["group"]))
    state, _ = jax.jit(policy.step)(policy.init_state(t, k, k, v), k, k, v)
    cache = policy.cache(state)
    order = np.argsort(np.where(cache.pos[0, :, 0] < 0, t, cache.pos[0, :, 0]))[:t]
    whole = t // n
    bits = [policy.bits[min(age, len(policy.bits)) - 1] for age in range(whole, 0, -1)]
    return {"reconstructed_keys": np.asarray(cache.k)[0, order, 0],
            "bits_per_segment_oldest_first": np.array(bits),
            "residual_tokens": np.array(t - whole * n)}


def swe(case):
    logp = dict(zip(case["vocab"].tolist(), case["logp"].tolist()))
    longest = max(map(len, logp))
    found = [tokenise.segment(word, logp, longest) for word in case["words"].tolist()]
    pieces = [" ".join(own) for _, own in found]
    assert pieces == case["segmentation"].tolist()
    return {"best_logp": np.array([best for best, _ in found])}
