"""What `tiles.json` says of each kernel: how large its tiles are and how its programs
run. A kernel's row is one of these, field by field."""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class FlashTpu:
    """Queries and keys of a tile, and how many of its keys pass by at once."""

    block_q: int
    block_kv: int
    block_kv_compute: int


@dataclasses.dataclass(frozen=True)
class FlashTriton:
    """Queries and keys of a tile; of chosen blocks, rows are tokens times heads that
    share a choice; of decode, queries of all heads of a key head, and slots."""

    block_q: int
    block_kv: int
    num_warps: int
    num_stages: int


@dataclasses.dataclass(frozen=True)
class FlashMosaic:
    """Queries of a block of warpgroups, keys of a tile, and tiles in its rings."""

    block_q: int
    block_kv: int
    num_stages: int


@dataclasses.dataclass(frozen=True)
class FlashMosaicBackward:
    """The kernel for dk and dv, and of that for dq keys of a tile, and tiles in the
    rings of k and of v."""

    block_q: int
    block_kv: int
    num_stages: int
    dq_block_kv: int
    dq_k_stages: int
    dq_v_stages: int


@dataclasses.dataclass(frozen=True)
class LinearTpu:
    """Tokens of a grid step, and of a chunk."""

    block: int
    chunk: int


@dataclasses.dataclass(frozen=True)
class LinearTriton:
    """Tokens of a chunk and value channels of a program; both widths of a tile of the
    pass over states; key channels at a time, and of the program for their gradients."""

    chunk: int
    block_v: int
    num_warps: int
    num_stages: int
    state_block: int
    state_num_warps: int
    state_num_stages: int
    block_d: int
    dk_num_warps: int
    dk_num_stages: int


@dataclasses.dataclass(frozen=True)
class DeltaTpu:
    """Chunks of a grid step."""

    chunks: int


@dataclasses.dataclass(frozen=True)
class DeltaTriton:
    """Key channels at a time, and columns of the state, of value channels."""

    block_d: int
    block_v: int
    num_warps: int
    num_stages: int


@dataclasses.dataclass(frozen=True)
class MemoryTriton:
    """Columns of W and S of a program of the backward pass, at most."""

    block_v: int
    num_warps: int
    num_stages: int


@dataclasses.dataclass(frozen=True)
class Scan:
    """Tokens of a chunk."""

    chunk: int


KINDS: dict[str, type] = {
    "flash": FlashTpu, "linear": LinearTpu, "delta": DeltaTpu, "scan": Scan,
    "triton_flash": FlashTriton, "triton_blocks": FlashTriton,
    "triton_decode": FlashTriton, "triton_linear": LinearTriton,
    "triton_delta": DeltaTriton, "triton_memory": MemoryTriton, "triton_scan": Scan,
    "mosaic_flash_forward": FlashMosaic, "mosaic_flash_backward": FlashMosaicBackward,
    "blackwell_flash_forward": FlashMosaic,
    "blackwell_flash_backward": FlashMosaicBackward,
}


def kind(name: str) -> type:
    """The class of a row of the table, "triton_delta_keys" as "triton_delta"."""
    while name not in KINDS:
        name = name.rpartition("_")[0]
    return KINDS[name]


def numbers(tile: Any) -> tuple[int, ...]:
    """The fields of a tile in their order."""
    return dataclasses.astuple(tile)


def with_first(tile: Any, override: tuple[int, ...] | None) -> Any:
    """`tile` with its first fields replaced by those that a call asks for."""
    first = tuple(override or ())
    return type(tile)(*first, *numbers(tile)[len(first):])
