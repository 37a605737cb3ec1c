"""The stack of a network: blocks of a mixer and a gated MLP, one behind the other.

Layers that repeat share one program: their parameters are stacked, and a scan goes
through them.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from attn.layers import Layer
from models.placement import lay

INIT = nn.initializers.variance_scaling(1.0, "fan_in", "normal")


class SwiGLU(nn.Module):
    """SwiGLU (Shazeer, 2020) arXiv:2002.05202: (silu(x W) * x U) O, without bias."""

    hidden: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        """x [B,T,E] -> [B,T,E]."""
        dense = functools.partial(
            nn.Dense, use_bias=False, dtype=self.dtype, kernel_init=INIT
        )
        gate = nn.silu(dense(self.hidden, name="gate")(x))  # [B,T,E] [E,F]
        # (silu(x W) * x U) O: [B,T,F] [F,E]
        return dense(x.shape[-1], name="out")(gate * dense(self.hidden, name="up")(x))


class Block(nn.Module):
    """x + mixer(norm(x)), then x + SwiGLU(norm(x)); RMSNorm in float32."""

    mixer: Layer
    hidden: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, state=None, segments=None):
        """x [B,T,E] -> (state, x); the state stays None if none was given."""
        y = nn.RMSNorm(dtype=self.dtype, name="mixer_norm")(x)
        y = self.mixer(y, state, segments=segments)
        state, y = (None, y) if state is None else y
        x = lay(x + y, "BTE")
        if self.hidden:
            y = nn.RMSNorm(dtype=self.dtype, name="mlp_norm")(x)
            x = lay(x + SwiGLU(self.hidden, self.dtype, name="mlp")(y), "BTE")
        return state, x


@dataclasses.dataclass(frozen=True)
class Pattern:
    """The blocks of a stack as plain data, which flax neither binds nor names."""

    blocks: tuple[Block, ...]

    @property
    def period(self) -> int:
        """The shortest p such that the pattern is its first p entries, repeated."""
        n = len(self.blocks)
        return next(
            p for p in range(1, n + 1)
            if n % p == 0 and self.blocks == self.blocks[:p] * (n // p)
        )


class Layers(nn.Module):
    """A stack of blocks, stored as `layer_0`, `layer_1`, ...

    `scan` compiles one period of a repeating pattern and loops over it, `remat` keeps
    only the input of each layer for the backward pass; neither changes the parameters.
    """

    pattern: Pattern
    scan: bool = False
    remat: bool = False

    @nn.compact
    def __call__(self, x, states=None, segments=None):
        """x [B,T,E] -> (states, x)."""
        blocks, period = self.pattern.blocks, self.pattern.period
        repeats = len(blocks) // period
        if self.scan and repeats > 1 and states is None and not self.is_initializing():
            return None, self._scanned(x, segments, period)
        cls = nn.remat(Block) if self.remat and states is None else Block
        after = []
        for n, block in enumerate(blocks):
            bound = cls(block.mixer, block.hidden, block.dtype, name=f"layer_{n}")
            state, x = bound(x, None if states is None else states[n], segments)
            after.append(state)
        return (None if states is None else tuple(after)), x

    def _scanned(self, x, segments, period):
        blocks = self.pattern.blocks
        one = Layers(Pattern(blocks[:period]), remat=self.remat, parent=None)
        params = stack(self.variables["params"], period)  # leaves [repeats,...]
        repeats = len(blocks) // period
        keys = None
        if self.has_rng("dropout"):
            keys = jax.random.split(self.make_rng("dropout"), repeats)

        def body(x, at):
            params, key = at
            rngs = {} if key is None else {"dropout": key}
            return one.apply({"params": params}, x, None, segments, rngs=rngs)[1], None

        return jax.lax.scan(body, x, (params, keys))[0]


def check_layers(title: str, entries: Any) -> None:
    """ValueError unless every entry is what stands in a layer: an attention, such as
    `Softmax()`, or a `Layer` of its own."""
    if not isinstance(entries, tuple):
        raise ValueError(f"{title}={entries!r}: expected a tuple of attentions, such "
                         "as (Softmax(),) * 4")
    for n, entry in enumerate(entries):
        if isinstance(entry, type):
            raise ValueError(f"{title}[{n}] is the class {entry.__name__}: expected an "
                             f"instance, {entry.__name__}()")
        call = inspect.signature(type(entry).__call__) if callable(entry) else None
        takes = list(call.parameters)[1:4] if call else []
        if not isinstance(entry, Layer) and takes != ["q", "k", "v"]:
            raise ValueError(
                f"{title}[{n}]={entry!r}: expected an attention, such as Softmax()"
            )


def check_sizes(title: str, model: Any, names: str) -> None:
    """ValueError unless the fields `names` of a model are whole numbers from 1 on, or
    None."""
    for name in names.split():
        value = getattr(model, name)
        whole = isinstance(value, int) and not isinstance(value, bool)
        if value is not None and (not whole or value < 1):
            raise ValueError(f"{title}: {name}={value}: expected 1 or more")


def unbound(module: Any) -> Any:
    """A module as it was written down, without the parent and name flax gave it."""
    if not isinstance(module, nn.Module):
        return module
    fields = {
        f.name: unbound(getattr(module, f.name))
        for f in dataclasses.fields(module)
        if f.init and f.name not in ("parent", "name")
    }
    return type(module)(**fields, parent=None)


def stack(params: Any, period: int) -> Any:
    """{layer_0 .. layer_n} -> {layer_0 .. layer_p}, leaves with a leading n/p axis."""
    repeats = len(params) // period
    return {
        f"layer_{i}": jax.tree.map(
            lambda *leaves: jnp.stack(leaves),  # [n/p,...]
            *(params[f"layer_{r * period + i}"] for r in range(repeats)),
        )
        for i in range(period)
    }


def unstack(params: Any) -> Any:
    """The inverse of `stack`."""
    period = len(params)
    repeats = jax.tree.leaves(params)[0].shape[0]
    return {
        f"layer_{r * period + i}": jax.tree.map(lambda a: a[r], params[f"layer_{i}"])
        for r in range(repeats) for i in range(period)
    }
