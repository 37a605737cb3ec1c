"""RetNet against its definition in float64."""

import jax.numpy as jnp
import numpy as np
import pytest

from attn.retnet import RetNet
from tests.laws import close


def test_it_is_the_definition():
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(2, 50, 4, n)) for n in (8, 8, 12))
    at = np.arange(50)
    apart = at[:, None] - at
    gamma = 1 - 2.0 ** (-5 - np.arange(4))
    decay = np.where(apart >= 0, gamma[:, None, None] ** np.maximum(apart, 0), 0)
    pairs = np.einsum("bthd,bshd->bhts", q, k) * 8**-0.5 * decay
    want = np.einsum("bhts,bshv->bthv", pairs, v)
    close(RetNet(chunk=16)(*(jnp.asarray(a, jnp.float32) for a in (q, k, v))), want)


def test_wrong_settings_say_what_was_expected():
    for wrong, message in (({"first": 0}, "first=0"), ({"chunk": 0}, "chunk=0")):
        with pytest.raises(ValueError, match=message):
            RetNet(**wrong)
