"""Cases: the shapes and options for which kernels are compiled for every target."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel as splash, splash_attention_mask as splash_mask
)

from pallas_kernels import tables
from pallas_kernels.blocks import blocks
from pallas_kernels.decode import decode
from pallas_kernels.flash import flash
from pallas_kernels.schedule import FULL, MASKED, Tiling, asked

BF16, F32 = jnp.bfloat16, jnp.float32


@dataclasses.dataclass(frozen=True)
class Causal:
    """A causal mask, all that this package knows of masks."""

    def __call__(self, h, i, j):
        return j <= i

    def bounds(self, i, j):
        return j[0] <= i[1], j[1] <= i[0]


@dataclasses.dataclass(frozen=True)
class Window(Causal):
    """Causal, and at most `left` tokens back."""

    left: int = 1024

    def __call__(self, h, i, j):
        return (j <= i) & (i - j <= self.left)

    def bounds(self, i, j):
        some, every = super().bounds(i, j)
        return some & (i[0] - j[1] <= self.left), every & (i[1] - j[0] <= self.left)


@dataclasses.dataclass(frozen=True)
class Case:
    """One program. build(device) -> (f, arguments as ShapeDtypeStructs, trips by the
    start of a kernel's name: (passes of each tile region, lines, grid steps)).
    flops: of one run, for the share of the peak; moved: bytes that have to move; whole:
    XLA's own programs are of interest too."""

    build: Callable[[str], tuple[Callable, tuple, dict[str, Any]]]
    flops: float = 0.0
    moved: float = 0.0
    whole: bool = False


def struct(*shape, dtype=BF16):
    """An array that is not there."""
    return jax.ShapeDtypeStruct(shape, dtype)


def passes(device: str, t, d, v, h, mask, tile=None, itemsize=2) -> dict[str, Any]:
    """Trips of the flash kernels: masked tiles come first in their program."""
    trips = {}
    shape = tables.Shape(t, t, d, v, itemsize)
    for kernel in ("flash_forward", "flash_backward"):
        found = tables.tile(device, kernel, shape, tile)
        table = asked(mask, Tiling(t, t, found.rows, found.columns, 0))
        counts = h * int((table == MASKED).sum()), h * int((table == FULL).sum())
        lines = h * table.shape[kernel == "flash_backward"]
        trips[kernel] = counts, lines, sum(counts)
    return trips


def attention(device, *, backward, t, d, h=8, k=8, v=None, mask=Causal(), dtype=BF16,
              tile=None, extra=()):
    """flash, forward or forward and backward; extra: names of optional arrays."""
    v = v or d
    q, keys, values = (
        struct(1, t, n, width, dtype=dtype) for n, width in ((h, d), (k, d), (k, v)))
    given = {
        "runs": struct(1, t, dtype=jnp.int32), "sink": struct(h, dtype=F32),
        "bias": struct(1, h, t, t, dtype=dtype),
    }
    options = {"mask": mask}
    if "softcap" in extra:
        options["softcap"] = 30.0
    arrays = {n: given[n] for n in extra if n in given}

    def f(q, k, v, sink=None, bias=None, runs=None):
        return flash(q, k, v, sink=sink, bias=bias, q_run=runs, kv_run=runs, tile=tile,
                     **options)

    trips = passes(device, t, d, v, h, mask, tile, jnp.dtype(dtype).itemsize)
    if not backward:
        return (lambda q, k, v, arrays: f(q, k, v, **arrays),
                (q, keys, values, arrays), {"flash_forward": trips["flash_forward"]})

    def both(q, k, v, arrays, do):
        runs = arrays.get("runs")
        own = {n: a for n, a in arrays.items() if n != "runs"}
        o, back = jax.vjp(lambda q, k, v, own: f(q, k, v, runs=runs, **own)[0],
                          q, k, v, own)
        return back(do)

    return both, (q, keys, values, arrays, struct(1, t, h, v, dtype=dtype)), trips


def peer(device, *, backward, tile, t=8192, d=128, h=8):
    """jax's splash attention, the best peer on TPU, at tiles (q, kv, kv compute)."""
    mask = splash_mask.MultiHeadMask([splash_mask.CausalMask((t, t))] * h)
    q, kv, compute = tile
    sizes = splash.BlockSizes(
        block_q=q, block_kv=kv, block_kv_compute=compute, block_q_dkv=q,
        block_kv_dkv=kv, block_kv_dkv_compute=compute, use_fused_bwd_kernel=True,
    )
    kernel = splash.make_splash_mha(
        mask=mask, block_sizes=sizes, head_shards=1, q_seq_shards=1)
    array = struct(h, t, d)
    tiles = int((asked(Causal(), Tiling(t, t, q, kv, 0)) != 0).sum()) * h
    steps = h * (t // q) * (t // kv)
    one = (tiles,), h * (t // q), steps
    if not backward:
        return kernel, (array,) * 3, {"splash_mha_fwd": one}

    def both(q, k, v, do):
        return jax.vjp(lambda *a: kernel(*a), q, k, v)[1](do)

    return both, (array,) * 4, {"splash_mha_fwd": one, "splash_mha_dkv": one}


def chosen(device, *, backward, t=8192, h=16, k=2, block=64, n=16, d=128):
    """blocks: 16 of 64 tokens for each 64 queries."""
    args = (struct(1, t, h, d), struct(1, t, k, d), struct(1, t, k, d),
            struct(1, k, t // block, n, dtype=jnp.int32))

    def f(q, k, v, at):
        return blocks(q, k, v, at, mask=Causal(), block=block)[0]

    def both(q, k, v, at, do):
        return jax.vjp(lambda q, k, v: f(q, k, v, at), q, k, v)[1](do)

    if not backward:
        return f, args, {}
    return both, (*args, struct(1, t, h, d)), {}


def cached(device, *, b=8, h=32, k=8, d=128, s=32768, bits=16, page=None):
    """decode: one query a row against a full cache."""
    lead = (b, s) if page is None else (b * s // page, page)
    kind, width = (jnp.int8 if bits < 16 else BF16), d // 2 if bits == 4 else d
    args = {"q": struct(b, 1, h, d), "k": struct(*lead, k, width, dtype=kind),
            "v": struct(*lead, k, width, dtype=kind),
            "lengths": struct(b, k, dtype=jnp.int32)}
    if bits < 16:
        args |= {n: struct(*lead, k, dtype=F32) for n in ("k_scale", "v_scale")}
    if page:
        args["table"] = struct(b, s // page, dtype=jnp.int32)
    steps = b * s // ((page or 0) or tables.slots(s, k))
    if page:
        steps = b * -(-(s // page) // max(tables.slots(s, k) // page, 1))
    return (lambda args: decode(**args, bits=bits), (args,),
            {"decode": ((steps,), b, steps)})


def work(t, d, v=None, h=8, causal=True, backward=False) -> float:
    """Flops by the field's convention: backward is 2.5 times forward."""
    return (2 * h * t * t * (d + (v or d)) / (2 if causal else 1)
            * (2.5 if backward else 1))


def cases() -> dict[str, Case]:
    """All cases by name; a name's first word is the kernel."""
    found: dict[str, Case] = {}
    for way in ("forward", "backward"):
        back = way == "backward"
        make = functools.partial(attention, backward=back)
        add = lambda name, flops=0.0, **kw: found.update({
            f"flash {way} {name}": Case(functools.partial(make, **kw), flops)})
        add("causal T8192 D128 H8", work(8192, 128, backward=back), t=8192, d=128)
        add("causal T8192 D64 H8", work(8192, 64, backward=back), t=8192, d=64)
        add("causal T8192 D256 H8", work(8192, 256, backward=back), t=8192, d=256)
        add("causal T4096 D192 V128 H8", work(4096, 192, 128, backward=back), t=4096,
            d=192, v=128)
        add("grouped T4096 D128 H8 K2 sinks softcap", t=4096, d=128, k=2,
            mask=Window(), extra=("sink", "softcap"))
        add("packed T4096 D128 H4", t=4096, d=128, h=4, k=4, extra=("runs",))
        add("bias T2048 D32 H4", t=2048, d=32, h=4, k=4, extra=("bias",))
        add("odd T1000 D24 H4 float32", t=1000, d=24, h=4, k=4, dtype=F32)
        found[f"blocks {way} T8192 D128 H16 K2 n16x64"] = Case(
            functools.partial(chosen, backward=back))
        for tile in ((1024, 1024, 1024), (1024, 1024, 512)):
            name = f"splash {way} causal T8192 D128 H8 {'x'.join(map(str, tile))}"
            found[name] = Case(functools.partial(peer, backward=back, tile=tile),
                               work(8192, 128, backward=back))
    for name, kw in (("", {}), (" int8", {"bits": 8}), (" int4", {"bits": 4}),
                     (" pages of 128", {"page": 128})):
        size = {"bits": 16} | kw
        moved = 2 * 8 * 32768 * 8 * 128 * size["bits"] / 8
        found[f"decode B8 S32768 H32 K8{name}"] = Case(
            functools.partial(cached, **kw), 0.0, moved)
    return {n: c for n, c in sorted(found.items())}


def bytes_of(args: Any) -> int:
    """Bytes of the arguments: each has to be read at least once."""
    return sum(int(np.prod(a.shape)) * jnp.dtype(a.dtype).itemsize
               for a in jax.tree.leaves(args))
