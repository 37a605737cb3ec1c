"""The compile matrix: what it reads from dumps, what it calls worse, what it says."""

import dataclasses
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu, triton

from pallas_kernels import Refused, tables
from pallas_kernels.linear import tpu_block
from pallas_kernels.matrix import (
    __main__ as matrix, cases, cases_flash, metrics, ptx, ptx_loop,
    record as matrix_record, report as matrix_table, tpu_schedule
)
from pallas_kernels.matrix import digest as digests
from pallas_kernels.matrix.case import Case, TripCounts
from pallas_kernels.matrix.content import Walk
from pallas_kernels.matrix.digest import digest
from pallas_kernels.matrix.targets import TARGETS
from pallas_kernels.tune import __main__ as tune, timed

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
    program = tpu_schedule.program("kernel", *dumped())
    assert program.bundles == 175
    tile, = program.tiles
    assert (tile.mark, tile.bundles, tile.units["MATMUL"]) == ("branch", 20, 80)
    assert program.total("SPILL") == 20 and program.capacity["VALU"] == 4
    # 20 bundles a tile, 149 behind the other jump a line, 1 once, the rest a step
    assert program.cycles((10,), 3, 12) == 10 * 20 + 3 * 149 + 1 + 12 * 5
    assert program.cycles((1, 2), 3, 12) is None


def entry(**changes):
    kernel = {"bundles": 100, "tiles": [90], "fills": 0, "spills": 10, "memory": 2048,
              "use": dict.fromkeys(("matmul", "valu", "vload", "vstore"), 0.5)}
    return {"temporary_bytes": 0, "kernels": {"k": kernel | changes}}


def entry_gpu(**changes):
    kernel = {"registers": 100, "spills": 0, "memory": 2048, "threads": 128,
              "tensor": 4, "unit": "wgmma", "occupancy": 0.25}
    return {"temporary_bytes": 0, "kernels": {"k": kernel | changes}}


@pytest.mark.parametrize("before, after, line", [
    (entry(), entry(), None), (entry(), entry(bundles=105), None),
    (entry(), entry(bundles=106), "k: bundles 100 -> 106"),
    (entry(), entry(spills=11), "k: spills 10 -> 11"),
    (entry(), entry(memory=3000), "k: memory 2048 -> 3000"),
    (entry(), {"error": "no room"}, "error: no room"),
    (entry(), {"refused": "D=1"}, "refused: D=1"),
    (entry(), {"kernels": {}}, "k: is no longer there"),
    (entry_gpu(), entry_gpu(registers=105), None),
    (entry_gpu(), entry_gpu(registers=106), "k: registers 100 -> 106"),
    (entry_gpu(), entry_gpu(spills=1), "k: spills 0 -> 1"),
    (entry() | {"peer": True}, {"error": "gone"}, None),
])
def test_what_is_worse(before, after, line):
    lines = [] if line is None else [f"v5e a: {line}"]
    assert matrix_record.worse({"v5e a": before}, {"v5e a": after}) == lines


@pytest.mark.parametrize("backend", ["sm90a mosaic", "sm100 blackwell"])
def test_a_kernel_that_was_compiled_before_is_not_missed(backend):
    name = "{} flash backward {} a".format(*backend.split())
    assert not matrix_record.worse({name: entry_gpu()}, {name: {"kernels": {}}})


def test_a_new_case_that_does_not_compile_is_named():
    found = {"v5e b": {"error": "no room"}, "v5e c": {"error": "x", "peer": True}}
    assert matrix_record.unrecorded({}, found) == ["v5e b: error: no room"]


def test_the_page_holds_every_case():
    record = {"versions": {"jax": "0"}, "cases": {
        "v5e a": entry(trips=[3]), "v6e b": {"refused": "D=1"},
        "sm80 c": entry_gpu()}}
    page = matrix_table.page(record)
    assert "| a | k: 90 x 3 | 50% |" in page and "| b | refused: D=1 |" in page
    assert "| c | k | 100 | 0 | 2 | 128 | 4 wgmma | 25% |" in page


PTX = """
.target sm_90a
.visible .entry flash_forward(
.reqntid 256, 1, 1
  wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {%f1}, %rd1, %rd2;
"""
SAID = """ptxas info    : Compiling entry function 'flash_forward' for 'sm_90a'
    0 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 178 registers, used 1 barriers, 16 bytes smem
"""


def test_what_ptxas_says_of_a_kernel():
    k = ptx.kernel(PTX, SAID, 100 * 1024)
    assert (k.name, k.registers, k.spills, k.threads) == ("flash_forward", 178, 20, 256)
    assert (k.shared, k.tensor, k.unit) == (100 * 1024 + 16, 1, "wgmma")
    # 228 KiB hold two such blocks, 64 Ki registers only one: 256 of 2048 threads
    h200 = TARGETS["sm90a"]
    assert k.blocks(h200) == 1 and k.occupancy(h200) == 0.125
    assert k._replace(registers=128).blocks(h200) == 2
    with pytest.raises(ValueError, match="ptxas said 'fatal'"):
        ptx.kernel(PTX, "fatal", 0)


LOOP = """
.visible .entry flash_forward(
    ld.global.v4.b32 {%r1}, [%rd1];
$L__BB0_1:
    mov.u32 %r1, 0x0; ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];
    st.shared.v4.b32 [%rd2], {%r1, %r2, %r3, %r4};
$L__BB0_2:
    ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r1, %r2, %r3, %r4}, [%rd2];
    mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 { %r1 }, { %r2 }, { %r3 };
    ex2.approx.f32 %r5, %r6;
    fma.rn.f32 %r5, %r6, %r7, %r8;
    @%p1 bra     $L__BB0_2;
    @%p2 bra     $L__BB0_1;
    ret;
"""
AHEAD = """$L__BB0_1:
    cp.async.wait_group     2;
    cp.async.cg.shared.global [ %r58 + 0 ], [ %rd79 + 0 ], 0x10, %r59;
    cp.async.commit_group;
    wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {%r1}, {%r2}, %rd1, 1;
    cp.async.commit_group;
    @%p8 bra     $L__BB0_1;
"""


def test_a_pass_of_a_gpu_kernel():
    inner = ptx_loop.busiest(LOOP)
    assert (inner.flops, inner.shared, inner.beyond) == (2 * 16 * 8 * 16, 512, 0)
    assert (inner.special, inner.floats, inner.issued, inner.bursts) == (1, 1, 4, 0)
    outer = ptx_loop.counted(LOOP.splitlines()[3:6])
    assert (outer.beyond, outer.shared, outer.bursts) == (512, 512, 1)
    ahead = ptx_loop.busiest(AHEAD)
    # a warp has a quarter of its group's product, which reads its right side
    assert (ahead.flops, ahead.shared) == (2 * 64 * 128 * 16 / 4, 512 + 2 * 128 * 4)
    assert (ahead.beyond, ahead.ahead, ahead.bursts) == (512, 2, 0)


def test_the_time_of_a_pass():
    h200 = TARGETS["sm90a"]
    p = ptx_loop.Pass(issued=100, special=8, flops=2**20)
    units = p.units(h200, 8)
    rate = 989e12 / 132 / 1.98e9
    assert units["issue"] == 200 and units["special"] == 128
    assert units["tensor"] == pytest.approx(8 * 2**20 / rate)
    # eight warps are two to a scheduler, and the matrix units are the limit
    alone, own = p.cycles(h200, 8, 1)
    assert alone == max(units.values()) and own == sum(units.values()) / 2
    # loads that begin three passes ahead have three passes to arrive in
    waits = ptx_loop.Pass(beyond=1.0, bursts=2)
    assert waits.cycles(h200, 4, 1)[0] == pytest.approx(1200, 1e-3)
    waits = ptx_loop.Pass(beyond=1.0, ahead=3)
    assert waits.cycles(h200, 4, 2)[0] == pytest.approx(100)


def test_no_kernel_is_faster_than_its_products():
    program = tpu_schedule.program("jvp_flash_backward_keys_.1", *dumped())
    trips = TripCounts((10,), 3, 12, {"_keys": 2.0**20, "": 2.0**30})
    v5e = TARGETS["v5e"]
    scheduled = program.cycles(*trips[:3])
    assert metrics.cycles(v5e, program, "flash_backward", trips) == scheduled
    slow = trips._replace(flops={"": 2.0**30})
    assert metrics.cycles(v5e, program, "flash_backward", slow) == 2**30 / v5e.cycle
    other = TripCounts((1, 2), 3, 4)
    assert metrics.cycles(v5e, program, "flash_backward", other) is None


def test_products_of_a_causal_pass():
    """A forward pass has two products, of half the logits and what its tiles add."""
    trips = cases_flash.passes(
        "TPU v5 lite", 8192, 64, 64, 2, cases_flash.Causal())
    least = cases_flash.work(8192, 128, h=2)
    assert least <= trips["flash_forward"].products("__.1") <= 1.1 * least
    back = trips["flash_backward"]
    assert 2.5 * least <= back.products("__.1") <= 2.75 * least
    assert back.products("_keys__.1") / back.products("_queries__.1") == 4 / 3


def test_own_kernels_are_told_from_fusions(tmp_path):
    for n, name in enumerate(("flash_forward", "loop_select_fusion", "wrapped_iota")):
        path = tmp_path / f"module.{n}.ptx"
        path.write_text(PTX.replace("flash_forward", name))
        path.with_suffix(".ptxas").write_text(SAID)
    text = "001: kCustomKernel [source | sink] flash_forward grid: [1, 1, 1] " \
        "threads: [256, 1, 1]  shared_memory: 1024 bytes\n"
    (tmp_path / "module.thunk_sequence.txt").write_text(text)
    found = ptx.programs(tmp_path)
    assert list(found) == ["flash_forward"] and found["flash_forward"].shared == 1040
    assert len(ptx.programs(tmp_path, whole=True)) == 3


def test_fast_memory_is_read_off_the_report():
    text = """<script> const DATA ={ "global_info": {"vmem_capacity": 9},
      "hlo_breakdowns": {"k.1": {"blocks": [], "total_size": 4096}}};</script>"""
    assert metrics.vmem(text) == {"k.1": 4096}


@pytest.mark.parametrize("words, message", [
    (["--targets", "v9"], "--targets=v9: expected some of v4,v5e"),
    (["--shapes", "bf16[1]"], "expected a --function beside it"),
    (["--function", "math:nothing"], "--function=math:nothing:"),
    (["--function", "math:sin", "--shapes", "bf16"], "expected one like bf16"),
    (["--function", "math:sin", "--shapes", "bf17[1]"], "--shapes: 'bf17[1]':"),
])
def test_wrong_words_get_one_sentence(words, message, capsys):
    assert matrix.main(words) == 2
    assert message in capsys.readouterr().err


def test_tables_are_kept_as_they_are_read():
    table = json.loads(tables.TABLE.read_text())
    assert tables.TABLE.read_text() == tables.text(table)


@pytest.mark.parametrize("words, message", [
    (["--targets", "v9"], "--targets=v9: expected some of v4,v5e"),
    (["--timed"], "--timed: cpu is none of the targets"),
    (["--kernels", "flash,rnn"], "--kernels=rnn: expected some of flash,blocks"),
])
def test_wrong_words_of_tune_get_one_sentence(words, message, capsys):
    assert tune.main(words) == 2
    assert message in capsys.readouterr().err


def test_the_cheapest_candidate_is_kept():
    least = lambda tile: tile
    costs = {"tpu": lambda t: -t[0] * t[1], "triton": least, "mosaic": least}

    def cost(target, backend, row, tile):
        if tile[0] == 1024:
            raise RuntimeError("no room")
        return costs[backend](tile)

    block = tune.tuned(TARGETS["v5e"], cost, ("tpu",))
    assert block["flash_forward"]["d128 f16"] == {
        "block_q": 2048, "block_kv": 2048, "block_kv_compute": 256}
    assert block["flash_forward"]["d128 f32"] == {
        "block_q": 512, "block_kv": 1024, "block_kv_compute": 256}
    before = tables.row("TPU v5 lite")["linear_forward"]["d128 f32"]
    assert block["linear_forward"]["d128 f32"] == before
    block = tune.tuned(TARGETS["sm90a"], cost, ("mosaic", "triton"))
    assert [*block["triton_flash_backward"]["d256 f16"].values()] == [32, 32, 4, 1]
    assert [*block["triton_decode"]["d256 f32 i8"].values()] == [16, 16, 4, 1]
    assert block["mosaic_flash_forward"]["d256 v256"] == {
        "block_q": 128, "block_kv": 64, "num_stages": 1}


@pytest.mark.parametrize("name, backend", [("v5e", "tpu"), ("sm80", "triton")])
def test_a_candidate_is_in_the_table_while_it_is_tried(name, backend):
    target, seen = TARGETS[name], {}
    before = json.dumps(tables.row(target.kind, backend))

    def cost(target, backend, row, tile):
        _, args, _ = row.program(target, backend)
        table, kind = row.place(backend)
        found = tables.row(target.kind, backend)[table][kind]
        assert tuple(found.values()) == tile and args
        seen[table, kind] = tile
        return tile

    row = tune.tuned(target, cost, (backend,))
    assert len(seen) == (20 if backend == "tpu" else 52)
    assert json.dumps(tables.row(target.kind, backend)) == before
    if backend == "tpu":
        assert row["delta"]["d128 f16"] == {"chunks": 1}
        assert row["scan"]["d256 f16"] == {"chunk": 128}
        assert row["linear_backward"]["d128 f16 channels"] == {
            "block": 256, "chunk": 64}
    else:
        assert row["triton_delta_keys"]["d128 f16"] == {
            "block_d": 32, "block_v": 32, "num_warps": 4, "num_stages": 1}
        assert row["triton_scan"]["d256 f16"] == {"chunk": 16}


def test_a_timed_candidate_has_decays_below_one(monkeypatch):
    shapes = (jax.ShapeDtypeStruct((1, 64), "float32"),
              jax.ShapeDtypeStruct((1, 64, 16), "bfloat16"))
    seen = []

    def f(g, k):
        jax.debug.callback(lambda g: seen.append(g.max()), g)
        return k * jnp.exp(g)[..., None]

    row = tune.Row("delta", "d128", "f16")
    monkeypatch.setattr(tune.Row, "program", lambda *_: (f, shapes, {}))
    assert timed.timed_cost(TARGETS["v5e"], "tpu", row, (1,)) > 0
    jax.effects_barrier()
    assert len(seen) == timed.ROUNDS + 1 and max(seen) <= 0


def test_a_gpu_takes_the_row_of_its_model():
    own = tables.row("NVIDIA A100-SXM4-80GB", "triton")
    assert tables.row("NVIDIA A100 80GB PCIe", "triton") is own
    hopper = tables.row("NVIDIA H200", "triton")
    assert tables.row("NVIDIA H100 PCIe", "triton") is hopper
    other = tables.row("NVIDIA GeForce RTX 4090", "triton")
    assert other is tables.row("default gpu", "triton") is tables.row("TPU9", "triton")
    assert tables.row("TPU v5 lite") is not tables.row("TPU v5")


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_every_target_has_cases_and_its_peers_are_marked(target):
    found = cases.cases(target)
    assert {n.split()[0] for n in found} == {
        "flash", "blocks", "decode", "linear", "delta", "memory", "scan", "peer"} - (
        set() if any(c.peer for c in found.values()) else {"peer"})
    assert all(c.peer == n.startswith("peer") for n, c in found.items())
    decoding = next(c for n, c in found.items() if n.startswith("decode"))
    f, args, trips = decoding.build(target)
    assert callable(f) and (target.platform == "tpu") == bool(trips)


def test_the_record_is_green_and_whole():
    record = json.loads(matrix_record.RECORD.read_text())
    for target in TARGETS.values():
        own = {f"{target.name} {n}" for n, c in cases.cases(target).items()
               if not c.peer}
        assert own <= set(record["cases"]), own - set(record["cases"])
    broken = [n for n, found in record["cases"].items()
              if "error" in found and not found.get("peer")]
    assert not broken
    assert matrix_record.PAGE.read_text() == matrix_table.page(record)


SCALE = 2.0


def scaled_copy(x_ref, o_ref):
    o_ref[...] = x_ref[...] * SCALE


def another_name(source, sink):
    # the same program in other words
    factor = SCALE
    rows = source[...]
    sink[...] = rows * factor


def other_constant(x_ref, o_ref):
    o_ref[...] = x_ref[...] * 3.0


def other_line(x_ref, o_ref):
    o_ref[...] = x_ref[...] * SCALE + 1.0


def small_case(kernel=scaled_copy, *, tile=8, name="copy", limit=2**20, closed=None,
               dtype=jnp.float32, wrapped=False, work=0.0, trips=None):
    """A kernel over [16,128] in tiles of rows, with a product behind it."""
    def build(target):
        params = pltpu.CompilerParams(vmem_limit_bytes=limit)
        if target.platform == "cuda":
            params = triton.CompilerParams(num_warps=limit)

        def program(x):
            spec = pl.BlockSpec((tile, 128), lambda i: (i, 0))
            y = pl.pallas_call(
                kernel, grid=(16 // tile,), in_specs=[spec], out_specs=spec, name=name,
                out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype), compiler_params=params
            )(x)
            return y if closed is None else y @ jnp.asarray(closed, dtype)

        f = jax.jit(lambda y: program(y)) if wrapped else program
        return f, (jax.ShapeDtypeStruct((16, 128), dtype),), trips or {}

    return Case(build, flops=work)


MATRIX = np.eye(128)


@pytest.mark.parametrize("name", ["v5e", "sm80"])
def test_a_digest_is_of_the_program_and_not_of_its_words(name):
    target = TARGETS[name]
    same = digest(target, small_case(closed=MATRIX))
    assert same == digest(target, small_case(another_name, closed=MATRIX.copy()))
    assert len(same) == 16 and int(same, 16)


@pytest.mark.parametrize("name", ["v5e", "sm80"])
@pytest.mark.parametrize("change", [
    {"kernel": other_constant}, {"kernel": other_line}, {"tile": 16}, {"limit": 2**21},
    {"name": "copied"}, {"closed": 2 * MATRIX}, {"dtype": jnp.bfloat16},
    {"work": 1.0}, {"trips": {"copy": TripCounts((2,), 1, 2)}}, {"wrapped": True},
], ids=lambda change: next(iter(change)))
def test_a_changed_program_has_another_digest(name, change):
    before = small_case(**{"closed": MATRIX})
    after = small_case(**{"closed": MATRIX} | change)
    assert digest(TARGETS[name], before) != digest(TARGETS[name], after)


def test_a_digest_is_of_one_target_and_its_compilers(monkeypatch):
    found = {digest(TARGETS[name], small_case()) for name in ("v5e", "v6e", "tpu7x")}
    slower = dataclasses.replace(TARGETS["v5e"], bandwidth=1.0)
    found.add(digest(slower, small_case()))
    monkeypatch.setattr(digests, "versions", lambda platform: (("jax", "0"),))
    found.add(digest(TARGETS["v5e"], small_case()))
    assert len(found) == 5


def test_only_what_reads_a_changed_number_is_compiled_again(monkeypatch):
    """A number that only decays by channel use changes their cases, and no others."""
    own = cases.cases(TARGETS["v5e"])
    names = [next(n for n in own if n.startswith(kernel)) for kernel in (
        "linear forward channel", "linear forward head", "scan forward", "decode")]
    before = {name: digest(TARGETS["v5e"], own[name]) for name in names}
    monkeypatch.setattr(tpu_block, "FLOOR", -64.0)
    after = {name: digest(TARGETS["v5e"], own[name]) for name in names}
    changed = [name for name in names if before[name] != after[name]]
    assert changed == names[:1]


@pytest.mark.parametrize("name, kernel", [
    ("v5e", "flash forward causal T8192 D128 H16"), ("v5e", "linear backward channel"),
    ("sm90a", "flash backward mosaic causal T8192 D64 H8"),
    ("sm100", "flash forward blackwell causal T8192 D64"), ("sm80", "decode triton"),
])
def test_a_digest_is_the_same_in_another_process(name, kernel):
    found = next(n for n in cases.cases(TARGETS[name]) if n.startswith(kernel))
    code = "import sys\nfrom pallas_kernels.matrix import cases, digest, targets\n" \
        "target = targets.TARGETS[sys.argv[1]]\n" \
        "print(digest.digest(target, cases.cases(target)[sys.argv[2]]))"
    said = {
        subprocess.run(
            [sys.executable, "-c", code, name, found], check=True, text=True,
            capture_output=True, env=os.environ | {"PYTHONHASHSEED": seed},
        ).stdout
        for seed in ("1", "2")
    }
    assert len(said) == 1 and len(said.pop().strip()) == 16


def test_what_a_digest_does_not_know_is_an_error():
    with pytest.raises(TypeError, match="op.param: no digest of <class 'function'>"):
        Walk()(lambda: 0, "op.param")
    with pytest.raises(TypeError, match="no digest of <class 'object'>"):
        Walk()(object(), "op.param")


def test_a_refusal_has_a_digest_and_an_error_has_none():
    def refuse(target):
        raise Refused("D=512: at most 256")

    def fail(target):
        raise ValueError("no room")

    assert digest(TARGETS["v5e"], Case(refuse))
    assert digest(TARGETS["v5e"], Case(fail)) is None


@pytest.mark.parametrize("words, old, compiled", [
    (["--check"], "own", False), (["--check"], "other", True),
    (["--check"], None, True),
    (["--check", "--all"], "own", True), (["--write"], "own", True), ([], "own", True),
])
def test_a_check_compiles_what_is_not_as_recorded(words, old, compiled, monkeypatch,
                                                  tmp_path):
    case, target = small_case(), TARGETS["v5e"]
    own = digest(target, case)
    kept = {"own": {"digest": own}, "other": {"digest": "0" * 16}, None: {}}[old]
    tmp_path.joinpath("record").write_text(json.dumps({"cases": {"v5e a": kept}}))
    monkeypatch.setattr(matrix_record, "RECORD", tmp_path / "record")
    monkeypatch.setattr(matrix, "chosen", lambda given, name: {"a": case})
    monkeypatch.setattr(matrix, "metrics", lambda *_: entry())
    monkeypatch.setattr(sys, "argv", ["matrix"])
    out = tmp_path / "out"
    given = ["--targets", "v5e", "--worker", str(tmp_path), "--out", str(out), *words]
    assert matrix.main(given) == 0
    found = json.loads(out.read_text())["v5e a"]
    assert found == ({"digest": own} | entry() if compiled else None)


def test_a_check_says_how_many_it_took_as_recorded(monkeypatch, capsys):
    old = matrix_record.read()["cases"]
    name, *others = [n for n, found in old.items() if found.get("digest")
                     and "kernels" in found and n.startswith("v5e")][:3]
    worse = json.loads(json.dumps(old[name]))
    next(iter(worse["kernels"].values()))["bundles"] += 10**6
    monkeypatch.setattr(matrix, "problem", lambda given: None)
    for new, status in ((old[name], 0), (worse, 1), ({"error": "no room"}, 1)):
        done = dict.fromkeys(others) | {name: new}
        monkeypatch.setattr(matrix, "compile_all", lambda given, done=done: done)
        assert matrix.main(["--check"]) == status
        said = capsys.readouterr().out
        assert "2 cases as recorded, 1 compiled" in said
        assert ("worse than the record" in said) == bool(status)


def test_the_record_holds_a_digest_of_every_quick_case():
    record = matrix_record.read()
    for target in TARGETS.values():
        for name, case in cases.cases(target).items():
            found = record["cases"].get(f"{target.name} {name}", {})
            assert case.near_duplicate or case.peer or len(found["digest"]) == 16, name
            assert not (case.peer and "digest" in found), name


def test_quick_leaves_a_near_relative_of_all_that_it_leaves_out():
    whole, quick = (
        matrix.chosen(matrix.parsed(words), "v5e") for words in ([], ["--quick"])
    )
    kind = lambda name: tuple(name.split()[:2])
    ours = {name for name, case in whole.items() if not case.peer}
    assert set(quick) < ours < set(whole)
    assert set(map(kind, quick)) == set(map(kind, ours))
    assert not any(case.near_duplicate for case in quick.values())
