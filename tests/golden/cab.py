"""Adapter for cab.npz: layers of the benchmark's authors, and its index.

Padded rows are checked as the authors' modules give them: they write a bias at padding,
the library 0, so what is compared there is the output projection of 0.
"""

from __future__ import annotations

from typing import Any, Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from attn.cosformer import CosFormer
from attn.local import Local
from attn.masks import Full
from attn.softmax import Softmax
from experiments.measure.compositional import compositional_index

# specs/cab.md: gradients 1e-4
TOLERANCE = {"grad_x": 1e-4, "grad_ctx": 1e-4}


def run(case: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """What the arrays of the case ask for."""
    config = case["config"]
    if "groups" in config:
        return _index(case)
    return {"performer_causal_exact_features": _heads, "cosformer_causal": _heads,
            "abc_causal_paper": _heads}.get(config["mechanism"], _layer)(case)


def _index(case) -> dict[str, np.ndarray]:
    found: dict[str, Any] = {}
    for n, name in enumerate(case["config"]["patterns"]):
        arrays = (case[f"p{n}_{a}"] for a in ("scores", "mu", "sigma", "sign"))
        tasks = case["config"]["groups"][name]
        found[f"p{n}_task"], found[f"p{n}_ci"] = compositional_index(*arrays, tasks)
    return found


def _heads(case) -> dict[str, np.ndarray]:
    """q, k, v [B,T,H,D] as they are."""
    q, k, v = (jnp.asarray(case[name], jnp.float32) for name in "qkv")
    return {"out": np.asarray(jax.jit(_causal(case))(q, k, v))}


def _causal(case) -> Callable:
    config = case["config"]
    return CosFormer(length=config["M"], eps=config["eps"])


def _layer(case) -> dict[str, np.ndarray]:
    """out, and the gradients of sum(out * cot) by x and, in cross attention, ctx."""
    names = ["x"] + ["ctx"] * ("ctx" in case.keys())
    inputs = tuple(jnp.asarray(case[name]) for name in names)
    layer, cot = LAYERS[case["config"]["mechanism"]](case), jnp.asarray(case["cot"])

    @jax.jit
    def both(*inputs):
        def product(*inputs):
            out = layer(inputs[0], inputs[-1])
            return (out * cot).sum(), out

        return jax.value_and_grad(
            product, tuple(range(len(inputs))), has_aux=True)(*inputs)

    (_, out), grads = both(*inputs)
    found = {"out": out} | {f"grad_{n}": g for n, g in zip(names, grads)}
    return {name: np.asarray(a) for name, a in found.items()}


def _dense(case, name: str) -> Callable:
    """x -> x W^T + b, b if there is one."""
    weight = jnp.asarray(case[f"w/{name}.weight"])
    bias = case.get(f"w/{name}.bias")
    return lambda x: x @ weight.T + (0 if bias is None else jnp.asarray(bias)[None])


def _multihead(attend: Callable, form: str = "{}_proj") -> Callable:
    """case -> (x, ctx) -> out, with the projections of the authors' wrapper around
    attend(case)(q, k, v, segments=)."""
    def made(case):
        config, inner = case["config"], attend(case)
        full = {"q": "query", "k": "key", "v": "value"} if "ection" in form else {}
        q, k, v, out = (_dense(case, form.format(full.get(n, n)))
                        for n in ("q", "k", "v", "out"))
        pad = case.get("key_padding_mask")
        heads = config["H"]

        def layer(x, ctx):
            split = lambda a: a.reshape(*a.shape[:2], heads, -1)
            o = inner(split(q(x)), split(k(ctx)), split(v(ctx)),
                      segments=segments(x, ctx, pad))
            return out(o.reshape(x.shape))

        return layer

    return made


def segments(x, ctx, pad) -> Any:
    """1 for tokens and 0 for padding, of keys alone, whose queries still ask."""
    if pad is None:
        return None
    keys = jnp.asarray(1 - pad).astype(jnp.int32)
    return jnp.ones(x.shape[:2], jnp.int32), keys


def _local(case) -> Callable:
    config = case["config"]
    return Local(window=config["wsize"], causal=config.get("causal", False))


LAYERS: dict[str, Callable] = {
    "vanilla": _multihead(lambda case: Softmax(mask=Full())),
    "local": _multihead(_local),
    "cosformer": _multihead(lambda case: CosFormer(causal=False, length=None)),
}
