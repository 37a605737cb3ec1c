"""PEFT's files: adapters of low rank as other libraries read and write them.

Two files in a folder, the weights in safetensors and a config in JSON. A module is
named after the Llama of transformers, and a matrix lies as torch keeps it, [out,in].
"""

from __future__ import annotations

import json
import math
import pathlib
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from models.placement import letters_of

Tree = Any
Names = tuple[tuple[str, str], ...]
# PEFT names a module after the Llama of transformers: ours, theirs
LLAMA = (
    (r"layers/layer_(\d+)/mixer/([qkv])$", r"model.layers.\1.self_attn.\2_proj"),
    (r"layers/layer_(\d+)/mixer/out$", r"model.layers.\1.self_attn.o_proj"),
    (r"layers/layer_(\d+)/mlp/(gate|up)$", r"model.layers.\1.mlp.\2_proj"),
    (r"layers/layer_(\d+)/mlp/out$", r"model.layers.\1.mlp.down_proj"),
    (r"layers/layer_(\d+)/mixer_norm$", r"model.layers.\1.input_layernorm"),
    (r"layers/layer_(\d+)/mlp_norm$", r"model.layers.\1.post_attention_layernorm"),
    (r"norm$", "model.norm"), (r"embed$", "model.embed_tokens"), (r"head$", "lm_head"),
)
PREFIX = "base_model.model."
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def save(
    folder: Any, rank: int, alpha: float, adapters: Tree, extras: list, names: Names
) -> None:
    """Writes adapters and other parameters, `extras` [(path, array)], in PEFT's format,
    into two files. names: (pattern, replacement) of module paths; without a match dots
    for slashes."""
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {}
    for path, pair in adapters.items():
        a, b = (np.asarray(pair[n]) for n in "ab")
        # torch keeps matrices as [out,in]
        arrays[f"{_peft(path, names)}.lora_A.weight"] = a.reshape(-1, rank).T
        arrays[f"{_peft(path, names)}.lora_B.weight"] = b.reshape(rank, -1).T
    modules = set()
    for path, a in extras:
        modules.add(_peft(module_of(path), names).rpartition(".")[2])
        a = np.asarray(a)
        arrays[_weight(path, names)] = a.T if leaf_of(path) == "kernel" else a
    # the file has bytes, and knows nothing of transposes
    arrays = {name: np.ascontiguousarray(a) for name, a in arrays.items()}
    _files().save_file(arrays, folder / WEIGHTS, metadata={"format": "pt"})
    last = {_peft(path, names).rpartition(".")[2] for path in adapters}
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank,
        "lora_alpha": alpha, "lora_dropout": 0.0, "bias": "none",
        "target_modules": sorted(last), "fan_in_fan_out": False,
        "modules_to_save": sorted(modules) or None, "inference_mode": True,
        "base_model_name_or_path": None,
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def load(
    folder: Any, rank: int, alpha: float, params: Tree, kernels: dict[str, Any],
    extras: list, names: Names,
) -> tuple[Tree, Tree]:
    """(params, adapters) of a folder that PEFT or `save` wrote: adapters of `kernels`
    by the path of their module, and params with `extras` [(path, array)] replaced.
    ValueError for files of another rank or alpha, or of other modules or shapes."""
    folder = pathlib.Path(folder)
    config = json.loads((folder / CONFIG).read_text())
    for name, own in (("r", rank), ("lora_alpha", alpha)):
        if config.get(name) != own:
            raise ValueError(f"{folder}: {name}={config.get(name)}: expected {own}")
    arrays, read = _files().load_file(folder / WEIGHTS), set()

    def take(name: str, shape: tuple[int, ...]):
        a = arrays.get(name)
        if a is None or a.shape != shape:
            raise ValueError(
                f"{folder}: {name} {None if a is None else a.shape}: expected "
                f"{shape}")
        read.add(name)
        return jnp.asarray(a)

    adapters = {}
    for path, kernel in kernels.items():
        n, at = inputs_of(path, kernel.shape), _peft(path, names)
        fan_in, fan_out = kernel.shape[:n], kernel.shape[n:]
        a = take(f"{at}.lora_A.weight", (rank, math.prod(fan_in)))
        b = take(f"{at}.lora_B.weight", (math.prod(fan_out), rank))
        adapters[path] = {"a": a.T.reshape(*fan_in, rank),
                          "b": b.T.reshape(rank, *fan_out)}
    found = {full(path): (path, a.shape) for path, a in extras}

    def replaced(path, a):
        if full(path) not in found:
            return a
        turned = leaf_of(path) == "kernel"
        new = take(_weight(path, names), a.shape[::-1] if turned else a.shape)
        return (new.T if turned else new).astype(a.dtype)

    params = jax.tree_util.tree_map_with_path(replaced, params)
    if left := sorted(set(arrays) - read):
        raise ValueError(
            f"{folder}: {left[0]} and {len(left) - 1} others belong to no target: "
            "expected other targets or extra")
    return params, adapters


def names_of(path: Any) -> list[str]:
    return [str(getattr(key, "key", key)) for key in path]


def full(path: Any) -> str:
    return "/".join(names_of(path))


def module_of(path: Any) -> str:
    """The path of the module of a parameter."""
    return "/".join(names_of(path)[:-1])


def leaf_of(path: Any) -> str:
    return names_of(path)[-1]


def kernels_of(params: Tree) -> dict[str, Any]:
    """All kernels by the path of their module."""
    return {module_of(path): a for path, a in
            jax.tree_util.tree_leaves_with_path(params) if leaf_of(path) == "kernel"}


def inputs_of(path: str, shape: tuple[int, ...]) -> int:
    """How many axes of a kernel are summed over: all but the last of one back to the
    width E of the model, else the first."""
    letters = letters_of(f"{path}/kernel", shape) or ""
    return len(shape) - 1 if letters.endswith("E") else 1


def _files() -> Any:
    """The library that reads and writes PEFT's files."""
    try:
        import safetensors.numpy
    except ImportError:
        raise ImportError(
            "adapters in files need safetensors: pip install 'attn[checkpoints]'"
        ) from None
    return safetensors.numpy


def _peft(path: str, names: Names) -> str:
    """The name of a module in PEFT's files."""
    for pattern, other in names:
        if re.match(pattern, path):
            return PREFIX + re.sub(pattern, other, path)
    return PREFIX + path.replace("/", ".")


def _weight(path: Any, names: Names) -> str:
    """The name of a parameter in PEFT's files; torch calls most of them weights."""
    leaf = leaf_of(path)
    leaf = "weight" if leaf in ("kernel", "scale", "embedding") else leaf
    return f"{_peft(module_of(path), names)}.{leaf}"
