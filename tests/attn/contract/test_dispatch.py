"""Which implementation runs, and when no kernel does."""

import functools

import jax
import numpy as np
import pytest

from attn.aaren import Aaren
from attn.delta import Delta
from attn.gla import GLA
from attn.layers import MultiHead
from attn.rat import RAT
from attn.softmax import Softmax

LEARNED = [Delta(gated=True, implementation="pallas"), GLA(implementation="pallas"),
           RAT(implementation="pallas"), Aaren(implementation="pallas")]


def arrays():
    q = jax.random.normal(jax.random.key(0), (1, 4, 2, 16))
    return (q, q, q), {"x": q.reshape(1, 4, -1)}


@pytest.mark.parametrize("module", LEARNED, ids=lambda m: type(m).__name__)
def test_no_parameter_is_made_by_running_a_kernel(module):
    args, named = arrays()
    init = functools.partial(module.init, jax.random.key(1))
    assert "pallas_call" not in str(jax.make_jaxpr(init)(*args, **named))
    # nor where arrays are known while a program is traced, in which none could run
    with jax.ensure_compile_time_eval():
        params = jax.jit(init)(*args, **named)
    assert "pallas_call" in str(jax.make_jaxpr(module.apply)(params, *args, **named))
    shapes = lambda tree: jax.tree.map(np.shape, tree)
    plain = module.clone(implementation=None, parent=None)
    assert shapes(params) == shapes(jax.eval_shape(
        plain.init, jax.random.key(1), *args, **named))


def test_nor_are_those_of_the_layers_around_an_attention():
    layer = MultiHead(Softmax(implementation="pallas"), heads=2)
    x = jax.random.normal(jax.random.key(0), (1, 4, 16))
    init = functools.partial(layer.init, jax.random.key(1))
    assert "pallas_call" not in str(jax.make_jaxpr(init)(x))
    assert "pallas_call" in str(jax.make_jaxpr(layer.apply)(init(x), x))
