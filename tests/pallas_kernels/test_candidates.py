"""Candidates are the function, interpreted: what no device has judged is right."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn.masks import Causal
from pallas_kernels.candidates import CANDIDATES
from pallas_kernels.decode.api import decode
from pallas_kernels.delta.api import delta
from pallas_kernels.flash.api import flash
from pallas_kernels.linear.api import linear
from tests.on_device import INTERPRET
from tests.oracles import linear as oracle
from tests.oracles.delta_rule import H, inputs as delta_inputs
from tests.pallas_kernels.test_flash_mosaic import inputs


def gradients(f, args, *cotangents):
    """Results and gradients, compiled."""
    def both(*args):
        out, back = jax.vjp(f, *args)
        return out, back(cotangents if len(cotangents) > 1 else cotangents[0])

    return jax.jit(both)(*args)


def test_each_is_listed_once_and_tried_by_the_command():
    from experiments.measure.device.candidates import TRIALS

    assert len({c.name for c in CANDIDATES}) == len(CANDIDATES)
    assert {c.name for c in CANDIDATES} == {*TRIALS}


@pytest.mark.parametrize("name", ["early_dv", "one_loop"])
def test_the_backward_pass_on_hopper(name):
    """To the bit: the same products and sums."""
    a = inputs(t=70, s=70)

    def run(variant):
        f = lambda *a: flash(*a, mask=Causal(), backend="mosaic", tile=(64, 128),
                             variant=variant, interpret=INTERPRET)[0]
        return gradients(f, a.values(), a["v"])

    jax.tree.map(np.testing.assert_array_equal, run((name,)), run(()))


def test_heads_that_share_keys_are_added_up_by_one_program():
    *args, d_o, d_state = delta_inputs(150, "token", heads=(2, 2, H))

    def run(variant):
        f = lambda *a: delta(*a[:5], state=a[5], backend="triton", tile=(16, 4, 1),
                             variant=variant, interpret=INTERPRET)
        return gradients(f, args, d_state, d_o)

    for a, b in zip(*map(jax.tree.leaves, (run(("shared_keys",)), run(())))):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@functools.cache
def channels(variant, dtype, shift, packed):
    """Linear attention whose channels decay by the sigmoid of a normal plus `shift`."""
    q, k, v, *_, do, _ = oracle.inputs(150, "channel")
    g = jax.nn.log_sigmoid(jax.random.normal(jax.random.key(0), q.shape) + shift)
    segment = jnp.asarray(np.where(np.arange(150) < 130, 1, 0) + (
        np.arange(150) // 70 == 1) * (np.arange(150) < 130), jnp.int32)[None]
    segment = jnp.broadcast_to(segment, q.shape[:2]) if packed else None
    f = lambda *a: linear(
        *a, segment=segment, dtype=dtype, backend="triton", variant=variant,
        tile=(64, 16, 4, 1, 16, 4, 1, 16, 4, 1), interpret=INTERPRET)[1]
    low = [jnp.asarray(a).astype(dtype) for a in (q, k, v)]
    return gradients(f, (*low, g), jnp.asarray(do).astype(dtype))


@pytest.mark.parametrize("shift, packed", [(3.0, True), (-9.0, False), (-200.0, False)])
def test_pairs_of_a_chunk_are_made_apart(shift, packed):
    """Weak decay, with segments; near the bound of one product; and far beyond it. In
    float32 to the bit, in bfloat16 as near to that as the levels are."""
    exact = channels(("pairs",), jnp.float32, shift, packed)
    jax.tree.map(np.testing.assert_array_equal, exact,
                 channels((), jnp.float32, shift, packed))
    ours, levels = (channels(v, jnp.bfloat16, shift, packed) for v in (("pairs",), ()))
    for a, b, c in zip(*map(jax.tree.leaves, (ours, levels, exact))):
        a, b, c = (np.asarray(x, np.float64) for x in (a, b, c))
        assert np.isfinite(a).all()
        assert np.linalg.norm(a - c) <= 1.1 * np.linalg.norm(b - c) + 1e-30


def test_more_programs_and_stages_of_a_decoding_step(monkeypatch):
    monkeypatch.setattr("pallas_kernels.tables.cores", lambda: 2)
    q, k, v = (jax.random.normal(jax.random.key(n), shape) for n, shape in enumerate(
        ((2, 1, 4, 8), (2, 100, 2, 8), (2, 100, 2, 8))))

    @functools.partial(jax.jit, static_argnums=0)
    def run(variant):
        return decode(q, k, v, backend="triton", tile=16, variant=variant,
                      interpret=INTERPRET)

    plain = run(())
    for name in ("four_programs", "six_programs", "two_stages", "three_stages"):
        for a, b in zip(run((name,)), plain):
            np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)
