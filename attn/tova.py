"""TOVA (Oren et al., 2024) arXiv:2401.06104: what the last token ignores, goes.

A transformer with a bounded cache is a recurrent network with a set of tokens as state.
TOVA updates that state by one rule: when there are more than `capacity` tokens, the one
with the least weight in the last query's attention, in the mean over all heads, goes.
All heads of a layer hold the same tokens, and no token is protected, not even the last.

    w_j = mean_h softmax_j(q_(t,h) k_j / sqrt D),   kept = top_capacity(w)

A prompt is read exactly, and compressed by the same rule, by its last row. Of equal
weights the earlier token stays (our choice: the authors leave it to their library).
"""

from __future__ import annotations

import dataclasses

from attn.cache import observed
from attn.cache.evict import Evicting
from attn.contract.attention import MASKED, TemplateRow
from attn.contract.fields import check_fields
from attn.softmax import Softmax


@dataclasses.dataclass(frozen=True)
class TOVA(Evicting, Softmax):
    """TOVA (Oren et al., 2024) arXiv:2401.06104: token omission via attention.

    capacity: tokens that a layer keeps, the same for all of its heads. The other fields
    are those of `Softmax`.
    """

    capacity: int = 512
    one_set = True
    row = TemplateRow(MASKED, "L^2 D, then r D a token", 2)

    def __post_init__(self):
        super().__post_init__()
        check_fields(self, least={"capacity": 1})

    @property
    def budget(self) -> int:
        """Tokens that are kept."""
        return self.capacity

    def scored(self, score, got, q):
        """The mean weight over all heads: of the last query alone."""
        # [B,C,K] -> [B,C,1]: one set of tokens for all heads of the layer
        return got.sum(2, keepdims=True) / q.shape[2]

    def watched(self, cache, segment, q, now, sink):
        """What the last query of a piece gives."""
        last, there = observed.last_queries(q, now)
        return observed.received(cache, segment, last, there, self._spec(), sink)
