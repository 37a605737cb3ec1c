"""RazorAttention (Tang et al., 2024) arXiv:2407.15891: heads that retrieve keep all.

Most heads look at the beginning and at what is near. The few that find an earlier place
in the text are told by what they do on random tokens that repeat: echo heads look at
the same token earlier, induction heads at the one behind it. These retrieval heads keep
their whole cache; every other head keeps `sinks` first and the last `buffer` tokens,
and all others fold into one token that counts as many times as it stands for.

    o = (N e^(q.k^) v^ + sum_n e^(q.k_n) v_n) / (N e^(q.k^) + sum_n e^(q.k_n))

A prompt is read exactly; what a head drops afterwards is really gone. For models with
ALiBi the weights alone say how far a head can look (`scopes`). Nothing is learned.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attn.cache.compensated import Compensating
from attn.cache.head_groups import Grouped, HeadGroups
from attn.cache.rolling import Rolling
from attn.contract.attention import MASKED, TemplateRow
from attn.contract.fields import check_fields
from attn.softmax import Softmax


@dataclasses.dataclass(frozen=True)
class _Compensated(Compensating, Softmax):
    """The heads that keep the mean of what they drop."""

    sinks: int = 4
    window: int = 4000


@dataclasses.dataclass(frozen=True)
class _Dropping(Rolling, Softmax):
    """The heads that drop."""

    sinks: int = 4
    window: int = 4000


@dataclasses.dataclass(frozen=True)
class Razor(HeadGroups, Softmax):
    """RazorAttention (Tang et al., 2024) arXiv:2407.15891: whole caches for retrieval
    heads alone.

    retrieval: the key heads of this layer that keep all tokens, as
    `retrieval_heads(...)` says. The others keep the first `sinks` tokens and the last
    max(buffer, share of the prompt's length), and, if `compensate`, one token for the
    rest; a `score` of positions has no place for that one. whole_as: how retrieval
    heads store and read, as `KIVI()`, None for as they are. The other fields are those
    of `Softmax`.
    """

    retrieval: tuple[int, ...] = (0,)
    sinks: int = 4
    buffer: int = 4000
    share: float = 0.2
    compensate: bool = True
    whole_as: Any = None
    row = TemplateRow(MASKED, "L^2 D, then L D a token of few heads", 2)

    def __post_init__(self):
        super().__post_init__()
        check_fields(self, least={"sinks": 0, "buffer": 1, "share": 0})
        self.check_retrieval()
        if self.compensate and self.score is not None:
            raise ValueError(
                f"Razor: score={self.score} with compensate=True: a token that stands "
                "for many has no position, expected compensate=False"
            )

    def exact(self, heads: tuple[int, ...]) -> Softmax:
        """The attention of retrieval heads, unless `whole_as` is another."""
        return Softmax(**self.shared(heads))

    def few(self, heads: tuple[int, ...]) -> Any:
        """The attention of the others."""
        made = _Compensated if self.compensate else _Dropping
        return made(sinks=self.sinks, window=self.buffer, **self.shared(heads))

    def init_state(self, size, q, k, v, *, x=None):
        """An empty memory for a prompt as long as q and the rest of `size` tokens."""
        # S0 = max(4000, N / 5), N the prompt's length
        long = dataclasses.replace(self, buffer=max(
            self.buffer, int(self.share * min(q.shape[1], size))))
        return HeadGroups.init_state(long, size, q, k, v)

    def step(self, state, q, k, v, **options):
        """The next T tokens -> state, [B,T,H,V]."""
        # the buffer is as long as the memory has it
        held = state.few.k.shape[1] - self.sinks if isinstance(
            state, Grouped) and state.few is not None else 0
        long = dataclasses.replace(self, buffer=max(self.buffer, held))
        return HeadGroups.step(long, state, q, k, v, **options)


def head_scores(p: jax.Array, block: int) -> tuple[jax.Array, jax.Array]:
    """Induction and echo [...,H] of weights p [...,H,1+n block,1+n block], of one first
    token and random ones that repeat every `block`.

    echo is the mean weight of a row on all earlier occurrences of its token, induction
    that on the tokens behind them, over rows from the second block on.
    """
    # the first token is no part of what repeats
    a = p[..., 1:, 1:]
    i, j = np.ogrid[:a.shape[-1], :a.shape[-1]]
    # column j holds the token of row i, or the one behind an earlier occurrence of it
    echo = ((i - j) % block == 0) & (j < i)
    induction = ((i - j + 1) % block == 0) & (j - 1 < i) & (j >= 1)

    def mean(seen):
        seen = jnp.where(np.broadcast_to(seen, a.shape), a, 0)
        # over all earlier occurrences, not the last alone: [...,H,i,j] -> [...,H]
        return seen[..., block:, :].sum(-1).mean(-1)

    return mean(induction), mean(echo)


def by_key_head(score: jax.Array, heads: int) -> jax.Array:
    """Scores [layers,H] of query heads as those of K key heads: the greatest of a
    group."""
    # [layers,K,G] -> [layers,K]
    return score.reshape(score.shape[0], heads, -1).max(-1)


def retrieval_heads(
    induction: jax.Array | np.ndarray, echo: jax.Array | np.ndarray,
    induction_share: float = 0.14, echo_share: float = 0.01,
) -> np.ndarray:
    """Which key heads [layers,K] keep all tokens: the best `induction_share` by
    induction and `echo_share` by echo, of all layers together; equal ones go along."""
    found = np.zeros(induction.shape, bool)
    for score, share in ((induction, induction_share), (echo, echo_share)):
        own = np.asarray(score)
        many = round(share * own.size)
        if many:
            found |= own >= np.sort(own, axis=None)[-many]
    return found


def scopes(wq, wk, gamma, beta, slopes, eps: float = 1e-5, scale: float = 1.0):
    """How far each head of an ALiBi model can look [H]: beyond it weights are at most
    `eps`, whatever the text. wq, wk [H,E,D]; gamma, beta [E] of the norm before; slopes
    [H]. scale: of the logits, if that is not in the weights.

    C_h = (2 ||W_Q W_K^T||_2 (||gamma||^2 + ||beta||^2) - log eps) / slope_h
    """
    # |q.k| <= ||W_Q W_K^T||_2 |x_i| |x_j|, and an ALiBi bias falls by slope a token
    norm = scale * spectral_norms(wq, wk)
    # the paper's bound of |x|^2 behind a layer norm; beta is 0 of an RMS norm
    size = (np.asarray(gamma) ** 2).sum() + (np.asarray(beta) ** 2).sum()
    return (2 * norm * size - np.log(eps)) / np.asarray(slopes)


def spectral_norms(wq, wk) -> np.ndarray:
    """||W_Q W_K^T||_2 [H] of wq, wk [H,E,D]."""
    # [H,E,D] x [H,E,D] -> [H,E,E]
    product = np.einsum("hed,hfd->hef", np.asarray(wq), np.asarray(wk))
    return np.linalg.norm(product, 2, axis=(1, 2))
