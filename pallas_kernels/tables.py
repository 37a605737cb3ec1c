"""Tile tables: how large a kernel's tiles are, per device and class of shapes.

The numbers are data (`tiles.json`), written by `python -m pallas_kernels.tune`; here is
how a call finds its row. A device that has none takes the row of "default"; a GPU that
of its model in another make, or else that of "default gpu", whose tiles fit the smaller
shared memory of cards below an A100. In place of rows may stand the name of the device
whose they are.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import pathlib
from typing import Any, NamedTuple

import jax

TABLE = pathlib.Path(__file__).with_name("tiles.json")
MIB = 2**20


class Shape(NamedTuple):
    """What of a call decides the size of its tiles."""

    t: int
    s: int
    d: int
    v: int
    itemsize: int
    matrix: bool = False  # whether an operand [T,S] is cut into tiles too

    @property
    def label(self) -> str:
        """The class of shapes that one row of the table serves."""
        return f"{width(self.d, self.v)} {'f32' if self.itemsize == 4 else 'f16'}"


PADDED = {  # widths D, V with a row, of backends that pad
    "mosaic": ((64, 64), (128, 128), (192, 128), (256, 256)),
    "blackwell": ((64, 64), (128, 128), (192, 128)),
}


def padded(d: int, v: int, backend: str) -> str | None:
    """The class of shapes of Mosaic GPU kernels, which pad widths; None: too wide."""
    fits = (f"d{a} v{b}" for a, b in PADDED[backend] if d <= a and v <= b)
    return next(fits, None)


class Tile(NamedTuple):
    """Queries and keys of a tile; how: on TPU, how many keys pass by at once; on a GPU,
    warps of a program and stages of its loads; by Mosaic GPU, stages, and of the
    backward pass also keys and stages of the kernel for dq."""

    rows: int
    columns: int
    how: tuple[int, ...]


def width(d: int, v: int) -> str:
    """The class of widths."""
    return next(f"d{n}" for n in (128, 192, 256) if max(d, v) <= n)


def entry(table: dict[str, Any], label: str) -> list[int]:
    """The numbers of a class of shapes; widths without their own take the widest's."""
    return table.get(label) or table[label.replace("d192", "d256")]


def cores() -> int:
    """Multiprocessors of the GPU that is compiled for; an H200's if nobody knows."""
    mesh = jax.sharding.get_abstract_mesh()
    device = getattr(mesh, "abstract_device", None)
    many = getattr(device, "num_cores", None)
    if device is None and jax.default_backend() == "gpu":
        many = getattr(jax.devices()[0], "core_count", None)
    return many or 132


def device_kind() -> str:
    """The device that is compiled for: the abstract mesh's, else the default."""
    mesh = jax.sharding.get_abstract_mesh()
    device = getattr(mesh, "abstract_device", None)
    return getattr(device, "device_kind", None) or jax.devices()[0].device_kind


def capability() -> str | None:
    """What this machine's GPU is: of NVIDIA its compute capability, as "9.0"; None
    where nobody knows, as of one that is compiled for and not there."""
    mesh = jax.sharding.get_abstract_mesh()
    if getattr(mesh, "abstract_device", None) or jax.default_backend() != "gpu":
        return None
    return getattr(jax.devices()[0], "compute_capability", None)


def text(table: dict[str, Any]) -> str:
    """The table as it is kept: a device a block, a kernel a line."""
    blocks = []
    for device in sorted(table):
        if isinstance(table[device], str):
            blocks.append(f" {json.dumps(device)}: {json.dumps(table[device])}")
            continue
        own = table[device].items()
        lines = [f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in own]
        blocks.append(f" {json.dumps(device)}: {{\n" + ",\n".join(lines) + "\n }")
    return "{\n" + ",\n".join(blocks) + "\n}\n"


@functools.cache
def _table() -> dict[str, Any]:
    return json.loads(TABLE.read_text())


def row(device: str, backend: str = "tpu") -> dict[str, Any]:
    """The table of a device."""
    table = _table()
    other = _own(table, "default" if backend == "tpu" else "default gpu")
    name = device if device in table else next(
        (name for name in table if _model(name) == _model(device)), None)
    own = other if name is None else _own(table, name)
    return own if ("vmem_mib" in own) == (backend == "tpu") else other


def _own(table: dict[str, Any], name: str) -> dict[str, Any]:
    """A device's rows, or those of the device that it takes after."""
    found = table[name]
    return _own(table, found) if isinstance(found, str) else found


@contextlib.contextmanager
def trial(device: str, name: str, label: str, numbers: Any, backend: str = "tpu"):
    """Inside, calls find other numbers in the table."""
    table = _table()
    before, own = table.get(device), copy.deepcopy(row(device, backend))
    own[name][label] = numbers
    table[device] = own
    try:
        yield
    finally:
        del table[device]
        if before is not None:
            table[device] = before


def _model(device: str) -> str:
    """NVIDIA A100 for NVIDIA A100-SXM4-80GB; a device of another maker is its own."""
    words = device.replace("-", " ").split()
    return " ".join(words[:2]) if words[:1] == ["NVIDIA"] else device


def vmem(device: str, backend: str = "tpu") -> int:
    """Bytes of fast memory that one kernel may use; 0 where there is no such limit."""
    return row(device, backend).get("vmem_mib", 0) * MIB


def tile(device: str, kernel: str, shape: Shape, asked: tuple | None = None,
         backend: str = "tpu") -> Tile:
    """The tile of a call: `asked` for (queries, keys and perhaps how), or the table's
    row for its class of shapes, cut down to the tokens that are there."""
    if (backend, kernel) == ("blackwell", "flash_backward"):
        asked = None  # its keys are the lanes of tensor memory
    name = kernel if backend == "tpu" else f"{backend}_{kernel}"
    table = row(device, backend)[name]
    if backend in PADDED:
        # what is asked for replaces the first numbers of the row
        first, label = list(asked or ()), padded(shape.d, shape.v, backend)
        rows, columns, *how = first + table[label][len(first):]
        return Tile(rows, columns, tuple(how))
    rows, columns, *how = entry(table, shape.label)
    if backend != "tpu":
        if asked is not None:
            rows, columns, *how = list(asked) + how[len(asked) - 2:]
        least = lambda n: max(1 << (n - 1).bit_length(), 16)
        return Tile(min(rows, least(shape.t)), min(columns, least(shape.s)), tuple(how))
    if asked is not None:
        rows, columns, *how = (-(-n // 8) * 8 for n in asked)
        return Tile(rows, columns, (how[0] if how else columns,))
    chunk = how[0]
    if shape.matrix:
        most = MATRIX if vmem(device) >= 32 * MIB else MATRIX // 2
        rows, columns = min(rows, most), min(columns, most)
    rows, columns = _even(shape.t, rows, chunk), _even(shape.s, columns, chunk)
    return Tile(rows, columns, (chunk if columns % chunk == 0 else columns,))


def chunks(device: str, kernel: str, shape: Shape, channels: bool = False,
           asked: tuple | None = None, backend: str = "tpu") -> tuple[int, ...]:
    """The numbers of a recurrence in chunks. On TPU: tokens of a grid step, and of a
    chunk; on a GPU: tokens of a chunk; value channels of a program, warps, stages; both
    widths of a tile of the pass over states, warps, stages; key channels at a time, and
    of the program for their gradients warps, stages. Decays by channel have a row of
    their own; `asked` replaces the first numbers."""
    name = kernel if backend == "tpu" else f"{backend}_{kernel}"
    table = row(device, backend)[name]
    label = shape.label + (" channels" if channels else "")
    numbers = entry(table, label)
    first = list(asked or ())
    return tuple(first + numbers[len(first):])


TILES = 10 * MIB  # what the tiles of the backward pass may need
MATRIX = 1024  # a tile of an operand [T,S] is that large at most
LANES = 128  # of a register


def _even(n: int, size: int, step: int) -> int:
    """The size of as many tiles as `size` would cut n tokens into, all alike: a
    multiple of `step`, or of a register's lanes where one tile is enough."""
    count = -(-n // size)
    step = LANES if count == 1 else step
    return -(-n // (count * step)) * step


def number(device: str, kernel: str, shape: Shape, backend: str = "tpu") -> int:
    """The one number of a kernel that has no more: of the delta rule on TPU the chunks
    that a grid step takes, of the scan the tokens of a chunk."""
    name = kernel if backend == "tpu" else f"{backend}_{kernel}"
    table = row(device, backend)[name]
    return table.get(shape.label) or table[shape.label.replace("d192", "d256")]


def holds_queries(budget: int, shape: tuple[int, ...], groups: int, itemsize: int):
    """Whether dq of a key head's queries, float32 and as it is written, leaves room."""
    _, _, t, d = shape
    room = min(budget // 2, budget - TILES)
    return groups * t * max(d, 128) * (4 + 2 * itemsize) <= room


def slots(size: int, heads: int) -> int:
    """How many slots of a cache of `size` one decode step takes: about 4096 columns
    over all key heads, in a size that divides the cache where there is one."""
    most = max(4096 // heads // 128, 1) * 128
    if size <= most:
        return size
    return next((n for n in range(most, 127, -128) if size % n == 0), most)
