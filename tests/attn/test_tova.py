"""TOVA: no token is protected, all heads hold the same ones."""

import jax.numpy as jnp
import numpy as np
import pytest

from attn.tova import TOVA


def test_the_last_token_may_go():
    q = jnp.ones((1, 6, 2, 4))
    k = jnp.ones((1, 6, 1, 4)).at[:, 5].set(-9.0)
    policy = TOVA(capacity=3)
    state, _ = policy.step(policy.init_state(9, q, k, k), q, k, k)
    assert state.cache.pos.shape == (1, 4, 1)
    # of equal weights the earlier stay, and the last, which nobody looks at, goes
    assert np.asarray(state.cache.pos[0, :, 0]).tolist() == [0, 1, 2, -1]


def test_wrong_fields():
    with pytest.raises(ValueError, match="capacity"):
        TOVA(capacity=0)
