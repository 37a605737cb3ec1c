"""What `python -m pallas_kernels.tune` tries for the recurrent kernels.

A candidate is the numbers of one row of the tile table, in the order in which the
kernel's entry function reads them; it is tried in a program that has the row's kernels.
A row is named as in the table, "linear_forward channels" and "delta_keys_channels" for
decays by channel.
"""

from __future__ import annotations

import itertools
from typing import Any, Iterator

from pallas_kernels.matrix.cases_delta import rule
from pallas_kernels.matrix.cases_memory import learned
from pallas_kernels.matrix.cases_recurrent import prefixes, recurrence
from pallas_kernels.matrix.targets import Gpu, Tpu

LINEAR = tuple(f"linear_{way}{decay}" for way in ("forward", "backward")
               for decay in ("", " channels"))
# the delta rule's kernels on GPU, by the row that each has
DELTA = {
    "delta_forward": "delta_forward", "delta_inside": "delta_inside",
    "delta_backward": "delta_backward_states",
    "delta_values": "delta_backward_values", "delta_keys": "delta_backward_keys",
    "delta_inside_channels": "delta_inside",
    "delta_keys_channels": "delta_backward_keys",
}
WARPS = 4, 8


def rows(family: str, backend: str) -> tuple[str, ...]:
    """The rows of a family of kernels; none where it has no such kernels."""
    if backend == "mosaic":
        return ()
    if family == "linear":
        return LINEAR
    if (family, backend) == ("memory", "tpu"):
        return ()
    return tuple(DELTA) if (family, backend) == ("delta", "triton") else (family,)


def read(which: str, backend: str) -> str:
    """What the names of a row's kernels hold."""
    if which.startswith("linear"):
        return "linear" if backend == "triton" else which.split()[0]
    return DELTA.get(which, which)


def candidates(backend: str, which: str) -> Iterator[tuple[int, ...]]:
    """The numbers that are tried for a row."""
    if backend == "tpu":
        if which.startswith("linear"):
            yield from itertools.product((256, 512, 1024, 2048), (64, 128))
        else:
            sizes = (1, 2, 4, 8) if which == "delta" else (128, 256, 512)
            yield from ((n,) for n in sizes)
    elif which.startswith("linear"):
        for c, values, warps, keys in itertools.product(
                (32, 64), (32, 64), WARPS, (16, 32, 64)):
            yield c, values, warps, 1, 64, 4, 3, keys, warps, 1
    elif which == "scan":
        yield from ((n,) for n in (16, 32, 64))
    elif which == "memory":
        yield from itertools.product((16, 32, 64), (2, *WARPS), (1,))
    elif which in ("delta_forward", "delta_backward"):
        yield from itertools.product((64,), (16, 32, 64), WARPS, (1, 2))
    else:
        columns = (64,) if which.startswith("delta_inside") else (32, 64)
        rows = (16, 32, 64) if which.endswith("channels") else (32, 64)
        yield from itertools.product(rows, columns, WARPS, (1,))


def program(target: Tpu | Gpu, backend: str, which: str, t: int, width: int) -> Any:
    """The function of a row, its arguments and its trips; the numbers are the table's.
    """
    call: dict[str, Any] = {"backend": backend, "t": t}
    if which.startswith("linear"):
        return recurrence(target, d=width, backward="backward" in which, **call,
                          decay="channel" if "channels" in which else "token")
    if which == "scan":
        return prefixes(target, v=width, backward=True, **call)
    if which == "memory":
        return learned(target, d=width, c=16, h=4, backward=True, **call)
    ahead = which.startswith(("delta_inside", "delta_forward"))
    return rule(target, d=width, backward=not ahead,
                channels=which.endswith("channels"), **call)
