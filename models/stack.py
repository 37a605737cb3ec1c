"""The stack of a network: blocks (`models/block.py`), one behind the other.

Layers that repeat share one program: their parameters are stacked, and a scan goes
through them.
"""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from attn.contract.attention import noisy
from attn.contract.view import VIEW
from attn.layers import Layer
from models import carried
from models.block import Block


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
    memory: a `CMR`, whose state stands behind those of the layers; with it a text is
    read segment by segment, in a call without states too: of every row at multiples of
    `segment` of its own sequence, wherever that begins, and however it comes in pieces.
    ValueError for dropout with a memory. plain: the pattern without numbers of layers,
    which say what states keep: a call without states loops over it. What else goes from
    layer to layer stands in `models/carried.py`.
    """

    pattern: Pattern
    scan: bool = False
    remat: bool = False
    memory: Any = None
    plain: Any = None

    @nn.compact
    def __call__(self, x, states=None, segments=None, within=False):
        """x [B,T,E] -> (states, x). within: no row goes beyond its segment of the
        memory before its last token."""
        if self.memory is not None:
            return self._remembering(x, states, segments, within)
        plain = self.pattern if self.plain is None else self.plain
        repeats = len(plain.blocks) // plain.period
        # a view speaks of single layers, which a loop does not have
        loops = self.scan and repeats > 1 and VIEW not in self.variables
        if loops and states is None and not self.is_initializing():
            return None, self._scanned(x, segments, plain)
        after, x = self._through(x, states, segments)
        return (None if states is None else after), x

    def _through(self, x, states, segments, reader=None, remat=None):
        """All layers, one behind the other -> (states, x)."""
        blocks, after = self.pattern.blocks, []
        remat = self.remat and states is None if remat is None else remat
        cls = nn.remat(Block) if remat else Block
        shared = carried.begin(blocks, states, x.shape[1])
        for n, block in enumerate(blocks):
            bound = cls(**_fields(block), name=f"layer_{n}")
            state = None if states is None else carried.given(block, states[n], shared)
            x = x if reader is None else reader.before(n, x)
            state, x = bound(x, state, segments)
            if reader is not None:
                reader.after(n, x)
            state, shared = carried.taken(block, state, shared)
            after.append(state)
        return tuple(after), x

    def _remembering(self, x, states, segments, within):
        """With a memory: pieces of at most a segment, in a loop -> (states, x)."""
        memory = self.memory  # bound: its parameters are under `memory`
        size, (_, t, _) = memory.segment, x.shape
        self._check_dropout()
        if self.is_initializing():  # the shapes alone
            x, segments = x[:, :size], None if segments is None else segments[:, :size]
        streamed = states is not None
        # rows that begin here have their first segment before them
        within |= self.is_initializing() or t <= (1 if streamed else size)
        states = self.init_states(t, x) if states is None else states
        if within:
            reader = carried.Reader(
                memory, len(self.pattern.blocks), states[-1], x, segments)
            after, x = self._through(x, states[:-1], segments, reader,
                                     self.remat and not streamed)
            x = jnp.pad(x, [(0, 0), (0, t - x.shape[1]), (0, 0)])
            return ((*after, reader.end()) if streamed else None), x
        if VIEW in self.variables:
            raise NotImplementedError(
                f"a view of {t} tokens: with a memory a text is read by segments of "
                f"{size}, expected at most as many and no state")
        one = Layers(self.pattern, memory=unbound(self.memory), parent=None)
        params = self.variables["params"]

        def piece(states, part):
            return one.apply({"params": params}, part[0], states, part[1], True)

        if streamed or segments is not None:
            piece = carried.parted(piece, size)
        if self.remat and not streamed:
            piece = jax.checkpoint(piece)
        states, x = carried.by_pieces(piece, states, (x, segments), size)
        return (states if streamed else None), x

    def _check_dropout(self) -> None:
        """ValueError for an attention that drops, which no step does."""
        noise = next((b.mixer.attention for b in self.pattern.blocks
                      if noisy(getattr(b.mixer, "attention", None))), None)
        if noise is not None and self.has_rng("dropout"):
            raise ValueError(
                f"a memory beside {type(noise).__name__} with dropout: a text is read "
                "in steps, which drop nothing, expected dropout=0 or no such key")

    def init_states(self, size: int, x: Any) -> tuple:
        """Empty memories for `size` tokens; x [B,T,E] gives shapes and dtype only."""
        states = tuple(
            block.mixer.init_state(size, x) for block in self.pattern.blocks)
        if self.memory is None:
            return states
        return (*states, carried.empty(self.memory, x))

    def _scanned(self, x, segments, plain):
        blocks, period = plain.blocks, plain.period
        one = Layers(Pattern(blocks[:period]), remat=self.remat, parent=None)
        # parameters, and what is fixed: leaves [repeats,...]
        variables = {name: stack(own, period) for name, own in self.variables.items()
                     if len(own) == len(blocks)}
        repeats = len(blocks) // period
        keys = None
        if self.has_rng("dropout"):
            keys = jax.random.split(self.make_rng("dropout"), repeats)

        def body(x, at):
            variables, key = at
            rngs = {} if key is None else {"dropout": key}
            return one.apply(variables, x, None, segments, rngs=rngs)[1], None

        return jax.lax.scan(body, x, (variables, keys))[0]


def _fields(block: Block) -> dict[str, Any]:
    """What a block was made of, for another one."""
    names = (f.name for f in dataclasses.fields(block))
    return {n: getattr(block, n) for n in names if n not in ("parent", "name")}


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
