"""Adapter for duoattention.npz: gates in training, two caches, the int4 cache."""

from __future__ import annotations

from typing import Any, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from attn import duo
from attn.cache import quantised
from attn.duo import Duo
from attn.softmax import Softmax


def run(case: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Which part it is, its arrays say."""
    config = case["config"]
    f = next(f for word, f in (
        ("chunks", decode), ("reg", train), ("group", quant)) if word in config)
    return {name: np.asarray(a) for name, a in f(case, config).items()}


def arrays(case, end=""):
    return tuple(jnp.asarray(case[name + end]) for name in "qkv")


def train(case, config):
    teacher, student = arrays(case, "_full"), arrays(case, "_stream")
    alpha, labels = jnp.asarray(case["alpha"]), jnp.asarray(case["label_mask"])
    sizes = {"sinks": config["sink"], "recent": config["recent"]}
    full = Softmax()(*teacher)
    mask = duo.streaming_mask(**sizes)
    t = full.shape[1]

    def loss(alpha, q):
        mix = duo.mixed(alpha, full, q, *student[1:], **sizes)
        flat = (a.reshape(*a.shape[:2], -1) for a in (full, mix))
        parts = duo.distillation(*flat, labels), duo.regularisation(alpha)
        return parts[0] + config["reg"] * parts[1], (parts, mix)

    (total, (parts, mix)), grads = jax.value_and_grad(
        loss, (0, 1), has_aux=True)(alpha, student[0])
    return {
        "streaming_mask": mask(0, *np.ogrid[:t, :t]), "full_out": full,
        "stream_out": Softmax(mask=mask)(*student), "mix_out_official": mix,
        "mix_out_paper": duo.mixed(
            alpha, full, *student, **sizes, full_source="student"),
        "distill_loss": parts[0], "reg_loss": parts[1], "loss": total,
        "grad_alpha": grads[0], "grad_q_stream": grads[1],
    }


def decode(case, config):
    q, k, v = arrays(case)
    whole = tuple(n for n, kept in enumerate(config["retrieval_head"]) if kept)
    policy = Duo(retrieval=whole, sinks=config["sink"], recent=config["recent"])
    first = config["chunks"][0]
    state = policy.init_state(q.shape[1], *(a[:, :first] for a in (q, k, v)))
    step, outs, at = jax.jit(policy.step), [], 0
    for n in config["chunks"]:
        state, o = step(state, *(a[:, at:at + n] for a in (q, k, v)))
        outs.append(o)
        at += n
    few = state.few
    order = np.argsort(np.asarray(few.pos[..., 0]), axis=1)[..., None, None]
    return {"out": jnp.concatenate(outs, 1),
            "stream_k_final": np.take_along_axis(np.asarray(few.k), order, 1),
            "stream_v_final": np.take_along_axis(np.asarray(few.v), order, 1)}


def quant(case, config):
    codes = quantised.int4(jnp.asarray(case["x"]), config["group"])
    return {"packed": codes.code, "scale": codes.scale, "zero": codes.least,
            "deq": quantised.from_int4(codes, config["group"])}
