"""What people do wrong in Python is answered in a sentence that says what to do."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn.based import Based
from attn.layers import MultiHead
from attn.masks import Causal, Full, Sink, Window
from attn.mixers import FNet
from attn.positions import ALiBi, RoPE
from attn.snapkv import SnapKV
from attn.softmax import Softmax
from tests.laws import B, D, H, K, T, V, inputs

Q, KEYS, VALUES = (jnp.zeros((B, T, *a)) for a in ((H, D), (K, D), (K, V)))
ARGS = Q, KEYS, VALUES
X = jnp.zeros((B, T, 16))


def layer(attention=Softmax(), x=X, call=None, **fields):
    made = MultiHead(attention, **{"heads": H} | fields)
    return jax.eval_shape(lambda: made.init(jax.random.key(0), x, **(call or {})))


def by_scale():
    return jax.grad(lambda scale: Softmax(scale=scale)(*ARGS).sum())(0.5)


MISTAKES = {
    "class": (lambda: Softmax(*ARGS), r"array of shape .*Softmax\(\)\(q, k, v"),
    "mask_array": (lambda: Softmax(mask=np.ones((T, T), bool)), "q, k, v, mask=array"),
    "mask_list": (lambda: Softmax(mask=[True]), r"expected a Mask, such as Causal\(\)"),
    "mask_class": (lambda: Softmax(mask=Causal), r"expected Causal\(...\)"),
    "mask_text": (lambda: Softmax(mask="causal"), r"mask='causal': expected a Mask"),
    "and": (lambda: Softmax(mask=Causal() and Window(4)), "joined by &"),
    "window_float": (lambda: Window(4.5), "left=4.5: expected 0 or more"),
    "sink_text": (lambda: Sink("4"), "n='4': expected"),
    "scale_zero": (lambda: Softmax(scale=0.0), "scale=0.0: expected .*other than 0"),
    "scale_traced": (by_scale, "scale is traced.*multiply q"),
    "softcap": (lambda: Softmax(softcap=-1.0), "softcap=-1.0: expected above 0"),
    "dropout": (lambda: Softmax(dropout=1), r"dropout=1: expected in \[0, 1\)"),
    "score": (lambda: Softmax(score=3), "score=3: expected a function"),
    "alibi": (lambda: Softmax(score=ALiBi(8))(*ARGS), "H=4 heads, expected as many"),
    "is_causal": (lambda: Softmax()(*ARGS, is_causal=True), r"mask=Causal\(\)"),
    "local_window": (lambda: Softmax()(*ARGS, local_window_size=4), r"Window\(left\)"),
    "scale_call": (lambda: Softmax()(*ARGS, scale=1.0), r"field, Softmax\(scale=...\)"),
    "lengths": (lambda: Softmax()(*ARGS, query_seq_lengths=3), "expected segments"),
    "bias_2d": (lambda: Softmax()(*ARGS, bias=jnp.zeros((T, T))), r"bias has shape"),
    "mask_2d": (lambda: Softmax()(*ARGS, mask=jnp.ones((T, T), bool)), "mask has"),
    "mask_float": (lambda: Softmax()(*ARGS, mask=jnp.ones((1, 1, T, T))),
                   "mask is float32: expected booleans"),
    "swapped": (lambda: Softmax().init_state(*ARGS, 9), "size is .*expected a number"),
    "swapped_snap": (lambda: SnapKV().init_state(*ARGS, 9), "size is .*init_state"),
    "size": (lambda: Softmax().init_state(2.5, *ARGS), "size is 2.5: expected"),
    "no_state": (lambda: Softmax().step(None, *ARGS), "NoneType: expected a Cache"),
    "heads": (lambda: layer(heads=0), "heads=0: expected 1 or more"),
    "kv_heads": (lambda: layer(kv_heads=0), "kv_heads=0: expected 1 or more"),
    "sinks": (lambda: layer(Based(), sinks=True), "Based takes no sink"),
    "layer_class": (lambda: layer(Softmax), "expected an attention, as Softmax"),
    "layer_of_x": (lambda: layer(FNet()), "layer of its own: expected an attention"),
    "layer_none": (lambda: layer(None), "expected an attention, as Softmax"),
    "ids": (lambda: layer(x=jnp.zeros((B, T, 16), jnp.int32)), "x is int32: expected"),
    "list": (lambda: layer(x=[1.0]), r"x is a list: expected an array \[B,T,E\]"),
    "float64": (lambda: layer(dtype=jnp.float64), "without jax_enable_x64"),
    "pos": (lambda: layer(call={"pos": jnp.zeros((B, T + 1), int)}), "pos of x has"),
    "pos_float": (lambda: layer(call={"pos": jnp.zeros((B, T))}), "expected integers"),
    "rope": (lambda: RoPE(scaling="llama3", fast=1.0), "expected fast above slow"),
    "theta": (lambda: RoPE(theta=0.0), "theta=0.0"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_the_message_says_what_to_do(name):
    call, message = MISTAKES[name]
    with pytest.raises(ValueError, match=message):
        call()


def test_what_is_legal_but_does_nothing_is_warned_of():
    with pytest.warns(UserWarning, match="without an axis exchanges nothing"):
        jax.eval_shape(Softmax(exchange="ring"), *ARGS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        jax.eval_shape(Softmax(mask=Full()), *ARGS)
        # a piece of a stream may have fewer tokens than there are heads
        state = Softmax().init_state(T, *ARGS)
        jax.eval_shape(Softmax().step, state, *(a[:, :2] for a in inputs()))
