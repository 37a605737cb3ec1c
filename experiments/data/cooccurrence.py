"""Co-occurrence: texts whose tokens say, by what they stand beside, what comes next.

The data of Scan and Snap (Tian et al., 2023, arXiv:2305.16380): a text ends with a
query token m, and the token n that follows decides which tokens stand before. Common
tokens do so for several n, distinct ones for one n only, some of them more often.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Cooccurrence:
    """Texts over M tokens: the common ones (ids from 0), those common to one query,
    the distinct ones of each next token, the queries, the next tokens.

    queries: how many query tokens; next_tokens: how many next tokens each; common:
    tokens that stand beside all of them; query_common: tokens of each query, beside all
    its next tokens; distinct: tokens of each next token alone; tokens: drawn a text.
    """

    queries: int = 2
    next_tokens: int = 1
    common: int = 10
    query_common: int = 0
    distinct: int = 10
    tokens: int = 127

    def __post_init__(self):
        for field in dataclasses.fields(self):
            least = 0 if field.name in ("common", "query_common") else 1
            if getattr(self, field.name) < least:
                raise ValueError(f"Cooccurrence: {field.name}="
                                 f"{getattr(self, field.name)}: expected {least} or "
                                 "more")

    @property
    def classes(self) -> int:
        """Next tokens n, K."""
        return self.queries * self.next_tokens

    @property
    def vocab(self) -> int:
        """Tokens M; queries and next tokens never stand before the query."""
        keys = self.common + self.queries * self.query_common
        return keys + self.classes * self.distinct + self.queries + self.classes

    def query(self) -> np.ndarray:
        """psi [K]: the id of the query of each next token."""
        first = self.vocab - self.classes - self.queries
        return first + np.arange(self.classes) // self.next_tokens

    def label(self) -> np.ndarray:
        """[K]: the id of each next token."""
        return self.vocab - self.classes + np.arange(self.classes)

    def distinct_ids(self) -> np.ndarray:
        """[K,distinct]: the ids of the tokens of each next token alone, rare first."""
        first = self.common + self.queries * self.query_common
        return first + np.arange(self.classes * self.distinct).reshape(
            self.classes, self.distinct)

    def probabilities(self) -> np.ndarray:
        """P(l|n) [K,M]: weight 1 for common tokens, 0.1 to 1 for distinct ones."""
        p = np.zeros((self.classes, self.vocab))
        p[:, : self.common] = 1
        own = np.arange(self.classes) // self.next_tokens
        for n in range(self.classes):
            first = self.common + own[n] * self.query_common
            p[n, first : first + self.query_common] = 1
        rows = np.arange(self.classes)[:, None]
        p[rows, self.distinct_ids()] = np.linspace(0.1, 1, self.distinct)
        return p / p.sum(1, keepdims=True)

    def draw(self, key: jax.Array, batch: int) -> tuple[jax.Array, jax.Array]:
        """Texts -> how often each token stands in them [B,M], and the class [B]. There
        are no positions, so that counts are all a model can see."""
        of_class, of_token = jax.random.split(key)
        n = jax.random.randint(of_class, (batch,), 0, self.classes)
        u = jax.random.uniform(of_token, (batch, self.tokens))
        # tokens up to l are those that the uniform number falls short of
        up_to = jnp.asarray(self.probabilities().cumsum(1), u.dtype)
        last = jnp.where(jnp.arange(self.vocab) == self.vocab - 1, 2, up_to)[n]
        below = (u[:, :, None] < last[:, None]).sum(1).astype(u.dtype)  # [B,M]
        return jnp.diff(below, axis=1, prepend=0), n
