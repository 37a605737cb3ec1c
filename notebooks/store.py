"""Runs the notebooks from top to bottom and keeps what they print and draw in them.

    python notebooks/store.py                  # all of them
    python notebooks/store.py start_here       # one

What is kept carries a digest of the code that printed it, which the tests compare with
the code that stands there: a cell that is changed asks for this command again.
"""

from __future__ import annotations

import hashlib
import os
import pathlib
import sys

import nbformat
from nbclient import NotebookClient
from rich.progress import track

FOLDER = pathlib.Path(__file__).parent


def digest(notebook: nbformat.NotebookNode) -> str:
    """Of the sources of its code cells, in their order."""
    code = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    return hashlib.sha256("\0".join(code).encode()).hexdigest()[:16]


def run(notebook: nbformat.NotebookNode, timeout: int = 1800) -> None:
    """Runs all cells; raises nbclient's CellExecutionError with the first that fails.
    timeout: seconds a cell may take."""
    client = NotebookClient(
        notebook, timeout=timeout, kernel_name="python3", record_timing=False,
        resources={"metadata": {"path": str(FOLDER)}},
    )
    client.execute()


def store(path: pathlib.Path) -> None:
    """Runs a notebook and writes it with its outputs and their digest."""
    notebook = nbformat.read(path, as_version=4)
    run(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":  # warnings name the folders of who ran it
            cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr"]
    notebook.metadata["outputs_of"] = digest(notebook)
    nbformat.write(notebook, path)


def main(names: list[str]) -> None:
    """Stores the notebooks of these names, or all."""
    os.environ.pop("MPLBACKEND", None)  # pictures go into the notebook
    paths = {path.stem: path for path in sorted(FOLDER.glob("*.ipynb"))}
    if unknown := [name for name in names if name not in paths]:
        sys.exit(f"{unknown[0]}: expected one of {', '.join(paths)}")
    for name in track(names or list(paths), description="notebooks"):
        store(paths[name])


if __name__ == "__main__":
    main(sys.argv[1:])
