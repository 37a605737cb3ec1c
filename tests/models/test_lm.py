"""The language model: one stack of any layers, scanned or not, streamed or not."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn.baseconv import BaseConv
from attn.based import Based
from attn.landmark import Landmark
from attn.lightning import Lightning
from attn.masks import Causal, Window
from attn.snapkv import SnapKV
from attn.softmax import Softmax
from models.lm import LM, loss, state_bytes
from models.stack import Pattern, stack, unstack
from experiments.measure import cost
from tests.compiled import apply
from tests.laws import close

HYBRID = (BaseConv(), Lightning(), Based(feature_dim=4),
          Softmax(mask=Causal() & Window(4)), Landmark(block=5))
SMALL = LM(vocab=23, width=16, heads=2, kv_heads=1, attention=HYBRID)
TOKENS = jax.random.randint(jax.random.key(0), (2, 17), 0, 23)
SEGMENTS = jnp.array([[1] * 9 + [2] * 8, [0] * 3 + [1] * 5 + [3] * 7 + [0] * 2])


def start(model, tokens=TOKENS):
    return jax.jit(model.init)(jax.random.key(1), tokens)


def test_a_hybrid_streams_as_it_reads():
    params = start(SMALL)
    whole = jax.jit(SMALL.apply)(params, TOKENS)
    chex.assert_shape(whole, (2, 17, 23))
    chex.assert_type(whole, jnp.float32)
    state, at, read = SMALL.init_state(17, TOKENS), 0, jax.jit(SMALL.apply)
    for size in (6, 1, 1, 9):
        state, logits = read(params, TOKENS[:, at:at + size], state)
        close(logits, whole[:, at:at + size], "gradient")
        at += size


def test_packed_rows_are_separate_texts():
    params = start(SMALL)
    read = jax.jit(SMALL.apply)
    packed = read(params, TOKENS, segments=SEGMENTS)
    for row, at in ((0, slice(0, 9)), (0, slice(9, 17)), (1, slice(8, 15))):
        alone = read(params, TOKENS[row:row + 1, at])
        close(packed[row:row + 1, at], alone, "gradient")


def test_scan_and_remat_change_nothing():
    layers = (Lightning(), Softmax()) * 2
    plain = LM(vocab=23, width=16, heads=2, attention=layers)
    params = start(plain)
    want = jax.jit(jax.value_and_grad(
        lambda p: loss(plain.apply(p, TOKENS), TOKENS)[0]
    ))
    value, grads = want(params)
    for options in ({"scan": True}, {"remat": True}, {"scan": True, "remat": True}):
        other = plain.clone(**options)
        chex.assert_trees_all_equal_shapes(start(other), params)
        mine = jax.jit(jax.value_and_grad(
            lambda p, m=other: loss(m.apply(p, TOKENS), TOKENS)[0]
        ))(params)
        close(mine[0], value)
        jax.tree.map(lambda a, b: close(a, b, "gradient"), mine[1], grads)


def test_remat_saves_memory():
    size = lambda **options: cost.memory(
        jax.grad(lambda p: loss(model(**options).apply(p, tokens), tokens)[0]), params
    )
    model = lambda **o: LM(vocab=32, width=32, heads=2, attention=(Softmax(),) * 8, **o)
    tokens = jnp.zeros((4, 128), jnp.int32)
    params = start(model(), tokens)
    # inside the scan it holds on every backend
    assert size(scan=True, remat=True) < 0.6 * size(scan=True)


def test_stack_and_unstack():
    mixed = (Softmax(), Lightning()) * 3
    params = start(LM(vocab=9, width=8, heads=1, attention=mixed))
    layers = params["params"]["layers"]
    chex.assert_trees_all_equal(unstack(stack(layers, 2)), layers)
    blocks = LM(attention=(Softmax(), Lightning()) * 3).blocks()
    assert Pattern(blocks).period == 2


def test_swapping_the_cache_keeps_the_checkpoint():
    dense = LM(vocab=23, width=16, heads=2, attention=(Softmax(),) * 2)
    params = start(dense)
    snap = dense.clone(attention=(SnapKV(capacity=6, window=2),) * 2)
    chex.assert_trees_all_equal_shapes(start(snap), params)
    close(apply(snap, params, TOKENS), apply(dense, params, TOKENS))
    assert state_bytes(snap, 17) < 0.5 * state_bytes(dense, 17)


def test_low_precision_computes_low_and_stores_high():
    model = LM(vocab=23, width=16, heads=2, attention=HYBRID[:4], dtype=jnp.bfloat16)
    params = start(model)
    assert {a.dtype for a in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    logits = jax.jit(model.apply)(params, TOKENS)
    exact = jax.jit(model.clone(dtype=jnp.float32).apply)(params, TOKENS)
    assert logits.dtype == jnp.float32
    gap = jnp.linalg.norm(logits - exact) / jnp.linalg.norm(exact)
    assert 0 < gap < 0.03


def test_heads_tied_and_not_and_one_position():
    for tied in (True, False):
        model = LM(vocab=23, width=16, heads=2, attention=(Softmax(),), tied=tied)
        params = start(model)
        assert ("head" in params["params"]) != tied
        at = jnp.array([3, 9])
        one = apply(model, params, TOKENS, at=at)
        close(one, apply(model, params, TOKENS)[jnp.arange(2), at])


def test_the_loss_counts_only_targets():
    logits = jax.random.normal(jax.random.key(0), (2, 5, 7))
    targets = jnp.array([[0, -1, 3, -1, 6], [-1] * 5])
    nats, count = loss(logits, targets)
    log_p = np.asarray(jax.nn.log_softmax(logits), np.float64)
    assert count == 3
    close(nats, -(log_p[0, 0, 0] + log_p[0, 2, 3] + log_p[0, 4, 6]))
    assert loss(logits, -jnp.ones((2, 5), jnp.int32)) == (0, 0)


def test_state_bytes():
    exact = LM(width=16, heads=2, kv_heads=1, attention=(Softmax(),))
    assert state_bytes(exact, 100) == 100 * (2 * 8 * 4 + 4) + 8
    fixed = LM(width=16, heads=2, attention=(Lightning(),))
    assert state_bytes(fixed, 100) == state_bytes(fixed, 10_000) == 2 * 8 * 8 * 4 + 8


@pytest.mark.parametrize("fields, message", [
    ({"attention": ()}, "attention=()"),
    ({"heads": 3}, "width=128"),
    ({"attention": (Landmark(block=3), Landmark(block=4))}, r"blocks \[3, 4\]"),
])
def test_wrong_models(fields, message):
    with pytest.raises(ValueError, match=message):
        start(LM(**fields))


def test_wrong_tokens():
    with pytest.raises(ValueError, match=r"expected \[B,T\]"):
        start(LM(), TOKENS[0])
    with pytest.raises(ValueError, match="T > 0"):
        start(LM(), TOKENS[:, :0])
