"""Adapter for positional.npz: both networks, their first attention, all gradients."""

from __future__ import annotations

from typing import Any, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from models.positional import PositionalTransformer, positional, standard


class Gradients:
    """The spec's bound of gradients, for those of weights too, whatever their names."""

    def get(self, name: str, default: float) -> float:
        """The bound of an array."""
        is_gradient = name == "grad_x" or name.endswith((".weight", ".bias"))
        return 1e-4 if is_gradient else default


TOLERANCE = Gradients()


def run(case: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """What the arrays of the case ask for."""
    config = case["config"]
    n, scratch, own = config["n"], config["extra"], config["positional"]
    sizes = {"width": config["E"], "heads": config["H"], "hidden":
             config["mlp_hidden"], "depth": config["mlp_layers"]}
    model: PositionalTransformer = (positional if own else standard)(
        n, scratch, config["layers"], **sizes)
    # of the standard one, positions stand in x already
    model = model.clone(onehot=0)
    assert (case["p"] == np.eye(n + scratch)).all()
    weights = {name[2:]: case[name] for name in case if name.startswith("w/")}
    params = _params(weights, config)

    def attended(params, x):
        out, kept = model.apply(
            params, x, mutable=["intermediates"],
            capture_intermediates=lambda m, method: method == "__call__" and (
                m.name in ("encoding", "mixer")))
        return out, kept["intermediates"]

    f = jax.jit(lambda params, x: model.apply(params, x))
    x = jnp.asarray(case["x"])
    out, back = jax.vjp(f, params, x)
    grads, grad_x = back(jnp.asarray(case["cot"]))
    kept = jax.jit(attended)(params, x)[1]
    found = {
        "out": out, "grad_x": grad_x,
        "attn0_in": kept["encoding"]["__call__"][0],
        "attn0_out": kept["layer_0"]["mixer"]["__call__"][0],
    }
    found |= {f"gw/{name}": a for name, a in _weights(grads, config).items()}
    return {name: np.asarray(a) for name, a in found.items()}


def _names(config) -> dict[str, str]:
    """The official name of each Linear, by where ours lies."""
    found = {"encoding": "encoding", "decoding": "decoding"}
    for layer in range(config["layers"]):
        for n in range(config["mlp_layers"]):
            official = f"transformer_layers.{layer}.mlp.mlp.{2 * n}"
            found[f"layer_{layer}/mlp_{n}"] = official
    return found


def _at(tree, path: str):
    for word in path.split("/"):
        tree = tree[word]
    return tree


def _params(weights, config) -> Any:
    """Ours, of torch's weights [out,in]."""
    heads, e = config["H"], config["E"]
    params: dict[str, Any] = {f"layer_{n}": {} for n in range(config["layers"])}
    for ours, official in _names(config).items():
        own = {"Dense_0": {"kernel": weights[f"{official}.weight"].T,
                           "bias": weights[f"{official}.bias"]}}
        above, _, last = ours.rpartition("/")
        (params[above] if above else params)[last] = own
    for n in range(config["layers"]):
        at = f"transformer_layers.{n}.attn"
        w, b = (weights[f"{at}.qk_proj.{kind}"] for kind in ("weight", "bias"))
        # rows of a head: first those of q, then those of k
        w, b = w.reshape(heads, 2, -1, w.shape[1]), b.reshape(heads, 2, -1)
        kernels = w.transpose(1, 3, 0, 2)  # [2,in,H,d]
        v, o = weights[f"{at}.v_proj.weight"], weights[f"{at}.o_proj.weight"]
        mixer: dict[str, Any] = {
            "v": {"kernel": v.T.reshape(e, heads, -1),
                  "bias": weights[f"{at}.v_proj.bias"].reshape(heads, -1)},
            "out": {"kernel": o.T.reshape(heads, -1, e),
                    "bias": weights[f"{at}.o_proj.bias"]},
        }
        if config["positional"]:
            params[f"layer_{n}"]["attention"] = {
                "query": kernels[0], "key": kernels[1], "query_bias": b[:, 0],
                "key_bias": b[:, 1]}
        else:
            mixer |= {name: {"kernel": kernels[i], "bias": b[:, i]}
                      for i, name in enumerate("qk")}
        params[f"layer_{n}"]["mixer"] = mixer
    return {"params": jax.tree.map(jnp.asarray, params)}


def _weights(params, config) -> dict[str, np.ndarray]:
    """The way back: arrays in torch's names and shapes."""
    params, e, found = params["params"], config["E"], {}
    for ours, official in _names(config).items():
        own = _at(params, ours)["Dense_0"]
        found[f"{official}.weight"] = own["kernel"].T
        found[f"{official}.bias"] = own["bias"]
    for n in range(config["layers"]):
        at, mixer = f"transformer_layers.{n}.attn", params[f"layer_{n}"]["mixer"]
        if config["positional"]:
            own = params[f"layer_{n}"]["attention"]
            kernels = np.stack([own["query"], own["key"]])
            biases = np.stack([own["query_bias"], own["key_bias"]], 1)
        else:
            kernels = np.stack([mixer[c]["kernel"] for c in "qk"])
            biases = np.stack([mixer[c]["bias"] for c in "qk"], 1)
        w = kernels.transpose(2, 0, 3, 1)
        found |= {
            f"{at}.qk_proj.weight": w.reshape(-1, w.shape[-1]),
            f"{at}.qk_proj.bias": biases.reshape(-1),
            f"{at}.v_proj.weight": mixer["v"]["kernel"].reshape(e, -1).T,
            f"{at}.v_proj.bias": mixer["v"]["bias"].reshape(-1),
            f"{at}.o_proj.weight": mixer["out"]["kernel"].reshape(-1, e).T,
            f"{at}.o_proj.bias": mixer["out"]["bias"],
        }
    return found
