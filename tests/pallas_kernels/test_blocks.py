"""The kernels are the function `attn.sparse.chosen_blocks.attend`, interpreted."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from attn.masks import Causal, Full, Window
from pallas_kernels import Refused, tiles
from pallas_kernels.blocks import triton as blocks_triton
from pallas_kernels.blocks.api import Static, inverse
from experiments.measure import cost
from tests.on_device import INTERPRET
from tests.oracles.softmax import blocks, blocks_kernel as attention
from tests.pallas_kernels.test_flash import (
    BACKENDS, close, normal, once, results, twice
)

B, T, S, H, K, D, V, BLOCK = 2, 37, 45, 4, 2, 8, 12, 8
SEGMENTS = np.array([[1] * 15 + [2] * 30, [0] * 2 + [1] * 30 + [2] * 13], np.int32)
HELD = np.where(np.arange(S) % 3 == 0, -1, np.arange(S)) * np.ones((B, 1), np.int32)


def picked(heads=H, n=3, many=5, seed=0, empty=0.3, s=S, block=BLOCK):
    """chosen [B,heads,many,n]: distinct blocks, some of them none."""
    rng = np.random.default_rng(seed)
    blocks_ = -(-s // block)
    found = np.stack([rng.permutation(blocks_)[:n] for _ in range(B * heads * many)])
    found = np.where(rng.random(found.shape) < empty, -1, found)
    return jnp.asarray(found.reshape(B, heads, many, n), jnp.int32)


def arrays(t=T, s=S, d=D, v=V, dtype=jnp.float32):
    shapes = (B, t, H, d), (B, s, K, d), (B, s, K, v)
    return {n: normal(i, *shapes[i]).astype(dtype) for i, n in enumerate("qkv")}


def sunk():
    """Every query block chooses block 0 and some others: one list is the longest."""
    others = picked(K, many=13, n=2)
    others = jnp.where(others == 0, -1, others)
    return jnp.concatenate([jnp.zeros_like(others[..., :1]), others], -1)


CASES = {
    "causal": lambda: {"mask": Causal(), "chosen": picked()},
    "shared": lambda: {"mask": Causal() & Window(20), "chosen": picked(K)},
    "full": lambda: {"mask": Full(), "chosen": picked(empty=0)},
    "none": lambda: {"mask": Full(), "chosen": picked(empty=1.1)},
    "one": lambda: {"mask": Causal(), "chosen": picked(many=1, n=5),
                    "sizes": {"t": 1}},
    "tokens": lambda: {"mask": Causal(), "chosen": picked(K, many=9),
                       "sizes": {"t": 9, "v": 24}},
    "token_heads": lambda: {"mask": Full(), "chosen": picked(many=6),
                            "sizes": {"t": 6}},
    "uneven": lambda: {"mask": Causal(), "chosen": picked(many=7), "sizes": {"t": 10}},
    "fifty": lambda: {"mask": Causal(), "block": 50, "sizes": {"t": 20, "s": 120},
                      "chosen": picked(K, many=2, n=2, s=120, block=50)},
    "whole": lambda: {"mask": Full(), "block": 32, "sizes": {"t": 32, "s": 64},
                      "chosen": picked(K, many=2, n=2, s=64, block=32)},
    "sunk": lambda: {"mask": Full(), "chosen": sunk()},
    "twice": lambda: {"mask": Full(), "chosen": jnp.concatenate([picked()] * 2, -1)},
    "runs": lambda: {
        "mask": Causal(), "chosen": picked(), "q_segment": jnp.asarray(SEGMENTS[:, :T]),
        "kv_segment": jnp.asarray(SEGMENTS),
    },
    "empty_slots": lambda: {
        "mask": Causal(), "chosen": picked(K), "kv_pos": jnp.asarray(HELD)},
    "positions": lambda: {
        "mask": Causal(), "chosen": picked(),
        "q_pos": jnp.broadcast_to(jnp.arange(T) + 9, (B, T)),
        "kv_pos": jnp.broadcast_to(jnp.arange(S)[::-1] + 3, (B, S)),
    },
}


def gathered(**given):
    return blocks(**given, implementation="xla")


def kernel(backend):
    """The kernel interpreted; on GPU with the least tiles, so that there are several.
    """
    return functools.partial(
        attention, backend=backend, tile=(16, 16), interpret=INTERPRET)


def given(name):
    """(arrays, options) of a case."""
    options = {"block": BLOCK} | CASES[name]()
    return arrays(**options.pop("sizes", {})), options


wanted = once(gathered, given)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_the_kernel_is_the_function(name, backend):
    close(twice(kernel(backend), *given(name)), wanted(name))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", (jnp.bfloat16, jnp.float16))
@pytest.mark.parametrize("name", ("causal", "tokens", "one", "sunk"))
def test_low_precision_is_as_good_as_gathering(name, dtype, backend):
    options = {"block": BLOCK} | CASES[name]()
    low = arrays(**options.pop("sizes", {}), dtype=dtype)
    exact = results(gathered, {n: a.astype(jnp.float32) for n, a in low.items()},
                    options)
    found, rough = results(kernel(backend), low, options), results(gathered, low,
                                                                   options)
    for n in ("o", "q", "k", "v"):
        gap = lambda x: np.linalg.norm(np.asarray(x[n], np.float64) - exact[n])
        assert gap(found) <= 2 * gap(rough), n


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_that_see_nothing_are_zero_and_have_no_gradient(backend):
    options = CASES["none"]() | {"block": BLOCK}
    found = results(kernel(backend), arrays(), options)
    assert np.isneginf(found.pop("lse")).all()
    for n, a in found.items():
        assert not np.asarray(a).any(), n


@pytest.mark.parametrize("how", (gathered, *map(kernel, BACKENDS)))
def test_empty_slots_are_nobodys_keys(how):
    options = {"mask": Full(), "chosen": picked(K), "block": BLOCK,
               "kv_pos": jnp.asarray(HELD)}
    found = results(how, arrays(), options)
    for n in "kv":
        assert not np.asarray(found[n])[HELD < 0].any()
        assert np.asarray(found[n])[HELD >= 0].any()


@pytest.mark.parametrize("name", ("sunk", "tokens", "fifty"))
def test_no_program_on_gpu_depends_on_another(name, monkeypatch):
    """Programs run in the reverse order give the same bits: none writes beyond its own
    rows or keys."""
    options = {"block": BLOCK} | CASES[name]()
    given = arrays(**options.pop("sizes", {}))
    run = functools.partial(attention, backend="triton", interpret=INTERPRET)
    found = results(run, given, options)
    own = pl.program_id
    monkeypatch.setattr(pl, "program_id", lambda n: pl.num_programs(n) - 1 - own(n))
    again = results(run, given, options)
    for n in found:
        np.testing.assert_array_equal(found[n], again[n])


def test_lists_are_cut_into_parts_of_bounded_length():
    """A block that all have chosen: its list lies in several parts, each entry once."""
    chosen = jnp.concatenate([jnp.zeros_like(picked(K)[..., :1]), picked(K)], -1)
    many = -(-S // BLOCK)
    entries, first = inverse(chosen, K, many)
    tile = tiles.FlashTriton(16, 16, 4, 1)
    static = Static(None, BLOCK, 5, 8, T, S, 2, (tile,) * 3, 0, "triton", True)
    parts = blocks_triton.divided(static, (entries, first))
    length = parts.stop - parts.start
    assert length.max() <= max(-(-entries.shape[-1] // many), 1)
    assert (np.diff(parts.first)[..., 0] > 1).all()
    for b, kv in np.ndindex(B, K):
        for j in range(many):
            span = range(parts.first[b, kv, j], parts.first[b, kv, j + 1])
            assert (parts.block[b, kv, span.start:span.stop] == j).all()
            listed = [n for p in span
                      for n in range(parts.start[b, kv, p], parts.stop[b, kv, p])]
            assert listed == list(range(first[b, kv, j], first[b, kv, j + 1]))
        rest = parts.start[b, kv, parts.first[b, kv, -1]:]
        assert (rest >= parts.stop[b, kv, parts.first[b, kv, -1]:]).all()


def test_work_grows_with_the_blocks_chosen():
    def work(s, n):
        shape = lambda t, h: jax.ShapeDtypeStruct((1, t, h, 16), jnp.float32)
        chosen = jax.ShapeDtypeStruct((1, 4, 4, n), jnp.int32)
        f = lambda *a: attention(*a, block=16)[0]
        return cost.flops(f, shape(64, 4), shape(s, 2), shape(s, 2), chosen)

    assert work(4096, 4) == work(1024, 4)
    assert 1.9 < work(1024, 8) / work(1024, 4) < 2.1


def test_loops_on_gpu_end_with_the_blocks_that_there_are():
    static = Static(None, BLOCK, 1, T, T, S, 1, (), 0, "triton", True)
    chosen = jnp.array([-1, 3, 99, 0, 3, -1]).reshape(1, 1, 1, 6)
    count, where = blocks_triton.compact(static, chosen)
    assert count.item() == 3 and where[0, 0, 0, :3].tolist() == [3, 0, 3]


def test_attend_runs_the_kernel_by_name():
    options = CASES["causal"]() | {"block": BLOCK}
    found = blocks(**arrays(), **options, implementation="pallas")
    for a, b in zip(found, gathered(**arrays(), **options)):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_inverse_lists_name_every_choice_once():
    chosen = np.asarray(picked())
    many = -(-S // BLOCK)
    entries, first = (np.asarray(a) for a in inverse(jnp.asarray(chosen), K, many))
    for b in range(B):
        for kv in range(K):
            own = chosen[b, kv * 2:kv * 2 + 2].reshape(-1, chosen.shape[-1])
            for j in range(many):
                listed = entries[b, kv, first[b, kv, j]:first[b, kv, j + 1]]
                want = [n for n, row in enumerate(own) for c in row if c == j]
                assert listed.tolist() == want


def test_runs_go_together():
    with pytest.raises(ValueError, match="q_segment and kv_segment go together"):
        attention(**arrays(), chosen=picked(), block=BLOCK,
                  q_segment=jnp.asarray(SEGMENTS[:, :T]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_choosing_among_no_places_is_refused(backend):
    with pytest.raises(Refused, match="chosen has no places"):
        attention(**arrays(), chosen=picked(n=0), block=BLOCK, backend=backend)


def test_refusals_name_their_reason():
    wide = {n: normal(0, 1, 8, 1, 512) for n in "qkv"}
    with pytest.raises(Refused, match="D=512: at most 256"):
        blocks(**wide, chosen=jnp.zeros((1, 1, 1, 1), jnp.int32), block=8,
               implementation="pallas")
