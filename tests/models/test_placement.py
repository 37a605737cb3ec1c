"""Placement: where parameters lie, what a step moves, and which axis attentions get."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from attn.baseconv import BaseConv
from attn.lightning import Lightning
from attn.masks import Causal, Window
from attn.mixers import Depthwise, LongConv, Static
from attn.softmax import Softmax
from experiments.training import mesh as meshes
from experiments.training.loop import TrainConfig, staged
from models import placement
from models.lm import LM
from models.transnormer import TransNormer
from models.vocabulary import lookup
from tests.laws import close

# sizes that tell the axes of an array apart: T=24, E=48, vocab 80, hidden 112
MODEL = LM(vocab=80, width=48, heads=4, hidden=112, attention=(Lightning(), Softmax()))
BATCH = {n: jax.ShapeDtypeStruct((8, 24), jnp.int32) for n in ("tokens", "targets")}
MESHES = ((1, 4, 2), (2, 2, 2), (8, 1, 1))


def devices(*sizes):
    kinds = (jax.sharding.AxisType.Auto,) * 3
    return jax.make_mesh(sizes, meshes.AXES, axis_types=kinds)


@pytest.mark.parametrize("name, shape, where, alone", [
    ("params/layers/layer_3/mixer/q/kernel", (64, 4, 16),
     P(("data", "seq"), "model"), P(None, "model")),
    ("params/layers/layer_3/mixer/k/kernel", (64, 1, 16),
     P(("data", "seq", "model")), P()),
    ("params/layers/layer_0/mixer/out/kernel", (4, 16, 64),
     P("model", None, ("data", "seq")), P("model")),
    ("params/layers/layer_0/mlp/up/kernel", (64, 128),
     P(("data", "seq"), "model"), P(None, "model")),
    ("params/layers/layer_0/mlp/out/kernel", (128, 64),
     P("model", ("data", "seq")), P("model")),
    ("params/embed/embedding", (80, 64), P("model", ("data", "seq")), P("model")),
    ("params/embed/embedding", (81, 64), P(None, ("data", "seq", "model")), P()),
    ("params/head/kernel", (64, 80), P(("data", "seq"), "model"), P(None, "model")),
    ("moments/1/0/mu/params/head/kernel", (64, 80),
     P(("data", "seq"), "model"), P(None, "model")),
    ("params/layers/layer_0/mixer/sink", (4,), P("model"), P("model")),
    ("params/norm/scale", (64,), P(), P()),
    ("params/something/new", (30, 7, 60), P(None, None, ("data", "seq")), P()),
    ("params/something/small", (8, 8), P(), P()),
    ("params/something/odd", (33, 35), P(), P()),
])
def test_the_place_of_a_parameter(name, shape, where, alone):
    mesh = devices(2, 2, 2)
    assert placement.spec(name, shape, mesh) == where
    assert placement.spec(name, shape, mesh, fsdp=False) == alone


def test_the_table_adds_up():
    mesh = devices(1, 4, 2)
    params = jax.eval_shape(MODEL.init, jax.random.key(0), BATCH["tokens"])
    text = placement.table(params, mesh)
    assert re.search(r"params/embed/embedding +80x48 +model, seq +1,920\n", text)
    whole = sum(a.size * 4 for a in jax.tree.leaves(params))
    total = int(text.split()[-1].replace(",", ""))
    assert whole / 8 <= total < whole / 8 * 1.1


# attentions have a law of their own
NETWORKS = {
    "baseconv": LM(vocab=256, width=256, heads=8, attention=(BaseConv(),)),
    "zoology": LM(vocab=256, width=256, heads=8, attention=(BaseConv("zoology"),)),
    "mixers": LM(vocab=256, width=256, heads=8, attention=(
        Static(length=64), LongConv(length=64), Depthwise(kernel=17))),
    "transnormer": TransNormer(vocab=256, width=256, heads=8, tied=False),
    "example": TransNormer(vocab=256, width=256, heads=8, variant="example"),
    "untied": LM(vocab=256, width=256, heads=8, tied=False, qk_norm=True),
    "gated": LM(vocab=256, width=256, heads=8, out_norm="head", out_gate="silu"),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_no_parameter_is_forgotten(name):
    """A matrix of 1,024 numbers or more has letters in its class, and is split."""
    mesh, tokens = devices(2, 2, 2), jax.ShapeDtypeStruct((1, 64), jnp.int32)
    params = jax.eval_shape(NETWORKS[name].init, jax.random.key(0), tokens)
    for path, a in jax.tree_util.tree_leaves_with_path(params):
        name = "/".join(key.key for key in path)
        if a.ndim > 1 and a.size >= placement.SMALL:
            assert placement.letters_of(name, a.shape), (name, a.shape)
            assert placement.spec(name, a.shape, mesh) != P(), (name, a.shape)


def test_the_places_in_classes_do_not_contradict_each_other():
    found = {}
    for pattern, letters in placement.rules():
        assert found.setdefault((pattern, len(letters)), letters) == letters, pattern


@dataclasses.dataclass(frozen=True)
class Whole:
    """An attention that must have all tokens in one place."""


def test_every_attention_gets_the_axis():
    mine = Softmax(mask=Causal() & Window(4), axis="model")
    model = LM(attention=(BaseConv(), Lightning(), mine))
    conv, one, other = placement.over(model, "seq").attention
    assert isinstance(conv, BaseConv) and one.axis == "seq" and other is mine
    assert placement.over(TransNormer(), "seq").attention.axis == "seq"
    whole = LM(attention=(Whole(),))
    with pytest.raises(NotImplementedError, match="Whole cannot be split over mesh"):
        placement.over(whole, "seq")
    assert placement.over(whole, "seq", strict=False).attention == whole.attention
    drops = LM(attention=(Softmax(dropout=0.1),))
    assert placement.over(drops, "seq", strict=False).attention[0].axis is None


@pytest.mark.parametrize("sizes", MESHES)
@pytest.mark.parametrize("vocab", (80, 81))
def test_a_look_up_is_a_look_up(sizes, vocab):
    table = jax.random.normal(jax.random.key(0), (vocab, 12))
    tokens = jax.random.randint(jax.random.key(1), (8, 24), 0, vocab)
    out = jax.random.normal(jax.random.key(2), (8, 24, 12))
    both = lambda table: jax.vjp(lambda t: lookup(t, tokens), table)
    want, back = both(table)
    with jax.set_mesh(devices(*sizes)):
        split = jax.jit(lambda t, o: (lookup(t, tokens), both(t)[1](o)))
        have, grad = split(table, out)
    np.testing.assert_array_equal(have, want)
    close(grad[0], back(out)[0], "gradient")


def moved(text, kinds="all-gather|all-to-all|collective-permute"):
    """The shapes [tuple] of what the collectives of a compiled program give."""
    lines = re.findall(rf"= (.*?) (?:{kinds})(?:-start)?\(", text)
    found = [s for line in lines for s in re.findall(r"\w+\[([\d,]*)\]", line)]
    return [tuple(int(n) for n in s.split(",") if n) for s in found]


@pytest.mark.parametrize("sizes, accumulate", [((1, 4, 2), 1), ((2, 2, 2), 2)])
def test_a_step_moves_parameters_keys_and_states_only(sizes, accumulate):
    plan = TrainConfig(batch=8, accumulate=accumulate)
    traced, lowered = staged(MODEL, plan, devices(*sizes), BATCH)
    assert isinstance(lowered, jax.stages.Lowered)
    compiled = lowered.compile()
    data, seq, model = sizes
    rows = 8 // data // accumulate
    allowed = {
        (rows, 24, 4 // model, 12),  # k and v of Softmax
        (rows, 24),  # positions and runs
        (seq, rows, 4 // model, 12, 12),  # states of Lightning
    }
    weights = {tuple(sorted(s)) for s in (
        (48, 4 // model, 12), (48, 112 // model), (80 // model, 48))}
    for shape in moved(compiled.as_text()):
        assert shape in allowed or tuple(sorted(shape)) in weights, shape
    # all that a step needs, and no more than that, lies on a device
    state = compiled.input_shardings[0][0]
    assert jax.tree.leaves(state) == jax.tree.leaves(compiled.output_shardings[0])
