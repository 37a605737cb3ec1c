"""Retrieving: which heads copy from the context, and what is lost without them.

A needle of random tokens lies among others, and its first tokens come again at the end.
While a head looks at the token that is about to be said, it scores (Wu et al., 2024,
arXiv:2404.15574).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.data import inside
from experiments.data.inside import CUE, NEEDLE
from experiments.measure import heads as measured
from models.lm import LM
from models.view import edited, masked_heads

RETRIEVAL = 0.1  # the least mean score of a retrieval head


def retrieval(model: LM, params: Any, trials: int, haystack: int, top: int, seed: int
              ) -> tuple[dict, np.ndarray]:
    """Scores [L,H] of heads over `trials` needles in `haystack` tokens, NaN of layers
    without weights, and what masking up to `top` of them does to the answers; and what
    was left out, and why."""
    rng = np.random.default_rng((seed, 1))
    prompts, needle, start = inside.needles(
        rng, trials, haystack, model.vocab, min(6, model.vocab // 2))
    more, size = NEEDLE - CUE, prompts.shape[1]
    at = np.arange(size - 1, size - 1 + more)
    written = drawn(model, params, jnp.asarray(prompts), more)
    text = jnp.concatenate([prompts, written], 1)
    seen = np.asarray(jax.jit(
        lambda p: measured.top_keys(model, p, text, jnp.asarray(at)))(params))
    said = np.asarray(written)
    right = (said == needle[:, CUE:]).mean(1)
    each = np.stack([
        measured.retrieval_score(seen[n], prompts[n], said[n],
                                 (start[n], start[n] + NEEDLE)) * NEEDLE / more
        for n in range(len(said))])  # of the tokens that are asked for
    counted = each[right > 0.5]  # others say nothing of who copies
    scores = counted.mean(0) if len(counted) else np.zeros(each.shape[1:])
    found = {"needles found": float(right.mean()), "trials counted": len(counted),
             "retrieval heads": float((scores >= RETRIEVAL).mean())}
    found |= measured.agreement(counted)
    found |= measured.left_out(model, measured.weighted(model))
    modes = ("zero",) if "uniform masks left out" in found else ("zero", "uniform")
    tokens = np.concatenate([prompts, needle[:, CUE:]], 1)
    found |= masked(model, params, tokens, at, scores, top, modes, rng)
    every = np.full((len(model.blocks()), model.heads), np.nan)
    every[measured.weighted(model)] = scores
    return found, every


def masked(model: LM, params: Any, tokens: np.ndarray, at: np.ndarray,
           scores: np.ndarray, top: int, modes: tuple[str, ...], rng) -> dict:
    """The share of tokens [B,T] behind the places `at` that are right without the best
    heads by `scores`, of layers with weights, and without as many others, of which none
    is among the best `top`."""
    layers = measured.weighted(model)

    @jax.jit
    def accuracy(params, mask, tokens):
        out = {}
        for mode in modes:
            edit = {name: site for name, site in masked_heads(model, mask, mode).items()
                    if int(name.split("/")[0]) in layers}
            changed = edited(model, params, edit)
            logits: Any = model.apply(changed, tokens)
            answers = logits[:, at].argmax(-1)
            out[mode] = (answers == tokens[:, at + 1]).mean()
        return out

    found = {}
    for count in range(1, top + 1):
        best = measured.chosen(scores, count)
        other = at_random(rng, measured.chosen(scores, top), count)
        for name, own in (("top", best), ("random", other)):
            mask = np.zeros((len(model.blocks()), model.heads), bool)
            mask[layers] = own
            for mode, a in accuracy(params, jnp.asarray(mask), tokens).items():
                found[f"needles, {name} {count} masked ({mode})"] = float(a)
    return found


def kinds_of_heads(scores: np.ndarray, kinds: dict[str, np.ndarray], top: int
                   ) -> dict[str, float]:
    """The greatest score of each kind on repeated tokens, and which share of its best
    heads is among the best retrieval heads, all [L,H]."""
    found, low = {}, lambda a: np.nan_to_num(a, nan=-1.0)
    best = measured.chosen(low(scores), top)
    for name, a in kinds.items():
        found[f"{name}, greatest"] = float(np.nanmax(a))
        shared, chance = measured.overlap(best, measured.chosen(low(a), top))
        found[f"{name} heads that retrieve"] = shared
    return found | {"that retrieve by chance": chance}


def at_random(rng, but: np.ndarray, count: int) -> np.ndarray:
    """`count` heads that are not among `but`."""
    mask = np.zeros(but.size, bool)
    mask[rng.choice(np.flatnonzero(~but.ravel()), count, replace=False)] = True
    return mask.reshape(but.shape)


def drawn(model: LM, params: Any, prompts: jax.Array, length: int) -> jax.Array:
    """The tokens [B,length] that are most likely behind the prompts [B,T]."""
    @jax.jit
    def next_token(params, tokens, at):
        logits: Any = model.apply(params, tokens)
        return jnp.take_along_axis(logits, at[None, None, None], 1)[:, 0].argmax(-1)

    b, t = prompts.shape
    tokens = jnp.pad(prompts, ((0, 0), (0, length)))
    for n in range(length):
        new = next_token(params, tokens, jnp.int32(t + n - 1))
        tokens = tokens.at[:, t + n].set(new.astype(tokens.dtype))
    return tokens[:, t:]
