"""KIVI: codes and what they stand for, blocks however tokens came, bytes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn.cache import quantised
from attn.kivi import KIVI
from attn.softmax import Softmax
from tests.compiled import attend, step
from tests.laws import close, stream

B, T, H, K, D, V = 2, 29, 4, 2, 8, 16
SMALL = KIVI(bits=2, group=16, residual=16)


def inputs(t=T, seed=0):
    keys = jax.random.split(jax.random.key(seed), 3)
    shapes = (B, t, H, D), (B, t, K, D), (B, t, K, V)
    return tuple(jax.random.normal(key, shape) for key, shape in zip(keys, shapes))


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("axis", [1, 3])
def test_codes_are_half_a_step_off_at_most(bits, axis):
    x = jax.random.normal(jax.random.key(1), (2, 64, 3, 32))
    x = x.at[0, :32, 0].set(1.5)  # a group without a spread
    codes = quantised.quantise(x, bits, 32, axis)
    assert codes.code.shape[axis] == x.shape[axis] * bits // 32
    back = quantised.dequantise(codes, bits, 32, axis)
    step_size = jnp.repeat(codes.scale, 32, axis)
    assert (np.abs(back - x) <= 0.5001 * step_size).all()
    if axis == 1:
        assert (back[0, :32, 0] == 1.5).all()
    low = quantised.quantise(x.astype(jnp.bfloat16), bits, 32, axis)
    assert low.scale.dtype == jnp.bfloat16


def test_codes_lie_lowest_first():
    code = jnp.arange(16, dtype=jnp.uint32)[None] % 4
    words = quantised.pack(code, 2, 1)
    assert int(words[0, 0]) & 0xFF == 0b11100100
    assert (quantised.unpack(words, 2, 1) == code).all()


def by_hand(k, v, n, r=16):
    """Keys and values [B,n,..] as stored after n tokens: of keys whole blocks are
    codes, of values all but the last r."""
    done, old = n // r * r, max(n - r, 0)

    def coded(x, m, axis):
        if not m:
            return x[:, :0]
        x = np.asarray(x[:, :m], np.float64)
        wide = np.moveaxis(x, axis, -1)
        groups = wide.reshape(*wide.shape[:-1], -1, 16)
        low, high = groups.min(-1, keepdims=True), groups.max(-1, keepdims=True)
        scale = (high - low) / 3
        back = np.rint((groups - low) / scale) * scale + low
        return np.moveaxis(back.reshape(wide.shape), -1, axis)
    return (np.concatenate([coded(k, done, 1), k[:, done:n]], 1),
            np.concatenate([coded(v, old, 3), v[:, old:n]], 1))


@pytest.mark.parametrize("piece", [1, 5, T])
def test_what_is_stored_does_not_depend_on_pieces(piece):
    q, k, v = inputs()
    _, state = stream(SMALL, q, k, v, 40, piece)
    cache = SMALL.cache(state)
    keys, vals = by_hand(np.asarray(k), np.asarray(v), T)
    for b in range(B):
        pos = np.asarray(cache.pos[b, :, 0])
        at = np.argsort(np.where(pos < 0, 999, pos))[:T]
        assert (pos[at] == np.arange(T)).all()
        close(cache.k[b, at], keys[b])
        close(cache.v[b, at], vals[b])
    one = inputs(1, 1)
    _, o = step(SMALL, state, *one)
    keys, vals = by_hand(*(np.concatenate([a, b], 1) for a, b in zip(
        (k, v), one[1:])), T + 1)
    close(o, attend(Softmax(), one[0], jnp.asarray(keys, jnp.float32),
                    jnp.asarray(vals, jnp.float32)))


def test_a_prompt_is_exact_and_rows_are_their_own():
    q, k, v = inputs()
    segments = jnp.asarray([[0] * 5 + [1] * 24, [1] * 8 + [2] * 21])
    state, o = step(SMALL, SMALL.init_state(40, q, k, v), q, k, v, segments=segments)
    for b, cut in ((0, 5), (1, 8)):
        args = tuple(a[b:b + 1, cut:] for a in (q, k, v))
        alone, own = step(SMALL, SMALL.init_state(40, *args), *args)
        close(o[b, cut:], own[0])
        have, want = SMALL.cache(state), SMALL.cache(alone)
        there = np.asarray(want.pos[0, :, 0]) >= 0
        assert (have.pos[b] == want.pos[0]).all()
        close(have.k[b, there], want.k[0, there])
        close(have.v[b, there], want.v[0, there])


def test_bytes_are_those_of_the_codes():
    """A layer of fp16 in 2 bits: 0.19 of the bytes, and no more in the program."""
    like = lambda t, n: jax.ShapeDtypeStruct((1, t, n, 64), jnp.bfloat16)
    kivi, n = KIVI(), 8192
    one = like(1, 8), like(1, 4), like(1, 4)
    sizes = []
    for attention in (kivi, Softmax()):
        state = jax.eval_shape(lambda a=attention: a.init_state(n, *one))
        compiled = jax.jit(attention.step).lower(state, *one).compile()
        sizes.append(compiled.memory_analysis().argument_size_in_bytes)
    assert 0.18 < sizes[0] / sizes[1] < 0.21


@pytest.mark.parametrize("fields, message", [
    ({"bits": 3}, "bits=3"), ({"group": 8}, "group=8"),
    ({"residual": 100}, "residual=100"),
])
def test_wrong_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        KIVI(**fields)


def test_widths_that_no_group_divides():
    q, k, v = inputs()
    with pytest.raises(ValueError, match="v is 12 wide: expected a multiple"):
        SMALL.init_state(40, q, k, v[..., :12])
