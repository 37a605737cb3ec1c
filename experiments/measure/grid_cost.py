"""Spread: one attention over 1, 2, 4, 8 devices, what each holds and what it is sent.

What is counted here comes from the compiled program of one device, and from a model of
time, not from a clock: devices of a CPU share its cores.
"""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from rich import box
from rich.table import Table

from attn.exact.dense import online_softmax
from attn.exact.online import merge, output
from attn.masks import Causal
from attn.parallel.device_grid import grid_attention, traffic
from experiments.measure.collectives import collectives
from pallas_kernels.logits import LogitSpec, Where

CAUSAL = LogitSpec(Causal())
GRIDS = {1: (1, 1), 2: (1, 2), 4: (2, 2), 8: (2, 4)}


@dataclasses.dataclass(frozen=True)
class Hardware:
    """Peaks of a device: floating point operations, bytes of its memory and bytes of
    its link, a second. By default a GeForce RTX 4090 by its data sheet: bfloat16 with
    float32 sums, GDDR6X, PCIe 4.0 x16 in one direction."""

    flops: float = 165e12
    memory: float = 1008e9
    link: float = 32e9


def many(devices: int) -> int:
    """Asks for so many devices of a CPU, while that can still be asked -> how many
    there are."""
    if "device_count" not in os.environ.get("XLA_FLAGS", ""):
        try:
            jax.config.update("jax_num_cpu_devices", devices)
        except RuntimeError:
            pass  # jax has begun with those that it has
    return jax.device_count()


def measured(
    length: int, heads: int, width: int, most: int = 8
) -> list[dict[str, Any]]:
    """A row for 1, 2, 4, 8 devices, up to `most` and to what there is: the error
    against one device, bytes of temporary memory of a device of three programs, and
    bytes received, from the compiled text and by hand.

    tiles: `grid_attention`. dense: the same grid with every logit of a device at once.
    ring: one step of a ring, T/P queries and T/P keys, with every logit at once.
    """
    keys = jax.random.split(jax.random.key(0), 3)
    args = [jax.random.normal(n, (1, length, heads, width)) for n in keys]
    rows: list[dict[str, Any]] = []
    whole = None
    for devices, (r, c) in GRIDS.items():
        if devices > min(most, jax.device_count()):
            break
        mesh = jax.make_mesh(
            (r, c), ("rows", "columns"), devices=jax.devices()[:devices],
            axis_types=(jax.sharding.AxisType.Auto,) * 2,
        )
        with jax.set_mesh(mesh):
            placed = [jax.device_put(a, NamedSharding(mesh, PartitionSpec(None, at)))
                      for a, at in zip(args, ("rows", *(("rows", "columns"),) * 2))]
            tiles, dense = (jax.jit(f).lower(*placed).compile() for f in (_tiles, _all))
            o = np.asarray(tiles(*placed))
        whole = o if whole is None else whole
        # one step of the ring runs on one device, whatever the mesh is
        piece = jax.ShapeDtypeStruct((1, length // devices, heads, width), jnp.float32)
        one_step = jax.jit(lambda *a: tuple(online_softmax(*a)))
        step = one_step.lower(*(piece,) * 3).compile()
        sent = {kind: sum(sizes) for kind, sizes in
                collectives(tiles.as_text() or "").items()}
        rows.append({
            "devices": devices, "rows": r, "columns": c,
            "error": float(np.linalg.norm(o - whole) / np.linalg.norm(whole)),
            "tiles": _temporary(tiles), "dense": _temporary(dense),
            "ring": _temporary(step),
            "gathered": sent.get("all-gather", 0) * (r - 1) // r,
            "reduced": sent.get("all-reduce", 0), "others": sum(sent.values())
            - sent.get("all-gather", 0) - sent.get("all-reduce", 0),
            "by hand": traffic(length, length, r, c, heads=heads, width=width),
        })
    return rows


def _tiles(q, k, v) -> jax.Array:
    return grid_attention(q, k, v, CAUSAL, rows="rows", columns="columns")


def _all(q, k, v) -> jax.Array:
    """`grid_attention` in its plain form: the logits of a device are one array."""
    at = jnp.arange(q.shape[1])[None]

    def local(q, k, v, q_pos, kv_pos):
        k, v, kv_pos = (
            jax.lax.all_gather(a, "rows", axis=1, tiled=True) for a in (k, v, kv_pos)
        )
        part = online_softmax(q, k, v, CAUSAL, Where(q_pos, kv_pos))
        return output(merge(part, "columns"))

    row, own = (PartitionSpec(None, at) for at in ("rows", ("rows", "columns")))
    f = jax.shard_map(local, in_specs=(row, own, own, row, own), out_specs=row,
                      check_vma=False)
    return f(q, k, v, at, at)


def _temporary(compiled: Any) -> int:
    return int(compiled.memory_analysis().temp_size_in_bytes)


def modelled(length: int, heads: int, width: int, on: Hardware) -> dict[str, float]:
    """Seconds of a forward pass without a mask: `vanilla`, on one device with the
    logits in memory (float32: written, read and written by softmax, read again), and
    `P devices` in tiles, computing at the peak, then what is sent."""
    pairs = 4.0 * length * length * heads * width
    moved = 4 * 4.0 * length * length * heads / on.memory
    found = {"vanilla": pairs / on.flops + moved}
    for devices, (r, c) in GRIDS.items():
        sent = traffic(length, length, r, c, heads=heads, width=width, itemsize=2)
        ring = 2 * (c - 1) / c * sent["reduced"]
        found[f"{devices} device" + "s" * (devices > 1)] = (
            pairs / on.flops / devices + (sent["gathered"] + ring) / on.link
        )
    return found


def tables(rows: list[dict[str, Any]], times: dict[int, dict[str, float]]) -> list:
    """What `measured` and, by T, `modelled` gave, for the terminal."""
    found = []
    if rows:
        table = Table(title="a device of a grid, MB", box=box.MARKDOWN)
        for title in ("grid", "error", "tiles", "logits", "ring", "gather", "hand",
                      "reduce", "hand"):
            table.add_column(title, justify="right", no_wrap=True)
        for row in rows:
            sizes = (row["tiles"], row["dense"], row["ring"], row["gathered"],
                     row["by hand"]["gathered"], row["reduced"],
                     row["by hand"]["reduced"])
            table.add_row(f"{row['rows']}x{row['columns']}", f"{row['error']:.0e}",
                          *(f"{size / 1e6:.2f}" for size in sizes))
        found.append(table)
    for t, each in times.items():
        one, vanilla = each["1 device"], each["vanilla"]
        table = Table(title=f"T = {t:,}, modelled", box=box.MARKDOWN)
        for title in ("", "ms", "times as fast as vanilla", "as 1 device in tiles"):
            table.add_column(title, justify="right")
        for name, value in each.items():
            table.add_row(name, f"{1e3 * value:.3f}", f"{vanilla / value:.1f}",
                          f"{one / value:.2f}")
        found.append(table)
    return found
