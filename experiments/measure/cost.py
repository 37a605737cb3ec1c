"""What a function costs: flops by walking its jaxpr, memory by compiling it.

XLA's own analysis counts the body of a loop once, whatever its length, so flops are
counted here: scan lengths, kernel grids and shards are multiplied, the dearest branch
of a conditional is taken, and a loop without a static length is an error.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import Any, Callable

import jax
import numpy as np

REDUCTIONS = ("reduce_sum", "reduce_max", "reduce_min", "argmax", "cumsum", "cummax",
              "reduce_window_sum", "reduce_window_max", "reduce_prod", "cumlogsumexp")
FREE = ("reshape", "broadcast_in_dim", "transpose", "squeeze", "slice", "concatenate",
        "convert_element_type", "iota", "copy", "pad", "gather", "dynamic_slice",
        "dynamic_update_slice", "stop_gradient", "rev", "all_gather", "axis_index")


def flops(f: Callable, *args: Any) -> float:
    """Floating point operations of f(*args); args may be ShapeDtypeStructs. A function
    under `jax.jit` is traced once for its flops and its memory."""
    return sum(work(_jitted(f).trace(*args).jaxpr.jaxpr).values())


def _jitted(f: Any) -> Any:
    return f if hasattr(f, "trace") else jax.jit(f)


def work(jaxpr: Any) -> Counter:
    """Operations of a program, of all devices: in matrix products ("matmul"), in each
    kernel by its name, those of its products apart ("NAME products"), and in the rest
    ("other")."""
    total: Counter[str] = Counter()
    for equation in jaxpr.eqns:
        total.update(_equation(equation))
    return total


def _equation(e: Any) -> Counter:
    name, p = e.primitive.name, e.params
    if name == "dot_general":
        (contract, _), _ = p["dimension_numbers"]
        inner = math.prod(e.invars[0].aval.shape[n] for n in contract)
        return Counter({"matmul": 2 * inner * _size(e.outvars[0])})
    if name == "scan":
        return _times(p["length"], work(p["jaxpr"].jaxpr))
    if name == "while":
        raise ValueError("a loop without a static length has no cost")
    if name == "cond":
        branches = [work(b.jaxpr) for b in p["branches"]]
        return max(branches, key=lambda c: sum(c.values()))
    if name == "pallas_call":
        each, kernel = work(p["jaxpr"]), _called(p)
        each[f"{kernel} products"] = each.pop("matmul", 0)
        each[kernel] = each.pop("other", 0)
        return _times(math.prod(p["grid_mapping"].grid), each)
    if name == "shard_map":
        return _times(p["mesh"].size, work(p["jaxpr"]))
    if name == "sort" or name == "top_k":
        n = e.invars[0].aval.shape[-1]
        return Counter({"other": _size(e.invars[0]) * max(math.log2(max(n, 2)), 1)})
    inner = [v for v in p.values() if hasattr(v, "jaxpr") or hasattr(v, "eqns")]
    if inner and name not in REDUCTIONS and not name.startswith("scatter"):
        return work(getattr(inner[0], "jaxpr", inner[0]))
    if name in FREE:
        return Counter()
    if name in REDUCTIONS:
        return Counter(other=_size(e.invars[0]))
    if name.startswith("scatter"):
        return Counter(other=_size(e.invars[2]))
    return Counter(other=sum(_size(v) for v in e.outvars))


def _times(n: int, count: Counter) -> Counter:
    return Counter({name: n * value for name, value in count.items()})


def _called(params: dict) -> str:
    """The name that a kernel was given."""
    return str(params.get("name") or params["name_and_src_info"]).split(" ")[0]


def _size(v: Any) -> int:
    return math.prod(v.aval.shape)


def memory(f: Callable, *args: Any) -> int:
    """Bytes that the compiled f(*args) needs beside its arguments and results."""
    found: Any = _jitted(f).lower(*args).compile().memory_analysis()
    return found.temp_size_in_bytes


def slope(costs: list[float]) -> float:
    """The exponent of T in costs at T, 2T and 4T; constants do not hide it."""
    one, two, four = costs
    if four - two <= 0 or two - one <= 0:
        return 0.0
    return float(np.log2((four - two) / (two - one)))
