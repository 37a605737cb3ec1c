"""What is timed: streams that repeat themselves, peers that may refuse, the flops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn.lightning import Lightning
from attn.masks import Causal, Window
from attn.softmax import Softmax
from experiments import contenders, speed

SIZES = {"batch": 1, "t": 12, "heads": 4, "kv_heads": 2, "d": 8, "v": 8,
         "dtype": jnp.float32}


@pytest.mark.parametrize("mask", (Causal(), Causal() & Window(3)))
def test_a_decoding_step_is_the_last_token_each_time(mask):
    attention = Softmax(mask=mask)
    x = contenders.inputs(**SIZES)
    call = contenders.prepared(attention, x.last, "decode")
    first, again = call(), call()
    np.testing.assert_array_equal(first, again)
    want = attention(jnp.broadcast_to(x.q[:, -1:], x.q.shape), x.k, x.v)[:, -1:]
    np.testing.assert_allclose(first, want, atol=1e-5)
    assert call.moved > 0


def test_a_recurrent_memory_is_timed_too():
    x = contenders.inputs(**SIZES | {"kv_heads": 4})
    call = contenders.prepared(Lightning(), x.last, "decode")
    assert call().shape == call().shape == (1, 1, 4, 8)


def test_flops_are_those_of_the_field():
    x = contenders.inputs(**SIZES)
    full = 2 * 4 * 12 * 12 * (8 + 8)
    assert contenders.flops(x, "forward") == full / 2
    assert contenders.flops(x, "both") == full / 2 * 3.5
    assert contenders.flops(x.last, "decode") == full / 12


def test_who_does_all_the_work():
    assert contenders.exact(None) and contenders.exact(Softmax())
    assert not contenders.exact(Softmax(mask=Causal() & Window(3)))
    assert not contenders.exact(Lightning())


def test_a_peer_that_refuses_is_named_and_left_out(monkeypatch):
    def peers(which):
        def refuse(x):
            raise RuntimeError("no tiles for this\nand more")

        return {contenders.PEER: lambda x: lambda: x.q, "other": refuse}

    monkeypatch.setattr(speed, "peers", peers)
    absent = {}
    rows = speed.measure(speed.TINY, 16, "forward", (1e9, 1e9), absent)
    assert absent == {"other": "no tiles for this"}
    assert [r["name"] for r in rows] == [contenders.PEER, "Softmax()", "Lightning()"]
    assert "share" in rows[1] and "share" not in rows[2]


def test_limits_are_rates():
    matmul, copy = contenders.limits(jnp.float32)
    assert matmul > 1e8 and copy > 1e7


@pytest.mark.parametrize("which", contenders.PASSES)
def test_torch_where_it_is_installed(which):
    pytest.importorskip("torch")
    x = contenders.inputs(**SIZES)
    call = contenders.peers(which)["torch SDPA"](x.last if which == "decode" else x)
    assert call() is None and jax.default_backend() == "cpu"
