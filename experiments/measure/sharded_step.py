"""A sharded training step, compiled for a TPU pod that is not there, and what it has to
keep: rings go from chip to neighbouring chip, and no gather of the sequence is waited
for. It takes a minute, and ends with 1 and the reason if that is lost.

    .venv-aot/bin/python -m experiments.measure.sharded_step

The model is small and has one exact layer (a ring) and one linear one (LASP-2,
whose only exchange along the sequence is of states); the sequence is split over four
chips, each with its own part of the parameters.
"""

from __future__ import annotations

import sys
import time
from typing import Iterator

import jax
import jax.numpy as jnp

from attn.lightning import Lightning
from attn.softmax import Softmax
from experiments.measure.collectives import Collective, instructions
from experiments.measure.roofline import built
from experiments.measure.topology import Pod, pod
from experiments.training.step import TrainConfig, staged
from models.lm import LM

TOPOLOGY, SIZES = "v5e:2x2", (1, 4, 1)
TOKENS, HEADS, WIDTH = 8192, 4, 128
# bytes of one layer's k of one chip, in bfloat16: what a ring hands on, and more than
# any parameter that is gathered
PIECE = TOKENS // SIZES[1] * HEADS * WIDTH * 2
HOMEWARD = 2  # dk and dv, which at last are sent home, past all chips in between


def wrong(found: list[Collective], pod_: Pod, at: list) -> Iterator[str]:
    """What a step's collectives break, a sentence each; at: devices in mesh order."""
    rings = [one for one in found if one.kind == "collective-permute"
             and one.bytes >= PIECE // 2]
    if not rings:
        yield "no permutation hands on keys and values: expected a ring"
    far = [one.name for one in rings
           if pod_.distance([(at[a], at[b]) for a, b in one.pairs]) > 1]
    if len(far) > HOMEWARD:
        yield (f"{', '.join(far)} go further than to neighbours: expected {HOMEWARD} "
               "at most")
    for one in rings:
        if not one.hidden:
            yield f"{one.name} ({one.bytes} bytes) is waited for at once"
    for one in found:
        if one.kind == "all-gather" and one.bytes >= PIECE and not one.hidden:
            yield (f"{one.name} gathers {one.bytes} bytes that are waited for at once: "
                   f"expected fewer than {PIECE}")


def main() -> int:
    """Compiles, prints, and checks; the exit status."""
    begun, chips = time.perf_counter(), pod(TOPOLOGY)
    mesh = chips.mesh(SIZES)
    model = LM(vocab=256, width=HEADS * WIDTH, heads=HEADS, dtype=jnp.bfloat16,
               attention=(Softmax(exchange="ring"), Lightning()))
    shape = jax.ShapeDtypeStruct((1, TOKENS), jnp.int32)
    plan = TrainConfig(batch=1, mesh=SIZES)
    _, lowered = staged(model, plan, mesh, {"tokens": shape, "targets": shape})
    found = instructions(built(chips, lowered)[1])
    lines = list(wrong(found, chips, list(mesh.devices.flat)))
    kinds = sorted({one.kind for one in found})
    many = {kind: sum(one.times for one in found if one.kind == kind)
            for kind in kinds}
    counts = ", ".join(f"{n} {kind}" for kind, n in many.items())
    print(f"a training step on {TOPOLOGY}, {TOKENS} tokens along {SIZES[1]} chips: "
          f"{counts}; compiled in {time.perf_counter() - begun:.0f} s")
    print("\n".join(lines) or "rings between neighbours, no gather is waited for")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
