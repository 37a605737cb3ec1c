"""Attention on devices of its own: the same numbers, and what moves is the formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn.cmr import CMR
from attn.h2o import H2O
from attn.masks import Causal, Window
from attn.softmax import Softmax
from models.lm import LM
from models.pools import Pools
from tests.compiled import apply, init
from tests.laws import close

B, T, L, E, H, K = 2, 6, 2, 32, 8, 4
MODEL = LM(vocab=16, width=E, heads=H, kv_heads=K, hidden=32,
           attention=(Softmax(), Softmax(mask=Causal() & Window(3))))
TOKENS = jnp.asarray(np.random.default_rng(0).integers(16, size=(B, T + 2)))


@pytest.fixture(scope="module")
def pools():
    params = init(MODEL, jax.random.key(0), TOKENS)
    own, others = jax.devices()[:4], jax.devices()[4:]
    return params, Pools(MODEL, params, own, others)


def test_two_pools_give_what_one_gives(pools):
    params, two = pools
    want = apply(MODEL, params, TOKENS)
    two.sent = 0
    state, logits = two.read(TOKENS[:, :T], room=2)
    close(logits, want[:, :T])
    assert {d.id for d in state[0].k.devices()} == {4, 5, 6, 7}
    for n in (T, T + 1):
        state, logits = two.step(state, TOKENS[:, n:n + 1])
        close(logits, want[:, n:n + 1])
    # q and the result, k and v of a G-th: (2 + 2 / G) e d B L bytes a token
    assert two.sent == 2 * (2 + 2 * K / H) * 4 * E * B * L
    assert {d.id for d in logits.devices()} == {0, 1, 2, 3}


def test_the_context_is_the_residual_stream_alone(pools):
    _, two = pools
    graph = two._trace(TOKENS[:, :1]).graph
    sizes = [[v.aval.shape for v in one.context] for one in graph.slices]
    # of the first layer the tokens, which are fewer bytes; and the position, of which
    # the rotation is made again
    assert [[s for s in own if len(s) > 1] for own in sizes] == [
        [(B, 1)], [(B, 1, E)], []]
    assert all(len(own) <= 2 for own in sizes)
    # the query's equations come first, and are fewer than all
    early, late = graph.slices[0].equations
    assert early and late


def test_turns_and_order_change_nothing(pools):
    params, two = pools
    late = Pools(MODEL, params, jax.devices()[:4], jax.devices()[4:], overlap=False)
    late.traced = two.traced
    tokens = [TOKENS[n:n + 1, T:T + 1] for n in range(B)]
    both = two.read(TOKENS[:, :T], room=2)[0]
    want, also = (a.step(both, TOKENS[:, T:T + 1])[1] for a in (two, late))
    assert (want == also).all()
    one = Pools(MODEL, params, jax.devices()[:1], jax.devices()[4:5])
    own = [one.read(TOKENS[n:n + 1, :T], room=2)[0] for n in range(B)]
    for n, (_, logits) in enumerate(one.in_turns(list(zip(own, tokens)))):
        close(logits, want[n:n + 1])


def test_a_batch_of_another_size_has_its_own_graph(pools):
    params, two = pools
    one = TOKENS[:1]
    state, logits = two.read(one[:, :T], room=1)
    _, logits = two.step(state, one[:, T:T + 1])
    close(logits, apply(MODEL, params, one)[:, T:T + 1])
    assert {size for size, _ in two.traced} >= {1}
    for wrong in (TOKENS[:1, :2], TOKENS[:, :1]):
        with pytest.raises(ValueError, match=r"expected \[B,1\]=\(1, 1\)"):
            two.step(state, wrong)


def test_what_cannot_be_split_says_why():
    devices = jax.devices()
    with pytest.raises(ValueError, match="none in both"):
        Pools(MODEL, {}, devices[:4], devices[3:])
    with pytest.raises(ValueError, match="4 key heads over 3 devices"):
        Pools(MODEL, {}, devices[:4], devices[5:])
    memory = MODEL.clone(memory=CMR(features=E, layers=1, segment=4))
    with pytest.raises(NotImplementedError, match="memory=CMR: a step is cut"):
        Pools(memory, {}, devices[:4], devices[4:])
    with pytest.raises(NotImplementedError, match="H2O: what is sent"):
        Pools(MODEL.clone(attention=(H2O(),) * L), {}, devices[:4], devices[4:])
