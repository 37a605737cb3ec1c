"""MiniMax: Lightning in most layers, experts in all of them."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from attn.contract.norm import Norm
from attn.layers import MultiHead
from attn.lightning import Lightning, slopes
from models.block import Residual
from models.checkpoint.config import Reader
from models.checkpoint.decoder import (
    FULL, LINEAR, SLIDING, Architecture, attention, decoder, head_dim, heads, layers,
    outside, place, rms, softmaxes,
)
from models.checkpoint.dense import BUFFERS
from models.checkpoint.rope import rope
from models.checkpoint.sparse import W123, experts_of, mixture, norms
from models.checkpoint.tensors import Entry, fused, kernel, norm
from models.lm import LM


def minimax(r: Reader, options: dict[str, Any]) -> LM:
    """MiniMax-01 (MiniMax, 2025) arXiv:2501.08313: Lightning in most layers, and
    residuals that start behind the norm."""
    every = [LINEAR if n % 2 else FULL for n in range(layers(r))]
    kinds = r.kinds("layer_types", every, (FULL, LINEAR))
    size, count = r.get("sliding_window"), layers(r)
    r.ignore("block_size")  # of its own chunked form
    r.only("hidden_act", "silu")
    full = softmaxes([FULL if size is None else SLIDING], size)[0]
    # the slopes of layer n
    lightning = [
        MultiHead(
            Lightning(slopes="minimax", layer=n, layers=count), heads=heads(r),
            head_dim=head_dim(r), position=None, qkv_act="silu", out_norm="all",
            out_gate="sigmoid", norm=Norm(), dtype=options["dtype"], parent=None,
        ) if kind == LINEAR else full
        for n, kind in enumerate(kinds)
    ]

    def factors(what: str) -> tuple[float, float]:
        return r.number(f"{what}_alpha_factor", 1), r.number(f"{what}_beta_factor", 1)

    own = {FULL: factors("full_attn"), LINEAR: factors("linear_attn")}
    return decoder(
        r, options, attention=tuple(lightning),
        position=rope(r, theta=1000000.0, fraction=_turned(r)),
        norms=rms(r, 1e-5), feed=mixture(r),
        residual=tuple(Residual(normed=True, mixer=own[kind], mlp=factors("mlp"))
                       for kind in kinds),
    )


def _turned(r: Reader) -> float | None:
    """The share of a head's channels that is turned: the code that came with the
    weights has a key for it, transformers turns all of them."""
    if r.get("rotary_dim") is None:
        return None
    return r.size("rotary_dim") / head_dim(r)


def older_minimax(data: dict[str, Any]) -> dict[str, Any]:
    """The config of the code that came with the weights."""
    data = dict(data)
    types = data.pop("attn_type_list", None)
    if types is not None:
        data["layer_types"] = [FULL if kind else LINEAR for kind in types]
    for theirs, ours in (("full_attention", "full_attn"), ("mlp", "mlp"),
                         ("linear_attention", "linear_attn")):
        for which in ("alpha", "beta"):
            value = data.pop(f"layernorm_{theirs}_{which}", None)
            if value is not None:
                data[f"{ours}_{which}_factor"] = value
    for key, value in (("postnorm", True), ("shared_intermediate_size", 0)):
        if data.pop(key, value) != value:
            raise NotImplementedError(f"{key} other than {value!r}: not there yet")
    data.pop("shared_moe_mode", None)  # of no shared expert
    return data


def minimax_tensors(r: Reader, model: LM) -> list[Entry]:
    """MiniMax's: the Lightning layers have q, k and v of each head in one matrix."""
    found = outside(model)
    for n, layer in enumerate(model.attention):
        name, path = place(n)
        mixer, own = f"{path}/mixer", f"{name}.self_attn"
        found += experts_of(
            model, n, f"{name}.block_sparse_moe", f"{path}/mlp", W123)
        found += norms(name, path)
        if not isinstance(layer, MultiHead):
            found += attention(model, own, mixer)
            continue
        found += [
            fused(f"{own}.qkv_proj.weight", [f"{mixer}/{c}/kernel" for c in "qkv"],
                  groups=layer.heads),
            kernel(f"{own}.output_gate.weight", f"{mixer}/gate/kernel"),
            kernel(f"{own}.out_proj.weight", f"{mixer}/out/kernel", inputs=2),
            *norm(f"{own}.norm", f"{mixer}/out_norm"),
            decays(own, layer, r.size("block_size", 256)),
        ]
    return found


def decays(name: str, layer: Any, block: int) -> Entry:
    """The buffers that transformers keeps with the parameters. They follow from the
    slopes: what is read must be that, and the same, to a rounding of its exponentials,
    is written."""
    names = [f"{name}.{leaf}" for leaf in
             ("slope_rate", "query_decay", "key_decay", "diagonal_decay")]
    return Entry(tuple(names), (), functools.partial(_known, names[0], layer, block),
                 functools.partial(_decays, layer, block), optional=True)


def _known(name: str, layer, block: int, arrays, shapes) -> list[np.ndarray]:
    rate = _decays(layer, block, ())[0]
    if not np.allclose(arrays[0].astype(np.float32), rate, rtol=1e-2):
        raise NotImplementedError(f"{name} has other slopes than MiniMax-01: not there "
                                  "yet")
    return []


def _decays(layer, block: int, arrays) -> list[np.ndarray]:
    def exp(a):
        return np.exp(a.astype(np.float64)).astype(np.float32)

    # exponents in float32, as they were made
    how = layer.attention
    rate = slopes(layer.heads, how.slopes, how.layer, how.layers)
    rate = rate.astype(np.float32)[:, None, None]
    i = np.arange(1, block + 1, dtype=np.float32)
    between = (i[:, None] - i[None])[None, None]  # [1,1,c,c]
    diagonal = exp(np.where(between >= 0, -rate * between, np.float32(-np.inf)))
    return [rate, exp(-rate * i[:, None]), exp(-rate * (block - i[:, None])), diagonal]


MINIMAX = {"minimax": Architecture(
    minimax, minimax_tensors, ignored=BUFFERS, older=older_minimax)}
