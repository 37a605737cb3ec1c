"""Based's hybrid language models: their layers, their size, and that they stream."""

import collections

import jax
import jax.numpy as jnp
import pytest

from models.based import BASED_1B, BASED_360M, hybrid, layers
from tests.compiled import apply, init
from tests.laws import close


@pytest.mark.parametrize("model,millions", [(BASED_360M, 360), (BASED_1B, 1386)])
def test_the_sizes(model, millions):
    tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), tokens)
    count = sum(a.size for a in jax.tree.leaves(shapes))
    assert abs(count / 1e6 / millions - 1) < 0.05, count


def test_most_layers_are_short_convolutions():
    kinds = collections.Counter(type(a).__name__ for a in BASED_360M.attention)
    assert kinds == {"BaseConv": 17, "Based": 5, "Softmax": 5}
    assert type(BASED_360M.attention[1]).__name__ == "Based"


def test_a_small_one_streams():
    model = hybrid(32, 23, heads=2, vocab=11)
    model = model.clone(attention=layers(4, (1,), (2,), window=3, feature_dim=4))
    tokens = jnp.arange(12)[None] % 11
    params = init(model, jax.random.key(0), tokens)
    want = apply(model, params, tokens)
    state, first = apply(model, params, tokens[:, :7], model.init_state(12, tokens))
    _, rest = apply(model, params, tokens[:, 7:], state)
    close(jnp.concatenate([first, rest], 1), want)


def test_wrong_layers_say_what_was_expected():
    with pytest.raises(ValueError, match=r"layers \[21, 22\]: expected 0 to 19"):
        layers(20)
    with pytest.raises(ValueError, match="not both"):
        layers(9, (1,), (1,))
