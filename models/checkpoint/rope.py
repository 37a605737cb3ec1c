"""Rotations: `RoPE` of what a config says, in its newer form (`rope_parameters`) and
its older one (`rope_theta`, `rope_scaling`)."""

from __future__ import annotations

import math
from typing import Any, Mapping

from attn.positions import RoPE
from models.checkpoint.config import Reader

KNOWN = {
    "rope_theta", "rope_type", "type", "factor", "original_max_position_embeddings",
    "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "attention_factor",
    "mscale", "mscale_all_dim", "truncate", "partial_rotary_factor", "finetuned",
    "short_factor", "long_factor",
    # of a text alone all three axes of mrope count the same tokens
    "mrope_section", "mrope_interleaved",
}


def rope(
    r: Reader, kind: str | None = None, theta: float = 10000.0,
    fraction: float | None = None,
    old_theta: str = "rope_theta", scaled: bool = True,
) -> RoPE:
    """The rotation of all layers, or of those of a `kind` where kinds differ.

    theta, fraction: what they are if the config says nothing; a fraction of None: all
    channels, whatever it says, as in those architectures whose code in transformers
    does not read its `partial_rotary_factor`; old_theta: the key of
    the older form; scaled: whether `rope_scaling` of the older form is of these layers.
    """
    given = r.get("rope_parameters")
    older = {
        "rope_theta": r.get(old_theta), "partial_rotary_factor":
        r.get("partial_rotary_factor"),
    }
    scaling = r.get("rope_scaling")
    if kind is not None and given is not None and kind in given:
        given = given[kind]
    if given is None:
        given = dict(scaling or {}) if scaled else {}
    for value in (given, scaling):
        if value is not None and not isinstance(value, Mapping):
            raise ValueError(f"config.json: the rotation is {value!r}: expected an "
                             "object such as {\"rope_type\": \"linear\"}")
    said = {k: v for k, v in older.items() if v is not None}
    said |= {k: v for k, v in given.items() if v is not None}
    unknown = sorted(set(said) - KNOWN)
    name = said.get("rope_type", said.get("type", "default"))
    # what the first folders of Phi-3 with 128k tokens call it
    name = "longrope" if name == "su" else name
    if name not in ("default", "linear", "dynamic", "llama3", "yarn", "mrope",
                    "longrope"):
        raise NotImplementedError(f"rope_type={name!r}: not there yet")
    if unknown:
        raise NotImplementedError(
            f"rope_parameters: {unknown[0]}={said[unknown[0]]!r} is not known")
    length = r.get("max_position_embeddings", r.get("model_max_length", 2048))
    fields: dict[str, Any] = {
        "theta": _number(said, "rope_theta", theta),
        "fraction": 1.0 if fraction is None else _number(
            said, "partial_rotary_factor", fraction),
    }
    if name == "longrope":
        # beside the rotation, in the folders that are older
        said = {"original_max_position_embeddings":
                r.get("original_max_position_embeddings", length)} | said
    return RoPE(**fields, **_scaled(name, said, length))


def _scaled(name: str, said: Mapping[str, Any], length: int) -> dict[str, Any]:
    """The fields of a scaling."""
    if name in ("default", "mrope"):
        return {}
    original = int(said.get("original_max_position_embeddings", length))
    if name in ("yarn", "longrope") and "factor" not in said:
        said = {**said, "factor": length / original}
    fields: dict[str, Any] = {"scaling": name, "factor": _number(said, "factor")}
    if name == "dynamic":
        # its base moves beyond the length that the model was trained on
        fields["original"] = length
    elif name == "llama3":
        fields |= {"original": original, "slow": _number(said, "low_freq_factor"),
                   "fast": _number(said, "high_freq_factor")}
    elif name == "longrope":
        fields |= {
            "factor": max(fields["factor"], 1.0), "original": original,
            "short": _factors(said, "short_factor"),
            "long": _factors(said, "long_factor"),
            "temperature": _number(said, "attention_factor")
            if "attention_factor" in said else None,
        }
    elif name == "yarn":
        fields |= {
            "original": original, "slow": _number(said, "beta_slow", 1.0),
            "fast": _number(said, "beta_fast", 32.0),
            "truncate": bool(said.get("truncate", True)),
            "temperature": _temperature(said),
        }
    return fields


def _temperature(said: Mapping[str, Any]) -> float | None:
    """What q and k are multiplied with, where it is not 0.1 ln(factor) + 1."""
    if "attention_factor" in said:
        return _number(said, "attention_factor")
    one, all_ = said.get("mscale"), said.get("mscale_all_dim")
    if not one or not all_:
        return None
    grown = math.log(max(_number(said, "factor"), 1.0))
    return (0.1 * one * grown + 1) / (0.1 * all_ * grown + 1)


def _factors(said: Mapping[str, Any], key: str) -> tuple[float, ...]:
    """A factor for each pair of channels."""
    given = said.get(key)
    if not isinstance(given, list) or not given:
        raise ValueError(f"rope_parameters: {key}={given!r}: expected a list of "
                         "numbers")
    return tuple(_number({key: one}, key) for one in given)


def _number(said: Mapping[str, Any], key: str, default: float | None = None) -> float:
    value = said.get(key, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"rope_parameters: {key}={value!r}: expected a number")
    return float(value)
