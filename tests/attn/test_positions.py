"""RoPE and its scalings against their published formulas in float64; ALiBi's slopes."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn.positions import ALiBi, RoPE

B, T, H, D = 2, 11, 3, 16
FORMS = {
    "plain": RoPE(),
    "interleaved": RoPE(interleaved=True),
    "half": RoPE(fraction=0.5),
    "linear": RoPE(scaling="linear", factor=4.0),
    "ntk": RoPE(scaling="ntk", factor=4.0, theta=500.0),
    "yarn": RoPE(scaling="yarn", factor=8.0, original=64, fast=8.0),
    "llama3": RoPE(theta=500.0, scaling="llama3", factor=8.0, original=64, fast=4.0),
}
FORM = pytest.mark.parametrize("name", FORMS)


def published(name, width):
    """Angles per token and the magnitude of each form, channel pair by channel pair."""
    rope, angles = FORMS[name], []
    base, s, length = rope.theta, rope.factor, rope.original
    for m in range(width // 2):
        exponent = 2 * m / width
        angle = 1 / base**exponent
        wave = 2 * math.pi / angle
        if name == "linear":
            angle = angle / s
        elif name == "ntk":
            angle = 1 / (base * s ** (width / (width - 2))) ** exponent
        elif name == "yarn":
            # the pair that turns n times in `length` tokens, as a real number
            pair = lambda n: (
                width * math.log(length / (2 * math.pi * n)) / (2 * math.log(base))
            )
            low = max(math.floor(pair(rope.fast)), 0)
            high = min(math.ceil(pair(rope.slow)), width - 1)
            ramp = min(max((m - low) / (high - low), 0.0), 1.0)
            angle = (1 - ramp) * angle + ramp * angle / s
        elif name == "llama3":
            if wave > length / rope.slow:
                angle = angle / s
            elif wave >= length / rope.fast:
                mix = (length / wave - rope.slow) / (rope.fast - rope.slow)
                angle = (1 - mix) * angle / s + mix * angle
        angles.append(angle)
    return np.array(angles), 0.1 * math.log(s) + 1 if name == "yarn" else 1.0


def turned(name, x, pos):
    """x [B,T,H,D] at pos [B,T,H] as complex numbers, in float64."""
    rope, x = FORMS[name], np.asarray(x, np.float64)
    width = int(x.shape[-1] * rope.fraction)
    angles, magnitude = published(name, width)
    out, half = x.copy(), width // 2
    for m in range(half):
        at = (2 * m, 2 * m + 1) if rope.interleaved else (m, m + half)
        z = (x[..., at[0]] + 1j * x[..., at[1]]) * np.exp(1j * pos * angles[m])
        out[..., at[0]], out[..., at[1]] = magnitude * z.real, magnitude * z.imag
    return out


def tokens(seed=0, t=T, d=D):
    return jax.random.normal(jax.random.key(seed), (B, t, H, d))


@FORM
def test_it_is_the_published_rotation(name):
    x, pos = tokens(), np.arange(T) * 9 + np.array([[0], [50]])
    want = turned(name, x, pos[..., None])
    np.testing.assert_allclose(FORMS[name].rotate(x, jnp.asarray(pos)), want, atol=1e-4)
    np.testing.assert_allclose(
        FORMS[name].frequencies(D), published(name, D)[0], rtol=1e-12
    )


@pytest.mark.parametrize("name", ["yarn", "llama3"])
def test_the_three_bands_are_all_there(name):
    bands = FORMS[name].frequencies(32) / RoPE(FORMS[name].theta).frequencies(32)
    assert bands[0] == 1 and bands[-1] == pytest.approx(1 / 8)
    assert ((bands > 1 / 8 + 1e-6) & (bands < 1 - 1e-6)).any()
    assert (np.diff(bands) <= 1e-12).all()


@FORM
def test_only_the_distance_counts(name):
    q, k = tokens(1), tokens(2)
    rope, pos = FORMS[name], jnp.arange(T)[None]
    meet = lambda shift: jnp.einsum(
        "bthd,bshd->bhts", rope.rotate(q, pos + shift), rope.rotate(k, pos + shift)
    )
    np.testing.assert_allclose(meet(0), meet(37), atol=1e-4)
    assert np.abs(meet(0) - jnp.einsum("bthd,bshd->bhts", q, k)).max() > 0.1


@FORM
def test_position_zero_is_only_the_magnitude(name):
    x = tokens()
    width = int(D * FORMS[name].fraction)
    y = FORMS[name].rotate(x, jnp.zeros((1, T), jnp.int32))
    want = x[..., :width] * FORMS[name].magnitude
    np.testing.assert_allclose(y[..., :width], want, rtol=1e-6)
    assert (y[..., width:] == x[..., width:]).all()


def test_interleaved_is_a_permutation_of_channels():
    x, pos = tokens(), jnp.arange(T)[None]
    pairs = np.arange(D).reshape(2, D // 2).T.reshape(-1)
    halves = RoPE().rotate(x, pos)[..., pairs]
    np.testing.assert_allclose(
        RoPE(interleaved=True).rotate(x[..., pairs], pos), halves, atol=1e-6
    )


@FORM
def test_positions_of_its_own_for_every_head(name):
    x = tokens()
    pos = np.random.default_rng(0).integers(0, 60, (B, T, H))
    y = FORMS[name].rotate(x, jnp.asarray(pos))
    np.testing.assert_allclose(y, turned(name, x, pos), atol=1e-4)
    for h in range(H):
        alone = FORMS[name].rotate(x[:, :, h:h + 1], jnp.asarray(pos[..., h]))
        np.testing.assert_allclose(y[:, :, h:h + 1], alone, atol=1e-6)


def test_one_row_of_positions_serves_the_batch():
    x, pos = tokens(), jnp.arange(T)[None]
    for p in (jnp.broadcast_to(pos, (B, T)), jnp.broadcast_to(pos, (B, T))[..., None]):
        assert (RoPE().rotate(x, pos) == RoPE().rotate(x, p)).all()


def test_a_factor_of_one_changes_nothing():
    plain = RoPE().frequencies(D)
    for scaling in ("linear", "ntk", "yarn", "llama3"):
        rope = RoPE(scaling=scaling)
        np.testing.assert_allclose(rope.frequencies(D), plain, rtol=1e-12)
        assert rope.magnitude == 1


def test_low_precision_is_turned_in_float32():
    x, pos = tokens().astype(jnp.bfloat16), jnp.arange(T)[None] + 5000
    with jax.numpy_dtype_promotion("strict"):
        y = jax.jit(RoPE().rotate)(x, pos)
    assert y.dtype == jnp.bfloat16
    exact = RoPE().rotate(x.astype(jnp.float32), pos)
    np.testing.assert_allclose(y.astype(jnp.float32), exact, rtol=2**-8)


@pytest.mark.parametrize("heads,slopes", [
    (1, [2**-8]),
    (2, [2**-4, 2**-8]),
    (8, [2**-n for n in range(1, 9)]),
    (3, [2**-4, 2**-8, 2**-2]),
    (6, [2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3]),
    (12, [2**-n for n in range(1, 9)] + [2**-0.5, 2**-1.5, 2**-2.5, 2**-3.5]),
])
def test_alibi_slopes(heads, slopes):
    have = ALiBi(heads).slopes(jnp.arange(heads))
    np.testing.assert_allclose(have, slopes, rtol=1e-6)
    # a shard asks for its own heads by their global numbers
    np.testing.assert_allclose(ALiBi(heads).slopes(jnp.array([heads - 1])), slopes[-1:],
                               rtol=1e-6)


def test_alibi_is_a_score_of_distance():
    i, j = jnp.arange(5)[:, None, None], jnp.arange(7)[None, :, None]
    score = ALiBi(4)(jnp.arange(4)[None, None], i, j)
    want = -np.abs(i - j) * 2.0 ** (-2 * np.arange(1, 5))
    np.testing.assert_allclose(score, want, rtol=1e-6)


@pytest.mark.parametrize("wrong,message", [
    (lambda: RoPE(scaling="cubic"), "scaling='cubic': expected one of .*'linear'"),
    (lambda: RoPE(scaling="linear", factor=0.5), "factor=0.5: expected 1 or more"),
    (lambda: RoPE(fraction=0.0), r"fraction=0.0: expected in \(0, 1\]"),
    (lambda: RoPE(fraction=1.5), "fraction=1.5"),
    (lambda: RoPE().frequencies(7), "7 channels: expected an even number"),
    (lambda: RoPE().rotate(tokens(d=5), jnp.zeros((1, T))), "5 channels"),
    (lambda: ALiBi(0), "heads=0: expected 1 or more"),
])
def test_wrong_arguments_say_what_was_expected(wrong, message):
    with pytest.raises(ValueError, match=message):
        wrong()


@pytest.mark.parametrize("far", (4096, 131_072, 2_097_152, 2**31 - 1, -5, -2**31 + 1))
def test_angles_are_exact_anywhere(far):
    """In float64, the error of an angle is below 1e-6 of a turned vector."""
    pos = far - np.arange(0, 64) * np.sign(far)
    for rope in (RoPE(), RoPE(5e5), FORMS["llama3"], FORMS["yarn"]):
        x = np.asarray(jax.random.normal(jax.random.key(0), (1, 64, 1, 32)))
        have = np.asarray(rope.rotate(x, jnp.asarray(pos[None], jnp.int32)), np.float64)
        angle = pos[:, None] * rope.frequencies(32)
        z = (x[0, :, 0, :16] + 1j * x[0, :, 0, 16:].astype(np.float64))
        z = z * np.exp(1j * angle) * rope.magnitude
        want = np.concatenate([z.real, z.imag], -1)
        assert np.abs(have[0, :, 0] - want).max() < 1e-6 * np.abs(x).max() * 2
        assert np.linalg.norm(have[0, :, 0] - want) < 1e-6 * np.linalg.norm(want)


def test_the_published_bands_are_the_defaults():
    same = lambda scaling, fast: np.testing.assert_array_equal(
        RoPE(scaling=scaling, factor=8.0, original=64).frequencies(32),
        RoPE(scaling=scaling, factor=8.0, original=64, fast=fast).frequencies(32))
    same("llama3", 4.0)
    same("yarn", 32.0)


def test_dynamic_angles_are_those_of_the_formula():
    """theta (factor L / original - (factor - 1))^(D/(D-2)), L the longest text."""
    rope, d = RoPE(theta=100.0, scaling="dynamic", factor=2.0, original=8), 6
    x = np.random.default_rng(0).normal(size=(1, 12, 1, d)).astype(np.float32)
    for t in (5, 12):
        theta = 100.0 * (2.0 * max(t, 8) / 8 - 1) ** (d / (d - 2))
        pos = np.arange(t)
        angle = pos[:, None] * theta ** (-np.arange(0, d, 2) / d)
        a, b = np.split(x[0, :t, 0].astype(np.float64), 2, -1)
        want = np.concatenate([a * np.cos(angle) - b * np.sin(angle),
                               a * np.sin(angle) + b * np.cos(angle)], -1)
        found = rope.rotate(jnp.asarray(x[:, :t]), jnp.asarray(pos)[None])
        np.testing.assert_allclose(found[0, :, 0], want, atol=2e-6)


def test_factors_of_channels_are_those_of_the_length():
    """longrope: angles pos theta^(-2m/D) / factor_m, the long factors beyond."""
    short, long = (1.0, 1.5, 2.0), (1.0, 4.0, 9.0)
    rope = RoPE(theta=100.0, scaling="longrope", factor=4.0, original=8, short=short,
                long=long)
    x = np.random.default_rng(0).normal(size=(1, 12, 1, 6)).astype(np.float32)
    grown = np.sqrt(1 + np.log(4.0) / np.log(8.0))
    for t, factors in ((8, short), (9, long)):
        angle = np.arange(t)[:, None] * 100.0 ** (-np.arange(0, 6, 2) / 6) / factors
        z = (x[0, :t, 0, :3] + 1j * x[0, :t, 0, 3:].astype(np.float64)) * grown
        z = z * np.exp(1j * angle)
        found = rope.rotate(jnp.asarray(x[:, :t]), jnp.arange(t)[None])
        np.testing.assert_allclose(found[0, :, 0], np.concatenate([z.real, z.imag], -1),
                                   atol=2e-6)
    rope.check_stream(8)
    with pytest.raises(NotImplementedError, match="angles follow the length"):
        rope.check_stream(9)
    dataclasses.replace(rope, short=long).check_stream(9)


@pytest.mark.parametrize("given, words", (
    ({"short": (1.0,)}, "none without"),
    ({"scaling": "longrope", "short": (1.0,)}, "long=None"),
    ({"scaling": "longrope", "short": (1.0,), "long": (0.0,)}, "above 0"),
    ({"scaling": "longrope", "short": (), "long": (1.0,)}, "above 0"),
))
def test_factors_that_are_none(given, words):
    with pytest.raises(ValueError, match=words):
        RoPE(**given)
    rope = RoPE(scaling="longrope", short=(1.0,), long=(1.0,))
    with pytest.raises(ValueError, match="short has 1 factors: expected 3"):
        rope.frequencies(6)
