"""Chosen blocks against dense attention with the same blocks visible."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn.exact.dense import logits, values, weights
from attn.masks import Causal, Full
from attn.sparse import chosen_blocks
from experiments.measure import cost
from pallas_kernels.logits import LogitSpec, Where
from tests.laws import close, gradients

B, T, H, K, D, V, BLOCK = 2, 22, 4, 2, 8, 12, 4
N, M = 3, -(-T // BLOCK)  # query blocks, key blocks


def inputs(s=T):
    keys = jax.random.split(jax.random.key(3), 3)
    shapes = (B, T, H, D), (B, s, K, D), (B, s, K, V)
    return tuple(jax.random.normal(key, shape) for key, shape in zip(keys, shapes))


def pick(heads, n=3):
    """chosen [B,heads,N,n]: some blocks, and -1 for none."""
    rng = np.random.default_rng(0)
    rows = [rng.permutation(M)[:n] for _ in range(B * heads * N)]
    chosen = np.array(rows).reshape(B, heads, N, n)
    return jnp.asarray(np.where(rng.random(chosen.shape) < 0.2, -1, chosen), jnp.int32)


def dense(q, k, v, chosen, mask):
    """The same with all logits."""
    chosen = jnp.repeat(chosen, H // chosen.shape[1], 1)
    blocks_seen = (chosen[..., None] == jnp.arange(M).reshape(1, 1, 1, 1, M)).any(3)
    rows = jnp.arange(T) // -(-T // N)
    seen = jnp.repeat(blocks_seen[:, :, rows], BLOCK, -1)[..., :k.shape[1]]
    at = jnp.arange(T)
    seen = seen & mask(None, at[:, None], jnp.arange(k.shape[1])[None])[None, None]
    s = logits(q, k)
    lse = jax.nn.logsumexp(s, -1, where=seen)
    return values(weights(s, seen), v), lse


@pytest.mark.parametrize("heads", [H, K])
@pytest.mark.parametrize("mask", [Full(), Causal()])
def test_it_is_dense_attention_to_the_chosen_blocks(heads, mask):
    q, k, v = inputs()
    chosen = pick(heads)
    run = lambda q, k, v: chosen_blocks.attend(
        q, k, v, chosen, LogitSpec(mask), block=BLOCK)
    want = lambda q, k, v: dense(q, k, v, chosen, mask)
    (o, lse), (o_want, lse_want) = jax.jit(run)(q, k, v), want(q, k, v)
    close(o, o_want)
    seen = np.isfinite(lse_want)
    assert (np.isfinite(lse) == seen).all()
    assert seen.all() == (mask == Full())
    np.testing.assert_allclose(lse[seen], lse_want[seen], rtol=1e-5, atol=1e-5)
    first = lambda f: lambda *a: f(*a)[0]
    for a, b in zip(gradients(first(run), q, k, v), gradients(first(want), q, k, v)):
        close(a, b, "gradient")


def test_runs_hide_other_sequences():
    q, k, v = inputs()
    segment = jnp.broadcast_to(jnp.where(jnp.arange(T) < 9, 1, 2), (B, T))
    every = jnp.broadcast_to(jnp.arange(M, dtype=jnp.int32), (B, H, 1, M))
    where = Where(q_segment=segment, kv_segment=segment)
    o, _ = chosen_blocks.attend(
        q, k, v, every, LogitSpec(Causal()), where, block=BLOCK)
    for part in (slice(0, 9), slice(9, T)):
        s = logits(q[:, part], k[:, part])
        seen = jnp.tril(jnp.ones(s.shape[-2:], bool))[None, None]
        close(o[:, part], values(weights(s, seen), v[:, part]))


def test_distinct_keeps_every_block_once():
    chosen = jnp.array([[3, 1, 3, -1, 1], [2, 2, 2, 2, 2]])
    want = [[-1, -1, -1, 1, 3], [-1, -1, -1, -1, 2]]
    assert chosen_blocks.distinct(chosen).tolist() == want


def test_the_cost_is_that_of_the_chosen_blocks():
    def work(s, n):
        shape = lambda t, h, d: jax.ShapeDtypeStruct((1, t, h, d), jnp.float32)
        chosen = jax.ShapeDtypeStruct((1, 4, 4, n), jnp.int32)
        f = lambda q, k, v, c: chosen_blocks.attend(
            q, k, v, c, LogitSpec(Causal()), block=16)[0]
        args = shape(64, 4, 8), shape(s, 2, 8), shape(s, 2, 8), chosen
        return cost.flops(f, *args), cost.memory(f, *args)

    (few, _), (many, _) = work(1024, 2), work(1024, 8)
    assert 3.8 < many / few < 4.2
    near, far = work(1024, 4), work(4096, 4)
    assert far[0] / near[0] < 1.05


@pytest.mark.parametrize("chosen, block, message", [
    (jnp.zeros((B, 3, N, 2), jnp.int32), 4, "chosen has shape"),
    (jnp.zeros((B, H, N, 2)), 4, "expected integers"),
    (jnp.zeros((B, H, T + 1, 2), jnp.int32), 4, "N=23"),
    (jnp.zeros((B, H, N, 2), jnp.int32), 0, "block=0"),
])
def test_wrong_calls(chosen, block, message):
    with pytest.raises(ValueError, match=message):
        chosen_blocks.attend(*inputs(), chosen, block=block)


@pytest.mark.parametrize("spec", [
    LogitSpec(Full(), softcap=2.0), LogitSpec(Full(), score=lambda h, i, j: i - j),
])
def test_forms_of_a_logit_that_blocks_do_not_have_are_refused(spec):
    with pytest.raises(NotImplementedError, match="without one"):
        chosen_blocks.attend(
            *inputs(), jnp.zeros((B, K, 2, 1), jnp.int32), spec, block=BLOCK)
