"""Swap: a trained model with other attentions in the place of its exact ones.

Its parameters are those of what is replaced, as exact attention has none of its own.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from attn.layers import Layer
from attn.masks import Causal
from attn.softmax import Softmax


def swapped(model: Any, attention: tuple | None, policy: Any) -> Any:
    """The model with other attentions, its parameters as they are: one, or one for each
    layer of exact attention; or a policy for those of them that see everything."""
    exact = [n for n, a in enumerate(model.attention) if isinstance(a, Softmax)]
    if policy is not None:
        exact = [n for n in exact if model.attention[n].visible == Causal()]
        entries = (policy,) * len(exact)
    elif attention is not None:
        entries = attention
        entries = entries * len(exact) if len(entries) == 1 else entries
    else:
        return model
    if len(entries) != len(exact):
        raise ValueError(f"attention has {len(entries)} entries: expected 1, or "
                         f"{len(exact)}, one for each layer of exact attention")
    layers = list(model.attention)
    for n, entry in zip(exact, entries):
        layers[n] = entry if isinstance(entry, Layer) else inherited(layers[n], entry)
    return model.clone(attention=tuple(layers))


def inherited(old: Softmax, new: Any) -> Any:
    """The new attention with the scale, softcap and window that the model was trained
    with, where it does not say its own."""
    names = {f.name for f in dataclasses.fields(new)}
    taken = {}
    for name in ("scale", "softcap", "mask"):
        value = getattr(old, name)
        own = getattr(new, name, None)
        if value is None or own not in (None, Causal()):
            continue
        if name not in names:
            raise ValueError(f"{type(new).__name__} has no {name}, and the model was "
                             f"trained with {value}: expected an attention that has")
        taken[name] = value
    return dataclasses.replace(new, **taken) if taken else new
