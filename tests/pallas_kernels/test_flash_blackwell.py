"""Flash attention for Blackwell by Mosaic GPU, interpreted: what it takes, every
gradient, and what it refuses. It has never run on a GPU.

Copies, barriers and warpgroups are simulated; so are, from jax 0.11, tensor memory and
its products. Before, shared memory stands in for the one and dots for the others, and
every block is compiled anew, so that not every form is differentiated.
"""

import functools
import json

import jax
import jax.numpy as jnp
import pytest

from attn.masks import Causal, Full, Sink, Window
from attn.positions import ALiBi
from pallas_kernels import tables
from pallas_kernels.machine import hopper
from pallas_kernels.machine.blackwell import COLUMNS, ROWS
from pallas_kernels.machine.hopper import LATER
from pallas_kernels.matrix.targets import TARGETS
from tests.on_device import INTERPRET
from tests.oracles.softmax import chunks as attend, flash
from tests.pallas_kernels.test_flash import results, twice
from tests.pallas_kernels.test_flash_mosaic import (
    RUNS, apart, everything, inputs, refused, table
)

BF16, F16 = jnp.bfloat16, jnp.float16
ONE = (128, 64)  # a tile of one warpgroup

CASES = {
    "causal": lambda: {"mask": Causal(), "sizes": {"t": 150, "s": 150}},
    "grouped": lambda: {"mask": Causal(), "tile": ONE,
                        "sizes": {"t": 140, "s": 100, "h": 2, "k": 1}},
    "three_tiles": lambda: {"mask": None, "tile": (256, 64, 2), "scale": -0.3,
                            "sizes": {"t": 1, "s": 230}},
    "empty_rows": lambda: {"mask": Causal(), "tile": ONE, "sizes": {"t": 100, "s": 40}},
    "sink_tokens": lambda: {"mask": Causal() & (Window(5) | Sink(3)), "tile": ONE,
                            "softcap": 3.0, "sizes": {"t": 120, "s": 120}},
    "score": lambda: {"mask": Causal(), "score": ALiBi(2), "tile": ONE,
                      "sizes": {"t": 75, "s": 75, "h": 2, "k": 1}},
    "runs": lambda: {"mask": Causal(), "q_segment": jnp.asarray(RUNS),
                     "kv_segment": jnp.asarray(RUNS),
                     "sizes": {"b": 2, "t": 150, "s": 150}},
    "everything": everything,
    "one_token": lambda: {"mask": Causal(), "sizes": {"t": 1, "s": 1}},
    "wide": lambda: {"mask": Causal(), "sizes": {"t": 200, "s": 120, "d": 128,
                                                 "v": 128}},
    "d192": lambda: {"mask": Causal(), "sizes": {"d": 192, "v": 128}},
    "float16": lambda: {"mask": Full(), "tile": ONE,
                        "sizes": {"dtype": F16, "d": 40, "v": 100}},
}


GRADIENTS = "grouped", "everything", "one_token", "wide", "d192", "float16"


@pytest.mark.parametrize("name", CASES)
def test_the_kernel_is_the_function(name):
    """Against float32 of the same numbers: at most twice the error of XLA's form in the
    same type; lse, which is not rounded, to 1e-5."""
    options = CASES[name]()
    low = inputs(**options.pop("sizes", {}))
    more = {n: options.pop(n) for n in ("sink",) if n in options}
    tile = options.pop("tile", None)
    exact = {n: a.astype(jnp.float32) for n, a in low.items()} | more
    low = low | more
    kernel = functools.partial(
        flash, backend="blackwell", tile=tile, interpret=INTERPRET)
    run = twice if name == "wide" else results if LATER or name in GRADIENTS else ahead
    found = run(kernel, low, options)
    expected, rough = results(attend, exact, options), results(attend, low, options)
    for n in found:
        error, scale = apart(found, expected, n)
        if n == "lse":
            assert error <= 1e-5 * max(scale, 1), n
        else:
            allowed, _ = apart(rough, expected, n)
            assert error <= 2 * allowed + 1e-4 * scale, (n, error / scale)


def ahead(f, arrays, options):
    """o and lse alone."""
    return dict(zip(("o", "lse"), jax.jit(lambda a: f(**a, **options))(arrays)))


@pytest.mark.skipif(not LATER, reason="jax 0.10 simulates no tensor memory")
def test_warpgroups_do_not_race(monkeypatch):
    """No one overwrites what another has still to read: a race is an error."""
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

    monkeypatch.setattr(hopper, "_interpreter",
                        lambda: InterpretGPUParams(detect_races=True))
    f = functools.partial(flash, mask=Causal(), tile=(256, 64, 2), backend="blackwell",
                          interpret=INTERPRET)
    f(**inputs(t=300, s=300, h=2))
    results(f, inputs(t=260, s=260, d=128, v=128, h=2), {})


def test_tiles_of_the_backward_pass_fit():
    """Into tensor memory; and rings hold the tile that is at work, the one before,
    whose products may not be done, and the next, or warpgroups wait for each other
    forever."""
    rows = [own["blackwell_flash_backward"] for own in json.loads(
        tables.TABLE.read_text()).values() if "blackwell_flash_backward" in own]
    assert rows
    for row in rows:
        for label, tile in row.items():
            d, v = (int(word[1:]) for word in label.split())
            rings = tile["num_stages"], tile["dq_k_stages"]
            assert tile["block_kv"] == ROWS
            assert min(rings) >= 3 and tile["dq_v_stages"] >= 2
            assert 3 * tile["block_q"] + d + v <= COLUMNS
            assert tile["dq_block_kv"] * 5 // 2 + d <= COLUMNS


@pytest.mark.parametrize("options, reason", [
    ({"dtype": jnp.float32}, "q is float32: Blackwell's matrix units"),
    ({"d": 200}, "D=200, V=64: too wide for a Blackwell kernel"),
    ({"bias": True}, "bias: not on Blackwell"),
    ({"keep": True}, "keep: not on Blackwell"),
    ({"key": True}, "key: not on Blackwell"),
    ({"mask": table}, "reads a table"),
    ({"score": lambda h, i, j: jnp.sin(i * 1.0)}, "no sin on Blackwell"),
    ({"interpret": False}, "device cpu: expected one of B100, B200"),
    ({"tile": (64, 64)}, "expected 128 or 256 queries"),
    ({"tile": (256, 256)}, "512 columns of tensor memory \\(not 896\\)"),
    ({"tile": (256, 64, 1)}, "and 2 stages"),
])
def test_refusals_name_their_reason(options, reason):
    refused("blackwell", options, reason)


def test_nothing_tunes_or_picks_it():
    target = TARGETS["sm100"]
    assert "blackwell" in target.named and "blackwell" not in target.backends
