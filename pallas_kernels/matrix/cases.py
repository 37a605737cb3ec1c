"""Cases: the shapes and options for which kernels are compiled for every target."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import tables
from pallas_kernels.blocks.api import blocks
from pallas_kernels.decode.api import decode
from pallas_kernels.logits import LogitSpec
from pallas_kernels.matrix.case import (
    BF16, F32, Case, TripCounts, struct, with_gradients
)
from pallas_kernels.matrix.cases_delta import DELTA, rule, work as delta_work
from pallas_kernels.matrix.cases_flash import FLASH, Causal, attention, work
from pallas_kernels.matrix.cases_memory import memories
from pallas_kernels.matrix.cases_peers import peers
from pallas_kernels.matrix.cases_recurrent import recurrent


def chosen(target, *, backend, backward, t=8192, h=16, k=2, block=64, n=16, d=128,
           dtype=BF16):
    """blocks: 16 of 64 tokens for each 64 queries."""
    arrays = [struct(1, t, heads, d, dtype=dtype) for heads in (h, k, k)]
    at = struct(1, k, t // block, n, dtype=jnp.int32)

    def f(at, q, k, v):
        return blocks(q, k, v, at, LogitSpec(Causal()), block=block, backend=backend)[0]

    if not backward:
        return f, (at, *arrays), {}

    def both(at, args, do):
        return with_gradients(lambda *a: f(at, *a))(args, do)

    return both, (at, arrays, struct(1, t, h, d, dtype=dtype)), {}


def cached(target, *, backend, b=8, h=32, k=8, d=128, s=32768, bits=16, page=None,
           statistics=False, dtype=BF16):
    """decode: one query a row against a full cache."""
    lead = (b, s) if page is None else (b * s // page, page)
    kind = jnp.int8 if bits < 16 else dtype
    width = d // 2 if bits == 4 else d
    cache = struct(*lead, k, width, dtype=kind)
    args = {"q": struct(b, 1, h, d, dtype=dtype), "k": cache, "v": cache,
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

    # of 16 bits a second tile region, for pages with empty slots, which are none here
    tiles = (steps, 0) if bits == 16 else (steps,)
    trips = {"decode": TripCounts(tiles, b, steps)}
    return f, (args,), trips if backend == "tpu" and not statistics else {}


DECODE: dict[str, dict[str, Any]] = {
    "": {}, " int8": {"bits": 8}, " int4": {"bits": 4}, " pages of 128": {"page": 128},
    " statistics": {"statistics": True},
}

DISTINCT_DELTA = (
    "gated T8192 D128 H16", "channel T8192", "odd", "packed", "one token")


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
                found |= memories(backend, way, label)
                for name, options in DELTA.items():
                    found[f"delta {way}{label} {name}"] = Case(
                        functools.partial(rule, **more, **options),
                        delta_work(backward=way == "backward", **options),
                        near_duplicate=not name.startswith(DISTINCT_DELTA))
                found[f"blocks {way}{label} T8192 D128 H16 K2 n16x64"] = Case(
                    functools.partial(chosen, **more))
        for name, options in DECODE.items() if backend not in tables.PADDED else ():
            bits = options.get("bits", 16)
            found[f"decode{label} B8 S32768 H32 K8{name}"] = Case(
                functools.partial(cached, backend=backend, **options), 0.0,
                2 * 8 * 32768 * 8 * 128 * bits / 8)

    # forward first: Mosaic GPU leaves nothing of a kernel that it has compiled before
    def order(item):
        return (" backward " in item[0], item[0])

    return dict(sorted((found | peers(target)).items(), key=order))


def bytes_of(args: Any) -> int:
    """Bytes of the arguments: each has to be read at least once."""
    return sum(int(np.prod(a.shape)) * jnp.dtype(a.dtype).itemsize
               for a in jax.tree.leaves(args))
