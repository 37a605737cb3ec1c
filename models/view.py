"""A view into a model: its intermediates, read and replaced by layer and name.

    model, params = load(folder)
    logits, seen = look(model, params, tokens, read=["embed", "1/z"])
    logits, seen = look(model, params, tokens,
                        patterns={1: Rows(heads=[0, 3], rows=[-1])})
    params = edited(model, params, masked_heads(model, heads))      # [L,H] booleans
    generate(model, params, prompts, length=8)                      # without them

A name is that of the literature on circuits (Merullo et al., 2023, arXiv:2310.08744),
with the number of the layer before it:

    embed                  [B,T,E]      vectors of the tokens
    N/resid_pre            [B,T,E]      the stream into a block
    N/q, N/k, N/v          [B,T,H|K,D|V] as the attention gets them: after norm and
                                        rotation
    N/pattern              [B,n,m,S]    weights of heads and rows (`Rows`)
    N/z                    [B,T,H,V]    what the output projection gets
    N/attn_out             [B,T,E]      what the mixer adds to the stream
    N/resid_mid            [B,T,E]      the stream between the two
    N/mlp_out              [B,T,E]      what the MLP adds
    N/resid_post           [B,T,E]      the stream behind a block
    final                  [B,T,E]      the stream before the last norm
    logits                 [B,T,vocab]

All of it is one collection of variables beside "params" (`attn/contract/view.py`): a
look is pure, goes through jit, grad and vmap, and costs nothing where nothing is asked
for. In a stream the arrays are those of the piece, and weights, which would be those
over the slots of a cache, are refused: give the text as a whole.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Iterable, Mapping

import jax.numpy as jnp

from attn.contract.attention import said
from attn.contract.heads import check_rows
from attn.contract.view import SEEN, VIEW, Rows, Site, variable
from attn.softmax import Softmax
from models.block import Block

__all__ = ["Rows", "Site", "edited", "look", "masked_heads", "sites", "view"]
MODES = ("zero", "mean", "uniform")


def sites(model: Any) -> list[str]:
    """All that a view of the model may name."""
    found: list[str] = list(getattr(model, "sites", ()))
    for n, block in enumerate(model.blocks()):
        found += [f"{n}/{name}" for name in _names(block)]
    return found


def view(
    model: Any, read: Iterable[str] = (), edit: Mapping[str, Any] | None = None,
    patterns: Mapping[int, Rows] | None = None,
) -> dict[str, Any]:
    """The collection "view": see `look`. ValueError for a name that the model does not
    have."""
    patterns = dict(patterns or {})
    wanted: dict[str, Any] = {}
    known: set[str] = set(sites(model))
    for key in (*(edit or {}), *read, *(f"{n}/pattern" for n in patterns)):
        if key not in known:
            raise ValueError(_unknown(model, key))
    for key, value in (edit or {}).items():
        wanted[key] = _site(key, value)
    for key in read:
        if key.endswith("/pattern"):
            patterns.setdefault(int(key.split("/")[0]), Rows())
        else:
            wanted[key] = dataclasses.replace(wanted.get(key, Site()), read=True)
    wanted |= {f"{n}/pattern": rows for n, rows in patterns.items()}
    tree: dict[str, Any] = {}
    for key, value in wanted.items():
        if isinstance(value, Rows):
            _check_both(key, value)
        place = tree
        for name in _path(key)[:-1]:
            place = place.setdefault(name, {})
        place[_path(key)[-1]] = value
    return tree


def edited(model: Any, params: Any, edit: Mapping[str, Any], **more: Any) -> Any:
    """`params`, {"params": ...}, of the same model changed: {key: (mask, value)}, by
    which an array x becomes where(mask, value, x), both as they broadcast to it. Other
    functions of a model's parameters take them as they are. more: see `view`."""
    return {**params, VIEW: _merged(params.get(VIEW, {}), view(
        model, edit=edit, **more))}


def look(
    model: Any, params: Any, *args: Any, read: Iterable[str] = (),
    edit: Mapping[str, Any] | None = None,
    patterns: Mapping[int, Rows] | None = None, **named: Any,
) -> tuple[Any, dict[str, Any]]:
    """What model.apply(params, *args, **named) gives, and {key: array} of what is read.

    params {"params": ...}, or what `edited` made of them. edit: see `edited`. patterns
    {layer: Rows}: weights of attention, of some heads and rows. ValueError for a name
    that the model does not have; NotImplementedError for weights of an attention that
    has none, or in a stream.
    """
    variables = edited(model, params, edit or {}, read=read, patterns=patterns)
    out, seen = model.apply(variables, *args, mutable=[SEEN], **named)
    seen, found = seen.get(SEEN, {}), {}
    asked = [*read, *(f"{n}/pattern" for n, p in (patterns or {}).items() if p.read)]
    for key in dict.fromkeys(asked):
        value: Any = seen
        for name in _path(key):
            value = value.get(name) if isinstance(value, Mapping) else None
        if value is None:
            raise ValueError(f"{key!r} was not computed: expected an attention that "
                             "reads q, or an MLP")
        found[key] = value
    return out, found


def masked_heads(
    model: Any, heads: Any, mode: str = "zero", means: Any = None
) -> dict[str, Site]:
    """The edit that takes heads out, for `look` and `edited`; in a stream too.

    heads [L,H] booleans, which may be traced: one program for all choices; of a layer
    with fewer heads than H the first ones. mode "zero": a head gives 0; "mean": it
    gives `means` {layer: [..,H,V]}, as its mean over other texts; "uniform": its
    queries are 0, so that it gives the mean of the values that it may see (masking as
    in the code of Wu et al., 2024, arXiv:2404.15574).
    """
    if mode not in MODES:
        raise ValueError(f"mode={mode!r}: expected one of {MODES}")
    if mode == "mean" and means is None:
        raise ValueError("mode='mean': expected means, {layer: array [..,H,V]}")
    heads, found = jnp.asarray(heads), {}
    check_rows("heads", heads, len(model.blocks()))
    known = set(sites(model))
    most = max(getattr(block.mixer, "heads", 0) for block in model.blocks())
    if heads.shape[1] != most:
        raise ValueError(f"heads has shape {heads.shape}: expected [L,H] with H={most}")
    for n, block in enumerate(model.blocks()):
        name = "q" if mode == "uniform" else "z"
        if f"{n}/{name}" not in known:
            continue  # a layer without heads
        if mode == "uniform":
            _check_uniform(n, block.mixer)
        if mode == "mean" and n not in means:
            raise ValueError(f"means of layers {sorted(means)}: expected one of layer "
                             f"{n} too")
        value = means[n] if mode == "mean" else 0.0
        found[f"{n}/{name}"] = Site(heads[n, :block.mixer.heads, None], value)
    return found


def _check_uniform(n: int, mixer: Any) -> None:
    attention = mixer.attention
    # what inherits from it may read keys that data chose
    plain = type(attention) is Softmax and attention.score is None
    if not plain or mixer.sinks:
        raise NotImplementedError(
            f"mode='uniform': without queries {type(attention).__name__} of layer {n} "
            "is not uniform: expected Softmax without score and sinks"
        )


def _site(key: str, value: Any) -> Any:
    """What `edit` says of an array; ValueError if it is no pair, or no `Rows` where
    weights of attention are meant."""
    if key.endswith("/pattern"):
        if not isinstance(value, Rows):
            raise ValueError(f"edit of {key}: expected Rows(mask=..., value=...)")
        return value
    if not isinstance(value, Site):
        if not isinstance(value, tuple) or len(value) != 2:
            raise ValueError(f"edit of {key}: expected (mask, value)")
        value = Site(*value)
    _check_both(key, value)
    return value


def _check_both(key: str, site: Site | Rows) -> None:
    if (site.mask is None) != (site.value is None):
        raise ValueError(f"{key}: mask and value go together: expected both or neither")


def _names(block: Any) -> tuple[str, ...]:
    """The sites of a block, and of its mixer those that its attention has."""
    attention = getattr(block.mixer, "attention", None)
    left_out = {
        name for name, word in (("q", "needs_query"), ("k", "needs_key"))
        if attention is not None and not said(attention, word)
    }
    mixer = [n for n in getattr(block.mixer, "sites", ()) if n not in left_out]
    return (*mixer, *block.sites)


def _path(key: str) -> tuple[str, ...]:
    """Where a name stands in the collections."""
    layer, _, name = key.rpartition("/")
    if not layer:
        return (variable(name),)
    # what is no site of the block is one of its mixer
    own = () if name in Block.sites else ("mixer",)
    return ("layers", f"layer_{layer}", *own, variable(name))


def _unknown(model: Any, key: Any) -> str:
    layer, _, name = str(key).rpartition("/")
    blocks = model.blocks()
    if layer not in map(str, range(len(blocks))):
        return (f"{key!r}: expected one of {model.sites}, or N/name with a layer N "
                f"below {len(blocks)}")
    block = blocks[int(layer)]
    return (f"{key!r}: {type(block.mixer).__name__} of layer {layer} has no {name!r}: "
            f"expected one of {_names(block)}")


def _merged(old: Any, new: Any) -> Any:
    """One tree of both; what is read of an array that is replaced is what it becomes.
    """
    if isinstance(old, Site) and new.value is None:
        return dataclasses.replace(old, read=old.read or new.read)
    if isinstance(old, Rows) and old.value is not None and new != old:
        raise ValueError("pattern: its weights are replaced in these parameters: "
                         "expected no other `Rows` of the layer")
    if not isinstance(old, Mapping):
        return new
    return {**old, **{name: _merged(old[name], own) if name in old else own
                      for name, own in new.items()}}
