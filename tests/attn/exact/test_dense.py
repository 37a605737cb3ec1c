"""The dense form is the function, and has derivatives of every kind."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn.flow import Flow
from attn.masks import Causal, Full, Window
from attn.positions import ALiBi
from attn.snapkv import SnapKV
from attn.softmax import Softmax
from tests.laws import B, H, SEGMENTS, T, close, gradients, inputs

BIAS = jax.random.normal(jax.random.key(1), (1, H, T, T))
CASES = [
    ({}, {}),
    ({"softcap": 2.0, "score": ALiBi(H)}, {"segments": jnp.asarray(SEGMENTS)}),
    ({"mask": Full()}, {"bias": BIAS, "sink": jnp.asarray([0.0, 1.0, -jnp.inf, 2.0])}),
    ({"dropout": 0.4, "mask": Causal() & Window(5)}, {"key": jax.random.key(3)}),
]


@pytest.mark.parametrize("fields, given", CASES)
def test_it_is_the_function(fields, given):
    run = lambda how: lambda q, k, v: Softmax(**fields, implementation=how)(
        q, k, v, **given)
    args = inputs()
    close(jax.jit(run("dense"))(*args), jax.jit(run("xla"))(*args))
    for a, b in zip(gradients(run("dense"), *args), gradients(run("xla"), *args)):
        close(a, b, "gradient")


def test_forward_mode():
    """jvp and linearize of the dense form agree with the gradient; of the chunked form
    they are refused in a sentence that names it."""
    args = inputs(t=4)
    tangents = tuple(jnp.cos(a) for a in args)
    dense = jax.jit(Softmax(implementation="dense"))
    o, do = jax.jvp(dense, args, tangents)
    w = jnp.sin(o)
    _, pull = jax.vjp(jax.jit(Softmax()), *args)
    back = sum((g * t).sum() for g, t in zip(pull(w), tangents))
    np.testing.assert_allclose((do * w).sum(), back, rtol=1e-5)
    close(jax.linearize(dense, *args)[1](*tangents), do)
    twice = jax.jvp(jax.grad(lambda q: (dense(q, *args[1:])**2).sum()), args[:1],
                    tangents[:1])[1]
    assert np.isfinite(twice).all() and np.abs(twice).max() > 0
    for attention in (Softmax(), Softmax(mask=Causal() & Window(2)), SnapKV()):
        with pytest.raises(NotImplementedError, match="implementation='dense'"):
            jax.jvp(attention, args, tangents)


def test_what_has_no_matrix_refuses_it():
    with pytest.raises(NotImplementedError, match="no such form"):
        Flow(implementation="dense")(*inputs(t=4))


def test_a_boolean_mask_is_a_bias():
    q, k, v = inputs()
    seen = jax.random.bernoulli(jax.random.key(2), 0.5, (B, 1, T, T))
    run = jax.jit(lambda m, b: Softmax(mask=Full())(q, k, v, mask=m, bias=b))
    bias = jnp.where(seen, BIAS, -jnp.inf)
    close(run(seen, BIAS), Softmax(mask=Full())(q, k, v, bias=bias))
