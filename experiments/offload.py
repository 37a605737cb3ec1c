"""Attention on devices of its own: what it costs, and what it saves.

Lamina (Chen et al., 2024, arXiv:2405.01814) decodes on two kinds of devices. The model
runs on fast ones; the cache, and attention over it, lie on devices with cheap memory,
for attention moves the same bytes an operation however many requests there are. Between
them go q, k, v and the result, (2 + 2 / G) e d B L bytes a token, and attention to
what was there before begins when q arrives: it is merged with the new token's later.

    model      max(2 N B / (a F), (e N + 2 e B d) / (a W))        seconds an iteration
    attention  2 e d L l B / (G b W_mem)
    bandwidth  (2 + 2 / G) e d B L / (alpha (model + attention))  for alpha more latency

with N parameters, width d, L layers, groups of G heads, e = 2 bytes, B requests of l
tokens, on a and b devices. These are roofs, nothing is measured here.

    python -m experiments.offload

takes a second and prints the paper's pairs of equal cost at l = 4096: for LLaMA3-70B
4 H100 decode 5,676 tokens a second, 2 H100 and 4 H20 6,425 one batch after the other
and 6,968 with two in turn, at 8% less a second.
"""

from __future__ import annotations

import dataclasses
import sys
from typing import Any, NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table

from experiments.cli import config
from experiments.cli.config import option

BYTES = 2  # of an element


class Hardware(NamedTuple):
    """FLOP/s in bfloat16, bytes of memory, bytes/s of it, dollars an hour."""

    flops: float
    memory: float
    bandwidth: float
    price: float


class Model(NamedTuple):
    """Bytes of all parameters, layers L, width d, query heads a key head G."""

    size: float
    layers: int
    width: int
    group: int


# the paper's table 1; the price of an H20 is its estimate
HARDWARE = {
    "H100": Hardware(989e12, 80e9, 3.35e12, 11.06),
    "H20": Hardware(148e12, 96e9, 4.0e12, 4.63),
    "TPU v6e": Hardware(918e12, 32e9, 1.64e12, 2.70),
}
MODELS = {
    "LLaMA-33B": Model(64.7e9, 60, 6656, 1),
    "LLaMA-65B": Model(130.1e9, 80, 8192, 1),
    "LLaMA3-70B": Model(137.5e9, 80, 8192, 8),
}
# devices of the model and of attention, of equal cost to twice the first kind
PAIRS = {"LLaMA-33B": (1, 2), "LLaMA-65B": (2, 4), "LLaMA3-70B": (2, 4)}


def cache_bytes(m: Model) -> float:
    """Bytes of the cache a token: 2 e d L / G."""
    return 2 * BYTES * m.width * m.layers / m.group


def model_time(m: Model, batch: int, on: Hardware, devices: int, *, mfu: float = 1.0,
               mbu: float = 1.0) -> float:
    """Seconds of everything but attention, one token each of `batch` requests."""
    work = m.size / BYTES * 2 * batch
    moved = m.size + 2 * BYTES * batch * m.width
    return max(work / (on.flops * mfu), moved / (on.bandwidth * mbu)) / devices


def attention_time(m: Model, batch: int, length: int, on: Hardware, devices: int, *,
                   mbu: float = 1.0) -> float:
    """Seconds of attention over `length` tokens each: bound by the cache's bytes."""
    return cache_bytes(m) * length * batch / (devices * on.bandwidth * mbu)


def traffic(m: Model, batch: int) -> float:
    """Bytes between the two an iteration: q and the result, k and v of a G-th."""
    return (2 + 2 / m.group) * BYTES * m.width * batch * m.layers


def largest_batch(m: Model, length: int, room: float) -> int:
    """Requests of `length` tokens whose caches fit into `room` bytes."""
    return int(room // (cache_bytes(m) * length))


class Point(NamedTuple):
    """One batch on two pools: seconds of both, bytes between them, the bandwidth that
    costs alpha of the latency, tokens a second one after the other, and with two
    batches in turn."""

    model: float
    attention: float
    bytes: float
    bandwidth: float
    serial: float
    pipelined: float


def point(m: Model, batch: int, length: int, fast: Hardware, cheap: Hardware,
          devices: tuple[int, int], alpha: float = 0.2, **roofs: float) -> Point:
    """What a batch costs on devices[0] fast and devices[1] cheap devices."""
    own = model_time(m, batch, fast, devices[0], **roofs)
    attention = attention_time(
        m, batch, length, cheap, devices[1], mbu=roofs.get("mbu", 1.0))
    moved = traffic(m, batch)
    return Point(own, attention, moved, moved / (alpha * (own + attention)),
                 batch / (own + attention), batch / max(own, attention))


def best(m: Model, length: int, fast: Hardware, cheap: Hardware, latency: float,
         most: int = 8) -> tuple[float, tuple[int, int], int]:
    """(tokens a dollar, devices, batch) of all pools of up to `most` devices each, with
    one batch at a time, below `latency` seconds a token; 0 where none is."""
    found: tuple[float, tuple[int, int], int] = (0.0, (0, 0), 0)
    for a in range(1, most + 1):
        for b in range(1, most + 1):
            room = largest_batch(m, length, b * cheap.memory)
            if a * fast.memory < m.size or room < 1:
                continue
            price = (a * fast.price + b * cheap.price) / 3600
            for batch in sorted({room, *(2**n for n in range(11) if 2**n <= room)}):
                at = point(m, batch, length, fast, cheap, (a, b))
                if at.model + at.attention <= latency:
                    found = max(found, (at.serial / price, (a, b), batch))
    return found


@dataclasses.dataclass(frozen=True)
class Config:
    """The requests."""

    length: int = option(4096, "tokens of a request l")
    quiet: bool = option(False, "no table")


TINY = Config(quiet=True)


def run(config_: Config) -> dict[str, Any]:
    """The pairs of equal cost -> plain numbers: tokens a second, dollars an hour."""
    h100, h20 = HARDWARE["H100"], HARDWARE["H20"]
    found: dict[str, Any] = {}
    for name, m in MODELS.items():
        found |= {f"{name}_{key}": value for key, value in pair(
            m, config_.length, h100, h20, PAIRS[name]).items()}
    if not config_.quiet:
        _show(found)
    return found


def pair(m: Model, length: int, fast: Hardware, cheap: Hardware,
         devices: tuple[int, int]) -> dict[str, float]:
    """Two pools against twice as many fast devices alone, whose memory holds both."""
    a, b = devices
    room = b * cheap.memory
    batch, half = (largest_batch(m, length, room / n) for n in (1, 2))
    alone = largest_batch(m, length, 2 * a * fast.memory - m.size)
    time = model_time(m, alone, fast, 2 * a) + attention_time(
        m, alone, length, fast, 2 * a)
    return {
        "batch": batch, "price": a * fast.price + b * cheap.price,
        "serial": point(m, batch, length, fast, cheap, devices).serial,
        "pipelined": point(m, half, length, fast, cheap, devices).pipelined,
        "alone_batch": alone, "alone_price": 2 * a * fast.price,
        "alone": alone / time,
    }


def _show(found: dict[str, Any]) -> None:
    table = Table(box=box.SIMPLE_HEAD, caption="tokens a second, and dollars an hour")
    columns = ("alone", "alone_price", "serial", "pipelined", "price", "batch")
    for column in ("model", *columns):
        table.add_column(column.replace("_", " "), justify="right")
    for name in MODELS:
        table.add_row(name, *(f"{found[f'{name}_{key}']:,.2f}" if "price" in key else
                              f"{found[f'{name}_{key}']:,.0f}" for key in columns))
    Console().print(table)


if __name__ == "__main__":
    config.main(run, Config, __doc__, sys.argv[1:])
