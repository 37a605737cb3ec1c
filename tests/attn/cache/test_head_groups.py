"""Heads that remember in different ways: dealt out, put back, really smaller."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn.cache.head_groups import MaskOfHeads, ScoreOfHeads
from attn.duo import Duo
from attn.masks import Causal, Window
from attn.positions import ALiBi
from attn.razor import Razor
from attn.softmax import Softmax
from tests.compiled import attend
from tests.laws import close, stream

B, T, H, K, D, V = 2, 20, 6, 3, 8, 12


def inputs(t=T, seed=0):
    keys = jax.random.split(jax.random.key(seed), 3)
    shapes = (B, t, H, D), (B, t, K, D), (B, t, K, V)
    return tuple(jax.random.normal(key, shape) for key, shape in zip(keys, shapes))


@pytest.mark.parametrize("retrieval", [(1,), (0, 2), (0, 1, 2), ()])
def test_heads_come_back_in_order_with_their_own_scores_and_sinks(retrieval):
    q, k, v = inputs()
    score, sink = ALiBi(H), jnp.linspace(-1, 2, H)
    duo = Duo(retrieval=retrieval, sinks=1, recent=T, score=score)
    state, o = jax.jit(duo.step)(duo.init_state(T + 1, q, k, v), q, k, v, sink=sink)
    want = jax.jit(Softmax(score=score))(q, k, v, sink=sink)
    close(o, want)
    one = inputs(1, 1)
    _, o = jax.jit(duo.step)(state, *one, sink=sink)
    k, v = (jnp.concatenate([a, b], 1) for a, b in zip((k, v), one[1:]))
    close(o, jax.jit(Softmax(score=score))(one[0], k, v, sink=sink))


def test_masks_and_scores_know_the_true_heads():
    h, i, j = np.ogrid[:2, :4, :4]
    score = ScoreOfHeads(ALiBi(H), (1, 4))
    np.testing.assert_allclose(score(h, i, j)[1], ALiBi(H)(4, i, j)[0], rtol=1e-6)
    mask = MaskOfHeads(Causal() & Window(1), (3, 5))
    assert (mask(h, i, j) == (Causal() & Window(1))(h, i, j)).all()
    assert mask.reach() == (Causal() & Window(1)).reach() and mask.causal


@pytest.mark.parametrize("share", [0, 1, 2, 4])
def test_memory_is_the_sum_of_what_the_heads_hold(share):
    """Of the compiled step of one token: within a tenth of the sum, and it works in
    less than the bytes of the heads that hold all."""
    n, few = 4096, 64 + 256
    like = lambda t, n: jax.ShapeDtypeStruct((1, t, n, 64), jnp.float32)
    duo = Duo(retrieval=tuple(range(share)))
    one = like(1, 8), like(1, 4), like(1, 4)
    state = jax.eval_shape(lambda: duo.init_state(n, *one))
    memory = jax.jit(duo.step, donate_argnums=0).lower(
        state, *one).compile().memory_analysis()
    want = (share * n + (4 - share) * few) * 2 * 64 * 4
    assert abs(memory.argument_size_in_bytes / want - 1) < 0.1
    assert memory.temp_size_in_bytes < 0.3 * 4 * n * 2 * 64 * 4


def test_a_mesh_that_splits_heads_is_refused():
    q, k, v = inputs()
    mesh = jax.make_mesh((1, 4, 2), ("data", "seq", "model"),
                         axis_types=(jax.sharding.AxisType.Auto,) * 3)
    duo = Duo(axis="seq")
    with jax.set_mesh(mesh), pytest.raises(NotImplementedError, match="'model'"):
        duo.step(duo.init_state(T, q, k, v), q, k, v)


@pytest.mark.parametrize("fields", [(0, 0), (-1,), [0], (0.5,), 1])
def test_wrong_heads(fields):
    for made in (Duo, Razor):
        with pytest.raises(ValueError, match="retrieval=.*expected a tuple"):
            made(retrieval=fields)
    with pytest.raises(ValueError, match=r"retrieval=\(7,\).*K=3"):
        Duo(retrieval=(7,)).init_state(T, *inputs())


def test_pieces_of_heads_that_hold_all_are_exact():
    q, k, v = inputs()
    o, _ = stream(Duo(retrieval=(0, 1, 2)), q, k, v, T, 7)
    close(o, attend(Softmax(), q, k, v))
