"""What a program needs on a pod: distances, times of collectives, wrong calls."""

import dataclasses
import types
from collections import Counter

import jax
import numpy as np
import pytest

from experiments import scale
from experiments.measure.collectives import Collective
from experiments.measure.roofline import SHARE, Roofline, computing, rate, took
from experiments.measure.topology import LINK, Pod, pod
from experiments.training import torus
from pallas_kernels.matrix.targets import TARGETS


def chips(name, *shape):
    """A pod whose devices are places in a torus."""
    places = [types.SimpleNamespace(coords=c, id=0) for c in np.ndindex(shape)]
    return Pod(name, tuple(places), TARGETS[name])


def line(pod_):
    return types.SimpleNamespace(devices=np.array(pod_.devices, object))


def test_a_torus_closes_where_it_is_whole():
    v5e, v5p, part = chips("v5e", 16, 2), chips("v5p", 4, 2), chips("v5e", 4, 2)
    ends = lambda p: [(p.devices[0], p.devices[-1])]
    assert v5e.distance(ends(v5e)) == 2  # one link around, one across
    assert v5p.distance(ends(v5p)) == 2
    assert part.distance(ends(part)) == 4
    assert part.spread(part.devices) == 2 and part.spread(part.devices[::2]) == 1


def test_collectives_take_their_bytes_over_their_links():
    ring = chips("v5p", 4)
    at, link, all_four = line(ring), LINK["v5p"], (0, 1, 2, 3)
    of = lambda kind, size, **more: took(
        ring, at, Collective(kind, "x", size, all_four, **more))
    assert of("all-gather", 4000) == 3000 / (2 * link)
    assert of("reduce-scatter", 1000) == of("all-gather", 4000)
    assert of("all-reduce", 4000) == 2 * of("all-gather", 4000)
    on = tuple((n, (n + 1) % 4) for n in range(4))
    assert of("collective-permute", 1000, pairs=on, times=3) == 3000 / link
    away = tuple((n, (n + 2) % 4) for n in range(4))
    assert of("collective-permute", 1000, pairs=away) == 2000 / link
    # the mean way from one chip of four to any, itself included, is one link
    assert of("all-to-all", 1000) == 1000 / (2 * link)


def test_what_cannot_be_compiled_is_said_in_a_sentence():
    for name in ("v9:2x2", "h200", "v5e"):
        with pytest.raises(ValueError, match="topology=.*expected 'cpu', or one of"):
            pod(name)
    with pytest.raises(ValueError, match=r"mesh=\(1, 3, 1\) has 3 devices: expected"):
        pod("cpu").mesh((1, 3, 1))
    for wrong in ({"tokens": 0}, {"every": -1}, {"exchanges": ("tree",)}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}=.*expected"):
            dataclasses.replace(scale.TINY, **wrong)


def test_a_ring_moves_a_piece_a_step_and_a_linear_layer_one_state():
    short = dataclasses.replace(
        scale.TINY, layer=True, tokens=8 * 16, exchanges=("ring", "gather"))
    long = dataclasses.replace(short, tokens=8 * 32)
    a, b = scale.run(short), scale.run(long)
    shards = jax.device_count()
    assert a["linear_all-gathers"] == b["linear_all-gathers"] == 2
    assert a["linear_all-gather_bytes"] == b["linear_all-gather_bytes"]
    assert "linear_collective-permutes" not in a
    assert not any(k.startswith("ring_all-") for k in a)
    # keys and values, there and back, their gradients, and these home again
    assert a["ring_collective-permutes"] >= 4 * (shards - 1)
    assert b["ring_collective-permute_bytes"] == 2 * a["ring_collective-permute_bytes"]
    assert b["gather_all-gather_bytes"] > a["gather_all-gather_bytes"]


@pytest.mark.parametrize("shape", ((2, 2, 2), (16, 16), (3, 4), (4, 4, 4), (2, 3, 3)))
def test_a_tour_goes_from_link_to_link_and_home(shape):
    coords = np.array(list(np.ndindex(shape)))
    order = torus.tour(coords)
    assert sorted(order) == list(range(len(coords)))
    links = np.abs(coords[order] - coords[np.roll(order, -1)]).sum(1)
    assert (links == 1).all()


def test_a_tour_of_what_is_no_grid_is_left_as_it_is():
    assert torus.tour(np.array([(0, 0), (0, 1), (1, 0)])) is None
    one = np.empty((1, 3, 1), object)
    one[0, :, 0] = [types.SimpleNamespace(id=n) for n in range(3)]
    assert torus.toured(one) is one


def test_every_group_along_seq_goes_the_same_way():
    """Two rows of eight chips: along seq each is one link from the next."""
    chips_ = [types.SimpleNamespace(coords=c, core_on_chip=0)
              for c in np.ndindex(2, 2, 4)]
    placed = np.array(chips_, object).reshape(2, 8, 1)
    for row in torus.toured(placed)[:, :, 0]:
        at = np.array([d.coords for d in row])
        assert (np.abs(at - np.roll(at, -1, 0)).sum(1) == 1).all()


def test_products_are_counted_apart_and_no_kernel_beats_the_peak():
    peak = chips("v5p", 4).target.peak
    of = lambda **work: computing(chips("v5p", 4), Counter(work))
    assert of(matmul=SHARE * peak) == 1
    ours = rate("v5p", "flash_forward")
    assert of(flash_forward=ours) == pytest.approx(1)
    products = {"flash_forward products": 2 * peak}
    assert of(**products) == pytest.approx(max(2, 2 * peak / ours))
    both = Counter({"matmul": 1, "flash products": 2, "flash": 4, "other": 8})
    assert Roofline(0, {}, both, None, None, None).products == 3
