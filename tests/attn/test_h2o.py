"""H2O: fields, and the authors' simulation of it in a map of weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn.h2o import H2O, simulated


def test_the_simulation_loses_a_key_for_good():
    p = jax.nn.softmax(jax.random.normal(jax.random.key(0), (1, 2, 16, 16)))
    mask = np.asarray(simulated(p, 4))[0, 0]
    assert (mask.sum(1) == 4).all() and mask[np.arange(4, 16), np.arange(4, 16)].all()
    for j in range(16):
        seen = mask[max(j, 3):, j]
        assert (np.diff(seen.astype(int)) <= 0).all(), j
    near = np.asarray(simulated(p, 4, 2))[0, 0]
    assert near[10, 8:11].all() and not near[10, 11:].any()
    assert simulated(p[:, :, :3, :3], 4).all()


def test_heavy_hitters_survive_and_a_window_loses_them():
    """A key that every query looks at stays, however old it is."""
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(1, 40, 1, 8)) * 0.1, jnp.float32)
               for _ in range(3))
    q, k, v = q.at[..., 0].add(4.0), k.at[0, 3, 0, 0].set(4.0), v.at[0, 3].set(9.0)
    policy = H2O(heavy=2, recent=4)
    state, _ = policy.step(policy.init_state(60, q, k, v), q, k, v)
    assert 3 in state.cache.pos[0, :, 0].tolist()
    _, o = policy.step(state, q[:, -1:], k[:, -1:], v[:, -1:])
    assert (np.asarray(o) > 5).all()


@pytest.mark.parametrize("fields", [{"heavy": -1}, {"recent": 0}])
def test_wrong_fields(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        H2O(**fields)
