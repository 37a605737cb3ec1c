"""Miras: the classical layers are settings of it, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn.delta import Delta
from attn.gla import GLA
from attn.miras import Memora, Miras, Moneta, Yaad
from attn.retnet import RetNet
from tests.compiled import apply, attend, init
from tests.laws import B, H, K, close

D, T = 8, 9
PLAIN = {"memory": "linear", "initial": "zero", "scale": D ** -0.5}
SUMS = {**PLAIN, "bias": "dot", "steps": "one", "short": False}


def tokens(t=T):
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = (B, t, H, D), (B, t, K, D), (B, t, K, D), (B, t, 20)
    q, k, v, x = (jax.random.normal(key, shape) for key, shape in zip(keys, shapes))
    return (q, k, v), x


@pytest.mark.parametrize("chunk", [1, 4])
def test_retnet_is_a_setting(chunk):
    qkv, x = tokens()
    module = Miras(**SUMS, forget="retnet", chunk=chunk)
    close(apply(module, {}, *qkv, x=x), attend(RetNet(), *qkv))


@pytest.mark.parametrize("chunk", [1, 4])
def test_gla_is_a_setting(chunk):
    qkv, x = tokens()
    gla = GLA()
    params = init(gla, jax.random.key(1), *qkv, x=x)
    own = {f"forget_{n}": params["params"][f"gate_{n}"] for n in ("down", "up")}
    module = Miras(**SUMS, forget="channel", chunk=chunk)
    close(apply(module, {"params": own}, *qkv, x=x), apply(gla, params, *qkv, x=x))


@pytest.mark.parametrize("gated", [False, True])
def test_the_delta_rules_are_settings(gated):
    """Gated, the error is that of the memory after it has decayed."""
    qkv, x = tokens()
    delta = Delta(gated=gated)
    params = init(delta, jax.random.key(1), *qkv, x=x)
    zero = jnp.zeros(H)
    own = dict(params["params"])
    own["step_gate"] = own.pop("beta") | {"bias": zero}
    fields = {"retention": "none"}
    if gated:
        own["forget_gate"] = own.pop("decay") | {"bias": zero}
        fields = {"forget": "mamba2", "point": "decayed"}
    module = Miras(**PLAIN, **fields, chunk=1)
    have = apply(module, {"params": own}, *qkv, x=x)
    want = apply(delta, params, *qkv, x=x)
    close(have, want)
    if gated:
        other = apply(module.clone(point="previous"), {"params": own}, *qkv, x=x)
        assert np.abs(other - want).max() > 1e-4


def test_the_implicit_step_never_overshoots():
    """A step of any size at most answers the key: eta / (1 + eta |k|^2)."""
    (_, k, v), x = tokens(1)
    module = Miras(memory="linear", algorithm="implicit", retention="none", conv=0,
                   initial="zero", eta_max=1e6, chunk=1)
    params = init(module, jax.random.key(1), jnp.repeat(k, 2, 2), k, v, x=x)
    o = apply(module, params, jnp.repeat(k, 2, 2), k, v, x=x)
    close(o, jnp.repeat(jax.nn.silu(v), 2, 2) * (1 - 1e-6), "gradient")


def test_a_vector_for_a_memory():
    qkv, x = tokens()
    module = Miras(memory="vector", chunk=3, algorithm="momentum")
    params = init(module, jax.random.key(1), *qkv, x=x)
    assert params["params"]["w"].shape == (H, D)
    assert np.isfinite(apply(module, params, *qkv, x=x)).all()


def test_the_three_are_what_the_paper_names():
    assert (Moneta().bias, Moneta().p, Moneta().retention, Moneta().q) == (
        "lp", 3.0, "lq", 4.0)
    assert (Yaad().bias, Yaad().retention) == ("huber_switch", "decay")
    assert (Memora().bias, Memora().retention) == ("l2", "kl")
    assert {Moneta().memory, Yaad().memory, Memora().memory} == {"mlp2"}


@pytest.mark.parametrize("fields, said", [
    ({"memory": "mlp3"}, "memory='mlp3'"), ({"bias": "l1"}, "bias='l1'"),
    ({"read": "norm"}, "read='norm'"), ({"initial": "zero"}, "initial='zero'"),
    ({"point": "decayed", "retention": "kl"}, "point='decayed'"),
    ({"forget": "channel"}, "forget='channel'"), ({"p": 0.5}, "p=0.5"),
    ({"memory": "vector", "retention": "lq"}, "memory='vector' and retention='lq'"),
])
def test_wrong_fields_say_what_was_expected(fields, said):
    with pytest.raises(ValueError, match=f"{said}: expected"):
        Miras(**fields)


def test_a_vector_of_other_widths_is_refused():
    qkv, x = tokens()
    q, k, v = qkv
    with pytest.raises(ValueError, match="V=4, expected D=8"):
        jax.eval_shape(Miras(memory="vector").init, jax.random.key(0), q, k, v[..., :4],
                       x=x)
