"""Which attention stands where: patterns that are set, networks that have them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn.abc import ABC
from attn.contract.patterns import PATTERNS, patterns
from attn.cosformer import CosFormer
from attn.delta import Delta
from attn.flow import Flow
from attn.lara import LARA
from attn.local import Local
from attn.longshort import LongShort
from attn.masks import Causal, Full, Window
from attn.performer import Performer
from attn.s4d import S4D
from attn.softmax import Softmax
from models.places import Places, allows, in_pattern, placed
from models.seq2seq import Seq2Seq
from tests import compiled

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("attention, found", [
    (Softmax(), "NS CS NC CC"), (Softmax(mask=Causal() & Window(4)), "CS"),
    (Softmax(mask=Full()), "NS NC CC"), (Local(), "NS CS"), (ABC(), "NS CS NC CC"),
    (LongShort(), "NS CS"), (CosFormer(length=8), "NS CS NC CC"),
    (Performer(), "NS CS NC CC"), (LARA(), "NS"), (S4D(), "NS CS"),
    (Flow(), "NS CS NC"), (Delta(), "CS"),
], ids=str)
def test_what_an_attention_can_be_set_to(attention, found):
    assert " ".join(p for p in PATTERNS if allows(attention, p)) == found
    for pattern in found.split():
        assert pattern in patterns(in_pattern(attention, pattern))


def test_what_it_cannot_is_said_in_a_sentence():
    with pytest.raises(ValueError, match="LARA cannot be set to CS: expected"):
        in_pattern(LARA(), "CS")
    with pytest.raises(ValueError, match="pattern='XX': expected one of"):
        in_pattern(Softmax(), "XX")
    with pytest.raises(ValueError, match="attention.0. is the class Softmax"):
        in_pattern(Softmax, "NS")


def test_exact_attention_is_one_network_in_all_patterns():
    assert {placed(Softmax(), pattern) for pattern in PATTERNS} == {Places()}
    one = placed(ABC(landmarks=2), "CC")
    assert one.NS == Places().NS and one.CC.landmarks == 2 and not one.CC.causal


@pytest.mark.parametrize("pattern, attention", [
    ("NS", ABC(landmarks=2)), ("CS", ABC(landmarks=2)), ("CC", ABC(landmarks=2)),
    ("CS", S4D(state=4)),
], ids=str)
def test_a_decoder_sees_no_later_token_and_all_of_its_source(pattern, attention):
    model = Seq2Seq(16, 8, 2, 1, placed(attention, pattern))
    source, before = (jnp.asarray(RNG.integers(16, size=(2, n))) for n in (7, 5))
    params = compiled.init(model, jax.random.key(0), source, before)
    names = {"NS": "encoder", "CS": "own", "CC": "cross"}
    learned = [jax.tree_util.keystr(path) for path, _ in
               jax.tree_util.tree_leaves_with_path(params) if "'attention'" in
               jax.tree_util.keystr(path)]
    assert learned and all(names[pattern] in path for path in learned)
    logits = compiled.apply(model, params, source, before)
    later = before.at[:, 3:].set((before[:, 3:] + 1) % 16)
    other = compiled.apply(model, params, source, later)
    np.testing.assert_array_equal(logits[:, :3], other[:, :3])
    assert np.abs(logits[:, 3:] - other[:, 3:]).max() > 1e-3
    last = source.at[:, -1].set((source[:, -1] + 1) % 16)
    assert np.abs(compiled.apply(model, params, last, before) - logits).min((1, 2)).min(
        ) > 0
