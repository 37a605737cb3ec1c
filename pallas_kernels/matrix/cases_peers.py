"""Cases of the best peers, on the shape that ours are compared on."""

from __future__ import annotations

import functools
import importlib.util

import jax

from pallas_kernels.matrix.case import Case, TripCounts, struct, with_gradients
from pallas_kernels.matrix.cases_flash import Causal, products, work
from pallas_kernels.schedule import Tiling, block_mask

PEER = "causal T8192 D128 H16"
SPLASH = ((1024, 1024, 1024), (1024, 1024, 512), (2048, 2048, 512))  # the best of many


def splash_attention(target, *, backward, tile, t=8192, d=128, h=16):
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
    tiles = int((block_mask(Causal(), Tiling(t, t, q, kv, 0)) != 0).sum()) * h
    one = TripCounts((tiles,), h * (t // q), h * (t // q) * (t // kv))

    def done(name):
        return one._replace(flops=products(tiles * q * kv, d, d, name))

    trips = {"splash_mha_fwd": done("flash_forward")}
    if not backward:
        return kernel, (array,) * 3, trips
    return (with_gradients(kernel), ((array,) * 3, array),
            trips | {"splash_mha_dkv": done("flash_backward")})


def tokamax_attention(target, *, backward, backend, t=8192, d=128, h=16):
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


def peers(target) -> dict[str, Case]:
    """The best peers on the shape that ours are compared on; tokamax if installed."""
    found: dict[str, Case] = {}
    there = importlib.util.find_spec("tokamax") is not None
    for way in ("forward", "backward"):
        back = way == "backward"

        def add(name, f, **kw):
            found[f"peer {way} {name} {PEER}"] = Case(
                functools.partial(f, backward=back, **kw),
                work(8192, 128, h=16, backward=back), peer=True)

        if target.platform == "tpu":
            for tile in SPLASH:
                add(f"splash {'x'.join(map(str, tile))}", splash_attention, tile=tile)
        if there:
            for backend in ("mosaic", "triton")[:1 + (target.platform != "tpu")]:
                add(f"tokamax {backend}", tokamax_attention, backend=backend)
    return found
