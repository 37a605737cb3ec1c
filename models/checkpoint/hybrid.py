"""Hybrid: the architectures with gated DeltaNet in most layers."""

from __future__ import annotations

import functools
import math
from typing import Any, Sequence

import jax.numpy as jnp
import numpy as np

from attn.contract.norm import Norm
from attn.delta import Delta
from attn.layers import MultiHead
from models.block import Residual
from models.checkpoint.config import Reader
from models.checkpoint.decoder import (
    FULL, LINEAR, Architecture, attention, decoder, feed, heads, layers, mlp, outside,
    place, rms, softmaxes,
)
from models.checkpoint.dense import BUFFERS, PRE
from models.checkpoint.rope import rope
from models.checkpoint.tensors import (
    Entry, Shapes, flat, fused, kernel, linear, norm,
)
from models.lm import LM


def delta_layer(
    r: Reader, options: dict[str, Any], norms: Norm, **fields: Any
) -> MultiHead:
    """Gated DeltaNet with its projections; its heads are not those of the softmax."""
    keys = r.size("linear_num_key_heads", heads(r))
    values = r.size("linear_num_value_heads", heads(r))
    if values % keys:
        raise ValueError(f"config.json: linear_num_value_heads={values}: expected a "
                         f"multiple of linear_num_key_heads={keys}")
    each = values // keys
    d = r.size("linear_key_head_dim", 3 * r.size("hidden_size") // (4 * keys))
    return MultiHead(
        Delta(gated=True, conv=r.size("linear_conv_kernel_dim", 4), values=each,
              **fields),
        heads=keys, head_dim=d, value_dim=each * r.size("linear_value_head_dim", 2 * d),
        position=None, norm=norms, dtype=options["dtype"], parent=None,
    )


def hybrid_kinds(r: Reader) -> list[str]:
    """Which layers are linear: by default all but every fourth."""
    every = r.size("full_attention_interval", 4)
    kinds = [LINEAR if (n + 1) % every else FULL for n in range(layers(r))]
    return r.kinds("layer_types", kinds, (FULL, LINEAR))


def is_delta(model: LM, n: int) -> bool:
    """Whether layer n is linear."""
    return isinstance(model.attention[n], MultiHead)


def mixed(kinds: Sequence[str], full: Any, linear_layer: Any) -> tuple:
    """One entry a layer."""
    return tuple(linear_layer if kind == LINEAR else full for kind in kinds)


# ----------------------------------------------------------------------- convolutions


def convs(names: Sequence[str], path: str) -> Entry:
    """The filters of q, k and v [W,channels]: the rows of one tensor [C,1,W], or of
    three.

    transformers cuts its one tensor into three of equal size when it writes, wherever q
    ends and k begins; filters of q, k and v that were written by themselves are read
    too.
    """
    paths = tuple(f"{path}/{c}_conv" for c in "qkv")
    return Entry(tuple(names), paths, _filters,
                 functools.partial(_rows, len(names)), _same_rows)


def _filters(arrays, shapes: Shapes) -> list[np.ndarray]:
    rows = np.concatenate([arrays[n] for n in range(len(arrays))])  # [C,1,W]
    ends = np.cumsum([shape[1] for shape in shapes])[:-1]
    return [part[:, 0].T for part in np.split(rows, ends)]


def _rows(pieces: int, arrays) -> list[Any]:
    rows = jnp.concatenate([a.T for a in arrays])[:, None]  # [C,1,W]
    size = math.ceil(rows.shape[0] / pieces)
    return [rows[n * size:(n + 1) * size] for n in range(pieces)]


def _same_rows(found: Shapes, wanted: Shapes) -> bool:
    return (sum(a[0] for a in found) == sum(a[0] for a in wanted)
            and {a[1:] for a in found} == {a[1:] for a in wanted})


# ------------------------------------------------------------------------- OLMo-Hybrid


def olmo_hybrid(r: Reader, options: dict[str, Any]) -> LM:
    """OLMo-Hybrid (OLMo team, 2025): gated DeltaNet with negative eigenvalues and norms
    in front, softmax with norms behind."""
    kinds = hybrid_kinds(r)
    # how its gates begin, not what they are
    r.ignore("linear_a_log_min", "linear_a_log_max", "linear_dt_min", "linear_dt_max",
             "linear_dt_init_floor")
    r.only("hidden_act", "silu")
    delta = delta_layer(r, options, Norm(eps=1e-5),
                        negative=r.flag("linear_allow_neg_eigval", True))
    front, behind = Residual(), Residual(before=False, after=True)
    return decoder(
        r, options, attention=mixed(kinds, softmaxes([FULL], None)[0], delta),
        position=rope(r) if _turns(r) else None,
        use_bias=r.flag("attention_bias"), feed=feed(r), qk_norm="all",
        residual=tuple(front if kind == LINEAR else behind for kind in kinds),
    )


def _turns(r: Reader) -> bool:
    """Whether its softmax layers rotate: a rope_theta of null says that they do not."""
    given = r.get("rope_parameters", {})
    where = given if "rope_theta" in given else r.data
    r.ignore("rope_theta")
    return where.get("rope_theta", 10000.0) is not None


def olmo_hybrid_tensors(r: Reader, model: LM) -> list[Entry]:
    """OLMo-Hybrid's: a matrix for each projection."""
    found = outside(model)
    for n in range(len(model.attention)):
        name, path = place(n)
        mixer, learned = f"{path}/mixer", f"{path}/mixer/attention"
        found += mlp(f"{name}.mlp", f"{path}/mlp")
        if not is_delta(model, n):
            found += attention(model, f"{name}.self_attn", mixer)
            found += norm(f"{name}.feedforward_layer_norm", f"{path}/mixer_out_norm")
            found += norm(f"{name}.post_feedforward_layernorm", f"{path}/mlp_out_norm")
            continue
        own = f"{name}.linear_attn"
        found += norm(f"{name}.attention_layer_norm", f"{path}/mixer_norm")
        found += norm(f"{name}.feedforward_layer_norm", f"{path}/mlp_norm")
        found += [
            *(kernel(f"{own}.{c}_proj.weight", f"{mixer}/{c}/kernel") for c in "qkv"),
            kernel(f"{own}.g_proj.weight", f"{mixer}/gate/kernel"),
            kernel(f"{own}.b_proj.weight", f"{learned}/beta/kernel"),
            kernel(f"{own}.a_proj.weight", f"{learned}/decay/kernel"),
            kernel(f"{own}.o_proj.weight", f"{mixer}/out/kernel", inputs=2),
            convs([f"{own}.{c}_conv1d.weight" for c in "qkv"], learned),
            *norm(f"{own}.o_norm", f"{mixer}/out_norm"),
            *(flat(f"{own}.{c}", f"{learned}/{c}") for c in ("A_log", "dt_bias")),
        ]
    return found


# ---------------------------------------------------------------- Qwen3-Next, Qwen3.5


def qwen3_5(r: Reader, options: dict[str, Any]) -> LM:
    """Qwen3.5 (Qwen team, 2026), its text model: gated DeltaNet, and softmax with an
    output gate and a rotation of a quarter of its channels."""
    return gated(r, options, feed=feed(r))


def gated(r: Reader, options: dict[str, Any], **fields: Any) -> LM:
    """What Qwen3-Next and Qwen3.5 share; scales of norms are stored as what they differ
    from 1, but not those behind DeltaNet."""
    r.only("hidden_act", "silu")
    return decoder(
        r, options, head_dim=r.size("head_dim", 256),
        attention=mixed(hybrid_kinds(r), softmaxes([FULL], None)[0],
                        delta_layer(r, options, rms(r))),
        position=rope(r, fraction=0.25), norms=rms(r, offset=1.0), qk_norm="head",
        out_gate="sigmoid", use_bias=r.flag("attention_bias"), **fields,
    )


def gated_softmax(model: LM, name: str, mixer: str) -> list[Entry]:
    """The softmax of Qwen3-Next: each head's query and gate in one matrix."""
    bias, both = model.use_bias is True, [f"{mixer}/{c}" for c in ("q", "gate")]
    found = [fused(f"{name}.q_proj.weight", [f"{path}/kernel" for path in both],
                   groups=model.heads)]
    if bias:
        found.append(fused(f"{name}.q_proj.bias", [f"{path}/bias" for path in both],
                           inputs=0, groups=model.heads))
    for c in "kv":
        found += linear(f"{name}.{c}_proj", f"{mixer}/{c}", bias=bias)
    return [
        *found, *linear(f"{name}.o_proj", f"{mixer}/out", inputs=2, bias=bias),
        *norm(f"{name}.q_norm", f"{mixer}/q_norm"),
        *norm(f"{name}.k_norm", f"{mixer}/k_norm"),
    ]


def delta_tensors(name: str, mixer: str) -> list[Entry]:
    """What the DeltaNet of both has in common."""
    learned = f"{mixer}/attention"
    return [
        convs([f"{name}.conv1d.weight"], learned),
        kernel(f"{name}.out_proj.weight", f"{mixer}/out/kernel", inputs=2),
        *norm(f"{name}.norm", f"{mixer}/out_norm"),
        *(flat(f"{name}.{c}", f"{learned}/{c}") for c in ("A_log", "dt_bias")),
    ]


def qwen3_5_tensors(r: Reader, model: LM) -> list[Entry]:
    """Qwen3.5's: q, k and v in one matrix, one behind the other."""
    found = outside(model)
    for n in range(len(model.attention)):
        name, path = place(n)
        mixer, learned = f"{path}/mixer", f"{path}/mixer/attention"
        found += mlp(f"{name}.mlp", f"{path}/mlp")
        for theirs, ours in PRE:
            found += norm(f"{name}.{theirs}", f"{path}/{ours}")
        if not is_delta(model, n):
            found += gated_softmax(model, f"{name}.self_attn", mixer)
            continue
        own = f"{name}.linear_attn"
        found += delta_tensors(own, mixer)
        found += [
            fused(f"{own}.in_proj_qkv.weight", [f"{mixer}/{c}/kernel" for c in "qkv"]),
            kernel(f"{own}.in_proj_z.weight", f"{mixer}/gate/kernel"),
            kernel(f"{own}.in_proj_b.weight", f"{learned}/beta/kernel"),
            kernel(f"{own}.in_proj_a.weight", f"{learned}/decay/kernel"),
        ]
    return found


HYBRID = {
    "olmo_hybrid": Architecture(
        olmo_hybrid, olmo_hybrid_tensors, ignored=BUFFERS,
        renamed=(
            (r"\.input_layernorm\.", ".attention_layer_norm."),
            (r"\.post_attention_layernorm\.", ".feedforward_layer_norm."),
        ),
    ),
    "qwen3_5_text": Architecture(
        qwen3_5, qwen3_5_tensors,
        renamed=((r"^(model\.)?language_model\.(model\.)?", "model."),),
        # towers for images, and heads that predict several tokens
        ignored=(*BUFFERS, r"^(model\.)?visual\.", r"^(model\.)?mtp\."),
    ),
}
