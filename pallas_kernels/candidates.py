"""Candidates: forms of a kernel that should be faster, and that no device has judged.

Each is right when interpreted and compiles for its target. It is asked for by the
`variant` of a kernel's call, and nobody gets it unasked; `python -m experiments.device`
proves and times each beside what it would replace. One that is measured to win becomes
the form, and the other one goes; one that loses goes, with a line in MEASURED.md.
"""

from __future__ import annotations

from typing import NamedTuple

from pallas_kernels import Refused


class Candidate(NamedTuple):
    """name: as a call's `variant` has it; backend, kernel: whose it is; what: what
    changes, and what that should bring."""

    name: str
    backend: str
    kernel: str
    what: str


CANDIDATES = (
    Candidate("by_tile", "mosaic", "flash",
              "the order of programs before sections: all heads inside"),
    Candidate("half_sections", "mosaic", "flash",
              "sections of 16 MB: the cache of an H100 is two halves"),
    Candidate("early_dv", "mosaic", "flash",
              "dv begins with dP, so that the matrix units work while ds is made"),
    Candidate("one_loop", "mosaic", "flash",
              "early_dv, and tiles with and without a mask in one loop: less to "
              "compile"),
    Candidate("pairs", "triton", "linear",
              "under decays of channels the pairs of a chunk are made once, by a "
              "kernel of their own, blocks of 16 by one product"),
    Candidate("shared_keys", "triton", "delta",
              "dq and dk added up over the heads of a key head by one program: no "
              "float32 of each head is written"),
    Candidate("four_programs", "triton", "decode",
              "4 programs a multiprocessor for 2: quantised caches wait for latency"),
    Candidate("six_programs", "triton", "decode", "6 programs a multiprocessor"),
    Candidate("two_stages", "triton", "decode",
              "the next tile is on its way while one is computed, at 4 bits, too"),
    Candidate("three_stages", "triton", "decode", "two tiles are"),
)


def of(backend: str, kernel: str) -> tuple[Candidate, ...]:
    """The candidates of a kernel."""
    return tuple(c for c in CANDIDATES if (c.backend, c.kernel) == (backend, kernel))


def checked(backend: str, kernel: str, variant: tuple[str, ...]) -> tuple[str, ...]:
    """`variant`, in the order of the list. Raises Refused for a name that is not in it.
    """
    known = [c.name for c in of(backend, kernel)]
    for name in variant:
        if name not in known:
            raise Refused(f"variant {name!r}: expected some of {known} of {kernel} by "
                          f"{backend}")
    return tuple(name for name in known if name in variant)
