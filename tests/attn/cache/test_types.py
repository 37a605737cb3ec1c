"""Streams in which tokens, state and promotion are of other types than float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn.landmark import Landmark
from attn.masks import Causal, Sink, Window
from attn.positions import ALiBi, RoPE
from attn.snapkv import SnapKV
from attn.softmax import Softmax
from tests.laws import H, T, inputs, relative

ATTENTIONS = {
    "softmax": Softmax(), "score": Softmax(score=ALiBi(H), softcap=3.0),
    "window": Softmax(mask=Causal() & (Window(5) | Sink(2))),
    "landmark": Landmark(block=3, rope=RoPE()),
    "top": Landmark(block=3, top_k=2, rope=RoPE()),
    "snapkv": SnapKV(capacity=T, window=4, score=ALiBi(H), softcap=3.0),
}
NAMED = pytest.mark.parametrize("name", ATTENTIONS)


def streamed(attention, like, q, k, v):
    """o of a piece of 13 tokens, of 2 and of single ones, from an empty state."""
    state = attention.init_state(2 * T, *(a[:, :1] for a in like))
    step, outs = jax.jit(attention.step), []
    for part in (slice(0, 13), slice(13, 15), slice(15, T)):
        state, o = step(state, *(a[:, part] for a in (q, k, v)))
        outs.append(o)
    return state, jnp.concatenate(outs, 1)


@NAMED
def test_a_stream_under_strict_promotion(name):
    args = inputs(dtype=jnp.bfloat16)
    with jax.numpy_dtype_promotion("strict"):
        state, o = streamed(ATTENTIONS[name], args, *args)
    assert o.dtype == jnp.bfloat16 and state.k.dtype == jnp.bfloat16


@NAMED
@pytest.mark.parametrize(
    "held, told", [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_the_output_has_the_type_of_v(name, held, told):
    """Whatever the state's is, which stays; strict promotion included."""
    attention, args = ATTENTIONS[name], inputs(dtype=jnp.dtype(told))
    like = inputs(dtype=jnp.dtype(held))
    with jax.numpy_dtype_promotion("strict"):
        state, o = streamed(attention, like, *args)
    assert o.dtype == told and state.k.dtype == state.v.dtype == held
    exact = [a.astype(jnp.float32) for a in args]
    want = streamed(attention, exact, *exact)[1]
    if name != "top":  # which blocks it retrieves is by the last bit
        assert relative(np.asarray(o, np.float32), want) < 0.02
