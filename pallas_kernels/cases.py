"""Cases: the shapes and options for which kernels are compiled for every target."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import tables
from pallas_kernels.blocks import blocks
from pallas_kernels.case import BF16, F32, Case, struct, with_gradients
from pallas_kernels.cases_recurrent import recurrent
from pallas_kernels.cases_delta import DELTA, rule, work as delta_work
from pallas_kernels.decode import decode
from pallas_kernels.flash import flash
from pallas_kernels.schedule import FULL, MASKED, Tiling, asked, fitted, paths


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


def passes(device: str, t, d, v, h, mask, tile=None, itemsize=2, packed=False,
           matrix=False) -> dict[str, Any]:
    """Trips of the flash kernels, in the order of their programs; runs of `packed`
    sequences are taken to hide nothing."""
    trips = {}
    shape = tables.Shape(t, t, d, v, itemsize, matrix)
    for kernel in ("flash_forward", "flash_backward"):
        found = tables.tile(device, kernel, shape, tile)
        tiling = Tiling(t, t, found.rows, found.columns, 0)
        if tile is None:
            tiling = fitted(mask, tiling, found.how[0], max(d, v), packed,
                            kernel == "flash_backward")
        table = asked(mask, tiling)
        ask = jnp.asarray(table)[None] if packed else None
        ways, codes, _ = paths(mask, tiling, found.how[0], table, ask)
        kinds = [MASKED] * ways.masked
        kinds += [MASKED + 1 + n for n in range(len(ways.patterns))]
        kinds += [FULL] * ways.whole
        counts = [h * int((codes == kind).sum()) for kind in kinds]
        lines = h * table.shape[kernel == "flash_backward"]
        trips[kernel] = tuple(counts), lines, sum(counts)
    return trips


def attention(target, *, backend, backward, t, d, h=8, k=8, v=None, mask=Causal(),
              dtype=BF16, tile=None, extra=()):
    """flash, forward or forward and backward; extra: names of optional arrays."""
    v = v or d
    arrays = [struct(1, t, n, width, dtype=dtype) for n, width in
              ((h, d), (k, d), (k, v))]
    given = {"sink": struct(h, dtype=F32), "bias": struct(1, h, t, t, dtype=dtype)}
    arrays += [given[n] for n in given if n in extra]
    runs = [struct(1, t, dtype=jnp.int32)] if "runs" in extra else []
    softcap = 30.0 if "softcap" in extra else None

    def f(runs, q, k, v, *more):
        options = dict(zip([n for n in given if n in extra], more))
        if runs:
            options |= {"q_run": runs[0], "kv_run": runs[0]}
        return flash(q, k, v, mask=mask, softcap=softcap, tile=tile, backend=backend,
                     **options)

    trips = {}
    if backend == "tpu":
        size = jnp.dtype(dtype).itemsize
        trips = passes(target.kind, t, d, v, h, mask, tile, size, bool(runs),
                       "bias" in extra)
    if not backward:
        return f, (runs, *arrays), {n: c for n, c in trips.items() if "forward" in n}

    def both(runs, args, do):
        return with_gradients(lambda *a: f(runs, *a)[0])(args, do)

    return both, (runs, arrays, struct(1, t, h, v, dtype=dtype)), trips


def splash_attention(target, *, backward, tile, t=8192, d=128, h=8):
    """jax's splash attention, at tiles (q, kv, kv compute)."""
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel as splash, splash_attention_mask as splash_mask
    )

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
    one = (tiles,), h * (t // q), h * (t // q) * (t // kv)
    if not backward:
        return kernel, (array,) * 3, {"splash_mha_fwd": one}
    return (with_gradients(kernel), ((array,) * 3, array),
            {"splash_mha_fwd": one, "splash_mha_dkv": one})


def tokamax_attention(target, *, backward, backend, t=8192, d=128, h=8):
    """Tokamax's attention by one of its implementations, as it tunes itself."""
    import tokamax

    # it asks the default device, not the mesh, what it compiles for
    device = target.described().devices[0]

    def f(q, k, v):
        return tokamax.dot_product_attention(
            q, k, v, is_causal=True, implementation=backend)

    def placed(g):
        def call(*args):
            with jax.default_device(device):
                return g(*args)

        return call

    arrays = (struct(1, t, h, d),) * 3
    if not backward:
        return placed(f), arrays, {}
    return placed(with_gradients(f)), (arrays, arrays[0]), {}


def chosen(target, *, backend, backward, t=8192, h=16, k=2, block=64, n=16, d=128):
    """blocks: 16 of 64 tokens for each 64 queries."""
    arrays = struct(1, t, h, d), struct(1, t, k, d), struct(1, t, k, d)
    at = struct(1, k, t // block, n, dtype=jnp.int32)

    def f(at, q, k, v):
        return blocks(q, k, v, at, mask=Causal(), block=block, backend=backend)[0]

    if not backward:
        return f, (at, *arrays), {}

    def both(at, args, do):
        return with_gradients(lambda *a: f(at, *a))(args, do)

    return both, (at, arrays, struct(1, t, h, d)), {}


def cached(target, *, backend, b=8, h=32, k=8, d=128, s=32768, bits=16, page=None,
           statistics=False):
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

    def f(args):
        return decode(**args, bits=bits, statistics=statistics, backend=backend)

    trips = {"decode": ((steps,), b, steps)}
    return f, (args,), trips if backend == "tpu" and not statistics else {}


def work(t, d, v=None, h=8, causal=True, backward=False) -> float:
    """Flops by the field's convention: backward is 2.5 times forward."""
    return (2 * h * t * t * (d + (v or d)) / (2 if causal else 1)
            * (2.5 if backward else 1))


FLASH: dict[str, dict[str, Any]] = {
    "causal T8192 D128 H8": {"t": 8192, "d": 128},
    "causal T8192 D64 H8": {"t": 8192, "d": 64},
    "causal T8192 D256 H8": {"t": 8192, "d": 256},
    "causal T4096 D192 V128 H8": {"t": 4096, "d": 192, "v": 128},
    "causal T12288 D256 H1": {"t": 12288, "d": 256, "h": 1, "k": 1},
    "causal T24576 D128 H1": {"t": 24576, "d": 128, "h": 1, "k": 1},
    "full T8192 D128 H8": {"t": 8192, "d": 128, "mask": None},
    "grouped T4096 D128 H8 K2 window sinks softcap": {
        "t": 4096, "d": 128, "k": 2, "mask": Window(), "extra": ("sink", "softcap")},
    "packed T4096 D128 H4": {"t": 4096, "d": 128, "h": 4, "k": 4, "extra": ("runs",)},
    "bias T2048 D32 H4": {"t": 2048, "d": 32, "h": 4, "k": 4, "extra": ("bias",)},
    "odd T1000 D24 H4 float32": {"t": 1000, "d": 24, "h": 4, "k": 4, "dtype": F32},
}
DECODE: dict[str, dict[str, Any]] = {
    "": {}, " int8": {"bits": 8}, " int4": {"bits": 4}, " pages of 128": {"page": 128},
    " statistics": {"statistics": True},
}
PEER = "causal T8192 D128 H8"
SPLASH = ((1024, 1024, 1024), (1024, 1024, 512), (2048, 2048, 512))  # the best of many


def cases(target) -> dict[str, Case]:
    """All cases of a target by name; a name's first word is the kernel."""
    found: dict[str, Case] = {}
    for backend in target.backends + target.named:
        label = "" if backend == "tpu" else f" {backend}"
        for way in ("forward", "backward"):
            more: dict[str, Any] = {"backend": backend, "backward": way == "backward"}
            for name, options in FLASH.items():
                flops = 0.0
                if name.startswith(("causal", "full")):
                    own = {n: options[n] for n in ("t", "d", "v", "h") if n in options}
                    flops = work(causal=name.startswith("causal"),
                                 backward=way == "backward", **own)
                found[f"flash {way}{label} {name}"] = Case(
                    functools.partial(attention, **more, **options), flops)
            if backend not in tables.PADDED:
                found |= recurrent(backend, way, label)
                for name, options in DELTA.items():
                    found[f"delta {way}{label} {name}"] = Case(
                        functools.partial(rule, **more, **options),
                        delta_work(backward=way == "backward", **options),
                        kin=not name.startswith(("gated T8192 D128 H16", "odd",
                                                 "packed")))
                found[f"blocks {way}{label} T8192 D128 H16 K2 n16x64"] = Case(
                    functools.partial(chosen, **more))
        for name, options in DECODE.items() if backend not in tables.PADDED else ():
            bits = options.get("bits", 16)
            found[f"decode{label} B8 S32768 H32 K8{name}"] = Case(
                functools.partial(cached, backend=backend, **options), 0.0,
                2 * 8 * 32768 * 8 * 128 * bits / 8)
    # forward first: Mosaic GPU leaves nothing of a kernel that it has compiled before
    order = lambda item: (" backward " in item[0], item[0])
    return dict(sorted((found | peers(target)).items(), key=order))


def peers(target) -> dict[str, Case]:
    """The best peers on the shape that ours are compared on; tokamax if installed."""
    found: dict[str, Case] = {}
    there = importlib.util.find_spec("tokamax") is not None
    for way in ("forward", "backward"):
        back = way == "backward"
        add = lambda name, f, **kw: found.update({f"peer {way} {name} {PEER}": Case(
            functools.partial(f, backward=back, **kw), work(8192, 128, backward=back),
            peer=True)})
        if target.platform == "tpu":
            for tile in SPLASH:
                add(f"splash {'x'.join(map(str, tile))}", splash_attention, tile=tile)
        if there:
            for backend in ("mosaic", "triton")[:1 + (target.platform != "tpu")]:
                add(f"tokamax {backend}", tokamax_attention, backend=backend)
    return found


def bytes_of(args: Any) -> int:
    """Bytes of the arguments: each has to be read at least once."""
    return sum(int(np.prod(a.shape)) * jnp.dtype(a.dtype).itemsize
               for a in jax.tree.leaves(args))
