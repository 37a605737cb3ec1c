"""Kept: what a picture of a policy shows is what its state holds."""

import jax
import numpy as np
import pytest

from attn.adakv import AdaKV
from attn.compose import Compose
from attn.duo import Duo
from attn.kivi import KIVI
from attn.snapkv import SnapKV
from attn.streaming import Streaming
from experiments.measure.kept import kept_positions
from tests.compiled import step

T, K = 20, 2


def state_of(policy):
    keys = jax.random.split(jax.random.key(0), 3)
    args = tuple(jax.random.normal(key, (1, T, n, 8)) for key, n in zip(
        keys, (4, K, K)))
    state = policy.init_state(T + 1, *args)
    return step(policy, state, *args)[0]


def test_every_kind_of_memory():
    found = kept_positions(state_of(Streaming(sinks=2, window=3)), T)
    assert np.flatnonzero(found).tolist() == [0, 1, 17, 18, 19]
    snap = SnapKV(capacity=8, window=3)
    found = kept_positions(state_of(snap), T)
    assert found.shape == (K, T) and found.sum(1).tolist() == [8, 8]
    assert found[:, -3:].all()
    found = kept_positions(state_of(AdaKV(capacity=8, window=3)), T)
    assert abs(found.sum() - 16) <= K and found[:, -3:].all()
    found = kept_positions(state_of(Duo(retrieval=(1,), sinks=1, recent=4)), T)
    assert found.sum(1).tolist() == [T, 5]  # those that hold all come first
    composed = Compose(selection=snap, storage=KIVI(bits=4, group=8, residual=8))
    assert (kept_positions(state_of(composed), T) == kept_positions(
        state_of(snap), T)).all()


def test_codes_alone_say_no_positions():
    args = jax.ShapeDtypeStruct((1, T, K, 8), "float32")
    state = KIVI(bits=4, group=8, residual=8).init_state(T, args, args, args)
    with pytest.raises(ValueError, match="a KIVIState says no positions"):
        kept_positions(state, T)
