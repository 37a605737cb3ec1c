"""Local: its windows in float64, as masks of exact attention, and where it has none."""

import jax
import numpy as np
import pytest

from attn.layers import MultiHead
from attn.local import Local
from attn.masks import Causal, Sink, Window
from attn.softmax import Softmax
from tests.compiled import attend
from tests.laws import close, inputs
from tests.oracles.softmax import attention as oracle


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("t, window", [(16, 3), (7, 1), (1, 5), (16, 99)])
def test_it_is_its_definition(t, window, causal):
    q, k, v = inputs(t=t)
    i, j = np.arange(t)[:, None], np.arange(t)[None]
    seen = (i - j < window) & (j <= i) if causal else abs(i - j) <= window
    have = attend(Local(window=window, causal=causal), q, k, v)
    close(have, oracle(q, k, v, seen))


def test_it_is_a_mask_of_exact_attention():
    q, k, v = inputs()
    for local, mask in ((Local(window=4), Causal() & Window(3)),
                        (Local(window=4, causal=False), Window(4, 4)),
                        (Local(window=4, mask=~Sink(3)), Window(3, 0) & ~Sink(3))):
        close(attend(local, q, k, v), attend(Softmax(mask=mask), q, k, v))
    # a stream keeps no more than the window
    assert Local(window=4).init_state(1000, q, k, v).k.shape[1] == 4


def test_there_is_no_cross_attention():
    q, k, v = inputs()
    for causal in (True, False):
        attention = Local(causal=causal)
        with pytest.raises(ValueError, match="T must be S"):
            attention(q[:, :5], k, v)
        with pytest.raises(ValueError, match="context: Local reads"):
            x = jax.numpy.zeros((1, 4, 8))
            MultiHead(attention, heads=2).init(jax.random.key(0), x, context=x)
    with pytest.raises(ValueError, match="window=0: expected 1 or more"):
        Local(window=0)
    with pytest.raises(NotImplementedError, match="no stream"):
        attention.step(Local().init_state(4, q, k, v), q, k, v)
