"""Adapter for musictransformer.npz: relative attention, tokens of music."""

from __future__ import annotations

from typing import Any, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from attn.exact import distances
from attn.relative import Relative
from experiments.data import music


def run(case: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """What the arrays of the case ask for."""
    kind = case["config"]["kind"]
    found = {"global_relative": _global, "local_relative": _local,
             "performance_tokens": _performance, "jsb_serialisation": _grid}[kind](case)
    return {name: np.asarray(a) for name, a in found.items()}


def _attended(case, attention) -> dict[str, Any]:
    q, k, v = (jnp.asarray(case[n], jnp.float32) for n in "qkv")
    tables = {ours: case.get(own) for ours, own in (
        ("distances", "rel_k"), ("distance_values", "rel_v"))}
    # of one table, or one for each head
    params = {n: jnp.asarray(a, jnp.float32).reshape(-1, *a.shape[-2:])
              for n, a in tables.items() if a is not None}
    f = jax.jit(lambda *args: attention.apply({"params": params}, *args))
    found = {"out": f(q, k, v)}
    if "weights" in case:
        # what values of 1 at one key give, where values alone are read
        plain = attention.clone(by_value=False)
        own = {"params": {"distances": params["distances"]}}
        one = jnp.eye(q.shape[1])
        rows = jax.vmap(lambda at: plain.apply(own, q, k, jnp.broadcast_to(
            at[None, :, None, None], (*k.shape[:3], 1))))(one)  # [S,B,T,H,1]
        found["weights"] = rows[..., 0].transpose(1, 3, 2, 0)
    if "srel" in case:
        scaled = (q * q.shape[-1] ** -0.5).transpose(0, 2, 1, 3)[:, :, None]
        found["srel"] = _skewed(scaled, params["distances"], q.shape[1])[:, :, 0]
    return found


def _skewed(x, table, length: int):
    """The unmasked part of the products x [B,K,G,T,D] with e, in one tile."""
    table = table[:, None]
    term = distances.term(table.shape[2] - 1, 0, (length, length), (0, 0), None)
    return jnp.tril(jax.jit(term)(x, table))


def _global(case):
    config = case["config"]
    return _attended(case, Relative(
        config["max_relative"], shared=config["share_heads"],
        by_value=config["add_relative_to_values"]))


def _local(case):
    m = case["config"]["block_length"]
    rows = case["config"]["rel_embed_length"]
    length = case["q"].shape[1]
    # the block of the text: one, if it is shorter than two
    assert case["config"]["effective_block"] == (length if length < 2 * m else m)
    found = _attended(case, Relative(rows, block=m))
    # products of a block's queries with the last 2 m rows, as their own tile has them:
    # keys of the block before and of its own
    tail = jnp.asarray(case["tail_rel_in"], jnp.float32)
    one = jnp.eye(2 * m, dtype=jnp.float32)[None, None]  # rows as vectors of their own
    term = distances.term(2 * m - 1, m, (m, 2 * m), (0, 0), None)
    found["tail_rel_out"] = jnp.tril(term(tail[None, None, None], one)[0, 0, 0], m)
    return found


def _performance(case):
    columns = (case[n] for n in ("start", "duration", "pitch", "velocity"))
    notes = [music.Note(*map(int, row)) for row in zip(*columns)]
    return {"tokens": np.asarray(music.performance(notes))}


def _grid(case):
    tokens = music.serialise(case["grid"])
    assert (music.grid_of(tokens) == case["grid"]).all()
    return {"tokens": tokens}
