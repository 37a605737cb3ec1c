"""Folders that are damaged or ask for what is not there are refused in a sentence."""

import json
import pathlib
import pickle

import jax
import numpy as np
import pytest

from models.checkpoint import load, save
from models.checkpoint.files import INDEX, WEIGHTS
from tests.models.test_checkpoint import NAMED
from tests.models.test_checkpoint_forms import content, written


def refused(folder, error, words):
    with pytest.raises(error, match=words) as caught:
        load(folder)
    assert "\n" not in str(caught.value)


def test_weights_that_are_missing_or_cut(tmp_path):
    config, tensors = content("llama")
    refused(tmp_path / "none", FileNotFoundError, "config.json is missing")
    (tmp_path / "config.json").write_text(json.dumps(config))
    refused(tmp_path, FileNotFoundError, "has neither model.safetensors nor")
    whole = (NAMED["llama"] / WEIGHTS).read_bytes()
    for cut in (0, 5, 100, len(whole) - 8):
        (tmp_path / WEIGHTS).write_bytes(whole[:cut])
        refused(tmp_path, ValueError, "no whole safetensors file")
    (tmp_path / WEIGHTS).write_bytes(b"\xff" * 8 + whole[8:])
    refused(tmp_path, ValueError, "no whole safetensors file")
    (tmp_path / "config.json").write_text("{")
    refused(tmp_path, ValueError, "is no JSON")
    (tmp_path / "config.json").write_text("[]")
    refused(tmp_path, ValueError, "is no object")


class Explosive:
    def __reduce__(self):
        return pathlib.Path.touch, (pathlib.Path("exploded"),)


def test_a_pickle_is_never_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(content("llama")[0]))
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Explosive()))
    refused(tmp_path, ValueError, "is a pickle, which can run any code")
    assert not (tmp_path / "exploded").exists()


def test_an_index_that_does_not_agree(tmp_path):
    config, tensors = content("llama")
    folder = written(tmp_path / "a", config, tensors)
    (folder / WEIGHTS).rename(folder / "one.safetensors")
    where = dict.fromkeys(tensors, "one.safetensors")
    for change, error, words in (
        ({"lm_head.weight": "../one.safetensors"}, ValueError, "of the same folder"),
        ({"lm_head.weight": "/etc/passwd"}, ValueError, "of the same folder"),
        ({"lm_head.weight": "two.safetensors"}, FileNotFoundError, "is missing"),
        ({"other": "one.safetensors"}, ValueError, "names the tensor other"),
    ):
        (folder / INDEX).write_text(json.dumps({"weight_map": where | change}))
        refused(folder, error, words)
    (folder / INDEX).write_text("{}")
    refused(folder, ValueError, "has no weight_map")


@pytest.mark.parametrize("change, error, words", [
    (lambda t: t.pop("lm_head.weight"), ValueError, "has not lm_head.weight"),
    (lambda t: t.update(extra=np.ones(2)), ValueError, "has too many: extra"),
    (lambda t: t.update({"model.norm.weight": np.ones(47, np.float32)}), ValueError,
     r"model.norm.weight .* has shape \(47,\): expected \(48,\)"),
    (lambda t: t.update({"model.norm.weight": np.ones(48, np.int8)}),
     NotImplementedError, "model.norm.weight .* is I8: not there yet"),
    (lambda t: t.update({"model.norm.weight": np.ones(48, np.float64)}),
     NotImplementedError, "model.norm.weight .* is F64: not there yet"),
])
def test_tensors_that_are_not_the_configs(change, error, words, tmp_path):
    config, tensors = content("llama")
    change(tensors)
    refused(written(tmp_path, config, tensors), error, words)


@pytest.mark.parametrize("name, change, error, words", [
    ("llama", {"model_type": "bert"}, NotImplementedError, "model_type='bert'"),
    ("llama", {"novel_gate": 3}, NotImplementedError, "novel_gate=3 is not known"),
    ("llama", {"hidden_act": "mish"}, NotImplementedError, "hidden_act='mish'"),
    ("llama", {"rope_parameters": {"rope_type": "proportional"}}, NotImplementedError,
     "rope_type='proportional': not there yet"),
    ("llama", {"rope_parameters": {"rope_type": "linear", "novel": 1}},
     NotImplementedError, "novel=1 is not known"),
    ("llama", {"rope_parameters": {"rope_type": "linear"}}, ValueError,
     "factor=None: expected a number"),
    ("llama", {"num_hidden_layers": "three"}, ValueError, "num_hidden_layers='three'"),
    ("llama", {"dtype": "float8_e4m3fn"}, NotImplementedError, "dtype='float8_e4m3fn'"),
    ("llama", {"quantization_config": {"quant_method": "awq"}}, NotImplementedError,
     "quant_method='awq'"),
    ("gemma2", {"layer_types": ["full_attention"]}, ValueError, "each of the 4 layers"),
    ("gemma2", {"layer_types": ["chunked"] * 4}, NotImplementedError,
     "layer_types='chunked'"),
    ("gemma2", {"sliding_window": -1}, ValueError, "sliding_window=-1"),
    ("gemma3", {"use_bidirectional_attention": True}, NotImplementedError,
     "use_bidirectional_attention=True"),
    ("gpt2", {"add_cross_attention": True}, NotImplementedError, "add_cross_attention"),
    ("mixtral", {"num_experts_per_tok": 9}, ValueError, "top_k=9"),
    ("qwen3_5", {"linear_num_value_heads": 3}, ValueError, "expected a multiple"),
])
def test_configs_that_are_not_there(name, change, error, words, tmp_path):
    config, tensors = content(name)
    refused(written(tmp_path, config | change, tensors), error, words)


def test_what_cannot_be_saved(tmp_path):
    model, params = load(NAMED["mistral"])
    del params["params"]["norm"]
    with pytest.raises(ValueError, match=r"'norm/scale'.*expected the same of both"):
        save(tmp_path, model, params)


def test_a_rotation_that_follows_the_length_is_not_streamed(tmp_path):
    config, tensors = content("mistral")
    config |= {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0},
               "max_position_embeddings": 32}
    model, params = load(written(tmp_path, config, tensors))
    assert model.position.moving and model.position.original == 32
    tokens = jax.ShapeDtypeStruct((1, 4), np.int32)
    model.init_state(32, tokens)  # its angles are still those of any other text
    with pytest.raises(NotImplementedError, match="angles follow the length"):
        model.init_state(33, tokens)


@pytest.mark.parametrize("older", (False, True))
def test_a_rotation_with_a_factor_a_channel(older, tmp_path):
    """Phi-3's longer models; `su` and the length beside it are the older form."""
    config, tensors = content("phi3")
    factors = {"short_factor": [1.0] * 6, "long_factor": [2.0] * 6}
    config |= {"max_position_embeddings": 64, "original_max_position_embeddings": 16}
    if older:
        del config["rope_parameters"]
        config |= {"rope_scaling": {"type": "su", **factors}, "rope_theta": 10000.0}
    else:
        config["rope_parameters"] = {
            "rope_type": "longrope", "rope_theta": 10000.0,
            "original_max_position_embeddings": 16, **factors}
    model, _ = load(written(tmp_path, config, tensors))
    rope = model.position
    assert (rope.scaling, rope.factor, rope.original) == ("longrope", 4.0, 16)
    assert rope.short == (1.0,) * 6 and rope.long == (2.0,) * 6 and rope.moving


def test_a_factor_that_is_missing(tmp_path):
    config, tensors = content("phi3")
    config["rope_parameters"] = {"rope_type": "longrope", "rope_theta": 1e4,
                                 "short_factor": [1.0] * 6}
    refused(written(tmp_path, config, tensors), ValueError, "long_factor=None")
