"""Compose: parts are joined as they should be, or say why they are not."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn.compose import Compose, refused
from attn.duo import Duo
from attn.h2o import H2O
from attn.kivi import KIVI
from attn.masks import Causal, Window
from attn.positions import ALiBi
from attn.pyramidkv import PyramidKV
from attn.quest import Quest
from attn.razor import Razor
from attn.saq import SAQ
from attn.snapkv import SnapKV
from attn.streaming import Streaming
from attn.softmax import Softmax
from attn.topk import TopK
from experiments import pairs
from tests.compiled import attend, step
from tests.laws import close

B, T, H, K, D, C = 2, 24, 4, 2, 8, 10
SNAP = SnapKV(capacity=C, window=3)
FINE = KIVI(bits=8, group=4, residual=32)  # nothing becomes a code
ALL = Quest(page=4, budget=2 * T)


def tokens(t=T, seed=0):
    keys = jax.random.split(jax.random.key(seed), 3)
    return tuple(jax.random.normal(key, (B, t, n, D)) for key, n in zip(
        keys, (H, K, K)))


def streamed(policy, args, segments=None, more=2):
    """Outputs of a prompt and of `more` tokens behind it, and the state."""
    state = policy.init_state(T + more, *args)
    state, o = step(policy, state, *args, segments=segments)
    outs = [o]
    for n in range(more):
        state, o = step(policy, state, *tokens(1, n + 1))
        outs.append(o)
    return jnp.concatenate(outs, 1), state


@pytest.mark.parametrize("parts", [
    {"storage": FINE, "reading": ALL},
    {"reading": TopK(top_k=C, block=2, sink=2, local=4)},
])
def test_codes_that_are_fine_and_blocks_that_are_all_change_nothing(parts):
    """Of what a selection keeps, and of rows with padding in front."""
    segments = jnp.asarray([[0] * 5 + [1] * (T - 5), [1] * T])
    own, _ = streamed(SNAP, tokens(), segments)
    found, state = streamed(Compose(selection=SNAP, **parts), tokens(), segments)
    close(found, own)
    assert state.end.tolist() == [T - 3, T + 2]
    assert state.pos.shape[1] == C + 2 and state.store.end.tolist() == [C + 2] * B


def test_codes_of_what_is_kept_add_their_error():
    exact, _ = streamed(SNAP, tokens())
    gaps = []
    for bits in (8, 4):
        made = Compose(selection=SNAP, storage=KIVI(bits=bits, group=8, residual=8))
        o, state = streamed(made, tokens())
        close(o[:, :T], exact[:, :T])  # a prompt is read as it is
        gaps.append(float(jnp.linalg.norm(o[:, T:] - exact[:, T:])))
    assert 0 < gaps[0] < gaps[1] / 5
    full = SNAP.init_state(T + 2, *tokens())
    assert state.store.values.code.nbytes < full.v.nbytes / 5


def test_heads_that_hold_all_store_and_read_as_they_are_told():
    duo = Duo(retrieval=(1,), sinks=1, recent=4)
    own, _ = streamed(duo, tokens())
    close(streamed(Compose(selection=duo, storage=FINE, reading=ALL), tokens())[0], own)
    assert Compose(selection=duo).alone == duo
    stack = Compose(selection=PyramidKV(capacity=C, window=3), storage=SAQ())
    assert stack.of_layer(1, 3).selection == PyramidKV(
        capacity=C, window=3, layers=3, layer=1)
    assert Compose(storage=FINE, scale=0.5).alone == dataclasses.replace(
        FINE, scale=0.5)
    assert Compose().alone == Softmax()


def test_a_sequence_that_begins_forgets_what_was_kept():
    made = Compose(selection=SNAP, storage=FINE, reading=ALL)
    _, state = streamed(made, tokens(), more=0)
    one = tokens(1, 5)
    state, o = step(made, state, *one, segments=jnp.asarray([[9], [0]]))
    close(o[0, 0], jnp.repeat(one[2][0, 0], 2, 0))
    assert (o[1] == 0).all() and state.end.tolist() == [1, T]
    assert (state.pos[0] >= 0).sum(0).tolist() == [1, 1]


def test_every_pair_works_or_says_why():
    every = pairs.pairs(32)
    assert len(every) == 8 * 2 + 8 * 5 + 2 * 5
    args = jax.eval_shape(tokens)
    for names, (fields, why) in every.items():
        if why is None:
            made = Compose(**fields)
            assert made.init_state(T, *args).k.shape[0] == B, names
        else:
            assert ": " in why and "\n" not in why and len(why) < 160
            with pytest.raises(ValueError, match="Compose: "):
                Compose(**fields)
    together = [names for names, (_, why) in every.items() if why is None]
    assert len(together) == 4 * 2 + 4 * 2 + 2 * 2


def test_wrong_parts():
    assert refused(SNAP, FINE, ALL) is None
    assert "H2O with KIVI: a token that goes" in refused(H2O(), FINE)
    with pytest.raises(ValueError, match="Quest is a reading: expected no storage"):
        Compose(storage=ALL)
    with pytest.raises(ValueError, match="mask=.*expected None"):
        Compose(reading=ALL, mask=Causal() & Window(3))
    for made in (lambda: Compose(selection=Streaming()), lambda: Duo(
            whole_as=Streaming())):
        with pytest.raises(ValueError, match="Streaming turns keys itself"):
            made()
    with pytest.raises(ValueError, match="axis='seq'"):
        Compose(storage=FINE, reading=ALL, axis="seq")


BLOCKS = TopK(top_k=T, block=2, sink=2, local=4)  # all of them


def decoded(policy, sink):
    """What one token finds behind a prompt."""
    state, _ = step(policy, policy.init_state(T + 1, *tokens()), *tokens(), sink=sink)
    return step(policy, state, *tokens(1, 1), sink=sink)[1]


@pytest.mark.parametrize("group", [None, Duo, Razor])
def test_a_reading_without_these_fields_has_those_of_compose(group):
    """Softcap, score and sinks, which TopK does not know."""
    fields = {"softcap": 0.5, "score": ALiBi(H)}
    sink, own = jnp.linspace(-1, 2, H), {}
    if group is not None:
        more = {"compensate": False} if group is Razor else {}
        own = {"selection": group(retrieval=(1,), **more)}
    made = Compose(reading=BLOCKS, **own, **fields)
    close(decoded(made, sink), decoded(Softmax(**fields), sink))


def test_a_reading_alone_reads_what_it_chooses():
    few = TopK(top_k=2, block=2, sink=1, local=3)
    segments = jnp.asarray([[0] * 5 + [1] * (T - 5), [1] * T])
    close(streamed(Compose(reading=few), tokens(), segments)[0],
          streamed(few, tokens(), segments)[0])


def test_parts_do_not_have_other_fields_than_compose():
    window = Causal() & Window(3)
    for field in ({"scale": 0.5}, {"softcap": 2.0}, {"mask": window}):
        (name, value), = field.items()
        for parts in ({"storage": KIVI(**field)}, {"selection": SnapKV(**field)}):
            with pytest.raises(ValueError, match=f"Compose: {name}=None stands for"):
                Compose(**parts)
            assert getattr(Compose(**parts, **field), name) == value
        with pytest.raises(ValueError, match=f"Duo: {name}=None stands for KIVI"):
            Duo(whole_as=KIVI(**field))
    with pytest.raises(ValueError, match="Compose: scale=None stands for TopK"):
        Compose(reading=TopK(scale=0.5))
    assert Compose(storage=KIVI(mask=Causal())).visible == Causal()
    score = ALiBi(H)
    made = Compose(selection=Duo(score=score), storage=KIVI(score=score), score=score)
    assert made.alone.whole_as == Compose(storage=KIVI(), score=score)


@pytest.mark.parametrize("make, message", [
    (lambda: Compose(selection=SnapKV), r"SnapKV is a class: .*selection=SnapKV\("),
    (lambda: Compose(reading=TopK(prefill="sparse")), "prefill='sparse': a prompt is"),
    (lambda: Compose(selection=Duo(whole_as=KIVI()), storage=SAQ()), "one of both"),
    (lambda: Compose(selection=Razor(), score=ALiBi(H)), "Razor: score=.*compensate"),
    (lambda: Duo(whole_as="x"), "whole_as=str: expected a storage or a reading"),
    (lambda: Duo(whole_as=KIVI), "whole_as=KIVI, a class: expected a storage"),
    (lambda: Duo(whole_as=SnapKV()), "whole_as=SnapKV: expected a storage"),
    (lambda: Razor(whole_as=Compose(selection=SNAP)), "selection=SnapKV.*tokens, exp"),
    (lambda: Duo(whole_as=TopK()), r"TopK has no .*expected Compose\(reading=TopK"),
    (lambda: Duo(whole_as=Quest(), mask=Causal() & Window(3)), "Quest: mask="),
])
def test_parts_that_are_none(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_causal_mask_is_the_same_for_all_heads():
    duo = Duo(retrieval=(0,), sinks=1, recent=4)
    made = Compose(selection=duo, reading=ALL, mask=Causal())
    close(streamed(made, tokens())[0], streamed(duo, tokens())[0])


def test_a_call_is_exact():
    made = Compose(selection=SNAP, storage=FINE)
    assert np.array_equal(attend(made, *tokens()), attend(Softmax(), *tokens()))


def test_half_precision_and_gradients_through_what_is_kept():
    made = Compose(selection=SNAP, storage=FINE, reading=ALL)
    args = tuple(a.astype(jnp.bfloat16) for a in tokens())

    @jax.jit
    def last(q, k, v, one):
        state, _ = made.step(made.init_state(T + 1, q, k, v), q, k, v)
        return made.step(state, *one)[1]

    one = tuple(a.astype(jnp.bfloat16) for a in tokens(1, 1))
    o = last(*args, one)
    state, _ = step(SNAP, SNAP.init_state(T + 1, *args), *args)
    want = step(SNAP, state, *one)[1]
    assert o.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        o.astype(jnp.float32), want.astype(jnp.float32), atol=2e-2)
    grads = jax.jit(jax.grad(lambda v: last(*tokens()[:2], v, tokens(1, 1)).sum()))(
        tokens()[2])
    # what was dropped has no part in it, all of what is kept has
    assert ((jnp.abs(grads).sum((0, 3)) > 0).sum(0) >= C).all()
