"""Loading: a folder becomes a model and its parameters, and back."""

from __future__ import annotations

import json
import pathlib
import re
import tempfile
from typing import Any, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from models.checkpoint.architectures import (
    architecture, described, normalised, unpacked,
)
from models.checkpoint.config import Config, Reader, read_config
from models.checkpoint.decoder import Architecture
from models.checkpoint.decoder import DTYPES as COMPUTED
from models.checkpoint.files import DTYPES, OWN, Files, write
from models.checkpoint.tensors import Entry
from models.lm import LM
from models.placement import spec

Tree = Any


def load(folder: Any, mesh: Any = None, dtype: Any = None) -> tuple[LM, Tree]:
    """The model and the parameters of a folder with `config.json` and safetensors.

    mesh: parameters are split over it as `models.placement` says, each as it is read.
    dtype: of the computation, by default what the config says; parameters keep the
    dtype of the file. The most that the host holds beside them is one tensor.
    NotImplementedError for what is not supported, by its name; ValueError or
    FileNotFoundError for a folder that is damaged.
    """
    source = read_config(folder)
    model = model_of(source, dtype)
    entries, found = entries_of(model), architecture(source)
    files = Files(folder)
    names = _named(files, entries, found)
    shapes = _shapes(model)
    _check(files, names, entries, shapes)
    params: dict[str, Any] = {}
    for entry in entries:
        if entry.optional and not all(name in names for name in entry.names):
            continue
        arrays = entry.read(_Lazy(files, [names[n] for n in entry.names]),
                            [shapes[path] for path in entry.paths])
        for path, a in zip(entry.paths, arrays):
            params[path] = _placed(path, a, mesh)
    return model, {"params": _nested(params)}


def save(folder: Any, model: LM, params: Tree) -> None:
    """Writes `config.json` and the parameters as transformers 5 names them, bit by bit
    (what was loaded from MXFP4 as what it was read as); other files of a folder are not
    its own. Old weights go when the new ones are there. ValueError for a model that no
    architecture describes."""
    made = model.source is None
    source = described(model) if made else unpacked(model.source)
    entries = entries_of(model_of(source) if made else model.clone(source=source))
    leaves = _flat(params)
    known = {path for entry in entries for path in entry.paths}
    if leaves.keys() != known:
        odd = sorted(leaves.keys() ^ known)
        raise ValueError(f"the parameters {odd[:3]} are of the model or of its "
                         f"config.json alone ({source!r}): expected the same of both")
    tensors: dict[str, np.ndarray] = {}
    for entry in entries:
        arrays = entry.write([jnp.asarray(leaves[path]) for path in entry.paths])
        tensors |= {n: np.asarray(a) for n, a in zip(entry.names, arrays)}
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    old = {path.name for path in folder.iterdir() if OWN.fullmatch(path.name)}
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder) as beside:
        new = pathlib.Path(beside)
        write(new, tensors)
        text = json.dumps(dict(source), indent=2) + "\n"
        (new / "config.json").write_text(text)
        names = {path.name for path in new.iterdir()}
        for name in sorted(names):
            (new / name).replace(folder / name)
    for name in old - names:
        (folder / name).unlink()


def model_of(source: Config, dtype: Any = None) -> LM:
    """The model that a config describes, without parameters."""
    found, data = architecture(source), normalised(source)
    r = Reader(data)
    named = data.get("dtype", data.get("torch_dtype")) or "float32"
    if named not in COMPUTED:
        raise NotImplementedError(f"dtype={named!r}: not there yet, expected one of "
                                  f"{tuple(COMPUTED)}")
    computed = COMPUTED[named] if dtype is None else dtype
    model = found.model(r, {"dtype": computed, "source": source})
    r.finish()
    return model


def entries_of(model: LM) -> list[Entry]:
    """Which tensor is which parameter, of a model with a source."""
    return architecture(model.source).tensors(Reader(normalised(model.source)), model)


class _Lazy(Sequence):
    """Tensors of a file, each read when it is asked for."""

    def __init__(self, files: Files, names: list[str]):
        self._files, self._names = files, names

    def __getitem__(self, n):
        return self._files[self._names[n]]

    def __len__(self) -> int:
        return len(self._names)


def _named(
    files: Files, entries: list[Entry], found: Architecture
) -> dict[str, str]:
    """{the name that is written today: the name in the file}; ValueError for tensors
    that are missing or that nobody asks for."""
    wanted = {name for entry in entries for name in entry.names}
    names: dict[str, str] = {}
    odd = []
    for name in files.headers:
        ours = name
        for pattern, new in found.renamed if name not in wanted else ():
            ours = re.sub(pattern, new, ours)
            if ours in wanted:
                break
        if ours in wanted and ours not in names:
            names[ours] = name
        elif not any(re.search(pattern, name) for pattern in found.ignored):
            odd.append(name)
    # all that are needed, and all of an optional group of which some are there
    needed = {name for entry in entries for name in entry.names
              if not entry.optional or names.keys() & set(entry.names)}
    missing = sorted(needed - names.keys())
    for text, these in (("has not", missing), ("has too many:", sorted(odd))):
        if these:
            raise ValueError(f"{files.folder} {text} {', '.join(these[:4])}"
                             + (f" and {len(these) - 4} more" if these[4:] else ""))
    return names


def _shapes(model: LM) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter, by its path."""
    # as many tokens as heads: fewer look like another layout
    tokens = jax.ShapeDtypeStruct((1, model.heads), jnp.int32)
    tree = jax.eval_shape(model.init, jax.random.key(0), tokens)
    return {path: a.shape for path, a in _flat(tree).items()}


def _check(files, names, entries: list[Entry], shapes) -> None:
    """ValueError unless all tensors have the shapes and dtypes of the parameters."""
    paths = {path for entry in entries for path in entry.paths}
    assert paths == shapes.keys(), sorted(paths ^ shapes.keys())
    for entry in entries:
        if not all(name in names for name in entry.names):
            continue  # optional
        like = [jax.ShapeDtypeStruct(shapes[p], jnp.float32) for p in entry.paths]
        avals = jax.eval_shape(entry.write, like)
        wanted = [a.shape for a in avals]
        found = [files.headers[names[n]] for n in entry.names]
        good = entry.fits and entry.fits([h.shape for h in found], wanted)
        for name, header, shape, aval in zip(entry.names, found, wanted, avals):
            if not good and header.shape != shape:
                raise ValueError(f"{names[name]} in {header.path.name} has shape "
                                 f"{header.shape}: expected {shape} by config.json")
            kinds = ("U8",) if aval.dtype == jnp.uint8 else tuple(DTYPES)
            if header.dtype not in kinds:
                raise NotImplementedError(
                    f"{names[name]} in {header.path.name} is {header.dtype}: not there "
                    f"yet, expected one of {kinds}")


def _placed(path: str, a: np.ndarray, mesh: Any) -> jax.Array:
    """One parameter on its devices."""
    if mesh is None:
        # in order of its memory: a transpose would be copied twice
        found = jnp.asarray(np.ascontiguousarray(a))
    else:
        where = NamedSharding(mesh, spec(path, a.shape, mesh))
        found = jax.make_array_from_callback(a.shape, where, a.__getitem__)
    # one after the other: what waits to be copied would be held by the host
    return found.block_until_ready()


def _flat(params: Tree) -> dict[str, Any]:
    """{path with slashes: leaf} of {"params": ...}."""
    leaves = jax.tree_util.tree_leaves_with_path(params["params"])
    return {"/".join(str(key.key) for key in path): a for path, a in leaves}


def _nested(flat: dict[str, Any]) -> Tree:
    tree: dict[str, Any] = {}
    for path, a in flat.items():
        *parents, leaf = path.split("/")
        at = tree
        for name in parents:
            at = at.setdefault(name, {})
        at[leaf] = a
    return tree
