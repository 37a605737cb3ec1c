"""What single heads do, as numbers, from rows of their weights.

Retrieval heads copy from the context (Wu et al., 2024, arXiv:2404.15574); induction,
duplicate and previous-token heads are told from repeated random tokens (Merullo et al.,
2023, arXiv:2310.08744).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attn import maps
from models.view import Rows, look, masked_heads, sites

# of networks trained to be looked at: tokens' vectors as large as what blocks add; with
# the small ones of the default a network finds out how to copy much later
EMBED_SCALE = 50.0


def retrieval_score(
    top: np.ndarray, prompt: np.ndarray, emitted: np.ndarray, needle: tuple[int, int],
    *, clip: bool = False,
) -> np.ndarray:
    """The retrieval score of each head [L,H] in one trial.

    top [steps,L,H,k] int: the keys each head looks at most while it predicts the token
    emitted [steps]; prompt [P] int; needle: the span [start, end) in the prompt. A step
    counts 1 / (length of the needle) if one of its k keys is in the needle and is the
    token that is emitted. Repeated copies count again, as in the authors' code; clip:
    at most 1.
    """
    (start, end), size = needle, prompt.shape[0]
    inside = (top >= start) & (top < end)
    copied = prompt[np.clip(top, 0, size - 1)] == emitted[:, None, None, None]
    score = (inside & copied).any(-1).sum(0) / (end - start)
    return np.minimum(score, 1.0) if clip else score


def weighted(model: Any) -> list[int]:
    """The layers whose heads have weights of attention: a view may ask for these."""
    known = set(sites(model))
    return [n for n, block in enumerate(model.blocks()) if f"{n}/pattern" in known
            and getattr(block.mixer.attention, "weightless", None) is None]


def top_keys(model: Any, params: Any, tokens: jax.Array, rows: Any, k: int = 1
             ) -> jax.Array:
    """[B,m,L,H,k] int32: the keys with the greatest weights in each row, of all
    layers that have weights (`weighted`); no map is made. tokens [B,T], rows [m]."""
    def of(p):
        return maps.argmax(p)[..., None] if k == 1 else maps.top(p, k)

    layers = weighted(model)
    patterns = {n: Rows(rows=rows, of=of, tile=32) for n in layers}
    _, seen = look(model, params, tokens, patterns=patterns)
    found = jnp.stack([seen[f"{n}/pattern"] for n in layers], 1)  # [B,L,H,m,k]
    return jnp.moveaxis(found, 3, 1)


def kinds(pattern: jax.Array, period: int, begin: int = 1) -> dict[str, jax.Array]:
    """Scores [B,n] of heads from their maps [B,n,T,T] on `begin` tokens and twice the
    same `period` random ones: over the tokens of the second copy, induction looks
    behind the earlier copy and duplicate at it; over all, previous at the token before.
    """
    length = pattern.shape[2]
    second = jnp.arange(begin + period, length)
    return {"induction": maps.at_distance(pattern, period - 1, second),
            "duplicate": maps.at_distance(pattern, period, second),
            "previous": maps.at_distance(pattern, 1, jnp.arange(1, length))}


def of_repeats(model: Any, params: Any, period: int = 16, rows: int = 8, seed: int = 0,
               low: int = 0) -> dict[str, np.ndarray]:
    """`kinds` [L,H] of a model, on random tokens from `low` on; NaN of layers without
    weights."""
    key = jax.random.key(seed)
    once = jax.random.randint(key, (rows, period + 1), low, model.vocab)
    tokens = jnp.concatenate([once, once[:, 1:]], 1)
    layers = weighted(model)

    @jax.jit
    def call(params):
        _, seen = look(model, params, tokens, read=[f"{n}/pattern" for n in layers])
        each = [kinds(seen[f"{n}/pattern"], period) for n in layers]
        empty = jnp.full((len(model.blocks()), model.heads), jnp.nan)
        return {name: empty.at[jnp.array(layers)].set(jnp.stack([
            one[name].mean(0) for one in each])) for name in each[0]}

    return {name: np.asarray(a) for name, a in call(params).items()}


def split_half(scores: np.ndarray) -> float:
    """The rank correlation of heads' mean scores in odd and in even trials, scores
    [trials,L,H]; NaN if a half has no spread."""
    halves = [scores[at::2].mean(0).ravel() for at in (0, 1)]
    ranks = [_ranks(half) for half in halves]
    if any(rank.std() == 0 for rank in ranks):
        return float("nan")
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def agreement(counted: np.ndarray) -> dict[str, Any]:
    """The split-half correlation of trials [n,L,H], or why there is none."""
    name = "split-half correlation"
    if len(counted) < 4:
        return {f"{name} left out": f"{len(counted)} needles found are too few, 4 are "
                "needed"}
    value = split_half(counted)
    return {f"{name} left out": "all heads score alike"} if np.isnan(value) else {
        name: value}


def left_out(model: Any, layers: list[int]) -> dict[str, Any]:
    """Which layers have no scores, and why there are no uniform masks, in words."""
    found: dict[str, Any] = {}
    blocks = model.blocks()
    if others := [n for n in range(len(blocks)) if n not in layers]:
        named = (f"{n} ({_kind(blocks[n].mixer)})" for n in others)
        found["layers without weights left out"] = ", ".join(named)
    try:
        masked_heads(model, np.zeros((len(blocks), model.heads), bool), "uniform")
    except NotImplementedError as error:
        found["uniform masks left out"] = str(error)
    return found


def _kind(mixer: Any) -> str:
    return type(getattr(mixer, "attention", mixer)).__name__


def _ranks(a: np.ndarray) -> np.ndarray:
    """Ranks, of equals the mean of theirs."""
    less = (a[None] < a[:, None]).sum(1)
    equal = (a[None] == a[:, None]).sum(1)
    return less + (equal - 1) / 2


def chosen(scores: np.ndarray, count: int, lowest: bool = False) -> np.ndarray:
    """Booleans of the shape of scores [L,H]: the `count` greatest; or the least."""
    order = np.argsort(scores.ravel() * (1 if lowest else -1), kind="stable")[:count]
    found = np.zeros(scores.size, bool)
    found[order] = True
    return found.reshape(scores.shape)


def overlap(one: np.ndarray, other: np.ndarray) -> tuple[float, float]:
    """The share of the heads of `other` that are among those of `one`, booleans, and
    what it is for heads drawn at random. (Which denominator the paper's 78% has was
    not found.)"""
    return float((one & other).sum() / max(other.sum(), 1)), float(one.mean())
