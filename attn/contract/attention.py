"""Attention: what every attention is, and what else it may say of itself.

An attention is a frozen dataclass, or a linen module if it learns something, with

    __call__(q, k, v, *, x=None, segments=None)     all tokens at once
    init_state(size, q, k, v, *, x=None)            an empty memory for `size` tokens
    step(state, q, k, v, *, x=None, segments=None)  the next tokens

The last two are there if it has a causal order: absence of `step` is the statement.
Whatever else layers and models want to know has a default in `Attention`, which a class
may inherit, and changes by an attribute of the same name. Nobody has to: `said` gives
the same default for a class that has nothing but its methods. What inherits never reads
padding (`attn/contract/padding.py`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

from attn.contract.eager import compiled_outside
from attn.contract.explicit import on_automatic_axes
from attn.contract.padding import guard, padding_unread
from attn.contract.states import sized, stateful


class TemplateRow(NamedTuple):
    """A row of the unified template (`attn/template.py`): where the matrix A comes
    from; the cost of applying it in tokens L, channels D, features m, rank r, window or
    kernel w, block b; its power of L, of a call on all tokens with default settings (a
    logarithm counts as 0)."""

    kind: str
    cost: str
    power: float


STATIC, FOURIER, CONV = "static, dense", "static, Fourier", "static, convolution"
EXACT, FACTORS = "kernel, exact", "kernel, in factors"
LOW, MASKED, RECURRENT = "low rank", "masked", "recurrent or pooling"


class Attention:
    """What an attention says of itself, unless its class says otherwise.

    causal: no token sees a later one; where it is False there is no stream.
    crosses: without an order, keys may be of another sequence than queries are. mixes:
    without an order, queries have a part in what others get; what follows from both
    stands in `attn/contract/patterns.py`.
    needs_query, needs_key: it reads q, and k; if not, `MultiHead` makes no projection
    and hands over the shape only. feature_dim: the width D that q and k are projected
    to, None for E/H. out_norm, out_gate, gate_rank: what it asks `MultiHead` to do to
    its output.
    noise: fields that make a call with a `key` random, if they are not 0.
    row: its row of the template.
    parameter_axes: the axes of each parameter, {end of its path: letters}: H heads and
    F channels within a layer can be split over devices; E, D, R (a rank), T (tokens)
    and W (taps) are not (`models/placement.py`).
    ahead: what it reads is chosen by data, and the choice, which has no gradient, may
    follow tokens behind the query: so many, up to the end of its own block; 0 for none,
    None for all tokens of the row.
    weightless: why there is no matrix A with o = A v, for a view; None if there is one.
    text_block: it reads a token of its own behind every so many tokens of a text, which
    `interleave` puts there; None for none.
    of_layer(n, layers): this attention as number n of the `layers` layers of a model
    that have one of its class; None if it does not ask. shared_by_layers(states,
    tokens): what these layers share in a step of so many tokens, made of their states
    before the first of them; each finds it in its state, in a field `shared`, and
    leaves there what the next one gets. None for nothing (`models/carried.py`).
    """

    causal: Any = True
    crosses: Any = True
    mixes: Any = False
    needs_query: bool = True
    needs_key: bool = True
    feature_dim: Any = None
    out_norm: Any = None
    out_gate: Any = None
    gate_rank: Any = None
    noise: tuple[str, ...] = ("dropout",)
    row: TemplateRow | None = None
    parameter_axes: dict[str, str] = {}
    ahead: Any = 0
    weightless: Any = None
    text_block: Any = None
    of_layer: Any = None
    shared_by_layers: Any = None

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        # around every method that reads tokens, the last one outermost
        door = on_automatic_axes, padding_unread
        guard(cls, ("__call__",), *door, compiled_outside)
        guard(cls, ("step",), *door, stateful, compiled_outside)
        guard(cls, ("init_state",), sized)

    def interleave(self, tokens, segments, end, last, own: int) -> tuple:
        """A text with the tokens `own` that this attention wants in it -> tokens,
        segments [B,T'], index [B,T] of each token of the text. tokens, segments [B,T];
        end, last [B]: of the state that they follow, None at the beginning."""
        raise NotImplementedError(f"{type(self).__name__} has no tokens of its own")

    def check_stream(self) -> None:
        """Raises NotImplementedError if it is used without a causal order."""
        if not self.causal:
            raise NotImplementedError(
                "step: causal=False lets tokens see later ones: no stream"
            )

    def _how(self: Any, q: Any) -> dict[str, Any]:
        """What the linear recurrence is told; scale: of q.k, by default D^-0.5, and 1
        where there is no such field."""
        scale = getattr(self, "scale", 1.0)
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        return {
            "chunk": self.chunk, "scale": scale, "axis": self.axis,
            "implementation": self.implementation,
        }


def said(attention: Any, name: str) -> Any:
    """What an attention says, or the default if its class does not know the name."""
    return getattr(attention, name, getattr(Attention, name))


def streams(attention: Any) -> bool:
    """Whether it has the methods of a stream."""
    return hasattr(attention, "init_state") and hasattr(attention, "step")


def takes_rope(attention: Any) -> bool:
    """Whether it turns q and k itself: it has a field `rope`."""
    return "rope" in getattr(attention, "__dataclass_fields__", {})


def noisy(attention: Any) -> bool:
    """Whether a call with a `key` is random."""
    # a rate of 0 is no noise
    return any(getattr(attention, name, 0) for name in said(attention, "noise"))
