"""Patterns: what follows from what classes say, by name."""

import pytest

from attn.__main__ import supported
from attn.contract.patterns import patterns
from attn.essa import Essa
from attn.flow import Flow
from attn.lightning import Lightning
from attn.local import Local
from attn.masks import Causal, Full, Window
from attn.prflash import PrFlash
from attn.sea import SEA
from attn.softmax import Softmax


@pytest.mark.parametrize("attention, found", [
    (Softmax(), "CS NC CC"), (Softmax(mask=Full()), "NS NC CC"),
    (Softmax(mask=Causal() & Window(3)), "CS"), (PrFlash(), "CS"),
    (Flow(), "CS"), (Flow(causal=False), "NS NC"),
    (Lightning(causal=False), "NS"),
    (Lightning(causal=False, slopes="none"), "NS NC CC"),
    (Essa(), "NS"), (Essa(residual=False), "NS NC CC"), (SEA(causal=False), "NS"),
    (Local(), "CS"), (Local(causal=False), "NS"),
], ids=str)
def test_what_an_attention_supports(attention, found):
    assert " ".join(patterns(attention)) == found


def test_a_class_supports_what_some_setting_does():
    assert supported(Softmax) == ("NS", "CS", "NC", "CC")
    assert supported(Local) == ("NS", "CS")
    assert supported(Flow) == ("NS", "CS", "NC")
