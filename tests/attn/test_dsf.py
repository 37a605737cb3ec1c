"""DSF: systems are the mechanisms, however they are written."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn import dsf
from attn.dsf import DSF
from experiments import systems

SIZES = systems.Config(tokens=9, width=3, values=2, quiet=True)
NAMES = ("softmax", "linear", "lightning", "retnet", "based", "gla", "gated delta",
         "flow", "lightnet", "rat", "aaren")


@functools.cache
def found():
    """How far the mechanisms are from their systems, in one program."""
    return jax.device_get(jax.jit(systems.phi)(*systems.numbers(SIZES)))


@pytest.mark.parametrize("name", NAMES)
def test_a_mechanism_is_its_system(name):
    assert found()[f"apart_{name}"] < 2e-6


def test_one_operator_has_many_states():
    with jax.enable_x64(True):
        q, k, v, gate = systems.numbers(SIZES)
        system = dsf.decayed(q, k, jnp.log(gate), 2)
        other = system.rescaled(1 + gate[:, 0])
        assert dsf.distance(system, other) < 1e-12
        assert dsf.distance(system, dsf.decayed(q, 1.01 * k, jnp.log(gate), 2)) > 5e-3
        same = system.dense.scan(v[:, :2])
        np.testing.assert_allclose(same, other.scan(v[:, :2], parallel=True), 1e-9)


def test_equality_needs_the_normaliser_in_gain_and_decay():
    with jax.enable_x64(True):
        q, k, v, gate = systems.numbers(SIZES)
        found = jax.jit(systems.conditions, static_argnums=3)(q, k, gate, 2)
    assert found["E1_equal"] < 1e-10 < 1e-3 < found["E1_gain_off_by_1_percent"]
    assert found["E2_allowed"] < 1e-10 < 1e-2 < found["E2_by_token"]


def test_softmax_is_the_limit_of_even_orders():
    with jax.enable_x64(True):
        q, k, v, _ = systems.numbers(SIZES)
        found = jax.jit(systems.expansion, static_argnums=3)(q, k, v, 6)
    for more in ("", "_half"):
        errors = [found[f"taylor{p}{more}"] for p in (2, 4, 6)]
        assert errors == sorted(errors, reverse=True)


def test_wrong_shapes_say_what_was_expected():
    ones = lambda *shape: jnp.ones(shape)
    for args, message in (
        ((ones(3, 2, 3), ones(3, 2, 1), ones(3, 1, 2)), "A has shape"),
        ((ones(3, 2), ones(3, 2, 1), ones(3, 1, 4)), "C has shape"),
        ((ones(3, 2), ones(3, 2, 1), ones(3, 1, 2), ones(3, 2, 2)), "D has shape"),
    ):
        with pytest.raises(ValueError, match=message):
            DSF(*args)
    with pytest.raises(ValueError, match="T=600"):
        DSF(ones(600, 1), ones(600, 1, 1), ones(600, 1, 1)).transfer()
