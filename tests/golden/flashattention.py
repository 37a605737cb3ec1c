"""Adapter for flashattention.npz: options of exact attention, and chosen blocks."""

from __future__ import annotations

from typing import Any, Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from attn.exact.attend import attend
from attn.masks import FOREVER, Causal, Full, Mask, Sink, Window
from attn.softmax import Softmax
from attn.sparse import chosen_blocks
from pallas_kernels.logits import Dropout, LogitSpec, Where

OPTIONS = {"layout", "softmax_scale", "causal", "causal_alignment", "window", "softcap",
           "dropout_p", "kind", "block", "sink_token_length"}


def run(
    case: Mapping[str, Any], implementation: str | None = None
) -> dict[str, np.ndarray]:
    """What the arrays of the case ask for, by XLA or ("pallas") by the kernels."""
    config = case["config"]
    if unknown := set(config) - OPTIONS:
        raise ValueError(f"config has {sorted(unknown)}: expected {sorted(OPTIONS)}")
    make = _blocks if "block_mask" in case else _exact
    f = make(case, implementation)
    names = [name for name in ("q", "k", "v", "sink", "bias") if name in case]
    args = [jnp.asarray(case[name]) for name in names]
    with jax.default_matmul_precision("highest"):
        (o, lse), grads = _with_gradients(
            lambda *a: f(dict(zip(names, a))), args, jnp.asarray(case["cotangent"])
        )
        out = {"out": o} | {f"d{name}": grad for name, grad in zip(names, grads)}
        if "lse_BHT" in case:
            out["lse_BHT"] = lse
        if "block_mask" not in case:
            _agrees_with_softmax(case, o)
    return {name: np.asarray(a) for name, a in out.items()}


def _with_gradients(f: Callable, args: list, cotangent):
    """f(*args) -> (o, lse), and the gradients of o with `cotangent`."""
    def both(*args):
        (o, lse), back = jax.vjp(f, *args)
        return (o, lse), back((cotangent, jnp.zeros_like(lse)))

    return jax.jit(both)(*args)


def _mask(config: Mapping[str, Any]) -> Mask:
    mask: Mask = Full()
    if config.get("causal", "causal" in config.get("kind", "")):
        mask = Causal()
    left, right = config.get("window") or (None, None)
    if left is not None:
        # the first tokens are exempt from the limit to the left
        mask = mask & (Window(left) | Sink(config.get("sink_token_length", 0)))
    if right is not None:
        mask = mask & Window(FOREVER, right)
    return mask


def _scale(config: Mapping[str, Any]) -> float | None:
    scale = config.get("softmax_scale", "D**-0.5")
    return None if scale == "D**-0.5" else float(scale)


def _exact(case, implementation) -> Callable:
    """f(arrays by name) -> o, lse, by the tiles alone, and by tiles of odd sizes."""
    config = case["config"]
    (b, t), s = case["q"].shape[:2], case["k"].shape[1]
    where, dropout = Where(), None
    if "k_lengths" in case:
        q_real, k_real = _lengths(case)
        # aligned at the last real token of both sides
        end = k_real.sum(1) - q_real.sum(1)
        q_pos = jnp.arange(t)[None] + end[:, None]
        kv_pos = jnp.broadcast_to(jnp.arange(s)[None], (b, s))
        where = Where(q_pos, kv_pos, q_real, k_real)
    if "segment_ids" in case:
        segment = jnp.asarray(case["segment_ids"], jnp.int32)
        where = Where(q_segment=segment, kv_segment=segment)
    if "keep_mask_BHTS" in case:
        keep = jnp.asarray(case["keep_mask_BHTS"])
        dropout = Dropout(config["dropout_p"], keep=keep)
    spec = LogitSpec(_mask(config), _scale(config), config.get("softcap") or None)
    return lambda a: attend(
        a["q"], a["k"], a["v"], spec, where, sink=a.get("sink"), bias=a.get("bias"),
        dropout=dropout, tile=(16, 24), implementation=implementation,
    )


def _lengths(case) -> tuple[jax.Array, jax.Array]:
    """Segments [B,T] and [B,S]: 1 for real tokens, 0 for padding behind them."""
    def segment(name, size):
        lengths = case.get(name)
        lengths = np.full(len(case["q"]), size) if lengths is None else lengths
        real = np.arange(size)[None] < np.asarray(lengths)[:, None]
        return jnp.asarray(real.astype(np.int32))

    return (segment("q_lengths", case["q"].shape[1]),
            segment("k_lengths", case["k"].shape[1]))


def _agrees_with_softmax(case, o) -> None:
    """The attention itself, with segments where the case has lengths or segments."""
    config = case["config"]
    if "keep_mask_BHTS" in case or "bias" in case:
        return
    segments: Any = None
    if "k_lengths" in case:
        segments = _lengths(case)
    if "segment_ids" in case:
        segments = jnp.asarray(case["segment_ids"], jnp.int32)
    attention = Softmax(_mask(config), _scale(config), config.get("softcap") or None)
    q, k, v = (jnp.asarray(case[name]) for name in "qkv")
    sink = jnp.asarray(case["sink"]) if "sink" in case else None
    again = jax.jit(attention)(q, k, v, segments=segments, sink=sink)
    np.testing.assert_allclose(again, o, rtol=1e-4, atol=1e-5)


def _blocks(case, implementation) -> Callable:
    """f(arrays by name) -> o, lse, over the blocks that block_mask [H,N,M] allows."""
    allowed, block = np.asarray(case["block_mask"]), case["config"]["block"]
    many = max(int(allowed.sum(-1).max()), 1)
    order = np.argsort(~allowed, axis=-1, kind="stable")[..., :many]
    chosen = np.where(np.take_along_axis(allowed, order, -1), order, -1)
    b, t = case["q"].shape[:2]
    n = chosen.shape[1]
    chosen = jnp.broadcast_to(jnp.asarray(chosen, jnp.int32)[None], (b, *chosen.shape))
    fill = n * block - t  # the last block of queries may be short

    def f(a):
        q = jnp.pad(a["q"], ((0, 0), (0, fill), (0, 0), (0, 0)))
        spec = LogitSpec(_mask(case["config"]), _scale(case["config"]))
        o, lse = chosen_blocks.attend(q, a["k"], a["v"], chosen, spec, block=block,
                                      implementation=implementation)
        return o[:, :t], lse[..., :t]

    return f
