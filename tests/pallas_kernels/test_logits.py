"""What a call of exact attention is told: places are arrays, all else is static."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from attn.masks import Causal
from pallas_kernels.logits import LogitSpec, Where


def test_arrays_of_a_place_are_traced_and_its_shift_is_not():
    where = Where(jnp.zeros((1, 3), jnp.int32), jnp.ones((1, 4), jnp.int32), shift=5)
    seen = []

    def f(where):
        seen.append(where.shift)
        return where.q_pos + where.shift

    assert (jax.jit(f)(where) == 5).all() and seen == [5]
    assert len(jax.tree.leaves(where)) == 2 and not jax.tree.leaves(Where())


@pytest.mark.parametrize("name, other", [
    ("q_pos", "kv_pos"), ("kv_pos", "q_pos"), ("q_segment", "kv_segment"),
    ("kv_segment", "q_segment"),
])
def test_both_sides_go_together(name, other):
    with pytest.raises(ValueError, match=f"{min(name, other, key=len)} and .*together"):
        Where(**{name: jnp.zeros((1, 3), jnp.int32)}).counted
    both = dict.fromkeys((name, other), jnp.zeros((1, 3), jnp.int32))
    assert Where(**both).counted == ("segment" in name)


def test_a_spec_is_static():
    spec = LogitSpec(Causal(), softcap=2.0)
    assert hash(spec) == hash(dataclasses.replace(spec)) and spec != LogitSpec(Causal())
