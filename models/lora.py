"""LoRA (Hu et al., 2021) arXiv:2106.09685: a model is changed by small matrices.

Beside a matrix W [in,out] stands a product of rank r, and only that is trained:

    y = x W + alpha / r (x A) B,   A [in,r] drawn at random, B [r,out] 0 at first

LongLoRA (Chen et al., 2023, arXiv:2309.12307) found that longer texts need embeddings
and norms to be trained as well ("LoRA+" there), which are small: `extra`.

    lora = LoRA(extra=("embed", "norm"))
    model = Adapted(LM(...), lora)                   # params: {"base", "adapters"}
    optimizer = lora.optimizer(optax.adamw(2e-5))    # of these, what is trained
    merged = lora.merge(base, adapters)              # parameters of the model itself
    y = lora.apply(model, base, adapters, tokens)    # or unmerged, (x A) B by itself
    lora.save(folder, base, adapters)                # PEFT's files, and `load`

Any model of linen modules will do: a matrix is a `kernel`, and its module's name says
whether it is one of the targets.
"""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from models.placement import letters_of

Tree = Any
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


@dataclasses.dataclass(frozen=True)
class LoRA:
    """LoRA (Hu et al., 2021) arXiv:2106.09685: which matrices get an A and a B.

    rank r, alpha; targets: names of modules with a kernel, such as q, k, v and out of
    `MultiHead`. extra: whole parameters that are trained too, those of modules in whose
    path one of these words stands (LongLoRA: "embed", "norm").

    Adapters are {path of the module: {"a": [in...,r], "b": [r,out...]}}, in the axes of
    its kernel, float32.
    """

    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = ("q", "k", "v", "out")
    extra: tuple[str, ...] = ()

    def __post_init__(self):
        if self.rank < 1:
            raise ValueError(f"LoRA: rank={self.rank}: expected 1 or more")
        for name in ("targets", "extra"):
            if isinstance(getattr(self, name), str):
                raise ValueError(
                    f"LoRA: {name}={getattr(self, name)!r}: expected a tuple of names")

    @property
    def scale(self) -> float:
        """alpha / r."""
        return self.alpha / self.rank

    def init(self, key: jax.Array, params: Tree) -> Tree:
        """Adapters of all targets in params, which change nothing yet. ValueError if
        there are none."""
        kernels = self._kernels(params)
        if not kernels:
            raise ValueError(
                f"targets={self.targets}: expected names of modules with a kernel: "
                f"{sorted({path.split('/')[-1] for path in _kernels(params)})}")
        adapters = {}
        for own, (path, kernel) in zip(jax.random.split(key, len(kernels)),
                                       sorted(kernels.items())):
            n = _inputs(path, kernel.shape)
            # PEFT's: uniform within 1 / sqrt(in)
            bound = math.prod(kernel.shape[:n]) ** -0.5
            a = jax.random.uniform(
                own, (*kernel.shape[:n], self.rank), jnp.float32, -bound, bound)
            b = jnp.zeros((self.rank, *kernel.shape[n:]), jnp.float32)
            adapters[path] = {"a": a, "b": b}
        return adapters

    def merge(self, params: Tree, adapters: Tree, sign: float = 1.0) -> Tree:
        """params with alpha / r A B in each kernel; sign=-1 takes it out again."""
        unknown = sorted(set(adapters) - set(_kernels(params)))
        if unknown:
            raise ValueError(f"adapters of {unknown}: the parameters have no such "
                             "kernels")

        def one(path, a):
            found = adapters.get(_module(path)) if _leaf(path) == "kernel" else None
            if found is None:
                return a
            more = jnp.tensordot(found["a"], found["b"], 1) * (sign * self.scale)
            return (a.astype(jnp.float32) + more).astype(a.dtype)

        return jax.tree_util.tree_map_with_path(one, params)

    def apply(
        self, model: nn.Module, params: Tree, adapters: Tree, *args, **named
    ) -> Any:
        """model.apply({"params": params}, *args, **named), and (x A) B beside each x W:
        nothing of a kernel's size is made. NotImplementedError for a model that scans
        over its layers, whose modules are not told apart."""
        used = set()

        def beside(call, args, kwargs, context):
            y = call(*args, **kwargs)
            path = "/".join(context.module.path)
            if context.method_name != "__call__" or path not in adapters:
                return y
            used.add(path)
            a, b = (adapters[path][n].astype(y.dtype) for n in "ab")
            # [...,in] [in,r] [r,out]
            low = jnp.tensordot(args[0].astype(y.dtype), a, a.ndim - 1)
            return y + jnp.tensordot(low, b, 1) * self.scale

        with nn.intercept_methods(beside):
            y = model.apply({"params": params}, *args, **named)
        if missed := sorted(set(adapters) - used):
            raise NotImplementedError(
                f"adapters of {missed[0]} and {len(missed) - 1} others met no module: "
                "expected a model without scan, or `merge`")
        return y

    def optimizer(
        self, inner: optax.GradientTransformation
    ) -> optax.GradientTransformation:
        """`inner` for adapters and `extra`, of parameters {"base": ..., "adapters":
        ...}; the rest stays as it is, without moments."""
        return optax.multi_transform(
            {"trained": inner, "fixed": optax.set_to_zero()}, self.labels)

    def labels(self, params: Tree) -> Tree:
        """"trained" or "fixed" for each parameter of {"base": ..., "adapters": ...}."""
        def label(path, _):
            names = _names(path)
            whole = "adapters" in names or self._is_extra("/".join(names[:-1]))
            return "trained" if whole else "fixed"

        return jax.tree_util.tree_map_with_path(label, params)

    def save(
        self, folder: Any, params: Tree, adapters: Tree,
        names: tuple[tuple[str, str], ...] = LLAMA,
    ) -> None:
        """Writes adapters and what `extra` names in PEFT's format, into two files.
        names: (pattern, replacement) of module paths; without a match dots for slashes.
        """
        folder = pathlib.Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        arrays = {}
        for path, pair in adapters.items():
            a, b = (np.asarray(pair[n]) for n in "ab")
            # torch keeps matrices as [out,in]
            arrays[f"{_peft(path, names)}.lora_A.weight"] = a.reshape(-1, self.rank).T
            arrays[f"{_peft(path, names)}.lora_B.weight"] = b.reshape(self.rank, -1).T
        modules = set()
        for path, a in self._extras(params):
            modules.add(_peft(_module(path), names).rpartition(".")[2])
            a = np.asarray(a)
            arrays[_weight(path, names)] = a.T if _leaf(path) == "kernel" else a
        # the file has bytes, and knows nothing of transposes
        arrays = {name: np.ascontiguousarray(a) for name, a in arrays.items()}
        _files().save_file(arrays, folder / WEIGHTS, metadata={"format": "pt"})
        last = {_peft(path, names).rpartition(".")[2] for path in adapters}
        config = {
            "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": self.rank,
            "lora_alpha": self.alpha, "lora_dropout": 0.0, "bias": "none",
            "target_modules": sorted(last), "fan_in_fan_out": False,
            "modules_to_save": sorted(modules) or None, "inference_mode": True,
            "base_model_name_or_path": None,
        }
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")

    def load(
        self, folder: Any, params: Tree, names: tuple[tuple[str, str], ...] = LLAMA
    ) -> tuple[Tree, Tree]:
        """(params, adapters) of a folder that PEFT or `save` wrote: adapters of the
        targets, and params with what `extra` names replaced. ValueError for files of
        another rank or alpha, or of other modules or shapes."""
        folder = pathlib.Path(folder)
        config = json.loads((folder / CONFIG).read_text())
        for name, own in (("r", self.rank), ("lora_alpha", self.alpha)):
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
        for path, kernel in self._kernels(params).items():
            n, at = _inputs(path, kernel.shape), _peft(path, names)
            fan_in, fan_out = kernel.shape[:n], kernel.shape[n:]
            a = take(f"{at}.lora_A.weight", (self.rank, math.prod(fan_in)))
            b = take(f"{at}.lora_B.weight", (math.prod(fan_out), self.rank))
            adapters[path] = {"a": a.T.reshape(*fan_in, self.rank),
                              "b": b.T.reshape(self.rank, *fan_out)}
        found = {_full(path): (path, a.shape) for path, a in self._extras(params)}

        def replaced(path, a):
            if _full(path) not in found:
                return a
            turned = _leaf(path) == "kernel"
            new = take(_weight(path, names), a.shape[::-1] if turned else a.shape)
            return (new.T if turned else new).astype(a.dtype)

        params = jax.tree_util.tree_map_with_path(replaced, params)
        if left := sorted(set(arrays) - read):
            raise ValueError(
                f"{folder}: {left[0]} and {len(left) - 1} others belong to no target: "
                "expected other targets or extra")
        return params, adapters

    def _kernels(self, params: Tree) -> dict[str, Any]:
        """The kernels of targets by the path of their module."""
        return {path: a for path, a in _kernels(params).items()
                if path.rpartition("/")[2] in self.targets}

    def _is_extra(self, path: str) -> bool:
        return any(word in path for word in self.extra)

    def _extras(self, params: Tree) -> list:
        return [(path, a) for path, a in jax.tree_util.tree_leaves_with_path(params)
                if self._is_extra(_module(path))]


class Adapted(nn.Module):
    """A model with adapters: parameters {"base": those of the model, "adapters": of
    `LoRA.init`}, merged in each call, and the methods of the model."""

    model: Any
    lora: LoRA

    @nn.compact
    def __call__(self, *args, **named):
        """What the model gives."""
        model = self.model.clone(parent=None)

        def base(key):
            return model.init(key, *args, **named)["params"]

        params = self.param("base", base)
        adapters = self.param("adapters", self.lora.init, params)
        merged = self.lora.merge(params, adapters)
        return model.apply({"params": merged}, *args, **named)

    def init_state(self, size: int, x: Any) -> Any:
        """The model's."""
        return self.model.clone(parent=None).init_state(size, x)


def _names(path: Any) -> list[str]:
    return [str(getattr(key, "key", key)) for key in path]


def _full(path: Any) -> str:
    return "/".join(_names(path))


def _module(path: Any) -> str:
    """The path of the module of a parameter."""
    return "/".join(_names(path)[:-1])


def _leaf(path: Any) -> str:
    return _names(path)[-1]


def _kernels(params: Tree) -> dict[str, Any]:
    """All kernels by the path of their module."""
    return {_module(path): a for path, a in
            jax.tree_util.tree_leaves_with_path(params) if _leaf(path) == "kernel"}


def _inputs(path: str, shape: tuple[int, ...]) -> int:
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


def _peft(path: str, names: tuple[tuple[str, str], ...]) -> str:
    """The name of a module in PEFT's files."""
    for pattern, other in names:
        if re.match(pattern, path):
            return PREFIX + re.sub(pattern, other, path)
    return PREFIX + path.replace("/", ".")


def _weight(path: Any, names: tuple[tuple[str, str], ...]) -> str:
    """The name of a parameter in PEFT's files; torch calls most of them weights."""
    leaf = _leaf(path)
    leaf = "weight" if leaf in ("kernel", "scale", "embedding") else leaf
    return f"{_peft(_module(path), names)}.{leaf}"
