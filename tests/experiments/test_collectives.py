"""The reader of compiled programs counts what moves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.measure.collectives import Collective, collectives, instructions, main

TEXT = """\
HloModule jit_f, is_scheduled=true, num_partitions=8, entry_layout={(f32[4])->f32[4]}

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%body (x: (s32[], f32[4]{0:T(128)})) -> (s32[], f32[4]{0:T(128)}) {
  %x = (s32[], f32[4]{0:T(128)}) parameter(0)
  %cp = (f32[4]{0}, f32[4]{0}, u32[]{:S(2)}, u32[]) collective-permute-start(%y), \
channel_id=3, source_target_pairs={{0,1},{1,2},{2,0}}
  %cpd = f32[4]{0} collective-permute-done(%cp)
  ROOT %t = (s32[], f32[4]{0:T(128)}) tuple(%i, %cpd)
}

%cond (x: (s32[], f32[4])) -> pred[] {
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

%wrapped (p: bf16[2,8]) -> bf16[2] {
  ROOT %rs = bf16[2]{0} reduce-scatter(%p), replica_groups=[2,4]<=[8], to_apply=%add
}

%begin (p: f32[4]) -> (f32[4], f32[8]) {
  %ag.1 = f32[8]{0} all-gather(%p), channel_id=9, replica_groups={{0,1},{2,3}}
  ROOT %cc.1 = (f32[4], f32[8]) custom-call(%ag.1), \
custom_call_target="AsyncCollectiveStart"
}

%during (p: f32[4]) -> (f32[4], f32[8]) {
  %ag.2 = f32[8]{0} all-gather(%p), channel_id=9, replica_groups={{0,1},{2,3}}
  ROOT %t.2 = (f32[4], f32[8]) tuple(%p, %ag.2)
}

ENTRY %main.9 (p: f32[4]) -> f32[4] {
  %f.1 = (f32[4], f32[8]) fusion(%p), kind=kCustom, calls=%begin
  %f.2 = (f32[4], f32[8]) fusion(%f.1), kind=kCustom, calls=%during
  %ag = (f32[4]{0:T(256)S(1)}, f32[32]{0:T(256)}) all-gather-start(%p), \
replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}
  %agd = f32[32]{0} all-gather-done(%ag)
  %two = ((f32[4], s8[4]), (f32[8]{0}, s8[8]{0})) all-gather-start(%p, %e), \
replica_groups=[4,2]<=[8]
  %ar = (f32[3,2]{1,0}, /*index=1*/pred[5]{0}) all-reduce(%a, %b), \
replica_groups={}, to_apply=%add
  %ars = f32[6]{0} all-reduce-start(%a), replica_groups={{0,1},{2,3}}, to_apply=%add
  %rss = ((bf16[2,8]), bf16[2], u32[]) async-start(%z), calls=%wrapped
  %rsd = bf16[2] async-done(%rss), calls=%wrapped
  %aa = (f32[2]{0}, f32[2]{0}) all-to-all(%a, %b), replica_groups={{0,1},{2,3}}
  %w = (s32[], f32[4]{0:T(128)}) while(%init), condition=%cond, body=%body, \
backend_config={"known_trip_count":{"n":"7"},"known_init_step":{"init":"0"}}
  %v = (s32[], f32[4]) while(%init), condition=%cond, body=%body
  ROOT %out = f32[4] get-tuple-element(%w), index=1
}
"""


def test_kinds_bytes_groups_and_trips():
    assert collectives(TEXT) == {
        "all-gather": [32, 128, 40], "all-reduce": [29, 24], "reduce-scatter": [4],
        "all-to-all": [16], "collective-permute": [16] * 8,
    }
    found = {each.name: each for each in instructions(TEXT)}
    cp, ag = found["cp"], found["ag"]
    assert (cp.kind, cp.bytes, cp.group) == ("collective-permute", 16, 3)
    assert (cp.times, cp.uncounted, cp.hidden) == (8, True, True)
    assert cp.pairs == ((0, 1), (1, 2), (2, 0))
    assert ag == Collective("all-gather", "ag", 128, tuple(range(8)), hidden=True)
    hidden = {name for name, each in found.items() if each.hidden}
    assert hidden == {"cp", "ag", "ag.1", "two", "ars", "rs"}
    groups = {"two": 2, "ar": 8, "ars": 2, "rs": 4, "aa": 2}
    assert {name: found[name].group for name in groups} == groups


def test_a_loop_of_a_real_program():
    mesh = jax.make_mesh((4,), ("seq",), axis_types=(jax.sharding.AxisType.Auto,),
                         devices=jax.devices()[:4])

    def ring(x):
        turn = lambda x, _: (jax.lax.ppermute(x, "seq", [(0, 1), (1, 0)]) * 2, None)
        return jax.lax.scan(turn, x, None, length=5)[0]

    spec = jax.P("seq")
    f = jax.shard_map(ring, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    text = jax.jit(f).lower(jnp.zeros((8, 3))).compile().as_text()
    assert collectives(text) == {"collective-permute": [24] * 5}


def test_the_command_line(tmp_path, capsys):
    path = tmp_path / "program.txt"
    path.write_text(TEXT)
    assert main([str(path)]) == 0
    out = capsys.readouterr().out
    assert "16 bytes x 8, groups of 3: cp (a loop of unknown length)" in out
    assert main([]) == 2
    with pytest.raises(ValueError, match="no ENTRY"):
        instructions("stablehlo")
    np.testing.assert_equal(out.count("\n"), len(instructions(TEXT)))
