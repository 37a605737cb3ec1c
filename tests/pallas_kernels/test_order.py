"""The order of programs on Hopper: every tile of every head once, the same bits, and
memory traffic that is near the least, by a count of what a cache of its size misses."""

import collections
import functools

import jax
import numpy as np
import pytest

from attn.masks import Causal
from pallas_kernels import Refused
from pallas_kernels.flash import mosaic_order
from pallas_kernels.flash.mosaic_order import SECTION, Order, order
from tests.on_device import INTERPRET
from tests.oracles.softmax import flash
from tests.pallas_kernels.test_flash_mosaic import SHORT, inputs

CORES, CACHE = 132, 40 * 2**20  # of an H100, of whose cache other things take a fifth


def programs(found: Order):
    """tile, row and head of each program, in the order of the grid."""
    shape = tuple(found.grid.values())
    for at in np.ndindex(*shape):
        if not found.size:
            yield at
        else:
            section, tile, head = at
            yield (tile, *divmod(section * found.size + head, found.heads))


@pytest.mark.parametrize("sizes", [
    (5, 1, 1, 1, 2**20), (3, 2, 6, 3, 2**22), (2, 7, 1, 1, 2**24), (4, 3, 8, 1, 2**30),
    (2, 16, 16, 4, 2**19),
])
def test_every_tile_of_every_head_is_one_program(sizes):
    tiles, batch, heads, shared, streamed = sizes
    found = order(*sizes)
    wanted = list(np.ndindex(tiles, batch, heads))
    assert sorted(programs(found)) == wanted
    assert list(programs(order(*sizes, ("by_tile",)))) == wanted
    # heads that share their tiles share a section, and these fit into the cache
    assert found.size % shared == 0
    assert found.size == shared or found.size // shared * streamed <= SECTION


def test_more_sections_than_a_grid_counts_are_none():
    assert order(2, 65537, 1, 1, 2**30).size == 0  # each head would be a section
    assert order(2, 65535, 1, 1, 2**30).size == 1


def missed(found: Order, tile: int, t: int, shared: int, kept: int):
    """Bytes of k and v that come from main memory, of a causal forward pass: programs
    in lockstep on all cores, a key tile of `kept` bytes a step, the longest lines
    first, and a cache that drops what was not used for the longest time."""
    todo = collections.deque(programs(found))
    lines, cache, count = [None] * CORES, collections.OrderedDict(), 0
    while todo or any(lines):
        for n in range(CORES):
            if not lines[n] and todo:
                number, b, h = todo.popleft()
                last = t // tile - 1 - number
                lines[n] = [(b, h // shared, j) for j in range(last, -1, -1)]
            if lines[n]:
                key = lines[n].pop()
                count += key not in cache
                cache[key] = True
                cache.move_to_end(key)
                if len(cache) * kept > CACHE:
                    cache.popitem(last=False)
    return count * kept


@pytest.mark.parametrize("b, h, k, t", [(16, 16, 16, 1024), (4, 16, 16, 4096),
                                        (4, 32, 8, 4096)])
def test_sections_read_keys_and_values_about_once(b, h, k, t):
    kept = 128 * 256 * 2  # k and v of 128 tokens, 128 wide, in 16 bits
    least = b * k * t // 128 * kept
    sizes = t // 128, b, h, h // k, t // 128 * kept
    count = functools.partial(missed, tile=128, t=t, shared=h // k, kept=kept)
    assert count(order(*sizes)) <= 1.1 * least
    if h == k:
        assert count(order(*sizes, ("by_tile",))) > 4 * least


def test_the_order_changes_no_bit(monkeypatch):
    """Of two sections of one head. (The gradients in this order are held against
    the function in test_flash_mosaic.)"""
    monkeypatch.setattr(mosaic_order, "SECTION", 1)
    a = inputs(b=2, t=130, s=130)

    def run(variant):
        return jax.jit(functools.partial(
            flash, mask=Causal(), backend="mosaic", tile=SHORT, variant=variant,
            interpret=INTERPRET))(**a)

    jax.tree.map(np.testing.assert_array_equal, run(()), run(("by_tile",)))


def test_a_candidate_that_is_none_is_refused():
    with pytest.raises(Refused, match="variant 'faster': expected some of"):
        flash(**inputs(), backend="mosaic", variant=("faster",), interpret=True)
