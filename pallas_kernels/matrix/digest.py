"""The digest of a case: a hash of all that its compiler is given.

It is taken of the program as jax traces it for the target (`content.py` says how):
operations, shapes, types, constants, and the kernels' own programs, grids, blocks and
compiler parameters. Beside it stand the target's description, the layout of arguments
and results, the compilers' versions, and the counts that metrics are made of. A moved
file, a new comment or another name of a Python function or variable changes none; a
kernel's own name does, since its metrics are found by it.

What a digest proves: the same compilers are given the same program for the same target,
so that what was read off their work holds still, as they do the same work every time.
What it does not prove: that the metrics would be read off in the same way (after an
edit of this package's readers, `--all`), or that jax, at one version, lowers a program
in one way only. Tracing takes a tenth of a second where compiling takes seconds.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
from typing import Any

import jax

from pallas_kernels import Refused
from pallas_kernels.matrix.case import Case
from pallas_kernels.matrix.content import Walk, short
from pallas_kernels.matrix.targets import abstract


def digest(target: Any, case: Case) -> str | None:
    """The digest of a case on a target, of a refusal as of a program; None if it cannot
    be traced, of which the compiler's error tells more."""
    try:
        content = traced(target, case)
    except Refused as error:
        content = "refused", str(error)
    except Exception:
        return None
    words = tuple(Walk()(part) for part in content)
    return short((versions(target.platform), described(target), words))


@functools.cache
def versions(platform: str) -> tuple[tuple[str, str], ...]:
    """The versions of the compilers of a platform, as far as they are installed."""
    names = {"tpu": ("jax", "jaxlib", "libtpu"),
             "cuda": ("jax", "jaxlib", "jax-cuda13-plugin", "nvidia-cuda-nvcc")}
    there = {d.name for d in importlib.metadata.distributions()}
    return tuple((name, importlib.metadata.version(name) if name in there else "")
                 for name in names[platform])


def described(target: Any) -> tuple:
    """What is known of a target, and what its compiler is told."""
    fields = tuple((field.name, getattr(target, field.name))
                   for field in dataclasses.fields(target)
                   if field.name not in ("backends", "named"))
    return fields, target.layout, tuple(sorted(target.flags("DUMPS").items()))


def traced(target: Any, case: Case) -> tuple:
    """A case's program for a target, and what its metrics count."""
    f, args, trips = case.build(target)
    with jax.sharding.use_abstract_mesh(abstract(target)):
        program = jax.jit(f).trace(*args).jaxpr
    return program, case.flops, case.moved, case.whole, trips
