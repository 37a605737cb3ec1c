"""Rows of the tile tables that `python -m pallas_kernels.tune` fills."""

from __future__ import annotations

import itertools
from typing import Any, Iterator, NamedTuple, Sequence

from pallas_kernels import tables
from pallas_kernels.matrix.targets import Gpu, Tpu
from pallas_kernels.tune import exact as tune_exact, recurrent as tune_recurrent

WIDTHS = {"d128": 128, "d256": 256}
FAMILIES = (*tune_exact.ROWS, "linear", "delta", "scan", "memory")
SUMS = ("merge", "_sum")  # kernels that add up parts, whatever the tile
Tile = tuple[int, ...]


class Row(NamedTuple):
    """A row of the table: a kernel, the class of its widths, and what else it is of."""

    which: str
    label: str
    kind: str

    @property
    def width(self) -> int:
        """The width that is tried."""
        return WIDTHS[self.label]

    @property
    def recurrent(self) -> bool:
        """Whether it is of a recurrence."""
        return self.which.split("_")[0].split()[0] not in tune_exact.ROWS

    def place(self, backend: str) -> tuple[str, str]:
        """The row's name in the table, and the class of shapes in it."""
        kernel, *channels = self.which.split()
        name = kernel if backend == "tpu" else f"{backend}_{kernel}"
        known = backend in tables.PADDED
        padded = tables.padded(self.width, self.width, backend) if known else None
        return name, padded or " ".join([self.label, self.kind, *channels])

    def candidates(self, backend: str) -> Iterator[Tile]:
        """The numbers that are tried."""
        if self.recurrent:
            return tune_recurrent.candidates(backend, self.which)
        return tune_exact.candidates(backend, self.width, self.which, self.kind)

    def program(self, target: Tpu | Gpu, backend: str) -> Any:
        """The function that takes its tile from this row, its arguments, its trips."""
        if self.recurrent:
            return tune_recurrent.program(target, backend, self.which,
                                          tune_exact.LENGTH, self.width)
        return tune_exact.program(target, backend, self.which, self.width, self.kind)

    def reads(self, backend: str, kernel: str) -> bool:
        """Whether a kernel is one of the row's."""
        name = self.which
        if self.recurrent:
            name = tune_recurrent.read(name, backend)
        return name in kernel and not any(part in kernel for part in SUMS)


def rows(families: Sequence[str], backend: str) -> Iterator[Row]:
    """The rows of the table that are tuned, by the kernels that they are of."""
    for family, label in itertools.product(families, WIDTHS):
        if family in tune_exact.ROWS:
            for which in tune_exact.rows(family, backend):
                for kind in tune_exact.kinds(which, backend):
                    yield Row(which, label, kind)
        else:
            for which in tune_recurrent.rows(family, backend):
                yield Row(which, label, "f16")
