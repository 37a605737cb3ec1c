"""Steering and calibration of a model that is given, in its own words."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn.act import ACT
from experiments import calibrate, steer
from experiments.data import Text
from experiments.measure import asked, calibrating, told
from experiments.measure.head_choice import everywhere
from experiments.sources import loaded
from tests.experiments.test_evaluate import folder  # noqa: F401

TEXT = Text(path="models", pattern="*.py")
SMALL = {"facts": 2, "shared": 2, "text": TEXT}


@pytest.fixture(scope="module")
def reader(folder):  # noqa: F811
    found = loaded(str(folder))
    hay = np.asarray(asked.plain(found.text, "import this\n" * 9))
    return asked.Reader(found.model, found.params, found.text, hay, [1], 512, 0)


@pytest.fixture(scope="module")
def rows(reader):
    return told.told(reader, np.random.default_rng(0), 3, 4, 2)


def test_rows_ask_for_the_fact_that_they_say(reader, rows):
    for n in range(3):
        text = lambda ids: reader.text.decode([int(i) for i in ids])
        question = text(rows.prompt[n, rows.question[n]:])
        begin, end = rows.spans[n, rows.sentence[n]]
        assert text(rows.prompt[n, begin:end]) == (
            question + text(rows.answer[n]) + "\n")
        keys = [text(rows.prompt[n, a:b]).split(" is ")[0].split()[-2:]
                for a, b in rows.spans[n]]
        assert len({last for _, last in keys}) == 2
        assert len({first for first, _ in keys}) == 4
    assert (told.nearest(rows, rows.answer) == rows.sentence).all()


def test_what_is_written_without_heads_is_what_the_model_says(reader, rows):
    model, layers = told.steerable(reader.model, 0.01)
    say = lambda heads, sentence: told.written(
        model, reader.params, rows, 1, heads, sentence, 2)
    plain = say(np.zeros((1, 2)), rows.sentence)
    ids, many = np.concatenate([rows.prompt, plain], 1), plain.shape[1]
    said = np.asarray(jax.jit(reader.model.apply)(reader.params, ids).argmax(-1))
    np.testing.assert_array_equal(plain, said[:, -many - 1:-1])
    assert layers == [0]


def test_a_stream_without_calibrated_heads_is_the_text_at_once(reader):
    model = everywhere(reader.model, ACT())
    some = calibrating.of_text(reader, np.random.default_rng(0), 3, 32)
    nats, right = calibrating.judged(
        model, reader.params, 2, some, np.zeros((1, 2)))
    logits = jax.nn.log_softmax(reader.model.apply(reader.params, some.ids[:, :-1]))
    own = jnp.take_along_axis(logits, some.ids[:, 1:, None], 2)[..., 0]
    np.testing.assert_allclose(nats, -own[:, 15:].sum(1), rtol=1e-5)
    assert right.tolist() == [0, 0, 0]
    assert some.bytes.tolist() == [16] * 3  # letters
    with pytest.raises(ValueError, match="length=600: expected 5 to 512"):
        calibrating.of_text(reader, np.random.default_rng(0), 3, 600)


def test_both_commands_with_a_folder(folder, tmp_path):  # noqa: F811
    settings = dataclasses.replace(
        steer.TINY, model=str(folder), profiled=2, asked=3, batch=3,
        folder=str(tmp_path / "steer"), **SMALL)
    found = steer.run(settings)
    assert {"gold", "self-found", "random", "sentences found"} <= found.keys()
    # one layer, two heads, and pairs of at most one
    assert found["evaluations"] == 3 and found["evaluations, one by one"] == 2
    settings = dataclasses.replace(
        calibrate.TINY, model=str(folder), held_out=2, fresh=3, batch=3, length=16,
        folder=str(tmp_path / "calibrate"), **SMALL)
    found = calibrate.run(settings)
    assert found["bits per byte"] > 0 and found["sinks a head and text"] >= 0
    assert {"text: change, all heads low", "answers: change, kept heads"} <= {
        name.replace(", low", " low") for name in found}
    kept = json.loads((tmp_path / "calibrate" / "calibrate.json").read_text())
    assert np.shape(kept["text"]) == (1, 2)


@pytest.mark.parametrize("name, more, message", [
    ("tests/checkpoints/llama", {}, "has no tokenizer.json: expected a model"),
    ("tests/checkpoints/kimi_linear", {}, "no layer is exact attention"),
    ("tests/checkpoints/nobody", {}, "nobody"),
    (None, {"shared": 3}, "facts=2, shared=3: expected"),
    (None, {"facts": 60}, "keys of at most 58 words"),
])
@pytest.mark.parametrize("command", [steer, calibrate])
def test_models_that_cannot_be_asked(
        command, name, more, message, folder, tmp_path):  # noqa: F811
    settings = dataclasses.replace(
        command.TINY, model=name or str(folder), folder=str(tmp_path / "run"),
        **SMALL | more)
    with pytest.raises((ValueError, OSError), match=message):
        command.run(settings)
