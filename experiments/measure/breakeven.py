"""Break-even: from how many tokens on a candidate is faster than exact attention.

Exact attention costs more a token the longer the sequence, a state of fixed size does
not: somewhere the lines cross. The best of all that compute causal softmax attention,
peers included, is what has to be beaten, in the same run.
"""

from __future__ import annotations

import math
from typing import Any

from rich.table import Table


def break_even(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """pass, name and length of each candidate that is not exact: the tokens from which
    on it stays faster than the fastest exact one; "< T" if it is from the first length
    measured on, "> T" if it is not even at the last. rows: length, pass, name, ms and
    exact of `experiments.speed`."""
    found = []
    for which, name in dict.fromkeys((r["pass"], r["name"]) for r in rows):
        own = [r for r in rows if (r["pass"], r["name"]) == (which, name)]
        if own[0]["exact"]:
            continue
        gains = {}
        for row in own:
            exact = [r["ms"] for r in rows if r["exact"]
                     and (r["pass"], r["length"]) == (which, row["length"])]
            if exact:
                gains[row["length"]] = math.log(min(exact) / row["ms"])
        if gains:
            found.append({"pass": which, "name": name, "length": crossing(gains)})
    return found


def crossing(gains: dict[int, float]) -> int | str:
    """The length from which on gains, by length, are more than 0: on a line between two
    measured lengths, over the logarithm of the length."""
    lengths = sorted(gains)
    behind = [n for n, length in enumerate(lengths) if gains[length] <= 0]
    if not behind:
        return f"< {lengths[0]}"
    if behind[-1] == len(lengths) - 1:
        return f"> {lengths[-1]}"
    low, high = lengths[behind[-1]], lengths[behind[-1] + 1]
    share = gains[low] / (gains[low] - gains[high])
    return round(low * (high / low) ** share)


def table(found: list[dict[str, Any]]) -> Table:
    """The lengths for the terminal."""
    shown = Table(title="tokens from which on it is faster than exact attention")
    shown.add_column("candidate", overflow="fold")
    passes = list(dict.fromkeys(one["pass"] for one in found))
    for which in passes:
        shown.add_column(which, justify="right")
    for name in dict.fromkeys(one["name"] for one in found):
        own = {o["pass"]: str(o["length"]) for o in found if o["name"] == name}
        shown.add_row(name, *(own.get(which, "") for which in passes))
    return shown
