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
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from models import peft_files
from models.peft_files import (
    LLAMA, inputs_of, kernels_of, leaf_of, module_of, names_of
)

Tree = Any


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
                f"{sorted({path.split('/')[-1] for path in kernels_of(params)})}")
        adapters = {}
        for own, (path, kernel) in zip(jax.random.split(key, len(kernels)),
                                       sorted(kernels.items())):
            n = inputs_of(path, kernel.shape)
            # PEFT's: uniform within 1 / sqrt(in)
            bound = math.prod(kernel.shape[:n]) ** -0.5
            a = jax.random.uniform(
                own, (*kernel.shape[:n], self.rank), jnp.float32, -bound, bound)
            b = jnp.zeros((self.rank, *kernel.shape[n:]), jnp.float32)
            adapters[path] = {"a": a, "b": b}
        return adapters

    def merge(self, params: Tree, adapters: Tree, sign: float = 1.0) -> Tree:
        """params with alpha / r A B in each kernel; sign=-1 takes it out again."""
        unknown = sorted(set(adapters) - set(kernels_of(params)))
        if unknown:
            raise ValueError(f"adapters of {unknown}: the parameters have no such "
                             "kernels")

        def one(path, a):
            found = adapters.get(module_of(path)) if leaf_of(path) == "kernel" else None
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
            names = names_of(path)
            whole = "adapters" in names or self._is_extra("/".join(names[:-1]))
            return "trained" if whole else "fixed"

        return jax.tree_util.tree_map_with_path(label, params)

    def save(
        self, folder: Any, params: Tree, adapters: Tree, names: peft_files.Names = LLAMA
    ) -> None:
        """Writes adapters and what `extra` names in PEFT's format, into two files.
        names: (pattern, replacement) of module paths; without a match dots for slashes.
        """
        peft_files.save(
            folder, self.rank, self.alpha, adapters, self._extras(params), names)

    def load(
        self, folder: Any, params: Tree, names: peft_files.Names = LLAMA
    ) -> tuple[Tree, Tree]:
        """(params, adapters) of a folder that PEFT or `save` wrote: adapters of the
        targets, and params with what `extra` names replaced. ValueError for files of
        another rank or alpha, or of other modules or shapes."""
        return peft_files.load(folder, self.rank, self.alpha, params,
                               self._kernels(params), self._extras(params), names)

    def _kernels(self, params: Tree) -> dict[str, Any]:
        """The kernels of targets by the path of their module."""
        return {path: a for path, a in kernels_of(params).items()
                if path.rpartition("/")[2] in self.targets}

    def _is_extra(self, path: str) -> bool:
        return any(word in path for word in self.extra)

    def _extras(self, params: Tree) -> list:
        return [(path, a) for path, a in jax.tree_util.tree_leaves_with_path(params)
                if self._is_extra(module_of(path))]


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
