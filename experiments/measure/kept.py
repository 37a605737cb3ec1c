"""Kept: which tokens of a text the state of a policy holds."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attn.cache.flat import Flat
from attn.cache.head_groups import Grouped


def kept_positions(state: Any, length: int) -> np.ndarray:
    """Whether each key head holds each of `length` tokens in the first row, [K,length]
    booleans; one row of them if all heads hold the same. Of heads in two groups those
    that hold all come first. ValueError for a state without positions."""
    if isinstance(state, Grouped):
        parts = [s for s in state if s is not None]
        rows = [np.broadcast_to(kept_positions(s, length), (s.k.shape[2], length))
                for s in parts]
        return np.concatenate(rows)
    if isinstance(state, Flat):
        tokens, heads = np.asarray(state.tokens[0]), np.asarray(state.heads[0])
        found = np.zeros((tokens.shape[1], length), bool)
        there = (tokens >= 0) & (tokens < length)
        found[heads[there], tokens[there]] = True
        return found
    pos = getattr(getattr(state, "cache", state), "pos", None)
    if pos is None:
        raise ValueError(f"a {type(state).__name__} says no positions: expected the "
                         "state of a policy that keeps tokens as they are")
    pos = np.asarray(pos[0])  # [C,K|1]
    return (pos[:, :, None] == np.arange(length)).any(0)


def after_prompt(model: Any, params: Any, tokens: Any) -> tuple:
    """The states of a model, one a layer, after tokens [1,T] came in one piece."""
    state = model.init_state(tokens.shape[1] + 1, jnp.asarray(tokens))
    return jax.jit(model.apply)(params, jnp.asarray(tokens), state)[0]
