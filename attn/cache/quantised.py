"""Quantised: keys and values as codes of a few bits with a scale and a least value a
group.

    scale = (max - min) / (2^bits - 1),  code = round((x - min) / scale),
    x~ = code scale + min

over groups of tokens, by channel, of keys, or groups of channels, by token, of values
(KIVI, Liu et al., 2024, arXiv:2402.02750): keys have channels that are large
throughout, values have not. Codes lie side by side in words of 32 or 8 bits, the first
one lowest.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from attn.cache.kv import current
from attn.contract.segments import TokenPositions

WORDS = {32: jnp.int32, 8: jnp.uint8}


class Codes(NamedTuple):
    """Of an array whose `axis` has N entries: code with N bits / 32 int32, or N bits /
    8 uint8, scale and least with N / group entries, in the array's dtype."""

    code: jax.Array
    scale: jax.Array
    least: jax.Array


def check_bits(name: str, bits: int, group: int, word: int = 32) -> None:
    """Raises ValueError unless codes of a group fill whole words."""
    known = tuple(n for n in (1, 2, 4, 8, 16) if n <= word)
    if bits not in known:
        raise ValueError(f"{name}: bits={bits}: expected one of {known}")
    if group < 1 or group * bits % word:
        raise ValueError(
            f"{name}: group={group} of {bits} bits: expected a multiple of "
            f"{word // bits}, as codes fill words of {word} bits"
        )


def quantise(x: jax.Array, bits: int, group: int, axis: int, word: int = 32) -> Codes:
    """x as codes, over groups of `group` entries of `axis`; rounds half to even."""
    axis = axis % x.ndim
    wide = _grouped(x.astype(jnp.float32), group, axis)  # [...,N/group,group,...]
    low = wide.min(axis + 1, keepdims=True)
    scale = (wide.max(axis + 1, keepdims=True) - low) / (2**bits - 1)
    # what is constant has scale 0: its codes are 0, whatever they are divided by
    scale = jnp.where(scale > 0, scale, 1)
    # codes are read with what is stored
    low, scale = (a.astype(x.dtype) for a in (low, scale))
    # round((x - min) / scale)
    code = (wide - low.astype(jnp.float32)) / scale.astype(jnp.float32)
    code = jnp.round(jnp.clip(code, 0, 2**bits - 1)).astype(jnp.uint32)
    return Codes(pack(code.reshape(x.shape), bits, axis, word), scale.squeeze(axis + 1),
                 low.squeeze(axis + 1))


def dequantise(codes: Codes, bits: int, group: int, axis: int) -> jax.Array:
    """The array that the codes stand for, in the dtype of their scales."""
    axis = axis % codes.code.ndim
    code = _grouped(unpack(codes.code, bits, axis), group, axis).astype(jnp.float32)
    scale, low = (
        jnp.expand_dims(a, axis + 1).astype(jnp.float32) for a in codes[1:])
    # x = scale code + min
    x = code * scale + low
    shape = (*x.shape[:axis], -1, *x.shape[axis + 2:])
    return x.reshape(shape).astype(codes.scale.dtype)


def empty(
    like: jax.ShapeDtypeStruct, bits: int, group: int, axis: int, word: int = 32
) -> Codes:
    """Codes of zeros like an array of this shape and dtype."""
    def of(per: int, dtype):
        shape = list(like.shape)
        shape[axis] //= per
        return jnp.zeros(shape, dtype)

    return Codes(of(word // bits, WORDS[word]), of(group, like.dtype),
                 of(group, like.dtype))


def pack(code: jax.Array, bits: int, axis: int, word: int = 32) -> jax.Array:
    """uint32 codes, so many as fill words, as words."""
    per = word // bits
    wide = _grouped(code, per, axis)
    shape = [1] * wide.ndim
    shape[axis + 1] = per
    shift = (jnp.arange(per, dtype=jnp.uint32) * bits).reshape(shape)
    # the codes of a word share no bit
    words = jnp.left_shift(wide, shift).sum(axis + 1, dtype=jnp.uint32)
    if word < 32:
        return words.astype(WORDS[word])
    return jax.lax.bitcast_convert_type(words, jnp.int32)


def unpack(words: jax.Array, bits: int, axis: int) -> jax.Array:
    """uint32 codes of words."""
    per = words.dtype.itemsize * 8 // bits
    if words.dtype == jnp.int32:
        wide = jax.lax.bitcast_convert_type(words, jnp.uint32)
    else:
        wide = words.astype(jnp.uint32)
    wide = jnp.expand_dims(wide, axis + 1)
    shape = [1] * wide.ndim
    shape[axis + 1] = per
    shift = (jnp.arange(per, dtype=jnp.uint32) * bits).reshape(shape)
    # code n of a word begins at its bit n * bits
    code = jnp.right_shift(wide, shift) & jnp.uint32(2**bits - 1)
    return code.reshape(*words.shape[:axis], -1, *words.shape[axis + 1:])


def _grouped(x: jax.Array, group: int, axis: int) -> jax.Array:
    """`axis` of N entries as two, [N/group, group]."""
    return x.reshape(*x.shape[:axis], -1, group, *x.shape[axis + 1:])


def int4(x: jax.Array, group: int) -> Codes:
    """x [...,X] in 4 bits, over groups of the last axis, as DuoAttention stores a cache
    (Xiao et al., 2024, arXiv:2410.10819): two codes a byte, the even one high, uint8
    [...,X/2]; scale and least value [...,X/group] in float16; halves round up."""
    wide = _grouped(x.astype(jnp.float32), group, x.ndim - 1)
    low = wide.min(-1, keepdims=True)
    # 1e-8 is 0 in float16: a group of one value comes back as that value
    scale = (wide.max(-1, keepdims=True) - low) / 15 + 1e-8
    # x - low is never negative
    code = jnp.clip(jnp.floor((wide - low) / scale + 0.5), 0, 15).astype(jnp.uint8)
    code = code.reshape(x.shape)
    both = jnp.left_shift(code[..., 0::2], 4) | code[..., 1::2]
    return Codes(both, *(a[..., 0].astype(jnp.float16) for a in (scale, low)))


def from_int4(codes: Codes, group: int) -> jax.Array:
    """What codes of `int4` stand for [...,X], in float16 throughout."""
    high, low = jnp.right_shift(codes.code, 4), codes.code & jnp.uint8(15)
    code = jnp.stack([high, low], -1)  # [...,X/2,2]
    code = code.reshape(*codes.code.shape[:-1], -1, group).astype(jnp.float16)
    # by what is stored, in float16: no exact inverse of `int4`
    x = code * codes.scale[..., None] + codes.least[..., None]
    return x.reshape(*codes.code.shape[:-1], -1)


class Blocks(NamedTuple):
    """Tokens in order from the beginning of a block: rows [B,N block,...], of which the
    first is at position first [B], a multiple of the block; done [B] blocks of them are
    complete."""

    rows: tuple
    first: jax.Array
    done: jax.Array


def blocks_of(
    rest: tuple, new: tuple, end: jax.Array, now: TokenPositions, block: int
) -> Blocks:
    """What is left of a block and new tokens, laid out in blocks.

    rest: arrays [B,block,...] with the tokens behind the last complete block of `end`
    [B]; new: arrays [B,T,...] at `now`. Only the sequence that goes on is there.
    """
    b, t = now.pos.shape
    mine = current(now)
    count = mine.sum(1, dtype=jnp.int32)
    began = now.segment.max(1) > 1
    start = now.next_pos - count  # position of the first new token
    first = jnp.where(began, 0, start // block * block)
    # as many blocks as block - 1 old tokens and T new ones may need
    slots = -(-(block - 1 + t) // block) * block
    row = jnp.arange(b)[:, None]
    old = jnp.arange(rest[0].shape[1], dtype=jnp.int32)[None]
    held = old < jnp.where(began, 0, end - first)[:, None]
    old, at = jnp.where(held, old, slots), jnp.where(
        mine, now.pos - first[:, None], slots)

    def laid(rest, new):
        a = jnp.zeros((b, slots, *new.shape[2:]), rest.dtype)
        a = a.at[row, old].set(rest, mode="drop")
        return a.at[row, at].set(new.astype(rest.dtype), mode="drop")

    rows = tuple(laid(a, c) for a, c in zip(rest, new))
    return Blocks(rows, first, (now.next_pos - first) // block)


def rest_of(blocks: Blocks, block: int) -> tuple:
    """The tokens behind the complete blocks [B,block,...]."""
    def cut(a, n):
        a = jnp.pad(a, [(0, block)] + [(0, 0)] * (a.ndim - 1))
        return jax.lax.dynamic_slice_in_dim(a, n * block, block)

    return tuple(jax.vmap(cut)(a, blocks.done) for a in blocks.rows)
