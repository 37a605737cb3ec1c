"""Checkpoints as other writers have them: older keys and names, wrappers, several
files, four bits; they give what the folders of transformers 5 give."""

import json
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from attn.masks import Causal, Window
from attn.softmax import Softmax
from models.checkpoint import load, save
from models.checkpoint.files import INDEX, WEIGHTS, Files
from models.checkpoint.mxfp4 import BLOCK, dequantised
from tests import compiled
from tests.models.test_checkpoint import NAMED

KIMI = {"linear_head_dim": "head_dim", "linear_num_heads": "num_heads",
        "linear_conv_kernel_dim": "short_conv_kernel_size"}


def older_rope(config):
    """rope_theta and rope_scaling, with the key `type`."""
    rope = config.pop("rope_parameters", None) or {}
    config["rope_theta"] = rope.pop("rope_theta", None)
    config["partial_rotary_factor"] = rope.pop("partial_rotary_factor", None)
    if rope.pop("rope_type", "default") != "default":
        raise AssertionError("these folders have plain rotations")
    config["torch_dtype"] = config.pop("dtype")
    return config


def llama(config, tensors):
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = rope  # llama3
    config["torch_dtype"] = config.pop("dtype")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(6, np.float32)
    return config, tensors


def qwen3(config, tensors):
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = {"type": rope.pop("rope_type"), **rope}
    del config["layer_types"]
    return config, tensors


def gpt2(config, tensors):
    found = {name.removeprefix("transformer."): a for name, a in tensors.items()}
    for n in range(config["n_layer"]):
        found[f"h.{n}.attn.bias"] = np.tril(np.ones((1, 1, 128, 128), np.uint8))
        found[f"h.{n}.attn.masked_bias"] = np.float32(-1e4)[None]
    return config, found


def gemma3(config, tensors):
    turned = config.pop("rope_parameters")
    config["rope_theta"] = turned["full_attention"]["rope_theta"]
    config["rope_local_base_freq"] = turned["sliding_attention"]["rope_theta"]
    config["sliding_window_pattern"] = config.pop("_sliding_window_pattern")
    del config["layer_types"], config["tie_word_embeddings"]
    found = {f"language_model.{name}": a for name, a in tensors.items()}
    found["vision_tower.vision_model.post_layernorm.weight"] = np.ones(3, np.float32)
    return {"model_type": "gemma3", "text_config": config, "vision_config": {},
            "torch_dtype": config.pop("dtype")}, found


def qwen3_5(config, tensors):
    old = older_rope(config)
    del old["layer_types"]
    found = {name.replace("model.", "model.language_model."): a
             for name, a in tensors.items()}
    found["model.visual.merger.norm.weight"] = np.ones(3, np.float32)
    found["mtp.norm.weight"] = np.ones(3, np.float32)
    return {"model_type": "qwen3_5", "text_config": old | {
        "full_attention_interval": 4}}, found


def gemma2(config, tensors):
    del config["layer_types"]
    config["hidden_act"] = config["hidden_activation"]
    return older_rope(config), tensors


def phi3(config, tensors):
    return older_rope(config) | {"rope_scaling": None}, tensors


def smollm3(config, tensors):
    del config["layer_types"], config["no_rope_layers"]
    return older_rope(config), tensors


def olmo_hybrid(config, tensors):
    """Each filter by itself, and the names of the layers as the code has them."""
    def renamed(name):
        name = name.replace("attention_layer_norm", "input_layernorm")
        return name.replace("feedforward_layer_norm", "post_attention_layernorm")

    found = {renamed(name): a for name, a in tensors.items()}
    for n in range(config["num_hidden_layers"]):
        names = [f"model.layers.{n}.linear_attn.{c}_conv1d.weight" for c in "qkv"]
        if names[0] in found:
            rows = np.concatenate([found[name] for name in names])
            found |= dict(zip(names, np.split(rows, [32, 64])))
    return config, found


def kimi_linear(config, tensors):
    kinds = config.pop("layer_types")
    config["linear_attn_config"] = {
        "full_attn_layers": [n + 1 for n, k in enumerate(kinds) if k[0] == "f"],
        "kda_layers": [n + 1 for n, k in enumerate(kinds) if k[0] == "l"],
        **{theirs: config.pop(ours) for ours, theirs in KIMI.items()},
    }
    del config["mlp_layer_types"], config["qk_head_dim"]
    config |= {"first_k_dense_replace": 1, "moe_layer_freq": 1, "mla_use_nope": True,
               "moe_router_activation_func": "sigmoid", "use_grouped_topk": True,
               "rope_theta": 10000.0, "rope_scaling": None, "head_dim": 72}
    dense = r"(layers\.0\.)block_sparse_moe"
    return config, {re.sub(dense, r"\1mlp", n): a for n, a in tensors.items()}


def minimax(config, tensors):
    kinds = config.pop("layer_types")
    config |= {
        "model_type": "minimax_text_01", "rotary_dim": config["head_dim"],
        "attn_type_list": [int(kind == "full_attention") for kind in kinds],
        "postnorm": True, "shared_intermediate_size": 0, "shared_moe_mode": "sigmoid",
    }
    for ours, theirs in (("full_attn", "full_attention"), ("mlp", "mlp"),
                         ("linear_attn", "linear_attention")):
        for which in ("alpha", "beta"):
            config[f"layernorm_{theirs}_{which}"] = config.pop(f"{ours}_{which}_factor")
    del config["block_size"]
    return older_rope(config), {
        n: a for n, a in tensors.items() if not n.endswith(("_decay", "slope_rate"))}


FORMS = [llama, qwen3, gpt2, gemma2, gemma3, qwen3_5, phi3, smollm3, olmo_hybrid,
         kimi_linear, minimax]


def content(name):
    """The config and the tensors of a folder."""
    config = json.loads((NAMED[name] / "config.json").read_text())
    return config, dict(Files(NAMED[name]))


def written(folder, config, tensors):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({n: np.ascontiguousarray(a) for n, a in tensors.items()},
              folder / WEIGHTS, metadata={"format": "pt"})
    return folder


def alike(a, b):
    """Two models with the same parameters and fields, whatever they came from."""
    (one, left), (two, right) = a, b
    assert one.clone(source=None) == two.clone(source=None)
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for x, y in zip(jax.tree.leaves(left), jax.tree.leaves(right)):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_older_forms_are_the_same_model(form, tmp_path):
    found = load(written(tmp_path, *form(*content(form.__name__))))
    alike(found, load(NAMED[form.__name__]))


def test_several_files_with_an_index(tmp_path):
    config, tensors = content("mistral")
    names = sorted(tensors)
    where = {n: f"model-{1 + i % 2:05d}-of-00002.safetensors"
             for i, n in enumerate(names)}
    for file in set(where.values()):
        save_file({n: tensors[n] for n in names if where[n] == file}, tmp_path / file)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": where}))
    (tmp_path / "config.json").write_text(json.dumps(config))
    alike(load(tmp_path), load(NAMED["mistral"]))


def test_bfloat16_stays_what_it_is(tmp_path):
    config, tensors = content("llama")
    low = {n: a.astype(ml_dtypes.bfloat16) for n, a in tensors.items()}
    folder = written(tmp_path / "a", config | {"dtype": "bfloat16"}, low)
    model, params = load(folder)
    assert {a.dtype for a in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}
    assert model.dtype == jnp.bfloat16
    assert load(folder, dtype=jnp.float32)[0].dtype == jnp.float32
    save(tmp_path / "b", model, params)
    for name, a in Files(tmp_path / "b").items():
        np.testing.assert_array_equal(a, low[name])


def test_a_mesh_has_each_parameter_where_it_belongs():
    mesh = jax.make_mesh((1, 2, 2), ("data", "seq", "model"), devices=jax.devices()[:4])
    _, params = load(NAMED["mixtral"], mesh)
    alike((load(NAMED["mixtral"])[0], params), load(NAMED["mixtral"]))
    layer = params["params"]["layers"]["layer_0"]
    assert layer["mixer"]["q"]["kernel"].sharding.spec[1] == "model"
    assert layer["mlp"]["experts"]["gate_kernel"].sharding.spec[0] == "model"


def packed(rng, n, outputs, inputs):
    """Random MXFP4 and, by a loop in float64, what it stands for [n,outputs,inputs]."""
    blocks = rng.integers(0, 256, (n, outputs, inputs // BLOCK, 16)).astype(np.uint8)
    scales = rng.integers(118, 126, blocks.shape[:3]).astype(np.uint8)
    value = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    want = np.zeros((n, outputs, inputs))
    for at in np.ndindex(*blocks.shape):
        for half, nibble in enumerate(divmod(int(blocks[at]), 16)[::-1]):
            number = value[nibble % 8] * (-1) ** (nibble // 8)
            place = at[2] * BLOCK + 2 * at[3] + half
            want[at[0], at[1], place] = number * 2.0 ** (int(scales[at[:3]]) - 127)
    return blocks, scales, want


def test_mxfp4_is_its_format():
    rng = np.random.default_rng(0)
    blocks, scales, want = packed(rng, 2, 3, 64)
    np.testing.assert_array_equal(
        dequantised(blocks, scales).astype(np.float64), want)
    scales[0, 0, 0] = 255
    with pytest.raises(ValueError, match="255 is NaN"):
        dequantised(blocks, scales)


def test_experts_of_four_bits_are_read(tmp_path):
    config, tensors = content("gpt_oss")
    rng, wide, inner = np.random.default_rng(0), 64, 32
    config |= {"hidden_size": wide, "intermediate_size": inner, "num_hidden_layers": 1,
               "layer_types": ["full_attention"], "quantization_config": {
                   "quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}}
    found, want = {}, {}
    for name, a in tensors.items():
        if re.search(r"layers\.[1-9]", name) or name.endswith("_proj"):
            continue
        shape = [{48: wide, 80: inner, 160: 2 * inner}.get(n, n) for n in a.shape]
        found[name] = rng.normal(size=shape).astype(np.float32)
    for name, outputs, inputs in (("gate_up", 2 * inner, wide), ("down", wide, inner)):
        own = f"model.layers.0.mlp.experts.{name}_proj"
        blocks, scales, want[name] = packed(rng, 4, outputs, inputs)
        found |= {f"{own}_blocks": blocks, f"{own}_scales": scales}
    model, params = load(written(tmp_path / "a", config, found))
    own = params["params"]["layers"]["layer_0"]["mlp"]["experts"]
    both = np.asarray(want["gate_up"]).swapaxes(1, 2)
    for name, exact in (("gate", both[..., ::2]), ("up", both[..., 1::2]),
                        ("out", want["down"].swapaxes(1, 2))):
        assert own[f"{name}_kernel"].dtype == jnp.bfloat16
        np.testing.assert_array_equal(
            np.asarray(own[f"{name}_kernel"], np.float64), exact)
    save(tmp_path / "b", model, params)  # as plain numbers
    again = load(tmp_path / "b")
    alike(again, (model, params))
    assert "quantization_config" not in again[0].source


# what transformers 5.24.0 gives with `biased` in front of it: the first three logits
# of the last token of each row
BIASED = {
    "olmo_hybrid": [[2.53550, -0.72353, 1.17854], [0.59990, -0.02106, -2.08605]],
    "qwen3_5": [[-2.15159, -0.41673, 0.05157], [-3.10002, -1.73809, -0.55323]],
    "qwen3_next": [[1.61546, -0.29868, 1.06180], [1.31575, 0.22912, -1.05500]],
    "kimi_linear": [[-0.33078, -0.16859, -0.17807], [-1.02215, 1.88281, -0.02538]],
}


def biased(name):
    """A hybrid whose projections of softmax have biases."""
    config, tensors = content(name)
    rng, own = np.random.default_rng(0), "model.layers.3.self_attn."
    leaves = ["k_proj", "o_proj", "q_proj", "v_proj"]
    for leaf in ["kv_a_proj_with_mqa", "o_proj"] if name == "kimi_linear" else leaves:
        rows = len(tensors[f"{own}{leaf}.weight"])
        tensors[f"{own}{leaf}.bias"] = rng.normal(size=rows).astype(np.float32)
    return config | {"attention_bias": True}, tensors


@pytest.mark.parametrize("name", BIASED)
def test_softmax_of_a_hybrid_may_have_biases(name, tmp_path):
    config, tensors = biased(name)
    model, params = load(written(tmp_path / "a", config, tensors))
    tokens = np.load(NAMED[name] / "expected.npz")["tokens"]
    found = compiled.apply(model, params, tokens)
    np.testing.assert_allclose(found[:, -1, :3], BIASED[name], rtol=0, atol=1e-4)
    save(tmp_path / "b", model, params)
    again = dict(Files(tmp_path / "b"))
    assert again.keys() == tensors.keys()
    for leaf in again:
        np.testing.assert_array_equal(again[leaf], tensors[leaf], err_msg=leaf)


@pytest.mark.parametrize("name, change", [
    ("gemma3", {"attn_logit_softcapping": 20.0}),
    ("kimi_linear", {"tie_word_embeddings": True}),
    ("minimax", {"partial_rotary_factor": 0.5}),
    ("mistral", {"partial_rotary_factor": 0.5}),
])
def test_keys_that_the_reference_does_not_read_change_nothing(name, change, tmp_path):
    """transformers 5.24.0 has them in its config, and gives the same logits."""
    config, tensors = content(name)
    alike(load(written(tmp_path, config | change, tensors)), load(NAMED[name]))


def test_kinds_of_layers_count_more_than_the_flag_for_windows(tmp_path):
    config, tensors = content("smollm3")
    kinds = ["sliding_attention", *config["layer_types"][1:]]
    config |= {"layer_types": kinds, "sliding_window": 6, "use_sliding_window": False}
    model, _ = load(written(tmp_path, config, tensors))
    window = Softmax(mask=Causal() & Window(5))
    assert model.attention == (window, *[Softmax()] * 3)
