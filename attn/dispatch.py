"""Dispatch: which implementation of an operation runs here."""

from __future__ import annotations

from typing import Any, Callable

import jax

from pallas_kernels import Refused

IMPLEMENTATIONS = (None, "xla", "pallas")


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


def pick(
    implementation: str | None,
    *,
    xla: Callable[[], Any] | None = None,
    gpu: Callable[[], Any] | None = None,
    tpu: Callable[[], Any] | None = None,
) -> Any:
    """Runs the best implementation: the platform's kernel, else XLA.

    implementation: None falls through a kernel's refusal to the next; "pallas" and
    "xla" run that one or raise NotImplementedError with the reason. On a CPU a kernel
    that is asked for by name runs interpreted.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"implementation={implementation!r}: expected one of {IMPLEMENTATIONS}"
        )
    where = platform()
    kernel = {"gpu": gpu, "tpu": tpu, "cpu": tpu or gpu}.get(where)
    if implementation == "pallas":
        if kernel is None:
            raise NotImplementedError(
                f"implementation='pallas': there is no kernel for this on {where} yet"
            )
        return kernel()
    if implementation is None and kernel is not None and where != "cpu":
        try:
            return kernel()
        except Refused:
            pass
    if xla is None:
        raise NotImplementedError("implementation='xla': there is no XLA form of this")
    return xla()
