"""Adapter for titans.npz: the neural memory by chunks, and the other way of a chunk
that a public implementation has (`lucidrains`: gradients at the weights of the call,
one step of momentum and decay a chunk), as one more setting of the same mechanism.
"""

from __future__ import annotations

import functools
from typing import Any, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from attn.recurrent.memory import Gates, Where, learn
from attn.recurrent.memory_axes import Bias
from attn.recurrent.memory_chunk import Rule
from attn.recurrent.memory_nets import MLP

SQUARES = Bias(factor=2.0)
# the spec's, section 8: outputs 1e-4, gradients 1e-3, relative to the array here
TOLERANCE = {
    "out_token": 1e-5, "out_chunk_start_memory": 1e-5, "out": 1e-5, "W0": 2e-5,
    "W1": 2e-5, "gamma": 2e-5, "beta": 2e-5,
}


def run(case: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """What the arrays of the case ask for."""
    found = public(case) if "x" in case else paper(case)
    return {name: np.asarray(a) for name, a in found.items()}


def network(kind: str, hidden: int) -> MLP:
    """linear, or mlp2 with words for its activation, residual and norm."""
    words = kind.split("_")
    return MLP(
        depth=1 if words[0] == "linear" else 2, hidden=hidden, residual="res" in words,
        activation="silu" if "silu" in words else "gelu", norm="ln" in words,
    )


def paper(case) -> dict[str, Any]:
    """Equations 13 to 18."""
    config = case["config"]
    names = [n.removeprefix("M0/") for n in case.keys() if n.startswith("M0/")]
    initial = {n: jnp.asarray(case[f"M0/{n}"]) for n in names}
    net = network(config["memory"], initial["W0"].shape[-1])
    rule = functools.partial(Rule, net, SQUARES)
    args = {n: jnp.asarray(case[n]) for n in ("q", "k", "v", "theta", "eta", "alpha")}

    def forward(args, initial, read="exact"):
        t = args["q"].shape[1]
        where = Where(jnp.arange(t, dtype=jnp.int32)[None], None)
        gates = Gates(
            args["theta"], jnp.log1p(-args["alpha"]), jnp.log(args["eta"]))
        memory, o = learn(
            rule(read=read), args["q"], args["k"], args["v"], gates, initial, where,
            chunk=config["chunk"])
        return o, memory

    both = jax.jit(lambda *a: jax.vjp(forward, *a, has_aux=True))
    out, back, memory = both(args, initial)
    grads, first = jax.jit(back)(jnp.asarray(case["cotangent"]))
    start, _ = jax.jit(functools.partial(forward, read="start"))(args, initial)
    found = {"out_token": out, "out_chunk_start_memory": start}
    for n in names:
        found[f"M_final/{n}"] = memory.weights[n] + initial[n][None]
        found[f"S_final/{n}"] = memory.momentum[n]
        found[f"grad/M0/{n}"] = first[n]
    return found | {f"grad/{n}": grads[n] for n in args}


def public(case) -> dict[str, Any]:
    """One layer of titans-pytorch: norms, gates of chunks, memory, gate of heads."""
    config = case["config"]
    w = {n.removeprefix("params/"): jnp.asarray(case[n])
         for n in list(case.keys()) if n.startswith("params/")}
    names = [str(n) for n in case["mem_param_names"]]
    ours = {n: n.replace("norm.", "").replace("model.weights.", "W") for n in names}
    initial = {ours[n]: w[f"memory_model_parameters.{i}"] for i, n in enumerate(names)}
    for n in names:  # the same of every head, before it is repeated
        case.get(f"params/memory_model.{n}")
    kwargs = config["default_model_kwargs"]
    net = MLP(depth=kwargs["depth"], hidden=initial["W0"].shape[-1], residual=True,
              norm=True, unit=True)
    out, memory = jax.jit(functools.partial(layer, config, net))(
        w, initial, jnp.asarray(case["x"]))
    found = {"out": out}
    for n in names:
        key = f"memory_after/{n.replace('.', '_')}"
        found[key] = memory.weights[ours[n]] + initial[ours[n]][None]
        found[key] = found[key].reshape(case[key].shape)
    return found


def layer(config, net, w, initial, x):
    """x [B,T,E] -> [B,T,E], and the memory after all whole chunks."""
    (b, t, _), h, c = x.shape, config["heads"], config["chunk"]
    eps = np.finfo(np.float64).eps
    rms = lambda a, g: a * jax.lax.rsqrt((a * a).mean(-1, keepdims=True) + eps) * g
    weight = lambda name: w[f"{name}_norm.weight"][None, None]
    stored, asked = (rms(x, weight(n)) for n in ("store", "retrieve"))
    split = lambda a: a.reshape(b, t, h, -1)
    q = split(asked @ w["to_queries.weight"].T)
    k, v = (split(stored @ w[f"to_{n}.weight"].T) for n in ("keys", "values"))
    gain = lambda name: 1 + jnp.moveaxis(w[name], 0, 1)[None]  # [H,1,D] -> [1,1,H,D]
    scaled = lambda a, name: rms(a, gain(name))
    if config.get("qk_rmsnorm"):
        q, k = scaled(q, "q_norm.gamma"), scaled(k, "k_norm.gamma")
    gate = lambda a, name: jax.nn.sigmoid(
        a @ w[f"{name}.0.weight"].T + w[f"{name}.0.bias"][None, None])
    # gates of a chunk are those of the mean of its tokens; a tail is not written
    whole = t // c * c
    mean = stored[:, :whole].reshape(b, -1, c, stored.shape[-1]).mean(2)
    first = (jnp.arange(t) % c == 0)[None, :, None]
    at = jnp.arange(t)[None, :, None]
    last = (at % c == c - 1) & (at < whole)
    spread = lambda a: jnp.pad(
        jnp.repeat(a, c, 1), [(0, 0), (0, t - whole), (0, 0)], constant_values=0.5)
    eta, alpha = (spread(gate(mean, n)) for n in ("to_momentum", "to_decay_factor"))
    gates = Gates(
        # the loss is a mean over features
        gate(stored, "to_adaptive_step") / v.shape[-1],
        jnp.where(last, jnp.log1p(-alpha), 0), jnp.where(first, jnp.log(eta), 0),
        applied=jnp.broadcast_to(last, eta.shape).astype(jnp.float32))
    where = Where(jnp.arange(t, dtype=jnp.int32)[None], None)
    memory, o = learn(Rule(net, SQUARES), q, k, v, gates, initial, where, chunk=t)
    if config.get("post_rmsnorm"):
        o = scaled(o, "multihead_rmsnorm.gamma")
    if h == 1:
        return o.reshape(b, t, -1), memory
    o = o * jax.nn.sigmoid(asked @ w["retrieve_gate.0.weight"].T)[..., None]
    return o.reshape(b, t, -1) @ w["combine_heads.weight"].T, memory
