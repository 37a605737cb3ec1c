"""Refusals: what no kernel of a kind takes, said before anything is compiled."""

from __future__ import annotations

from typing import Any, Callable

import jax
import jax.numpy as jnp

from pallas_kernels import Refused, tables

DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32)
WIDEST = 256
CARDS = {  # what runs kernels by Mosaic GPU; GH200 has H200 in its name
    "mosaic": ("Hopper", ("H100", "H200", "H800", "H20")),
    "blackwell": ("Blackwell", ("B100", "B200")),
}
ELEMENTWISE = set(
    "abs add and broadcast_in_dim clamp convert_element_type div eq exp exp2 ge gt "
    "integer_pow le log logistic lt max min mul ne neg not or rem rsqrt select_n "
    "shift_left shift_right_arithmetic shift_right_logical sign square sub tanh "
    "xor".split()
)  # what Mosaic GPU compiles inside a kernel, in every jax from 0.10.2
OLDEST = (8, 0)  # compute capability that Triton's kernels are compiled for


def check_device(backend: str, arrays: Any, interpret: Any) -> None:
    """Raises Refused for what does not compile on the device that is compiled for.
    arrays: the first of them has the type that is computed with."""
    if any(jax.typeof(a).manual_axis_type.varying for a in jax.tree.leaves(arrays)):
        raise Refused("inside a shard_map that checks what varies: kernels do not say "
                      "it, expected check_vma=False")
    if interpret:
        return
    if backend == "tpu" and arrays[0].dtype == jnp.float16:
        raise Refused("float16: TPUs know bfloat16 and float32")
    if backend == "triton" and (known := tables.capability()) is not None:
        number = tuple(int(n) for n in known.split(".")) if known[0].isdigit() else ()
        if number < OLDEST:
            least = ".".join(map(str, OLDEST))
            raise Refused(f"device {tables.device_kind()} ({known}): expected NVIDIA's "
                          f"of compute capability {least} or more")


def check_mosaic(backend: str, q: jax.Array, v: jax.Array, interpret: Any) -> None:
    """Raises Refused for what the kernels by Mosaic GPU do not take."""
    (card, names), kind = CARDS[backend], tables.device_kind()
    if not interpret and not any(name in kind for name in names):
        raise Refused(f"device {kind}: expected one of {', '.join(names)}")
    if q.shape[0] >= 2**16:
        raise Refused(f"B={q.shape[0]}: at most {2**16 - 1} rows on {card}")
    if q.dtype == jnp.float32:
        raise Refused(f"q is float32: {card}'s matrix units take bfloat16 and float16")
    if tables.padded(q.shape[3], v.shape[3], backend) is None:
        raise Refused(f"D={q.shape[3]}, V={v.shape[3]}: too wide for a {card} kernel")


def check_elementwise(name: str, f: Callable | None, backend: str = "tpu") -> None:
    """Raises Refused if f(head, i, j) reads an array: a kernel cannot carry one; or,
    by Mosaic GPU, if it has an operation that does not compile there."""
    if f is None:
        return
    place = jax.ShapeDtypeStruct((), jnp.int32)
    traced = jax.make_jaxpr(f)(place, place, place)
    if any(getattr(a, "ndim", 0) for a in traced.consts):
        raise Refused(f"{name}={f}: it reads a table, expected arithmetic on positions")
    if backend in CARDS and (other := _operations(traced.jaxpr) - ELEMENTWISE):
        card = CARDS[backend][0]
        raise Refused(f"{name}={f}: no {', '.join(sorted(other))} on {card}")


def _operations(jaxpr: Any) -> set[str]:
    """The names of the operations in a program and in those that it calls."""
    found: set[str] = set()
    for eqn in jaxpr.eqns:
        called = eqn.primitive.name in ("jit", "pjit")
        inner = eqn.params["jaxpr"] if called else None
        found |= {eqn.primitive.name} if inner is None else _operations(inner.jaxpr)
    return found


def check_channels(backend: str) -> None:
    """Raises Refused where the delta rule has no kernel for decays of channels: the
    products of a chunk's levels ask for more tensor memory than a Blackwell has."""
    kind = tables.device_kind()
    if backend == "triton" and any(n in kind for n in ("B100", "B200", "B300")):
        raise Refused(f"a decay of each key channel on a {kind}: there is no kernel "
                      "yet, expected one a head, or implementation='xla'")
