"""DuoAttention (Xiao et al., 2024) arXiv:2410.10819: gates say which heads need it all.

Every key head gets a gate a in [0, 1] between full attention and attention to `sinks`
first tokens and the `recent` last ones. The gates alone are trained, on texts with pass
keys, to leave the model's hidden states as they are, at as small a sum of gates as that
allows. Heads with large gates then keep all tokens; the others keep their few, which is
memory that is really gone, and cost a constant a token.

    o = a full + (1 - a) stream
    loss = mean_(t in labels) mean_e (h_teacher - h_student)^2 + 0.05 mean |a|

When a chunk comes, a streaming head sees what it holds and the chunk, in causal order,
then keeps the first `sinks` and the last `recent` of both; the first chunk is exact.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attn.cache.head_groups import HeadGroups
from attn.cache.rolling import Rolling
from attn.contract.attention import MASKED, TemplateRow
from attn.contract.fields import check_fields
from attn.masks import Causal, Sink, Window
from attn.softmax import Softmax


@dataclasses.dataclass(frozen=True)
class _Stream(Rolling, Softmax):
    """The streaming heads: the oldest token goes after it was read."""

    sinks: int = 64
    window: int = 256
    evict: str = "after"  # sinks + recent tokens that it holds, and itself


@dataclasses.dataclass(frozen=True)
class Duo(HeadGroups, Softmax):
    """DuoAttention (Xiao et al., 2024) arXiv:2410.10819: two kinds of heads and caches.

    retrieval: the key heads of this layer that keep all tokens, as `selected(...)` says
    of trained gates; sinks, recent: what the others keep; whole_as: how retrieval heads
    store and read, as `KIVI()`, None for as they are. The other fields are those of
    `Softmax`. Keys keep their true positions.
    """

    retrieval: tuple[int, ...] = (0,)
    sinks: int = 64
    recent: int = 256
    whole_as: Any = None
    row = TemplateRow(MASKED, "L^2 D, then L D a token of few heads", 2)

    def __post_init__(self):
        super().__post_init__()
        check_fields(self, least={"sinks": 0, "recent": 1})
        self.check_retrieval()

    def exact(self, heads: tuple[int, ...]) -> Softmax:
        """The attention of retrieval heads, unless `whole_as` is another."""
        return Softmax(**self.shared(heads))

    def few(self, heads: tuple[int, ...]) -> _Stream:
        """The attention of streaming heads."""
        return _Stream(sinks=self.sinks, window=self.recent, **self.shared(heads))


def streaming_mask(sinks: int, recent: int):
    """What a streaming head sees while gates are trained: j < sinks or i - j < recent.
    """
    # i - j < recent counts the token itself
    return Causal() & (Window(recent - 1) | Sink(sinks))


def opened(alpha: jax.Array) -> jax.Array:
    """Gates clipped to [0, 1], with a gradient of 1 on the whole closed interval: they
    begin at 1, where a rule without one would leave them."""
    # at a tie jnp.clip has another gradient than the authors' clamp
    clipped = jnp.clip(alpha, 0, 1)
    inside = (alpha >= 0) & (alpha <= 1)
    # the value of either, the gradient of alpha where it is inside
    return jnp.where(inside, alpha, jax.lax.stop_gradient(clipped))


def mixed(
    alpha: jax.Array, full: jax.Array, q, k, v, *, sinks: int = 128, recent: int = 256,
    full_source: str = "teacher", exact: Softmax = Softmax(),
) -> jax.Array:
    """What the student's heads give while gates alpha [K] are trained: [B,T,H,V].

    full [B,T,H,V]: the teacher's full attention, taken without a gradient, as in the
    authors' code; full_source="student": full attention of the student's own q
    [B,T,H,D], k [B,T,K,D], v [B,T,K,V] instead, as the paper has it. exact: the
    model's attention, whose scale and softcap both have.
    """
    if full_source not in ("teacher", "student"):
        raise ValueError(
            f"full_source={full_source!r}: expected 'teacher' or 'student'")
    mask = streaming_mask(sinks, recent)
    stream = dataclasses.replace(exact, mask=mask)(q, k, v)  # [B,T,H,V]
    if full_source == "teacher":
        full = jax.lax.stop_gradient(full)
    else:
        full = exact(q, k, v)
    # of each key head, for the query heads of its group: [1,1,H,1]
    gate = jnp.repeat(opened(alpha), q.shape[2] // k.shape[2])[None, None, :, None]
    # alpha full + (1 - alpha) stream, head by head
    return gate * full + (1 - gate) * stream


def distillation(teacher: jax.Array, student: jax.Array, labels: jax.Array):
    """mean over tokens with labels [B,T] bool of the mean over channels of (teacher -
    student)^2, of hidden states [B,T,E], in float32."""
    gap = (teacher.astype(jnp.float32) - student.astype(jnp.float32)) ** 2
    own = jnp.where(labels, gap.mean(-1), 0).sum()
    return own / jnp.maximum(labels.sum(), 1)


def regularisation(alphas: jax.Array) -> jax.Array:
    """mean |alpha| over all gates, before they are clipped; its weight is 0.05."""
    return jnp.abs(alphas).mean()


def learning_rate(step: int, steps: int, peak: float = 0.02) -> float:
    """The authors' schedule: a fifth of all steps up, a fifth down, never below a tenth
    of the peak."""
    fifth = steps / 5
    # shares of the peak; between the two fifths both are 1 or more
    up, down = max((step + 1) / fifth, 0.1), max((steps - step) / fifth, 0.1)
    return peak * min(1.0, up, down)


def selected(alphas, sparsity: float, seed: int = 0) -> np.ndarray:
    """Which key heads [layers,K] keep all tokens: all but a share `sparsity` with the
    smallest gates, of all layers together; noise below 1e-6 decides between equals."""
    if sparsity <= 0 or sparsity >= 1:
        return np.full(np.shape(alphas), sparsity <= 0)
    noise = np.random.default_rng(seed).uniform(0, 1e-6, np.shape(alphas))
    alphas = np.asarray(alphas, np.float64) + noise
    # over all layers and heads together
    return alphas >= np.quantile(alphas, sparsity)
