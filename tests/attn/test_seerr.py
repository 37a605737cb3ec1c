"""SeerAttention-R: the gate of tokens, its target and its stream, by float64 loops."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from attn.layers import MultiHead
from attn.seerr import SeerR
from attn.softmax import Softmax
from tests.compiled import apply, attend, init
from tests.laws import close, inputs

SMALL = SeerR(block=6, gate_dim=8, budget=18)
FIELDS = [
    {}, {"group": "avg", "norm": True}, {"group": "avgproj", "pool_k": ("max", "min")},
    {"rope": None, "pool_k": ("avg",), "gate_dim": 4},
]


@functools.cache
def drawn(module, t=41):
    """Tokens, parameters that say something, and these in float64."""
    args = inputs(t=t)
    params = init(module, jax.random.key(1), *args)
    params = jax.tree.map(
        lambda a: a + 0.3 * jax.random.normal(jax.random.key(2), a.shape), params)
    own = {n: np.asarray(a, np.float64) for n, a in params["params"].items()}
    return args, params, own


def turned(module, a, pos):
    """Unturned a [B,T,H,D] at pos [T] in float64: channel c with c + D/2."""
    if module.rope is None:
        return a
    half = a.shape[-1] // 2
    angle = pos[:, None] * module.rope.theta ** (-np.arange(half) / half)
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
    left, right = a[..., :half], a[..., half:]
    return np.concatenate([left * cos - right * sin, right * cos + left * sin], -1)


def gates(module, own, q, k):
    """Of tokens [B,T,K,Dg] and of blocks [B,n,K,Dg]."""
    q, k = (np.asarray(a, np.float64) for a in (q, k))
    (b, t, h, d), heads, block = q.shape, k.shape[2], module.block
    pools = {"max": lambda a: a.max(1), "min": lambda a: a.min(1),
             "avg": lambda a: a.mean(1)}
    n = -(-t // block)
    of_k = np.stack([np.concatenate(
        [pools[p](k[:, m * block:(m + 1) * block]) for p in module.pool_k], -1)
        for m in range(n)], 1)
    of_k = np.einsum("bnkc,kcd->bnkd", of_k, own["gate_k"])
    q = q.reshape(b, t, heads, h // heads, d)
    of_q = q.reshape(b, t, heads, -1) if module.group == "proj" else q.mean(3)
    if module.group != "avg":
        of_q = np.einsum("btkc,kcd->btkd", of_q, own["gate_q"])
    if module.norm:
        of_q, of_k = (
            a / np.sqrt((a**2).mean(-1, keepdims=True) + 1e-6) * own[f"norm_{side}"]
            for a, side in ((of_q, "q"), (of_k, "k")))
    return (turned(module, of_q, np.arange(t)),
            turned(module, of_k, np.arange(n) * block))


def target(module, q, k):
    """Section 1 of the decoding gate, in loops."""
    q, k = (np.asarray(a, np.float64) for a in (q, k))
    q, k = (turned(module, a, np.arange(a.shape[1])) for a in (q, k))
    (b, t, h, d), heads, block = q.shape, k.shape[2], module.block
    y = np.zeros((b, heads, t, -(-t // block)))
    for row, head, i in np.ndindex(b, h, t):
        s = k[row, :i + 1, head * heads // h] @ q[row, i, head] / np.sqrt(d)
        p = np.exp(s - s.max()) / np.exp(s - s.max()).sum()
        for m in range(i // block):
            best = p[m * block:(m + 1) * block].max()
            at = row, head * heads // h, i, m
            y[at] = max(y[at], best)
    return y / (y.sum(-1, keepdims=True) + 1e-9)


@pytest.mark.parametrize("fields", FIELDS)
def test_the_gate_its_target_and_its_loss_are_those_of_loops(fields):
    module = SMALL.clone(**fields)
    (q, k, v), params, own = drawn(module)
    of_q, of_k = gates(module, own, q, k)
    s = np.einsum("btkd,bnkd->bktn", of_q, of_k) / np.sqrt(module.gate_dim)
    past = np.arange(7)[None] < np.arange(41)[:, None] // 6
    have = apply(module, params, q, k, method="logits")
    close(np.where(past, have, 0), np.where(past, s, 0))
    assert (np.asarray(have)[:, :, ~past] <= -1e19).all()
    y = target(module, q, k)
    close(apply(module, params, q, k, method="target"), y)
    s = np.where(past, s, -1e20)
    log_p = s - s.max(-1, keepdims=True)
    log_p = log_p - np.log(np.exp(log_p).sum(-1, keepdims=True))
    terms = np.where(y > 0, y * (np.log(np.maximum(y, 1e-300)) - log_p), 0)
    close(apply(module, params, q, k, method="loss"), terms.mean())
    skipping = module.clone(skip=0.5)
    close(apply(skipping, params, q, k, method="loss"), terms[:, :, 20:].mean())


def read_by_one(module, own, q, k, v):
    """The last token's output: its gate's choice, then softmax, in loops."""
    of_q, of_k = gates(module, own, q, k)
    s = np.einsum("bkd,bnkd->bkn", of_q[:, -1], of_k) / np.sqrt(module.gate_dim)
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    (b, t, h, d), heads, block = q.shape, k.shape[2], module.block
    q, k = (turned(module, a, np.arange(t)) for a in (q, k))
    mine, o = (t - 1) // block, np.zeros((b, h, v.shape[3]))
    for row, head in np.ndindex(b, h):
        key = head * heads // h
        scores = s[row, key, :mine]
        if module.threshold is None:
            on = np.argsort(-scores)[:module.budget // block - 1]
        else:
            p = np.exp(scores - scores.max())
            on = np.nonzero(p / p.sum() > module.threshold)[0]
        seen = np.isin(np.arange(t) // block, [*on, mine])
        logits = k[row, :, key] @ q[row, -1, head] / np.sqrt(d)
        e = np.where(seen, np.exp(logits - logits.max()), 0)
        o[row, head] = e / e.sum() @ v[row, :, key]
    return o


@pytest.mark.parametrize("fields, pieces", [
    ({}, (40,)), ({}, (11, 1, 1, 20, 7)), ({"group": "avg", "norm": True}, (40,)),
    ({"threshold": 0.1}, (17, 23)), ({"budget": 6}, (40,)),
])
def test_a_token_reads_the_best_blocks_of_its_gate(fields, pieces):
    module = SMALL.clone(**fields)
    (q, k, v), params, own = drawn(module)
    state, at = module.init_state(41, q, k, v), 0
    for t in pieces:
        part = (a[:, at:at + t] for a in (q, k, v))
        state, _ = apply(module, params, state, *part, method="step")
        at += t
    state, o = apply(
        module, params, state, *(a[:, 40:] for a in (q, k, v)), method="step")
    close(o[:, 0], read_by_one(module, own, q, k, v))
    close(state.gates[:, :6], gates(module, own, q, k)[1][:, :6])
    assert (np.asarray(state.gates[:, 6:]) == 0).all()


def test_a_new_sequence_has_pools_of_its_own():
    (q, k, v), params, own = drawn(SMALL)
    segments = jnp.where(jnp.arange(41) < 19, 1, 2)[None].repeat(2, 0)
    state = SMALL.init_state(41, q, k, v)
    for part in (slice(0, 9), slice(9, 40), slice(40, 41)):
        state, o = apply(
            SMALL, params, state, *(a[:, part] for a in (q, k, v)),
            segments=segments[:, part], method="step")
    close(o[:, 0], read_by_one(SMALL, own, *(a[:, 19:] for a in (q, k, v))))


def test_the_call_is_exact_and_the_gate_learns_alone():
    layer = MultiHead(SMALL, heads=4, kv_heads=2)
    x = jax.random.normal(jax.random.key(2), (1, 24, 32))
    params = {"params": init(layer, jax.random.key(3), x)["params"]}
    adam = optax.adam(1e-2)

    def loss(params):
        y, kept = layer.apply(params, x, mutable=["gate"])
        return 10 * kept["gate"]["attention"]["loss"][0], y

    @jax.jit
    def steps(params):
        def step(carry, _):
            params, state = carry
            (value, _), grads = jax.value_and_grad(loss, has_aux=True)(params)
            updates, state = adam.update(grads, state)
            return (optax.apply_updates(params, updates), state), value

        (after, _), values = jax.lax.scan(
            step, (params, adam.init(params)), None, 40)
        return after, values

    after, values = steps(params)
    assert values[-1] < 0.5 * values[0]
    for path, a in jax.tree_util.tree_leaves_with_path(params):
        moved = not np.array_equal(a, functools.reduce(
            lambda tree, key: tree[key.key], path, after))
        assert moved == ("gate" in jax.tree_util.keystr(path)), path
    exact = MultiHead(Softmax(), heads=4, kv_heads=2)
    plain = {"params": {n: a for n, a in params["params"].items() if n != "attention"}}
    close(jax.jit(loss)(params)[1], apply(exact, plain, x))


def test_without_a_gate_it_is_exact_attention():
    (q, k, v), params, _ = drawn(SMALL.clone(rope=None))
    close(apply(SMALL.clone(rope=None), params, q, k, v), attend(Softmax(), q, k, v))


@pytest.mark.parametrize("fields, message", [
    ({"group": "orig"}, "group='orig'"), ({"pool_k": ("avg", "max")}, "in order"),
    ({"skip": 1.0}, "skip=1.0: expected in"), ({"budget": 0}, "budget=0"),
])
def test_wrong_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        SeerR(**fields)


def test_a_mean_of_queries_has_their_width():
    args = inputs(t=4)
    with pytest.raises(ValueError, match="gate_dim=6, group='avg': expected the D=8"):
        SeerR(gate_dim=6, group="avg").init(jax.random.key(0), *args)
