"""Adapter for circuits.npz: path patching in a GPT-2, and scores of given maps.

The file lacks the biases of queries, keys and values, `attn.c_attn.bias`, which its
network has (z0 of the first token is not its value without one). They are found from
what is stored of the clean texts, logits, z0 and the last layer's weights: far more
numbers than unknown ones, which only the true biases fit. (The keys' change nothing.)
Scores and differences, of corrupted and patched texts, are then held independently.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import tempfile
from typing import Any, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.flatten_util import ravel_pytree

from experiments.measure.heads import kinds
from experiments.measure.patching import Receivers, scores
from models.view import look


BIAS = "transformer.h.{}.attn.c_attn.bias"


def run(case: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Which part it is, the config says."""
    with jax.enable_x64(True):
        return head_scores(case) if "kind" in case["config"] else patching(case)


def head_scores(case):
    config = case["config"]
    case["ids"]  # random tokens, of which the maps are
    pattern = jnp.asarray(case["pattern"])[None]
    found = kinds(pattern, config["period"], int(config["bos"]))
    return {name: np.asarray(a[0]) for name, a in found.items()}


def patching(case):
    config = case["config"]
    model, params = loaded(case, config)
    if f"w/{BIAS.format(0)}" not in case.keys():
        params = fitted(model, params, case, config["L"] - 1)
    clean, corrupt, answers = (
        jnp.asarray(case[name]) for name in ("clean", "corrupt", "answers"))
    logits, seen = jax.jit(lambda p: look(
        model, p, clean, read=["0/z", f"{config['L'] - 1}/pattern"]))(params)
    found = scores(model, params, clean, corrupt, answers, receivers(config),
                   config["position"], not config["freeze_mlps"])
    missing = config["missing"]
    return {
        "logits_clean": logits, "z0": seen["0/z"],
        "pattern_last": seen[f"{config['L'] - 1}/pattern"],
        "score": np.nan_to_num(found["score"], nan=missing),
        "patched_logit_diff": np.nan_to_num(found["patched"], nan=missing),
        "clean_diff": found["clean"], "corrupt_diff": found["corrupt"],
    }


def fitted(model, params, case, last: int):
    """The parameters with biases of q and v that give the stored arrays, by
    Levenberg's method."""
    # with forward derivatives
    model = model.clone(attention=tuple(
        dataclasses.replace(a, implementation="dense") for a in model.attention))
    clean = jnp.asarray(case["clean"])
    names = {"logits": "logits_clean", "0/z": "z0", f"{last}/pattern": "pattern_last"}
    flat = traverse_util.flatten_dict(params)
    paths = sorted(p for p in flat if p[-2:] in (("q", "bias"), ("v", "bias")))
    start, back = ravel_pytree([flat[p] for p in paths])

    def made(x):
        return traverse_util.unflatten_dict(flat | dict(zip(paths, back(x))))

    @jax.jit
    def error(x):
        _, seen = look(model, made(x), clean, read=list(names))
        parts = [seen[own] - jnp.asarray(case[name]) for own, name in names.items()]
        return jnp.concatenate([part.ravel() for part in parts])

    slope, x, damping = jax.jit(jax.jacfwd(error)), start, 1e-2
    for _ in range(60):
        r, a = error(x), slope(x)
        step = jnp.linalg.solve(
            a.T @ a + damping * jnp.eye(x.size, dtype=x.dtype), a.T @ r)
        if jnp.linalg.norm(error(x - step)) < jnp.linalg.norm(r):
            x, damping = x - step, damping / 10
        else:
            damping = damping * 10
    return made(x)


def receivers(config) -> Receivers:
    """["resid_post", layer], or [layer, head] of each."""
    (first, *_), *_ = config["receivers"]
    if first == "resid_post":
        return Receivers(layer=config["receivers"][0][1])
    heads = tuple((n, h) for n, h in config["receivers"])
    return Receivers(heads, config["component"])


def loaded(case, config):
    """The weights through the loader of checkpoints, which reads float32 at most; what
    follows is float64."""
    from safetensors.numpy import save_file

    from models.checkpoint import load

    data = {
        "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"],
        "n_embd": config["E"], "n_head": config["H"], "n_layer": config["L"],
        "vocab_size": config["V"], "n_positions": config["T"],
        "layer_norm_epsilon": config["ln_eps"], "activation_function": "gelu_new",
    }
    names = [name for name in case.keys() if name.startswith("w/")]
    with tempfile.TemporaryDirectory() as folder:
        place = pathlib.Path(folder)
        (place / "config.json").write_text(json.dumps(data))
        tensors = {name[2:]: np.asarray(case[name], np.float32, order="C")
                   for name in names}
        for n in range(config["L"]):
            none = np.zeros(3 * config["E"], np.float32)
            tensors.setdefault(BIAS.format(n), none)
        save_file(tensors, place / "model.safetensors")
        model, params = load(place, dtype=jnp.float64)
    return model, jax.tree.map(lambda a: a.astype(jnp.float64), params)
