"""Positions: rotations depend on distance, each scaling is its paper's formula."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn.positions import ALiBi, RoPE
from tests.laws import close

D = 16
KINDS = [
    RoPE(), RoPE(interleaved=True), RoPE(fraction=0.5), RoPE(theta=500.0),
    RoPE(scaling="linear", factor=4.0), RoPE(scaling="ntk", factor=4.0),
    RoPE(scaling="yarn", factor=4.0, original=64),
    RoPE(scaling="llama3", factor=8.0, original=64, fast=4.0),
]
A, B = (jax.random.normal(jax.random.key(n), (1, 1, 2, D)) for n in (0, 1))


@pytest.mark.parametrize("rope", KINDS, ids=str)
def test_only_the_distance_counts(rope):
    at = lambda a, pos: rope.rotate(a, jnp.array([[pos]]))
    dot = lambda i, j: (at(A, i) * at(B, j)).sum()
    close(dot(13, 9), dot(4, 0), "gradient")
    assert abs(dot(13, 9) - dot(13, 4)) > 1e-3
    factor = np.where(np.arange(D) < D * rope.fraction, rope.magnitude, 1)
    close(at(A, 0), np.asarray(A) * factor)


def test_pairs_turn_by_their_angle():
    x = jnp.zeros((1, 1, 1, 4)).at[..., 1].set(1.0)
    y = RoPE(theta=100.0).rotate(x, jnp.array([[7]]))[0, 0, 0]
    close(y, [0, math.cos(0.7), 0, math.sin(0.7)])
    y = RoPE(interleaved=True).rotate(x, jnp.array([[7]]))[0, 0, 0]
    close(y, [-math.sin(7), math.cos(7), 0, 0])
    half = RoPE(fraction=0.5).rotate(A, jnp.array([[3]]))
    assert (half[..., D // 2:] == A[..., D // 2:]).all()


def test_positions_per_head():
    pos = jnp.array([[[2, 9]]])
    both = RoPE().rotate(A, pos)
    for h in range(2):
        close(both[:, :, h], RoPE().rotate(A, pos[..., h])[:, :, h])


def test_large_positions_stay_exact_in_low_precision():
    far = RoPE().rotate(A.astype(jnp.bfloat16), jnp.array([[100_000]]))
    assert far.dtype == jnp.bfloat16
    exact = RoPE().rotate(A, jnp.array([[100_000]]))
    assert np.abs(far.astype(jnp.float32) - exact).max() < 0.03


def test_scalings_against_their_papers():
    m, f = np.arange(D // 2), 4.0
    plain = 10000.0 ** (-2 * m / D)
    freq = lambda **fields: RoPE(factor=f, original=64, **fields).frequencies(D)
    close(freq(scaling="linear"), plain / f)
    close(freq(scaling="ntk"), (10000 * f ** (D / (D - 2))) ** (-2 * m / D))
    # the slowest channel of ntk is that of linear, the fastest is left alone
    close(freq(scaling="ntk")[[0, -1]], [1, plain[-1] / f])
    # llama 3: by the wavelength, low (1) and high (4) frequency factors
    wave = 2 * math.pi / plain
    smooth = (64 / wave - 1) / (4 - 1)
    middle = (1 - smooth) * plain / f + smooth * plain
    want = np.where(wave > 64 / 1, plain / f, np.where(wave < 64 / 4, plain, middle))
    close(freq(scaling="llama3", fast=4.0), want)
    # yarn: a ramp over channels between those with 32 and 1 turns in 64 tokens
    find = lambda turns: D * math.log(64 / (turns * 2 * math.pi)) / (2 * math.log(1e4))
    low, high = max(math.floor(find(32)), 0), min(math.ceil(find(1)), D - 1)
    ramp = np.clip((m - low) / (high - low), 0, 1)
    close(freq(scaling="yarn"), plain / f * ramp + plain * (1 - ramp))
    assert RoPE(scaling="yarn", factor=f).magnitude == 0.1 * math.log(4) + 1


@pytest.mark.parametrize("heads, slopes", [
    (8, 2.0 ** -np.arange(1, 9)), (4, [1 / 4, 1 / 16, 1 / 64, 1 / 256]),
    (1, [2.0**-8]), (6, [1 / 4, 1 / 16, 1 / 64, 1 / 256, 1 / 2, 1 / 8]),
])
def test_alibi(heads, slopes):
    alibi = ALiBi(heads)
    close(alibi.slopes(jnp.arange(heads)), slopes)
    h = jnp.arange(heads)[:, None, None]
    score = alibi(h, jnp.array([[[9]]]), jnp.array([[[9, 4]]]))
    close(score[..., 0], np.zeros((heads, 1)))
    close(score[..., 1], -5 * np.asarray(slopes)[:, None])


@pytest.mark.parametrize("make, message", [
    (lambda: RoPE(scaling="magic"), "scaling='magic'"), (lambda: RoPE(factor=0.5), "0.5"),
    (lambda: RoPE(fraction=0.0), "fraction=0.0"), (lambda: ALiBi(0), "heads=0"),
    (lambda: RoPE().rotate(A[..., :3], jnp.zeros((1, 1), jnp.int32)), "3 channels"),
])
def test_wrong_fields(make, message):
    with pytest.raises(ValueError, match=message):
        make()
