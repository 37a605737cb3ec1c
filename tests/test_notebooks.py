"""Every notebook runs from top to bottom, in its small form, and holds what its cells
printed and drew in the full one."""

import nbformat
import pytest

from notebooks import store


@pytest.mark.parametrize("path", sorted(store.FOLDER.glob("*.ipynb")),
                         ids=lambda p: p.stem)
def test_it_runs(path, monkeypatch):
    monkeypatch.setenv("ATTN_SMALL", "1")
    monkeypatch.setenv("MPLBACKEND", "agg")
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for cell in code:
        cell.outputs = []
    store.run(notebook, timeout=300)
    outputs = [o for cell in code for o in cell.outputs]
    assert not [o for o in outputs if o.output_type == "error"]


@pytest.mark.parametrize("path", sorted(store.FOLDER.glob("*.ipynb")),
                         ids=lambda p: p.stem)
def test_what_it_holds_is_of_the_code_that_stands_there(path):
    notebook = nbformat.read(path, as_version=4)
    again = f"expected `python notebooks/store.py {path.stem}` after a change"
    assert notebook.metadata.get("outputs_of") == store.digest(notebook), again
    assert any(cell.get("outputs") for cell in notebook.cells), again


@pytest.mark.parametrize("path", sorted(store.FOLDER.glob("*.ipynb")),
                         ids=lambda p: p.stem)
def test_what_it_holds_names_nobodys_folders(path):
    assert "site-packages" not in path.read_text() and "/home" not in path.read_text()
    outputs = [o for cell in nbformat.read(path, as_version=4).cells
               for o in cell.get("outputs", ())]
    assert not [o for o in outputs if o.get("name") == "stderr"]
