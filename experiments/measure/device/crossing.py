"""From how many tokens on a recurrence is faster than exact attention, on a device."""

from __future__ import annotations

import functools
import math
from typing import Any, Iterator

import numpy as np

from experiments.measure import breakeven
from experiments.measure.device import exact_fast, recurrent
from experiments.measure.device.case import BF16, Bench, Case, Row, normal, timed
from experiments.measure.device.fast import with_gradients
from experiments.measure.device.place import Place

LENGTHS, TINY = (512, 1024, 2048, 4096, 8192), (32, 64)
FAMILIES: dict[str, dict[str, Any]] = {
    "linear head": {"decay": "head"}, "linear token": {"decay": "token"},
    "linear channel": {"decay": "channel"}, "delta gated": {}, "scan": {},
}


def cases(place: Place) -> Iterator[Case]:
    """Each recurrence, forward, and with the backward pass."""
    for name, options in FAMILIES.items():
        for back in (False, True):
            way = "both" if back else "forward"
            yield Case(f"fast break-even {way} {name}",
                       functools.partial(_case, place, name, options, back), tier=2)


def _case(place: Place, name: str, options: dict, back: bool, bench: Bench) -> Row:
    """The lengths at which both were timed, 16 heads 128 wide, side by side."""
    h, d = (2, 16) if place.tiny else (16, 128)
    kernel, gains, text = name.partition(" ")[0], {}, []
    for t in TINY if place.tiny else LENGTHS:
        ours = recurrent.ours(place, kernel, place.others[0], BF16)
        args = recurrent.arguments(kernel, t=t, h=h, d=d, **options)
        exact = exact_fast.call(place, place.exact[0])
        whole = exact_fast.arrays(back, t=t, h=h, d=d)
        f = lambda *a: ours(*a)[-1]
        if back:
            f = with_gradients(f, len(args))
            args, exact = (*args, normal(9, 1, t, h, d)), with_gradients(exact, 3)
        programs = {n: (bench.compiled(g, *a)[0], a) for n, g, a in (
            ("exact", exact, whole), (name, f, args))}
        with bench.alone():
            spent = timed({n: functools.partial(g, *a) for n, (g, a) in
                           programs.items()})
        ms = {n: float(np.median(times)) * 1e3 for n, times in spent.items()}
        gains[t] = math.log(ms["exact"] / ms[name])
        text.append(f"T {t}: {ms[name]:.3g} ms, exact {ms['exact']:.3g} ms")
    return {"said": f"faster from {breakeven.crossing(gains)} tokens on; "
                    + "; ".join(text)}
