"""Adapter for sea.npz: the estimate, its columns and keys, the output and the loss."""

from __future__ import annotations

from typing import Any, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from attn.sea import SEA
from attn.sparse import estimated

# specs/sea.md section 7: floats 2e-4, masks exact
FLOATS = ("performer_context", "estimated_probs_K", "sparse_probs", "context", "loss")
TOLERANCE = dict.fromkeys(FLOATS, 2e-4)
CNN = "attention_predictor_cnn/"
CAUSAL = {"norm_in": "0/module", "conv1": "1/module/net/0/module",
          "conv2": "1/module/net/2/module", "conv3": "1/module/net/5/module",
          "norm_out": "2/module"}
AROUND = {"conv1": "0/net/0", "conv2": "0/net/2", "conv3": "0/net/5"}


def _params(case, causal: bool) -> dict[str, Any]:
    """The arrays of the authors' modules under our names."""
    def of(name: str) -> dict[str, np.ndarray]:
        weight, bias = (np.asarray(case[f"params/{name}/{part}"])
                        for part in ("weight", "bias"))
        if weight.ndim == 1:
            return {"scale": weight, "bias": bias}
        if weight.ndim == 2:  # [out,in]
            return {"kernel": weight.T, "bias": bias}
        # [out,in,T,K]; of five taps in causal order the last two see the future
        weight = weight[:, :, :3] if causal else weight
        return {"kernel": weight.transpose(2, 3, 1, 0), "bias": bias}

    decoder = {ours: of(CNN + theirs)
               for ours, theirs in (CAUSAL if causal else AROUND).items()}
    params = {
        "enc": of("attention_predictor_enc/0"),
        "enc_norm": of("attention_predictor_enc/1"),
        "gate": of("attention_predictor_dec_scaler/0"),
        "decoder": decoder | {"columns": of("attention_predictor_dec_row/0")},
    }
    if causal:
        params["place"] = case["params/v_eye_learned_causal"][0, 0]
    fixed = {"directions": case["performer_projection"]}
    return jax.tree.map(jnp.asarray, {"params": params, "fixed": fixed})


def run(case: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """What the layer makes of q, k, v [B,T,H,D] beside its teacher."""
    config = case["config"]
    causal, heads = config["causal"], config["heads"]
    q, k, v = (jnp.asarray(case[name]) for name in "qkv")
    valid = jnp.asarray(case["key_valid"])
    b, t, h, d = q.shape
    module = SEA(
        columns=config["K"], keep=config["k"], causal=causal, length=t,
        scale=1.0 if config["q_prescaled"] else None, count_padding=True)
    variables = _params(case, causal)

    def all_of_it(module, q, k, v):
        estimate, _ = module._estimate(q, k, v, valid, None)
        chosen = module.selected(estimate)
        rank = jnp.cumsum(valid, 1) - 1
        keys = estimated.stretched(chosen, estimate.length, rank)
        see = valid[:, None, None] & (estimate.length > 0)[:, None, :, None]
        see = see & (jnp.tril(jnp.ones((t, t), bool))[None, None] if causal else True)
        # values of one position each make the output the weights
        eye = jnp.broadcast_to(jnp.eye(t)[None, :, None], (b, t, h, t))
        plain = module.clone(gated=False, parent=None, name=None)
        p = plain._context(estimate, q, k, eye).swapaxes(1, 2)
        number = estimated.number_selected(estimate.length, heads, config["K"],
                                           config["k"])
        return {
            "performer_context": estimate.context.swapaxes(1, 2),
            "estimated_probs_K": module.shares(estimate).swapaxes(1, 2),
            "selected_K": chosen.swapaxes(1, 2), "mask_T": keys & see,
            "sparse_probs": p * estimate.gates[..., :1].swapaxes(1, 2),
            "per_item_top_k": (number[..., None] if causal
                               else number.max(1)[:, None, None]),
            # below the door, at which keys of padding, which count here, become 0
            "context": module._context(estimate, q, k, v).reshape(b, t, -1),
            "loss": module._distil(
                estimate, q, k, v, jnp.asarray(case["teacher_scores"]),
                jnp.asarray(case["teacher_context"]).reshape(b, t, h, -1)),
        }

    found = jax.jit(lambda *args: module.apply(variables, *args, method=all_of_it))
    return {name: np.asarray(a, case[name].dtype) for name, a in found(q, k, v).items()}
