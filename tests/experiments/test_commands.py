"""Every experiment at TINY, and its command line as a stranger meets it."""

import importlib
import json
import pathlib
import subprocess
import sys

import pytest

from experiments.__main__ import experiments
from experiments.cli import config

ROOT = pathlib.Path(__file__).parents[2]
NAMES = list(experiments())


def shell(*words, cwd=ROOT):
    return subprocess.run(
        [sys.executable, "-m", *words], cwd=cwd, capture_output=True, text=True,
        env={**__import__("os").environ, "PYTHONPATH": str(ROOT)},
    )


def test_the_main_job_and_its_parts_are_there():
    assert {"compare", "lm", "recall", "speed"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_tiny(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(f"experiments.{name}")
    found = module.run(module.TINY)
    assert found and all(isinstance(v, (int, float, str)) for v in found.values())
    assert "numpy" not in repr(found)
    json.dumps(found)


@pytest.mark.parametrize("name", NAMES)
def test_the_docstring_says_what_to_type_and_the_help_lists_fields(name):
    module = importlib.import_module(f"experiments.{name}")
    assert f"python -m experiments.{name}" in module.__doc__
    text = config.usage(module.Config, module.__doc__)
    for field in module.Config.__dataclass_fields__.values():
        assert f"--{field.name}" in text and field.metadata["doc"] in text


def test_compare_leaves_its_results(tmp_path, monkeypatch):
    from experiments import compare

    monkeypatch.chdir(tmp_path)
    folder = pathlib.Path(compare.run(compare.TINY)["folder"])
    found = json.loads((folder / "compare.json").read_text())
    assert [row["attention"] for row in found["rows"]] == [
        "Softmax()", "SnapKV(capacity=6, window=2)"
    ]
    exact, snap = found["rows"]
    assert snap["trained_as"] == "Softmax()" and exact["losses"] == snap["losses"]
    assert snap["text_state"] < exact["text_state"]
    for picture in ("recall.png", "loss.png"):
        assert (folder / picture).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    page = (folder / "report.html").read_text()
    assert "SnapKV(capacity=6, window=2)" in page and "data:image/png" in page
    again = pathlib.Path(compare.run(compare.TINY)["folder"])
    assert again != folder and (folder / "compare.json").exists()


def test_a_row_of_the_table_can_be_pasted():
    from experiments import compare, recall

    shown = config.command(compare.Config().recall(compare.Config().attentions[1]))
    words = __import__("shlex").split(shown)[3:]
    mask = "Softmax(mask=Causal() & Window(31))"
    assert f"--attention={mask}" in words
    assert config.read(recall.Config, words).attention == config.parse(mask)


def test_the_list_and_wrong_words_in_a_shell():
    assert "recall" in shell("experiments").stdout
    for words, text in (
        (("experiments", "recal"), "recall"),
        (("experiments.recall", "--attention=Softmaxx()"), "Softmax"),
        (("experiments.recall", "--pears=3"), "--pairs"),
        (("experiments.recall", "--pairs=many"), "--pairs=many"),
        (("experiments.lm", "--text=Text(path='/nowhere/at/all')"), "no such file"),
    ):
        end = shell(*words)
        assert end.returncode == 2 and "Traceback" not in end.stderr
        assert text in end.stderr and len(end.stderr.strip().splitlines()) == 1
