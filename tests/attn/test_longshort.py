"""LongShort: both forms in float64, gradients of all parameters, its stream."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from attn.longshort import LongShort
from tests.compiled import init
from tests.laws import close
from tests.oracles import differences

B, T, H, K, D, E = 1, 11, 2, 1, 4, 6


def softmax(a, axis=-1):
    e = np.exp(a - a.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


def norm(a, p):
    a = (a - a.mean((-2, -1), keepdims=True)) / np.sqrt(
        a.var((-2, -1), keepdims=True) + 1e-5)
    return a * p["scale"] + p["bias"]


def waves(count):
    angle = np.arange(count)[:, None] * 1e4 ** (-np.arange(0, E, 2) / E)
    return np.concatenate([np.sin(angle), np.cos(angle)], -1)


def oracle(module, p, q, k, v, x):
    """float64, query by query, of one row and one key head."""
    q, k, v, x = (np.asarray(a, np.float64)[0] for a in (q, k, v, x))
    r, w, l, m = module.rank, module.window, module.chunk, module.memory
    logits = x @ p["compress"]["kernel"][:, 0] + p["compress"]["bias"][0]  # [T,r]
    near_k, near_v = (norm(a, p["norm_near"])[:, 0] for a in (k, v))
    q, o = q * D ** -0.5, np.zeros((T, H, D))
    if not module.causal:
        share = softmax(logits, 0)
        far_k, far_v = (norm((share.T @ a)[:, None], p["norm_far"])[:, 0]
                        for a in (near_k, near_v))
        for t in range(T):
            first, half = t // w * w, max(w // 2, 1)
            at = [s for s in range(first - half, first + w + half) if 0 <= s < T]
            s = q[t] @ np.concatenate([far_k, near_k[at]]).T
            o[t] = softmax(s) @ np.concatenate([far_v, near_v[at]])
        return o[None]
    rows = [np.zeros((m // l * r, D))] * 2
    for at in range(0, T // l * l, l):
        share = softmax(logits[at:at + l], 0)
        rows = [np.concatenate([a, share.T @ b[at:at + l, 0]])
                for a, b in zip(rows, (k, v))]
    far_k, far_v = (norm(a[:, None], p["norm_far"])[:, 0] for a in rows)
    zero = norm(np.zeros((1, 1, D)), p["norm_near"])[0, 0]
    place = np.einsum("we,ehd->whd", waves(w), p["place"])
    far = np.einsum("we,ehd->whd", waves(len(far_k) + 1), p["place_far"]["kernel"])
    far = far + p["place_far"]["bias"]
    for t in range(T):
        at = range(max(t - w + 1, -m), t + 1)
        keys, values = (np.stack([zero if s < 0 else a[s] for s in at])
                        for a in (near_k, near_v))
        known = (m + t) // l * r
        for h in range(H):
            s = (q[t, h] + p["asks"][h]) @ keys.T
            s = s + [(q[t, h] + p["turns"][h]) @ place[t - i, h] for i in at]
            long = [q[t, h] @ (far_k[c] + far[known - 1 - c, h]) for c in range(known)]
            o[t, h] = softmax(np.concatenate([long, s])) @ np.concatenate(
                [far_v[:known], values])
    return o[None]


def made(**fields):
    q, k, v, x = (jax.random.normal(jax.random.key(n), (B, T, *shape)) for n, shape in
                  enumerate(((H, D), (K, D), (K, D), (E,))))
    module = LongShort(**fields)
    params = init(module, jax.random.key(5), q, k, v, x=x)["params"]
    # away from zeros and ones
    noise = jax.random.normal(jax.random.key(6), (10_000,))
    flat, back = ravel_pytree(params)
    return module, (q, k, v, x), flat + 0.3 * noise[:flat.size], back


FORMS = [dict(rank=2, window=3, chunk=4, memory=4), dict(window=6, chunk=2),
         dict(window=1, chunk=3, memory=6), dict(rank=3, window=4, causal=False)]


@pytest.mark.parametrize("fields", FORMS, ids=str)
def test_it_is_its_definition_and_so_are_all_gradients(fields):
    module, args, flat, back = made(**fields)

    def f(flat, q, k, v, x):
        return module.apply({"params": back(flat)}, q, k, v, x=x)

    do = jax.random.normal(jax.random.key(9), (B, T, H, D))
    o, pull = jax.vjp(jax.jit(f), flat, *args)
    wide = jax.tree.map(lambda a: np.asarray(a, np.float64), back(flat))
    leaves, form = jax.tree.flatten(wide)
    ends = np.cumsum([a.size for a in leaves])[:-1]

    def f64(flat, *args):
        parts = np.split(flat, ends)
        params = jax.tree.unflatten(
            form, [a.reshape(b.shape) for a, b in zip(parts, leaves)])
        return oracle(module, params, *args)

    close(o, f64(np.asarray(flat, np.float64), *args))
    differences.agree(f64, (flat, *args), pull(do), do)


def test_a_stream_is_refused_what_it_cannot_do():
    module, (q, k, v, x), flat, back = made(window=3, chunk=4)
    state = module.init_state(9, q, k, v, x=x)
    assert state.k.shape == (B, 3, K, D) and state.near_k.shape == (B, 2, K, D)
    params = {"params": back(flat)}
    with pytest.raises(NotImplementedError, match="segments: chunks are counted"):
        module.apply(params, state, q, k, v, x=x, method="step",
                     segments=jnp.ones((B, T), jnp.int32))
    with pytest.raises(ValueError, match="x None: expected the tokens"):
        module.apply(params, q, k, v)
    with pytest.raises(ValueError, match="memory=5: expected a multiple of chunk=4"):
        LongShort(chunk=4, memory=5)
