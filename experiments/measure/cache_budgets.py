"""Cache budgets: each policy set so that it keeps, or reads, a share of a prompt."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from attn.actqkv import ActQKV
from attn.adakv import AdaKV
from attn.duo import Duo, selected
from attn.h2o import H2O
from attn.kivi import KIVI
from attn.pyramidkv import PyramidKV
from attn.quest import Quest
from attn.razor import Razor, retrieval_heads
from attn.recycled import Recycled
from attn.retrieval import Retrieval
from attn.saq import SAQ
from attn.snapkv import SnapKV
from attn.softmax import Softmax
from attn.streaming import Streaming
from attn.topk import TopK
from attn.tova import TOVA

SINKS = 4
LEAST = 8  # tokens of a budget


def _window(tokens: int) -> int:
    """The last tokens that vote: a quarter of the budget, at most 32."""
    return max(1, min(32, tokens // 4))


def _streaming(tokens: int, layers: int) -> tuple:
    # true positions: what is kept is not moved together
    one = Streaming(sinks=SINKS, window=max(1, tokens - SINKS), rebase=False)
    return (one,) * layers


def _h2o(tokens: int, layers: int) -> tuple:
    heavy = max(1, tokens // 2)
    return (H2O(heavy=heavy, recent=max(1, tokens - heavy)),) * layers


def _tova(tokens: int, layers: int) -> tuple:
    return (TOVA(capacity=tokens),) * layers


def _snapkv(tokens: int, layers: int) -> tuple:
    return (SnapKV(capacity=tokens, window=_window(tokens)),) * layers


def _pyramidkv(tokens: int, layers: int) -> tuple:
    return PyramidKV(capacity=tokens, window=_window(tokens), layers=layers).stack()


def _adakv(tokens: int, layers: int) -> tuple:
    return (AdaKV(capacity=tokens, window=_window(tokens)),) * layers


def _quest(tokens: int, layers: int) -> tuple:
    return (Quest(page=8, budget=max(8, tokens), least=1),) * layers


def _recycled(tokens: int, layers: int) -> tuple:
    return (Recycled(capacity=tokens),) * layers


def _topk(tokens: int, layers: int) -> tuple:
    local = max(1, tokens // 8)
    return (TopK(top_k=max(1, tokens - local), block=1, sink=0, local=local),) * layers


def _actqkv(tokens: int, layers: int) -> tuple:
    local = max(1, tokens // 2)
    blocks = max(1, (tokens - local - SINKS) // 8)
    return (ActQKV(window=32, sinks=SINKS, local=local, block=8, top_k=blocks,
                   least=1),) * layers


def _retrieval(tokens: int, layers: int) -> tuple:
    near = max(SINKS + 1, tokens // 2)
    return (Retrieval(sinks=SINKS, recent=near - SINKS, top_k=max(1, tokens - near),
                      index="flat"),) * layers


# what is not read is not kept, but for the second group, which keeps everything
FREEING: dict[str, Callable[[int, int], tuple]] = {
    "StreamingLLM": _streaming, "H2O": _h2o, "TOVA": _tova, "SnapKV": _snapkv,
    "PyramidKV": _pyramidkv, "AdaKV": _adakv,
}
READING: dict[str, Callable[[int, int], tuple]] = {
    "Quest": _quest, "Recycled": _recycled, "top tokens": _topk, "ActQKV": _actqkv,
    "Retrieval": _retrieval,
}
# all tokens in few bits: their budget is the width of a code
CODED: dict[str, Any] = {
    "KIVI, 4 bits": KIVI(bits=4), "KIVI, 2 bits": KIVI(bits=2), "SAQ": SAQ(),
}
# heads that hold all, chosen by what is known of the model's heads
HEADED = ("Razor", "Duo")
NAMES = (*FREEING, *HEADED, *READING, *CODED)


def headed(name: str, share: float, length: int, known: tuple[np.ndarray, ...]
           ) -> tuple[float, tuple]:
    """(share, one attention for each layer) of a policy of two kinds of heads: half of
    the budget goes to heads that hold all `length` tokens, the rest to the first and
    last tokens of the others, 8 or more. known: induction and echo [layers,K] for
    Razor, at most 14% and 1% of the heads as in its paper or one more; gates [layers,K]
    for Duo."""
    n = known[0].size
    many = int(share / 2 * n)
    if name == "Razor":
        many = min(many, round(0.15 * n) + 1)
        echo = int(many > 1)
        induction, matching = known
        chosen = retrieval_heads(induction, matching, (many - echo) / n, echo / n)
    else:
        chosen = selected(known[0], 1 - many / n)
    whole = int(chosen.sum())
    rest = (share * n - whole) / max(n - whole, 1) * length
    tokens = min(length, max(LEAST, round(rest)))
    found: list[Any] = []
    for row in chosen:
        own = tuple(int(h) for h in np.flatnonzero(row))
        near = max(1, tokens - SINKS)
        if name == "Duo":
            found.append(Duo(retrieval=own, sinks=SINKS, recent=near))
        else:  # one slot is the one that stands for the rest
            found.append(Razor(retrieval=own, sinks=SINKS, buffer=max(1, near - 1),
                               share=0.0))
    return (whole * length + (n - whole) * tokens) / n / length, tuple(found)


def settings(name: str, shares: tuple[float, ...], length: int, layers: int
             ) -> list[tuple[float, tuple]]:
    """(share, one attention for each layer) of a policy at each share of a text of
    `length` tokens, as whole tokens, 8 or more, have it; of codes one, whose share is
    their bits over 16. ValueError for a name that is none of NAMES."""
    if name == "exact":
        return [(1.0, (Softmax(),) * layers)]
    if name in CODED:
        bits = CODED[name].bits
        bits = bits if isinstance(bits, int) else bits[-1]
        return [(bits / 16, (CODED[name],) * layers)]
    if name not in NAMES:
        raise ValueError(f"policies: {name!r}: expected of {NAMES}")
    make = {**FREEING, **READING}[name]
    budgets = [max(LEAST, round(share * length)) for share in shares]
    return [(tokens / length, make(tokens, layers)) for tokens in budgets]
