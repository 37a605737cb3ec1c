"""Candidates of kernels: each right, then in one race with the form that it would
replace and with the peers."""

from __future__ import annotations

import functools
from typing import Callable, Iterator, NamedTuple

from experiments.measure.device import cached, exact, exact_fast, peers, recurrent
from experiments.measure.device.case import BF16, Bench, Case, Row, normal
from experiments.measure.device.fast import OURS, Contender, race, with_gradients
from experiments.measure.device.place import Place
from experiments.measure.device.right import check
from pallas_kernels.candidates import CANDIDATES, Candidate


class Trial(NamedTuple):
    """Where a candidate has to show itself: a kernel's right case, and rows of its
    table, each with the backward pass or not; more: candidates that go with it."""

    right: str
    rows: tuple[tuple[str, bool], ...]
    more: tuple[str, ...] = ()


ORDER = (("causal D128 T1024 B16 H16", False), ("causal D128 T1024 B16 H16", True),
         ("causal D128 T4096 B4 H16", False), ("causal D128 T16384 H16", False),
         ("causal D192 V128 T1024 B32 H16", False))
BACK = (("causal D128 T16384 H16", True), ("causal D64 T16384 H32", True),
        ("causal D128 T1024 B16 H16", True))
CACHED = (("B8 S32768 H32 K8 8 bits", False), ("B8 S32768 H32 K8 4 bits", False),
          ("B1 S131072 H32 K8 8 bits", False), ("B1 S131072 H32 K8 4 bits", False))
TRIALS = {
    "by_tile": Trial("grouped", ORDER), "half_sections": Trial("grouped", ORDER),
    "early_dv": Trial("causal", BACK), "one_loop": Trial("causal", BACK),
    "pairs": Trial("linear channel packed", (
        ("linear channel T8192 D128 H16", False),
        ("linear channel T8192 D128 H16", True),
        ("linear channel T32768 D128 H16", False))),
    "shared_keys": Trial("delta K2 packed", (
        ("delta gated T8192 D128 H32 K16", True),
        ("delta gated T32768 D128 H32 K16", True))),
    "four_programs": Trial("4 bits", CACHED), "six_programs": Trial("4 bits", CACHED),
    "two_stages": Trial("4 bits", CACHED, ("four_programs",)),
    "three_stages": Trial("4 bits", CACHED, ("four_programs",)),
}


def cases(place: Place) -> Iterator[Case]:
    """Those whose backend runs here."""
    for one in CANDIDATES:
        if one.backend not in (place.exact if one.kernel == "flash" else place.others):
            continue
        trial, slow = TRIALS[one.name], place.interpret and one.backend == "mosaic"
        name = f"{one.kernel} {one.backend} {one.name}"
        yield Case(f"right {name}", functools.partial(_check, place, one, trial),
                   tier=2 if slow else 1)
        if slow:
            continue
        for n, (row, back) in enumerate(_rows(place, one.kernel, trial)):
            way = "both" if back else "forward"
            yield Case(f"candidate {name} {way} {row}",
                       functools.partial(_race, place, one, trial, row, back),
                       tier=1 if n == 0 else 2)


def _rows(place: Place, kernel: str, trial: Trial) -> tuple[tuple[str, bool], ...]:
    """The rows of a trial, or the one of a kernel that is tiny."""
    if not place.tiny:
        return trial.rows
    known = {"flash": exact_fast.TINY, "decode": cached.TINY}.get(
        kernel, recurrent.TINY)
    name = next(n for n in known if kernel in ("flash", "decode") or kernel in n)
    return (name, kernel != "decode"),


def _check(place: Place, one: Candidate, trial: Trial, bench: Bench) -> Row:
    """The candidate is the function."""
    variant = one.name, *trial.more
    if one.kernel == "flash":
        subject = exact.subject(
            place, one.backend, variant=variant, **exact.RIGHT[trial.right])
    elif one.kernel == "decode":
        subject = cached.subject(
            place, one.backend, cached.RIGHT[trial.right], variant)
    else:
        subject = recurrent.subject(place, one.backend, one.kernel, variant=variant,
                                    **recurrent.RIGHT[trial.right])
    return check(bench, subject)


def _race(place: Place, one: Candidate, trial: Trial, row: str, back: bool,
          bench: Bench) -> Row:
    """It beside the form that it would replace, which the row's ratio is to."""
    forms: dict[str, tuple[str, ...]] = {
        f"{OURS} {one.name}": (one.name, *trial.more), "default": ()}
    told: dict[str, float] = {}
    others: list[Contender] = []
    if one.kernel == "flash":
        shape = exact_fast.shapes(place)[row]
        args: tuple = exact_fast.arrays(back, **shape)
        told["flops"], inputs = exact_fast.flops(back, **shape), 3
        others = peers.contenders(place, **shape)

        def make(variant) -> Callable:
            return exact_fast.call(place, one.backend, variant=variant, **shape)
    elif one.kernel == "decode":
        shape = (cached.TINY if place.tiny else cached.FAST)[row]
        found, inputs = cached.cache(**shape), 0
        args = tuple(found.values())
        told["moved"] = sum(a.nbytes for n, a in found.items() if n[0] in "kv")

        def make(variant) -> Callable:
            f = cached.call(place, one.backend, shape.get("bits", 16), list(found),
                            variant)
            return lambda *a: f(*a)[0]
    else:
        shape = {"h": 16} | (recurrent.TINY if place.tiny else recurrent.FAST)[row]
        args = recurrent.arguments(one.kernel, **shape)
        inputs = len(args)
        if back:
            args = *args, normal(9, 1, shape["t"], shape["h"], args[2].shape[3])
        told["moved"] = sum(a.nbytes for a in args)

        def make(variant) -> Callable:
            f = recurrent.ours(place, one.kernel, one.backend, BF16, variant=variant)
            return lambda *a: f(*a)[-1]

    contenders = [Contender(n, make(variant)) for n, variant in forms.items()] + others
    if back:
        contenders = [c._replace(f=with_gradients(c.f, inputs)) for c in contenders]
    return race(bench, contenders, args, against="default", **told)
