"""Adapter for unified.npz: mixers of one head, and attention over four devices."""

from __future__ import annotations

from typing import Any, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from attn.exact.dense import online_softmax
from attn.exact.online import EMPTY, merge, output
from attn.lineartransformer import LinearTransformer
from attn.linformer import Linformer
from attn.masks import Causal, Full, Window
from attn.mixers import Depthwise, FNet, LongConv, MeanPool, Static
from attn.parallel.device_grid import grid_attention
from attn.softmax import Softmax
from pallas_kernels.logits import LogitSpec, Where


def run(case: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """What the arrays of the case ask for."""
    found = _dist(case) if "shards" in case["config"] else _mixers(case)
    return {name: np.asarray(a) for name, a in found.items()}


def _mixers(case: Mapping[str, Any]) -> dict[str, jax.Array]:
    x = jnp.asarray(case["X"])
    q, k, v = ((x @ case[name])[None, :, None] for name in ("Wq", "Wk", "Wv"))
    length, width = x.shape
    linformer = Linformer(length=length, rank=case["E"].shape[0])
    attentions = {
        "softmax_attention": Softmax(mask=Full()),
        "linear_attention_elu": LinearTransformer(causal=False, eps=0.0),
        "local_attention_w2": Softmax(mask=Window(2, 2)),
        "linformer": lambda *args: linformer.apply(
            _params(keys=case["E"], values=case["F"]), *args),
    }
    taps = np.broadcast_to(case["conv3_kernel"][:, None], (3, width))
    mixers = {
        "fnet": (FNet(), {}),
        "static_mixing_mlp": (Static(length=length), _params(weight=case["W_static"])),
        "long_convolution": (
            LongConv(length=length), _params(taps=case["long_kernel"])),
        "depthwise_conv3": (Depthwise(), _params(taps=taps)),
        "causal_mean_pool": (MeanPool(), {}),
    }
    found = {name: f(q, k, v)[0, :, 0] for name, f in attentions.items()}
    for name, (mixer, params) in mixers.items():
        found[name] = mixer.apply(params, x[None])[0]
        dense = mixer.apply(params, x[None], method="dense")[0]
        np.testing.assert_allclose(dense, found[name], rtol=1e-4, atol=1e-5)
    return found


def _params(**arrays: Any) -> dict[str, Any]:
    return {"params": {name: jnp.asarray(a) for name, a in arrays.items()}}


def _dist(case: Mapping[str, Any]) -> dict[str, jax.Array]:
    config = case["config"]
    q, k, v = (jnp.asarray(case[name]) for name in "qkv")
    shards, scale = config["shards"], config["scale"]
    mask = Causal() if config["causal"] else Full()
    t, s = q.shape[1], k.shape[1]
    size, pos, spec = s // shards, jnp.arange(s)[None], LogitSpec(mask, scale)
    parts = [
        online_softmax(q, k[:, at:at + size], v[:, at:at + size], spec,
                       Where(jnp.arange(s - t, s)[None], pos[:, at:at + size]))
        for at in range(0, s, size)
    ]
    stacked = jax.tree.map(lambda *a: jnp.stack(a), *parts)
    mesh = jax.make_mesh(
        (1, shards, 1), ("data", "seq", "model"), devices=jax.devices()[:shards],
        axis_types=(jax.sharding.AxisType.Auto,) * 3,
    )
    with jax.set_mesh(mesh):
        out = jax.jit(Softmax(mask=mask, scale=scale, axis="seq"))(q, k, v)
        columns = jax.jit(
            lambda *args: grid_attention(*args, spec, columns="seq")
        )(q, k, v)
    for other in (output(merge(stacked)), columns):
        np.testing.assert_allclose(other, out, rtol=1e-4, atol=1e-5)
    m, l = (a.swapaxes(2, 3) for a in stacked[:2])  # [P,B,H,T]
    # the reference writes the maximum of no keys as -1e30, here it is the least float
    m = jnp.where((l == 0) & (m == EMPTY), -1e30, m)
    return {"partial_max": m, "partial_denominator": l,
            "partial_numerator": stacked.acc, "out": out}
