"""Convolution by products is XLA's, with its gradients."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import convolution
from models.convolution import Conv, convolved


def both(size, conv, **options):
    """(y, gradients by parameters and x) of a layer on x [2,*size,3]."""
    x = jax.random.normal(jax.random.key(0), (2, *size, 3))
    layer = conv(5, **options)
    params = layer.init(jax.random.key(1), x)

    def product(params, x):
        y = layer.apply(params, x)
        return (y * jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape)).sum()

    return layer.apply(params, x), jax.jit(jax.grad(product, (0, 1)))(params, x)


@pytest.mark.parametrize("size, options", [
    ((6, 7), {"kernel_size": (3, 3)}),
    ((7, 6), {"kernel_size": (3, 2), "strides": (2, 3), "padding": "VALID"}),
    ((8, 8), {"kernel_size": (3, 3), "strides": (2, 2)}),
    ((5, 4), {"kernel_size": (3, 3), "padding": "CIRCULAR"}),
    ((5, 4), {"kernel_size": (1, 1), "padding": ((1, 0), (0, 2))}),
    ((1, 1), {"kernel_size": (3, 3)}),
    ((9,), {"kernel_size": (4,), "strides": (3,)}),
    ((3, 4, 5), {"kernel_size": (2, 2, 2)}),
    ((6, 6), {"kernel_size": (3, 3), "kernel_dilation": 2}),
    ((6, 6), {"kernel_size": (3, 3), "input_dilation": (2, 1),
              "padding": ((0, 0), (1, 1))}),
])
def test_it_is_the_convolution(size, options):
    chex.assert_trees_all_close(both(size, Conv, **options),
                                both(size, nn.Conv, **options), rtol=2e-5, atol=2e-5)


def test_groups_are_those_of_xla():
    x = jax.random.normal(jax.random.key(0), (1, 4, 4, 6))
    layers = [conv(4, (3, 3), feature_group_count=2) for conv in (Conv, nn.Conv)]
    params = layers[0].init(jax.random.key(1), x)
    chex.assert_trees_all_close(*(one.apply(params, x) for one in layers))


def test_low_precision_and_other_hardware(monkeypatch):
    x = jax.random.normal(jax.random.key(0), (1, 5, 5, 4), jnp.bfloat16)
    kernel = jax.random.normal(jax.random.key(1), (3, 3, 4, 8), jnp.bfloat16)
    letters = {"dimension_numbers": nn.linear._conv_dimension_numbers(x.shape)}
    run = lambda: convolved(x, kernel, (1, 1), "SAME", **letters)
    found = run()
    assert found.dtype == jnp.bfloat16
    monkeypatch.setattr(convolution, "platform", lambda: "gpu")
    want = np.asarray(run(), np.float32)
    np.testing.assert_allclose(np.asarray(found, np.float32), want, rtol=2e-2,
                               atol=2e-2 * np.abs(want).max())
    assert "conv_general_dilated" in str(jax.make_jaxpr(run)())
