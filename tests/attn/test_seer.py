"""Seer: the gate learns what the attention looks at, and what it names is read."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from attn.layers import MultiHead
from attn.seer import Seer
from attn.softmax import Softmax
from experiments.measure import cost
from tests.compiled import apply, init
from tests.laws import close, gradients, inputs

SMALL = Seer(block=8, gate_dim=8, ratio=0.4, last_dense=False, diagonal=True)


def drawn(module, q, k, v):
    params = init(module, jax.random.key(0), q, k, v)
    return jax.tree.map(lambda a: 20 * a, params)  # a gate that says something


@pytest.mark.parametrize("fields", [
    {}, {"last_dense": True}, {"threshold": 0.2, "capacity": None}, {"diagonal": False},
    {"pool_q": ("max", "avg"), "gate_dim": 6},
])
def test_the_call_is_attention_to_the_named_blocks(fields):
    q, k, v = inputs(t=43)
    module = SMALL.clone(**fields)
    params = drawn(module, q, k, v)
    mask = apply(module, params, q, k, method="mask")
    assert 0.1 < np.asarray(mask).mean() < 0.5
    seen = np.repeat(np.repeat(mask, 8, 2), 8, 3)[:, :, :43, :43]
    pos = jnp.arange(43)[None]

    def dense(q, k, v):
        q, k = (module.rope.rotate(a, pos) for a in (q, k))
        return Softmax()(q, k, v, mask=jnp.asarray(seen))

    close(apply(module, params, q, k, v), jax.jit(dense)(q, k, v))
    if not fields:
        sparse = lambda *args: module.apply(params, *args)
        for a, b in zip(gradients(sparse, q, k, v), gradients(dense, q, k, v)):
            close(a, b, "gradient")


def test_packed_sequences_have_gates_of_their_own():
    q, k, v = inputs(t=64)
    params = drawn(SMALL, q, k, v)
    segments = jnp.asarray([[1] * 29 + [2] * 35, [0] * 3 + [1] * 32 + [4] * 29])
    o = apply(SMALL, params, q, k, v, segments=segments)
    for row, part in ((0, slice(0, 29)), (1, slice(35, 64))):
        own = apply(SMALL, params, *(a[row:row + 1, part] for a in (q, k, v)))
        close(o[row:row + 1, part], own)


def test_blocks_behind_change_nothing():
    q, k, v = inputs(t=40)
    params = drawn(SMALL, q, k, v)
    behind = (jnp.arange(40) >= 24)[None, :, None, None]
    mixed = (jnp.where(behind, 3 * a[:, ::-1], a) for a in (q, k, v))
    have, want = apply(SMALL, params, *mixed), apply(SMALL, params, q, k, v)
    close(have[:, :24], want[:, :24])


def test_what_there_is_no_room_for_is_said():
    q, k, v = inputs(t=64)
    module = SMALL.clone(threshold=0.05, capacity=3, diagonal=False)
    params = drawn(module, q, k, v)
    asked, read = apply(module, params, q, k, method="share")
    mask = np.asarray(apply(module, params, q, k, method="mask")).sum(-1)
    np.testing.assert_allclose(asked, mask.sum(-1) / 36, rtol=1e-6)
    np.testing.assert_allclose(read, np.minimum(mask, 3).sum(-1) / 36, rtol=1e-6)
    assert (read < asked).all()


def test_a_stream_reads_its_first_piece_as_a_call():
    q, k, v = inputs(t=41)
    params = drawn(SMALL, q, k, v)
    state = SMALL.init_state(41, q, k, v)
    begin = [a[:, :40] for a in (q, k, v)]
    state, o = apply(SMALL, params, state, *begin, method="step")
    close(o, apply(SMALL, params, *begin))
    _, o = apply(SMALL, params, state, *(a[:, 40:] for a in (q, k, v)), method="step")
    full = SMALL.clone(ratio=1.0)
    close(o, apply(full, params, q, k, v)[:, 40:])


def mass(module, params, q, k):
    """The share of the weights that falls on the blocks that are read, over heads."""
    mask = apply(module, params, q, k, method="mask")
    p = apply(module, params, q, k, method="target")
    return float(np.where(mask, p, 0).sum(-1).mean())


def test_the_gate_learns_and_reads_more_than_by_chance():
    """Tokens of a few kinds that look for their own: the mean of a block tells."""
    rng = np.random.default_rng(0)
    kind = np.repeat(rng.integers(0, 6, (8, 16)), 8, 1)
    x = np.eye(6)[kind] @ rng.normal(size=(6, 8)) + 0.3 * rng.normal(size=(8, 128, 8))
    q = jnp.asarray(x[:, :, None] * 1.5, jnp.float32)
    k = jnp.asarray(x[:, :, None] * 1.5, jnp.float32)
    module = Seer(block=8, gate_dim=8, ratio=0.4, last_dense=False, double=True)
    params = init(module, jax.random.key(1), q, k, k)
    adam = optax.adam(3e-3)

    def step(carry, _):
        params, state = carry
        loss, grads = jax.value_and_grad(
            lambda p: 10 * module.apply(p, q[:6], k[:6], method="loss"))(params)
        updates, state = adam.update(grads, state)
        return (optax.apply_updates(params, updates), state), loss

    (learned, _), losses = jax.jit(lambda p: jax.lax.scan(
        step, (p, adam.init(p)), None, 150))(params)
    assert losses[-1] < 0.6 * losses[0], losses[::30]
    held = [mass(module, p, q[6:], k[6:]) for p in (params, learned)]
    assert held[1] > held[0] + 0.15, held


def test_a_layer_keeps_its_loss_and_learns_by_the_gate_alone():
    layer = MultiHead(SMALL, heads=4, kv_heads=2)
    x = jax.random.normal(jax.random.key(2), (1, 24, 16))
    params = {"params": init(layer, jax.random.key(3), x)["params"]}

    def loss(params):
        y, kept = layer.apply(params, x, mutable=["gate"])
        return kept["gate"]["attention"]["loss"][0], y

    (value, y), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    assert value > 0
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        inside = "gate" in jax.tree_util.keystr(path)
        assert (np.abs(grad).max() > 0) == inside, path
    exact = MultiHead(Softmax(), heads=4, kv_heads=2)
    plain = {"params": {n: a for n, a in params["params"].items() if n != "attention"}}
    close(y, apply(exact, plain, x))


def test_the_gate_costs_pairs_of_blocks_and_linear_memory():
    def work(t):
        args = jax.eval_shape(lambda: inputs(t=t, b=1))
        module = Seer(block=64, gate_dim=8)
        params = jax.eval_shape(module.init, jax.random.key(0), *args)
        loss = lambda params, q, k: module.apply(params, q, k, method="target")
        return cost.memory(loss, params, *args[:2])

    assert work(8192) < 2.2 * work(4096)


@pytest.mark.parametrize("fields, message", [
    ({"ratio": 0.0}, "ratio=0.0"), ({"ratio": 1.5}, "ratio=1.5"),
    ({"pool_q": ("mean",)}, "pool_q=.*expected a tuple"),
    ({"pool_k": ("min", "max")}, "pool_k=.*in order"), ({"gate_dim": 1}, "gate_dim=1"),
])
def test_wrong_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        Seer(**fields)


def test_packed_rows_with_dense_ends_are_refused():
    module = dataclasses.replace(SMALL, last_dense=True)
    q, k, v = inputs()
    with pytest.raises(NotImplementedError, match="last_dense=False"):
        module.init(jax.random.key(0), q, k, v, segments=jnp.ones((2, 16), jnp.int32))
