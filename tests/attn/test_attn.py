"""The package by itself: classes by name, and the list of attentions."""

import subprocess
import sys

import pytest

import attn
from attn import __main__ as listing
from tests.test_layering import ANALYSES, LAYERS, NAMES


def test_a_class_is_had_by_its_name():
    from attn import Causal, Landmark, MultiHead, RoPE, SnapKV, Window, landmark

    assert Landmark is landmark.Landmark and SnapKV.__module__ == "attn.snapkv"
    assert {c.__name__ for c in (Causal, MultiHead, RoPE, Window)} == {
        "Causal", "MultiHead", "RoPE", "Window"}
    assert attn.__version__[0].isdigit()


@pytest.mark.parametrize("name", ("Landmrak", "Masks", "__wrapped__", "__Main__"))
def test_a_name_that_is_not_there(name):
    with pytest.raises(AttributeError, match=name):
        getattr(attn, name)


def test_one_import_brings_no_other():
    code = "import sys; from attn import Lightning; "
    code += "assert 'attn.gla' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_attention_is_listed(capsys):
    listing.main()
    out = capsys.readouterr().out
    names = {name.lower() for name, *_ in listing.papers()}
    assert NAMES - ANALYSES - LAYERS <= names and "softmax" in names
    for name in NAMES - ANALYSES - LAYERS:
        assert name in out.lower()
    assert "2305.16300" in out and "kept of" in out
