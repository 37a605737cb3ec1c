"""The results of CAB as a table, a heat map and a page."""

from __future__ import annotations

import base64
import html
import pathlib
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from attn.contract.patterns import PATTERNS
from experiments.measure.cab.index import ranked
from experiments.measure.provenance import sentence
from experiments.measure.report import STYLE, cell, plt

WORDS = {"NS": "noncausal self", "CS": "causal self", "NC": "noncausal cross",
         "CC": "causal cross"}


def columns(result: dict[str, Any]) -> list[tuple[str, str]]:
    """(pattern, task or "index") of what was run, in order."""
    found = []
    for pattern in PATTERNS:
        each = result["own"].get(pattern, {})
        names = dict.fromkeys(name for one in each.values() for name in one)
        found += [(pattern, name) for name in names if name != "index"]
        if ranked(each):
            found.append((pattern, "index"))
    return found


def attentions(result: dict[str, Any]) -> list[str]:
    """Those of the rows, in their order."""
    return list(dict.fromkeys(row["attention"] for row in result["rows"]))


def values(result: dict[str, Any], which: str = "own") -> np.ndarray:
    """The index [attentions, columns], nan for what is not there."""
    table = result[which]
    return np.array([[table.get(p, {}).get(one, {}).get(name) for p, name
                      in columns(result)] for one in attentions(result)], float)


def heat_map(result: dict[str, Any], path: pathlib.Path) -> None:
    """Attentions against patterns and tasks, blue what is better than the mean."""
    figure = drawn(result)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def drawn(result: dict[str, Any]) -> Any:
    """The heat map as a figure."""
    names, where, table = attentions(result), columns(result), values(result)
    if not where:  # fewer than three attentions
        table = np.full((max(len(names), 1), 1), np.nan)
    figure, axes = plt.subplots(
        figsize=(3.2 + 0.75 * len(where), 1.6 + 0.38 * len(names)),
        layout="constrained")
    axes.set_facecolor("lightgrey")  # what is not there
    shown = axes.imshow(table, cmap="RdBu", vmin=-2, vmax=2, aspect="auto")
    for (row, column), value in np.ndenumerate(table):
        if np.isnan(value):
            continue
        weight = "bold" if where[column][1] == "index" else "normal"
        text = f"{round(value, 1) + 0:+.1f}"  # no -0.0
        axes.text(column, row, text, ha="center", va="center", fontsize=8,
                  color="white" if abs(value) > 1.3 else "black", weight=weight)
    axes.set_xticks(range(len(where)), [f"{p}\n{name}" for p, name in where],
                    fontsize=8)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    for n, (pattern, name) in enumerate(where[:-1]):
        if where[n + 1][0] != pattern:
            axes.axvline(n + 0.5, color="black", lw=1)
    many = len(result.get("seeds", ()))
    medians = f", medians of {many} seeds" if many > 1 else ""
    figure.suptitle(f"deviations from the mean of what is compared{medians}\n"
                    "grey: it has not this pattern, or was not run,\n"
                    "or with fewer than two others", fontsize=9)
    figure.colorbar(shown, label="better is positive", extend="both")
    return figure


def cells_of(result: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """(titles, rows) of the table: the index of each pattern, ours, of several seeds
    with the least and the greatest, and with the benchmark's mu and sigma, and
    efficiency lengths of time and of memory."""
    alone = result.get("index_seeds", {})
    kinds = [(which, p, found) for which in ("own", "paper") for p in PATTERNS
             if (found := ranked(result[which].get(p, {})))]
    titles = ["attention", *(p if which == "own" else f"{p} by its mu"
                             for which, p, _ in kinds)]
    if result["lengths"]:
        titles += ["length, time", "length, memory"]
    rows = []
    for one in attentions(result):
        row = [one]
        for which, p, found in kinds:
            if one not in found:
                row.append("")
                continue
            each = alone.get(p, {}).get(one, ()) if which == "own" else ()
            numbers = {"index": _rounded(found[one]),
                       "index_seeds": [_rounded(n) for n in each]}
            row.append(cell(numbers, "index", "{:+.2f}"))
        for what in ("ms", "mb") if result["lengths"] else ():
            value = result["lengths"].get(one, {}).get(what)
            number = isinstance(value, (int, float))
            row.append(f"from {value:,.0f}" if number else value or "")
        rows.append(row)
    return titles, rows


def _rounded(number: float) -> float:
    """To two places, and no -0.0."""
    return round(number, 2) + 0.0


def show(result: dict[str, Any], console: Console) -> None:
    """Prints the table, and what patterns have to do with each other."""
    titles, rows = cells_of(result)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True,
                  caption="index: of the tasks that all have, of several seeds the "
                  "median, under it the least and the greatest; length: whether and "
                  "from how many tokens on a layer costs less than exact attention as "
                  "one matrix, empty: not measured, or no line fits")
    table.add_column(titles[0], overflow="fold", min_width=18)
    for title in titles[1:]:
        table.add_column(title.replace(" ", "\n"), justify="right")
    for row in rows:
        table.add_row(*row)
    console.print(table)
    console.print(claims(result), markup=False, highlight=False)


def claims(result: dict[str, Any]) -> str:
    """What became of the benchmark's claims, in sentences."""
    said = []
    for pattern, each in result["own"].items():
        found = ranked(each)
        exact = found.pop("Softmax()", None)
        if exact is not None and found:
            beat = sum(one > exact for one in found.values())
            said.append(f"{pattern}: {beat} of {len(found)} are above exact "
                        f"attention ({exact:+.2f})" + _with_every_seed(result, pattern))
    for pair, value in result["correlations"].items():
        each = result.get("correlations_seeds", {}).get(pair, ())
        alone = f" (seeds: {', '.join(f'{one:+.2f}' for one in each)})" if each else ""
        said.append(f"ranks of {pair.replace(' ', ' and ')} correlate by {value:+.2f}"
                    + alone)
    failed = result["failed"]
    return "\n".join([*said, *(f"failed: {one}" for one in failed)])


def _with_every_seed(result: dict[str, Any], pattern: str) -> str:
    """How many are above exact attention whatever the seed is; "" of one seed."""
    each = dict(result.get("index_seeds", {}).get(pattern, {}))
    exact = each.pop("Softmax()", None)
    if exact is None:
        return ""
    beat = sum(all(a > b for a, b in zip(one, exact)) for one in each.values())
    return f", {beat} with every seed"


def html_page(result: dict[str, Any], picture: pathlib.Path, again: str) -> str:
    """The text of report.html: index, heat map, all measures, claims, provenance, and
    the command that gives all of it again."""
    titles, rows = cells_of(result)
    names = [name for name in dict.fromkeys(n for row in result["rows"] for n in row)
             if name not in ("task", "pattern", "attention")]
    each = [[f"{row['task']}, {row['pattern']}", row["attention"],
             *(f"{row[name]:.4g}" if name in row else "" for name in names)]
            for row in result["rows"]]
    image = base64.b64encode(picture.read_bytes()).decode()
    said = "".join(f"<li>{html.escape(line)}" for line in claims(result).splitlines())
    words = "; ".join(f"{short}: {long}" for short, long in WORDS.items())
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>Which attention for what</title><style>{STYLE}</style>
<h1>Which attention for what</h1>
<p>{html.escape(words)}. {html.escape(result["left_out"])}
{html.escape(sentence(result))}.</p>
<div class="wide">{_table(titles, rows)}</div>
<p>Index: deviations from the mean of what is compared, three attentions or more, of
several seeds the median, the least and the greatest, each among its own networks; and
"by its mu" with the benchmark's constants, which are of its own data and networks; the
mean of the tasks that all attentions of the pattern have, empty where there is none.
Length: whether and from how many tokens on a layer costs less than exact attention as
one matrix; empty: not measured, or no line fits what was.
<p><img alt="heat map" src="data:image/png;base64,{image}">
<ul>{said}</ul>
<h2>All measures</h2>
<div class="wide">{_table(["task", "attention", *names], each)}</div>
<p>All of it again: <code>{html.escape(again)}</code></p>
</html>
"""


def _table(titles: list[str], rows: list[list[str]]) -> str:
    line = lambda tag, cells: "<tr>" + "".join(
        f"<{tag}>{html.escape(text)}</{tag}>" for text in cells) + "</tr>"
    lines = [line("th", titles), *(line("td", row) for row in rows)]
    return "<table>" + "\n".join(lines) + "</table>"
