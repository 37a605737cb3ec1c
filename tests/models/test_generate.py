"""Generation: equal to reading, ragged, stopped, bounded in what it compiles."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn.landmark import Landmark
from attn.lightning import Lightning
from attn.snapkv import SnapKV
from attn.softmax import Softmax
from models import generate as generation
from models.generate import Sampling, bucket, generate, sample, stream
from models.lm import LM
from tests.laws import close

MODEL = LM(vocab=13, width=16, heads=2, attention=(Lightning(), Softmax()))
PARAMS = jax.tree.map(
    lambda a: a * 3,
    jax.jit(MODEL.init)(jax.random.key(1), jnp.zeros((1, 4), jnp.int32)),
)
PROMPTS = [[1, 2, 3, 4, 5, 6, 7], [5], [3, 1, 4]]


def greedy(model, params, prompt, length):
    """The same by reading the whole text anew for every token."""
    read = jax.jit(model.apply)
    text = list(prompt)
    for _ in range(length):
        row = jnp.asarray([text + [0] * (16 - len(text))])
        text.append(int(read(params, row)[0, len(text) - 1].argmax()))
    return text[len(prompt):]


def test_ragged_prompts_in_chunks():
    want = [greedy(MODEL, PARAMS, prompt, 6) for prompt in PROMPTS]
    for chunk in (512, 4, 1):
        assert generate(MODEL, PARAMS, PROMPTS, length=6, chunk=chunk) == want


def test_landmarks_go_in_between():
    model = MODEL.clone(attention=(Landmark(block=3), Softmax()))
    params = jax.jit(model.init)(jax.random.key(1), jnp.zeros((1, 4), jnp.int32))
    want = [greedy(model, params, prompt, 5) for prompt in PROMPTS]
    assert generate(model, params, PROMPTS, length=5) == want


def test_a_compressed_memory_generates():
    model = MODEL.clone(attention=(SnapKV(capacity=5, window=2),) * 2)
    out = generate(model, PARAMS, PROMPTS, length=4)
    assert [len(row) for row in out] == [4, 4, 4]


def test_stop_tokens_end_a_row_and_are_left_out():
    free = generate(MODEL, PARAMS, PROMPTS, length=8)
    stop = free[0][3]
    cut = generate(MODEL, PARAMS, PROMPTS, length=8, stop=[stop])
    for row, whole in zip(cut, free):
        end = whole.index(stop) if stop in whole else len(whole)
        assert row == whole[:end]


def test_one_compilation_a_bucket(monkeypatch):
    traced = []
    apply = LM.__call__
    monkeypatch.setattr(
        LM, "__call__", lambda *a, **k: (traced.append(1), apply(*a, **k))[1]
    )
    model = MODEL.clone(vocab=14)
    params = model.init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
    generate(model, params, [[1, 2, 3]], length=3)
    before = len(traced)
    for n in range(1, 16):
        generate(model, params, [[1] * n], length=n)
    assert len(traced) == before
    assert [bucket(n) for n in (1, 16, 17, 100)] == [16, 16, 32, 128]


def test_sampling():
    logits = jnp.log(jnp.array([[0.5, 0.3, 0.15, 0.05]])).repeat(4000, 0)
    count = lambda how: np.bincount(
        np.asarray(sample(logits, jax.random.key(0), how)), minlength=4
    ) / 4000
    np.testing.assert_allclose(count(Sampling(1.0)), [0.5, 0.3, 0.15, 0.05], atol=0.03)
    assert count(Sampling(0.0)).tolist() == [1, 0, 0, 0]
    np.testing.assert_allclose(
        count(Sampling(1.0, top_k=2)), [0.625, 0.375, 0, 0], atol=0.03
    )
    np.testing.assert_allclose(
        count(Sampling(1.0, top_p=0.7)), [0.625, 0.375, 0, 0], atol=0.03
    )
    assert (count(Sampling(1.0, top_p=0.4)) == [1, 0, 0, 0]).all()
    # at least 0.4 times as likely as the first: 0.2; of the square at 1/2: 0.1
    np.testing.assert_allclose(
        count(Sampling(1.0, min_p=0.4)), [0.625, 0.375, 0, 0], atol=0.03
    )
    assert (count(Sampling(0.5, min_p=0.4)) == [1, 0, 0, 0]).all()
    assert (count(Sampling(1.0, min_p=0.0)) > 0).all()
    assert count(Sampling(0.2))[0] > 0.9
    drawn = lambda seed: generate(MODEL, PARAMS, PROMPTS, length=9, temperature=2.0,
                                  seed=seed)
    assert drawn(0) == drawn(0) != drawn(1)


@pytest.mark.parametrize("how, kept", [
    (Sampling(1.0, top_k=3), 3), (Sampling(1.0, top_p=0.25), 3),
    (Sampling(1.0, top_p=0.3), 3), (Sampling(1.0, top_p=0.7), 7),
    (Sampling(1.0, top_k=4, top_p=0.6), 3), (Sampling(1.0, top_k=99), 10),
    (Sampling(1.0, top_p=1e-9), 1), (Sampling(1e30, top_k=3), 3),
])
def test_ties_at_a_border_keep_as_many_as_were_asked_for(how, kept):
    drawn = sample(jnp.zeros((400, 10)), jax.random.key(0), how)
    assert np.unique(drawn).tolist() == list(range(kept))


def test_ties_below_a_greater_token():
    logits = jnp.zeros((400, 6)).at[:, 4].set(1.0)
    drawn = sample(logits, jax.random.key(0), Sampling(1.0, top_k=3))
    assert np.unique(drawn).tolist() == [0, 1, 4]


@pytest.mark.parametrize("cold", [1e-3, 1e-30, 1e-38, 1e-40, 5e-324])
def test_the_colder_the_greater(cold):
    logits = jnp.array([[1.0, 3.0, -jnp.inf, 2.9], [-3e38, 3e38, 0.0, 0.0]])
    for how in (Sampling(cold), Sampling(cold, 2, 0.9)):
        assert sample(logits, jax.random.key(0), how).tolist() == [1, 1]


def test_the_hotter_the_more_even_but_never_what_is_excluded():
    logits = jnp.array([[5.0, 0.0, -jnp.inf]]).repeat(400, 0)
    drawn = sample(logits, jax.random.key(0), Sampling(1e300))
    counts = np.bincount(drawn, minlength=3)
    assert counts[2] == 0 and abs(counts[0] - 200) < 60


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf])
def test_logits_that_are_no_numbers_are_refused(value):
    logits = jnp.zeros((2, 5)).at[1, 3].set(value)
    for how in (Sampling(), Sampling(0.7, top_k=2)):
        with pytest.raises(ValueError, match="row 1 have NaN or inf"):
            sample(logits, jax.random.key(0), how)
    broken = jax.tree.map(lambda a: a * value, PARAMS)
    with pytest.raises(ValueError, match="logits of prompt 0.*after 0 new tokens"):
        generate(MODEL, broken, PROMPTS, length=2)


def test_numbers_and_prompts_of_numpy():
    want = generate(MODEL, PARAMS, [[1, 2], [3, 4], [5, 6]], length=6)
    options = dict(length=np.int64(6), temperature=np.float32(0), chunk=np.int64(512),
                   stop=np.array([], int), seed=np.int64(0))
    rows = np.array([[1, 2], [3, 4], [5, 6]])
    for prompts in (rows, [rows[0].astype(np.uint8), (3, 4), [5, 6]], jnp.array(rows)):
        assert generate(MODEL, PARAMS, prompts, **options) == want
    assert Sampling(np.float32(0.5), np.int64(3), np.float64(0.5)).checked() == (
        0.5, 3, 0.5, None)


def test_a_stream_gives_the_logits_of_the_text():
    tokens = jax.random.randint(jax.random.key(2), (2, 11), 0, 13)
    close(stream(MODEL, PARAMS, tokens, 4), MODEL.apply(PARAMS, tokens), "gradient")


@pytest.mark.parametrize("prompts, options, message", [
    ([], {}, "prompts"), ([[1], []], {}, "none of them empty"),
    ([[13]], {}, "token 13"), ([[-1]], {}, "ids from 0"),
    ([[1]], {"length": 0}, "length=0"), ([[1]], {"chunk": 0}, "chunk=0"),
    ([[1]], {"temperature": -1}, "temperature=-1"), ([[1]], {"top_k": 0}, "top_k=0"),
    ([[1]], {"top_p": 0.0}, "top_p=0.0"), ([[1]], {"top_p": np.nan}, "top_p=nan"),
    ([[1]], {"min_p": 1.5}, "min_p=1.5"),
    ([[1]], {"temperature": np.nan}, "temperature=nan"),
    ([[1]], {"temperature": np.inf}, "temperature=inf"),
    ([[1]], {"temperature": "hot"}, "temperature='hot'"),
    ([[1]], {"top_k": 2.5}, "top_k=2.5"), ([[1]], {"length": 2.0}, "length=2.0"),
    ([[1]], {"length": 2**40}, "at most"), ([[1]], {"stop": "a"}, "stop='a'"),
    ([[1]], {"seed": 2**70}, "64 bits"), ("ab", {}, "prompts='ab'"),
    (["ab"], {}, "prompts.0.='ab'"), ([1, 2], {}, "prompts.0.=1"),
    ([[1.5]], {}, "float64"), ([[[1]]], {}, r"shape \(1, 1\)"), (5, {}, "prompts=5"),
    (np.zeros((0, 3), int), {}, "at least one"), ([[1], [[2], [3, 4]]], {}, "no list"),
])
def test_wrong_calls(prompts, options, message):
    with pytest.raises(ValueError, match=message):
        generate(MODEL, PARAMS, prompts, **{"length": 2} | options)


def test_module_has_no_state():
    assert not [v for v in vars(generation).values() if isinstance(v, jax.Array)]
