"""Adapter for razor.npz: scores of heads, the compensation token, scopes of ALiBi."""

from __future__ import annotations

from typing import Any, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from attn import razor
from attn.razor import Razor


def run(case: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Which part it is, its arrays say."""
    config = case["config"]
    f = next(f for word, f in (
        ("block", scores), ("n_sink", compensation), ("eps", alibi)) if word in config)
    return {name: np.asarray(a) for name, a in f(case, config).items()}


def scores(case, config):
    induction, echo = razor.head_scores(jnp.asarray(case["attn"]), config["block"])
    own = [razor.by_key_head(a, config["K"]) for a in (induction, echo)]
    kept = razor.retrieval_heads(
        *own, config["induction_ratio"], config["echo_ratio"])
    return {"induction": induction, "echo": echo, "induction_kv": own[0],
            "echo_kv": own[1], "retrieval_kv": kept}


def compensation(case, config):
    q, k, v = (jnp.asarray(case[name]) for name in "qkv")
    heads = config["retrieval_kv"]
    policy = Razor(
        retrieval=tuple(n for n, whole in enumerate(heads) if whole),
        sinks=config["n_sink"], buffer=config["buffer"], share=0.0)
    s = k.shape[1]
    wide = jnp.broadcast_to(q, (*k.shape[:2], *q.shape[2:]))
    # the last token asks: all but it are the prompt
    state = policy.init_state(s, wide, k, v)
    step = jax.jit(policy.step)
    state, _ = step(state, *(a[:, :-1] for a in (wide, k, v)))
    state, out = step(state, q, k[:, -1:], v[:, -1:])
    few = [n for n, whole in enumerate(heads) if not whole]
    zeros = np.zeros((k.shape[0], len(heads), k.shape[3]))
    means = {"k_comp": zeros.copy(), "v_comp": zeros.copy()}
    count = np.zeros(len(heads))
    if few:
        rest = state.few.rest
        for name, a in (("k_comp", rest.k), ("v_comp", rest.v)):
            means[name][:, few] = a
        count[few] = int(rest.many[0])
    return {**means, "n_dropped": count, "out": out}


def alibi(case, config):
    given = [case[name] for name in ("Wq", "Wk", "gamma", "beta", "slopes")]
    return {"spectral_norm": razor.spectral_norms(*given[:2]),
            "scope": razor.scopes(*given, eps=config["eps"])}
