"""The kernel of chosen blocks is the function `attn.blocks.attend`, interpreted."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from attn import blocks
from attn.masks import Causal, Full, Window
from pallas_kernels import Refused
from pallas_kernels.blocks import inverse
from tests.test_flash import close, normal, results

B, T, S, H, K, D, V, BLOCK = 2, 37, 45, 4, 2, 8, 12, 8
SEGMENTS = np.array([[1] * 15 + [2] * 30, [0] * 2 + [1] * 30 + [2] * 13], np.int32)


def picked(heads=H, n=3, many=5, seed=0, empty=0.3):
    """chosen [B,heads,many,n]: distinct blocks, some of them none."""
    rng = np.random.default_rng(seed)
    blocks_ = -(-S // BLOCK)
    found = np.stack([rng.permutation(blocks_)[:n] for _ in range(B * heads * many)])
    found = np.where(rng.random(found.shape) < empty, -1, found)
    return jnp.asarray(found.reshape(B, heads, many, n), jnp.int32)


def arrays(t=T, dtype=jnp.float32):
    shapes = (B, t, H, D), (B, S, K, D), (B, S, K, V)
    return {n: normal(i, *shapes[i]).astype(dtype) for i, n in enumerate("qkv")}


CASES = {
    "causal": lambda: {"mask": Causal(), "chosen": picked()},
    "shared": lambda: {"mask": Causal() & Window(20), "chosen": picked(K)},
    "full": lambda: {"mask": Full(), "chosen": picked(empty=0)},
    "none": lambda: {"mask": Full(), "chosen": picked(empty=1.1)},
    "one": lambda: {"mask": Causal(), "chosen": picked(many=1, n=5), "t": 1},
    "twice": lambda: {"mask": Full(), "chosen": jnp.concatenate([picked()] * 2, -1)},
    "runs": lambda: {
        "mask": Causal(), "chosen": picked(), "q_run": jnp.asarray(SEGMENTS[:, :T]),
        "kv_run": jnp.asarray(SEGMENTS),
    },
    "positions": lambda: {
        "mask": Causal(), "chosen": picked(),
        "q_pos": jnp.broadcast_to(jnp.arange(T) + 9, (B, T)),
        "kv_pos": jnp.broadcast_to(jnp.arange(S)[::-1] + 3, (B, S)),
    },
}


@pytest.mark.parametrize("name", CASES)
def test_the_kernel_is_the_function(name):
    options = CASES[name]() | {"block": BLOCK}
    given = arrays(options.pop("t", T))
    run = lambda how: results(
        functools.partial(blocks.attend, implementation=how), given, options)
    found, again = run("pallas"), run("pallas")
    close(found, run("xla"))
    for n in found:
        np.testing.assert_array_equal(found[n], again[n])


def test_low_precision_is_as_good_as_gathering():
    options = CASES["causal"]() | {"block": BLOCK}
    low = arrays(dtype=jnp.bfloat16)
    run = lambda how, given: results(
        functools.partial(blocks.attend, implementation=how), given, options)
    exact = run("xla", {n: a.astype(jnp.float32) for n, a in low.items()})
    found, rough = run("pallas", low), run("xla", low)
    for n in ("o", "q", "k", "v"):
        gap = lambda x: np.linalg.norm(np.asarray(x[n], np.float64) - exact[n])
        assert gap(found) <= 2 * gap(rough), n


def test_inverse_lists_name_every_choice_once():
    chosen = np.asarray(picked())
    many = -(-S // BLOCK)
    entries, first = (np.asarray(a) for a in inverse(jnp.asarray(chosen), K, many))
    for b in range(B):
        for kv in range(K):
            own = chosen[b, kv * 2:kv * 2 + 2].reshape(-1, chosen.shape[-1])
            for j in range(many):
                listed = entries[b, kv, first[b, kv, j]:first[b, kv, j + 1]]
                want = [n for n, row in enumerate(own) for c in row if c == j]
                assert listed.tolist() == want


def test_refusals_name_their_reason():
    wide = {n: normal(0, 1, 8, 1, 512) for n in "qkv"}
    with pytest.raises(Refused, match="D=512: at most 256"):
        blocks.attend(**wide, chosen=jnp.zeros((1, 1, 1, 1), jnp.int32), block=8,
                      implementation="pallas")
