"""Calls: keywords that other libraries know, and what they are called here."""

from __future__ import annotations

from typing import Any

ADVICE = {
    "is_causal": "mask=Causal() or mask=Full() of the attention",
    "causal": "mask=Causal() or mask=Full() of the attention",
    "local_window_size": "mask=Causal() & Window(left) of the attention",
    "window_size": "mask=Causal() & Window(left) of the attention",
    "query_seq_lengths": "segments, 0 for padding",
    "key_value_seq_lengths": "segments, 0 for padding",
    "attn_mask": "mask, booleans, or bias of the call",
    "dropout_p": "dropout of the attention, and key of the call",
    "dropout_rng": "dropout of the attention, and key of the call",
    "deterministic": "a call without key",
    "logits_soft_cap": "softcap of the attention",
    "soft_cap": "softcap of the attention",
    "segment_ids": "segments",
    "sinks": "sink",
    "enable_gqa": "k and v of K heads as they are",
}


def refuse_keywords(attention: Any, unknown: dict[str, Any]) -> None:
    """Raises ValueError for keywords that a call does not have."""
    if not unknown:
        return
    word, name = next(iter(unknown)), type(attention).__name__
    if word in getattr(attention, "__dataclass_fields__", {}):
        expected = f"it as a field, {name}({word}=...)(q, k, v)"
    else:
        expected = ADVICE.get(word, "bias, key, mask, segments, sink or x")
    raise ValueError(f"{name} was called with {word}=: expected {expected}")
