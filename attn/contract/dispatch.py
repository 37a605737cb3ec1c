"""Dispatch: which implementation of an operation runs here."""

from __future__ import annotations

import sys
from typing import Any, Callable, Sequence

import jax

from pallas_kernels import Refused

IMPLEMENTATIONS = (None, "xla", "pallas")
DENSE = "dense"  # exact attention in one matrix, which has derivatives of every kind
INTERPRETED = "tpu"  # whose kernels a CPU interprets, where there is a choice


def platform() -> str:
    """The platform that is being compiled for: the abstract mesh's device if there is
    one, so that programs compile for hardware that is not there, else the default."""
    mesh = jax.sharding.get_abstract_mesh()
    device = getattr(mesh, "abstract_device", None)
    name = getattr(device, "platform", None) or jax.default_backend()
    return "gpu" if name in ("cuda", "rocm") else name


def interpreted() -> bool:
    """Whether kernels have to be interpreted: what is compiled for is a CPU."""
    return platform() == "cpu"


def makes_parameters() -> bool:
    """Whether a linen module is making its parameters: what it computes meanwhile gives
    them their shapes and is thrown away. No kernel runs for that; where arrays are
    known while a program is traced (`jax.ensure_compile_time_eval`), none could."""
    linen = sys.modules.get("flax.linen.module")  # not imported: no module is made
    stack = linen._context.module_stack if linen is not None else ()  # no public way
    module: Any = stack[-1] if stack else None
    return getattr(module, "scope", None) is not None and module.is_initializing()


Kernels = Callable[[], Any] | Sequence[Callable[[], Any]] | None


def pick(
    implementation: str | None,
    *,
    xla: Callable[[], Any] | None = None,
    gpu: Kernels = None,
    tpu: Kernels = None,
    dense: Callable[[], Any] | None = None,
) -> Any:
    """Runs the best implementation: the platform's kernel, else XLA.

    gpu, tpu: a kernel, or several, of which the first that does not refuse runs.
    implementation: None falls through a kernel's refusal to the next; "pallas" and
    "xla" run that one or raise NotImplementedError with the reason. On a CPU a kernel
    that is asked for by name runs interpreted. dense: what "dense" runs, of those that
    have it.
    """
    if implementation == DENSE:
        if dense is None:
            raise NotImplementedError(
                "implementation='dense': there is no such form of this, expected "
                f"one of {IMPLEMENTATIONS}"
            )
        return dense()
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"implementation={implementation!r}: expected one of {IMPLEMENTATIONS}"
        )
    where = platform()
    kinds = {"gpu": gpu, "tpu": tpu}
    # a CPU interprets the TPU's kernel, if there is one
    found = (kinds[INTERPRETED] or tpu or gpu) if where == "cpu" else kinds.get(where)
    kernels = () if found is None else (found,) if callable(found) else tuple(found)
    if implementation == "pallas" and not kernels:
        raise NotImplementedError(
            f"implementation='pallas': there is no kernel for this on {where} yet"
        )
    if xla is not None and makes_parameters():
        return xla()
    reasons = []
    # on a CPU by name only: interpreted kernels are slow
    if implementation == "pallas" or (implementation is None and where != "cpu"):
        for kernel in kernels:
            try:
                return kernel()
            except Refused as reason:
                reasons.append(str(reason))
    if implementation == "pallas":
        raise Refused("; ".join(dict.fromkeys(reasons)))  # each reason once
    if xla is None:
        raise NotImplementedError("implementation='xla': there is no XLA form of this")
    return xla()
