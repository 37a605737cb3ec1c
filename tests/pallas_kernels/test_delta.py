"""The kernels of the delta rule against the float64 recurrence, interpreted."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn.contract import dispatch
from attn.recurrent.delta_rule import recurrence as delta_rule
from pallas_kernels import Refused
from pallas_kernels.delta.api import delta
from tests.on_device import INTERPRET
from tests.oracles.delta_rule import B, H, NAMES, close, held, inputs, recurrence

BACKENDS = pytest.mark.parametrize("backend", ["tpu", "triton"])
TILE = {"tpu": (2,), "triton": (16, 4, 1)}
SCALE, NAMED = 0.5, "implementation"


def runs(t):
    """A segment that goes on from the state, padding, and segments that begin inside,
    at the edge of and before a chunk."""
    segment = np.zeros((B, t), np.int32)
    segment[:, :40], segment[0, 45:100], segment[0, 100:] = 1, 46, 101
    segment[1, 50:64], segment[1, 64:t - 10] = 51, 65
    return segment


@functools.partial(jax.jit, static_argnums=0)
def results(options, args, segment, cotangents):
    """(state, o), and the gradients of all inputs."""
    f = lambda *a: delta(*a[:5], state=a[5], segment=segment, scale=SCALE,
                         interpret=INTERPRET, **dict(options))
    out, back = jax.vjp(f, *args)
    return out, back(cotangents)


def of(backend, **more):
    return tuple(({"backend": backend, "tile": TILE[backend]} | more).items())


CASES = {
    "gated": {"kind": "token", "heads": (H, 2, 2)},
    "plain": {"kind": "none", "top": 2.0, "heads": (2, 2, H), "width": 24},
    "strong": {"kind": "strong", "heads": (H, H, H), "t": 70},
    "mixed": {"kind": "mixed", "top": 2.0, "heads": (1, 1, H), "d": 24, "packed": True},
    "heads": {"kind": "head", "heads": (H, 1, 1), "packed": True, "width": 40},
    "one": {"kind": "token", "heads": (H, 2, 2), "t": 1},
    "channel": {"kind": "channel", "heads": (H, 2, 2), "d": 24, "t": 70},
    "strong channel": {"kind": "strong_channel", "heads": (H, H, H), "t": 70},
    "mixed channel": {
        "kind": "mixed_channel", "top": 2.0, "heads": (2, 1, H), "packed": True},
    "one channel": {"kind": "channel", "heads": (H, 2, 2), "t": 1},
}


@BACKENDS
@pytest.mark.parametrize("name", CASES)
def test_the_kernel_is_the_recurrence(name, backend):
    options = {"t": 150, "packed": False} | CASES[name]
    t, packed = options.pop("t"), options.pop("packed")
    *args, d_o, d_state = inputs(t, **options)
    segment = runs(t) if packed else np.ones((B, t), np.int32)
    g = np.float64(0) if args[4] is None else args[4]
    want, grads = recurrence(*args[:4], g, args[5], segment, SCALE, d_o, d_state)
    ask = of(backend), args, segment if packed else None, (d_state, d_o)
    have, back = results(*ask)
    held(have, back, want, grads, args[4])
    for a, b in zip(jax.tree.leaves((have, back)), jax.tree.leaves(results(*ask))):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("kind", ["token", "channel"])
def test_key_channels_in_parts(kind):
    """By the table's tiles, of 16 and 32 channels, neither of which divides D."""
    *args, d_o, d_state = inputs(70, kind, heads=(H, 2, 2), d=40)
    want = recurrence(*args, np.ones((B, 70), np.int32), SCALE, d_o, d_state)
    ask = of("triton", tile=None), args, None, (d_state, d_o)
    held(*results(*ask), *want, args[4])


@BACKENDS
def test_all_padding_gives_nothing_and_keeps_the_state(backend):
    *args, d_o, d_state = inputs(70)
    have, back = results(of(backend), args, np.zeros((B, 70), np.int32), (d_state, d_o))
    np.testing.assert_array_equal(have[0], args[5])
    assert not np.asarray(have[1]).any()
    for name, a in zip(NAMES, back):
        if name == "state":
            np.testing.assert_array_equal(a, d_state)
        else:
            assert not np.asarray(a).any(), name


@BACKENDS
@pytest.mark.parametrize("dtype,alike,kind", [
    (jnp.bfloat16, False, "token"), (jnp.bfloat16, True, "token"),
    (jnp.float16, False, "token"), (jnp.bfloat16, False, "channel"),
    (jnp.bfloat16, True, "channel")])
def test_low_precision_is_as_good_as_plain_jnp(dtype, alike, kind, backend):
    *args, d_o, d_state = inputs(150, kind, 2.0 if alike else 1.0)
    if alike:  # each token overwrites the one before it
        args[1] = np.broadcast_to(args[1][:, :1], args[1].shape)
    low = lambda a: jnp.asarray(a).astype(dtype)
    args[:3] = map(low, args[:3])
    wide = [np.asarray(a, np.float32) for a in args]
    want, grads = recurrence(*wide, np.ones((B, 150), int), SCALE, low(d_o), d_state)
    cotangents = jnp.asarray(d_state), low(d_o)
    have, back = results(of(backend), args, None, cotangents)
    assert have[1].dtype == dtype and have[0].dtype == jnp.float32
    rough, rough_back = plain(*args, cotangents)
    gap = lambda a, b: np.linalg.norm(np.asarray(a, np.float64) - b)
    for name, a, b, c in zip(("final", "o", *NAMES), (*have, *back),
                             (*rough, *rough_back), (*want, *grads)):
        assert gap(a, c) <= 2 * gap(b, c), (name, gap(a, c), gap(b, c))


@jax.jit
def plain(q, k, v, beta, g, state, cotangents):
    """The recurrence token by token, every step in the type of q."""
    def f(q, k, v, beta, g, state):
        k, v, q = (jnp.repeat(a, H // a.shape[2], 2) for a in (k, v, q))
        # [B,T,H,1|D]
        g = g if g.ndim == 4 else g[..., None]
        beta, decay = beta.astype(q.dtype), jnp.exp(g).astype(q.dtype)

        def step(s, token):
            q, k, v, beta, decay = token
            s = s * decay[..., None]
            u = beta[..., None] * (v - jnp.einsum("bhd,bhdv->bhv", k, s))
            s = s + k[..., None] * u[:, :, None]
            return s, jnp.einsum("bhd,bhdv->bhv", q, s) * jnp.asarray(SCALE, q.dtype)

        tokens = [a.swapaxes(0, 1) for a in (q, k, v, beta, decay)]
        s, o = jax.lax.scan(step, state.astype(q.dtype), tokens)
        return s.astype(jnp.float32), o.swapaxes(0, 1)

    out, back = jax.vjp(f, q, k, v, beta, g, state)
    return out, back(cotangents)


@pytest.mark.parametrize("platform,kind", [
    ("tpu", "token"), ("gpu", "token"), ("tpu", "channel")])
def test_it_is_picked_by_name(platform, kind, monkeypatch):
    monkeypatch.setattr(dispatch, "INTERPRETED", platform)
    q, k, v, beta, g, state, *_ = inputs(70, kind)
    call = jax.jit(functools.partial(delta_rule, state=state), static_argnames=NAMED)
    have, want = (call(q, k, v, beta, g, implementation=n) for n in ("pallas", "xla"))
    for a, b in zip(have, want):
        close(a, b)


@BACKENDS
def test_what_it_does_not_do_is_refused(backend):
    q, k, v, beta, g, *_ = inputs(5)
    call = functools.partial(delta, backend=backend, interpret=INTERPRET)
    with pytest.raises(Refused, match="q, k, v are .*one of"):
        call(q, k, v.astype(np.float16), beta, g)
    with pytest.raises(Refused, match="V=300: at most 256"):
        call(q, k, np.zeros((B, 5, H, 300), np.float32), beta, g)
    if backend == "tpu":
        with pytest.raises(Refused, match="float16"):
            delta(*(a.astype(np.float16) for a in (q, k, v)), beta, backend="tpu")
