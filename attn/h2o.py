"""H2O (Zhang et al., 2023) arXiv:2306.14048: keep heavy hitters and the last tokens.

A few tokens receive most of the attention, at every step and for as long as they are
there. So each head adds up what each of its keys has received so far, and keeps the
`heavy` keys with the greatest sums beside the `recent` last ones; whenever a token
comes, the key with the least sum goes for good, with its sum. Nothing is learned.

    c_j = sum_(i <= t) softmax_j(q_i k_j / sqrt D)
    kept = top_heavy(c, j < t - recent)  and  the last `recent`

A prompt is read exactly and then compressed. Early keys have more queries behind them,
so that the sums lean to the beginning; that is the paper's rule. Heads of a group add
up what they give to their key (proposed, not published, as the paper has no groups).
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from attn.cache.evict import Evicting, Scored
from attn.contract.attention import MASKED, TemplateRow
from attn.contract.fields import check_fields
from attn.contract.segments import TokenPositions
from attn.softmax import Softmax


@dataclasses.dataclass(frozen=True)
class H2O(Evicting, Softmax):
    """H2O (Zhang et al., 2023) arXiv:2306.14048: heavy hitters and recent tokens.

    heavy: keys that each key head keeps for what they have received; recent: last ones,
    that always stay. The other fields are those of `Softmax`.
    """

    heavy: int = 256
    recent: int = 256
    row = TemplateRow(MASKED, "L^2 D, then r D a token", 2)

    def __post_init__(self):
        super().__post_init__()
        check_fields(self, least={"heavy": 0, "recent": 1})

    @property
    def budget(self) -> int:
        """Tokens that a head keeps."""
        return self.heavy + self.recent

    def scored(self, score, got, q):
        """Sums of all that was received, in float32."""
        return score + got

    def importance(self, state: Scored, now: TokenPositions) -> jax.Array:
        """The sums [B,C,K], and infinity for the last `recent` tokens."""
        first = now.next_pos[:, None, None] - self.recent
        return jnp.where(state.cache.pos >= first, jnp.inf, state.score)


def simulated(p: jax.Array, heavy: int, recent: int = -1) -> jax.Array:
    """The mask that stands for the policy in a whole map of weights p [B,H,T,T], as the
    authors' simulation has it: bool [B,H,T,T], to be joined with the causal mask.

    The first `heavy` tokens see each other. Each later one sees itself and the `heavy`
    - 1 kept keys with the greatest sums; what it does not see is lost, and so is its
    sum. recent: the last recent + 1 positions, its own included, are seen as well.
    """
    t = p.shape[-1]
    at = jnp.arange(t)
    # what the first tokens received among themselves [B,H,T]
    score = jnp.where((at < heavy)[None, None], p[..., :heavy, :].sum(-2), 0)

    def token(score, given):
        row, here = given  # [B,H,T], the token's index
        _, top = jax.lax.top_k(score, min(heavy - 1, t))
        # [B,H,heavy-1,1] == [1,1,1,T] -> [B,H,T]
        kept = (top[..., None] == at[None, None, None]).any(-2)
        kept = kept | (at == here)[None, None]
        # what is not kept loses its sum
        return (score + row) * kept, kept

    first = jnp.broadcast_to(
        (at < heavy)[None, None, None], (*p.shape[:2], min(heavy, t), t))
    rows = jnp.moveaxis(p[..., heavy:, :], 2, 0), at[heavy:]
    _, kept = jax.lax.scan(token, score, rows)
    kept = jnp.concatenate([first, jnp.moveaxis(kept, 0, 2)], 2)
    # how far a key is behind [T,T]
    far = at[:, None] - at[None]
    return kept | ((far >= 0) & (far <= recent))[None, None]
