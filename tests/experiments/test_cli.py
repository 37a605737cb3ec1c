"""Configs: what is printed is what can be typed, and nothing typed is executed."""

import dataclasses
import io
import pathlib
import re

import jax.numpy as jnp
import pytest

from attn.baseconv import BaseConv
from attn.based import Based
from attn.landmark import Landmark
from attn.lightning import Lightning
from attn.masks import Causal, Full, Not, Sink, Window
from attn.positions import ALiBi, RoPE
from attn.snapkv import SnapKV
from attn.softmax import Softmax
from experiments.cli import config
from experiments.cli.config import command, option, main, parse, read, format_value
from experiments.data import Recall, Text

VALUES = [
    1, -2.5, 1e-9, float("inf"), True, None, "a 'b' \"c\"", (), (1,), [1, (2, "x")],
    {"a": (1, 2)}, jnp.bfloat16, Full(), Window(3), Window(3, right=2),
    Causal() & Window(256) | Sink(4), Causal() & (Window(256) | Sink(4)),
    ~(Causal() & Not(Sink(1))), Softmax(), Softmax(score=ALiBi(4), softcap=30.0),
    (Lightning(), Softmax(mask=Causal() & Window(64))) * 2,
    (Lightning(),) * 3 + (Softmax(),), (BaseConv(variant="zoology", kernel=2), Based()),
    Landmark(block=15, top_k=2, rope=RoPE(scaling="yarn", factor=4.0)),
    SnapKV(capacity=24, window=8, pool="max"), Text(length=32, path="a b/c"), Recall(),
]


@dataclasses.dataclass(frozen=True)
class Config:
    """A config of every kind of field."""

    attention: tuple = option((Softmax(),), "the layers")
    steps: int = option(10, "training steps")
    rate: float = option(1e-3, "learning rate")
    name: str = option("x", "of the run")
    folder: str | None = option(None, "where to")
    quiet: bool = option(False, "no bar")
    mesh: tuple[int, int, int] = option((1, 1, 1), "devices")
    text: Text = option(Text(), "the text")

    def __post_init__(self):
        if self.steps < 1:
            raise ValueError(f"steps={self.steps}: expected 1 or more")


TINY = Config(steps=1)


@pytest.mark.parametrize("value", VALUES, ids=lambda v: str(v)[:30])
def test_what_is_shown_is_read_back(value):
    text = format_value(value)
    assert parse(text) == value
    assert format_value(parse(text)) == text and "\n" not in text


def test_short_forms():
    assert format_value((Lightning(), Softmax()) * 2) == "(Lightning(), Softmax()) * 2"
    for text in ("(Lightning(),) * 3 + (Softmax(),)",
                 "Causal() & (Window(9) | Sink(4))"):
        assert format_value(parse(text)) == text


@pytest.mark.parametrize("changes", [
    {}, {"steps": 7, "rate": 1.0, "quiet": True}, {"name": "two words"},
    {"attention": (Lightning(), SnapKV(mask=Causal() & Window(5))) * 4},
    {"text": Text(length=8, path="x y.txt")}, {"mesh": (2, 1, 4)}, {"name": "'q'"},
])
def test_a_command_line_is_its_config(changes):
    given = Config(**changes)
    import shlex

    words = shlex.split(command(given))
    assert words[:3] == ["python", "-m", __name__]
    assert read(Config, words[3:]) == given


def test_forms_of_words():
    assert read(Config, ["--steps", "3", "--quiet"]) == Config(steps=3, quiet=True)
    assert read(Config, ["--rate=1"]).rate == 1.0
    assert read(Config, [], start=TINY).steps == 1


@pytest.mark.parametrize("words, parts", [
    (["--attention=(Softmx(),)"], ["Softmx", "Softmax"]),
    (["--attention=(SnapKV(capcity=3),)"], ["capcity", "capacity"]),
    (["--attention=(SnapKV(capacity=3),)"], ["window=64, capacity=3", "expected"]),
    (["--attention=Softmax()"], ["--attention", "tuple"]),
    (["--stpes=3"], ["--stpes", "--steps"]), (["--steps=3.5"], ["--steps=3.5", "int"]),
    (["--steps=0"], ["steps=0", "1 or more"]), (["--steps=3", "--steps=4"], ["twice"]),
    (["--steps"], ["--steps", "no value"]), (["steps=3"], ["--field=value"]),
    (["--quiet=maybe"], ["--quiet=maybe", "bool"]), (["--mesh=(1, 2)"], ["--mesh"]),
    (["--attention=(Softmax("], ["cannot read"]), (["--rate=fast"], ["float"]),
    (["--attention=(__import__('os').system('true'),)"], ["cannot read"]),
    (["--attention=(open('/etc/passwd'),)"], ["open"]),
    (["--attention=(Softmax(),) * 999999999"], ["expected"]),
    (["--attention=" + "(" * 3000], ["cannot read"]),
    (["--attention=" + "[" * 600 + "]" * 600], ["cannot read"]),
    (["--attention=(" + "~" * 5000 + "Causal(),)"], ["cannot read"]),
    (["--steps=99999999999999999999"], ["64 bits"]), (["--steps=" + "9" * 5000], []),
    (["--attention=(Window(2**70),)"], ["cannot read"]), (["--rate=1e999x"], ["float"]),
    (["--attention=(Window(99999999999999999999),)"], ["64 bits"]),
    (["--name=\udcff"], ["UTF-8"]), (["--mesh=(1, 1, True)"], ["--mesh"]),
    (["--attention=(Softmax(scale='x'),)"], ["scale"]), (["--text=5"], ["Text"]),
])
def test_wrong_words_end_with_one_sentence(words, parts, capsys):
    with pytest.raises(SystemExit) as end:
        main(lambda c: {}, Config, "doc", words)
    out = capsys.readouterr().err
    assert end.value.code == 2 and len(out.strip().splitlines()) == 1
    for part in parts:
        assert part in out, out


def test_main_prints_the_command_and_the_numbers(capsys):
    found = main(lambda c: {"loss": 1 / 3, "steps": c.steps}, Config, "doc",
                 ["--steps=4"])
    out = capsys.readouterr().out.splitlines()
    assert found == {"loss": 1 / 3, "steps": 4}
    assert out == [f"python -m {__name__} --steps=4", "loss   0.333333", "steps  4"]


def test_tiny_and_help(capsys):
    assert main(lambda c: {"n": c.steps}, Config, "doc", ["--tiny"]) == {"n": 1}
    with pytest.raises(SystemExit) as end:
        main(lambda c: {}, Config, "What it does.", ["--help"])
    out = capsys.readouterr().out
    assert end.value.code == 0 and "What it does." in out
    for text in ("--steps=int", "training steps", "10", "--folder=str | None"):
        assert text in out


def test_errors_of_the_run_are_one_sentence(capsys):
    def ours(c):
        Softmax(dropout=2)

    def full(c):
        raise OSError(28, "No space left on device", "results/x")

    def bare(c):
        raise ImportError("text is encoded by a library: pip install 'attn[extra]'")

    def theirs(c):
        return {}["missing"]

    for run, code, parts in ((ours, 2, ["dropout=2"]),
                             (full, 1, ["results/x: No space left on device"]),
                             (bare, 1, [": text is encoded by a library: pip"]),
                             (theirs, 1, ["KeyError: 'missing'", "its traceback is"])):
        with pytest.raises(SystemExit) as end:
            main(run, Config, "doc", [])
        said = capsys.readouterr().err
        assert end.value.code == code and len(said.splitlines()) == 1
        assert all(part in said for part in parts), said
    kept = pathlib.Path(re.search(r"traceback is (\S+)\)", said)[1])
    assert "KeyError" in kept.read_text()
    kept.unlink()
    with pytest.raises(KeyError):
        main(theirs, Config, "doc", ["--traceback"])


def test_a_number_that_is_none_fails(capsys):
    with pytest.raises(SystemExit) as end:
        main(lambda c: {"a": 1.0, "b": float("nan")}, Config, "doc", [])
    said = capsys.readouterr()
    assert end.value.code == 1 and "not a number: b" in said.err and "a  1" in said.out


class Broken(io.StringIO):
    """A terminal that has gone, or a disk that is full."""

    def write(self, text):
        raise OSError(28, "No space left on device")


@pytest.mark.parametrize("out", [None, Broken()])
def test_results_go_to_stderr_if_stdout_is_lost(out, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout", out)
    with pytest.raises(SystemExit) as end:
        main(lambda c: {"loss": 0.5}, Config, "doc", [])
    said = capsys.readouterr().err
    assert end.value.code == 1 and "loss  0.5" in said
    assert "standard output cannot be written" in said


def test_letters_that_a_terminal_lacks(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(raw, encoding="ascii"))
    main(lambda c: {"sample": "\u2014\udcff"}, Config, "doc", [])
    assert b"sample  \\u2014\\udcff" in raw.getvalue()


def test_what_tells_runs_apart(tmp_path):
    @dataclasses.dataclass(frozen=True)
    class Run:
        """A config of a run."""

        text: Text = option(Text())
        rate: float = option(0.1)
        steps: int = option(5, run=config.GROWS)
        prompt: str = option("a", run=config.FREE)

    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.txt").write_text("the same text, in two places")
    one, two = (Run(Text(path=str(tmp_path / name), length=3)) for name in "ab")
    found = config.settings(one)
    assert found == config.settings(two) and found["steps"] == 5
    assert found == config.settings(dataclasses.replace(one, prompt="b\r"))
    longer = dataclasses.replace(one, text=dataclasses.replace(one.text, length=4))
    assert found["text"] != config.settings(longer)["text"]
    (tmp_path / "b" / "x.txt").write_text("another one")
    other = dataclasses.replace(two, text=dataclasses.replace(two.text, held_out=0.2))
    assert found["text"] != config.settings(other)["text"]


def test_ctrl_c(capsys):
    def stopped(c):
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as end:
        main(stopped, Config, "doc", [])
    assert end.value.code == 130 and "Ctrl-C" in capsys.readouterr().err


def test_what_cannot_be_written_is_refused():
    for value in (object(), jnp.zeros(3), lambda: 0):
        with pytest.raises(ValueError, match="cannot be written"):
            format_value(value)
    assert format_value(pathlib.Path("a/b")) == "'a/b'"
    assert config.parse("jnp.float32") == jnp.float32 == config.parse("float32")
