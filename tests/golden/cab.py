"""Adapter for cab.npz: layers of the benchmark's authors, and its index.

In their layers queries at padding ask, too, and in some means and maxima are over
padding. The library reads nothing there, so those are asked behind the door at which
padding becomes 0, and what they are told to count is said in each.
"""

from __future__ import annotations

import functools
from typing import Any, Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from attn.abc import ABC
from attn.cosformer import CosFormer
from attn.lara import LARA
from attn.local import Local
from attn.masks import Full
from attn.longshort import LongShort
from attn.nystrom import Nystrom
from attn.performer import Performer
from attn.probsparse import ProbSparse
from attn.s4d import S4D
from attn.softmax import Softmax
from attn.sparse import favor
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
    found = {"out": jax.jit(_causal(case))(q, k, v)}
    if "proj" in case.keys():
        for name, a in (("phi_q", q), ("phi_k", k)):
            s, half = favor.projected(a, jnp.asarray(case["proj"], jnp.float32))
            found[name] = s.shape[-1] ** -0.5 * jnp.exp(s - half)
    return {name: np.asarray(a) for name, a in found.items()}


def _causal(case) -> Callable:
    config = case["config"]
    if config["mechanism"] == "abc_causal_paper":
        return _abc(case, case["compress_k"], case["compress_v"], causal=True)
    if "proj" in case.keys():
        return _performer(case)
    return CosFormer(length=config["M"], eps=config["eps"])


def _abc(case, *matrices, causal: bool) -> Callable:
    params = dict(zip(("compress_k", "compress_v"),
                      (jnp.asarray(a, jnp.float32) for a in matrices)))
    module = ABC(landmarks=matrices[0].shape[1], causal=causal)
    return functools.partial(module.apply, {"params": params})


def _performer(case) -> Callable:
    w = jnp.asarray(case["proj"], jnp.float32)
    module = Performer(features=w.shape[1])
    return functools.partial(module.apply, {"fixed": {"directions": w}})


def _performer_code(case) -> Callable:
    """In the authors' code the greatest feature is of all keys, those at padding too,
    which are not read from the door on: it is asked behind it."""
    w = jnp.asarray(case["proj"], jnp.float32)
    module = Performer(features=w.shape[1], causal=False, eps=1e-4, least=0.1)

    def read(self, q, k, v, segments):
        return self._code_quotient(*self._code_features(q, k, w, None), v, segments)

    def attend(q, k, v, segments):
        return module.apply({}, q, k, v, segments, method=read)

    return attend


def _nystrom(case) -> Callable:
    """The authors' code has zeros for keys and values at padding, and means over it."""
    config, taps = case["config"], case["w/conv.weight"][:, 0, :, 0]
    module = Nystrom(
        landmarks=config["num_landmarks"], conv=taps.shape[1], shared_start=True,
        scale=config["H"] / config["E"])

    def attend(q, k, v, segments):
        real = segments[1] > 0
        k, v = (jnp.where(real[..., None, None], a, 0) for a in (k, v))
        return module.apply(
            {"params": {"conv": jnp.asarray(taps)}}, q, k, v, real,
            jnp.ones_like(real), method="_attend")

    return attend


def _lara(case) -> Callable:
    """In the authors' code means and lse are over padding too."""
    attention = LARA(landmarks=case["config"]["num_landmarks"])

    def attend(q, k, v, segments):
        real = segments[1] > 0
        return attention._attend(q, k, v, real, jnp.ones_like(real))

    return attend


def _probsparse(case) -> Callable:
    attention = ProbSparse(factor=case["config"]["factor"])
    return functools.partial(
        attention, samples=jnp.asarray(case["index_sample"], jnp.int32))


def _normal_abc(case) -> Callable:
    return _abc(case, case["w/compress_k"], case["w/compress_v"], causal=False)


def _abc_variant(case) -> Callable:
    """What the authors' code does in causal order: of each slot the share of the token
    itself, exp(a_t - log sum_(s<=t) exp(a_s)) k_t, is not added up over tokens. The
    library has the sums of the paper, from which this is far away."""
    matrices = [jnp.asarray(case[f"w/compress_{n}"]) for n in "kv"]
    paper = _abc(case, *matrices, causal=True)

    def attend(q, k, v, segments):
        slots = []
        for a, w in zip((k, v), matrices):
            s = a @ w  # [B,T,H,c]
            share = jnp.exp(s - jax.lax.cumlogsumexp(s, axis=1))
            slots.append(share[..., None] * a[..., None, :])
        p = jax.nn.softmax(
            jnp.einsum("bthd,bthcd->bthc", q, slots[0]) * q.shape[-1] ** -0.5)
        o = jnp.einsum("bthc,bthcv->bthv", p, slots[1])
        apart = jnp.linalg.norm(o - paper(q, k, v)) / jnp.linalg.norm(o)
        return jnp.where(apart > 0.1, o, jnp.nan)

    return attend


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

    def affine(x):
        y = x @ weight.T
        if bias is None:
            return y
        return y + jnp.asarray(bias).reshape((1,) * (y.ndim - 1) + (-1,))

    return affine


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


def _s4d(case) -> Callable:
    """x is v of one head, whose outputs of H heads go through one projection."""
    name = "w/kernel.kernel."
    params = {n: jnp.asarray(case[name + n]).squeeze(0) if "w_" in n
              else jnp.asarray(case[name + n])
              for n in ("C", "log_dt", "log_w_real", "w_imag")}
    params["D"] = jnp.asarray(case["w/D"])
    config = case["config"]
    module = S4D(
        state=config["d_state"], causal=not config.get("bidirectional", False))
    out, heads = _dense(case, "output_linear"), config["H"]

    def layer(x, ctx):
        q = jax.ShapeDtypeStruct((*x.shape[:2], heads, 1), x.dtype)
        k = jax.ShapeDtypeStruct((*x.shape[:2], 1, 1), x.dtype)
        o = module.apply({"params": params}, q, k, x[:, :, None])
        return out(o.reshape(*x.shape[:2], -1))

    return layer


def _longshort(case) -> Callable:
    """Its own projections; a layer norm of E channels is one of heads and channels."""
    config, heads = case["config"], case["config"]["H"]
    causal = config["mechanism"] == "ls_causal"
    of = dict(zip("qkvo", ("proj_query", "proj_key", "proj_val", "proj_out") if causal
                  else ("W_q", "W_k", "W_v", "W_o")))
    q, k, v, out = (_dense(case, of[n]) for n in "qkvo")
    by_head = lambda a: jnp.asarray(a).reshape(heads, -1)

    def norm(name):
        return {"scale": by_head(case[f"w/{name}.weight"]),
                "bias": by_head(case[f"w/{name}.bias"])}

    def dense(name):
        weight = jnp.asarray(case[f"w/{name}.weight"]).T
        return {"kernel": weight.reshape(weight.shape[0], heads, -1),
                "bias": by_head(case[f"w/{name}.bias"])}

    if causal:
        assert np.allclose(case["w/pos_emb.inv_freq"], 1e4 ** (-np.arange(6) / 6))
        module = LongShort(
            rank=config["chunk_rank"], window=config["window_size"],
            chunk=config["chunk_size"], memory=config["mem_len"])
        place = jnp.asarray(case["w/r_net.weight"]).T
        params = {
            "compress": dense("dconv_1"), "norm_near": norm("dual_ln_win"),
            "norm_far": norm("dual_ln_dproj"), "place_far": dense("r_net_chunk"),
            "place": place.reshape(place.shape[0], heads, -1),
            "asks": by_head(case["w/r_w_bias"]), "turns": by_head(case["w/r_r_bias"]),
        }
    else:
        module = LongShort(
            rank=config["num_landmarks"], window=config["window_size"], causal=False)
        params = {"compress": dense("dconv_fc"), "norm_near": norm("dual_ln_l"),
                  "norm_far": norm("dual_ln_s")}
    pad = case.get("key_padding_mask")
    ids = None if pad is None else jnp.asarray(1 - pad).astype(jnp.int32)

    def layer(x, ctx):
        split = lambda a: a.reshape(*a.shape[:2], heads, -1)
        o = module.apply({"params": params}, split(q(x)), split(k(x)), split(v(x)),
                         x=x, segments=ids)
        return out(o.reshape(x.shape))

    return layer


LAYERS: dict[str, Callable] = {
    "vanilla": _multihead(lambda case: Softmax(mask=Full())),
    "local": _multihead(_local),
    "lara": _multihead(_lara), "nystrom": _multihead(_nystrom),
    "s4d": _s4d, "ls_noncausal": _longshort, "ls_causal": _longshort,
    "probsparse": _multihead(_probsparse, "{}_projection"),
    "performer": _multihead(_performer_code),
    "abc": _multihead(_normal_abc),
    "abc_causal_repo_variant": _multihead(_abc_variant),
    "cosformer": _multihead(lambda case: CosFormer(causal=False, length=None)),
}
