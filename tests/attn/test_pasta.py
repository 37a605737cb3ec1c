"""Steering: the shares of marked and unmarked keys, in texts, streams and models."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn.act import ACT
from attn.pasta import Pasta, highlight, spans_of
from attn.softmax import Softmax
from models.generate import generate
from models.lm import LM
from tests.compiled import attend, init, step
from tests.laws import close

T = 11
PASTA = Pasta(heads=(0, 3))


@dataclasses.dataclass(frozen=True)
class Both(Pasta, ACT):
    """Steered and calibrated."""


def tokens(h=4, heads=2, t=T, seed=0):
    keys = jax.random.split(jax.random.key(seed), 3)
    return tuple(jax.random.normal(key, (2, t, n, 4))
                 for key, n in zip(keys, (h, heads, heads)))


def test_what_is_outside_counts_alpha_times_as_much():
    q, k, v = tokens()
    marks = PASTA.marks(spans_of([(2, 4), (6, 7)], T)[None], 9)
    whole = jnp.arange(4), jnp.arange(T)
    plain = Softmax().weights(q, k, v, *whole)
    factor = np.full(T, 0.01)
    factor[[2, 3, 6, 9, 10]] = 1  # marked, or behind the prompt
    want = plain * factor[None, None, None]
    want = want / want.sum(-1, keepdims=True)
    found = PASTA.weights(q, k, v, *whole, marks=marks)
    close(found[:, [0, 3]], want[:, [0, 3]])
    close(found[:, [1, 2]], plain[:, [1, 2]])
    own = v[:, :, np.array([0, 0, 1, 1])]
    close(attend(PASTA, q, k, v, marks=marks),
          jnp.einsum("bhts,bshv->bthv", found, own))


def test_several_spans_and_other_positions():
    spans = spans_of([(0, 2), (3, 4)], 6)[None]
    found = {(position, how): np.asarray(Pasta(position=position, spans=how).marks(
        spans, 5))[0].tolist() for position, how in (
            ("exclude", "union"), ("exclude", "official"), ("include", "union"),
            ("generation", "union"))}
    assert found == {
        ("exclude", "union"): [0, 0, 1, 0, 1, 0],
        ("exclude", "official"): [1, 1, 2, 1, 2, 0],  # each span, one after the other
        ("include", "union"): [0, 0, -1, 0, -1, 0],
        ("generation", "union"): [1, 1, 1, 1, 1, 0],
    }


@pytest.mark.parametrize("cls", [Pasta, Both])
def test_a_steered_stream_is_the_steered_text(cls):
    q, k, v = tokens()
    # all of the prompt votes for sinks as one piece
    one = cls(heads=(0, 3)) if cls is Pasta else cls(heads=(0, 3), factor=1.5)
    marks = one.marks(spans_of([(2, 4)], T)[None], T)
    state = highlight((one.init_state(T, q, k, v),), marks)[0]
    _, o = step(one, state, q, k, v)
    whole = attend(one, q, k, v, marks=marks)
    close(o, whole)
    if cls is Pasta:
        after, first = step(one, state, q[:, :7], k[:, :7], v[:, :7])
        _, rest = step(one, after, q[:, 7:], k[:, 7:], v[:, 7:])
        close(jnp.concatenate([first, rest], 1), whole)
    else:  # neither of the two alone
        assert np.abs(whole - attend(Pasta(heads=(0, 3)), q, k, v, marks=marks)
                      ).max() > 1e-3
        assert np.abs(whole - attend(ACT(heads=(0, 3), factor=1.5), q, k, v)
                      ).max() > 1e-3


def test_heads_are_data_and_gradients_are_those_of_a_bias():
    q, k, v = tokens()
    marks = PASTA.marks(spans_of([(2, 4)], T)[None], T)
    every = Pasta()

    @jax.jit
    def call(heads):
        states = highlight((every.init_state(T, q, k, v),), marks, heads[None])
        return every.step(states[0], q, k, v)[1]

    close(call(jnp.array([1, 0, 0, 1])), attend(PASTA, q, k, v, marks=marks))
    close(call(jnp.zeros(4)), attend(Softmax(), q, k, v))

    def total(f):
        return jax.jit(jax.grad(lambda *a: (f(*a) ** 2).sum(), (0, 1, 2)))(q, k, v)

    steered = jnp.array([1.0, 0, 0, 1])[None, :, None, None]
    bias = np.log(0.01) * steered * marks[:, None, None]
    for a, b in zip(total(lambda *a: PASTA(*a, marks=marks)),
                    total(lambda *a: Softmax()(*a, bias=bias))):
        close(a, b, "gradient")


def test_a_model_is_steered_by_its_state():
    model = LM(vocab=13, width=16, heads=4, attention=(Pasta(),) * 2)
    text = jax.random.randint(jax.random.key(0), (2, T), 0, 13)
    params = init(model, jax.random.key(1), text)
    states = model.init_state(T, text)
    marks = Pasta().marks(spans_of([(2, 4)], 6)[None], 6)  # of fewer positions
    plain = model.clone(attention=(Softmax(),) * 2)
    want = jax.jit(plain.apply)(params, text)
    call = jax.jit(model.apply)
    close(call(params, text, states)[1], want)
    changed = call(params, text, highlight(states, marks))[1]
    assert np.abs(changed - want).max() > 1e-3
    assert generate(model, params, [[1, 2, 3]], length=2) == generate(
        plain, params, [[1, 2, 3]], length=2)


def test_wrong_settings():
    with pytest.raises(ValueError, match="alpha=0: expected in"):
        Pasta(alpha=0)
    with pytest.raises(ValueError, match="position='all': expected one of"):
        Pasta(position="all")
    with pytest.raises(ValueError, match="no PastaState"):
        highlight((None,), jnp.zeros((1, 3)))
