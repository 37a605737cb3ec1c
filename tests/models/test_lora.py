"""LoRA: merged and unmerged are one, only adapters are trained, PEFT's files."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file

from attn.gla import GLA
from attn.sinklora import SinkLoRA
from attn.softmax import Softmax
from models.lm import LM
from models.lora import Adapted, LoRA
from models.peft_files import CONFIG, WEIGHTS
from tests.compiled import apply
from tests.laws import close

LORA = LoRA(rank=3, alpha=6.0)
PLUS = LoRA(rank=3, alpha=6.0, extra=("embed", "norm"))
TOKENS = jnp.arange(14).reshape(2, 7) % 11


def model(**fields):
    attention = (Softmax(), GLA())
    fields = {"width": 16, "heads": 2, "hidden": 24, "attention": attention, **fields}
    return LM(vocab=11, **fields)


@functools.cache
def made(net, lora=LORA):
    """The parameters of a model, and adapters that change something."""
    @jax.jit
    def both():
        params = net.init(jax.random.key(0), TOKENS)["params"]
        adapters = lora.init(jax.random.key(1), params)
        return params, jax.tree.map(
            lambda a: a + 0.1 * jax.random.normal(jax.random.key(2), a.shape), adapters)

    return both()


@functools.cache
def unmerged(net):
    return jax.jit(lambda *args: LORA.apply(net, *args))


def test_adapters_change_nothing_at_first_and_lie_in_the_axes_of_their_kernels():
    net = model()
    params, _ = made(net)
    adapters = LORA.init(jax.random.key(1), params)
    shapes = jax.tree.map(jnp.shape, adapters["layers/layer_0/mixer/q"])
    assert shapes == {"a": (16, 3), "b": (3, 2, 8)}
    shapes = jax.tree.map(jnp.shape, adapters["layers/layer_1/mixer/out"])
    assert shapes == {"a": (2, 8, 3), "b": (3, 16)}
    bound = 16 ** -0.5
    a = adapters["layers/layer_0/mixer/q"]["a"]
    assert 0.8 * bound < np.abs(a).max() <= bound
    merged = LORA.merge(params, adapters)
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(merged), strict=True):
        assert (np.asarray(a) == np.asarray(b)).all()
    # the mlp has an "out" too
    assert "layers/layer_0/mlp/out" in adapters and len(adapters) == 10


def test_merged_and_unmerged_are_one_and_merging_is_undone():
    net = model()
    params, adapters = made(net)
    merged = LORA.merge(params, adapters)
    want = apply(net, {"params": merged}, TOKENS)
    close(unmerged(net)(params, adapters, TOKENS), want)
    plain = apply(net, {"params": params}, TOKENS)
    assert np.abs(want - plain).max() > 0.01
    # by hand: W + alpha / r A B, with heads as columns
    pair = adapters["layers/layer_0/mixer/q"]
    kernel = params["layers"]["layer_0"]["mixer"]["q"]["kernel"]
    flat = np.asarray(pair["a"]) @ np.asarray(pair["b"]).reshape(3, -1) * 2
    close(merged["layers"]["layer_0"]["mixer"]["q"]["kernel"],
          kernel + flat.reshape(16, 2, 8))
    back = LORA.merge(merged, adapters, sign=-1.0)
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(back), strict=True):
        close(a, b)


def test_gradients_of_adapters_are_the_same_unmerged():
    net = model()
    params, adapters = made(net)
    by_merging, by_reading = (jax.jit(jax.grad(lambda a, f=f: f(a).sum())) for f in (
        lambda a: jnp.sin(net.apply({"params": LORA.merge(params, a)}, TOKENS)),
        lambda a: jnp.sin(LORA.apply(net, params, a, TOKENS))))
    for a, b in zip(*(jax.tree.leaves(f(adapters)) for f in (by_merging, by_reading)),
                    strict=True):
        close(a, b, "gradient")


def test_a_stream_goes_on_unmerged():
    net = model()
    params, adapters = made(net)
    state = net.init_state(7, TOKENS)
    _, logits = unmerged(net)(params, adapters, TOKENS, state)
    close(logits, unmerged(net)(params, adapters, TOKENS))
    scanned = model(attention=(Softmax(),) * 2, scan=True)
    params, adapters = made(scanned)
    with pytest.raises(NotImplementedError, match="without scan"):
        LORA.apply(scanned, params, adapters, TOKENS)


@pytest.mark.parametrize("lora, trained", [
    (LORA, ("adapters",)), (PLUS, ("adapters", "embed", "norm")),
], ids=["lora", "lora+"])
def test_only_what_is_named_is_trained(lora, trained):
    """Fine-tuning with SinkLoRA's attention lowers the loss; the rest stays, bit by
    bit, and has no moments."""
    net = Adapted(model(attention=(SinkLoRA(4, sinks=1),) * 2), lora)
    params = jax.jit(net.init)(jax.random.key(0), TOKENS)["params"]
    assert set(params) == {"base", "adapters"}
    optimizer = lora.optimizer(optax.adamw(0.03))
    targets = jnp.roll(TOKENS, -1, 1)

    def loss(params):
        logits = net.apply({"params": params}, TOKENS)
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()

    @jax.jit
    def step(params, moments):
        value, grads = jax.value_and_grad(loss)(params)
        change, moments = optimizer.update(grads, moments, params)
        return optax.apply_updates(params, change), moments, value

    moments, now, losses = optimizer.init(params), params, []
    for _ in range(12):
        now, moments, value = step(now, moments)
        losses.append(float(value))
    assert losses[-1] < 0.95 * losses[0]
    before, after = (dict(jax.tree_util.tree_leaves_with_path(p))
                     for p in (params, now))
    for path, a in before.items():
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        moved = bool((np.asarray(a) != np.asarray(after[path])).any())
        assert moved == any(word in name for word in trained), name
    held = sum(a.size for a in jax.tree.leaves(moments) if hasattr(a, "size"))
    most = sum(a.size for path, a in before.items() if any(
        word in jax.tree_util.keystr(path) for word in trained))
    assert held <= 2 * most + 5
    # what was trained is read by exact attention, without the wrapper
    exact = model(attention=(Softmax(),) * 2)
    merged = lora.merge(now["base"], now["adapters"])
    assert np.isfinite(apply(exact, {"params": merged}, TOKENS)).all()


def test_adapters_go_out_and_in_as_those_of_peft(tmp_path):
    net = model()
    params, adapters = made(net, PLUS)
    PLUS.save(tmp_path, params, adapters)
    config = json.loads((tmp_path / CONFIG).read_text())
    assert config["peft_type"] == "LORA" and config["r"] == 3
    assert config["lora_alpha"] == 6.0
    assert config["target_modules"] == ["down_proj", "k_proj", "o_proj", "q_proj",
                                        "v_proj"]
    arrays = load_file(tmp_path / WEIGHTS)
    name = "base_model.model.model.layers.1.self_attn.o_proj"
    assert arrays[f"{name}.lora_A.weight"].shape == (3, 16)
    assert arrays[f"{name}.lora_B.weight"].shape == (16, 3)
    table = arrays["base_model.model.model.embed_tokens.weight"]
    np.testing.assert_array_equal(table, params["embed"]["embedding"])
    assert "base_model.model.model.layers.0.input_layernorm.weight" in arrays
    # y = x A^T B^T of torch's layout is x A B
    q = "base_model.model.model.layers.0.self_attn.q_proj"
    x = np.random.default_rng(0).normal(size=(5, 16))
    torch = x @ arrays[f"{q}.lora_A.weight"].T @ arrays[f"{q}.lora_B.weight"].T
    pair = adapters["layers/layer_0/mixer/q"]
    close(torch, x @ np.asarray(pair["a"]) @ np.asarray(pair["b"]).reshape(3, -1))
    fresh = jax.jit(net.init)(jax.random.key(7), TOKENS)["params"]
    loaded, found = PLUS.load(tmp_path, fresh)
    for a, b in zip(jax.tree.leaves(adapters), jax.tree.leaves(found), strict=True):
        assert (np.asarray(a) == np.asarray(b)).all()
    assert (loaded["embed"]["embedding"] == params["embed"]["embedding"]).all()
    kernel = loaded["layers"]["layer_0"]["mixer"]["q"]["kernel"]
    assert (kernel == fresh["layers"]["layer_0"]["mixer"]["q"]["kernel"]).all()


def test_other_files_and_fields_are_refused(tmp_path):
    params, adapters = made(model(), PLUS)
    PLUS.save(tmp_path, params, adapters)
    with pytest.raises(ValueError, match="r=3: expected 4"):
        LoRA(rank=4, alpha=6.0).load(tmp_path, params)
    with pytest.raises(ValueError, match="belong to no target"):
        LORA.load(tmp_path, params)
    wide, _ = made(model(width=32))
    with pytest.raises(ValueError, match=r"lora_A.weight \(3, 16\): expected \(3, 32"):
        PLUS.load(tmp_path, wide)
    with pytest.raises(ValueError, match="targets=.*expected names of modules"):
        LoRA(targets=("w",)).init(jax.random.key(0), params)
    with pytest.raises(ValueError, match="adapters of .*no such kernels"):
        LORA.merge(params, {"layers/other": adapters["layers/layer_0/mixer/q"]})
    with pytest.raises(ValueError, match="rank=0: expected 1"):
        LoRA(rank=0)
    with pytest.raises(ValueError, match="expected a tuple of names"):
        LoRA(extra="embed")
