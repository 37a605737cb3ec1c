"""Arrays of other shapes and types than their letters say are refused at every door,
before anything is compiled: none is filled up, repeated or read beyond its end."""

import functools

import jax.numpy as jnp
import pytest

from attn.exact.attend import attend
from attn.softmax import Softmax
from pallas_kernels import Refused
from pallas_kernels.delta.api import delta
from pallas_kernels.linear.api import linear
from pallas_kernels.scan.api import scan
from tests.on_device import INTERPRET
from tests.oracles.softmax import (
    blocks_kernel as blocks, by_keywords, chunks, decode, flash
)

B, T, H, K, D = 2, 3, 4, 2, 8
Q, KV = jnp.zeros((B, T, H, D)), jnp.zeros((B, T, K, D))
best = functools.partial(by_keywords, attend)


def ones(*shape, dtype=jnp.int32):
    return jnp.ones(shape, dtype)


def floats(*shape):
    return jnp.ones(shape)


BACKENDS = ("tpu", "triton", "mosaic")
FLASH = [functools.partial(flash, backend=name, interpret=INTERPRET)
         for name in BACKENDS]
DECODE = [functools.partial(decode, backend=name, interpret=INTERPRET)
          for name in ("tpu", "triton")]
BLOCKS = functools.partial(
    blocks, chosen=ones(B, K, 1, 1), block=2, interpret=INTERPRET)
POSITIONS = [
    ("q_pos", {"q_pos": ones(B, T + 1), "kv_pos": ones(B, T)}),
    ("kv_pos", {"q_pos": ones(B, T), "kv_pos": ones(B, T + 1)}),
    ("kv_pos", {"q_pos": ones(B, T), "kv_pos": ones(B, T, 3)}),
    ("q_segment", {"q_segment": ones(B + 1, T), "kv_segment": ones(B, T)}),
    ("kv_segment is float32",
     {"q_segment": ones(B, T), "kv_segment": floats(B, T)}),
    ("head", {"head": ones(K)}),
]
ADDED = [("bias", {"bias": floats(*shape)}) for shape in (
    (1, 1, 2, 2), (1, K, T, T), (3, H, T, T), (B, H, T, T + 1), (T, T), (B, T, T))]
ADDED += [("sink", {"sink": floats(n)}) for n in (1, 2, 5, 8)]
KEPT = [("keep", {"keep": ones(B, 1, T, T, dtype=bool), "dropout": 0.5})]
ON_CACHES = [
    ("lengths", {"lengths": ones(3)}), ("lengths", {"lengths": ones(B, 3)}),
    ("bias", {"bias": floats(B, T)}), ("bias", {"bias": floats(B, T, H)}),
    ("sink", {"sink": floats(1)}), ("q_pos", {"q_pos": ones(1, 1)}),
    ("k_scale", {"k_scale": floats(B, T)}),
    (".*kv_segment", {"kv_segment": ones(B, T)}),
    ("kv_pos", {"kv_pos": ones(B, T, 4)}), ("table", {"table": ones(B)}),
]
CALLS = [(f, *case) for f in (*FLASH, chunks, best)
         for case in POSITIONS + ADDED + KEPT]
CALLS += [(f, *case) for f in DECODE for case in ON_CACHES]
CALLS += [(BLOCKS, *case) for case in POSITIONS if "3" not in str(case[1])]
CALLS += [(Softmax(), *case) for case in ADDED]


@pytest.mark.parametrize("call, name, given", CALLS)
def test_wrong_arrays_are_refused(call, name, given):
    dtype = jnp.bfloat16 if getattr(call, "keywords", {}).get("backend") == "mosaic" \
        else jnp.float32
    q, k, v = (a.astype(dtype) for a in (Q, KV, KV))
    with pytest.raises(ValueError, match=f"^{name}.*(expected|go together)"):
        call(q, k, v, **given)


@pytest.mark.parametrize("call, given, reason", [
    *((call, {"shift": 2}, "shift") for call in (*DECODE, BLOCKS)),
    (BLOCKS, {"softcap": 2.0}, "softcap"),
    (BLOCKS, {"score": lambda h, i, j: i - j}, "score"),
])
def test_what_a_kernel_has_not_is_refused(call, given, reason):
    """A call is told the same everywhere: nothing of it is left out in silence."""
    with pytest.raises(Refused, match=reason):
        call(Q, KV, KV, **given)


# what recurrent kernels are given, H = 4 heads of K = 2 keys
RECURRENT = [("segment", {"segment": a}) for a in (
    ones(B, T + 1), ones(3, T), ones(T), floats(B, T))]
DECAYS = [("log_decay", {"log_decay": a}) for a in (
    ones(H), floats(K), floats(B, T), floats(B, T, K), floats(3, T, H),
    floats(B, T, H, 1), floats(B, T, H, D + 1))]
STATES = [("state", {"state": floats(*a)}) for a in (
    (B, K, D, D), (1, H, D, D), (B, H, D, 1), (H, D, D))]
OTHERS = [("k", {"k": floats(B, T, K, D + 1)}), ("v", {"v": floats(B, T + 1, K, D)}),
          ("k", {"k": floats(B, T, 3, D), "v": floats(B, T, 3, D)})]
BETAS = [("beta", {"beta": floats(*a)}) for a in ((B, T), (B, T + 1, H), (1, T, H))]
TRIPLES = [(name, {"state": given}) for name, given in (
    ("m", (floats(1, H), floats(B, H), floats(B, H, D))),
    ("u", (floats(B, H), floats(B, K), floats(B, H, D))),
    ("w", (floats(B, H), floats(B, H), floats(B, H, D + 1))))]
TRIPLES += [("scores", {"scores": floats(*a)}) for a in ((B, T), (3, T, H))]
TRIPLES += [("v", {"v": floats(B, T, 3, D)})]


@pytest.mark.parametrize("backend", ("tpu", "triton"))
def test_wrong_arrays_of_recurrent_kernels_are_refused(backend):
    plain = {"q": Q, "k": KV, "v": KV}
    triple = floats(B, H), floats(B, H), floats(B, H, D)
    for kernel, own, wrong in (
        (linear, plain, RECURRENT + DECAYS + STATES + OTHERS),
        (delta, plain | {"beta": floats(B, T, H)},
         RECURRENT + DECAYS + STATES + OTHERS + BETAS),
        (scan, {"scores": floats(B, T, H), "v": KV, "state": triple},
         RECURRENT + TRIPLES),
    ):
        for name, given in wrong:
            with pytest.raises(ValueError, match=f"^{name} .*expected"):
                kernel(**own | given, backend=backend, interpret=INTERPRET)


def test_a_list_is_no_array():
    with pytest.raises(ValueError, match=r"sink is a list: expected an array \[H\]"):
        Softmax()(Q, KV, KV, sink=[1.0] * H)
    with pytest.raises(ValueError, match=r"bias has shape \(1, 1, 2, 2\): expected "
                       r"\[B\|1,H\|1,T\|1,S\|1\] with B=2, H=4, S=3, T=3"):
        Softmax()(Q, KV, KV, bias=floats(1, 1, 2, 2))
