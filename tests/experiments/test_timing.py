"""What is timed: streams that repeat themselves, attentions that learn something, peers
that may refuse, the flops, and where linear attention gets ahead."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn.gla import GLA
from attn.lightning import Lightning, slopes
from attn.masks import Causal, Window
from attn.rat import RAT
from attn.recurrent.delta_rule import recurrence as delta_rule
from attn.recurrent.linear import recurrence
from attn.softmax import Softmax
from experiments import speed
from experiments.measure import peers, timing
from experiments.measure.breakeven import break_even, crossing, table

SIZES = {"batch": 1, "t": 12, "heads": 4, "kv_heads": 2, "d": 8, "v": 8,
         "dtype": jnp.float32}


@pytest.mark.parametrize("mask", (Causal(), Causal() & Window(3)))
def test_a_decoding_step_is_the_last_token_each_time(mask):
    attention = Softmax(mask=mask)
    x = timing.inputs(**SIZES)
    call = timing.prepared(attention, x.last, "decode")
    first, again = call(), call()
    np.testing.assert_array_equal(first, again)
    want = attention(jnp.broadcast_to(x.q[:, -1:], x.q.shape), x.k, x.v)[:, -1:]
    np.testing.assert_allclose(first, want, atol=1e-5)
    assert call.moved > 0


def test_a_recurrent_memory_is_timed_too():
    x = timing.inputs(**SIZES | {"kv_heads": 4})
    call = timing.prepared(Lightning(), x.last, "decode")
    assert call().shape == call().shape == (1, 1, 4, 8)


LEARNED = (GLA(), RAT(chunk=4))


@pytest.mark.parametrize("attention", LEARNED, ids=lambda a: type(a).__name__)
def test_what_learns_is_bound_to_parameters_and_tokens(attention):
    x = timing.inputs(**SIZES | {"kv_heads": 4})
    f, more = timing.bound(attention, x)
    tokens, params = more
    assert tokens.shape == (1, 12, 4 * 8) and jax.tree.leaves(params)
    o = timing.prepared(attention, x, "forward")()
    np.testing.assert_allclose(o, f(*x[:3], *more), atol=1e-5)
    grads = timing.prepared(attention, x, "both")()
    assert len(grads) == 5
    assert jax.tree.structure(grads[4]) == jax.tree.structure(params)
    assert any(jnp.abs(g).max() > 0 for g in jax.tree.leaves(grads[4]))


@pytest.mark.parametrize("attention", LEARNED, ids=lambda a: type(a).__name__)
def test_what_learns_is_streamed(attention):
    x = timing.inputs(**SIZES | {"kv_heads": 4})
    call = timing.prepared(attention, x.last, "decode")
    assert call().shape == (1, 1, 4, 8) and jnp.isfinite(call()).all()
    assert call.moved > 0


def test_what_learns_is_timed_beside_the_rest():
    config_ = speed.dataclasses.replace(
        speed.TINY, attentions=(GLA(), Softmax()), lengths=(16,))
    rows = speed.measure(config_, 16, "both", (1e9, 1e9), {})
    kinds = {row["name"]: row["exact"] for row in rows}
    assert kinds["GLA()"] is False and kinds["Softmax()"] and kinds[peers.PEER]


def test_lines_cross_between_lengths():
    assert crossing({512: 0.5, 1024: 1.0}) == "< 512"
    assert crossing({512: -0.5, 1024: -0.1}) == "> 1024"
    assert crossing({256: -1.0, 1024: 1.0}) == 512
    assert crossing({1024: 3.0, 256: -1.0}) == round(256 * 4**0.25)
    # ahead, behind and ahead again: the length from which on it stays ahead
    assert crossing({64: 1.0, 256: -1.0, 1024: 1.0}) == 512
    assert crossing({64: 1.0}) == "< 64" and crossing({64: 0.0}) == "> 64"


def test_break_even_is_against_the_best_exact_candidate():
    of = lambda t, name, ms, exact: {
        "length": t, "pass": "forward", "name": name, "ms": ms, "exact": exact}
    rows = [of(256, "slow", 9, True), of(256, "fast", 1, True), of(256, "state", 2, 0),
            of(1024, "slow", 99, True), of(1024, "fast", 16, True),
            of(1024, "state", 8, False)]
    found = break_even(rows)
    assert found == [{"pass": "forward", "name": "state", "length": 512}]
    assert type(found[0]["length"]) is int
    assert table(found).row_count == 1
    assert break_even([row for row in rows if not row["exact"]]) == []


def test_ejkernel_where_it_is_installed():
    pytest.importorskip("ejkernel")
    x = timing.inputs(**SIZES | {"kv_heads": 4})
    made = {name: make(x)() for name, make in peers.linear_peers("forward").items()}
    q, k, v = x[:3]
    decay = jnp.asarray(-slopes(4), jnp.float32)
    own = recurrence(q, k, v, decay, scale=8**-0.5)[1]
    np.testing.assert_allclose(made["ejkernel decay"], own, atol=1e-4)
    q, k = (a / jnp.linalg.norm(a, axis=-1, keepdims=True) for a in (q, k))
    own = delta_rule(q, k, v, *peers.gates(x), scale=8**-0.5)[1]
    np.testing.assert_allclose(made["ejkernel gated delta"], own, atol=1e-4)
    both = peers.linear_peers("both")["ejkernel gated delta"]
    assert both(x)()[0].shape == q.shape
    assert peers.linear_peers("decode") == {}


def test_flops_are_those_of_the_field():
    x = timing.inputs(**SIZES)
    full = 2 * 4 * 12 * 12 * (8 + 8)
    assert timing.flops(x, "forward") == full / 2
    assert timing.flops(x, "both") == full / 2 * 3.5
    assert timing.flops(x.last, "decode") == full / 12


def test_who_does_all_the_work():
    assert timing.exact(None) and timing.exact(Softmax())
    assert not timing.exact(Softmax(mask=Causal() & Window(3)))
    assert not timing.exact(Lightning())


def test_a_peer_that_refuses_is_named_and_left_out(monkeypatch):
    def some(which):
        def refuse(x):
            raise RuntimeError("no tiles for this\nand more")

        return {peers.PEER: lambda x: lambda: x.q, "other": refuse}

    monkeypatch.setattr(speed, "peers", some)
    monkeypatch.setattr(speed, "linear_peers", lambda which: {})
    absent = {}
    rows = speed.measure(speed.TINY, 16, "forward", (1e9, 1e9), absent)
    assert absent == {"other": "no tiles for this"}
    assert [r["name"] for r in rows] == [peers.PEER, "Softmax()", "Lightning()"]
    assert "share" in rows[1] and "share" not in rows[2]


def test_limits_are_rates():
    matmul, copy = timing.limits(jnp.float32)
    assert matmul > 1e8 and copy > 1e7


@pytest.mark.parametrize("which", timing.PASSES)
def test_torch_where_it_is_installed(which):
    pytest.importorskip("torch")
    x = timing.inputs(**SIZES)
    call = peers.peers(which)["torch SDPA"](x.last if which == "decode" else x)
    assert call() is None and jax.default_backend() == "cpu"


def test_no_pass_is_refused():
    with pytest.raises(ValueError, match=r"passes=\(\): expected one or more of"):
        dataclasses.replace(speed.TINY, passes=())
