"""The README does what it says: snippets run as they stand, commands can be read."""

import importlib
import pathlib
import re
import shlex

import pytest

from experiments.cli import config

ROOT = pathlib.Path(__file__).parents[1]
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", (ROOT / "README.md").read_text(),
                    re.MULTILINE | re.DOTALL)
SNIPPETS = [text for kind, text in BLOCKS if kind == "python"]
COMMANDS = [
    words[2:] for kind, text in BLOCKS if not kind
    for line in text.replace("\\\n", "").splitlines()
    if (words := shlex.split(line, comments=True)) and words[0] == "python"
    and words[2].startswith("experiments.") and words[2] != "experiments.distributed"
]


@pytest.mark.parametrize("text", SNIPPETS, ids=lambda text: text.split("\n")[1][:40])
def test_a_snippet_runs_as_it_stands(text):
    exec(compile(text, "README.md", "exec"), {"__name__": "snippet"})


@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: words[0])
def test_a_command_can_be_read(words):
    module = importlib.import_module(words[0])
    assert config.read(module.Config, words[1:])


def test_there_are_some():
    assert len(SNIPPETS) >= 4 and len(COMMANDS) >= 5


def test_targets_of_make_are_there():
    rules = (ROOT / "Makefile").read_text()
    text = (ROOT / "README.md").read_text()
    for name in re.findall(r"(?:^|`)make ([a-z-]+)", text, re.MULTILINE):
        assert re.search(rf"^{name}:", rules, re.MULTILINE), name
