"""Gemma: windows in most layers, norms around everything, logits with a softcap."""

from __future__ import annotations

import math
from typing import Any

from models.block import Residual
from models.checkpoint.config import Reader
from models.checkpoint.decoder import (
    FULL, SLIDING, decoder, feed, layers, rms, softmaxes,
)
from models.checkpoint.dense import BUFFERS, LLAMA
from models.checkpoint.rope import rope
from models.lm import LM


def gemma(r: Reader, options: dict[str, Any], **fields: Any) -> LM:
    """What Gemma 2 and 3 share: norms around mixer and MLP with scales stored as what
    they differ from 1, a scaled embedding."""
    act = "hidden_activation" if r.get("hidden_activation") else "hidden_act"
    r.ignore("hidden_act")  # of the two keys the older one is not used
    return decoder(
        r, options, norms=rms(r, offset=1.0), tied=r.flag("tie_word_embeddings", True),
        residual=Residual(before=True, after=True),
        embed_scale=math.sqrt(r.size("hidden_size")),
        softcap=r.get("final_logit_softcapping"),
        use_bias=r.flag("attention_bias"), head_dim=r.size("head_dim", 256),
        feed=feed(r, key=act), **fields,
    )


def scores(r: Reader) -> dict[str, Any]:
    """The scale of Gemma's logits."""
    r.only("use_bidirectional_attention", None, False)
    return {"scale": r.number("query_pre_attn_scalar", 256) ** -0.5}


def gemma2(r: Reader, options: dict[str, Any]) -> LM:
    """Gemma 2 (Gemma team, 2024) arXiv:2408.00118: every second layer has a window,
    attention and logits a softcap."""
    every = [FULL if n % 2 else SLIDING for n in range(layers(r))]
    kinds = r.kinds("layer_types", every, (FULL, SLIDING))
    cap = r.get("attn_logit_softcapping")
    return gemma(
        r, options, attention=softmaxes(kinds, r.get("sliding_window", 4096),
                                        softcap=cap, **scores(r)), position=rope(r),
    )


def gemma3(r: Reader, options: dict[str, Any]) -> LM:
    """Gemma 3 (Gemma team, 2025) arXiv:2503.19786: five layers of a window with a
    rotation of their own to one that sees all."""
    # its config has the key of Gemma 2, and its code in transformers does not read it
    r.ignore("attn_logit_softcapping")
    period = r.size("sliding_window_pattern", r.data.get("_sliding_window_pattern", 6))
    every = [SLIDING if (n + 1) % period else FULL for n in range(layers(r))]
    kinds = r.kinds("layer_types", every, (FULL, SLIDING))
    turned = {
        FULL: rope(r, FULL, theta=1000000.0),
        SLIDING: rope(r, SLIDING, old_theta="rope_local_base_freq", scaled=False),
    }
    return gemma(
        r, options, attention=softmaxes(kinds, r.get("sliding_window", 4096),
                                        **scores(r)),
        position=tuple(turned[kind] for kind in kinds), qk_norm="head",
    )


GEMMA = {
    "gemma2": LLAMA._replace(model=gemma2),
    "gemma3_text": LLAMA._replace(
        model=gemma3, renamed=((r"^(model\.)?language_model\.(model\.)?", "model."),),
        ignored=(*BUFFERS, r"^(model\.)?(vision_tower|multi_modal_projector)\."),
    ),
}
