"""Adapter for hip.npz: the blocks that the search finds, and attention to them."""

from __future__ import annotations

from typing import Any, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from attn.hip import HiP
from attn.sparse.tree_search import Tree, search


def run(case: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """What was found for q [N,T,D] among k [N,S,D], and o; batch and heads are N."""
    config = case["config"]
    attention = HiP(
        keys=config["mask_k"], block_q=config["block_q"], block_k=config["block_k"],
        window=config["sliding_window"], sink=config["sink"], scale=config["scale"],
    )
    q, k, v = (jnp.asarray(case[name])[:, :, None] for name in "qkv")
    (n, t), s = q.shape[:2], k.shape[1]
    blocks = t // attention.block_q
    seen = jnp.minimum((jnp.arange(blocks) + 1) * attention.block_q + s - t, s)[None]
    length = jnp.maximum(seen - attention.window, 0)
    rows = q.reshape(n, blocks, attention.block_q, 1, -1)
    tree = Tree(jnp.zeros_like(seen), length, seen)
    found = jax.jit(search, static_argnums=(3, 4))(
        rows[:, :, 1::2], k, tree, attention.found, attention.block_k)[:, :, 0]
    number = np.asarray(jnp.minimum(-(-length // attention.block_k), attention.found))
    number = np.broadcast_to(number, (n, blocks))
    # the stored ones are first, and what stands behind them means nothing
    starts = np.array(case["selected_key_block_start"])
    for at in np.ndindex(n, blocks):
        own = np.asarray(found[at])
        starts[at][:number[at]] = own[len(own) - number[at]:] * attention.block_k
    call = jax.jit(attention)
    # values of one position each make the output the weights
    eye = jnp.broadcast_to(jnp.eye(s)[None, :, None], (n, s, 1, s))
    return {
        "selected_key_block_start": starts, "num_selected": number,
        "out": np.asarray(call(q, k, v)[:, :, 0]),
        "token_mask": np.asarray(call(q, k, eye)[:, :, 0] > 0),
    }
