"""Hosts: how many processes become one run, and what the first tells the others."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import multihost_utils

LONGEST = 4096  # bytes of what the first host tells the others


@dataclasses.dataclass(frozen=True)
class Hosts:
    """Who takes part: the address host:port of the first host, how many there are and
    which one this is, from 0. All or none must be given; None leaves it to jax, which
    asks the pod or the scheduler."""

    coordinator: str | None = None
    count: int | None = None
    index: int | None = None

    def __post_init__(self):
        given = [n for n, v in dataclasses.asdict(self).items() if v is not None]
        if len(given) in (1, 2):
            raise ValueError(
                f"{', '.join(given)} alone: expected coordinator, count and index"
            )
        host, _, port = str(self.coordinator).rpartition(":")
        if given and not (host and port.isascii() and port.isdigit()):
            raise ValueError(f"coordinator={self.coordinator}: expected host:port")
        if given and not 0 < int(port) < 2**16:
            raise ValueError(f"coordinator={self.coordinator}: expected a port from 1 "
                             f"to {2**16 - 1}")
        if given and not 0 <= (self.index or 0) < (self.count or 0):
            raise ValueError(
                f"index={self.index}: expected 0 or more and less than "
                f"count={self.count}"
            )


def join(hosts: Hosts = Hosts(), patience: int = 300) -> None:
    """Waits at most `patience` seconds until all hosts are there; before anything else
    is asked of jax. ValueError if they do not come."""
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(
            hosts.coordinator, hosts.count, hosts.index,
            initialization_timeout=patience,
        )
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0][:200]
        raise ValueError(
            f"the hosts did not come together ({reason.rstrip('.')}): expected every "
            "one to run this, with --coordinator, --count and --index unless a "
            "scheduler knows them"
        ) from None


def say(text: str) -> None:
    """One sentence on the error stream, of the first host alone."""
    if jax.process_index() == 0 and sys.stderr is not None:
        print(text, file=sys.stderr, flush=True)


def agreed(make: Callable[[], str]) -> str:
    """What `make` gives on the first host, which alone calls it, on every host; its
    ValueError too. On one host it is `make()`."""
    if jax.process_count() == 1:
        return make()
    said = ""
    if jax.process_index() == 0:
        try:
            said = "=" + make()
        except ValueError as error:
            said = "!" + str(error)
    letter = np.zeros(LONGEST, np.uint8)
    raw = np.frombuffer(said.encode(), np.uint8)[:LONGEST]
    letter[: raw.size] = raw
    heard = bytes(np.asarray(multihost_utils.broadcast_one_to_all(letter)))
    kind, text = heard[:1], heard[1:].rstrip(b"\0").decode(errors="replace")
    if kind == b"!":
        raise ValueError(text)
    return text
