"""The golden vectors hold, and the runner says so when they do not."""

import json
import pathlib

import numpy as np
import pytest

from attn.contract import dispatch
from tests.golden import flashattention
from tests.golden.__main__ import cases, main, relative, tolerance

FOLDER = pathlib.Path(__file__).parent / "golden"
FILES = sorted(FOLDER.glob("*.npz"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_golden_vectors_hold(path, capsys):
    assert main([str(path)]) == 0, capsys.readouterr().out


@pytest.mark.parametrize("platform", ("tpu", "gpu"))
@pytest.mark.parametrize("name", cases(FOLDER / "flashattention.npz"))
def test_golden_vectors_hold_in_the_kernels(name, platform, monkeypatch):
    monkeypatch.setattr(dispatch, "INTERPRETED", platform)
    case = cases(FOLDER / "flashattention.npz")[name]
    for array, value in flashattention.run(case, "pallas").items():
        error = relative(value, case[array])
        assert error <= tolerance(flashattention, array, case), (array, error)


def changed(path, tmp_path, name, change, to=None):
    """A copy of a golden file with one array changed, or added."""
    with np.load(path) as file:
        arrays = dict(file)
    arrays[to or name] = change(arrays[name])
    copy = tmp_path / path.name
    np.savez(copy, **arrays)
    return str(copy)


def test_a_wrong_vector_fails(tmp_path, capsys):
    name = "case0/decode_out"
    path = changed(FOLDER / "snapkv.npz", tmp_path, name, lambda a: a * 1.1)
    assert main([path]) == 1
    out = capsys.readouterr().out
    assert "FAIL" in out and name in out and "1 failed" in out


def test_an_array_that_nobody_reads_is_named(tmp_path, capsys):
    path = changed(FOLDER / "snapkv.npz", tmp_path, "case0/q", lambda a: a, "case0/odd")
    assert main([path]) == 1
    assert "case0/odd (neither read nor returned)" in capsys.readouterr().out


@pytest.mark.parametrize("name, text", [
    ("landmark.npz", "cannot be read"), ("unknown.npz", "no adapter"),
])
def test_a_file_that_cannot_be_used(tmp_path, capsys, name, text):
    path = tmp_path / name
    if name == "unknown.npz":
        np.savez(path, **{"case0/config": json.dumps({})})
    assert main([str(path)]) == 1
    assert text in capsys.readouterr().out


def test_a_pickle_is_not_executed(tmp_path, capsys):
    path = tmp_path / "snapkv.npz"
    np.savez(path, **{"case0/q": np.array([{}], dtype=object)})
    assert main([str(path)]) == 1
    assert "cannot be read" in capsys.readouterr().out
