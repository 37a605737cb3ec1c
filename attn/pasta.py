"""PASTA (Zhang et al., 2023) arXiv:2311.02262: chosen heads look where they are told.

Someone marks what matters in a prompt, the spans Gamma. In chosen heads every other
token of the prompt then counts alpha times as much, in prompt and answer alike:

    logits_ij += log alpha    for j < L outside of Gamma,   L the length of the prompt

and nothing else changes. AutoPASTA (Zhang et al., 2024, arXiv:2409.10790) lets the
model find the spans itself: it is asked for the sentence that holds the answer, the
sentence of the context nearest to what it says is marked, and the question is asked
again. (Its code could not be had: the steering here is that of PASTA's, alpha = 0.01.)

The bias is a number a key, which the kernels add without a matrix, and in a stream part
of the memory: `highlight` marks the prompt in an empty state, and whatever reads and
writes with that state is steered.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from attn.cache import kv as caches
from attn.contract.attention import EXACT, TemplateRow
from attn.contract.heads import check_rows, chosen
from attn.softmax import Softmax

POSITIONS = ("exclude", "include", "generation")
SPANS = ("union", "official")


@caches.of_cache
class PastaState(NamedTuple):
    """cache: of the attention that is steered; marks [B,P]: how many times log alpha
    the key at each position gets; steered [B,H]: of which heads, 0 or 1."""

    cache: Any
    marks: jax.Array
    steered: jax.Array


@dataclasses.dataclass(frozen=True)
class Pasta(Softmax):
    """PASTA (Zhang et al., 2023) arXiv:2311.02262: exact attention, steered.

    alpha: what a token outside of the marked spans counts for; heads: which are
    steered, None for all. position: "exclude", as described; "include", where the
    tokens of the prompt outside get -log alpha instead, so that the marked ones are
    looked at less; "generation", where all of the prompt gets log alpha. spans: of
    several, "union" (proposed, not published) marks what is in any of them, once;
    "official" is the loop of the authors' code, which adds log alpha outside of each
    span in turn, so that n spans put even what is marked (n - 1) log alpha behind what
    is generated.

    Without marks it is `Softmax`. Marks are of positions, of whichever sequence a row
    holds.
    """

    alpha: float = 0.01
    heads: tuple[int, ...] | None = None
    position: str = "exclude"
    spans: str = "union"
    row = TemplateRow(EXACT, "L^2 D", 2)

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.alpha <= 1:
            raise ValueError(f"alpha={self.alpha}: expected in (0, 1]")
        for name, choices in (("position", POSITIONS), ("spans", SPANS)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r}: expected one of "
                                 f"{choices}")

    def __call__(
        self, q, k, v, *, x=None, segments=None, bias=None, marks=None, **more
    ):
        """All tokens at once, as `Softmax`. marks [B|1,S]: see `marks`."""
        bias = self._with_marks(q, bias, marks)
        return super().__call__(q, k, v, x=x, segments=segments, bias=bias, **more)

    def weights(self, q, k, v, heads, rows, *, bias=None, marks=None, **more):
        """What a call gives each key, as `Softmax.weights`."""
        bias = self._with_marks(q, bias, marks)
        return super().weights(q, k, v, heads, rows, bias=bias, **more)

    def marks(self, spans: jax.Array, length: Any) -> jax.Array:
        """[B,P] float32: how many times log alpha a key gets.

        spans [B,N,P] booleans: the tokens of each of N marked spans. length [B] or a
        number: of the prompt; what is generated behind it is left alone.
        """
        inside = jnp.asarray(spans, bool)
        # [1,P] < [B|1,1]: j < L
        prompt = jnp.arange(inside.shape[2])[None] < jnp.reshape(length, (-1, 1))
        if self.spans == "union":
            inside = inside.any(1, keepdims=True)  # [B,1,P]
        if self.position == "exclude":
            # log alpha for what is outside, of "official" once for each span: [B,P]
            found = (~inside).sum(1)
        elif self.position == "include":
            # -log alpha for what is outside of all spans
            found = inside.sum(1) - 1
        else:
            found = jnp.ones((inside.shape[0], inside.shape[2]))
        return jnp.where(prompt, found, 0).astype(jnp.float32)

    def init_state(self, size, q, k, v, *, x=None):
        """An empty memory for `size` tokens, nothing marked."""
        inner = super().init_state(size, q, k, v, x=x)
        b, h = q.shape[0], q.shape[2]
        steered = jnp.broadcast_to(chosen(self.heads, h), (b, h))
        return PastaState(inner, jnp.zeros((b, size), jnp.float32), steered)

    def _step(self, state, q, k, v, *, key_bias, **more):
        own = self._bias(state.marks, state.steered)  # [B,H,P]
        own = own if key_bias is None else own + key_bias
        cache, o = super()._step(state.cache, q, k, v, key_bias=own, **more)
        return state._replace(cache=cache), o

    def _with_marks(self, q, bias, marks):
        """The bias of a call [B|1,H|1,T|1,S], with that of marks [B|1,S]."""
        if marks is None:
            return bias
        # [B|1,H,1,S]
        own = self._bias(marks, chosen(self.heads, q.shape[2])[None])[:, :, None]
        return own if bias is None else bias + own

    def _bias(self, marks, steered) -> jax.Array:
        """[B,H,P] from marks [B,P] and heads [B,H]."""
        # alpha exp(s) = exp(s + log alpha), and the softmax divides by the new sum
        # [B,H,1] x [B,1,P] -> [B,H,P]
        return math.log(self.alpha) * steered[:, :, None] * marks[:, None]


def highlight(
    states: tuple, marks: jax.Array, heads: jax.Array | None = None
) -> tuple:
    """A model's states, one a layer, of which the `PastaState`s are steered.

    marks [B,P]: of `Pasta.marks`, for as many positions as a state has, or fewer. heads
    [L,H]: which heads, 0 or 1, in place of those of the attentions; it may be traced,
    so that one program tries all choices.
    """
    if heads is not None:
        check_rows("heads", jnp.asarray(heads), len(states))
    found = []
    for n, state in enumerate(states):
        if isinstance(state, PastaState):
            more = state.marks.shape[1] - marks.shape[1]
            if more < 0:
                raise ValueError(f"marks of {marks.shape[1]} positions: expected at "
                                 f"most {state.marks.shape[1]}, the state's")
            state = state._replace(marks=jnp.broadcast_to(
                jnp.pad(marks, ((0, 0), (0, more))), state.marks.shape))
            if heads is not None:
                own = jnp.asarray(heads[n], jnp.float32)
                state = state._replace(
                    steered=jnp.broadcast_to(own, state.steered.shape))
        found.append(state)
    if not any(isinstance(state, PastaState) for state in states):
        raise ValueError("states hold no PastaState: expected a model with "
                         "attention=(Pasta(),) * layers")
    return tuple(found)


def spans_of(ranges: Any, positions: int) -> jax.Array:
    """[N,P] booleans of N ranges (start, end), the end exclusive."""
    ranges = jnp.asarray(ranges, jnp.int32).reshape(-1, 2)
    at = jnp.arange(positions)[None]
    # [1,P] against [N,1] -> [N,P]
    return (at >= ranges[:, :1]) & (at < ranges[:, 1:])
