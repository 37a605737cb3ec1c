"""Networks of positional and of standard attention: depth, shorter lists, places."""

import jax
import jax.numpy as jnp
import pytest

from models.positional import depth_for, positional, standard
from tests import compiled


@pytest.mark.parametrize("n, layers", [(1, 1), (2, 2), (7, 3), (8, 4), (15, 4)])
def test_depth(n, layers):
    assert depth_for(n) == layers == len(positional(n).attention)


def test_shorter_lists_keep_their_scratch_token():
    model = positional(8, width=8, hidden=8)
    params = compiled.init(model, jax.random.key(0), jnp.ones((1, 9, 1)))
    assert compiled.apply(model, params, jnp.ones((2, 5, 1))).shape == (2, 5, 1)


def test_the_standard_network_is_told_positions():
    model = standard(4, width=8, hidden=8)
    x = jnp.ones((1, 5, 1))
    y = compiled.apply(model, compiled.init(model, jax.random.key(0), x), x)
    assert abs(y[0, 0] - y[0, 1]).max() > 1e-6
    with pytest.raises(ValueError, match="x has 4 tokens: expected onehot=5"):
        model.init(jax.random.key(0), x[:, :4])
