"""CMR: nothing at first, nothing of the present segment, what is kept, gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn.cmr import CMR, Buffer

B, T, E, M = 2, 6, 16, 4
MODULE = CMR(features=E, layers=2, entries=M, width=8)


def tokens(seed=0):
    return jax.random.normal(jax.random.key(seed), (B, T, E))


def states(seed=0):
    return jax.random.normal(jax.random.key(seed), (B, 2, T, E))


def at(start):
    return jnp.broadcast_to(start + jnp.arange(T, dtype=jnp.int32)[None], (B, T))


@pytest.fixture(scope="module")
def params():
    h = tokens()
    made = jax.jit(MODULE.init)(jax.random.key(1), h, MODULE.init_state(h), at(0))
    leaves, form = jax.tree.flatten(made)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    return made, jax.tree.unflatten(form, [
        a + 0.3 * jax.random.normal(key, a.shape) for key, a in zip(keys, leaves)])


def captured(params, buffer, states, pos, segments=None):
    return jax.jit(lambda p, *a: MODULE.apply(p, *a, method="capture"))(
        params, buffer, states, pos, segments)


def test_an_untrained_memory_and_an_empty_one_change_nothing(params):
    h, (fresh, drawn) = tokens(), params
    full = captured(fresh, MODULE.init_state(h), states(), at(0))
    apply = jax.jit(MODULE.apply)
    assert (apply(fresh, h, full, at(T)) == h).all()
    assert (apply(drawn, h, MODULE.init_state(h), at(T)) == h).all()
    assert np.abs(apply(drawn, h, full, at(T)) - h).max() > 1e-3


def test_the_most_relevant_entries_stay_and_old_ones_fade(params):
    drawn = params[1]
    buffer = MODULE.init_state(tokens())
    pads = jnp.ones((B, T), jnp.int32).at[0, :2].set(0)
    everything, when = [], []
    for n in range(3):
        new = states(n)
        buffer = captured(drawn, buffer, new, at(n * T), pads)
        everything.append(np.asarray(new))
        when.append(np.arange(n * T, n * T + T))
    rate = np.log1p(np.exp(float(drawn["params"]["rate"])))
    w, b = (np.asarray(drawn["params"][n], np.float64) for n in ("w_rho", "b_rho"))
    x = np.concatenate(everything, 2).astype(np.float64)
    x = x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6)
    importance = -np.log1p(np.exp(-(x @ w + b))) + rate * np.concatenate(when)
    for row in range(B):
        real = np.concatenate([np.asarray(pads[row]) > 0] * 3)
        for layer in range(2):
            own = np.where(real, importance[row, layer], -np.inf)
            # what is out of the buffer once stays out: with one rate that is the same
            want = np.sort(np.argsort(-own)[:M])
            assert buffer.pos[row, layer].tolist() == want.tolist()


def test_the_gate_of_relevance_is_trained_by_reading(params):
    drawn = params[1]
    buffer = captured(drawn, MODULE.init_state(tokens()), states(), at(0))

    @jax.jit
    def grads(params, h, buffer):
        return jax.grad(lambda p, h, b: (MODULE.apply(p, h, b, at(T)) ** 2).sum(),
                        (0, 1))(params, h, buffer)

    own, dh = grads(drawn, tokens(1), buffer)
    for name in ("Wq", "Wk", "Wv", "Wl", "Wo", "Wg", "bg", "w_rho", "rate"):
        assert np.abs(own["params"][name]).max() > 0, name
    assert np.isfinite(dh).all()
    # nothing flows into the segment that captured, unless that is asked for
    for through in (False, True):
        module = MODULE.clone(through=through)

        def loss(s):
            held = module.apply(drawn, MODULE.init_state(tokens()), s, at(0),
                                method="capture")
            return (module.apply(drawn, tokens(1), held, at(T)) ** 2).sum()

        flows = np.abs(jax.jit(jax.grad(loss))(states())).max() > 0
        assert flows == through


def test_the_reconstruction_loss_is_of_what_is_there(params):
    drawn = params[1]
    empty = MODULE.init_state(tokens())
    f = jax.jit(lambda b: MODULE.apply(drawn, b, method="reconstruction_loss"))
    assert f(empty) == 0
    assert f(captured(drawn, empty, states(), at(0))) > 0


def test_wrong_calls(params):
    h = tokens()
    small = Buffer(*(a[:, :1] for a in MODULE.init_state(h)))
    with pytest.raises(ValueError, match="the buffer holds states .*: expected"):
        MODULE.apply(params[0], h, small, at(0))
    with pytest.raises(ValueError, match="entries"):
        CMR(entries=0).init(jax.random.key(0), h, MODULE.init_state(h), at(0))
