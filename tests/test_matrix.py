"""The compile matrix: what it reads from dumps, what it calls worse, what it says."""

import importlib.util
import json

import pytest

from pallas_kernels import matrix, readings, tables

USE = """header MATMUL, MATPUSH, XLU, VALU, VPOP, EUP, VLOAD, VLOAD:FILL, ...
CAPACITY 4, 4, 3, 4, 2, 1, 3, 3, 1, 1, 2
"""
QUIET, BUSY = "0, 0, 0, 1, 0, 0, 1, 0, 1, 0, 1", "4, 1, 0, 2, 1, 1, 2, 1, 1, 1, 0"


def dumped():
    """A program: 3 bundles, a jump over 20 busy ones, a jump over 150 quiet ones, 2."""
    lines, rows = [], []
    for at in range(175):
        mark = {1: "LB", 23: "PF", 173: "PF"}.get(at, "")
        jump = "%1 = sbr.rel (%p0) target = $region1" if at in (2, 23) else "sadd"
        lines.append(f"  {at:#x} {mark:3}: > {{ {jump} }}")
        rows.append(f"{at:#x}: {BUSY if 3 <= at < 23 else QUIET}")
    return "\n".join(lines), USE + "\n".join(rows)


def test_regions_of_a_program():
    program = readings.program("kernel", *dumped())
    assert program.bundles == 175
    tile, = program.tiles
    assert (tile.mark, tile.bundles, tile.units["MATMUL"]) == ("branch", 20, 80)
    assert program.total("SPILL") == 20 and program.capacity["VALU"] == 4
    # 20 bundles a tile, 149 behind the other jump a line, all the rest a step
    assert program.cycles((10,), 3, 12) == 10 * 20 + 3 * 149 + 12 * (175 - 20 - 149)
    assert program.cycles((1, 2), 3, 12) is None


def entry(**changes):
    kernel = {"bundles": 100, "tiles": [90], "fills": 0, "spills": 10,
              "use": dict.fromkeys(("matmul", "valu", "vload", "vstore"), 0.5)}
    return {"temporary_bytes": 0, "kernels": {"k": kernel | changes}}


@pytest.mark.parametrize("after, line", [
    (entry(), None), (entry(bundles=105), None),
    (entry(bundles=106), "v5e a: k: bundles 100 -> 106"),
    (entry(spills=11), "v5e a: k: spills 10 -> 11"),
    ({"error": "no room"}, "v5e a: error: no room"),
    ({"refused": "D=1"}, "v5e a: refused: D=1"),
])
def test_what_is_worse(after, line):
    assert matrix.worse({"v5e a": entry()}, {"v5e a": after}) == [line] * bool(line)


def test_the_page_holds_every_case():
    record = {"jax": "0", "libtpu": "0",
              "cases": {"v5e a": entry(), "v6e b": {"refused": "D=1"}}}
    page = matrix.page(record)
    assert "| v5e | a | k: 90 | 50% |" in page and "| v6e | b | refused: D=1 |" in page


@pytest.mark.parametrize("words, message", [
    (["--targets", "v9"], "--targets=v9: expected some of v4,v5e"),
    (["--function", "math:nothing"], "--function=math:nothing:"),
    (["--function", "math:sin", "--shapes", "bf16"], "expected one like bf16"),
])
def test_wrong_words_get_one_sentence(words, message, capsys):
    assert matrix.main(words) == 2
    assert message in capsys.readouterr().err


def test_tables_are_kept_as_they_are_read():
    table = json.loads(tables.TABLE.read_text())
    assert tables.TABLE.read_text() == tables.text(table)


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None,
                    reason="libtpu is not installed (extra aot)")
def test_a_function_of_ones_own_compiles(capsys):
    words = ["--targets", "v5e", "--function", "jax.numpy:tanh", "--shapes",
             "f32[64,128]"]
    assert matrix.main(words) == 0
    assert "jax.numpy:tanh" in capsys.readouterr().out
