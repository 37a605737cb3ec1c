"""What goes from layer to layer: numbers, a pool of blocks, a memory of states."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn.actqkv import ActQKV
from attn.cache import probes
from attn.cmr import CMR
from attn.layers import MultiHead
from attn.lightning import Lightning
from attn.masks import Causal, Window
from attn.pyramidkv import PyramidKV
from attn.softmax import Softmax
from models import carried
from models.checkpoint.architectures import described
from models.lm import LM
from tests.compiled import apply, init
from tests.laws import close

B, T, E, L = 2, 26, 16, 2
ACT = ActQKV(window=8, sinks=1, local=4, block=2, top_k=1, represent=1, least=0,
             samples=2)
MEMORY = CMR(features=E, layers=2, entries=6, segment=4)
LOCAL = LM(vocab=16, width=E, heads=2, memory=MEMORY,
           attention=(Softmax(mask=Causal() & Window(3)),) * L)


def tokens(t=T, seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(16, size=(B, t)))


def test_a_policy_gets_the_number_of_its_layer():
    pyramid = PyramidKV(capacity=16, window=4)
    found = carried.numbered((pyramid, Lightning(), pyramid, pyramid))
    assert [a.layer for a in found] == [0, 0, 1, 2] and found[1] == Lightning()
    assert found[2] == PyramidKV(capacity=16, window=4, layers=3).stack()[1]
    said = PyramidKV(layers=8, layer=5)
    assert carried.numbered((said, said)) == (said, said)
    model = LM(vocab=16, width=E, heads=2, attention=(pyramid,) * 3)
    states = model.init_state(64, jax.ShapeDtypeStruct((1, 60), jnp.int32))
    assert [a.k.shape[1] for a in states] == [32, 20, 8]


def test_numbers_are_for_what_is_kept():
    pyramid = PyramidKV(capacity=16, window=4)
    own = MultiHead(pyramid, 2, parent=None)
    found = carried.numbered((pyramid, own, own))
    assert [getattr(a, "attention", a).layer for a in found] == [0, 1, 2]
    assert isinstance(found[1], MultiHead) and found[1].heads == 2
    model = LM(vocab=16, width=E, heads=2, attention=(pyramid, own), scan=True)
    states = model.init_state(64, jax.ShapeDtypeStruct((1, 60), jnp.int32))
    assert [a.k.shape[1] for a in states] == [32, 8]
    # all layers are one loop in a call that keeps nothing
    loop = model.clone(attention=(pyramid,) * 3)
    params = init(loop, jax.random.key(0), tokens(4))
    program = str(jax.make_jaxpr(lambda p: loop.apply(p, tokens(4)))(params))
    assert "length=3" in program
    close(apply(loop, params, tokens(4)), apply(
        loop.clone(scan=False), params, tokens(4)))


def test_where_nobody_asks_the_program_is_the_same(monkeypatch):
    model = LM(vocab=16, width=E, heads=2, attention=(Softmax(),) * L)
    states = model.init_state(4, tokens(4))
    params = init(model, jax.random.key(0), tokens(4))

    def program():
        return jax.jit(lambda *a: model.apply(*a)).lower(
            params, tokens(4), states).as_text()

    own = program()
    monkeypatch.setattr(carried, "begin", lambda *_: {})
    monkeypatch.setattr(carried, "given", lambda block, state, shared: state)
    monkeypatch.setattr(
        carried, "taken", lambda block, state, shared: (state, shared))
    monkeypatch.setattr("models.lm.numbered", lambda attentions: attentions)
    assert program() == own


def test_a_traced_share_is_the_authors():
    rng = np.random.default_rng(0)
    one = jax.jit(probes.pooled_share)
    for warm in (False, True):
        means = rng.uniform(0.3, 1, 4).astype(np.float32)
        left = want_left = 12.0
        for layer in range(4):
            pool = probes.Pool(None, jnp.asarray(means)[None], jnp.asarray([warm]),
                               jnp.asarray(layer))
            got = int(one(pool, jnp.asarray([left]), jnp.asarray(means[layer])[None],
                          jnp.asarray([1]), jnp.asarray([5]))[0])
            want = probes.shares(means, layer, want_left, 1, 5, warm)
            assert got == want
            left, want_left = left - got, want_left - want
    score = rng.normal(size=(3, 6)).astype(np.float32)
    got = jax.jit(probes.entropy_of)(jnp.asarray(score), jnp.asarray([6, 1, 0]))
    close(got, jnp.asarray([probes.entropy(jnp.asarray(score[0]))[1], 0, 0]))


def test_layers_take_their_blocks_out_of_one_pool():
    model = LM(vocab=16, width=E, heads=2, attention=(ACT,) * L)
    alone = model.clone(attention=(ActQKV(**{
        **{n: getattr(ACT, n) for n in ACT.__dataclass_fields__}, "pool": False}),) * L)
    params = init(model, jax.random.key(0), tokens())
    outs = []
    for each in (model, alone):
        states, logits = apply(
            each, params, tokens(), each.init_state(T + 2, tokens()))
        assert all(state.shared is None for state in states)
        states, one = apply(each, params, tokens(1, 1), states)
        outs.append((states, logits, one))
    # a prompt: every layer takes as much, so the pool changes nothing
    close(outs[0][1], outs[1][1])
    # two windows and a token had blocks; then shares go by the entropies
    assert outs[0][0][0].seen.tolist() == [4, 4]
    pool = ACT.shared_by_layers(outs[0][0], 1)
    assert pool.left.tolist() == [[2.0]] * B and pool.warm.all()
    assert not ACT.shared_by_layers(outs[0][0], 8).warm.any()
    means = np.asarray(pool.means)
    assert ((means > 0) & (means <= 1)).all()


@pytest.mark.parametrize("piece", [1, 3, 8])
def test_a_stream_of_a_memory_is_the_whole(piece):
    params = drawn()
    whole = apply(LOCAL, params, tokens())
    states, outs = LOCAL.init_state(T, tokens()), []
    for at in range(0, T, piece):
        states, o = apply(LOCAL, params, tokens()[:, at:at + piece], states)
        outs.append(o)
    close(jnp.concatenate(outs, 1), whole)
    assert states[-1].end.tolist() == [T] * B
    assert (states[-1].buffer.pos < T // 4 * 4).all()  # of whole segments alone


@functools.cache
def drawn():
    params = init(LOCAL, jax.random.key(0), tokens())
    leaves, form = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    return jax.tree.unflatten(form, [
        a + 0.2 * jax.random.normal(key, a.shape) for key, a in zip(keys, leaves)])


def test_a_memory_reaches_behind_a_window_and_not_into_the_future():
    params = drawn()
    last = jax.jit(lambda x: LOCAL.apply(params, x)[:, -1])
    moved = tokens().at[:, 2].add(1) % 16
    assert np.abs(last(moved) - last(tokens())).max() > 1e-4  # 24 tokens behind
    whole = apply(LOCAL, params, tokens())
    late = apply(LOCAL, params, tokens().at[:, 17].add(1) % 16)
    close(late[:, :17], whole[:, :17])
    # what an untrained memory finds is nothing
    fresh = init(LOCAL, jax.random.key(0), tokens())
    without = {"params": dict(fresh["params"])}
    without["params"]["layers"] = {
        n: a for n, a in fresh["params"]["layers"].items() if n != "memory"}
    close(apply(LOCAL, fresh, tokens()), apply(
        LOCAL.clone(memory=None), without, tokens()))


def test_rows_of_a_memory_are_their_own():
    params = drawn()
    # a piece of padding in front, and a sequence that begins behind two pieces
    ids = jnp.asarray([[0] * 8 + [1] * 18, [1] * 8 + [2] * 18])
    o = apply(LOCAL, params, tokens(), segments=ids)
    close(o[:, 8:], apply(LOCAL, params, tokens()[:, 8:]))


def test_segments_of_a_memory_are_those_of_each_row():
    params = drawn()
    whole = apply(LOCAL, params, tokens())
    # padding of 3 in front; and a sequence of 11, of 4 and of 5, with padding between
    x = jnp.stack([jnp.pad(tokens()[0], (3, 0))[:T], jnp.r_[
        tokens()[1, :11], tokens()[1, :1], tokens()[1, :4], tokens()[1, :10]]])
    ids = jnp.asarray([[0] * 3 + [1] * 23, [1] * 11 + [0] + [2] * 4 + [3] * 10])
    want = whole[0, :23], whole[1, :11], whole[1, :4], whole[1, :10]
    states, outs = LOCAL.init_state(T, x), []
    for at, to in ((0, 7), (7, 10), (10, 26)):
        states, o = apply(LOCAL, params, x[:, at:to], states, segments=ids[:, at:to])
        outs.append(o)
    for o in (apply(LOCAL, params, x, segments=ids), jnp.concatenate(outs, 1)):
        for a, b in zip((o[0, 3:], o[1, :11], o[1, 12:16], o[1, 16:]), want):
            close(a, b)
    # without ids rows go on, each from where it stands
    states, one = apply(LOCAL, params, tokens(8)[:, :3], states)
    both = jnp.concatenate([tokens()[:1, :23], tokens(8)[:1, :3]], 1)
    close(one[0], apply(LOCAL, params, jnp.tile(both, (B, 1)))[0, 23:])


def test_a_memory_and_what_a_backward_pass_keeps():
    params, x = drawn(), tokens(8)

    def grads(model):
        return jax.jit(jax.grad(lambda p: (model.apply(p, x) ** 2).sum()))(params)

    again = LOCAL.clone(remat=True)
    program = str(jax.make_jaxpr(lambda p: again.apply(p, x))(params))
    assert "checkpoint" in program or "remat" in program
    jax.tree.map(close, grads(again), grads(LOCAL))
    drops = LOCAL.clone(attention=(Softmax(dropout=0.5),) * L)
    with pytest.raises(ValueError, match="Softmax with dropout: a text is read in ste"):
        drops.apply(params, x, rngs={"dropout": jax.random.key(0)})


def test_layers_that_share_are_alike():
    other = ActQKV(window=4, sinks=1, local=4, block=2, top_k=1, represent=1)
    model = LM(vocab=16, width=E, heads=2, attention=(ACT, other))
    states = model.init_state(4, tokens(4))
    with pytest.raises(ValueError, match="layers that share differ"):
        carried.begin(model.blocks(), states, 4)


def test_what_a_model_says_of_a_memory():
    with pytest.raises(ValueError, match="features=16: expected the width, 32"):
        LOCAL.clone(width=32).init_state(4, tokens(4))
    with pytest.raises(ValueError, match=r"captured=\(0, 5\).*below 2"):
        LOCAL.clone(memory=MEMORY.clone(captured=(0, 5))).init_state(4, tokens(4))
    for wrong in (3, (0.5, 1), (True, 1)):
        with pytest.raises(ValueError, match="captured=.*expected a tuple of whole"):
            LOCAL.clone(memory=MEMORY.clone(captured=wrong)).init_state(4, tokens(4))
    with pytest.raises(ValueError, match="memory='x': expected a CMR, or None"):
        LOCAL.clone(memory="x").init_state(4, tokens(4))
    with pytest.raises(ValueError, match=r"^memory=CMR\(\) stands in no config.json of "
                       "llama: expected None$"):
        described(LM(memory=CMR()))
    far = jnp.float32(1000)
    rate = init(CMR(features=E, decay=1000.0), jax.random.key(0), jnp.zeros((1, 2, E)),
                CMR(features=E).init_state(jnp.zeros((1, 2, E))),
                jnp.zeros((1, 2), int))["params"]["rate"]
    close(jax.nn.softplus(rate), far)
