"""Flash attention for Hopper by Mosaic GPU, interpreted: what it takes, every gradient,
and what it refuses and Triton then takes.

The interpreter simulates copies, barriers and warpgroups; matrix products are dots of
what the simulated memory holds. It is slow: shapes are tiny. Its warpgroups need
threads of their own: with fewer CPU devices than they (conftest sets 8) it can hang.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn.masks import Causal, Full, Sink, Window
from attn.positions import ALiBi
from attn.softmax import Softmax
from pallas_kernels import Refused
from tests.on_device import INTERPRET
from tests.oracles.softmax import chunks as attend, flash
from tests.pallas_kernels.test_flash import normal, results, twice

BF16, F16 = jnp.bfloat16, jnp.float16
SHORT = 128, 64  # tiles of two warpgroups; backward, each keeps one of dk and dv
RUNS = np.array([[1] * 30 + [2] * 70 + [3] * 40 + [0] * 10,
                 [0] * 5 + [1] * 130 + [2] * 15], np.int32)


def everything():
    """Positions of slots, some of them empty, runs, and every form of a logit."""
    i = np.arange(150, dtype=np.int32)[None]
    kv_pos = np.stack([i, np.where(i % 3 == 0, -1, i)], -1)
    return {"mask": Causal() & Window(60), "softcap": 3.0, "score": ALiBi(2),
            "sink": normal(3, 2), "q_pos": jnp.asarray(i),
            "kv_pos": jnp.asarray(kv_pos),
            "q_segment": jnp.asarray(RUNS[:1]), "kv_segment": jnp.asarray(RUNS[:1]),
            "sizes": {"t": 150, "s": 150, "h": 2, "k": 2}}


CASES = {
    "causal": lambda: {"mask": Causal(), "sizes": {"t": 150, "s": 150}},
    "short": lambda: {"mask": Causal(), "tile": SHORT, "sizes": {"t": 250, "s": 250}},
    "aligned": lambda: {"mask": Causal(), "tile": SHORT, "sizes": {"t": 40, "s": 150}},
    "empty_rows": lambda: {"mask": Causal(), "sizes": {"t": 100, "s": 40}},
    "sink_tokens": lambda: {"mask": Causal() & (Window(5) | Sink(3)), "tile": SHORT,
                            "softcap": 3.0, "sizes": {"t": 120, "s": 120}},
    "runs": lambda: {"mask": Causal(), "q_segment": jnp.asarray(RUNS),
                     "kv_segment": jnp.asarray(RUNS),
                     "sizes": {"b": 2, "t": 150, "s": 150}},
    "everything": everything,
    "one_token": lambda: {"mask": Causal(), "sizes": {"t": 1, "s": 1}},
    "three_groups": lambda: {"mask": Full(), "tile": (192,),
                             "sizes": {"t": 100, "s": 300}},
    "negative": lambda: {"mask": None, "scale": -0.3, "sizes": {"t": 1, "s": 200}},
    "d192": lambda: {"mask": Causal(), "sizes": {"d": 192, "v": 128, "h": 2}},
    "d256": lambda: {"mask": Causal(), "sizes": {"d": 200, "v": 256}},
    "float16": lambda: {"mask": Full(), "sizes": {"dtype": F16, "d": 40, "v": 100}},
}


def inputs(b=1, t=70, s=70, h=1, k=1, d=64, v=64, dtype=BF16):
    shapes = {"q": (b, t, h, d), "k": (b, s, k, d), "v": (b, s, k, v)}
    return {n: normal(i, *a).astype(dtype) for i, (n, a) in enumerate(shapes.items())}


def apart(found, expected, name):
    """The norm of the difference, where the expected is finite, and of the expected."""
    a, b = (np.asarray(x[name], np.float64) for x in (found, expected))
    seen = np.isfinite(b)
    assert (np.isfinite(a) == seen).all(), name
    return np.linalg.norm(a[seen] - b[seen]), np.linalg.norm(b[seen])


@pytest.mark.parametrize("name", CASES)
def test_the_kernel_is_the_function(name):
    """Against float32 of the same numbers: at most twice the error of XLA's form in the
    same type; lse, which is not rounded, to 1e-5."""
    options = CASES[name]()
    low = inputs(**options.pop("sizes", {}))
    more = {n: options.pop(n) for n in ("sink",) if n in options}
    tile = options.pop("tile", None)
    exact = {n: a.astype(jnp.float32) for n, a in low.items()} | more
    low = low | more
    kernel = functools.partial(flash, backend="mosaic", tile=tile, interpret=INTERPRET)
    # the same bits twice: how a kernel is interpreted costs seconds, so one case
    found = (twice if name == "causal" else results)(kernel, low, options)
    expected, rough = results(attend, exact, options), results(attend, low, options)
    for n in expected:
        error, scale = apart(found, expected, n)
        if n == "lse":
            assert error <= 1e-5 * max(scale, 1), n
        else:
            allowed, _ = apart(rough, expected, n)
            allowed = 2 * allowed + 1e-4 * scale
            assert error <= max(allowed, left_of_nothing(low, n)), (n, error, allowed)


def left_of_nothing(low, name):
    """How much of a gradient that is 0, as over one key, rounding may leave: dP and its
    mean are the same sum of V products in float32, taken in two orders, each at most V
    roundings off; what they differ by is multiplied by k or q."""
    q, k, v = (np.asarray(low[n], np.float64) for n in "qkv")
    if k.shape[1] > 1 or name not in ("q", "k"):
        return 0.0
    do = np.asarray(normal(8, *q.shape[:3], v.shape[3]), np.float64)
    apart = 2 * v.shape[3] * 2.0**-24 * np.abs(v * do).sum()
    return apart * np.linalg.norm(k if name == "q" else q) * q.shape[3] ** -0.5


def table(h, i, j):
    return jnp.asarray([True, False, True])[j % 3]


@pytest.mark.parametrize("options, reason", [
    ({"dtype": jnp.float32}, "q is float32: Hopper's matrix units"),
    ({"d": 320}, "D=320: at most 256"),
    ({"bias": True}, "bias: not on Hopper"),
    ({"keep": True}, "keep: not on Hopper"),
    ({"key": True}, "key: not on Hopper"),
    ({"mask": table}, "reads a table"),
    ({"score": lambda h, i, j: jnp.sin(i * 1.0)}, "no sin on Hopper"),
    ({"interpret": False}, "device cpu: expected one of H100"),
])
def test_refusals_name_their_reason(options, reason):
    refused("mosaic", options, reason)


def refused(backend, options, reason):
    """A call with these options is refused, and why is said."""
    options = dict(options)
    arrays = inputs(t=4, s=4, d=options.pop("d", 64), dtype=options.pop("dtype", BF16))
    given = {"bias": normal(3, 1, 1, 4, 4), "keep": jnp.ones((1, 1, 4, 4), bool),
             "key": jax.random.key(0)}
    options = {n: given.get(n, a) for n, a in options.items()}
    told = {"backend": backend, "interpret": True, "dropout": 0.5} | options
    with pytest.raises(Refused, match=reason):
        flash(**arrays, **told)


def test_what_hopper_refuses_falls_through(monkeypatch):
    """A bias goes on to Triton, and only what every kernel refuses is refused. No form
    that has to be named is asked."""
    from attn.exact import attend

    asked = []

    def fake(*a, backend, **options):
        asked.append(backend)
        raise Refused(f"{backend} refuses")

    monkeypatch.setattr(attend, "flash", fake)
    monkeypatch.setattr("attn.contract.dispatch.platform", lambda: "gpu")
    a = inputs(t=4, s=4)
    Softmax()(a["q"], a["k"], a["v"])
    assert asked == ["mosaic", "triton"]
    with pytest.raises(NotImplementedError, match="mosaic refuses; triton refuses"):
        Softmax(implementation="pallas")(a["q"], a["k"], a["v"])
