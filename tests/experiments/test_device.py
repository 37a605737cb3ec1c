"""The command that proves and times kernels: what crashes, hangs or is wrong costs its
own case, and what was done is never done again."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import pytest

from experiments import device
from experiments.measure.device import best_tiles, report
from experiments.measure.device.case import F32, Bench, Case, normal
from experiments.measure.device.place import Place
from experiments.measure.device.right import Subject, check
from pallas_kernels import tables

ROOT = pathlib.Path(__file__).parents[2]
HERE = "tests.experiments.test_device"  # whose `cases` the command runs here


def cases(place):
    """One case of each kind of end."""
    def doubled(f):
        return lambda bench: check(bench, Subject(
            f, lambda x: (2 * x,), (normal(0, 4, 8, dtype=F32),), 1, ("y", "dx")))

    def crash(bench):
        os.kill(os.getpid(), signal.SIGSEGV)

    def hang(bench):
        with bench.alone():
            time.sleep(600)

    def fail(bench):
        raise RuntimeError("an illegal address")

    yield Case("right good", doubled(lambda x: (x + x,)), 0)
    yield Case("right crashes", crash, 0)
    yield Case("right hangs", hang, 0, seconds=-85)  # 5 s with those of its start
    yield Case("right wrong", doubled(lambda x: (2.01 * x,)), 0)
    yield Case("right unwritten", doubled(lambda x: (x * jnp.nan,)), 0)
    yield Case("right fails", fail, 0)
    yield Case("right slow", lambda bench: time.sleep(600) or {}, 1)
    yield Case("right last", doubled(lambda x: (2 * x,)), 2)


def ask(folder, **options):
    return device.run(device.Config(folder=str(folder), extra=HERE, **options))


def test_every_end_of_a_case_is_told(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    words = "good,crashes,hangs,wrong,unwritten,fails,last"
    found = ask(tmp_path, cases=words, minutes=2)
    wanted = {"done": 2, "crashed": 1, "hung": 1, "wrong": 2, "failed": 1, "left": 0}
    assert {n: found[n] for n in wanted} == wanted
    said = capsys.readouterr().out
    assert "CRASHED right crashes: its process ended with -11" in said
    assert "HUNG right hangs: no answer in" in said
    assert "WRONG right wrong: y is" in said
    assert "FAILED right fails: RuntimeError: an illegal address" in said
    rows = json.loads((tmp_path / "device.json").read_text())["rows"]
    assert rows["right good"]["errors"].keys() == {"y", "dx"}
    # done cases are not run again, failed ones are if that is asked for
    before = (tmp_path / "device.json").read_text()
    assert ask(tmp_path, cases=words)["left"] == 0
    assert (tmp_path / "device.json").read_text() == before


def _children(folder):
    """Processes that were started for a folder."""
    found = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True)
    return [line for line in found.stdout.splitlines() if f"child {folder}" in line]


def test_a_killed_run_goes_on(tmp_path):
    words = [sys.executable, "-m", "experiments.device", f"--folder={tmp_path}",
             f"--extra={HERE}", "--cases=good,slow,last", "--minutes=5"]
    environ = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    record = tmp_path / "device.json"
    process = subprocess.Popen(words, env=environ, stderr=subprocess.DEVNULL,
                               stdout=subprocess.DEVNULL)
    for _ in range(600):
        if record.exists() and "right last" in record.read_text():
            break
        time.sleep(0.1)
    process.kill()
    process.wait()
    for _ in range(100):  # the child in the slow case goes with it
        if not _children(tmp_path):
            break
        time.sleep(0.1)
    assert not _children(tmp_path)
    rows = json.loads(record.read_text())["rows"]
    assert rows.keys() == {"right good", "right last"}
    # what is left has no time: it is not reached, and what was done is kept
    found = ask(tmp_path, cases="good,slow,last", minutes=0.15)
    assert (found["done"], found["left"]) == (2, 1)
    assert json.loads(record.read_text())["rows"] == rows


def test_results_of_another_source_are_kept_beside(tmp_path):
    old = {"place": {"source": "another"}, "rows": {"right good": {}}}
    (tmp_path / "device.json").write_text(json.dumps(old))
    device.Record(tmp_path, {"source": "this"}).keep({"name": "x", "state": "done"})
    kept, = tmp_path.glob("device-*.json")
    assert json.loads(kept.read_text()) == old
    assert json.loads((tmp_path / "device.json").read_text())["rows"].keys() == {"x"}
    (tmp_path / "device.json").write_text("{")
    with pytest.raises(ValueError, match="damaged: expected what a run wrote"):
        device.Record(tmp_path, {})


def test_the_report_has_what_failed_first_and_then_what_is_behind():
    own = {"ms": 2.0, "lo": 1.9, "hi": 2.1, "tflops": 400.0, "share": 0.5,
           "compile_s": 1.0}
    row = {"state": "done", "ours": "ours mosaic", "peer": "cuDNN", "least": 0.8,
           "contenders": {"ours mosaic": own, "cuDNN": own}, "ceilings": [8e14, 3e12]}
    rows = {f"fast {n}": row | {"name": f"fast {n}", "ratio": n / 100}
            for n in range(40, 140)}
    rows["right x"] = {"name": "right x", "state": "wrong", "why": "dq"}
    place = {"device": "a card", "driver": "1", "capability": "9.0", "python": "3",
             "versions": {"jax": "1"}, "source": "s"}
    lines = report.lines(place, rows, ["right y"])
    assert len(lines) == report.LINES and max(map(len, lines)) <= report.WIDE
    assert lines[3] == "WRONG right x: dq" and lines[4].startswith("fast 40: 2 ms, 400")
    assert "right 0 of 2" in lines[2] and "1 not reached" in lines[2]
    assert "product of bfloat16 800 TFLOP/s" in lines[1]
    page = report.page(place, rows, "2026-01-01")
    assert "| x | wrong | dq |" in page and page.count("| done |") == 100


def test_every_case_has_a_name_of_its_own_on_every_device():
    from experiments.measure.device.cases import cases as every

    kinds = {"gpu": ("9.0", "10.0", "8.0"), "tpu": ("",), "cpu": ("",)}
    for platform, capabilities in kinds.items():
        for capability in capabilities:
            found = every(Place(platform, "a device", capability, platform == "cpu"))
            first = {n.split()[1] for n, c in found.items() if c.tier == 0}
            assert {"flash", "linear", "delta", "scan", "blocks", "decode"} <= first


def test_an_error_in_float32_is_held_against_its_norm(tmp_path):
    bench = Bench(Place("cpu", "cpu", "", True), tmp_path)
    x = normal(0, 16, 16, dtype=F32)
    row = check(bench, Subject(
        lambda x: (x * (1 + 2e-6),), lambda x: (x,), (x,), 1, ("y", "dx")))
    assert row["bits"] and row["errors"]["y"] == "2.0e-06"


def test_a_tile_that_wins_every_round_is_kept(tmp_path, monkeypatch):
    target = best_tiles.tune.named("TPU v5 lite")
    row = best_tiles.TableRow("delta", "d128", "f16")

    def program(self, target, backend):
        chunks = tables.read(target.kind, "delta", "d128 f16").chunks

        def f(x):
            return jax.lax.fori_loop(0, 9 - chunks, lambda _, x: jnp.sin(x), x)[0] * 0

        def broken(x):
            return f(x) + 1  # another result than the table's

        if chunks == 4:
            raise RuntimeError("no room")
        return broken if chunks == 2 else f, (jax.ShapeDtypeStruct(
            (64, 4096), jnp.bfloat16),), {}

    monkeypatch.setattr(best_tiles.TableRow, "program", program)
    bench = Bench(Place("cpu", "cpu", "", True), tmp_path)
    with tables.trial(target.kind, "delta", "d128 f16", {"chunks": 1}):
        found = best_tiles._race(target, "tpu", row, bench)
    assert found["tile"] == {"chunks": 8} and found["ratio"] > 1
    assert found["absent"].keys() == {"2", "4"}
    assert "no room" in found["absent"]["4"]
    # a gain within the spread stays out of the table
    kept = {"a": found | {"name": "tiles a", "state": "done", "least": 1.2},
            "b": found | {"name": "tiles b", "state": "done", "least": 0.99,
                          "tile": {"chunks": 2}}}
    table = tmp_path / "tiles.json"
    table.write_text(tables.TABLE.read_text())
    monkeypatch.setattr(tables, "TABLE", table)
    assert best_tiles.write("TPU v5 lite", kept) == ["tiles a"]
    written = json.loads(table.read_text())["TPU v5 lite"]
    assert written["delta"]["d128 f16"] == {"chunks": 8}
    assert best_tiles.write("TPU v5 lite", {}) == []


@pytest.mark.parametrize("kind, capability, backends", [
    ("NVIDIA H100 80GB HBM3", "9.0", {"mosaic", "triton"}),
    ("NVIDIA of tomorrow", "8.0", {"triton"}), ("TPU v6 lite", "", {"tpu"}),
    ("cpu", "", set())])
def test_every_row_of_the_table_is_a_case(kind, capability, backends):
    platform = "tpu" if "TPU" in kind else "gpu" if capability else "cpu"
    place = Place(platform, kind, capability, platform == "cpu")
    found = [case.name.split() for case in best_tiles.cases(place)]
    assert {words[2] if words[2] in backends else words[3] for words in found
            } == backends
    if "triton" in backends:
        assert ["tiles", "memory", "triton", "d128", "f16"] in found
    if kind.startswith("NVIDIA H100"):  # what matters most comes first
        assert found[0] == ["tiles", "flash_forward", "mosaic", "d128", "f16"]
