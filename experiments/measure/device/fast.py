"""Fast: a kernel beside its peers, one after the other in every round of one process.

A row has for each contender its milliseconds (median, least and most of the rounds),
what they come to (TFLOP/s, or GB/s) and the share of the ceiling that the same process
measured, and how long it took to compile. `ratio` is the median over the rounds of the
best peer's time over ours in the same round, 2 is twice as fast; `least` the smallest
of these, below which the median of 7 rounds lies in one of 128 runs.
"""

from __future__ import annotations

from typing import Any, Callable, Iterable, NamedTuple

import jax
import numpy as np

from experiments.measure.device.case import Bench, Row, Wrong, structs, timed

OURS = "ours"


class Contender(NamedTuple):
    """make() -> a function of the row's arrays; None where nothing compiles: it makes
    the call itself. Peers may refuse, ours may not."""

    name: str
    f: Callable[..., Any]

    @property
    def peer(self) -> bool:
        """Whether it is not ours."""
        return not self.name.startswith(OURS)


def race(bench: Bench, contenders: Iterable[Contender], args: Any, *,
         flops: float = 0.0, moved: float = 0.0, against: str | None = None) -> Row:
    """The row of contenders that all take `args`; against: which of them ours is
    compared with, None for the fastest peer."""
    calls: dict[str, Callable] = {}
    row: Row = {"contenders": {}, "absent": {}}
    for one in contenders:
        try:
            program, seconds = bench.compiled(one.f, *structs(args))
            with bench.alone():
                finite(one.name, program(*args))
        except Wrong:
            raise
        except Exception as error:  # a peer's refusal may be of any kind
            if not one.peer:
                raise
            row["absent"][one.name] = said(error)
            continue
        calls[one.name] = lambda program=program: program(*args)
        row["contenders"][one.name] = {"compile_s": round(seconds, 2)}
    row["ceilings"] = product, copy = bench.ceilings
    with bench.alone():
        spent = timed(calls)
    for name, own in row["contenders"].items():
        own |= figures(spent[name], flops, moved, product, copy)
    if against is not None:
        ours = next(name for name in spent if name.startswith(OURS))
        return row | compared({ours: spent[ours], against: spent[against]})
    return row | compared(spent)


def figures(spent: list[float], flops: float, moved: float, product: float,
            copy: float) -> dict[str, float]:
    """Milliseconds of the rounds, and what they come to."""
    median = float(np.median(spent))
    found = {"ms": median * 1e3, "lo": min(spent) * 1e3, "hi": max(spent) * 1e3}
    if flops:
        found |= {"tflops": flops / median / 1e12, "share": flops / median / product}
    elif moved:
        found |= {"gbs": moved / median / 1e9, "share": moved / median / copy}
    return {name: float(f"{value:.5g}") for name, value in found.items()}


def compared(spent: dict[str, list[float]]) -> dict[str, Any]:
    """Which of ours and which peer were the fastest, and how they compare."""
    best: dict[bool, str] = {}
    for name, times in spent.items():
        peer = not name.startswith(OURS)
        if peer not in best or np.median(times) < np.median(spent[best[peer]]):
            best[peer] = name
    if len(best) < 2:
        return {}
    each = np.asarray(spent[best[True]]) / np.asarray(spent[best[False]])
    return {"ours": best[False], "peer": best[True],
            "ratio": round(float(np.median(each)), 4),
            "least": round(float(each.min()), 4)}


def with_gradients(f: Callable, inputs: int) -> Callable:
    """(*args, do) -> the gradients of f's result in its first arguments."""
    def both(*args):
        *given, do = args
        fixed = given[inputs:]
        return jax.vjp(lambda *a: f(*a, *fixed), *given[:inputs])[1](do)

    return both


def finite(name: str, found: Any) -> None:
    """Raises Wrong if a result of ours is not."""
    for a in jax.tree.leaves(found):
        if name.startswith(OURS) and not bool(jax.numpy.isfinite(a).all()):
            raise Wrong(f"{name}: a result is not finite")


def said(error: BaseException) -> str:
    """The first line of an error."""
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    return f"{type(error).__name__}: {text}"[:240]
