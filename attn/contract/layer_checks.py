"""What `attn.layers.MultiHead` refuses, before it makes a parameter.

A layer holds whatever attention it is given, and many pairs of a layer and an attention
mean nothing: keys of a context for an attention that reads queries and keys in step, a
stream of one without an order. Each is said in one sentence here.
"""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import jax
import jax.numpy as jnp

from attn.contract.attention import said, streams
from attn.contract.fields import check_fields

# the axes of [B,T,H,D] that a norm goes over
OVER: dict[str, tuple[int, ...]] = {"head": (-1,), "all": (-2, -1)}
OPTIONS: dict[str, tuple] = {
    "qk_norm": (False, True, "head", "all"), "qkv_act": (None, "silu"),
    "use_bias": (False, True, "qkv"),
}
LEAST = {"heads": 1, "kv_heads": 1, "head_dim": 1, "value_dim": 1, "gate_rank": 1}


def check_call(layer: Any, x: Any, state: Any, context: Any) -> None:
    """Raises unless the `MultiHead` can read x [B,T,E], and context [B,S,E'] or a state
    if they are not None: ValueError, NotImplementedError for what it never streams."""
    check_tokens("x", x, "[B,T,E]")
    check_layer(layer)
    if context is not None:
        check_tokens("context", context, "[B,S,E']")
        if context.shape[0] != x.shape[0]:
            raise ValueError(
                f"x has batch {x.shape[0]} and context has {context.shape[0]}: "
                "expected the same"
            )
        check_context(layer.attention)
    if state is not None and context is not None:
        raise NotImplementedError(
            "a state together with a context: keys of a context are not streamed"
        )
    if state is not None:
        check_stream(layer.attention)


def check_layer(layer: Any) -> None:
    """Raises ValueError unless the fields of the `MultiHead` go together."""
    check_fields(layer, least=LEAST)
    attention = layer.attention
    if isinstance(attention, type) or not callable(attention):
        raise ValueError(
            f"attention={attention!r}: expected an attention, as Softmax()"
        )
    # a call of x, and not of q, k and v, is that of a layer: FNet, BaseConv
    if list(inspect.signature(type(attention).__call__).parameters)[1:2] == ["x"]:
        raise ValueError(
            f"attention={attention!r} is a layer of its own: expected an attention, of "
            "q, k and v, as Softmax()"
        )
    for name, choices in OPTIONS.items():
        if getattr(layer, name) not in choices:
            raise ValueError(
                f"{name}={getattr(layer, name)!r}: expected one of {choices}"
            )
    if layer.heads % (layer.kv_heads or layer.heads):
        raise ValueError(
            f"heads={layer.heads}: expected a multiple of kv_heads={layer.kv_heads}"
        )
    if jax.dtypes.canonicalize_dtype(layer.dtype) != jnp.dtype(layer.dtype):
        raise ValueError(
            f"dtype={jnp.dtype(layer.dtype)} is 32 bits wide without "
            "jax_enable_x64: expected that to be set, or dtype=jnp.float32"
        )
    if layer.sinks and not _takes(attention, "sink"):
        raise ValueError(
            f"sinks=True: {type(attention).__name__} takes no sink, expected "
            "an attention that does, as Softmax()"
        )


def check_context(attention: Any) -> None:
    """Raises ValueError for an attention that reads queries and keys in step, which has
    no use for a context."""
    name = type(attention).__name__
    # what is no attention of this library may take one
    in_step = getattr(attention, "causal", False)
    crosses = said(attention, "crosses")
    if crosses and (hasattr(attention, "of_context") or not in_step):
        return
    fields = {f.name for f in dataclasses.fields(attention)}
    expected = f"{name}(causal=False)" if "causal" in fields and crosses else (
        "one without a causal order, as Softmax()")
    raise ValueError(
        f"context: {name} reads queries and keys in step, expected {expected}"
    )


def check_stream(attention: Any) -> None:
    """Raises NotImplementedError for an attention without a causal order."""
    if not streams(attention):
        raise NotImplementedError(
            f"{type(attention).__name__} has no causal order: no stream"
        )


def check_tokens(name: str, a: Any, letters: str) -> None:
    """Raises ValueError unless a is an array of floating point numbers [B,T,E]."""
    if not hasattr(a, "shape") or not hasattr(a, "dtype"):
        raise ValueError(f"{name} is a {type(a).__name__}: expected an array {letters}")
    if len(a.shape) != 3:
        raise ValueError(f"{name} has shape {a.shape}: expected {letters}")
    if not jnp.issubdtype(a.dtype, jnp.floating):
        raise ValueError(f"{name} is {a.dtype}: expected a floating point type")


def check_positions(name: str, pos: Any, x: Any) -> None:
    """Raises ValueError unless pos are positions [B|1,T] of tokens x [B,T,E]."""
    b, t = x.shape[:2]
    if not hasattr(pos, "shape") or pos.shape not in ((b, t), (1, t)):
        found = f"has shape {pos.shape}" if hasattr(pos, "shape") else f"is {pos!r}"
        raise ValueError(f"pos of {name} {found}: expected {(b, t)} or {(1, t)}")
    if not jnp.issubdtype(pos.dtype, jnp.integer):
        raise ValueError(f"pos of {name} is {pos.dtype}: expected integers")


def _takes(attention: Any, name: str) -> bool:
    """Whether a call of the attention takes the keyword."""
    return name in inspect.signature(type(attention).__call__).parameters
