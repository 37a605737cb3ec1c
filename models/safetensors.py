"""Safetensors: arrays by name in one file that holds nothing but numbers.

Eight bytes with the length of a header, little endian; the header, JSON that says of
each array its type, its shape and where its bytes are; and the bytes, one array after
the other, rows first. Format: github.com/huggingface/safetensors.
"""

from __future__ import annotations

import json
import math
import pathlib
from typing import Any, Mapping

import ml_dtypes
import numpy as np

# names of types in the file
TYPES: dict[str, Any] = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16,
    "BF16": ml_dtypes.bfloat16, "I64": np.int64, "I32": np.int32, "I16": np.int16,
    "I8": np.int8, "U8": np.uint8, "BOOL": np.bool_,
}
NAMES = {np.dtype(kind): name for name, kind in TYPES.items()}
LONGEST = 100_000_000  # bytes of a header, as in the format's own code
METADATA = "__metadata__"


def save(
    path: Any, arrays: Mapping[str, Any], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes arrays by name. ValueError for a type that the format has not."""
    header: dict[str, Any] = {METADATA: dict(metadata)} if metadata else {}
    parts, at = [], 0
    for name in sorted(arrays):
        a = np.asarray(arrays[name])
        if a.dtype not in NAMES:
            raise ValueError(f"{name} is {a.dtype}: expected one of {tuple(TYPES)}")
        data = a.astype(a.dtype.newbyteorder("<")).tobytes()
        header[name] = {"dtype": NAMES[a.dtype], "shape": list(a.shape),
                        "data_offsets": [at, at + len(data)]}
        parts.append(data)
        at += len(data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # bytes of arrays begin at a multiple of 8
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.writelines(parts)


def load(path: Any) -> dict[str, np.ndarray]:
    """The arrays of a file by name. ValueError if it is not of this format."""
    data = pathlib.Path(path).read_bytes()
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > min(LONGEST, len(data) - 8):
        raise ValueError(f"{path} is no safetensors file: its header does not end")
    try:
        header = json.loads(data[8:8 + length])
    except ValueError:
        raise ValueError(f"{path} is no safetensors file: its header is no JSON"
                         ) from None
    body, found = memoryview(data)[8 + length:], {}
    for name, entry in header.items():
        if name != METADATA:
            found[name] = _array(path, name, entry, body)
    return found


def _array(path: Any, name: str, entry: Any, body: memoryview) -> np.ndarray:
    """One array, held against what the header says of it."""
    try:
        kind, shape = np.dtype(TYPES[entry["dtype"]]), tuple(entry["shape"])
        first, last = entry["data_offsets"]
        whole = all(isinstance(n, int) and n >= 0 for n in (*shape, first, last))
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"{path}: {name} has no type, shape and place that are known"
                         ) from None
    size = math.prod(shape) * kind.itemsize
    if not whole or last - first != size or last > len(body):
        raise ValueError(
            f"{path}: {name} of shape {list(shape)} stands at bytes {first} to {last} "
            f"of {len(body)}: expected {size} bytes")
    return np.frombuffer(body[first:last], kind).reshape(shape)
