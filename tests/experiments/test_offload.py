"""Lamina's cost model: the paper's pairs, and what must hold of any."""

import pytest

from experiments import offload
from experiments.offload import HARDWARE, MODELS

FAST, CHEAP = HARDWARE["H100"], HARDWARE["H20"]
# of the golden file: batch, serial, pipelined, alone, alone's batch
WANT = {"LLaMA-33B": (29, 673.91, 724.88, 600.11, 14),
        "LLaMA3-70B": (286, 6425, 6968, 5676, 135)}


@pytest.mark.parametrize("name", WANT)
def test_the_pairs_of_equal_cost(name):
    found = offload.run(offload.Config(quiet=True))
    keys = ("batch", "serial", "pipelined", "alone", "alone_batch")
    for key, want in zip(keys, WANT[name]):
        assert found[f"{name}_{key}"] == pytest.approx(want, rel=1e-3), key
    assert found[f"{name}_price"] < found[f"{name}_alone_price"]


def test_a_cache_of_llama3_takes_what_the_paper_says():
    assert offload.cache_bytes(MODELS["LLaMA3-70B"]) == 327_680
    assert offload.largest_batch(MODELS["LLaMA3-70B"], 8192, FAST.memory) in (29, 30)


def test_the_bandwidth_falls_with_length_and_saturates_with_requests():
    m = MODELS["LLaMA3-70B"]
    need = lambda b, l: offload.point(m, b, l, FAST, CHEAP, (1, 1)).bandwidth
    assert need(300, 4096) == pytest.approx(31.1e9, rel=0.01)
    assert need(300, 8192) == pytest.approx(18.2e9, rel=0.01)
    by_batch = [need(b, 8192) for b in (1, 16, 64, 256, 1024)]
    assert by_batch == sorted(by_batch)
    assert by_batch[4] / by_batch[3] < by_batch[1] / by_batch[0]


def test_longer_requests_want_more_devices_for_attention():
    m = MODELS["LLaMA3-70B"]
    shares = []
    for length in (1024, 16384):
        _, (a, b), batch = offload.best(m, length, FAST, CHEAP, latency=0.1)
        assert batch and a >= 2
        shares.append(b / a)
    assert shares[1] >= shares[0]
