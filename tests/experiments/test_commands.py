"""Every experiment at TINY, and its command line as a stranger meets it."""

import dataclasses
import importlib
import json
import os
import pathlib
import re
import shlex
import subprocess
import sys

import pytest

from attn.compose import Compose
from attn.kivi import KIVI
from attn.local import Local
from attn.masks import Causal, Window
from attn.pasta import Pasta
from attn.prflash import PrFlash
from attn.snapkv import SnapKV
from attn.softmax import Softmax
from attn.streaming import Streaming
from attn.topk import TopK
from experiments import compare, lm
from experiments.__main__ import experiments
from experiments.cli import config, usage
from experiments.data import Text, corpus

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


@pytest.mark.parametrize("attention, policy", (
    (SnapKV(), True), (Compose(storage=KIVI()), True), (Streaming(), True),
    (Local(window=4), False), (PrFlash(), False), (TopK(), False), (Pasta(), False),
    (Softmax(mask=Causal() & Window(3)), False)), ids=lambda a: type(a).__name__)
def test_a_policy_is_trained_as_exact_attention_and_others_as_they_are(
        attention, policy):
    found = compare.trained_as(attention)
    assert (type(found) is Softmax) if policy else found == attention


def test_compare_leaves_its_results(tmp_path, monkeypatch):
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
    assert "2 seeds, 0 to 1; 20" in page and 'class="wide"' in page
    assert "memory of recall, bytes" in page and "memory of text, bytes" in page
    assert len(exact["recall_seeds"]) == len(exact["losses"]) == 2
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


@pytest.mark.parametrize("name", NAMES)
def test_help_is_read_off_the_source(name):
    module = importlib.import_module(f"experiments.{name}")
    said = config.usage(module.Config, module.__doc__).splitlines()
    quick = usage.of_file(ROOT / "experiments" / f"{name}.py").splitlines()
    assert len(said) == len(quick)
    for one, other in zip(said, quick):
        assert one.split("=")[0].split()[:1] == other.split("=")[0].split()[:1]
        assert one.split()[-3:] == other.split()[-3:]


def test_help_imports_nothing_slow():
    code = ("import runpy, sys; sys.argv = ['x', 'recall', '--help']\n"
            "try: runpy.run_module('experiments', run_name='__main__')\n"
            "except SystemExit as end: assert end.code == 0\n"
            "assert 'jax' not in sys.modules and 'numpy' not in sys.modules")
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True,
                   stdout=subprocess.DEVNULL)
    said = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "experiments.recall", "--help"],
        cwd=ROOT, capture_output=True, text=True,
    )
    assert said.returncode == 0 and "--pairs=int" in said.stdout
    assert not re.search(r"\| +jax$", said.stderr, re.MULTILINE)


@pytest.mark.parametrize("words", [
    "--attention=(5,)", "--attention=(None,)", "--attention=(Causal(),)",
    "--attention=((Softmax(),),)", "--attention=(Softmax,)", "--attention=('x',)",
    "--attention=(LM(),)", "--attention=(RoPE(),)", "--attention=({},)",
    "--attention=(Softmax(mask=Full()),)", "--attention=(Softmax(mask=Window(4)),)",
    "--attention=(FNet(),)", "--attention=(Linformer(length=32, rank=4),)",
    "--attention=(Essa(),)", "--attention=(Flow(causal=False),)", "--width=0",
    "--width=15", "--heads=-1", "--heads=0", "--kv_heads=0", "--kv_heads=3",
    "--dtype=5", "--dtype=jnp.int32", "--dtype=float64", "--dtype=Flow",
    "--mesh=(2147483648,2147483648,4)", "--mesh=(64,1,1)", "--temperature=-1",
    "--temperature=nan", "--prompt=", "--rate=nan", "--rate=1e999", "--sample=-1",
    "--accumulate=3", "--seed=-1", "--seeds=0", "--save_every=-1", "--batch=0",
    "--steps=4294967296", "--text=Text(path='~nobody-here/x')",
    "--text=Text(length=99999999)", "--text=Text(pattern='none')",
])
def test_malformed_calls_end_before_any_training(words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(lm, "trained", lambda *_: pytest.fail("it trains"))
    with pytest.raises(SystemExit) as end:
        config.main(lm.run, lm.Config, "doc", ["--tiny", words])
    said = capsys.readouterr().err
    assert end.value.code == 2 and len(said.strip().splitlines()) == 1, said
    assert "expected" in said or "stream" in said or "Could not" in said, said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name, word", [
    ("leaderboard", "--attentions=(Softmax(mask=Full()),)"),
    ("leaderboard", "--attentions=(FNet(),)"),
    ("leaderboard", "--attentions=(Essa(),)"),
    # reads the task's 16 tokens, but not the 32 of which the memory is counted
    ("leaderboard", "--attentions=(SEA(columns=4, keep=2, length=16),)"),
    ("leaderboard", "--attentions=(Softmax,)"), ("stream", "--attentions=(FNet(),)"),
    ("stream", "--attentions=(Essa(),)"), ("competition", "--attentions=(Softmax,)"),
    ("competition", "--attentions=((5,),)"), ("cab", "--attentions=(Softmax,)"),
    ("music", "--rate=nan"), ("hull", "--steps=4294967296"),
    ("hull", "--direction=up"), ("hull", "--dictionary=3"),
    ("algorithms", "--rate=-1"),
    ("regression", "--rate=inf"), ("scansnap", "--steps=4294967296"),
    ("distil", "--distil_rate=nan"),
])
def test_other_malformed_calls_end_before_a_folder_is_made(
        name, word, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(f"experiments.{name}")
    with pytest.raises(SystemExit) as end:
        config.main(module.run, module.Config, "doc", ["--tiny", word])
    said = capsys.readouterr().err
    assert end.value.code == 2 and len(said.strip().splitlines()) == 1, said
    assert "expected" in said or "stream" in said, said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", NAMES)
def test_every_training_has_steps_and_a_rate_that_can_be_done(name):
    module = importlib.import_module(f"experiments.{name}")
    wrong = {"steps": ("0", "2147483648"), "rate": ("0", "nan", "inf")}
    for field in dataclasses.fields(module.Config):
        for value in wrong.get(field.name.rpartition("_")[2], ()):
            with pytest.raises(ValueError, match=f"^--{field.name}=.+: expected "):
                config.read(module.Config, [f"--{field.name}={value}"], module.TINY)


def test_a_run_is_its_text_and_settings_and_not_its_place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts").mkdir()
    for n in range(3):
        (tmp_path / "texts" / f"{n}.txt").write_text(f"a text, number {n} " * 20)
    # inside the folder of its text, with a prompt that a text file would not keep
    first = dataclasses.replace(
        lm.TINY, text=Text(path="texts", length=16), folder="texts/run", sample=1,
        prompt="a\rb",
    )
    one = lm.run(first)
    assert one["tokens_per_second"] > 0
    (tmp_path / "moved").mkdir()
    (tmp_path / "texts").rename(tmp_path / "moved" / "t")
    again = dataclasses.replace(
        first, text=Text(path=str(tmp_path / "moved" / "t"), length=16),
        folder="./moved/t/run", prompt="b", temperature=0.0,
    )
    two = lm.run(again)
    for name in ("bits_per_byte", "accuracy", "tokens_per_second"):
        assert one[name] == two[name]
    assert lm.run(dataclasses.replace(again, steps=3))["bits_per_byte"] > 0
    for change, said in (({"rate": 0.1}, "rate is"), ({"steps": 2}, "steps=3 there"),
                         ({"seed": 1}, "seed is")):
        with pytest.raises(ValueError, match=f"holds another run .{said}"):
            lm.run(dataclasses.replace(again, **{"steps": 3} | change))
    (tmp_path / "moved" / "t" / "0.txt").write_text("another text " * 30)
    corpus._splits.cache_clear()
    corpus._digest.cache_clear()
    with pytest.raises(ValueError, match="holds another run .text is"):
        lm.run(dataclasses.replace(again, steps=3))


def test_one_seed_ties_all():
    first, second = lm.TINY, dataclasses.replace(lm.TINY, seed=1)
    batches = [one.data.batch(0, 2)["tokens"] for one in (first, second)]
    assert (batches[0] != batches[1]).any()
    assert first.data == first.text


PRINTS = """
import dataclasses, sys, time
from experiments.cli.config import main, option
@dataclasses.dataclass(frozen=True)
class Config:
    rate: float = option(0.1)
def run(config):
    time.sleep(0.3)  # so that a reader has gone
    return {"sample": "\u2014", "loss": 0.5}
main(run, Config, "doc", [])
"""


@pytest.mark.parametrize("out", ["> /dev/full", ">&-", "| head -0"])
def test_streams_that_are_closed_or_full(out):
    line = f"{shlex.quote(sys.executable)} -c {shlex.quote(PRINTS)} {out}"
    end = subprocess.run(["bash", "-c", f"set -o pipefail; {line}"], cwd=ROOT,
                         capture_output=True, text=True)
    assert "Traceback" not in end.stderr and "Exception" not in end.stderr
    assert "cannot be written" in end.stderr and "loss    0.5" in end.stderr
    assert end.returncode == 1, end


def test_a_terminal_of_ascii():
    end = subprocess.run([sys.executable, "-c", PRINTS], cwd=ROOT, capture_output=True,
                         env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert end.returncode == 0 and b"sample  \\u2014" in end.stdout, end
