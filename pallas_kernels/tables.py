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

from pallas_kernels import tiles

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


def width(d: int, v: int) -> str:
    """The class of widths."""
    return next(f"d{n}" for n in (128, 192, 256) if max(d, v) <= n)


def read(device: str, kernel: str, label: str, backend: str = "tpu") -> Any:
    """What the table says of a kernel for a class of shapes, one of `tiles`; widths
    without their own row take the widest's."""
    name = kernel if backend == "tpu" else f"{backend}_{kernel}"
    table = row(device, backend)[name]
    if label not in table and backend not in PADDED:
        label = label.replace("d192", "d256")
    return tiles.kind(name)(**table[label])


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
    """The table as it is kept: a device a block, a kernel a block in it, a line for
    each class of shapes."""
    blocks = []
    for device in sorted(table):
        own = table[device]
        kept = json.dumps(own) if isinstance(own, str) else _lines(
            {name: value if isinstance(value, int) else _lines(
                {label: json.dumps(tile) for label, tile in value.items()}, 2)
             for name, value in own.items()}, 1)
        blocks.append(f" {json.dumps(device)}: {kept}")
    return "{\n" + ",\n".join(blocks) + "\n}\n"


def _lines(pairs: dict[str, Any], depth: int) -> str:
    """An object of JSON, a line a pair."""
    lines = [f"{' ' * (depth + 1)}{json.dumps(k)}: {v}" for k, v in pairs.items()]
    return "{\n" + ",\n".join(lines) + "\n" + " " * depth + "}"


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
    # TPUs' rows say how much fast memory there is, GPUs' do not
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


def tile(device: str, kernel: str, shape: Shape, override: tuple | None = None,
         backend: str = "tpu") -> Any:
    """The tile of a call: `override` for its first numbers, or the table's row for its
    class of shapes, cut down to the tokens that are there."""
    if backend in PADDED:
        # the keys of Blackwell's backward pass are the lanes of tensor memory
        fixed = (backend, kernel) == ("blackwell", "flash_backward")
        found = read(device, kernel, str(padded(shape.d, shape.v, backend)), backend)
        return found if fixed else tiles.with_first(found, override)
    found = read(device, kernel, shape.label, backend)
    if backend != "tpu":
        rows, columns, *more = tiles.numbers(tiles.with_first(found, override))

        def least(n):
            return max(1 << (n - 1).bit_length(), 16)

        return type(found)(min(rows, least(shape.t)), min(columns, least(shape.s)),
                           *more)
    if override is not None:
        rows, columns, *more = (-(-n // 8) * 8 for n in override)
        return tiles.FlashTpu(rows, columns, more[0] if more else columns)
    rows, columns, chunk = tiles.numbers(found)
    if shape.matrix:
        most = MATRIX if vmem(device) >= 32 * MIB else MATRIX // 2
        rows, columns = min(rows, most), min(columns, most)
    rows, columns = _even(shape.t, rows, chunk), _even(shape.s, columns, chunk)
    return tiles.FlashTpu(rows, columns, chunk if columns % chunk == 0 else columns)


def chunks(device: str, kernel: str, shape: Shape, channels: bool = False,
           override: tuple | None = None, backend: str = "tpu") -> Any:
    """The tile of a recurrence in chunks; decays by channel have a row of their own,
    and `override` replaces the first numbers."""
    label = shape.label + (" channels" if channels else "")
    return tiles.with_first(read(device, kernel, label, backend), override)


TILES = 10 * MIB  # what the tiles of the backward pass may need
MATRIX = 1024  # a tile of an operand [T,S] is that large at most
LANES = 128  # of a register


def _even(n: int, size: int, step: int) -> int:
    """The size of as many tiles as `size` would cut n tokens into, all alike: a
    multiple of `step`, or of a register's lanes where one tile is enough."""
    count = -(-n // size)
    step = LANES if count == 1 else step
    return -(-n // (count * step)) * step


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
