"""The table of `experiments.scale`: a column a program, and its numbers by name."""

from __future__ import annotations

from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from experiments.measure.roofline import Roofline
from experiments.measure.topology import Pod


class Row(NamedTuple):
    """A column of the table. took: seconds of tracing and compiling; wanted: operations
    of a chip's products, if its work is even and none is in vain, 0 if not known."""

    roofline: Roofline
    took: float
    wanted: float

    @property
    def ideal(self) -> float | None:
        """The time of the products that are wanted, at the rate of those that are made,
        over that of the step."""
        one = self.roofline
        if not self.wanted or not one.step or one.compute is None:
            return None
        return self.wanted / one.products * one.compute / one.step


def metrics(row: Row) -> dict[str, Any]:
    """The numbers of a roofline."""
    one = row.roofline
    found: dict[str, Any] = {"bytes": one.memory}
    for kind, (count, size) in sorted(one.moved.items()):
        found |= {f"{kind}s": count, f"{kind}_bytes": size}
    found["teraflops"] = float(f"{one.products / 1e12:.6g}")
    times = {"compute": one.compute, "hidden": one.hidden, "open": one.open,
             "step": one.step}
    found |= {f"{n}_ms": round(t * 1e3, 3) for n, t in times.items() if t is not None}
    if one.waiting is not None:
        found["waiting"] = round(one.waiting, 4)
    if row.ideal is not None:
        found["ideal"] = round(row.ideal, 4)
    found["compile_s"] = round(row.took, 1)
    return found


def lines(rows: dict[str, Row]) -> dict[str, list[str]]:
    """The table by lines: a title, and a cell for each variant."""
    kinds = sorted({kind for row in rows.values() for kind in row.roofline.moved})
    found: dict[str, list[str]] = {"memory, GB": []}
    found |= {f"{kind}, MB (times)": [] for kind in kinds}
    found |= {n: [] for n in ("matrix products, Tflop", "computing, ms",
                              "moving, hidden, ms", "moving, waited for, ms",
                              "step, ms", "of it waiting")}
    if any(row.wanted for row in rows.values()):
        found["of the ideal"] = []
    found["compiled in, s"] = []
    for row in rows.values():
        one = row.roofline
        cells = [f"{one.memory / 1e9:,.2f}"]
        for kind in kinds:
            count, size = one.moved.get(kind, (0, 0))
            cells.append(f"{size / 1e6:,.1f} ({count})" if count else "-")
        cells += [f"{one.products / 1e12:,.3f}", _ms(one.compute), _ms(one.hidden),
                  _ms(one.open), _ms(one.step), _share(one.waiting)]
        cells += [_share(row.ideal)] * ("of the ideal" in found) + [f"{row.took:.0f}"]
        for line, cell in zip(found.values(), cells, strict=True):
            line.append(cell)
    return found


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:,.2f}"


def _share(x: float | None) -> str:
    return "-" if x is None else f"{x:.1%}"


def show(rows: dict[str, Row], chips: Pod) -> None:
    """The table, a column a variant."""
    table = Table(box=None, title=f"a chip of {chips.name}, a step")
    table.add_column("")
    for name in rows:
        table.add_column(name, justify="right")
    for title, line in lines(rows).items():
        table.add_row(title, *line)
    Console(width=200).print(table)


def markdown(rows: dict[str, Row]) -> str:
    """The same table to paste."""
    head = ["| | " + " | ".join(rows) + " |", "|---" + "|--:" * len(rows) + "|"]
    body = (f"| {title} | {' | '.join(line)} |" for title, line in lines(rows).items())
    return "\n".join([*head, *body])
