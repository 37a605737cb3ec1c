"""Safetensors: what is written is read, byte by byte as the format says."""

import json

import ml_dtypes
import numpy as np
import pytest

from models import safetensors


def test_arrays_of_every_type_come_back(tmp_path):
    path = tmp_path / "a.safetensors"
    rng = np.random.default_rng(0)
    arrays = {f"{name}.weight": (9 * rng.random((3, 2))).astype(kind)
              for name, kind in safetensors.TYPES.items()}
    arrays |= {"scalar": np.float32(2.5), "none": np.zeros((0, 4), np.float32),
               "turned": np.arange(6, dtype=np.float32).reshape(2, 3).T}
    safetensors.save(path, arrays, {"format": "pt"})
    found = safetensors.load(path)
    assert set(found) == set(arrays)
    for name, a in arrays.items():
        assert found[name].dtype == np.asarray(a).dtype
        np.testing.assert_array_equal(found[name], a)


def test_the_bytes_are_those_of_the_format(tmp_path):
    path = tmp_path / "a.safetensors"
    three = np.array([3], ml_dtypes.bfloat16)
    safetensors.save(path, {"b": np.float32([1, 2]), "a": three})
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    assert length % 8 == 0
    assert json.loads(data[8:8 + length]) == {
        "a": {"dtype": "BF16", "shape": [1], "data_offsets": [0, 2]},
        "b": {"dtype": "F32", "shape": [2], "data_offsets": [2, 10]},
    }
    assert data[8 + length:] == b"\x40\x40" + np.float32([1, 2]).tobytes()


def entry(**change):
    return {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **change}


@pytest.mark.parametrize("header, message", [
    (b"not json", "no JSON"), ({"a": entry(dtype="F8")}, "a has no type"),
    ({"a": entry(shape=[3])}, "expected 12 bytes"), ({"a": {}}, "a has no type"),
    ({"a": entry(shape=[-2], data_offsets=[8, 0])}, "expected"),
    ({"a": entry(data_offsets=[8, 16])}, "bytes 8 to 16 of 8"),
])
def test_what_is_no_such_file_is_refused(tmp_path, header, message):
    path = tmp_path / "a.safetensors"
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    with pytest.raises(ValueError, match=message):
        safetensors.load(path)
    path.write_bytes((2**40).to_bytes(8, "little") + text)
    with pytest.raises(ValueError, match="header does not end"):
        safetensors.load(path)
    with pytest.raises(ValueError, match="complex64: expected"):
        safetensors.save(path, {"a": np.complex64([1])})
