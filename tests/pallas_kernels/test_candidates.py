"""Candidates are the function, interpreted: what no device has judged is right."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn.masks import Causal
from attn.recurrent.linear import naive
from pallas_kernels.candidates import CANDIDATES
from pallas_kernels.delta.api import delta
from pallas_kernels.linear.api import linear
from tests.on_device import INTERPRET
from tests.oracles import linear as oracle
from tests.oracles.delta_rule import H, inputs as delta_inputs
from tests.oracles.softmax import decode, flash
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


def channels(shift, packed):
    """What linear attention is given whose channels decay by the sigmoid of a normal
    plus `shift`: (q, k, v, g), segment and do."""
    q, k, v, *_, do, _ = oracle.inputs(150, "channel")
    g = jax.nn.log_sigmoid(jax.random.normal(jax.random.key(0), q.shape) + shift)
    at = np.arange(150)
    row = np.where(at < 130, 1 + (at // 70), 0)
    segment = np.broadcast_to(row, q.shape[:2]).astype(np.int32) if packed else None
    return (q, k, v, g), segment, do


def attended(variant, dtype, args, segment, do):
    """o and all gradients of the kernel."""
    f = lambda *a: linear(
        *a, segment=segment, dtype=dtype, backend="triton", variant=variant,
        tile=(64, 16, 4, 1, 16, 4, 1, 16, 4, 1), interpret=INTERPRET)[1]
    low = [jnp.asarray(a).astype(dtype) for a in args[:3]]
    return gradients(f, (*low, args[3]), jnp.asarray(do).astype(dtype))


@pytest.mark.parametrize("shift, packed", [(3.0, True), (-9.0, False), (-200.0, False)])
def test_pairs_of_a_chunk_are_made_apart(shift, packed):
    """Weak decay, with segments; near the bound of one product; and far beyond it."""
    args, segment, do = channels(shift, packed)
    low = [jnp.asarray(a).astype(jnp.bfloat16) for a in args[:3]]
    found = attended(("pairs",), jnp.bfloat16, args, segment, do)

    def loop(*a):
        empty = jnp.zeros((a[0].shape[0], a[0].shape[2], a[0].shape[3], a[2].shape[3]))
        return naive(*a, state=empty, segment=segment)[1]

    high = [a.astype(jnp.float32) for a in low]
    wanted = gradients(loop, (*high, args[3]),
                       jnp.asarray(do).astype(jnp.bfloat16).astype(jnp.float32))
    for a, b in zip(*map(jax.tree.leaves, (found, wanted))):
        a, b = (np.asarray(x, np.float64) for x in (a, b))
        assert np.isfinite(a).all()
        # a bfloat16 is rounded by 2^-9, 0.2%, in operands and in results
        assert np.linalg.norm(a - b) <= 5e-3 * np.linalg.norm(b) + 1e-30


def test_pairs_in_float32_are_the_same_bits():
    given = channels(-2.0, False)
    runs = (attended(v, jnp.float32, *given) for v in (("pairs",), ()))
    jax.tree.map(np.testing.assert_array_equal, *runs)


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
