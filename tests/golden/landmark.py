"""Adapter for landmark.npz: grouped softmax with landmarks anywhere, and retrieval."""

from __future__ import annotations

import re
from typing import Any, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from attn.cache.blocks import Blocks
from attn.landmark import Landmark
from attn.positions import RoPE

# specs/landmark.md section 8: 2e-5 for training, 1e-4 for inference
TOLERANCE = {"probs": 2e-5}


def run(case: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """What the arrays of the case ask for."""
    form = _training if "is_landmark" in case else _inference
    with jax.default_matmul_precision("highest"):
        return {name: np.asarray(a) for name, a in form(case).items()}


def _training(case):
    q, k, v = (jnp.asarray(case[name]) for name in "qkv")
    config, marks = case["config"], jnp.asarray(case["is_landmark"])
    if not config.get("causal", True):
        raise ValueError("causal=False: Landmark Attention has a causal order")
    block = config.get("block_tokens", 1)  # of irregular landmarks there is no size
    attention = Landmark(block=block, scale=config.get("scale"))
    b, t, heads, _ = k.shape

    @jax.jit
    def both(q, k, v, do):
        f = lambda q, k, v: attention(q, k, v, landmark=marks)
        o, back = jax.vjp(f, q, k, v)
        # one-hot values make the outputs the weights
        eye = jnp.broadcast_to(jnp.eye(t)[None, :, None], (b, t, heads, t))
        return o, *back(do), f(q, k, eye).swapaxes(1, 2)

    found = both(q, k, v, jnp.asarray(case["cotangent"]))
    out = dict(zip(("out", "dq", "dk", "dv", "probs"), found))
    regular = np.broadcast_to(np.arange(t) % attention.size == attention.block, (b, t))
    if (regular == case["is_landmark"]).all():
        plain = jax.jit(attention)
        np.testing.assert_allclose(plain(q, k, v), out["out"], rtol=1e-5, atol=1e-5)
    return out


def _inference(case):
    config = case["config"]
    freqs = np.asarray(case["rope_freqs"], np.float64)
    theta = float(freqs[1]) ** -len(freqs) if len(freqs) > 1 else 1e4
    rope = RoPE(theta=round(theta, 3), interleaved=True)
    np.testing.assert_allclose(rope.frequencies(2 * len(freqs)), freqs, rtol=1e-5)
    attention = Landmark(
        block=config["block_tokens"], top_k=config["topk"],
        cache_blocks=config["cache_blocks"], selection=config["selection"], rope=rope,
    )
    matches = (re.match(r"chunk(\d+)/", name) for name in case.keys())
    pieces = {int(found[1]) for found in matches if found}
    state, out, step = None, {}, jax.jit(attention.step)
    for n in sorted(pieces):
        at = f"chunk{n}/"
        q, k, v = (
            jnp.asarray(case[at + name]) for name in ("q_nopos", "k_nopos", "v")
        )
        if state is None:
            size = 10**6
            state = attention.init_state(size, q, k, v)
        blocks = Blocks(state, attention.size, attention.top_k)
        end = int(state.end[0])
        out[at + "start_index"] = end - int(blocks.shift[0])
        out[at + "num_prefix_keys"] = end % attention.size + attention.size * min(
            int(blocks.cached[0]), attention.top_k
        )
        pos = end + np.arange(q.shape[1])
        marks = pos % attention.size == attention.block
        out[at + "is_landmark"] = np.broadcast_to(marks, case[at + "is_landmark"].shape)
        state, out[at + "out"] = step(state, q, k, v)
    return out
