"""Files: the tensors of a folder, in one safetensors file or in many with an index.

The `safetensors` library (extra `checkpoints`) checks a file and says what is in it;
the numbers are mapped into memory, so that none are held but those of what is made of
them. Pickles are never opened.
"""

from __future__ import annotations

import json
import pathlib
import re
from typing import Any, Iterator, Mapping, NamedTuple

import jax.numpy as jnp
import numpy as np

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
OWN = re.compile(  # the names of the files that are written here
    r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")
PICKLES = "*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl"
DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
BYTES = {"U8": "uint8", "I32": "int32", "I64": "int64", "BOOL": "bool"}
SHARD = 5 * 10**9  # bytes of a file


class Header(NamedTuple):
    """What a file says of a tensor: the file, its shape, its dtype as safetensors name
    it ("BF16"), and from which byte of the file to which it stands."""

    path: pathlib.Path
    shape: tuple[int, ...]
    dtype: str
    bytes: tuple[int, int]


def library() -> Any:
    """The `safetensors` library, or one sentence that says where it comes from."""
    try:
        import safetensors
        import safetensors.numpy
    except ImportError:
        raise ImportError("checkpoints are read by the safetensors library: pip "
                          "install 'attn[checkpoints]'") from None
    return safetensors


class Files(Mapping[str, np.ndarray]):
    """Tensors by name, read when they are asked for; `headers` needs no reading.

    FileNotFoundError for a folder without weights, ValueError for pickles and for files
    or an index that are damaged or do not agree.
    """

    def __init__(self, folder: Any):
        self._mapped: dict[pathlib.Path, np.ndarray] = {}
        self.folder = pathlib.Path(folder)
        if not self.folder.is_dir():
            raise FileNotFoundError(f"{folder} is no folder: expected one with "
                                    f"config.json and {WEIGHTS}")
        index = self.folder / INDEX
        self.headers: dict[str, Header] = {}
        if index.exists():
            self._read_index(index)
        elif (self.folder / WEIGHTS).exists():
            self._read_file(self.folder / WEIGHTS)
        else:
            raise self._missing()

    def _missing(self) -> Exception:
        for pattern in PICKLES:
            for path in sorted(self.folder.glob(pattern))[:1]:
                return ValueError(
                    f"{path} is a pickle, which can run any code when it is read: "
                    f"refused, expected {WEIGHTS}")
        return FileNotFoundError(f"{self.folder} has neither {WEIGHTS} nor {INDEX}")

    def _read_index(self, index: pathlib.Path) -> None:
        found = read_json(index)
        where = found.get("weight_map") if isinstance(found, dict) else None
        if not isinstance(where, dict) or not where:
            raise ValueError(f"{index} has no weight_map: expected one of tensor names "
                             "to file names")
        for name in sorted(set(map(str, where.values()))):
            path = self.folder / name
            if pathlib.PurePath(name).name != name or not name.endswith(".safetensors"):
                raise ValueError(f"{index} names the file {name!r}: expected a "
                                 ".safetensors file of the same folder")
            if not path.exists():
                raise FileNotFoundError(f"{path} is missing, which {index.name} names")
            self._read_file(path)
        for name, file in where.items():
            if name not in self.headers:
                raise ValueError(f"{index} names the tensor {name}, which {file} has "
                                 "not")
            if self.headers[name].path.name != file:
                raise ValueError(f"{index} has the tensor {name} in {file}, and it is "
                                 f"in {self.headers[name].path.name}")

    def _read_file(self, path: pathlib.Path) -> None:
        safetensors = library()
        try:
            opened = safetensors.safe_open(str(path), "numpy")
            places = _places(path)
            for name in opened.keys():
                part = opened.get_slice(name)
                header = Header(path, tuple(part.get_shape()), part.get_dtype(),
                                places[name])
                if name in self.headers:
                    raise ValueError(f"{path} has the tensor {name}, which "
                                     f"{self.headers[name].path.name} has too")
                self.headers[name] = header
        except safetensors.SafetensorError as error:
            raise ValueError(f"{path} is no whole safetensors file: {error}") from None
        self._mapped[path] = np.memmap(path, np.uint8, "r")

    def __getitem__(self, name: str) -> np.ndarray:
        header = self.headers[name]
        if header.dtype not in {**DTYPES, **BYTES}:
            raise NotImplementedError(f"{name} in {header.path} is {header.dtype}: not "
                                      f"there yet, expected one of {tuple(DTYPES)}")
        first, last = header.bytes
        a = self._mapped[header.path][first:last]
        dtype = {**DTYPES, **BYTES}[header.dtype]
        return np.asarray(a).view(jnp.dtype(dtype)).reshape(header.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self.headers)

    def __len__(self) -> int:
        return len(self.headers)


def _places(path: pathlib.Path) -> dict[str, tuple[int, int]]:
    """From which byte to which each tensor of a file stands: behind 8 bytes that hold
    the length of a JSON header comes the header, then the numbers."""
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    header.pop("__metadata__", None)
    begin = 8 + size
    return {name: (begin + said["data_offsets"][0], begin + said["data_offsets"][1])
            for name, said in header.items()}


def read_json(path: pathlib.Path) -> Any:
    """What a file holds; FileNotFoundError or ValueError in one sentence."""
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no JSON: {error}") from None


def write(folder: pathlib.Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes tensors into one file, or, beyond 5 GB, into several with an index."""
    library()
    from safetensors.numpy import save_file

    shards: list[dict[str, np.ndarray]] = [{}]
    size = 0
    for name, a in sorted(tensors.items()):
        if shards[-1] and size + a.nbytes > SHARD:
            shards.append({})
            size = 0
        shards[-1][name] = np.ascontiguousarray(a)
        size += a.nbytes
    if len(shards) == 1:
        return save_file(shards[0], folder / WEIGHTS, metadata={"format": "pt"})
    where: dict[str, str] = {}
    for n, shard in enumerate(shards, 1):
        file = f"model-{n:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(shard, file)
    total = sum(a.nbytes for a in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
