"""Checkpoints: folders of transformers give the logits of transformers, go on token by
token, and come out as they went in."""

import functools
import pathlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn.lightning import Lightning
from attn.softmax import Softmax
from models.block import Residual
from models.checkpoint import load, save
from models.checkpoint.architectures import described
from models.checkpoint.files import Files
from models.feed import Feed
from models.generate import generate, stream
from models.lm import LM
from tests import compiled

FOLDERS = sorted(path.parent for path in (
    pathlib.Path(__file__).parents[1] / "checkpoints").glob("*/config.json"))
NAMED = {folder.name: folder for folder in FOLDERS}
# a full pass and a stream differ by the order of their sums
TOLERANCE = 1e-4


@functools.cache
def loaded(folder):
    """Model, parameters and what the reference implementation gave."""
    return *load(folder), dict(np.load(folder / "expected.npz"))


@functools.cache
def program(model):
    return jax.jit(model.apply)


def full(model, params, tokens, segments):
    """The logits [B,T,vocab] of one compiled pass, whatever the padding."""
    tokens, segments = (jnp.asarray(a, jnp.int32) for a in (tokens, segments))
    return np.asarray(program(model)(params, tokens, segments=segments))


every = pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)


@every
def test_logits_are_those_of_the_reference(folder):
    model, params, expected = loaded(folder)
    tokens = expected["tokens"]
    found = full(model, params, tokens, np.ones_like(tokens))
    np.testing.assert_allclose(found, expected["logits"], rtol=0, atol=TOLERANCE)


@every
def test_greedy_tokens_are_those_of_the_reference(folder):
    """Each expected token is the likeliest one after those before it, which is what
    greedy decoding means; one compiled pass says it for all."""
    model, params, expected = loaded(folder)
    tokens, lengths = expected["tokens"], expected["prompt_lengths"]
    text, real = np.zeros_like(tokens), np.zeros_like(tokens)
    for row, n in enumerate(lengths):
        new = expected["greedy"][row]
        text[row, :n] = tokens[row, :n]
        text[row, n:n + len(new)] = new
        real[row, :n + len(new)] = 1
    found = full(model, params, text, real).argmax(-1)
    for row, n in enumerate(lengths):
        new = expected["greedy"][row]
        assert expected["greedy_margin"][row] > 1e-3
        np.testing.assert_array_equal(found[row, n - 1:n - 1 + len(new)], new)


@every
def test_a_left_padded_batch_is_its_prompts(folder):
    model, params, expected = loaded(folder)
    tokens, lengths = expected["tokens"], expected["prompt_lengths"]
    text, real = np.zeros_like(tokens), np.zeros_like(tokens)
    for row, n in enumerate(lengths):
        text[row, -n:], real[row, -n:] = tokens[row, :n], 1
    found = full(model, params, text, real)
    for row, n in enumerate(lengths):
        np.testing.assert_allclose(
            found[row, -n:], expected["logits"][row, :n], rtol=0, atol=TOLERANCE)


@every
def test_a_stream_is_the_full_pass(folder):
    model, params, expected = loaded(folder)
    tokens = jnp.asarray(expected["tokens"], jnp.int32)
    found = stream(model, params, tokens, prompt=19)
    whole = full(model, params, tokens, np.ones_like(tokens))
    np.testing.assert_allclose(found, whole, rtol=0, atol=TOLERANCE)


@every
def test_what_is_saved_is_what_was_loaded(folder, tmp_path):
    model, params, _ = loaded(folder)
    save(tmp_path, model, params)
    before, after = Files(folder), Files(tmp_path)
    assert before.keys() == after.keys()
    for name, header in before.headers.items():
        assert after.headers[name].shape == header.shape, name
        assert after.headers[name].dtype == header.dtype, name
        if name.endswith(("_decay", "slope_rate")):
            # buffers that follow from the config, exponentials of another library
            np.testing.assert_array_max_ulp(after[name], before[name], 1)
        else:
            np.testing.assert_array_equal(after[name], before[name], err_msg=name)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_generating_gives_the_greedy_tokens(name):
    model, params, expected = loaded(NAMED[name])
    prompts = [row[:n].tolist() for row, n in
               zip(expected["tokens"], expected["prompt_lengths"])]
    assert generate(model, params, prompts, length=16) == expected["greedy"].tolist()


@pytest.mark.parametrize("fields, name", [
    ({}, "llama"), ({"kv_heads": 2, "tied": False, "hidden": 24}, "llama"),
    ({"use_bias": True, "head_dim": 6}, "llama"), ({"qk_norm": "head"}, "qwen3"),
    ({"qk_norm": "all", "residual": Residual(before=False, after=True)}, "olmo2"),
])
def test_a_model_made_here_is_saved_and_comes_back(fields, name, tmp_path):
    model = LM(vocab=40, width=16, attention=(Softmax(),), **fields)
    if fields.get("use_bias"):
        model = model.clone(feed=Feed(24, bias=True))
    tokens = np.random.default_rng(0).integers(0, 40, (2, 9))
    params = compiled.init(model, jax.random.key(0), tokens)
    save(tmp_path, model, params)
    again, found = load(tmp_path)
    assert again.source["model_type"] == name
    chex.assert_trees_all_equal(params, found)
    chex.assert_trees_all_close(
        compiled.apply(model, params, tokens), compiled.apply(again, found, tokens))


class Grouped(LM):
    """A model with a field of its own."""

    groups: int = 2


def test_a_model_with_fields_of_its_own_has_no_config():
    with pytest.raises(ValueError, match="groups=2 .* expected an LM, not a Grouped"):
        described(Grouped())


@pytest.mark.parametrize("fields, field", [
    ({"attention": (Lightning(),)}, "attention"), ({"position": None}, "position"),
    ({"softcap": 3.0}, "softcap"), ({"hidden": 0}, "hidden"),
    ({"sinks": True}, "sinks"),
    ({"qk_norm": "all"}, "residual"), ({"out_gate": "full"}, "out_gate"),
])
def test_a_model_that_no_config_describes(fields, field, tmp_path):
    with pytest.raises(ValueError, match=f"{field}=.* stands in no config.json of"):
        save(tmp_path, LM(**fields), {"params": {}})
