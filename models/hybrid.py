"""Hybrid (Sun et al., 2025) arXiv:2502.07563: most layers linear, every fourth exact.

Linear layers carry a state whose size does not depend on the text, so that most of a
model's work grows with T and not with its square; a few layers of exact attention give
back what a state forgets. Linear-Llama3, with which LASP-2 is measured, has the sizes
of Llama 3 and an exact layer after every three linear ones.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from attn.lightning import Lightning
from attn.softmax import Softmax
from models.lm import LM

# Llama 3 8B (Grattafiori et al., 2024) arXiv:2407.21783
LLAMA3_8B: dict[str, Any] = {
    "vocab": 128256, "width": 4096, "heads": 32, "kv_heads": 8, "hidden": 14336,
    "tied": False, "dtype": jnp.bfloat16, "scan": True, "remat": True,
}
# Linear-Llama3-1B, of 16 layers, as LASP-2 gives it; its hidden width is taken here
LLAMA3_1B = LLAMA3_8B | {"width": 2048, "heads": 16, "kv_heads": None, "hidden": 5504}


def layers(
    depth: int, every: int = 4, linear: Any = Lightning(), exact: Any = Softmax()
) -> tuple:
    """The layers of a model, for `LM(attention=...)`: of each `every`, the last one is
    `exact`; 0 for none that is. ValueError if depth is not a multiple."""
    if every < 0 or depth < 1 or every and depth % every:
        raise ValueError(
            f"depth={depth}, every={every}: expected a multiple of `every`, or 0"
        )
    if not every:
        return (linear,) * depth
    return ((linear,) * (every - 1) + (exact,)) * (depth // every)


def hybrid_8b(every: int = 4, linear: Any = Lightning(), exact: Any = Softmax()) -> LM:
    """The sizes of Llama 3 8B with `layers(32, every, linear, exact)`."""
    return LM(attention=layers(32, every, linear, exact), **LLAMA3_8B)


def hybrid_1b(every: int = 4, linear: Any = Lightning(), exact: Any = Softmax()) -> LM:
    """The sizes of Linear-Llama3-1B with `layers(16, every, linear, exact)`."""
    return LM(attention=layers(16, every, linear, exact), **LLAMA3_1B)
