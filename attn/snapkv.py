"""SnapKV (Li et al., 2024) arXiv:2404.14469: the end of a prompt votes for its keys.

What the last tokens of a prompt look at is what the answer will look at. So when the
prompt has been read, its last `window` queries vote: each key's weights are added up
over them, the votes are pooled along the sequence so that neighbours of a chosen token
come with it, and every head keeps the `capacity - window` keys with the most votes and
the window itself. The prompt's own attention is exact; only what is stored shrinks, and
tokens generated afterwards are added and never dropped. Nothing is learned.

    c_j = sum_(i in window) softmax_j(q_i k_j / sqrt D),   kept = top_(C-W) pool_P(c)

As computed here a piece of several tokens is taken for (a part of) a prompt, so a
prompt read in pieces is compressed after each one, which is proposed, not published;
read in one piece it is the authors' algorithm.
"""

from __future__ import annotations

import dataclasses

from attn.cache.votes import Voting
from attn.contract.attention import MASKED, TemplateRow
from attn.softmax import Softmax


@dataclasses.dataclass(frozen=True)
class SnapKV(Voting, Softmax):
    """SnapKV (Li et al., 2024) arXiv:2404.14469: keep the prompt keys that its end
    votes for.

    capacity C: tokens of the prompt that each head keeps, `window` W of them the last
    ones; kernel P: odd width of the pooling, "avg" or "max". share_group: the query
    heads of a group vote together and the cache stays [B,C,K,D]; otherwise each query
    head keeps its own, as in the authors' code, and the cache grows to H heads. The
    other fields are those of `Softmax`.
    """

    capacity: int = 320
    window: int = 64
    kernel: int = 5
    pool: str = "avg"
    share_group: bool = True
    row = TemplateRow(MASKED, "L^2 D, then r D a token", 2)

    def __post_init__(self):
        super().__post_init__()
        self.check_voting()
