"""Peers in torch, in processes of their own: scaled_dot_product_attention by its
FlashAttention-2 and cuDNN, and flash-linear-attention's recurrences, on the shapes of
ours. They have the same ceilings, measured in their process, and no ratio: that is of
two processes."""

from __future__ import annotations

import functools
import time
from typing import Any, Callable, Iterator

from experiments.measure.device import exact_fast, recurrent
from experiments.measure.device.case import ROUNDS, WARM, Bench, Case, Row
from experiments.measure.device.fast import figures
from experiments.measure.device.place import Place, installed

SECONDS = 0.05  # how long a round lasts at least
KINDS = {"flash": "FLASH_ATTENTION", "cuDNN": "CUDNN_ATTENTION"}


def cases(place: Place) -> Iterator[Case]:
    """Those that are installed."""
    if place.platform != "gpu" or not installed("torch"):
        return
    for n, (name, shape) in enumerate(exact_fast.SPEED.items()):
        if "window" in shape or "k" in shape:
            continue
        for back in (False, True):
            way = "both" if back else "forward"
            for kind in KINDS:
                yield Case(f"peer torch {kind} {way} {name}",
                           functools.partial(_sdpa, kind, back, shape),
                           tier=1 if n < 4 else 2, group="torch")
    if not installed("fla"):
        return
    for name, shape in recurrent.FAST.items():
        if name.startswith(("linear none", "scan")):
            continue
        for back in (False, True):
            way = "both" if back else "forward"
            yield Case(f"peer fla {way} {name}",
                       functools.partial(_fla, name.partition(" ")[0], back, shape),
                       tier=1 if shape["t"] == 8192 else 2, group="torch")


def _sdpa(kind: str, back: bool, shape: dict, bench: Bench) -> Row:
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    own = {"b": 1, "t": 4096, "h": 16, "d": 128, "causal": True} | shape
    b, t, h, d = (own[n] for n in ("b", "t", "h", "d"))
    args = [_normal(b, h, t, width, grad=back) for width in (d, d, own.get("v", d))]
    do = _normal(b, h, t, own.get("v", d))

    def forward():
        with sdpa_kernel(getattr(SDPBackend, KINDS[kind])):
            return torch.nn.functional.scaled_dot_product_attention(
                *args, is_causal=own["causal"])

    return _timed(bench, f"torch {kind}", forward, args if back else [], do,
                  flops=exact_fast.flops(back, **shape))


def _fla(kernel: str, back: bool, shape: dict, bench: Bench) -> Row:
    import torch

    own = {"h": 16, "d": 128, "decay": "token"} | shape
    t, h, d, decay = (own[n] for n in ("t", "h", "d", "decay"))
    k = own.get("k") or h
    unit = functools.partial(torch.nn.functional.normalize, dim=-1)
    q, key = (unit(_normal(1, t, k, d)).requires_grad_(back) for _ in range(2))
    v = _normal(1, t, h, d, grad=back)

    def rate(*more: int) -> Any:
        x = torch.nn.functional.logsigmoid(
            torch.randn(1, t, h, *more, device="cuda") + 3)
        return x.requires_grad_(back)

    args = [q, key, v]
    if kernel == "delta":
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule as f

        beta = torch.rand(1, t, h, device="cuda").requires_grad_(back)
        args += [rate(), beta]
    elif decay == "channel":
        from fla.ops.gla import chunk_gla as f

        args.append(rate(d))
    elif decay == "token":
        from fla.ops.simple_gla import chunk_simple_gla as f

        args.append(rate())
    else:
        from fla.ops.retention import chunk_retention as f
    moved = sum(a.numel() * a.element_size() for a in args)
    return _timed(bench, "fla", lambda: f(*args)[0], args if back else [],
                  _normal(1, t, h, d), moved=moved)


def _normal(*shape: int, grad: bool = False) -> Any:
    import torch

    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16, requires_grad=grad)


def _timed(bench: Bench, name: str, forward: Callable, args: list, do: Any,
           **work: float) -> Row:
    """The row of a call, with the gradients of `args` if there are any."""
    import torch

    def call():
        if args:
            torch.autograd.grad(forward(), args, do)
        else:
            with torch.no_grad():
                forward()

    def seconds(times: int) -> float:
        torch.cuda.synchronize()
        clock = time.perf_counter()
        for _ in range(times):
            call()
        torch.cuda.synchronize()
        return (time.perf_counter() - clock) / times

    clock = time.perf_counter()
    with bench.alone():
        seconds(1)  # Triton's kernels compile, and are tuned, at the first call
    compiled = time.perf_counter() - clock
    product, copy = bench.ceilings
    with bench.alone():
        times = max(3, round(SECONDS / max(seconds(WARM), 1e-6)))
        spent = [seconds(times) for _ in range(ROUNDS)]
    told = {"flops": 0.0, "moved": 0.0} | work
    own = figures(spent, told["flops"], told["moved"], product, copy)
    return {"ceilings": (product, copy),
            "contenders": {name: own | {"compile_s": round(compiled, 2)}}}
