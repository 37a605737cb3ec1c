"""The kernels of a linear memory against the loop in float64, interpreted."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn.contract import dispatch
from attn.recurrent.memory import Gates, Where, learn
from attn.recurrent.memory_axes import KL, Bias
from attn.recurrent.memory_chunk import Rule
from attn.recurrent.memory_kernel import numbers_of
from attn.recurrent.memory_nets import MLP
from pallas_kernels import Refused
from pallas_kernels.memory.api import memory
from tests.on_device import INTERPRET
from tests.oracles import memory as oracle
from tests.oracles.delta_rule import FORWARD, GRADIENT, close

B, H = 1, 2
BACKENDS = pytest.mark.parametrize("backend", ["tpu", "triton"])
GATES = "step", "log_keep", "log_momentum"


def inputs(t, d=8, v=12, kind="plain", seed=0):
    """Arguments of `oracle.linear`, and cotangents of W, S and o."""
    rng = np.random.default_rng(seed)
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
    k = normal(B, t, H, d)
    keep, run = (-rng.uniform(size=(B, t, H)) for _ in range(2))
    if kind == "strong":  # next to tokens that forget all, others that keep all
        keep, run = (np.where(a < -0.7, -90.0, np.where(a < -0.4, -30, a / 99))
                     for a in (keep, run))
    args = {"q": normal(B, t, H, d),
            "k": k / np.linalg.norm(k, axis=-1, keepdims=True), "v": normal(B, t, H, v),
            "step": rng.uniform(0.01, 0.1, (B, t, H)), "log_keep": keep,
            "log_momentum": run, "weights": normal(B, H, d, v),
            "momentum": normal(B, H, d, v)}
    args = {n: a.astype(np.float32) for n, a in args.items()}
    return args, (normal(B, H, d, v), normal(B, H, d, v), normal(B, t, H, v))


@functools.partial(jax.jit, static_argnums=(0, 1))
def results(backend, chunk, args, cotangents):
    """(W, S, o) and the gradients."""
    def f(args):
        gates = Gates(*(args[n] for n in GATES))
        return memory(*(args[n] for n in "qkv"), numbers_of(gates, chunk),
                      args["weights"], args["momentum"], factor=2.0, backend=backend,
                      interpret=INTERPRET)

    out, back = jax.vjp(f, args)
    return out, back(cotangents)[0]


CASES = {"plain": (150, 16, {}), "strong": (70, 32, {"kind": "strong"}),
         "wide": (40, 16, {"d": 40, "v": 72}), "one": (1, 16, {}),
         "long": (130, 64, {"d": 24}), "short": (21, 5, {})}


@BACKENDS
@pytest.mark.parametrize("name", CASES)
def test_the_kernel_is_the_loop(name, backend):
    t, chunk, options = CASES[name]
    args, cotangents = inputs(t, **options)
    want, grads = oracle.linear(args, chunk, 2.0, cotangents)
    have, back = results(backend, chunk, args, cotangents)
    for label, a, b in zip(("W", "S", "o"), have, want):
        close(a, b, FORWARD, label)
    for label, b in grads.items():
        close(back[label], b, GRADIENT, label)
    again = results(backend, chunk, args, cotangents)
    for a, b in zip(jax.tree.leaves((have, back)), jax.tree.leaves(again)):
        np.testing.assert_array_equal(a, b)


@BACKENDS
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_low_precision_is_as_good_as_its_inputs(dtype, backend):
    """Beside the loop with what was rounded: as far off as a step in that type is."""
    args, cotangents = inputs(70)
    args |= {n: args[n].astype(dtype) for n in "qkv"}
    cotangents = (*cotangents[:2], cotangents[2].astype(dtype))
    wide = {n: np.asarray(a, np.float32) for n, a in args.items()}
    want, grads = oracle.linear(wide, 16, 2.0, tuple(
        np.asarray(a, np.float32) for a in cotangents))
    have, back = results(backend, 16, args, cotangents)
    assert have[2].dtype == dtype and have[0].dtype == have[1].dtype == jnp.float32
    bound = 4 * float(jnp.finfo(dtype).eps)
    for label, a, b in zip(("W", "S", "o"), have, want):
        close(a, b, bound, label)
    for label, b in grads.items():
        assert back[label].dtype == args[label].dtype
        close(back[label], b, bound, label)


def whole(t, chunk, implementation, rule=Rule(MLP(1), Bias(factor=2.0)), **options):
    """`learn` on whole rows -> a function of the oracle's arguments."""
    @jax.jit
    def f(args):
        gates = Gates(*(args[n] for n in GATES))
        where = Where(jnp.arange(t, dtype=jnp.int32)[None], None)
        after, o = learn(rule, *(args[n] for n in "qkv"), gates,
                         {"W0": args["weights"][0]}, where, chunk=chunk,
                         implementation=implementation, **options)
        return after.weights["W0"], after.momentum["W0"], o

    return f


@pytest.mark.parametrize("platform", ["tpu", "gpu"])
def test_it_is_picked_by_name(platform, monkeypatch):
    monkeypatch.setattr(dispatch, "INTERPRETED", platform)
    args, _ = inputs(50)
    have, want = (whole(50, 16, name)(args) for name in ("pallas", "xla"))
    for a, b in zip(have, want):
        close(a, b)


@BACKENDS
def test_what_it_does_not_do_is_refused(backend):
    args, _ = inputs(5)
    call = functools.partial(results, backend, 16)
    with pytest.raises(Refused, match="q, k, v are .*one of"):
        call(args | {"v": args["v"].astype(np.float16)}, None)
    with pytest.raises(Refused, match="chunk=65: at most 64"):
        results(backend, 65, args, None)
    with pytest.raises(Refused, match="V=300: at most 256"):
        call(args | {n: np.zeros((*args[n].shape[:-1], 300), np.float32)
                     for n in ("v", "weights", "momentum")}, None)
    with pytest.raises(ValueError, match="momentum has shape .*expected"):
        call(args | {"momentum": args["momentum"][:, :1]}, None)


@pytest.mark.parametrize("rule, options, reason", [
    (Rule(MLP(1), Bias("lp")), {}, "error .*expected l2"),
    (Rule(MLP(1), Bias(), KL()), {}, "expected W = Z"),
    (Rule(MLP(1), Bias(), read="start"), {}, "read='start': expected 'exact'"),
    (Rule(MLP(1), Bias(), decayed=True), {}, "gradients at decayed weights"),
    (Rule(MLP(1), Bias()), {"lag": True}, "lag_token: expected whole rows"),
    (Rule(MLP(2, 8), Bias()), {}, "no kernel for such a memory: memory MLP"),
])
def test_other_memories_are_refused(rule, options, reason):
    args, _ = inputs(5)
    with pytest.raises(Refused, match=reason):
        whole(5, 16, "pallas", rule, **options)(args)
