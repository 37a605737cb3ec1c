"""Seeds: one number is no result; an experiment is run with several seeds, and says the
median, the spread, and whether it has come to an end.

A config with the fields `seed` and `seeds` is run with seed, seed + 1, and so on. A
seed stands for everything that is drawn: data, parameters, dropout.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from experiments.cli.bounds import check_bounds
from experiments.training.runs import new_folder

APART = 0.05  # points of a share, or parts of a median above 1, that seeds may differ
FALLING = 0.05  # of all that a loss has fallen by, in the last fifth of a training


def check(config: Any) -> None:
    """ValueError unless there is a seed or more, and none below 0, and every field is
    within the bounds of its `option`."""
    check_bounds(config)
    if config.seeds < 1:
        raise ValueError(f"seeds={config.seeds}: expected 1 or more")
    if not 0 <= config.seed < 2**31 - config.seeds:
        raise ValueError(f"seed={config.seed}: expected 0 or more, below 2^31")


def each(config: Any) -> list[Any]:
    """The config with each of its seeds, alone."""
    return [dataclasses.replace(config, seed=config.seed + n, seeds=1)
            for n in range(config.seeds)]


def repeated(
    config: Any, once: Callable[[Any], dict[str, Any]], name: str | None,
    claims: Iterable[str] = (),
) -> dict[str, Any]:
    """What `once` gives of the config with each of its seeds, `merged`. Where results
    go to a folder, each seed has its own in it. name: of the folder that is made for a
    config without one; None for none. claims: see `merged`."""
    if config.seeds == 1:
        return merged([once(config)], claims)
    alone = each(config)
    if getattr(config, "folder", None) is not None:
        root = pathlib.Path(config.folder).expanduser()
    elif hasattr(config, "folder") and name is not None:
        root = new_folder(name)
    else:
        return merged([once(one) for one in alone], claims)
    found = [once(dataclasses.replace(one, folder=str(root / f"seed-{one.seed}")))
             for one in alone]
    return merged(found, claims) | {"folder": str(root)}


def merged(found: list[dict[str, Any]], claims: Iterable[str] = ()) -> dict[str, Any]:
    """The median of each number, with the least and the greatest where they differ:
    `recall`, `recall from`, `recall to`. What is no number is that of the first; of a
    number that some seeds do not have, `recall seeds` says how many have it.

    claims: words in the names of the numbers that seeds have to agree about;
    `not_converged` says of which this does not hold, and whether a loss still fell (an
    entry `falling`).
    """
    result: dict[str, Any] = {}
    names = dict.fromkeys(name for one in found for name in one)
    for name in names:
        values = [one[name] for one in found if name in one]
        first = values[0]
        if isinstance(first, bool) or not isinstance(first, (int, float)):
            result[name] = first
            continue
        middle = np.median(values)
        whole = all(isinstance(v, int) for v in values) and middle == int(middle)
        result[name] = int(middle) if whole else float(middle)
        if min(values) != max(values):
            result |= {f"{name} from": min(values), f"{name} to": max(values)}
        if len(values) < len(found):
            result[f"{name} seeds"] = len(values)
    result.pop("falling", None)
    why = unsettled(found, claims)
    return result | ({"not_converged": why} if why else {})


def spread(found: dict[str, Any], name: str, text: str) -> str:
    """A number of what `merged` gave, with the least and the greatest of its seeds:
    "0.52 (0.50 to 0.61)"."""
    shown = text.format(found[name])
    if f"{name} from" not in found:
        return shown
    least, most = (text.format(found[f"{name} {end}"]) for end in ("from", "to"))
    return f"{shown} ({least} to {most})"


def unsettled(found: list[dict[str, Any]], claims: Iterable[str] = ()) -> str:
    """Why the numbers of several seeds are no result yet; "" if they are."""
    why = []
    for name in found[0]:
        if not any(word in name for word in claims) or name == "falling":
            continue
        values = [one[name] for one in found if name in one]
        if apart(values):
            why.append(f"{name} differs by {max(values) - min(values):.3g} between "
                       "seeds")
    if any(one.get("falling") for one in found):
        many = sum(bool(one.get("falling")) for one in found)
        why.append(f"the loss still falls ({many} of {len(found)} seeds)")
    return "; ".join(why)


def apart(values: list[float]) -> bool:
    """Whether seeds differ by more than 5 points of a share, or 5% of a median above
    1."""
    room = APART * max(1.0, abs(float(np.median(values))))
    return max(values) - min(values) > room


def falling(rows: list[dict[str, Any]]) -> bool:
    """Whether the loss still falls at the end of a training: its mean over the last
    fifth of the rows is lower than over the fifth before, by 5% of all that it has
    fallen by. Of fewer than ten rows nothing is said."""
    losses = [row["loss"] for row in rows]
    fifth = len(losses) // 5
    if fifth < 2:
        return False
    before, last = (np.mean(part) for part in
                    (losses[-2 * fifth : -fifth], losses[-fifth:]))
    return bool(before - last > FALLING * max(losses[0] - last, 0) and last < before)
