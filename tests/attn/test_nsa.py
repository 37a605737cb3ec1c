"""NSA: the paper's equations by loops, the public choice of blocks, a stream's memory.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn.layers import MultiHead
from attn.nsa import NSA
from attn.positions import RoPE
from attn.softmax import Softmax
from attn.sparse.compressed_blocks import Choice, block_scores
from tests.compiled import apply, init
from tests.laws import close, inputs

SMALL = NSA(compress=4, stride=2, block=6, top_k=4, window=5)
NAMES = tuple(f"{a}_{b}" for a in ("key", "value") for b in ("position", "in", "out"))


def softmax(s, seen):
    """Over what is seen; zeros where nothing is."""
    s = np.where(seen, s, -1e30)
    e = np.where(seen, np.exp(s - s.max(-1, keepdims=True)), 0)
    return e / np.maximum(e.sum(-1, keepdims=True), 1e-30)


def compressed(module, p, name, a):
    """Equation 7: a [B,T,K,X] -> [B,n,K,X], in loops over blocks."""
    length, stride = module.compress, module.stride
    n = max((a.shape[1] - length) // stride + 1, 0)
    found = np.zeros((a.shape[0], n, *a.shape[2:]))
    for i, head in np.ndindex(n, a.shape[2]):
        block = a[:, i * stride:i * stride + length, head] + p[f"{name}_position"][head]
        u = block.reshape(len(a), -1) @ p[f"{name}_in"][head]
        u = 0.5 * u * (1 + np.tanh(np.sqrt(2 / np.pi) * (u + 0.044715 * u**3)))
        found[:, i, head] = u @ p[f"{name}_out"][head]
    return found


def chosen_by(module, q, keys):
    """Equations 8 to 11: the blocks of each token and group, as sets [B][K][T]."""
    (b, t, h, d), heads = q.shape, keys.shape[2]
    length, stride, block = module.compress, module.stride, module.block
    found = np.empty((b, heads, t), object)
    for row, head, i in np.ndindex(b, heads, t):
        scores, own = np.zeros(i // block + 1), i // block
        there = np.arange(keys.shape[1]) * stride + length - 1 <= i
        for a in range(head * h // heads, (head + 1) * h // heads):
            p = softmax(keys[row, :, head] @ q[row, i, a] / np.sqrt(d), there)
            for j, m, n in np.ndindex(own + 1, block // stride, length // stride):
                at = j * block // stride + m - n
                if 0 <= at < len(p):
                    scores[j] += p[at]
        scores[:module.first] = np.inf
        scores[max(own - module.local + 1, 0):] = np.inf
        found[row, head, i] = set(np.argsort(-scores, kind="stable")[:module.top_k])
    return found


def by_hand(module, params, q, k, v, x):
    """Equations 5 to 12, in float64 loops."""
    q, k, v, x = (np.asarray(a, np.float64) for a in (q, k, v, x))
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params["params"])
    (b, t, h, d), group = q.shape, q.shape[2] // k.shape[2]
    gate = p["branch_gate"]
    gates = 1 / (1 + np.exp(-(np.einsum("bte,ehc->bthc", x, gate["kernel"])
                              + gate["bias"])))
    keys, values = compressed(module, p, "key", k), compressed(module, p, "value", v)
    chosen, o = chosen_by(module, q, keys), np.zeros((b, t, h, v.shape[3]))
    for row, i, head in np.ndindex(b, t, h):
        mine, j = head // group, np.arange(t)
        there = np.arange(keys.shape[1]) * module.stride + module.compress - 1 <= i
        blocks = np.isin(j // module.block, list(chosen[row, mine, i]))
        s = k[row, :, mine] @ q[row, i, head] / np.sqrt(d)
        coarse = keys[row, :, mine] @ q[row, i, head] / np.sqrt(d)
        reads = (
            softmax(coarse, there) @ values[row, :, mine],
            softmax(s, blocks & (j <= i)) @ v[row, :, mine],
            softmax(s, (j <= i) & (j > i - module.window)) @ v[row, :, mine])
        o[row, i, head] = sum(g * r for g, r in zip(gates[row, i, head], reads))
    return o


@functools.cache
def drawn(module, t=29):
    """Tokens with x [B,T,10], and parameters."""
    x = jax.random.normal(jax.random.key(5), (2, t, 10))
    args = inputs(t=t)
    return args, x, init(module, jax.random.key(1), *args, x=x)


@pytest.mark.parametrize("module", [
    SMALL, NSA(compress=6, stride=2, block=4, top_k=3, local=1, window=3, hidden=5)])
def test_it_is_what_the_loops_say(module):
    args, x, params = drawn(module)
    close(apply(module, params, *args, x=x), by_hand(module, params, *args, x))


def test_every_gradient_is_that_of_differences():
    """Of all inputs and parameters, along a random direction: float64 loops, whose
    choice a small step does not change."""
    args, x, params = drawn(SMALL, 17)
    w = np.asarray(jax.random.normal(jax.random.key(9), (*args[0].shape[:3], 12)))

    def scalar(tree):
        params, *rest = tree
        return (w * SMALL.apply(params, *rest[:3], x=rest[3])).sum()

    tree = (params, *args, x)
    slopes = jax.jit(jax.grad(scalar))(tree)
    leaves, form = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(11), len(leaves))
    for n, (a, slope) in enumerate(zip(leaves, jax.tree.leaves(slopes))):
        way = np.asarray(jax.random.normal(keys[n], a.shape), np.float64)

        def at(step):
            moved = [np.asarray(b, np.float64) for b in leaves]
            moved[n] = moved[n] + step * way
            return (w * by_hand(SMALL, *jax.tree.unflatten(form, moved))).sum()

        want = (at(1e-6) - at(-1e-6)) / 2e-6
        have = (np.asarray(slope, np.float64) * way).sum()
        assert abs(have - want) < 2e-5 * np.linalg.norm(slope) * np.linalg.norm(way)


def test_scores_of_blocks_are_those_of_the_public_code():
    """Compressed blocks of two strides, blocks of four: weights 1 2 2 2 1 from the one
    before a block on, as its convolution has them."""
    p = np.random.default_rng(0).random((2, 3, 5, 16))
    have = block_scores(jnp.asarray(p, jnp.float32), Choice(16, 1, 4, 2, 1, 1, 1.0))
    wide = np.pad(p, [(0, 0)] * 3 + [(1, 0)])
    want = sum(c * wide[..., n:n + 13:4] for n, c in enumerate((1, 2, 2, 2, 1)))
    close(have, want)


@pytest.mark.parametrize("pieces", [(13, 1, 1, 14), (29,)])
def test_a_stream_keeps_the_compressed_blocks(pieces):
    (q, k, v), x, params = drawn(SMALL)
    want, found, at = apply(SMALL, params, q, k, v, x=x), [], 0
    state = SMALL.init_state(29, q, k, v, x=x)
    for t in pieces:
        part = [a[:, at:at + t] for a in (q, k, v, x)]
        state, o = apply(SMALL, params, state, *part[:3], x=part[3], method="step")
        found.append(o)
        at += t
    close(jnp.concatenate(found, 1), want)
    own = jax.tree.map(lambda a: np.asarray(a, np.float64), params["params"])
    for name, held, a in (("key", state.keys, k), ("value", state.values, v)):
        close(held[:, :13], compressed(SMALL, own, name, np.asarray(a, np.float64)))
        assert (np.asarray(held[:, 13:]) == 0).all()


def test_the_window_alone_is_exact_attention():
    module = NSA(branches=("window",), gated=False)
    (q, k, v), x, params = drawn(module)
    assert not params
    close(apply(module, params, q, k, v), jax.jit(Softmax())(q, k, v))


def test_in_a_layer_its_parameters_are_those_it_names():
    layer = MultiHead(SMALL, heads=4, kv_heads=2, position=RoPE())
    x = jnp.zeros((1, 12, 32))
    own = jax.eval_shape(layer.init, jax.random.key(0), x)["params"]["attention"]
    assert set(own) == {"branch_gate", *NAMES}
    assert own["key_in"].shape == (2, 4 * 8, 8)
    assert own["branch_gate"]["bias"].shape == (4, 3)


@pytest.mark.parametrize("fields, message", [
    ({"compress": 24}, "compress=24: expected a multiple of stride=16"),
    ({"block": 40}, "block=40"), ({"top_k": 2}, "top_k=2: expected first"),
    ({"branches": ()}, "branches"), ({"branches": ("window", "selected")}, "in order"),
])
def test_wrong_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        NSA(**fields)


def test_gates_want_tokens():
    args, x, params = drawn(SMALL)
    with pytest.raises(ValueError, match="x is None: NSA makes"):
        SMALL.apply(params, *args)
