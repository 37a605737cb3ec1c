"""Local (Luong et al., 2015) arXiv:1508.04025: exact attention within a window.

A token looks at its neighbours and at nothing else, so that the cost grows with T times
the window. A mask says all of it: `Local` names the two windows of a benchmark, and
exact attention, its kernels and its ring of a cache do the rest.

    causal: t sees s in [t - w + 1, t], w keys;  else s in [t - w, t + w], 2w + 1 keys

Both windows as in Comprehensive Attention Benchmarking (Zhang et al., 2022)
arXiv:2210.07661.
"""

from __future__ import annotations

import dataclasses

from attn.contract.attention import MASKED, TemplateRow
from attn.contract.fields import check_fields
from attn.masks import Causal, Full, Mask, Window
from attn.softmax import Softmax


@dataclasses.dataclass(frozen=True)
class Local(Softmax):
    """Local (Luong et al., 2015) arXiv:1508.04025: a window of the nearest tokens.

    window: w; causal: w keys that end in the token itself, else w to either side and
    itself. mask: hides more. A context has no nearest tokens, so there is no cross
    attention. The other fields are those of `Softmax`.
    """

    window: int = 16
    causal: bool = True
    crosses = False
    row = TemplateRow(MASKED, "w L D", 1)

    def __post_init__(self):
        check_fields(self, least={"window": 1})
        super().__post_init__()

    @property
    def visible(self) -> Mask:
        """The window, and what `mask` leaves of it."""
        w = self.window
        near = Causal() & Window(w - 1) if self.causal else Window(w, w)
        return near if self.mask in (None, Full()) else near & self.mask
