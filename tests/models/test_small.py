"""The model that ships: what it is, where it comes from, and that it does what its card
says it was measured to do."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import models.small
from experiments import evaluate, small, sources
from experiments.cli import config
from experiments.measure.asked import needle, repeats, score
from models.generate import generate

MOST = 12 * 2**20  # bytes that a clone pays for it


@pytest.fixture(scope="module")
def shipped():
    return models.small.load()


def recorded(name):
    return json.loads((models.small.FOLDER / name).read_text())


def test_it_is_small_and_of_its_config(shipped):
    files = [p for p in models.small.FOLDER.rglob("*")
             if p.is_file() and "__pycache__" not in p.parts]
    assert sum(path.stat().st_size for path in files) <= MOST
    assert (len(shipped.model.blocks()), shipped.model.heads) == (4, 8)
    assert shipped.model.vocab == 2048
    assert all(a.dtype == jnp.bfloat16 for a in jax.tree.leaves(shipped.params))
    assert small.Config().model() == shipped.model


def test_its_record_is_that_of_the_command_at_its_defaults():
    run = recorded("training.json")
    assert run["command"] == "python -m experiments.small"
    own = {name: text for name, text in config.settings(small.Config()).items()
           if name != "text"}  # which is that of the Python that runs this
    assert own.items() <= run["settings"].items()
    assert small.PYTHON_3_11_7 in run["settings"]["text"]
    assert recorded("files.json")["digest"] == small.PYTHON_3_11_7
    steps = [json.loads(line)["step"] for line in
             (models.small.FOLDER / "training.jsonl").read_text().splitlines()]
    assert steps[-1] == small.Config().steps and steps == sorted({*steps})


def test_its_evaluation_reaches_what_was_asked_of_it():
    found = recorded("evaluation.json")
    assert found["needle"][""] >= 0.95
    assert found["repeats"][""] >= 0.9
    assert found["text"]["bits_per_byte"] < found["text"]["gzip_bits_per_byte"]
    assert max(cell["length"] for cell in found["needle"]["cells"]) == 1024


def test_it_finds_and_repeats(shipped):
    hay = np.asarray(shipped.tokenizer.encode("def f(x):\n    return x\n" * 40,
                                              special=False), np.int32)
    reader = evaluate.Reader(
        shipped.model, shipped.params, shipped.tokenizer, hay,
        shipped.tokenizer.encode(""), 256, 0)
    rows = [needle(reader, 256, depth, n) for n, depth in enumerate((0, 0.3, 0.6, 1))]
    assert score(reader, rows, 4)[0] >= 0.75
    assert score(reader, [repeats(reader, 2047, n) for n in range(4)], 4)[1] >= 0.9


def test_it_says_what_a_prompt_told_it(shipped):
    text = ("\n# The secret number of violin is 40213.\nimport os\n\n"
            "# The secret number of violin is")
    said = generate(shipped.model, shipped.params, [shipped.tokenizer.encode(text)],
                    length=8)[0]
    assert "40213" in shipped.tokenizer.decode(said)


def test_commands_read_it_by_its_name(tmp_path, monkeypatch):
    found = sources.loaded(sources.SHIPPED)
    assert found.limit == 1024 and found.model.vocab == 2048
    monkeypatch.chdir(tmp_path)
    assert sources.folder_of("small") == models.small.FOLDER
    pathlib.Path("small").mkdir()  # what is here has the name
    assert sources.folder_of("small") != models.small.FOLDER
