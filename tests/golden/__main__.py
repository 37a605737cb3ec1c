"""python -m tests.golden FILE.npz ...: holds the library against golden vectors.

A file holds arrays named `case/array` and a JSON text `case/config` a case. The adapter
of `slug.npz` is `tests/golden/slug.py` (`-` becomes `_`): its `run(case)` gets the
arrays of one case and the parsed config, and returns arrays under the names of the
expected ones. One line an array: its relative error ||a - b|| / ||b||. The exit code
is 1 if one is past its tolerance (1e-5, gradients 1e-4, or what the adapter's
`TOLERANCE` says with the spec as its source), or an array was neither read nor
returned. Where a spec asks for another comparison than equality, the adapter's `RULES`
has it, a function (array, expected, all arrays of the adapter) -> error, and the line
names it.
"""

from __future__ import annotations

import importlib
import json
import os
import pathlib
import sys
from typing import Any, Iterator

import jax
import numpy as np

FORWARD, GRADIENT = 1e-5, 1e-4


class Case(dict):
    """The arrays of one case, which remembers which of them were read."""

    def __init__(self, arrays: dict[str, Any]):
        super().__init__(arrays)
        self.read: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        self.read.add(name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        """As `dict.get`, and remembered."""
        return self[name] if name in self else default


def cases(path: pathlib.Path) -> dict[str, Case]:
    """The cases of a golden file by name. ValueError if it is not of that form."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as golden vectors: {error}") from None
    found: dict[str, dict[str, Any]] = {}
    for name, array in arrays.items():
        case, _, rest = name.partition("/")
        if not rest:
            raise ValueError(f"{path}: array {name!r}: expected a name case/array")
        if rest == "config":
            array = json.loads(str(array))
        found.setdefault(case, {})[rest] = array
    return {name: Case(arrays) for name, arrays in found.items()}


def relative(a: np.ndarray, b: np.ndarray) -> float:
    """||a - b|| / ||b||; infinities must agree, and are left out."""
    a, b = (np.asarray(x).astype(np.float64) for x in (a, b))
    if a.shape != b.shape:
        return float("nan")
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    gap = np.linalg.norm(np.where(same, 0, a - b))
    finite = np.where(np.isfinite(b), b, 0)
    return float(gap / max(np.linalg.norm(finite), 1e-30)) if gap else 0.0


def tolerance(adapter: Any, name: str, case: Case) -> float:
    """The bound of one array: the adapter's own, or by kind; `dq` beside `q` is the
    gradient of q."""
    last = name.rpartition("/")[2]
    is_gradient = last.startswith("d") and last[1:] in case.keys()
    own = getattr(adapter, "TOLERANCE", {})
    return own.get(last, GRADIENT if is_gradient else FORWARD)


def check(path: pathlib.Path) -> Iterator[tuple[str, float, float]]:
    """(array, relative error, tolerance) of each array that the adapter returns, and
    error nan for an array that it neither read nor returned."""
    slug = path.stem.replace("-", "_")
    try:
        adapter = importlib.import_module(f"tests.golden.{slug}")
    except ModuleNotFoundError:
        where = f"tests/golden/{slug}.py"
        raise ValueError(f"{path}: there is no adapter {where}") from None
    for name, case in cases(path).items():
        with jax.default_matmul_precision("highest"):
            results = adapter.run(case)
        for array, value in results.items():
            if array not in case.keys():
                raise ValueError(f"{name}: the adapter returned unknown {array!r}")
            rule = getattr(adapter, "RULES", {}).get(array)
            stored = dict.__getitem__(case, array)
            named = f" ({rule.__name__})" if rule else ""
            error = rule(value, stored, results) if rule else relative(value, stored)
            yield f"{name}/{array}{named}", error, tolerance(adapter, array, case)
        for array in sorted(set(case) - case.read - set(results) - {"config"}):
            yield f"{name}/{array} (neither read nor returned)", float("nan"), 0.0


def main(paths: list[str]) -> int:
    """Prints the table; 0 if every array is within its bound."""
    if not paths or paths[0] in ("-h", "--help"):
        print(__doc__)
        return 0 if paths else 2
    failed = 0
    for text in paths:
        try:
            for name, error, bound in check(pathlib.Path(text)):
                good = error <= bound
                failed += not good
                mark = "ok  " if good else "FAIL"
                print(f"{mark} {error:9.2e} <= {bound:.0e}  {text}: {name}", flush=True)
        except ValueError as error:
            print(f"FAIL {error}", flush=True)
            failed += 1
    print(f"{failed} failed" if failed else "all golden vectors hold")
    return 1 if failed else 0


if __name__ == "__main__":
    # meshes of the cases; read when the first array is made
    os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
    sys.exit(main(sys.argv[1:]))
