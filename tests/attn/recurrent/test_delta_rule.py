"""The delta rule against the float64 recurrence, token by token."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn.recurrent.delta_rule import naive
from attn.recurrent.delta_rule import recurrence as rule
from attn.recurrent.triangular import inverse
from tests.oracles.delta_rule import B, H, RUNS, close, held, inputs, recurrence

SCALE = 0.5


def both(f):
    """(out, gradients) of f at args, given the cotangents."""
    @jax.jit
    def run(args, cotangents):
        out, back = jax.vjp(f, *args)
        return out, back(cotangents)

    return run


@pytest.mark.parametrize("t", [1, 37])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", [
    "none", "head", "token", "channel", "strong", "mixed", "mixed_channel"])
def test_it_is_the_recurrence(kind, packed, t):
    for top, heads, chunk in ((1.0, (H, 2, 2), 16), (2.0, (2, 2, H), 64)):
        *args, d_o, d_state = inputs(t, kind, top, heads)
        run = np.array(RUNS[t] if packed else np.ones((B, t)), np.int32)
        g = np.float64(0) if args[4] is None else args[4]
        want, grads = recurrence(
            *args[:4], g, args[5], run, SCALE, d_o, d_state)
        f = lambda q, k, v, beta, g, state: rule(
            q, k, v, beta, g, state=state, segment=run if packed else None, chunk=chunk,
            scale=SCALE, implementation="xla",
        )
        held(*both(f)(args, (d_state, d_o)), want, grads, args[4])


@pytest.mark.parametrize("kind, packed", [
    ("none", True), ("token", False), ("channel", True)])
def test_the_loop_is_the_recurrence(kind, packed):
    *args, d_o, d_state = inputs(37, kind)
    run = np.array(RUNS[37] if packed else np.ones((B, 37)), np.int32)
    g = np.float64(0) if args[4] is None else args[4]
    want, grads = recurrence(*args[:4], g, args[5], run, 1.0, d_o, d_state)
    f = lambda q, k, v, beta, g, state: naive(
        q, k, v, beta, g, state=state, segment=run if packed else None)
    held(*both(f)(args, (d_state, d_o)), want, grads, args[4])


@pytest.mark.parametrize("kind", ["none", "token"])
@pytest.mark.parametrize("alike", [False, True])
def test_long_rows_stay_exact(kind, alike):
    # alike: all keys are one, so that each token overwrites the one before it
    *args, d_o, d_state = inputs(400, kind, 2.0, b=1, d=16, width=16, h=2,
                                 heads=(2, 2, 2))
    if alike:
        args[1] = np.broadcast_to(args[1][:, :1], args[1].shape)
    run, g = np.ones((1, 400), np.int32), args[4]
    want, grads = recurrence(*args[:4], np.float64(0) if g is None else g, args[5],
                             run, 1.0, d_o, d_state)
    f = lambda q, k, v, beta, g, state: rule(q, k, v, beta, g, state=state)
    held(*both(f)(args, (d_state, d_o)), want, grads, g)


@pytest.mark.parametrize("many, top, d, chunk", [(1, 2.0, 16, 32), (2, 1.99, 64, 64)])
def test_a_key_that_comes_back_is_met_exactly(many, top, d, chunk):
    # each time the answer to it nearly changes its sign: errors of one sign add up
    rng, t = np.random.default_rng(0), 520
    q, keys, v = (rng.normal(size=s).astype(np.float32)
                  for s in ((1, t, 1, d), (many, d), (1, t, 1, 16)))
    keys = keys / np.linalg.norm(keys, axis=-1, keepdims=True)
    k = keys[rng.integers(0, many, t)][None, :, None]
    beta, state = np.full((1, t, 1), top, np.float32), np.zeros((1, 1, d, 16))
    (_, want), _ = recurrence(q, k, v, beta, np.float64(0), state, np.ones((1, t)), 1.0,
                              np.zeros((1, t, 1, 16)), state)
    have = jax.jit(lambda *args: rule(*args, chunk=chunk)[1])(q, k, v, beta)
    close(have, want, 1e-5)


def test_the_chunk_is_only_a_tile():
    q, k, v, beta, g, state, *_ = inputs(37, "mixed")
    want = rule(q, k, v, beta, g, state=state)
    for chunk in (1, 7, 1000):
        for a, b in zip(rule(q, k, v, beta, g, state=state, chunk=chunk), want):
            close(a, b)


def test_one_token_is_a_chunk_of_one():
    q, k, v, beta, g, state, *_ = inputs(2)
    for run in (None, np.array([[1, 0], [1, 5]], np.int32)):
        want, rows = rule(q, k, v, beta, g, state=state, segment=run, scale=SCALE)
        now = state
        for t in range(2):
            part = (a[:, t:t + 1] for a in (q, k, v, beta, g))
            at = None if run is None else np.minimum(run[:, t:t + 1], t + 1)
            now, o = naive(*part, state=now, segment=at)
            close(SCALE * o, rows[:, t:t + 1])
        close(now, want)


def test_pieces_are_the_whole():
    q, k, v, beta, g, state, *_ = inputs(37)
    want, rows = rule(q, k, v, beta, g, state=state)
    for piece in (1, 4, 16):
        now, outs = state, []
        step = jax.jit(lambda s, *a: rule(*a, state=s))
        for at in range(0, 37, piece):
            part = (a[:, at:at + piece] for a in (q, k, v, beta, g))
            now, o = step(now, *part)
            outs.append(o)
        close(now, want), close(jnp.concatenate(outs, 1), rows)


def test_low_precision_reads_low_and_computes_high():
    q, k, v, beta, g, state, *_ = inputs(37)
    low = tuple(jnp.asarray(a, jnp.bfloat16) for a in (q, k, v))
    with jax.numpy_dtype_promotion("strict"):
        have = rule(*low, beta, g, state=state, dtype=jnp.bfloat16)
    want = rule(*(a.astype(jnp.float32) for a in low), beta, g, state=state)
    assert have[1].dtype == jnp.bfloat16
    close(have[0], want[0]), close(have[1].astype(jnp.float32), want[1], 2**-8)


def test_the_inverse_is_an_inverse_and_so_is_its_gradient():
    rng = np.random.default_rng(0)
    for c in (1, 5, 16, 37, 64):
        a = np.tril(rng.normal(size=(3, c, c)) / 4, -1).astype(np.float32)
        x = inverse(jnp.asarray(a))
        exact = np.linalg.inv(np.eye(c) + a.astype(np.float64))
        close(x, exact)
        d = rng.normal(size=a.shape).astype(np.float32)
        (back,) = jax.vjp(inverse, jnp.asarray(a))[1](jnp.asarray(d))
        turned = exact.swapaxes(1, 2)
        close(back, -turned @ d @ turned, 1.5e-5)


def test_any_length_is_finite():
    shape = jax.eval_shape(lambda: jnp.zeros((1, 43884, 1, 16)))
    q = jnp.full(shape.shape, 0.25)
    beta, g = jnp.full((1, 43884, 1), 1.9), jnp.full((1, 43884, 1), -1e-4)
    f = jax.jit(functools.partial(rule, chunk=64))
    for a in f(q, q, q, beta, g):
        assert np.isfinite(a).all()


def test_wrong_calls_say_what_was_expected():
    q, k, v, beta, g, state, *_ = inputs(5)
    for message, change in {
        r"beta has shape .* expected \[B,T,H\]": {"beta": beta[..., None]},
        "k has shape .*divide H=4": {"k": np.concatenate([k, k[:, :, :1]], 2)},
        "v has shape .* expected": {"v": v[:, :3]},
        "log_decay has shape": {"log_decay": g[..., :2]},
        "state has shape": {"state": state[:, :1]},
        "segment has shape": {"segment": np.ones((B, 4), np.int32)},
        "chunk=0": {"chunk": 0},
    }.items():
        given = {"q": q, "k": k, "v": v, "beta": beta, "log_decay": g} | change
        with pytest.raises(ValueError, match=message):
            rule(**given)
